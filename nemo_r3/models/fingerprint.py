"""`fingerprint`: tells checkpoints apart without reading all of their weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nemo_r3.models.architecture import Architecture

SAMPLES = 16
SAMPLE_BYTES = 65536


def fingerprint(path: Path, arch: Architecture) -> str:
    """A hash of the model's shape and of its weight files' sizes, headers and samples of their bytes.

    The same for a copy elsewhere; different after any training step, because a step changes all layers.
    """
    digest = hashlib.sha256(json.dumps(arch.described(), sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for sample in range(SAMPLES):
                handle.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
