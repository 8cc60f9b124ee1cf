"""The policy on megatron-core: build, load, update, export, checkpoint."""

import logging
import warnings

# megatron-core warns of every optional extension that is absent (where one is needed, we refuse by name), looks for
# gradients on tensors that need none, and still uses what torch will replace
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
):
    warnings.filterwarnings("ignore", message=_message)

# all that these three say in 0.19: GPTModel is not the newest of its models, DDP lays its buffers out itself, and the
# asynchronous save that we do not use is old
for _module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel", "dist_checkpointing.strategies.torch"):
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)
