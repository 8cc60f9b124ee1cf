"""`Engine`: vLLM inside this process, token ids in and token ids out, with weights that can be replaced.

    start -> (add, step)* -> sleep -> wake(weights) -> load -> wake(kv_cache) -> (add, step)* -> ...
      |                      ^------------ once per step; sleep and wake do nothing on a CPU ------------'
      `-- without weights ---'

An engine lives as long as its process: vLLM's shutdown would destroy the default process group, which the actor needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs, SampleLogprobs
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from nemo_r3 import watchdog
from nemo_r3.config import Config
from nemo_r3.errors import UserError, in_one_line
from nemo_r3.models import Architecture, architecture_of, names
from nemo_r3.models.tensors import HFTensors
from nemo_r3.precision import precision_of
from nemo_r3.rollout import recording
from nemo_r3.rollout.experts import Stacks, filling
from nemo_r3.rollout.sampling import UNFINISHED, Completion, Sampling

KV_BLOCK = 32
"""Tokens per block of vLLM's KV cache on a CPU. Only whole blocks of a shared context are reused: with vLLM's 128, the
reflections on a short task would share nothing."""
CPU_BATCHED_TOKENS = 4096
"""Most tokens of a forward pass on a CPU, if a whole dialogue has no more: prompts are never chunked there."""
GPU_BATCHED_TOKENS = 8192
"""Most tokens of a forward pass on a GPU, where prompts may be chunked. vLLM's own choice is 2048 for a bare engine;
its `LLM` takes 16384 on an H100."""
NO_WEIGHTS = -1
"""The version of an engine without weights: it started without any, or has slept."""


class Engine:
    """One rank's part of a vLLM engine. All ranks of an engine make the same calls in the same order.

    Attributes:
        version: version of the weights in use, or NO_WEIGHTS.
        max_model_len: most tokens of a prompt and its completion together.
    """

    def __init__(self, llm: LLMEngine, arch: Architecture, max_model_len: int, version: int) -> None:
        self.version = version
        self.max_model_len = max_model_len
        self._llm = llm
        self._recorded: dict[str, int] = {}  # requests whose experts are wanted, and of how many of the prompt's tokens
        self._expected = {name for row in names.rows(arch) for name in row.hf}
        self._can_sleep = bool(llm.model_config.enable_sleep_mode)

    @classmethod
    def start(cls, config: Config, model_dir: Path, with_weights: bool = True) -> Engine:
        """Starts an engine on a checkpoint. Every rank of the default group must call this.

        `environment.prepare` must have run before this module was imported, and torch.distributed must be initialised.

        Args:
            config: the run's settings.
            model_dir: Hugging Face checkpoint, whose weights are version 0; its tokenizer is not read.
            with_weights: False leaves them unread: the engine sleeps, if it can, until a refit brings some. An engine
                that quantises reads them all the same.

        Raises:
            ConfigError: the checkpoint's weights are missing, cut, or of another model.
            UserError: vLLM was built for other devices, refuses the settings, or finds too little memory.
        """
        assert dist.is_initialized(), "runtime.start comes before Engine.start"
        rollout, arch = config.rollout, architecture_of(model_dir)
        with HFTensors(model_dir) as checkpoint:
            checkpoint.check(arch)  # vLLM's own error would be a traceback
        on_cuda = torch.cuda.is_available()
        _refuse_other_build(on_cuda)
        # vLLM quantises weights as it reads them; starting it without any is untested
        reads = with_weights or rollout.quantization != "none"
        args = arguments(config, model_dir, arch, on_cuda, reads)
        # a tied head has no weight of its own; `load` itself checks that nothing is missing
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        watchdog.alive()
        try:
            llm = recording.start(args) if config.actor.routing_replay else LLMEngine.from_engine_args(args)
        except ValueError as error:  # settings that vLLM refuses, or too little free GPU memory for its share
            raise UserError(f"vLLM refused to start: {in_one_line(error)}") from error
        watchdog.alive()
        engine = cls(llm, arch, rollout.max_model_len, version=0 if reads else NO_WEIGHTS)
        if not reads:
            engine.sleep()  # so that the weights that come need no room beside the KV cache
        return engine

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Queues a request, whose id no unfinished one has; its prompt has at most max_model_len - 1 token ids."""
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # stop_ids has it, and all others
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            routed_experts_prompt_start=len(prompt_ids) if sampling.experts_from is None else sampling.experts_from,
        )
        if sampling.experts_from is not None:
            self._recorded[request_id] = len(prompt_ids) - sampling.experts_from
        self._llm.add_request(request_id, tokens_input(list(prompt_ids)), params)

    def step(self) -> list[Completion]:
        """Samples one token for as many requests as fit; returns those that finished with it.

        Raises:
            RuntimeError: the engine has no weights; `load` comes first.
        """
        if self.version == NO_WEIGHTS:
            raise RuntimeError("the engine started without weights or has slept: it needs a refit first")
        return [
            self._completion(
                output.request_id, turn.token_ids, turn.logprobs, turn.routed_experts, str(turn.finish_reason)
            )
            for output in self._llm.step()
            if output.finished
            for turn in output.outputs
        ]

    def unfinished(self) -> dict[str, int]:
        """How many tokens each unfinished request has sampled."""
        states = self._llm.output_processor.request_states.values()
        return {state.external_req_id: len(state.detokenizer.output_token_ids) for state in states if state.detokenizer}

    def abort(self) -> list[Completion]:
        """Aborts all unfinished requests; returns what they have sampled so far, perhaps nothing."""
        aborted = []
        for state in list(self._llm.output_processor.request_states.values()):
            rows, detokenizer = state.logprobs_processor, state.detokenizer
            assert rows is not None and detokenizer is not None, "a request that samples"
            ids, request_id = detokenizer.output_token_ids, state.external_req_id
            routed = np.concatenate(state.routed_experts_chunks) if state.routed_experts_chunks else None
            aborted.append(self._completion(request_id, ids, rows.logprobs, routed, UNFINISHED))
        self._llm.abort_request([completion.request_id for completion in aborted])
        return aborted

    def load(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces all weights and forgets everything computed with the old ones.

        All ranks of an engine, and those that take part in the iterator's collectives, consume it in lockstep.

        Args:
            weights: (Hugging Face name, full tensor) of every tensor of the checkpoint, in any order; layer by layer
                takes the least memory. vLLM keeps references until a layer is complete, so the iterator must not
                overwrite a tensor that it has yielded.
            version: version of these weights.

        Raises:
            RuntimeError: requests are unfinished, tensors are missing, or the prefix cache could not be reset.
        """
        if self._llm.has_unfinished_requests():
            raise RuntimeError("weights cannot be replaced while requests are unfinished")
        seen: set[str] = set()
        weights = filling(self._stacks(), _noting(weights, seen))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if missing := self._expected - seen:
            raise RuntimeError(f"refit: {len(missing)} tensors were not sent, e.g. {min(missing)}")
        if current_platform.is_cpu():
            self._repack()
        self.reset_prefix_cache()
        self.version = version

    def reset_prefix_cache(self) -> None:
        """Drops the prefix cache.

        Raises:
            RuntimeError: it could not be reset, and would serve old keys and values.
        """
        self._settle()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset and would serve old weights' keys")

    def _settle(self) -> None:
        """Takes the result of the step that vLLM, which is one ahead on a GPU, had begun when its last request ended.

        With that under way its recorder of experts could not be reset.
        """
        client: Any = self._llm.engine_core
        while client.engine_core.batch_queue and not self._llm.has_unfinished_requests():
            self._llm.step()

    def sleep(self) -> None:
        """Frees the GPU memory of weights and KV cache; `load` must follow `wake`. Does nothing on a CPU."""
        if self._can_sleep and not self._llm.is_sleeping():
            self._settle()
            self._llm.sleep(level=2)
            self.version = NO_WEIGHTS

    def wake(self, tag: str) -> None:
        """Takes memory back: "weights" before `load`, "kv_cache" after it. Does nothing if the engine is awake."""
        if self._can_sleep and self._llm.is_sleeping():
            self._llm.wake_up([tag])

    def end(self) -> None:
        """Before the process ends: of an engine asleep vLLM would free each piece of memory a second time."""
        if self._can_sleep and self._llm.is_sleeping():
            self._llm.wake_up()  # all that sleeps: of tags that are named, vLLM wakes none if one is awake

    def cache_bytes(self) -> int:
        """Bytes of this rank's KV cache, as large as it is when the engine is awake."""

        def size(worker: Any) -> int:
            storages = [tensor.untyped_storage() for tensor in worker.model_runner.kv_caches]
            return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

        return max(self._llm.collective_rpc(size))

    def _completion(
        self, request: str, ids: Sequence[int], rows: SampleLogprobs | None, routed: NDArray[Any] | None, reason: str
    ) -> Completion:
        prompt_tokens = self._recorded.pop(request, None)
        assert isinstance(rows, FlatLogprobs) and len(rows) == len(ids), f"{len(ids)} tokens without log-probabilities"
        logprobs = tuple(rows.logprobs[start] for start in rows.start_indices)  # the sampled token comes first
        if prompt_tokens is None:
            routed = None
        else:
            found, due = 0 if routed is None else len(routed), prompt_tokens + len(ids) - 1 if ids else 0
            assert found == due, f"actor.routing_replay: vLLM returned the experts of {found} tokens, not of {due}"
        return Completion(request, tuple(ids), logprobs, reason, self.version, routed)

    def _stacks(self) -> dict[str, Stacks]:
        """Where this rank keeps experts, by layer: what kernels read, or on a CPU what is packed; empty without any."""

        def stacks(model: torch.nn.Module) -> dict[str, Stacks]:
            return {
                name.partition(".experts")[0]: Stacks(
                    part.w13_weight.data, part.w2_weight.data, part.moe_config.tp_rank
                )
                for name, part in model.named_modules()
                if isinstance(part, RoutedExperts)
            }

        (found,) = self._llm.apply_model(stacks)
        return found

    def _repack(self) -> None:
        """On a CPU, vLLM packs experts, and keeps a packed copy of a tied head; a reload leaves both undone."""

        def repack(model: torch.nn.Module) -> None:
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
                elif isinstance(module, RoutedExperts):
                    module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)

        self._llm.apply_model(repack)


def _refuse_other_build(on_cuda: bool) -> None:
    if current_platform.device_type == ("cuda" if on_cuda else "cpu"):
        return
    if on_cuda:
        raise UserError(
            "the vLLM installed here is for CPUs, but torch finds a GPU: to run on the CPU, set CUDA_VISIBLE_DEVICES "
            "to nothing; for the GPU, see docs/install-gpu.md"
        )
    raise UserError(
        "the vLLM installed here is for GPUs, but torch finds none: start where there is one (a container needs --gpus "
        "all, or --nv), or use the CPU's environment, which `make setup` installs"
    )


def arguments(config: Config, model_dir: Path, arch: Architecture, on_cuda: bool, reads: bool) -> EngineArgs:
    """vLLM's arguments; without `reads` it makes weights up instead of reading the checkpoint's.

    On a GPU its scheduler is a step ahead of what has been sampled, by its own choice. It waits for each step's result
    in turn, so that all ranks of an engine still run the same steps (`EngineCore.step_with_batch_queue`).

    Attention is FlashAttention there, from vLLM's wheel. On Blackwell vLLM would prefer FlashInfer, even where there is
    no nvcc, with which FlashInfer compiles its kernels at run time. float32 is left to vLLM: FlashAttention lacks it.
    Experts are Triton's for the same reason.
    """
    rollout, precision, patience = config.rollout, precision_of(config), config.run.timeout_minutes * 60
    cpu_worker = "RecordingWorker" if config.actor.routing_replay else "PrivateWorker"
    batched = GPU_BATCHED_TOKENS if on_cuda else max(rollout.max_model_len, CPU_BATCHED_TOKENS)
    return EngineArgs(
        model=str(model_dir),
        load_format="auto" if reads else "dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=precision.dtype_name,
        quantization=None if rollout.quantization == "none" else rollout.quantization,
        seed=config.seed,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel,
        distributed_executor_backend="external_launcher",
        worker_cls="auto" if on_cuda else f"nemo_r3.rollout.cpu_worker.{cpu_worker}",
        distributed_timeout_seconds=patience,
        cpu_distributed_timeout_seconds=patience,
        enable_prefix_caching=rollout.prefix_caching,
        enable_return_routed_experts=config.actor.routing_replay and on_cuda,  # on a CPU recording.py sees to it
        attention_backend=AttentionBackendEnum.FLASH_ATTN if on_cuda and precision.bf16 else None,
        moe_backend="triton" if on_cuda and arch.experts else "auto",
        block_size=None if on_cuda else KV_BLOCK,
        enforce_eager=rollout.enforce_eager or not on_cuda,
        logprobs_mode="processed_logprobs",
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_memory_bytes=None if on_cuda else _cpu_cache_bytes(config, arch),
        enable_sleep_mode=rollout.sleep and current_platform.is_sleep_mode_available(),
        # a CPU's generators cannot be rewound, which vLLM does for a seeded request whose prompt it cuts
        enable_chunked_prefill=on_cuda,
        max_num_batched_tokens=max(batched, rollout.max_num_seqs),
        use_tqdm_on_load=False,
        disable_log_stats=True,
    )


def _noting(weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights, with their names added to `seen` as they pass."""
    for name, tensor in weights:
        seen.add(name)
        yield name, tensor


def _cpu_cache_bytes(config: Config, arch: Architecture) -> int:
    """Bytes of one rank's KV cache: its share of `rollout.cpu_kv_cache_gb`, but no more than it can use."""
    rollout, ways = config.rollout, config.rollout.tensor_parallel
    token = arch.cached_bytes(ways, precision_of(config).dtype.itemsize)
    blocks = rollout.max_num_seqs * -(-rollout.max_model_len // KV_BLOCK) + 1
    return min(rollout.cpu_kv_cache_gb * 2**30 // ways, blocks * KV_BLOCK * token)
