"""Lets megatron-core run without CUDA. Nothing here does anything on a GPU machine.

megatron-core writes `device="cuda"`, asks `torch.cuda` for its RNG and streams, and compares tensor types with
"torch.cuda.FloatTensor". `prepare()` replaces the `torch.cuda` functions once; `cuda_stand_in()` redirects device
names and type strings only while megatron-core runs, so that vLLM never sees it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Stream:
    """Replaces torch.cuda.Stream: on a CPU everything is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Stream:
        """Of an event, only `synchronize` is asked."""
        return self


class _CudaNamesToCpu(TorchFunctionMode):
    """Makes tensors that ask for "cuda" on the CPU, and gives CPU tensor types the names of CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    return isinstance(device, (torch.device, str)) and str(device).startswith("cuda")


@functools.cache
def prepare() -> None:
    """Replaces the functions of `torch.cuda` that megatron-core calls; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    # after torch.compile is switched off
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: nullcontext()
    mcore: Any = mcore_random
    mcore._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    router: Any = moe_utils
    router.te_general_gemm = None  # 0.16.1 leaves it undefined
    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _on_the_host
    buffers: Any = param_and_grad_buffer
    buffers.dist_reduce_scatter_func = _reduce_within
    buffers.dist_all_gather_func = _gather_within


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """How many tokens go where, or None: as all-to-all takes it, which a tensor that is here already would not be."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _reduce_within(part: torch.Tensor, whole: torch.Tensor, *, op: Any, group: Any, async_op: bool) -> None:
    """A reduce-scatter of a buffer into this rank's part of it. gloo reduces all of it, too, but a clone."""
    group.allreduce([whole], op).wait()


def _gather_within(whole: torch.Tensor, part: torch.Tensor, *, group: Any, async_op: bool) -> None:
    """An all-gather of a buffer from the ranks' parts of it. gloo gathers into a copy."""
    for rank, each in enumerate(whole.chunk(group.size())):
        group.broadcast(each, rank).wait()


@contextmanager
def cuda_stand_in() -> Iterator[None]:
    """A block (or decorated function) in which megatron-core may say "cuda"; does nothing where CUDA is available."""
    with nullcontext() if torch.cuda.is_available() else _CudaNamesToCpu():
        yield
