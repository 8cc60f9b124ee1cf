"""What a benchmark ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, and the threads that were used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of packages in this environment."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
