"""Transformer Engine on the GPU that is pretended: its Python as it is, its kernels in torch, after what they are for.

FP8 tensors are rounded and laid out as on Hopper, and a product takes the half that Hopper would: what is missing, of
another dtype or FP8 on one side only raises. `PRODUCTS` counts products by the dtype of their operands.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch  # noqa: F401  loads the libraries of the next line
import transformer_engine_torch as tex
from torch import Tensor
from torch.nn.functional import pad
from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch
from transformer_engine.pytorch.tensor import Float8Tensor
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

PRODUCTS: Counter[str] = Counter()
FP8 = (Float8TensorStorage, Float8BlockwiseQTensorStorage)
BLOCK = 128


def torch_dtype(dtype: Any) -> torch.dtype:
    return TE_DType_To_Torch[DType.cast(dtype)]


def turned(tensor: Tensor) -> Tensor:
    """[..., columns] -> [columns, ...]."""
    return tensor.reshape(-1, tensor.shape[-1]).t().reshape(tensor.shape[-1], *tensor.shape[:-1]).contiguous()


# rounding


def scale_of(amax: Tensor, dtype: torch.dtype, quantizer: Any) -> Tensor:
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax.clamp(min=1e-30), torch.ones_like(amax))
    return torch.exp2(scale.log2().floor()) if quantizer.force_pow_2_scales else scale


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype).view(torch.uint8)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if isinstance(tensor, FP8):
        tensor = tensor.dequantize()
    numbers = tensor.detach().float()
    if isinstance(quantizer, Float8BlockQuantizer):
        return _quantize_blocks(numbers, tensor, quantizer, output)
    dtype, amax = torch_dtype(quantizer.dtype), numbers.abs().amax().reshape(1)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scale_of(amax, dtype, quantizer)
    else:
        scale = quantizer.scale.reshape(1).clone()
        quantizer.amax.copy_(amax.reshape(quantizer.amax.shape))
    data = rounded(numbers * scale, dtype)
    made = {
        "data": data if quantizer.rowwise_usage else None,
        "fp8_scale_inv": 1 / scale,
        "data_transpose": turned(data) if quantizer.columnwise_usage else None,
    }
    if output is None:
        return _wrapped(made, tensor, quantizer, Float8TensorStorage, Float8Tensor)
    output._scale_inv.copy_(made["fp8_scale_inv"])
    if output._data is not None:
        output._data.copy_(data)
    if quantizer.columnwise_usage:
        output._transpose, output._transpose_invalid = made["data_transpose"], False
    return output


def _wrapped(made: dict[str, Any], tensor: Tensor, quantizer: Any, storage: Any, wrapper: Any) -> Any:
    made |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        return storage(**made, fake_dtype=tensor.dtype)
    return wrapper(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **made)


def _quantize_blocks(numbers: Tensor, tensor: Tensor, quantizer: Any, output: Any) -> Any:
    rows, shape, made = numbers.reshape(-1, numbers.shape[-1]), tuple(tensor.shape), {}
    for half, used, part, size in (
        ("rowwise", quantizer.rowwise_usage, rows, shape),
        ("columnwise", quantizer.columnwise_usage, rows.t().contiguous(), quantizer.get_columnwise_shape(shape)),
    ):
        data, inverse = _blocks(part, quantizer) if used else (None, None)
        if used:
            assert tuple(inverse.shape) == tuple(quantizer.get_scale_shape(shape, half == "columnwise"))
            data = data.reshape(size)
        made |= {f"{half}_data": data, f"{half}_scale_inv": inverse}
    if output is None:
        made["is_2D_scaled"] = quantizer.block_scaling_dim == 2
        return _wrapped(made, tensor, quantizer, Float8BlockwiseQTensorStorage, Float8BlockwiseQTensor)
    for name, part in made.items():
        if part is not None:
            getattr(output, f"_{name}").copy_(part)
    return output


def _blocks(rows: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Data like [rows, columns], and inverse scales as `get_scale_shape` has them."""
    (count, columns), square = rows.shape, quantizer.block_scaling_dim == 2
    tiles = pad(rows.abs(), (0, -columns % BLOCK, 0, -count % BLOCK if square else 0)).unflatten(1, (-1, BLOCK))
    amax = tiles.unflatten(0, (-1, BLOCK)).amax((1, 3)) if square else tiles.amax(-1)
    dtype = torch_dtype(quantizer.dtype)
    scale = scale_of(amax, dtype, quantizer)
    inverse = 1 / (scale if square else scale.t())
    return rounded(rows * _spread(scale, rows, square), dtype), pad(inverse, (0, -inverse.shape[1] % 4)).contiguous()


def _spread(scale: Tensor, rows: Tensor, square: bool) -> Tensor:
    wide = scale.repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
    return wide.repeat_interleave(BLOCK, 0)[: rows.shape[0]] if square else wide


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return (tensor._data.view(torch_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv).to(torch_dtype(dtype))


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: Any, device: Any, pin_memory: bool) -> Any:
    quantizer = quantizer.copy()
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax = quantizer.amax.clone()  # nothing has been seen
    return quantize(torch.zeros(tuple(shape), dtype=dtype, device=device), quantizer)


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    return turned(data) if out is None else out.copy_(turned(data))


def update_scales(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: int
) -> None:
    assert algorithm == "max"
    for amax, history, scale in zip(amaxes.split([s.numel() for s in scales]), histories, scales, strict=True):
        history[0] = amax
        largest = history.amax(0)
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        wanted = torch.finfo(torch_dtype(dtype)).max / largest.clamp(min=1e-30) / 2**margin
        scale.copy_(torch.where(largest > 0, wanted, scale))


# products and norms


def _operand(tensor: Any, columnwise: bool) -> Tensor:
    """[rows, columns]; of FP8 the half that a product needs, since Hopper multiplies rows by rows alone."""
    if not isinstance(tensor, FP8):
        return tensor.reshape(-1, tensor.shape[-1])
    dtype = torch_dtype(tensor._fp8_dtype)
    if isinstance(tensor, Float8TensorStorage):
        data = tensor._transpose if columnwise else tensor._data
        assert data is not None and not (columnwise and tensor._transpose_invalid), "the half that is multiplied"
        rows = data.reshape(len(data), -1) if columnwise else data.reshape(-1, data.shape[-1])
        numbers = rows.view(dtype).float() * tensor._scale_inv
        return numbers.t() if columnwise else numbers
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    assert data is not None, "the half that is multiplied"
    rows = data.reshape(len(data), -1) if columnwise else data.reshape(-1, data.shape[-1])
    inverse = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    square = tensor._is_2D_scaled
    cut = inverse[:, : -(-rows.shape[1] // BLOCK)] if square else inverse[:, : len(rows)].t()
    numbers = rows.view(dtype).float() * _spread(cut, rows, square)
    return numbers.t() if columnwise else numbers


def generic_gemm(
    a: Any, turn_a: bool, b: Any, turn_b: bool, out: Any, quantizer: Any, dtype: Any, bias: Any, *rest: Any, **more: Any
) -> tuple[Any, Any, None, Any]:
    """op(b) @ op(a), rows first; with `bias` its sum, or in backward its gradient."""
    _, gelu, _, backward, _, _, accumulate, _ = rest
    assert not gelu and quantizer is None and more["comm_overlap"] is None
    in_fp8 = isinstance(a, FP8)
    left, right = _operand(b, turn_b), _operand(a, not turn_a)
    assert isinstance(b, FP8) == in_fp8 and left.dtype == right.dtype, "both operands in one dtype"
    PRODUCTS["fp8" if in_fp8 else str(left.dtype).removeprefix("torch.")] += 1
    found = (left.float().t() if turn_b else left.float()) @ (right.float().t() if turn_a else right.float())
    if bias is not None and not backward:
        found = found + bias.float()
    if not turn_b:
        found = found.reshape(*b.size()[:-1], -1)
    if out is None:
        found = found.to(torch_dtype(dtype) if dtype is not None else right.dtype)
    else:
        found = out.add_(found.reshape(out.shape)) if accumulate else out.copy_(found.reshape(out.shape))
    gradient = left.float().sum(0).to(bias.dtype) if bias is not None and backward else None
    return found, gradient, None, more["extra_output"]


def te_general_grouped_gemm(
    a: Any, turn_a: bool, b: Any, turn_b: bool, out: Any, dtype: Any, splits: Any, bias: Any, *rest: Any
) -> Any:
    """A product for each expert, into its rows of a single output or into an output of its own."""
    _, single, _, backward, _, _, accumulate, _, _ = rest
    for left, right, part in zip(a, b, out[0].split(splits) if single else out, strict=True):
        if right.numel():
            told = (None, False, None, backward, None, None, accumulate, None)
            generic_gemm(
                left, turn_a, right, turn_b, part, None, dtype, None, *told, comm_overlap=None, extra_output=None
            )
        elif not accumulate:
            part.zero_()
    return bias


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def rmsnorm_fwd(
    rows: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *_: Any
) -> tuple[Any, None, Tensor]:
    inverse = torch.rsqrt(rows.float().pow(2).mean(-1) + eps)
    normed = (rows.float() * inverse[..., None] * weight.float()).to(torch_dtype(dtype))
    return normed if quantizer is None else quantize(normed, quantizer, out), None, inverse.reshape(-1)


def rmsnorm_bwd(gradient: Tensor, rows: Tensor, inverse: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    normed, above = (t.reshape(-1, t.shape[-1]).float() for t in (rows, gradient))
    normed = normed * inverse[:, None]
    scaled = above * weight.float()
    below = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return below.to(rows.dtype).reshape(rows.shape), (above * normed).sum(0).to(weight.dtype)


# the optimizer


def multi_tensor_adam(
    chunk: int, flag: Tensor, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, *rest: Any
) -> None:
    adamw, corrects, decay = rest
    assert adamw and corrects
    for gradient, weight, first, second in zip(*lists, strict=True):
        first.lerp_(gradient.float(), 1 - beta1)
        second.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        weight.sub_(lr * (update + decay * weight))


def multi_tensor_l2norm(chunk: int, flag: Tensor, lists: Any, each: bool = False) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk: int, flag: Tensor, lists: Any, scale: float | Tensor) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        *(quantize, dequantize, create_empty_quantized_tensor, fp8_transpose, bgrad_quantize),
        *(generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd),
        *(multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale),
    )
} | {"fused_amax_and_scale_update_after_reduction": update_scales, "multi_tensor_scale_tensor": multi_tensor_scale}
REAL = {name: getattr(tex, name) for name in KERNELS}


def pretend_te() -> None:
    """Puts these in the place of the compiled ones, wherever they have been imported to."""
    stands = {id(REAL[name]): kernel for name, kernel in KERNELS.items()}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("transformer_engine", "megatron")):
            for name, held in list(vars(module).items()):
                if id(held) in stands:
                    setattr(module, name, stands[id(held)])
