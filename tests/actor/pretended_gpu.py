"""A GPU that is pretended on a CPU: tensors say that they are on it, and what CUDA would refuse raises.

Numbers lie in host memory and are computed there. Every storage has a home, the device that it is said to be on, and an
operation on tensors of two homes raises. FlashAttention checks what it is given, and computes by `kernels.Plain`. What
this cannot show is what CUDA's kernels compute, and when.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_r3.actor.kernels import Parts, Plain
from nemo_r3.algo.layout import Bounds

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BACKEND = "cpu:gloo,cuda:nccl"
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default, aten._pin_memory.default}
"""Operations that may read one device and write another; so may collectives, whose group has a backend for each."""
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""Operations on a GPU's tensor that take indices on the CPU too."""
PLAIN = (Tensor, torch.nn.Parameter)
CONNECTED: dict[str, str] = {}
"""Groups of several ranks that NCCL would have connected for a collective: name -> what megatron-core calls it."""


def home(tensor: Tensor) -> torch.device:
    if type(tensor) in PLAIN:
        return getattr(tensor.untyped_storage(), "home", CPU)
    inner = _inner(tensor)
    return CPU if inner is None else home(inner)


def _inner(tensor: Tensor) -> Tensor | None:
    """What a wrapper, such as Transformer Engine's FP8 tensors, keeps its numbers in."""
    if type(tensor) in PLAIN:
        return None
    return next((part for part in vars(tensor).values() if isinstance(part, Tensor)), None)


def _tensors(items: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, and in the lists there."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


def _on_gpu(what: Any) -> bool:
    """Whether what megatron-core and torch take for a device is the GPU: a name, a number or a device."""
    if isinstance(what, str):
        what = torch.device(what)
    return isinstance(what, int) or what.type == "cuda"


def storages() -> dict[int, int]:
    """Bytes of every storage on the GPU that a tensor still holds."""
    gc.collect()
    tensors = [held for held in gc.get_objects() if isinstance(held, Tensor) and home(held).type == "cuda"]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


class Homes(TorchDispatchMode):
    """Gives every new storage its home, and refuses operations between two."""

    def __init__(self) -> None:
        super().__init__()
        self.gloo: set[str] = set()  # groups of the CPU alone
        self._moves = self._calls = False

    @contextmanager
    def moving(self) -> Any:
        """A copy to the CPU is meant inside: formulas of torch's own ask for "the device of that tensor", a CPU's."""
        self._moves = True
        try:
            yield
        finally:
            self._moves = False

    @contextmanager
    def calling(self) -> Any:
        """Python asks inside, and not one of autograd's formulas, which names the device that a tensor really is on."""
        before, self._calls = self._calls, True
        try:
            yield
        finally:
            self._calls = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        given = list(_tensors((args, tuple(kwargs.values()))))
        for tensor in given:
            if _inner(tensor) is not None:
                with self:
                    return type(tensor).__torch_dispatch__(func, types, args, kwargs)
        tensors = [tensor for tensor in given if not tensor.is_meta]
        asked, backward = kwargs.get("device"), torch._C._current_graph_task_id() != -1
        if asked is not None and asked.type == "cuda":
            kwargs["device"] = CPU
        elif tensors and asked == CPU and not self._moves and (backward or func is aten._to_copy.default):
            asked = None
        kwargs.pop("pin_memory", None)
        if func is aten._pin_memory.default:
            return args[0].clone()
        if any(home(tensor) == GPU for tensor in tensors):
            for storage in (tensor.untyped_storage() for tensor in tensors):
                if getattr(storage, "unsettled", False):
                    storage.home, storage.unsettled = GPU, False
        if name.startswith("c10d"):
            self._check_collective(name, args, tensors)
        elif func not in ACROSS:
            _refuse_two_homes(name, args, tensors)
        old = {tensor.untyped_storage()._cdata for tensor in tensors}
        found = FLASH.get(name, func)(*args, **kwargs)
        first = tensors[:1] if name in INDEXED else tensors
        where = asked or (GPU if any(home(tensor) == GPU for tensor in first) else CPU)
        for tensor in _tensors((found,)):
            if not tensor.is_meta and tensor.untyped_storage()._cdata not in old:
                tensor.untyped_storage().home = where
                tensor.untyped_storage().unsettled = backward and not self._calls and not tensors and where == CPU
        return found

    def _check_collective(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Refuses numbers on the CPU for ranks that have theirs on GPUs; objects are bytes, and may lie there."""
        scripts = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        groups = [ProcessGroup.unbox(script) for script in scripts if str(script._type()).endswith("ProcessGroup")]
        if any(home(tensor) == GPU for tensor in tensors):
            CONNECTED.update((group.group_name, group.group_desc) for group in groups if group.size() > 1)
        here = any(home(tensor) == CPU and tensor.is_floating_point() for tensor in tensors)
        if here and not {group.group_name for group in groups} <= self.gloo:
            raise RuntimeError(f"{name}: tensors on the CPU, {[list(t.shape) for t in tensors]}, in a group of GPUs")


def _refuse_two_homes(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name in INDEXED:
        tensors = [part for part in (args[0], *args[1], *args[2:3]) if isinstance(part, Tensor)]
        if home(args[0]) == GPU:
            tensors = [args[0], *args[2:3]]
    sized = {home(tensor) for tensor in tensors if tensor.dim()}
    if len(sized) > 1 or (sized == {CPU} and any(home(tensor) == GPU for tensor in tensors)):
        raise RuntimeError(f"{name}: tensors on two devices, {[(str(home(t)), list(t.shape)) for t in tensors]}")


class Names(TorchFunctionMode):
    """Answers for `Homes` where torch's Python asks for a tensor's device or names one."""

    def __init__(self, homes: Homes) -> None:
        super().__init__()
        self._homes = homes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and _on_gpu(kwargs["device"]):
            kwargs["device"] = GPU
        if (answer := ASKED.get(func)) is not None and (type(args[0]) in PLAIN or _inner(args[0]) is not None):
            return answer(home(args[0])) if not args[0].is_meta else func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            where = kwargs.pop("device")
            return self._moved(func(*args, **kwargs), where, {})
        if func is torch.Tensor.cuda:
            return self._moved(args[0], GPU, {})
        if func is torch.Tensor.cpu:
            return self._moved(args[0], CPU, {})
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.pin_memory or func is torch.Tensor.numpy:
            assert home(args[0]) == CPU, f"{func.__name__} of a GPU's tensor"
            return args[0].clone() if func is torch.Tensor.pin_memory else func(*args)
        with self._homes.calling():
            result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and home(args[0]) == GPU:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            kwargs, args = kwargs | {"device": home(args[0]), "dtype": args[0].dtype}, args[1:]
        elif args and not isinstance(args[0], torch.dtype):
            kwargs, args = kwargs | {"device": args[0]}, args[1:]
        names = ("dtype", "non_blocking", "copy")
        kwargs |= dict(zip(names, args, strict=False))
        where = kwargs.pop("device", None)
        if where is None or (home(tensor) == GPU) == _on_gpu(where):
            return torch.Tensor.to(tensor, **{"dtype": tensor.dtype} | kwargs)
        return self._moved(tensor, where, kwargs)

    def _moved(self, tensor: Tensor, where: Any, kwargs: dict[str, Any]) -> Tensor:
        where = GPU if _on_gpu(where) else torch.device(where)
        if home(tensor) == where:
            return tensor
        given = {name: kwargs[name] for name in ("dtype", "non_blocking") if name in kwargs}
        with self._homes.moving():
            return aten._to_copy.default(tensor, device=where, **given)


ASKED = {
    torch.Tensor.device.__get__: lambda where: where,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda where: where == GPU,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda where: where == CPU,  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda where: 0 if where == GPU else -1,
}


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, ...]:
    parts = _parts(query, key, *rest)
    _check_flash(query, key, value)
    out, lse = Plain().forward(query.float(), key.float(), value.float(), parts)
    return out.to(query.dtype), lse, torch.empty(2), torch.empty(()), torch.empty(0)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any, **_: Any
) -> tuple[Tensor, ...]:
    parts = _parts(query, key, *rest)
    _check_flash(grad, query, key, value, out)
    assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == (query.shape[1], len(query))
    found = Plain().backward(*(tensor.float() for tensor in (grad, query, key, value, out)), lse, parts)
    return tuple(gradient.to(query.dtype) for gradient in found)


FLASH = {"aten::_flash_attention_forward": _flash_forward, "aten::_flash_attention_backward": _flash_backward}


def _check_flash(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dim() == 3 and tensor.stride(-1) == 1
        assert tensor.shape[-1] % 8 == 0


def _parts(
    query: Tensor, key: Tensor, cuts_q: Tensor, cuts_k: Tensor, longest_q: int, longest_k: int, *rest: Any
) -> Parts:
    dropout, causal = rest[:2]
    assert not dropout
    for cuts in (cuts_q, cuts_k):
        assert cuts.dtype == torch.int32 and cuts.is_contiguous() and home(cuts) == GPU
    queries, keys = Bounds(tuple(cuts_q.tolist()), CPU), Bounds(tuple(cuts_k.tolist()), CPU)
    assert (queries.longest, keys.longest) == (longest_q, longest_k)
    assert (queries.cuts[-1], keys.cuts[-1]) == (len(query), len(key))
    return Parts(queries, keys, causal)


class Stream:
    """Takes the place of torch.cuda's streams and events: everything is already in order."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: Stream()


CUDA = {
    **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache"), lambda *_, **__: None),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "reset_peak_memory_stats"), lambda *_, **__: None),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_, **__: 0),
    **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
    **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), Stream),
    "device_count": lambda: 8,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": lambda device=None: torch.get_rng_state(),  # the numbers are drawn by the CPU's generator
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "default_generators": (torch.default_generator,),
    "stream": lambda stream: nullcontext(),
    "mem_get_info": lambda device=None: (2**36, 2**36),
}
"""What stands for torch.cuda's own."""


def pretend() -> None:
    """From here on this process has a GPU. Once, before `runtime.start`."""
    for name, stands in CUDA.items():
        setattr(torch.cuda, name, stands)
    torch.accelerator.current_stream = CUDA["current_stream"]
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    router: Any = moe_utils
    router.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)  # 0.16.1 leaves it undefined
    storage: Any = torch.UntypedStorage
    storage.device = property(lambda self: getattr(self, "home", CPU))
    wrapped: Any = torch.Tensor._make_wrapper_subclass
    torch.Tensor._make_wrapper_subclass = lambda *args, **kwargs: wrapped(*args, **kwargs | {"device": CPU})
    homes, joined, grouped = Homes(), dist.init_process_group, dist.new_group

    def join(backend: str, **kwargs: Any) -> None:
        assert backend == BACKEND
        joined("gloo", **kwargs)

    def group(*args: Any, **kwargs: Any) -> Any:
        made = grouped(*args, **kwargs | {"pg_options": None})
        if "gloo" in (kwargs.get("backend"), *args):
            homes.gloo.add(getattr(made, "group_name", ""))
        return made

    dist.init_process_group = join
    dist.new_group = distributed_c10d.new_group = group
    autograd: Any = torch.autograd
    autograd.has_torch_function = lambda tensors: False  # or backward would run outside of `Names`
    Names(homes).__enter__()
    homes.__enter__()
