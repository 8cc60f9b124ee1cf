"""What a benchmark ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def results(file: str, small: bool) -> Path:
    """Where a benchmark writes; what a small run finds is no result and stays out of git."""
    folder = ROOT / ("build" if small else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, and the threads that were used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of packages in this environment."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
