"""What a benchmark ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
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


def versions(packages: Sequence[str], python: str = sys.executable) -> dict[str, str]:
    """Of Python and packages, as the environment of an interpreter sees them; a peer's sees ours."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {"python": platform.python_version(), **json.loads(found.stdout)}
