"""The models of arXiv 2505.24726, and others, by name: each one's config.json, without weights, is in tests/shapes/."""

from __future__ import annotations

from pathlib import Path

from nemo_r3.models import Architecture, architecture_of

SHAPES = Path(__file__).parent / "shapes"
NAMES = tuple(sorted(file.stem for file in SHAPES.glob("*.json")))


def shape(name: str) -> Architecture:
    return architecture_of(SHAPES / f"{name}.json")
