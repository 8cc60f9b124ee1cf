"""The settings' page, and what importing them costs."""

import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from nemo_r3.config import Config
from nemo_r3.config.reference import reference
from nemo_r3.config.schema import Layer, build, leaves

ROOT = Path(__file__).parents[2]
HEAVY = "torch vllm megatron transformers transformer_engine numpy datasets"


def test_docs_are_up_to_date() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m nemo_r3.config > docs/config.md`"


def test_every_key_is_documented() -> None:
    page = reference()
    for leaf in leaves(Config):
        assert f"| `{leaf.key}` |" in page
        assert leaf.field.metadata["help"]


def test_every_default_is_allowed() -> None:
    assert build(Config, [Layer(asdict(Config()))]) == Config()


def test_import_is_light_and_fast() -> None:
    code = f"import sys, nemo_r3.config; print([m for m in '{HEAVY}'.split() if m in sys.modules])"
    seconds = []
    for _ in range(2):  # the first one may compile
        before = children_cpu_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(children_cpu_seconds() - before)
        assert done.stdout.strip() == "[]"
    assert min(seconds) < 1.5, seconds  # an import under 1 s, and starting Python


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
