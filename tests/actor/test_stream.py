"""The actor's work lies between what the current stream has before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nemo_r3.actor.trainer import on_stream


class Stream:
    """Notes whom it waits for."""

    def __init__(self, name: str, noted: list[str]) -> None:
        self.name, self.noted = name, noted

    def wait_stream(self, other: Stream) -> None:
        self.noted.append(f"{self.name} waits for {other.name}")


def test_work_is_queued_after_what_came_before_and_before_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    own, current = Stream("the actor's", noted), Stream("vLLM's", noted)

    @contextmanager
    def use(chosen: Stream) -> Iterator[None]:
        noted.append(f"on {chosen.name}")
        yield
        noted.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", use)
    with on_stream(own):  # type: ignore[arg-type]
        noted.append("work")
    waits = ["the actor's waits for vLLM's", "on the actor's", "work", "back", "vLLM's waits for the actor's"]
    assert noted == waits
