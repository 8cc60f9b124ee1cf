"""`TurnCache`: what was sampled in the current step, so that a stopped step can continue (a partial rollout).

    stop    finished turns, and the tokens so far of unfinished ones -> step_000040/turns.safetensors
    resume  step 41 reuses finished turns and continues unfinished ones from their last token

Both matter: finished turns tend to be short, so sampling only the others again would favour short answers. A turn that
is continued with the weights that began it is a sample of the policy like any other.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_r3.files import write_whole
from nemo_r3.rollout.sampling import Completion
from nemo_r3.types import Phase, Trajectory

FILE = "turns.safetensors"


class TurnCache:
    """Completions of one training step, by `turn_id`; stays empty if not enabled.

    Every engine is given all that earlier processes sampled, as the layout may have changed, but one engine alone goes
    on with a turn. So the two are kept apart: the others' copies of that turn are out of date.

    Attributes:
        step: the training step under way, which may also sample for other purposes; 0 before the first.
    """

    def __init__(self, enabled: bool) -> None:
        self.step = 0
        self._enabled, self._in_use = enabled, False
        self._sampled: dict[str, Completion] = {}
        self._restored: dict[str, Completion] = {}

    def begin(self, step: int) -> None:
        """Starts `step`, dropping the turns of any other. Only training steps, which count from 1, are cached.

        What is sampled for another purpose, whose step is below 1, is not, and leaves the cache as it is.
        """
        self._in_use = self._enabled and step > 0
        if step > 0 and step != self.step:
            self.step, self._sampled, self._restored = step, {}, {}

    def get(self, turn: str) -> Completion | None:
        """What has been sampled of a turn so far."""
        return self._sampled.get(turn, self._restored.get(turn)) if self._in_use else None

    def add(self, turn: str, completion: Completion) -> None:
        """Stores all that has been sampled of a turn."""
        if self._in_use:
            self._sampled[turn] = completion

    def sampled(self, step: int) -> dict[str, Completion]:
        """The turns of a step that this process's engine sampled or continued, if they have tokens."""
        return {name: turn for name, turn in self._sampled.items() if turn.ids} if step == self.step else {}

    def restored(self, step: int) -> dict[str, Completion]:
        """The turns of a step as this process was given them."""
        return self._restored if step == self.step else {}

    def restore(self, step: int, turns: Mapping[str, Completion]) -> None:
        """Continues with what an earlier process sampled of `step`."""
        if self._enabled:
            self.step, self._sampled, self._restored = step, {}, dict(turns)


def turn_id(phase: Phase, prompt: Trajectory, key: str, sample: int) -> str:
    """A turn's name, the same in every process, e.g. "retry-5d1c...": its phase and a hash of all that is asked."""
    asked = hashlib.blake2b(f"{key}\x1f{sample}\x1f".encode(), digest_size=12)
    asked.update(array("q", prompt.ids).tobytes())
    return f"{phase}-{asked.hexdigest()}"


def write(file: Path, turns: Mapping[str, Completion]) -> None:
    """Writes turns: ids as int32, log-probabilities as float32, in which vLLM computes them, and experts as they are.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    tensors = {
        "ids": torch.tensor([token for turn in turns.values() for token in turn.ids], dtype=torch.int32),
        "logprobs": torch.tensor([value for turn in turns.values() for value in turn.logprobs], dtype=torch.float32),
    }
    routed = [() if turn.routed_experts is None else turn.routed_experts for turn in turns.values()]
    if any(map(len, routed)):
        tensors["experts"] = torch.from_numpy(np.concatenate([part for part in routed if len(part)]))
    rows = [
        [name, len(turn.ids), turn.finish_reason, turn.version, len(part)]
        for (name, turn), part in zip(turns.items(), routed, strict=True)
    ]
    written = json.dumps(rows)
    write_whole(file, save(tensors, {"turns": written, "sum": _sum(written, tensors)}))


def read(file: Path) -> dict[str, Completion]:
    """The inverse of `write`.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            written, total = (opened.metadata()[name] for name in ("turns", "sum"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a file of turns: {error}") from error
    if _sum(written, tensors) != total:
        raise ValueError("changed since it was written")
    rows, ids, logprobs = json.loads(written), tensors["ids"].tolist(), tensors["logprobs"].tolist()
    spans = pairwise(accumulate((length for _, length, *_ in rows), initial=0))
    places = pairwise(accumulate((count for *_, count in rows), initial=0))
    routed = [tensors["experts"][start:end].numpy() if end > start else None for start, end in places]
    return {
        name: Completion(name, tuple(ids[start:end]), tuple(logprobs[start:end]), reason, version, part)
        for (name, _, reason, version, _), (start, end), part in zip(rows, spans, routed, strict=True)
    }


def _sum(written: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of all that a file says."""
    digest = hashlib.sha256(written.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
