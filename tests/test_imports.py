"""No garbage is looked for among what is imported, and what was garbage before is gone."""

from __future__ import annotations

import gc
import weakref

from nemo_r3.imports import importing


class Garbage:
    """Refers to itself, so that only a search finds that nobody else does."""

    def __init__(self) -> None:
        self.me = self


def test_what_is_there_after_an_import_is_searched_no_more() -> None:
    before = weakref.ref(Garbage())
    with importing():
        assert before() is None and not gc.isenabled()
        imported = weakref.ref(Garbage())
    gc.collect()
    assert gc.isenabled() and imported() is not None
    gc.unfreeze()
    gc.collect()
    assert imported() is None
