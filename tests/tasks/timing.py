"""How long something takes, on a machine that does other things as well."""

from __future__ import annotations

import time
from collections.abc import Callable


def quickest(act: Callable[[], object]) -> float:
    """CPU seconds of the quickest of three times: garbage of other tests may be collected meanwhile."""
    found = []
    for _ in range(3):
        begun = time.process_time()
        act()
        found.append(time.process_time() - begun)
    return min(found)
