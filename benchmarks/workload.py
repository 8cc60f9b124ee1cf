"""The work that every side of a benchmark does: a model with random weights, and steps whose sizes are given.

    sizes -> model directory (Qwen2, word-level tokenizer) and workload.json -> each side reads both

What a model samples is its own affair; how much it samples, and what that earns, is drawn here once: all sides see
the same prompts, lengths and rewards. Only `make` needs nemo_r3, whose `Dialogue` makes the prompts.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "user", "assistant")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REQUEST_WORDS = 24
SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    contexts: int = 4  # failures per step
    group: int = 8  # reflections per failure (G)
    prompt: int = 1024  # tokens of a reflection's prompt: task, failed attempt and request
    shortest: int = 64  # fewest tokens of a reflection
    longest: int = 192  # most tokens of a reflection
    retry: int = 64  # tokens of a retry
    hidden: int = 768  # the model's width, with heads of 64 (or 32, where the model is narrower than 512)
    layers: int = 12  # of the model
    vocabulary: int = 32768  # of the model
    lora_rank: int = 0  # 0: all weights are trained

    @property
    def eighth(self) -> Sizes:
        """The same with an eighth of the tokens."""
        eighth = {name: max(getattr(self, name) // 8, 4) for name in ("shortest", "longest", "retry")}
        return Sizes(**asdict(self) | eighth | {"prompt": max(self.prompt // 8, 64)})


SMALL = Sizes(contexts=2, prompt=256, shortest=8, longest=24, retry=8, hidden=128, layers=2, vocabulary=512)


@dataclass(frozen=True)
class Context:
    """One failure, and the size and reward of each reflection on it."""

    task: list[int]  # [task] token ids of the first turn
    attempt: list[int]  # token ids of the failed answer
    prompt: list[int]  # token ids of [task][attempt][request]: what a reflection continues
    lengths: list[int]  # [G] tokens to sample
    rewards: list[float]  # [G] what each retry earns; never all the same


@dataclass(frozen=True)
class LossCheck:
    """A batch on which both sides compute one loss."""

    contexts: list[Context]  # whose prompts are continued
    completions: list[list[list[int]]]  # [contexts][G] given reflections
    advantages: list[list[float]]  # [contexts][G], far from centred, so that the loss is far from 0
    kl_beta: float  # large enough for the KL to show


@dataclass(frozen=True)
class Workload:
    """Everything that the sides of a comparison share."""

    model: str  # directory of the checkpoint
    group: int  # reflections per failure (G)
    retry_request: list[int]  # token ids between a reflection and its retry
    retry_tokens: int  # tokens of each retry
    max_model_len: int  # longest dialogue
    temperature: float  # of sampling and of the loss
    kl_beta: float  # weight of the KL to the starting model (the paper's)
    lr: float  # AdamW's, constant; no weight decay
    clip_grad: float  # largest gradient norm
    lora_rank: int  # of the factors that are trained; 0: all weights are
    lora_alpha: float  # their product counts alpha / rank
    seed: int  # of everything
    steps: list[list[Context]]
    """Contexts of each step; the first is a warm-up: one context of full size, the others an eighth."""
    check: LossCheck  # where both sides must agree

    def write(self, path: Path) -> None:
        """Stores it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Workload:
        """What `write` stored."""
        found = json.loads(path.read_text())
        steps = [[Context(**context) for context in step] for step in found.pop("steps")]
        check = found.pop("check")
        contexts = [Context(**context) for context in check.pop("contexts")]
        return cls(**found, steps=steps, check=LossCheck(**check, contexts=contexts))


def make(home: Path, sizes: Sizes, steps: int) -> Workload:
    """Writes the model and workload.json into `home`; `steps` counts those after the warm-up."""
    from transformers import AutoTokenizer

    from nemo_r3.config.task import DialogueConfig
    from nemo_r3.dialogue import Dialogue

    model = home / "model"
    make_model(model, sizes)
    dialogue = Dialogue(AutoTokenizer.from_pretrained(model), DialogueConfig(), wording())
    draw = random.Random(SEED)
    warm_up = [sizes] + [sizes.eighth] * (sizes.contexts - 1)
    contexts = [
        [_context(dialogue, size, draw) for size in step] for step in [warm_up, *[[sizes] * sizes.contexts] * steps]
    ]
    request = _retry_request(dialogue)
    workload = Workload(
        model=str(model),
        group=sizes.group,
        retry_request=request,
        retry_tokens=sizes.retry,
        max_model_len=sizes.prompt + sizes.longest + len(request) + sizes.retry,
        temperature=0.9,
        kl_beta=0.001,
        lr=1e-4,
        clip_grad=1.0,
        lora_rank=sizes.lora_rank,
        lora_alpha=32.0,
        seed=SEED,
        steps=contexts,
        check=_check([_context(dialogue, sizes.eighth, draw) for _ in range(sizes.contexts)], sizes, draw),
    )
    workload.write(home / "workload.json")
    return workload


def wording() -> Any:
    """The turns' words: as many as the paper's requests have, and all in the vocabulary."""
    from nemo_r3.tasks.protocol import Wording

    words = [_word(number) for number in range(len(SPECIAL), len(SPECIAL) + REQUEST_WORDS)]
    return Wording("{text}", " ".join(words), " ".join(words[: REQUEST_WORDS // 3]))


def make_model(path: Path, sizes: Sizes) -> None:
    """A tied Qwen2 in fp32 with random weights, and a tokenizer in which every word is a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {_word(number): number for number in range(len(SPECIAL), sizes.vocabulary)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)

    heads = sizes.hidden // (64 if sizes.hidden >= 512 else 32)
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 8 // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 3, 1),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<pad>"],
    )
    Qwen2ForCausalLM(config).float().save_pretrained(path)


def _word(number: int) -> str:
    return f"w{number}"


def _ids(count: int, sizes: Sizes, draw: random.Random) -> list[int]:
    return [draw.randrange(len(SPECIAL), sizes.vocabulary) for _ in range(count)]


def _context(dialogue: Any, sizes: Sizes, draw: random.Random) -> Context:
    """A failure whose reflection prompt has exactly `sizes.prompt` tokens."""
    from nemo_r3.types import Phase, Problem, Segment, Trajectory

    def prompt_after(attempt: list[int]) -> Trajectory:
        return dialogue.reflect(task.then(Segment(Phase.ATTEMPT, tuple(attempt), (0.0,) * len(attempt), 0)), problem)

    problem = Problem("", " ".join(map(_word, _ids(sizes.prompt // 4, sizes, draw))), {})
    task = dialogue.task(problem)
    attempt = _ids(1 + sizes.prompt - len(prompt_after(_ids(1, sizes, draw))), sizes, draw)
    prompt = prompt_after(attempt).ids
    assert len(prompt) == sizes.prompt
    rewards = [float(number % 4 == 0) for number in range(sizes.group)]
    draw.shuffle(rewards)
    lengths = [draw.randint(sizes.shortest, sizes.longest) for _ in range(sizes.group)]
    return Context(task.ids, attempt, prompt, lengths, rewards)


def _retry_request(dialogue: Any) -> list[int]:
    from nemo_r3.types import Phase, Problem, Segment, Trajectory

    reflection = Segment(Phase.REFLECTION, (len(SPECIAL),), (0.0,), 0)
    return list(dialogue.retry(Trajectory((reflection,)), Problem("", "", {})).segments[-1].ids)


def _check(contexts: list[Context], sizes: Sizes, draw: random.Random) -> LossCheck:
    return LossCheck(
        contexts=contexts,
        completions=[[_ids(length, sizes, draw) for length in context.lengths] for context in contexts],
        advantages=[[draw.uniform(0.5, 1.5) for _ in context.lengths] for context in contexts],
        kl_beta=0.1,
    )
