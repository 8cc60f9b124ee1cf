"""`Reference`: the starting model, a copy of the weights that change, as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nemo_r3.actor.offload import HostBuffer


class Reference:
    """A copy of what weights are now, on their device, or on the host, to be copied back each time."""

    def __init__(self, changing: Iterable[nn.Parameter], on_host: bool) -> None:
        """Copies this rank's weights that will change; `on_host` matters only for a GPU's."""
        self._parameters = list(changing)
        weights = [parameter.detach() for parameter in self._parameters]
        self._kept = [HostBuffer(it) if on_host and it.device.type == "cuda" else it.clone() for it in weights]

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(kept.nbytes for kept in self._kept)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Gives the parameters the starting weights inside this block."""
        current = [parameter.data for parameter in self._parameters]
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            if isinstance(kept, HostBuffer):
                parameter.data = torch.empty_like(parameter.data)
                kept.write_to(parameter.data)
            else:
                parameter.data = kept
        yield
        for parameter, weight in zip(self._parameters, current, strict=True):
            parameter.data = weight

    def restore(self) -> None:
        """Overwrites the weights with the starting ones."""
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            if isinstance(kept, HostBuffer):
                kept.write_to(parameter.data)
            else:
                parameter.data.copy_(kept)
