"""A few launches of probe.py serve nearly all tests here; each reads checkpoints that the one before it wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import run_script

PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Launch:
    """How one launch ended and what it found, by policy."""

    home: Path
    code: int
    errors: str
    found: dict[str, Any]


def launch(verb: str, home: Path, ranks: int) -> Launch:
    done = run_script(PROBE, verb, home, ranks=ranks, check=False, TORCHDYNAMO_DISABLE="1")
    file = home / f"{verb}.json"
    assert file.is_file(), done.stdout[-2000:] + done.stderr[-6000:]
    return Launch(home, done.returncode, done.stderr, json.loads(file.read_text()))


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("one", tmp_path_factory.mktemp("actor"), 1)


@pytest.fixture(scope="session")
def two(one: Launch) -> Launch:
    return launch("two", one.home, 2)


@pytest.fixture(scope="session")
def four(two: Launch) -> Launch:
    return launch("four", two.home, 4)


@pytest.fixture(scope="session")
def eight(one: Launch) -> Launch:
    return launch("eight", one.home, 8)


@pytest.fixture(scope="session")
def devices(one: Launch) -> Launch:
    return launch("devices", one.home, 2)


@pytest.fixture(scope="session")
def ceiling(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("ceiling", tmp_path_factory.mktemp("ceiling"), 1)


@pytest.fixture(scope="session")
def every(one: Launch, two: Launch, four: Launch) -> dict[str, Any]:
    return one.found | two.found | four.found
