"""Chains of elementwise operations as one kernel on CUDA, where each of them would read and write all its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def fused(function: Callable[Arguments, Result], like: Tensor) -> Callable[Arguments, Result]:
    """The function, compiled where `like` is on a GPU; it keeps intermediate results in float32 there.

    For any number of tokens. Past torch's recompile limit, which one model never reaches, torch warns and runs it
    eagerly.
    """
    return _compiled(function) if like.is_cuda else function


@cache
def _compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    return torch.compile(function, dynamic=True)
