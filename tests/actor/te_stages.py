"""Builds Transformer Engine's FP8 model of a rank of every pipeline stage on the meta device, and prints what it found.

    python te_stages.py SHAPE TENSOR_PARALLEL PIPELINE_PARALLEL PRECISION

Transformer Engine must be importable; there need be no GPU. Its modules are made, and none runs.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_r3 import fp8_support
from nemo_r3.config import Config
from nemo_r3.models import Architecture, architecture_of
from nemo_r3.precision import PRECISIONS, precision_of

SHAPES = Path(__file__).parents[1] / "shapes"
META = torch.device("meta")
METADATA = {"singleton_local_shards": False}


def pretend_gpu(capability: tuple[int, int]) -> None:
    """A GPU of this capability, whose tensors have a shape and no numbers."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: META
    cuda.get_device_capability = lambda device=None: capability
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    cuda.get_device_properties = lambda device=None: properties


def stage(config: Config, arch: Architecture, number: int) -> dict[str, Any]:
    """What the first rank of a pipeline stage holds, and what an export streams through it."""
    from megatron.core import fp8_utils, parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from nemo_r3.actor.checkpoint import weights_of
    from nemo_r3.actor.model import transformer_config, trunk
    from nemo_r3.actor.weights import export_hf, mark_tensor_parallel, parameters_by_name

    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    tensor, pipeline = config.actor.tensor_parallel, config.actor.pipeline_parallel
    dist.init_process_group("fake", rank=number * tensor, world_size=tensor * pipeline, store=FakeStore())
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    settings = transformer_config(config.actor, arch, precision_of(config), on_cuda=True)
    settings.init_model_with_meta_device = True
    model, local = (
        trunk(settings, arch, kind).to(device=META, dtype=precision_of(config).dtype) for kind in ("te", "local")
    )
    mark_tensor_parallel(model, arch)
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    exports = {name: list(whole.shape) for name, whole in export_hf(model, arch)}
    found = {
        "raw": sorted(name for name, _ in model.named_parameters()),
        "parameters": {name: list(part.shape) for name, part in parameters_by_name(model, arch).items()},
        "cut": sorted(n for n, part in parameters_by_name(model, arch).items() if part.tensor_model_parallel),
        "dtypes": sorted({str(part.dtype) for part in model.parameters()}),
        "bf16_layers": [layer for layer in layers if fp8_utils.is_first_last_bf16_layer(settings, layer)],
        "recipe": str(fp8_utils.get_fp8_recipe(settings)),
        "linear": type(model.decoder.layers[0].mlp.linear_fc1).__mro__[1].__module__,
        "attention": type(model.decoder.layers[0].self_attention.core_attention).__name__,
        "export": exports,
        "checkpoint": sorted(part.key for part in weights_of(model, METADATA).values()),
        "local_checkpoint": sorted(part.key for part in weights_of(local, METADATA).values()),
        "kept_copies": kept_copies(model),
        "in_fp8": in_fp8(model, config),
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def kept_copies(model: Any) -> list[int]:
    """How many of the layers' matrices hold an FP8 copy of their weight: when each has one, and once freed."""
    from nemo_r3.actor.numerics import MATRICES
    from nemo_r3.actor.offload import forget_fp8_weights

    matrices = [layer.get_submodule(name) for layer in model.decoder.layers for name in MATRICES]
    for matrix in matrices:
        matrix._fp8_workspaces["weight"] = matrix.weight
    found = [sum(map(len, (matrix._fp8_workspaces for matrix in matrices)))]
    forget_fp8_weights(model)
    return [*found, sum(map(len, (matrix._fp8_workspaces for matrix in matrices)))]


def in_fp8(model: Any, config: Config) -> list[list[int]]:
    """The layers that run in FP8: at first, once layer 1 has left it, and once all have."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from nemo_r3.actor.numerics import LayerWatch

    def now() -> list[int]:
        found = []
        for layer in model.decoder.layers:
            with get_fp8_context(model.config, layer.layer_number - 1):
                found += [layer.layer_number - 1] * layer.forward()
                assert FP8GlobalStateManager.is_fp8_enabled() == (layer.layer_number - 1 not in edges)
        return found

    for layer in model.decoder.layers:
        layer.forward = FP8GlobalStateManager.is_fp8_enabled
    watch = LayerWatch(model, precision_of(config).fp8)
    edges = set() if config.actor.precision == "fp8-delayed" else {0, model.config.num_layers - 1}
    found = [now()]
    for layers in ([1], range(model.config.num_layers)):
        watch.leave_fp8(layers)
        found.append(now())
    return found


def main(model: str, tensor_parallel: str, pipeline_parallel: str, name: str) -> None:
    config = Config()
    config.actor.tensor_parallel, config.actor.pipeline_parallel = int(tensor_parallel), int(pipeline_parallel)
    config.actor.sequence_parallel, config.actor.precision = int(tensor_parallel) > 1, name
    recipe, arch = PRECISIONS[name].fp8, architecture_of(SHAPES / f"{model}.json")
    assert recipe is not None
    pretend_gpu((10, 0) if name == "mxfp8" else (9, 0))
    fp8_support.prepare(config, arch)
    print(json.dumps([stage(config, arch, number) for number in range(int(pipeline_parallel))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
