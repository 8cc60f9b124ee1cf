"""The lock of the CPU stack holds what pyproject.toml asks for, and not what the CPU stack runs without."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "pip"}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements/cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    return {canonicalize_name(name): version for name, version in pins}


def test_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = locked()
    asked = [*project["dependencies"], *extras["cpu"], *extras["math"], *extras["dev"]]
    for text in [text for text in asked if Requirement(text).name != project["name"]]:
        wanted = Requirement(text)
        version = pins.get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version), f"requirements/cpu.lock: {text} is {version}"


def test_lock_leaves_out_what_is_not_needed() -> None:
    assert not LEFT_OUT & locked().keys()
