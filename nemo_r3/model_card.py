"""README.md of an export, or of LoRA's adapter: what was trained and how, what it reached, and how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from nemo_r3.config import Config, shareable, to_yaml
from nemo_r3.precision import precision_of
from nemo_r3.results import HEADINGS, NOTE, has_results, rates
from nemo_r3.tasks.template import fill

if TYPE_CHECKING:
    from nemo_r3.dialogue import Dialogue

HOW_TO_USE = """\
The model knows one dialogue: a first answer and, after a failure, a reflection and a retry. To have it as in training
and evaluation, serve it from this directory with vLLM, without the sampling of generation_config.json, which is the
starting model's:

```bash
vllm serve {served}{options} --generation-config vllm
```

Then say these turns, with your verifier in between:

```python
from openai import OpenAI

TASK = {task!r}{filled}
REFLECT = {reflect!r}
RETRY = {retry!r}
SYSTEM = {system!r}
client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")


# the turns, then a user's with this text, then the model's
def say(turns, text, max_tokens{tools}):
    turns = [*turns, {{"role": "user", "content": text}}]
    reply = client.chat.completions.create(
        model="trained",
        messages=turns,
        temperature={temperature!r},
        max_tokens=max_tokens,{offered}
        extra_body={extra!r},
    )
    return [*turns, {{"role": "assistant", "content": reply.choices[0].message.content}}]


# the answer to a task, which is TASK filled in; if `verify` rejects it, the one after a reflection
def two_tries(task, verify{tools}):
    turns = say(SYSTEM, task, {answer}{tools})
    if not verify(turns[-1]["content"]):
        turns = say(turns, REFLECT{reflect_filled}, {reflection}{tools})
        turns = say(turns, RETRY{retry_filled}, {answer}{tools})
    return turns[-1]["content"]
```

A server gives the model each earlier answer as text, by the chat template; in training it kept the very tokens."""
WHOLE = ". --served-model-name trained"
"""What vLLM serves of an export, see `how_to_use`."""
BY_PEFT = """\
Without vLLM, `peft.AutoPeftModelForCausalLM.from_pretrained(".")` loads the starting model with this adapter."""
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
REPEATED = '.replace("{task}", task)'
OFFERED = """
        tools=tools,
        tool_choice="none",  # so that calls come back as the model wrote them"""


def model_card(
    config: Config, summary: Mapping[str, Any], step: int, base: str, usage: str, adapter: bool = False
) -> str:
    """README.md of an export after `step` steps, or of LoRA's adapter.

    Args:
        config: the run's settings.
        summary: its summary.json; results are shown if they were measured at that step.
        step: how many steps it was trained.
        base: the starting model's name on the hub, or that of its directory.
        usage: from `how_to_use`, or `how_to_use_adapter`.
        adapter: whether it is the adapter's.
    """
    front: dict[str, Any] = {"base_model": base} if "/" in base else {}  # a directory's name has none
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo_r3", "reflect-retry-reward", "reinforcement-learning", "grpo", config.task.name],
    }
    algo, phases = config.algo, " and ".join(config.algo.trained_phases)
    unless = "" if algo.reward_leaks else ", unless it gives the answer away itself"
    place = "in this adapter" if adapter else "merged into these weights"
    lora = f"LoRA of rank {config.actor.lora_rank}, {place}, " if config.actor.lora_rank else ""
    start = "From a checkpoint of another run, see `train.start_from`: " if config.train.start_from else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base}, trained to reflect on {config.task.name}",
        "Trained with nemo_r3 by [Reflect, Retry, Reward](https://arxiv.org/abs/2505.24726): after a failed answer the "
        "model writes a reflection and tries again, and the reflection is rewarded when a verifier accepts the "
        f"retry{unless}. "
        f"{start}{step} steps of {algo.loss.upper()} on {phases} tokens, {algo.group_size} reflections per failed "
        f"answer, {lora}peak learning rate {config.actor.lr:g}, KL weight {algo.kl_beta:g} to the starting model.",
    ]
    if has_results(summary, step):
        parts += ["## Results", _markdown(summary)]
    parts += ["## How to use", usage, "## Settings", f"```yaml\n{to_yaml(shareable(config))}```"]
    if summary.get("versions"):
        lines = [f"- {name} {version}" for name, version in summary["versions"].items()]
        parts += ["## Versions", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _markdown(summary: Mapping[str, Any]) -> str:
    """The before/after table for a model card."""
    rows = [HEADINGS, ("---", "---", "---", "---", "---:"), *rates(summary)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Held-out problems, before → after training.\n\n{table}\n\n{NOTE}"


def how_to_use(config: Config, dialogue: Dialogue, with_tools: bool, served: str = WHOLE) -> str:
    """For those who have the export alone: a run's own turns and sampling, as vLLM's server takes them.

    Args:
        config: the run's settings.
        dialogue: the run's, with the task's words.
        with_tools: whether problems of the task offer tools.
        served: the first arguments of `vllm serve`, by which the model's name is `trained`.
    """
    rollout, task, by_template = config.rollout, dialogue.wording.task, with_tools and dialogue.tools == "template"
    if with_tools and not by_template:
        task = fill(config.dialogue.tools_text, {"tools": "{tools}", "task": task})
    options = {"dtype": precision_of(config).dtype_name, "max-model-len": rollout.max_model_len}
    if rollout.quantization != "none":
        options["quantization"] = rollout.quantization
    extra: dict[str, Any] = {"stop_token_ids": list(dialogue.end_of_turn)}
    if dialogue.template_options:
        extra["chat_template_kwargs"] = dialogue.template_options
    return HOW_TO_USE.format(
        served=served,
        options="".join(f" --{name} {value}" for name, value in options.items()),
        task=task,
        filled="  # {tools}: a JSON list of functions, a line each" if "{tools}" in task else "",
        reflect=dialogue.wording.reflect,
        reflect_filled=REPEATED if "{task}" in dialogue.wording.reflect else "",
        retry=dialogue.wording.retry,
        retry_filled=REPEATED if "{task}" in dialogue.wording.retry else "",
        system=[] if config.dialogue.system is None else [{"role": "system", "content": config.dialogue.system}],
        temperature=rollout.temperature,
        answer=rollout.max_answer_tokens,
        reflection=rollout.max_reflection_tokens,
        extra=extra,
        tools=", tools" if by_template else "",
        offered=OFFERED if by_template else "",
    )


def how_to_use_adapter(config: Config, dialogue: Dialogue, with_tools: bool, base: str, rank: int) -> str:
    """`how_to_use` of an adapter, which vLLM serves on top of the starting model.

    Args:
        config, dialogue, with_tools: as for `how_to_use`.
        base: what the starting model is loaded by: its name on the hub, or its directory.
        rank: the largest of the adapter's pairs.
    """
    most = next((served for served in SERVED_RANKS if served >= rank), rank)
    template = "" if config.dialogue.chat_template is None else " --chat-template chat_template.jinja"
    served = f"{shlex.quote(base)} --enable-lora --max-lora-rank {most} --lora-modules trained=.{template}"
    return f"{how_to_use(config, dialogue, with_tools, served)}\n\n{BY_PEFT}"
