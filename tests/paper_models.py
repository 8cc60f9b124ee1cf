"""The models of arXiv 2505.24726 by name: each one's config.json, without weights, is in tests/shapes/.

Qwen3-30B-A3B's there is not the hub's file: it was written from its published shape.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemo_r3.models import Architecture, architecture_of

SHAPES = Path(__file__).parent / "shapes"
NAMES = tuple(sorted(file.stem for file in SHAPES.glob("*.json")))


def shape(name: str) -> Architecture:
    return architecture_of(SHAPES / f"{name}.json")


def few_experts() -> Architecture:
    """Two layers of 8 of Qwen3-30B-A3B's experts."""
    arch = shape("qwen3-30b-a3b")
    assert arch.experts is not None
    return replace(arch, num_layers=2, experts=replace(arch.experts, count=8))
