"""`Offload`: between updates, optimizer state in host memory and gradient buffers freed.

    rollout, refit                 update, save, load
    state on the host  --restore-->  state on the device, gradients allocated  --park-->  state on the host

megatron-core's own `offload_to_cpu` also moves the fp32 weights that model and optimizer share, and splits them into
two copies. Here storages are emptied and filled again in place, so every view of them stays valid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage, nn

PIECE, LEAST = 32 * 2**20, 2**20
"""Bytes of the largest pieces of a host buffer, and how many are not cut further, see `sizes_of_pieces`."""

ROUTING = ("probs", "routing_map", "reversed_local_input_permutation_mapping", "num_global_tokens_per_local_expert")
"""Attributes of megatron-core's `MoEAlltoAllTokenDispatcher` that hold tensors of its last pass."""


class HostBuffer:
    """The bytes of one tensor in host memory, pinned if the tensor is on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        """Copies a contiguous tensor, as `read_from` does."""
        self.nbytes = tensor.nbytes
        self._sizes, pinned = sizes_of_pieces(self.nbytes), tensor.device.type == "cuda"
        self._pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in self._sizes]
        self.read_from(tensor)

    def read_from(self, tensor: Tensor) -> None:
        """Copies a contiguous tensor of `nbytes` into this buffer; on a GPU the copy is only queued."""
        for piece, part in zip(self._pieces, _bytes(tensor).split(self._sizes), strict=True):
            piece.copy_(part, non_blocking=True)

    def write_to(self, tensor: Tensor) -> None:
        """Copies this buffer into a contiguous tensor of `nbytes`; on a GPU the copy is only queued."""
        for piece, part in zip(self._pieces, _bytes(tensor).split(self._sizes), strict=True):
            part.copy_(piece, non_blocking=True)


def sizes_of_pieces(count: int) -> list[int]:
    """Sizes of the pieces that `count` bytes are kept in: powers of two, but for fewer than LEAST at the end.

    torch rounds each pinned allocation up to a power of two, which would make a single last piece up to twice as large.
    """
    sizes = []
    while count:
        sizes.append(min(PIECE, 1 << (count.bit_length() - 1)) if count >= LEAST else count)
        count -= sizes[-1]
    return sizes


class Offload:
    """Moves one rank's optimizer state between the device and the host.

    Main weights and moments move bit for bit; gradient buffers come back as zeros. Host buffers are kept for the next
    time.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._hosts: dict[int, HostBuffer] = {}
        self._parked: list[tuple[UntypedStorage, HostBuffer]] = []
        self._freed: list[tuple[UntypedStorage, int]] = []

    def park(self) -> None:
        """Moves the state to the host and frees the gradient buffers, unless that is already done."""
        if self._freed:
            return
        hosts: dict[int, HostBuffer] = {}
        for storage in _own_storages(self._model, self._optimizer):
            host = self._hosts.get(storage._cdata)
            if host is None or host.nbytes != storage.nbytes():
                host = HostBuffer(_whole(storage))
            else:
                host.read_from(_whole(storage))
            hosts[storage._cdata] = host
            self._parked.append((storage, host))
        self._hosts = hosts
        torch.cuda.synchronize()
        for storage, _ in self._parked:
            storage.resize_(0)
        for storage in _gradient_storages(self._model):
            self._freed.append((storage, storage.nbytes()))
            storage.resize_(0)

    def restore(self) -> None:
        """Brings the state back to the device, unless it is there."""
        for storage, size in self._freed:
            storage.resize_(size)
            _whole(storage).zero_()
        for storage, host in self._parked:
            storage.resize_(host.nbytes)
            host.write_to(_whole(storage))
        self._parked, self._freed = [], []

    @property
    def host_bytes(self) -> int:
        """Size of the host buffers, which stay while the state is on the device."""
        return sum(host.nbytes for host in self._hosts.values())


def forget_fp8_weights(module: nn.Module) -> None:
    """Frees the FP8 copies of weights that Transformer Engine keeps from one microbatch to the next.

    It makes them again in the first microbatch of every pass.
    """
    for part in module.modules():
        if (copies := getattr(part, "_fp8_workspaces", None)) is not None:
            copies.clear()


def forget_routing(module: nn.Module) -> None:
    """Frees what megatron-core's dispatchers of tokens to experts keep of their last pass, until the next one.

    One tensor is of the pass's graph, which holds every layer's input with `actor.recompute=full`.
    """
    for part in module.modules():
        if (dispatcher := getattr(part, "token_dispatcher", None)) is not None:
            vars(dispatcher).update(dict.fromkeys(ROUTING))


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Main weights (the model's own in fp32) and moments of this rank."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # no parameters on this rank
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def device_bytes(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> tuple[int, int]:
    """Bytes of gradient buffers and optimizer state on this rank's device, without the model's weights."""
    gradients = sum(storage.nbytes() for storage in _gradient_storages(model))
    return gradients, sum(storage.nbytes() for storage in _own_storages(model, optimizer))


def _gradient_storages(model: DistributedDataParallel) -> list[UntypedStorage]:
    return [buffer.grad_data.untyped_storage() for buffer in model.buffers + model.expert_parallel_buffers]


def _own_storages(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> Iterator[UntypedStorage]:
    """The optimizer's non-empty storages, each once, without those that hold the model's own weights."""
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for tensor in state_tensors(optimizer):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage.nbytes():
            seen.add(storage._cdata)
            yield storage


def _bytes(tensor: Tensor) -> Tensor:
    """[bytes] uint8 view of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def _whole(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8 view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
