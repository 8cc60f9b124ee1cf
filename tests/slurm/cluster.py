"""A private Slurm on this machine: munge, a controller and virtual nodes, each with its own host name and fake GPUs.

Every node's slurmd runs in namespaces of its own: its host name is n1, n2, ..., /etc/hosts inside names all nodes, and
killing the namespace is a power cut. Nothing of the host is touched: all files lie in one directory, and no daemon
becomes a service. Needs root, for the namespaces and for the GPUs' device nodes.

A slurmd in its own PID namespace writes "1" into its pid file. Nothing here reads pid files: a process is
signalled through the handle that started it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
TOOLS = ("unshare", "nsenter", "setpriv")  # util-linux
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
GPUS = 2
CPUS = 4
NULL_DEVICE = os.makedev(1, 3)
SECONDS_TO_START = 60
POLL = 0.2

CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.sock,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait={kill_wait}
ReturnToService=2
MinJobAge=3600
EnforcePartLimits=ALL
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.1.{place} Port={port} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN\n"
)
GRES = "NodeName={name} Name=gpu File={home}/dev/nvidia[0-{last}]\n"

# unshare's children share a mount namespace of their own, so that its /etc/hosts is theirs alone
BOOT = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -D -N "$1"'


class Cluster:
    """The daemons and the directory they live in; `start` and `stop` may be called again."""

    def __init__(self, home: Path, nodes: int, kill_wait: int = 20) -> None:
        self.home = home  # of configuration, logs and state
        self.nodes = [f"n{place}" for place in range(1, nodes + 1)]
        self._kill_wait = kill_wait
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @staticmethod
    def lacks() -> str:
        """Why no cluster can run here; empty where one can."""
        missing = [name for name in (*SLURM, *TOOLS) if shutil.which(name, path=search_path()) is None]
        if missing:
            return f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge"
        if os.geteuid() != 0:
            return "a virtual cluster needs root, for namespaces and device nodes"
        tried = subprocess.run(["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
        return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster, with nothing of a job around the tests."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        own = {"SLURM_CONF": str(self.home / "slurm.conf"), "PATH": search_path(), "OMP_NUM_THREADS": "1"}
        return kept | own

    def start(self) -> None:
        self._write()
        socket_file = self.home / "munge.sock"
        munge = {"socket": socket_file, "key-file": self.home / "munge.key", "pid-file": self.home / "munged.pid"}
        munge |= {"log-file": self.home / "munged.log", "seed-file": self.home / "munge.seed"}
        self._run(
            "munged", "munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in munge.items())
        )
        self._until(socket_file.exists, "munged opens its socket")
        self._run("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.power_on(node)
        self._until(lambda: set(self.states()) == {"idle"}, "all nodes are idle")

    def stop(self) -> None:
        """Ends every process that `start` began, the nodes with all their steps."""
        for daemon in self._daemons.values():
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons = {}

    def power_on(self, node: str) -> None:
        namespaces = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
        self._run(node, *namespaces, "bash", "-c", BOOT, "boot", node, str(self.home))

    def power_cut(self, node: str) -> None:
        self._daemons[node].kill()
        self._daemons[node].wait()

    def mend(self, *nodes: str) -> None:
        """Boots nodes again that were cut off, and returns when all nodes are idle."""
        for node in nodes:
            if self._daemons[node].poll() is not None:
                self.power_on(node)
            self.ask("scontrol", "update", f"nodename={node}", "state=resume")
        self._until(lambda: set(self.states()) == {"idle"}, "all nodes are idle")

    def states(self) -> list[str]:
        return self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t").split()

    def submit(self, *command: str) -> str:
        """Submits `sbatch COMMAND...` from the repository's root; the job's id."""
        where = f"--output={self.home}/%j.out"
        done = subprocess.run(
            ["sbatch", "--parsable", where, *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, job: str, seconds: float = 300) -> str:
        """Waits for a job to end for good; its state. Says what it printed where that takes too long."""
        deadline = time.monotonic() + seconds
        while (state := self.show(job).get("JobState", "")) not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is {state}\n{self.output(job)[-4000:]}"
            time.sleep(POLL)
        return state

    def show(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def output(self, job: str) -> str:
        file = self.home / f"{job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def on(self, node: str, *command: str) -> None:
        wrapper = self._daemons[node].pid
        inside = Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split()[0]
        subprocess.run(["nsenter", f"--target={inside}", "--all", *command], check=True, timeout=60)

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; "" while the controller does not answer."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not happened():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(
                    f"{log}:\n{log.read_text()[-1500:]}" for log in sorted(self.home.glob("*.[lo][ou][gt]"))
                )
                self.stop()
                raise RuntimeError(f"waited for: {what}; ended: {ended or 'nothing, but it took too long'}\n{logs}")
            time.sleep(POLL)

    def _run(self, name: str, *command: str) -> None:
        """Starts a daemon in the foreground; it dies with this process."""
        with (self.home / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _write(self) -> None:
        for folder in ("state", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        key = self.home / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for gpu in range(GPUS):
            device = self.home / "dev" / f"nvidia{gpu}"
            if not device.exists():
                os.mknod(device, 0o666 | stat.S_IFCHR, NULL_DEVICE)
        port = _free_ports(1 + len(self.nodes))
        values = {"home": self.home, "host": socket.gethostname(), "port": port, "kill_wait": self._kill_wait}
        nodes = "".join(
            NODE.format(name=name, place=place, port=port + place, cpus=CPUS, gpus=GPUS)
            for place, name in enumerate(self.nodes, 1)
        )
        (self.home / "slurm.conf").write_text(CONFIG.format(**values) + nodes)
        gres = (GRES.format(name=name, home=self.home, last=GPUS - 1) for name in self.nodes)
        (self.home / "gres.conf").write_text("".join(gres))
        hosts = [f"127.0.1.{place} {name}\n" for place, name in enumerate(self.nodes, 1)]
        (self.home / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))


def search_path() -> str:
    """PATH with this Python, and with Slurm's daemons."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> int:
    """The first of some neighbouring ports that nothing listens on."""
    for first in range(16_817, 30_000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for place, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + place))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise RuntimeError("no free ports")
