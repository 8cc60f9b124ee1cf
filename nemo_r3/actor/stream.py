"""The stream of the actor's work, when vLLM has made another one the process's current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Queues what happens inside on `stream`: after all that is queued so far, and before what comes next."""
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)
