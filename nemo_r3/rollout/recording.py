"""Has vLLM record to which experts it sends each token, for `actor.routing_replay`.

vLLM keeps what it has recorded by the hashes of its prefix cache. So of a prompt that is cached it returns the experts
that the cached keys and values were computed with.
"""

from __future__ import annotations

from types import SimpleNamespace

from vllm import EngineArgs, LLMEngine
from vllm.distributed.aux_output_connector import worker
from vllm.usage.usage_lib import UsageContext
from vllm.v1.executor import Executor


def start(args: EngineArgs) -> LLMEngine:
    """`LLMEngine.from_engine_args`, of an engine that records.

    Raises:
        ValueError: vLLM refuses the settings.
    """
    # vLLM keeps what is recorded on an engine's first rank, where it expects the only scheduler; here each rank has one
    worker.get_tp_group = lambda: SimpleNamespace(is_first_rank=True)  # type: ignore[assignment, return-value]
    config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    # on a CPU the arguments may not ask for it: vLLM's own model runner there cannot record, but cpu_worker.py's can
    config.aux_output_config.enable_return_routed_experts = True
    return LLMEngine(config, Executor.get_class(config), log_stats=not args.disable_log_stats)
