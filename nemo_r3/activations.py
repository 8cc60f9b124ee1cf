"""About how much an update's activations take of a GPU with Transformer Engine's layers; no torch.

The peak is where the backward pass begins. A layer has kept, of each token, `_kept` numbers, or with full recompute its
input alone. Then the head runs, or the last layer again. FP8's own copies are not counted.

At 8 layers of an 8B in BF16 this is 3 % below what an H200 was measured to take (docs/log.md). With recompute, and on
several GPUs, nothing has been measured yet.
"""

from __future__ import annotations

from nemo_r3.config import Config
from nemo_r3.models import Architecture
from nemo_r3.precision import precision_of

HEAD_LOGITS = 2**28
"""In a chunk of the head on a GPU, see nemo_r3.actor.head."""


def activation_bytes(config: Config, arch: Architecture, tokens: int, trained: int) -> float:
    """Bytes of the pipeline stage that needs most; a microbatch has `tokens`, of which `trained` carry loss."""
    actor, stages, width = config.actor, config.actor.pipeline_parallel, precision_of(config).width
    full = actor.recompute == "full"
    inputs, kept, working = (width * tokens * count for count in _per_token(config, arch))
    layers = arch.num_layers // stages
    stack = layers * (inputs if full else kept)
    again = (kept if full else 0) + working
    # the first stage has as many microbatches under way as there are stages, the last has one and the head
    return max(stages * stack + again, stack + max(_head(arch, actor.tensor_parallel, width, trained), again))


def _per_token(config: Config, arch: Architecture) -> tuple[float, float, float]:
    """Numbers that a rank holds of a token: a layer's input, all that the layer keeps, and its gradients at work."""
    ways = config.actor.tensor_parallel
    whole = arch.hidden_size / (ways if config.actor.sequence_parallel else 1)
    queries, keys = arch.query_width / ways, arch.key_width / ways
    columns = arch.ffn_hidden_size / ways
    # residual stream and norm, twice; rotated query and key, value, output; gate and up, and their product
    kept = 4 * whole + 2 * queries + 2 * keys + 3 * columns
    return whole, kept, 2 * whole + 3 * columns


def _head(arch: Architecture, ways: int, width: int, trained: int) -> float:
    """Two chunks of logits, and the weight's gradient: of several chunks its sum in float32, too."""
    rows = arch.padded_vocab(ways) // ways
    chunk = min(trained, HEAD_LOGITS // rows)
    gradient = rows * arch.hidden_size * (width if chunk == trained else width + 4)
    return 2 * width * chunk * rows + gradient
