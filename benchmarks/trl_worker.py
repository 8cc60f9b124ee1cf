"""TRL's side: a real GRPOTrainer whose `rollout_func` reflects and retries, on a given workload.

    python -m benchmarks.trl_worker WORKLOAD.json {transformers,vllm} ROWS

    step N        `GRPOTrainer.train` goes on by one step: weight sync, rollout_func, reference, update, timed
    loss WEIGHTS  TRL's loss and gradient norm of the weights in WEIGHTS on the workload's check

ROWS is `per_device_train_batch_size`; gradients are accumulated over the rest of the step's reflections. The trainer
runs its own loop: a callback waits for the command when a step begins and answers when it has ended. What had to be
changed for a CPU, always in TRL's favour or to make it run at all, is in `adapt` and `sync_weights`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import trl.generation.vllm_generation as vllm_generation
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.timing import Stopwatch
from benchmarks.worker import Channel
from benchmarks.workload import Context, Workload

Ids = list[list[int]]
Generate = Callable[[GRPOTrainer, Ids, Sequence[int]], Ids]


def adapt() -> None:
    """What TRL and vLLM do otherwise on a GPU.

    - TRL's LM head scores completions only where Triton runs and whole prompts elsewhere; here it skips prompts, too.
    - vLLM would turn an fp32 checkpoint into bf16 and compile; TRL has no setting for either.
    """
    trl.trainer.utils._use_triton = lambda device: True
    llm = vllm_generation.LLM
    vllm_generation.LLM = lambda **kwargs: llm(**kwargs, dtype="float32", enforce_eager=True)


def sync_weights(generation: vllm_generation.VLLMGeneration) -> None:
    """TRL's sync, but through vLLM's reload, as nemo_r3 does it.

    On a CPU vLLM packs its matrices for oneDNN and then refuses `load_weights`, which TRL calls. Without the packing
    TRL's own sync works, and sampling takes 10 to 17 % longer.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def repack(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": generation._iter_named_params()})
    generation.llm.apply_model(repack)
    assert generation.llm.reset_prefix_cache()


def with_transformers(trainer: GRPOTrainer, prompts: Ids, lengths: Sequence[int]) -> Ids:
    """TRL's own generation: one batch to the longest length, then cut."""
    config = trainer.generation_config
    config.min_new_tokens = config.max_new_tokens = max(lengths)
    ids, _ = trainer._generate_single_turn(prompts, None, {}, trainer.num_generations)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def with_vllm(trainer: GRPOTrainer, prompts: Ids, lengths: Sequence[int]) -> Ids:
    """TRL's colocated engine: every request ends at its own length."""
    from vllm import SamplingParams

    generation = trainer.vllm_generation
    params = [
        SamplingParams(
            temperature=generation.temperature,
            max_tokens=length,
            ignore_eos=True,
            logprobs=generation.logprobs,
            detokenize=False,
        )
        for length in lengths
    ]
    outputs = generation.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class ReflectAndRetry:
    """The `rollout_func`: reflections are the completions, retries only earn the reward."""

    def __init__(self, workload: Workload, generate: Generate) -> None:
        """Takes what to do and with which engine."""
        self._workload = workload
        self._generate = generate

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Prompts "STEP CONTEXT", each G times in a row -> what TRL asks of a rollout_func."""
        group, places = self._workload.group, [tuple(map(int, prompt.split())) for prompt in prompts]
        contexts = [self._workload.steps[step][index] for step, index in places[::group]]
        contexts_ids = [context.prompt for context in contexts for _ in range(group)]
        reflections = self._generate(trainer, contexts_ids, [n for context in contexts for n in context.lengths])
        request, tokens = self._workload.retry_request, self._workload.retry_tokens
        retry_prompts = [ids + reflection + request for ids, reflection in zip(contexts_ids, reflections, strict=True)]
        retries = self._generate(trainer, retry_prompts, [tokens] * len(prompts))
        assert [len(retry) for retry in retries] == [tokens] * len(prompts)
        return {
            "prompt_ids": contexts_ids,
            "completion_ids": reflections,
            "logprobs": None,  # only TRL's importance correction, which is off, would read them
            "given": [reward for context in contexts for reward in context.rewards],
        }


def given_rewards(given: list[float], **_: Any) -> list[float]:
    """The reward function: what `ReflectAndRetry` passed on."""
    return given


class TakesTurns(TrainerCallback):
    """Waits for a command when a step begins, and answers with its times when it has ended."""

    def __init__(self, channel: Channel, watch: Stopwatch) -> None:
        """Takes what the trainer's timed methods add to."""
        self._channel = channel
        self._watch = watch
        self._step: Any = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Waits."""
        if not self._channel.next_command():
            os._exit(0)
        self._watch.clear()
        self._step = self._watch.time("step")
        self._step.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answers."""
        self._step.__exit__(None, None, None)
        self._channel.answer(**self._watch.split())


def build(workload: Workload, engine: str, rows: int, channel: Channel) -> GRPOTrainer:
    """A trainer with the workload's settings."""
    adapt()
    watch = Stopwatch()
    rollout = ReflectAndRetry(workload, with_vllm if engine == "vllm" else with_transformers)
    names = [f"{step} {index}" for step, contexts in enumerate(workload.steps) for index in range(len(contexts))]
    trainer = GRPOTrainer(
        model=workload.model,
        reward_funcs=given_rewards,
        args=settings(workload, engine == "vllm", rows),
        train_dataset=Dataset.from_dict({"prompt": names}),
        processing_class=AutoTokenizer.from_pretrained(workload.model, padding_side="left"),
        rollout_func=watch.timed("rollout", rollout),
        peft_config=adapter(workload),
        callbacks=[TakesTurns(channel, watch)],
    )
    if engine == "vllm":
        generation = trainer.vllm_generation
        generation.sync_weights = watch.timed("sync", lambda: sync_weights(generation))
    return trainer


def adapter(workload: Workload) -> LoraConfig | None:
    """LoRA on every matrix of the layers, or None where all weights are trained."""
    if not workload.lora_rank:
        return None
    return LoraConfig(r=workload.lora_rank, lora_alpha=workload.lora_alpha, target_modules="all-linear")


def settings(workload: Workload, use_vllm: bool, rows: int) -> GRPOConfig:
    """The workload's settings and the fastest ones that leave the mathematics alone."""
    accumulation = len(workload.steps[0]) * workload.group // rows
    longest = max(length for step in workload.steps for context in step for length in context.lengths)
    return GRPOConfig(
        output_dir=str(Path(workload.model).parent / "trl"),
        max_steps=len(workload.steps),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=workload.group,
        max_completion_length=longest,
        temperature=workload.temperature,
        beta=workload.kl_beta,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,
        learning_rate=workload.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=workload.clip_grad,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        seed=workload.seed,
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
        use_vllm=use_vllm,
        vllm_mode="colocate",
        vllm_max_model_length=workload.max_model_len,
        vllm_importance_sampling_correction=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def loss(trainer: GRPOTrainer, workload: Workload, weights: Path) -> dict[str, Any]:
    """TRL's loss on the check's batch, with its own reference model and loss function."""
    load(trainer.model, load_file(weights))
    trainer.beta = workload.check.kl_beta
    trainer.model.eval()  # TRL divides by the accumulation steps in training only; there is no dropout
    trainer.model.zero_grad()
    batch = check_batch(trainer, workload)
    found = trainer.compute_loss(trainer.model, batch)
    found.backward()
    trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    return {"loss": found.item(), "grad_norm": norm.item(), "kl": trainer._metrics["eval"]["kl"][-1]}


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model the other side's weights: all of them, or those of its adapter."""
    if isinstance(model, PeftModel):
        found = set_peft_model_state_dict(model, weights)
        missing = [name for name in found.missing_keys if "lora_" in name]
        assert not missing and not found.unexpected_keys, found
    else:
        absent, unexpected = model.load_state_dict(weights, strict=False)
        assert set(absent) <= {"lm_head.weight"} and not unexpected, (absent, unexpected)


def check_batch(trainer: GRPOTrainer, workload: Workload) -> dict[str, torch.Tensor]:
    """The check as TRL's loss function wants it: prompts of one length, completions padded on the right."""
    check = workload.check
    flat: list[tuple[Context, list[int], float]] = [
        (context, ids, advantage)
        for context, completions, advantages in zip(check.contexts, check.completions, check.advantages, strict=True)
        for ids, advantage in zip(completions, advantages, strict=True)
    ]
    longest = max(len(ids) for _, ids, _ in flat)
    pad = trainer.processing_class.pad_token_id
    batch = {
        "prompt_ids": torch.tensor([context.prompt for context, _, _ in flat]),
        "completion_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for _, ids, _ in flat]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids, _ in flat]),
        "advantages": torch.tensor([advantage for _, _, advantage in flat]),
    }
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    reference = trainer.ref_model or trainer.model
    start = reference.disable_adapter() if isinstance(reference, PeftModel) else nullcontext()
    with torch.no_grad(), start:
        batch["ref_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(
            reference,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            longest,
        )
    return batch


def main(argv: Sequence[str]) -> None:
    """Trains when told to, then computes the loss; ends when there are no more commands."""
    path, engine, rows = argv
    channel = Channel()
    workload = Workload.read(Path(path))
    trainer = build(workload, engine, int(rows), channel)
    channel.answer(ready=True)
    trainer.train()
    while command := channel.next_command():
        channel.answer(**loss(trainer, workload, Path(command[1])))
    os._exit(0)  # vLLM's exit hooks wait for a process group that is gone


if __name__ == "__main__":
    main(sys.argv[1:])
