"""`Layout`: where sequences lie in a microbatch, and which of them share a context.

    [ context ][ context ] [ branch ][ branch ][ branch ] [ branch ][ branch ] [ sequence ]
      0 .. c-1   0 .. d-1    c ..      c ..      c ..       d ..      d ..       0 ..          positions

Every part attends to itself, causally, and a branch also to its context: all that it would see in a row of its own. All
contexts are contiguous, and so are all branches, so either can be taken as a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """Parts laid end to end: part i is tokens cuts[i] up to cuts[i + 1]."""

    cuts: tuple[int, ...]
    device: torch.device

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each part."""
        return list(pairwise(self.cuts))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest part."""
        return max((end - start for start, end in self.spans), default=0)

    @cached_property
    def tensor(self) -> Tensor:
        """[parts + 1] int32, as variable-length kernels want it; the host does not wait for the copy to a GPU."""
        cuts = torch.tensor(self.cuts, dtype=torch.int32)
        return (cuts.pin_memory() if self.device.type == "cuda" else cuts).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class SharedContext:
    """Lengths of a context and of its branches."""

    context: int  # tokens of the context
    branches: int  # tokens of all its branches together


@dataclass(frozen=True)
class Layout:
    """The parts of a microbatch."""

    cuts: tuple[int, ...]  # where contexts, branches and whole sequences begin, in this order, and the last one ends
    shared: tuple[SharedContext, ...]  # the contexts that have branches, in the order of both
    positions: Tensor  # [tokens] int64; a branch's positions continue its context's

    @cached_property
    def parts(self) -> Bounds:
        """All contexts, branches and whole sequences; they cover all tokens."""
        return Bounds(self.cuts, self.positions.device)

    @cached_property
    def branches(self) -> Bounds:
        """The branches of each shared context, within `branch_tokens`."""
        return self._end_to_end([shared.branches for shared in self.shared])

    @cached_property
    def contexts(self) -> Bounds:
        """Each shared context, within `context_tokens`."""
        return self._end_to_end([shared.context for shared in self.shared])

    @property
    def branch_tokens(self) -> slice:
        """The tokens of all branches."""
        start = self.contexts.cuts[-1]
        return slice(start, start + self.branches.cuts[-1])

    @property
    def context_tokens(self) -> slice:
        """The tokens of all shared contexts."""
        return slice(0, self.contexts.cuts[-1])

    def _end_to_end(self, lengths: list[int]) -> Bounds:
        return Bounds((0, *accumulate(lengths)), self.positions.device)
