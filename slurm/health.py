"""Checks a node before its ranks start: `python3 -m slurm.health LOGS GPUS DISK_GB SHM_GB`, once per node.

Prints "host: fine" or "host: what is wrong"; needs omegaconf and PyYAML, but neither torch nor a GPU's libraries.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from slurm.slices import DISK_SETTING, FINE

GPU_SECONDS = 60


def wrong_with_gpus(wanted: int) -> str:
    """Why CUDA cannot use the node's GPUs; empty if it can."""
    if not wanted:
        return ""
    command = [sys.executable, "-m", "slurm.cuda_devices"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        return f"CUDA did not start in {GPU_SECONDS} s"
    if done.returncode:
        return f"{wanted} GPUs were allocated, and CUDA does not start: {' '.join(done.stderr.split())}"
    return f"CUDA sees {int(done.stdout)} GPUs, {wanted} were allocated" if int(done.stdout) < wanted else ""


def wrong_with_disk(logs: Path, wanted_gb: float) -> str:
    """What is wrong with the run directory as this node sees it; empty if nothing is."""
    probe = logs / f".health_{socket.gethostname()}"
    try:
        probe.write_text("written by the health check\n")
        probe.unlink()
    except OSError as error:
        return f"cannot write {logs} ({error.strerror}); run.dir must lie on a file system that all nodes share"
    return _short_of(logs, wanted_gb, DISK_SETTING)


def wrong_with_shm(wanted_gb: float) -> str:
    """What is wrong with shared memory, which NCCL uses; empty if nothing is."""
    return _short_of(Path("/dev/shm"), wanted_gb, "cluster.min_shm_gb")


def _short_of(where: Path, wanted_gb: float, setting: str) -> str:
    free = shutil.disk_usage(where).free / 1e9
    return f"{where} has {free:.1f} GB free, {setting}={wanted_gb:g}" if free < wanted_gb else ""


def main(logs: str, gpus: str, disk_gb: str, shm_gb: str) -> int:
    """Prints the verdict; returns 1 if the node is not fit."""
    checks = (wrong_with_gpus(int(gpus)), wrong_with_disk(Path(logs), float(disk_gb)), wrong_with_shm(float(shm_gb)))
    wrong = "; ".join(text for text in checks if text)
    print(f"{os.environ['SLURMD_NODENAME']}: {wrong or FINE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
