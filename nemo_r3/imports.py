"""`importing`: libraries so large that it takes seconds to look for garbage among their objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, libraries are imported; neither then nor later does Python look for garbage among what exists by the end,
    on a GPU until vLLM has captured its graphs.

    vLLM has it look several times, when an engine starts and when the process ends, through a million objects.
    """
    gc.collect()  # what is garbage already would be kept
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
