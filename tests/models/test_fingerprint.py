"""A checkpoint's fingerprint: of its shape, which files of weights do not say, and of what they hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from paper_models import shape

from nemo_r3.models import fingerprint


def test_shape_and_weights_tell_checkpoints_apart_and_their_place_does_not(tmp_path: Path) -> None:
    arch, ours, copy = shape("qwen2-1.5b"), tmp_path / "ours", tmp_path / "copy"
    ours.mkdir()
    (ours / "model.safetensors").write_bytes(bytes(3_000_000))
    shutil.copytree(ours, copy)
    found = fingerprint(ours, arch)
    assert fingerprint(copy, arch) == found
    assert fingerprint(ours, replace(arch, rope=replace(arch.rope, theta=5e5))) != found
    (copy / "model.safetensors").write_bytes(bytes(2_999_999) + b"1")
    assert fingerprint(copy, arch) != found
    (copy / "model.safetensors").write_bytes(bytes(3_000_001))
    assert fingerprint(copy, arch) != found
