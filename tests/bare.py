"""A Python with few packages, as on a login node or a laptop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = {"omegaconf": ("yaml",), "submitit": ("cloudpickle", "typing_extensions"), "jinja2": ("markupsafe",)}
"""What pip installs along with a package."""


def command(folder: Path, packages: str, module: str, *arguments: str) -> list[str]:
    """`python -m module` where nothing but these packages, and what they require, is installed: links in a folder."""
    for name in (found for package in packages.split() for found in (package, *BESIDE[package])):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        place = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        (folder / place.name).symlink_to(place)
    code = (
        f"import runpy, sys; sys.path += {[str(ROOT), str(folder)]}; sys.argv[0] = '-m'; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    return [sys.executable, "-I", "-S", "-c", code, *arguments]
