"""The settings' page, and what importing them costs."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from nemo_r3.config import Config
from nemo_r3.config.reference import reference
from nemo_r3.config.schema import Layer, build

ROOT = Path(__file__).parents[2]


def test_docs_are_up_to_date() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m nemo_r3.config > docs/config.md`"


def test_every_key_is_documented() -> None:
    rows = [line[2:-2].split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(keys(Config()))
    assert all(row[5] for row in rows)


def keys(config: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        yield from keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]


def test_every_default_is_allowed() -> None:
    assert build(Config, [Layer(asdict(Config()))]) == Config()


def test_import_is_fast() -> None:
    """What it must not import is in recipes/test_imports.py, which runs a plan without it."""
    seconds = []
    for _ in range(2):  # the first one may compile
        before = children_cpu_seconds()
        subprocess.run([sys.executable, "-c", "import nemo_r3.config"], check=True, cwd=ROOT)
        seconds.append(children_cpu_seconds() - before)
    assert min(seconds) < 1.5, seconds  # an import under 1 s, and starting Python


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
