"""`Kept`: the turns of the step under way, so that a stopped step continues where it was left.

    stop    finished turns, and the tokens so far of unfinished ones -> step_000040/turns.safetensors
    resume  step 41 reuses finished turns and continues unfinished ones from their last token

Both matter: finished turns are the shorter ones, so resampling only the rest would favour short answers. Continued
with the weights that began it, a turn is a sample of the policy like any other.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from nemo_r3.files import write_whole
from nemo_r3.rollout.sampling import Completion
from nemo_r3.types import Phase, Trajectory

FILE = "turns.safetensors"


class Kept:
    """Completions of one training step by what was asked; keeps nothing where it is off."""

    def __init__(self, enabled: bool) -> None:
        """Holds nothing yet."""
        self._enabled = enabled
        self._step = 0
        self._turns: dict[str, Completion] = {}

    def begin(self, step: int) -> None:
        """Starts `step`, dropping turns of any other. Only training steps, which count from 1, are kept."""
        if step != self._step:
            self._step, self._turns = step, {}

    def find(self, turn: str) -> Completion | None:
        """What has been sampled of a turn, ended or not."""
        return self._turns.get(turn)

    def add(self, turn: str, completion: Completion) -> None:
        """Notes all that has been sampled of a turn."""
        if self._enabled and self._step > 0:
            self._turns[turn] = completion

    def of(self, step: int) -> dict[str, Completion]:
        """All turns of a step that have tokens."""
        return {turn: found for turn, found in self._turns.items() if found.ids} if step == self._step else {}

    def take_up(self, step: int, turns: Mapping[str, Completion]) -> None:
        """Continues with what an earlier process kept of `step`."""
        if self._enabled:
            self._step, self._turns = step, dict(turns)


def turn_id(phase: Phase, prompt: Trajectory, key: str, sample: int) -> str:
    """A turn's name in any process, e.g. "retry-5d1c...": phase, what is asked, for what, and which sample it is."""
    rest = hashlib.blake2b(f"{key}\x1f{sample}\x1f".encode(), digest_size=12)
    rest.update(array("q", prompt.ids).tobytes())
    return f"{phase}-{rest.hexdigest()}"


def write(file: Path, turns: Mapping[str, Completion]) -> None:
    """Writes turns, ids as int32 and log-probabilities as float32, which is what vLLM computes them in.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    tensors = {
        "ids": torch.tensor([token for turn in turns.values() for token in turn.ids], dtype=torch.int32),
        "logprobs": torch.tensor([value for turn in turns.values() for value in turn.logprobs], dtype=torch.float32),
    }
    rows = [[turn, len(found.ids), found.finish_reason, found.version] for turn, found in turns.items()]
    write_whole(file, save(tensors, {"turns": json.dumps(rows)}))


def read(file: Path) -> dict[str, Completion]:
    """The inverse of `write`.

    Raises:
        SafetensorError: the file is cut.
        OSError: it cannot be read.
    """
    with safe_open(file, "pt") as found:
        rows = json.loads(found.metadata()["turns"])
        ids, logprobs = (found.get_tensor(name).tolist() for name in ("ids", "logprobs"))
    ends = pairwise(accumulate((length for _, length, _, _ in rows), initial=0))
    return {
        turn: Completion(turn, tuple(ids[start:end]), tuple(logprobs[start:end]), reason, version)
        for (turn, _, reason, version), (start, end) in zip(rows, ends, strict=True)
    }
