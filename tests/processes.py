"""Runs programs in processes of their own, forked ones or fresh ones, and writes programs that stand for others."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).parent


def run_python(
    *arguments: str, ranks: int, path: Path, environment: Mapping[str, str], seconds: int, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`, a script or `-m` module, in the directory `path`; several ranks go through torchrun.

    One rank is a fork of `zygote.py`, which spares it the import of large libraries, unless it has to be `fresh`, as a
    shell would start it.
    """
    if ranks == 1 and not fresh:
        return _run_fork(list(arguments), path, environment, seconds)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, *arguments]
    told = {"env": environment, "cwd": path, "timeout": seconds}
    return subprocess.run(command, **told, capture_output=True, text=True, check=False)


def _run_fork(
    arguments: list[str], path: Path, environment: Mapping[str, str], seconds: int
) -> subprocess.CompletedProcess[str]:
    zygote = _zygote()
    assert zygote.stdin and zygote.stdout
    with TemporaryDirectory() as home:
        told = [Path(home, stream) for stream in ("stdout", "stderr")]
        for file in told:
            file.touch()
        order = {"arguments": arguments, "path": str(path), "environment": dict(environment)}
        zygote.stdin.write(json.dumps(order | {file.name: str(file) for file in told}) + "\n")
        zygote.stdin.flush()
        if not select.select([zygote.stdout], [], [], seconds)[0]:
            _end(zygote)
            raise subprocess.TimeoutExpired(arguments, seconds)
        code = zygote.stdout.readline()
        assert code, "zygote.py has ended, its standard error says why"
        return subprocess.CompletedProcess(arguments, int(code), *(file.read_text() for file in told))


@cache
def _zygote() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", str(TESTS / "zygote.py")]
    early = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables = os.environ | early | {"TORCHDYNAMO_DISABLE": "1"}  # as our programs set them before an import
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    zygote = subprocess.Popen(command, env=variables, **pipes, start_new_session=True)
    atexit.register(_end, zygote)
    return zygote


def _end(zygote: subprocess.Popen[str]) -> None:
    """Kills it with all that it has forked; the next launch has a new one."""
    if zygote.poll() is None:
        os.killpg(zygote.pid, signal.SIGKILL)
        zygote.wait()
    _zygote.cache_clear()


def run_script(
    script: Path, *arguments: object, ranks: int = 1, check: bool = True, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script, which may import what tests may; with `check`, a failure shows what it printed."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | environment
    command = (str(script), *map(str, arguments))
    done = run_python(*command, ranks=ranks, path=Path.cwd(), environment=variables, seconds=600, fresh=fresh)
    if check:
        assert not done.returncode, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def program(folder: Path, name: str, script: str) -> None:
    """Writes a program: lines of bash."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
