"""A model with experts of Transformer Engine's layers, and of the local ones, on the meta device; see te_stages.py.

    python te_experts.py TENSOR_PARALLEL EXPERT_PARALLEL RANK

Prints the rank's parameters and the keys of its checkpoint, for both kinds of layers.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from paper_models import few_experts
from te_stages import META, METADATA, pretend_gpu
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_r3.config import Config
from nemo_r3.precision import precision_of


def built(config: Config, rank: int) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from nemo_r3.actor import model as actor
    from nemo_r3.actor.checkpoint import weights_of
    from nemo_r3.actor.weights import parameters_by_name

    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    actor.model_parallel_cuda_manual_seed = lambda seed: None
    ranks = config.actor.tensor_parallel * config.actor.expert_parallel
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    actor.start_parallel_groups(config)
    arch = few_experts()
    settings = actor.transformer_config(config.actor, arch, precision_of(config), on_cuda=True)
    settings.init_model_with_meta_device = True
    found = {}
    for kind in ("te", "local"):
        model = actor.trunk(settings, arch, kind).to(device=META)
        weights = weights_of(model, METADATA | {"singleton_local_shards": True}).values()
        found[kind] = {
            "experts": type(model.decoder.layers[0].mlp.experts).__name__,
            "parameters": {name: list(part.shape) for name, part in parameters_by_name(model, arch).items()},
            "checkpoint": sorted((part.key, getattr(part, "global_offset", None)) for part in weights),
        }
    return found


def main(tensor_parallel: str, expert_parallel: str, rank: str) -> None:
    config = Config()
    config.actor.tensor_parallel, config.actor.expert_parallel = int(tensor_parallel), int(expert_parallel)
    config.actor.sequence_parallel = config.actor.tensor_parallel > 1
    pretend_gpu((9, 0))
    cuda: Any = torch.cuda
    cuda.Stream = lambda *_: None
    print(json.dumps(built(config, int(rank))))


if __name__ == "__main__":
    main(*sys.argv[1:])
