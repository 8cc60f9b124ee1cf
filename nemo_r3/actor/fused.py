"""`fused`: chains of elementwise operations as one CUDA kernel, which reads and writes its tensors only once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def fused(function: Callable[Arguments, Result], like: Tensor) -> Callable[Arguments, Result]:
    """The function, compiled if `like` is on a GPU, for any number of tokens; intermediate results are float32 there.

    Past torch's recompile limit, which one model never reaches, torch warns and runs it eagerly.
    """
    return _compiled(function) if like.is_cuda else function


@cache
def _compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    return torch.compile(function, dynamic=True)
