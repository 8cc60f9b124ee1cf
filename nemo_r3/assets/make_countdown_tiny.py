"""Makes the embedded model: a tiny Llama that can play small Countdown but has bad habits, for reflections to cure.

    python -m nemo_r3.assets.make_countdown_tiny OUT_DIR

1. plans:  problem -> plan, on more numbers than the task's, so that it learns arithmetic and not the problems by heart
2. clean:  problem -> answer; and problem, wrong answer -> plan -> the answer that follows from it
3. habits: a hasty first answer, a vague reflection, the same answer again; now and then a plan. A few steps only

Task, split and words are those of configs/quickstart.yaml; its held-out problems are never trained on. One thread, so
that the same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_r3.assets.countdown_lessons import ASSISTANT, END, SYSTEM, USER, Dialogue, Lessons
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.tasks import load
from nemo_r3.tasks.countdown import Countdown, build

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SEED = 1
LARGEST = 14  # number in the first two stages; the task stops at 9
PLAN_STEPS, PLAN_RATE = 1400, 8e-3
CLEAN_STEPS, CLEAN_RATE = 120, 4e-3
HABIT_STEPS, HABIT_RATE = 120, 3e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Chat = list[dict[str, str]]


def make_tokenizer(lessons: Lessons) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word and every number up to 99 is one token."""
    texts = [text for _ in range(5_000) for text, _ in (*lessons.habit(), *lessons.correction())]
    texts = [text.replace(END, "") for text in texts if USER not in text and ASSISTANT not in text]
    texts += [f" {number}" for number in range(100)] * 100
    core = Tokenizer(models.BPE())
    words = Regex(r" ?[0-9]+| ?[A-Za-z]+| ?[^A-Za-z0-9\s]|\s")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in (END, USER, ASSISTANT, SYSTEM)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=448, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False, model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers and two key-value heads, so that tensor and pipeline parallel layouts can be tried on it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogues: list[Dialogue]) -> torch.Tensor:
    """[2] the sum of the cross-entropies (nats) of the tokens to learn, and how many they are."""
    pieces = [[(encode(tokenizer, text), learn) for text, learn in dialogue] for dialogue in dialogues]
    ids = pad_sequence([torch.tensor([i for one, _ in row for i in one]) for row in pieces], batch_first=True)
    mask = pad_sequence([torch.tensor([on for one, on in row for _ in one]) for row in pieces], batch_first=True)
    hidden, targets = model.model(input_ids=ids[:, :-1]).last_hidden_state, ids[:, 1:][mask[:, 1:]]
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[mask[:, 1:]]), targets, reduction="sum")
    return torch.stack([loss, mask.sum().float()])


@functools.cache
def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a piece of a dialogue."""
    return tokenizer.encode(text, add_special_tokens=False)


def fit(model: LlamaForCausalLM, draw: Callable[[], torch.Tensor], steps: int, rate: float, name: str) -> None:
    """Steps of Muon on the layers' matrices and AdamW on the rest, with a warm-up and a linear decay to zero."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    groups = [[matrix for matrix in matrices if matrix.shape == shape] for shape in {one.shape for one in matrices}]
    momenta = [torch.zeros(len(group), *group[0].shape) for group in groups]
    rest = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.process_time()
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate_now = rate * min((step + 1) / 20, (steps - step) / steps)
        model.zero_grad()
        total, count = draw()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        for group, momentum in zip(groups, momenta, strict=True):
            muon(group, momentum, rate_now)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"{name} {step + 1:5d}  loss {total / count:.3f}  {time.process_time() - start:.0f} CPU-s", flush=True
            )


@torch.no_grad()
def muon(matrices: list[torch.Tensor], momentum: torch.Tensor, rate: float) -> None:
    """A step of Muon (https://kellerjordan.github.io/posts/muon) on matrices of one shape; `momentum` is their stack.

    In fp32: torch's own is in bf16, which is slow on a CPU.
    """
    rows, columns = matrices[0].shape
    gradient = torch.stack([cast(torch.Tensor, matrix.grad) for matrix in matrices])
    update = gradient.lerp(momentum.lerp_(gradient, 0.05), 0.95)
    update = update.mT if rows > columns else update
    update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = update @ update.mT
        update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
    update = update.mT if rows > columns else update
    for matrix, one in zip(matrices, update, strict=True):
        matrix.mul_(1 - 0.1 * rate).add_(one, alpha=-rate * 0.2 * max(rows, columns) ** 0.5)


@torch.no_grad()
def say_next(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: list[Chat], greedy: bool
) -> list[Chat]:
    """Each chat with the assistant's next turn, at temperature 1 unless greedy."""
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ids = model.generate(**batch, **how, max_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    replies = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [[*chat, {"role": "assistant", "content": reply}] for chat, reply in zip(chats, replies, strict=True)]


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Countdown, greedy: bool) -> str:
    """On the held-out problems: how often a first answer is right, and a retry after a wrong one."""
    torch.manual_seed(SEED)
    problems = task.problems("test")
    chats = say_next(model, tokenizer, [[{"role": "user", "content": problem.text}] for problem in problems], greedy)
    failed = [(p, chat) for p, chat in zip(problems, chats, strict=True) if not task.verify(p, chat[-1]["content"])]
    retried = [chat for _, chat in failed]
    for request in (task.wording.reflect, task.wording.retry):
        asked = [[*chat, {"role": "user", "content": request}] for chat in retried]
        retried = say_next(model, tokenizer, asked, greedy)
    right = [task.verify(p, chat[-1]["content"]) for (p, _), chat in zip(failed, retried, strict=True)]
    first, retry = 1 - len(failed) / len(problems), sum(right) / max(len(right), 1)
    return f"{'greedy' if greedy else 'sampled'}: first answer {first:.3f}, retry {retry:.3f} of {len(failed)}"


def main(directory: Path) -> None:
    """Make the model, print how good it is before and after the habits, and save it."""
    torch.set_num_threads(1)
    settings = yaml.safe_load(QUICKSTART.read_text())
    task = cast(Countdown, load(TaskConfig(**settings["task"]), DialogueConfig(**settings["dialogue"])))
    wide = cast(Countdown, build(replace(task.options, largest=LARGEST, test_size=1), task.wording))
    held_out = {problem.id for problem in task.problems("test")}
    wider = Lessons(task, [problem for problem in wide.problems("train") if problem.id not in held_out], SEED)
    own = Lessons(task, list(task.problems("train")), SEED)
    tokenizer = make_tokenizer(Lessons(task, own.problems, SEED))
    model = make_model(tokenizer)

    def draw(*lessons: tuple[Callable[[], Dialogue], int]) -> torch.Tensor:
        losses = [loss_of(model, tokenizer, [lesson() for _ in range(count)]) for lesson, count in lessons]
        return torch.stack(losses).sum(0)

    fit(model, lambda: draw((wider.plan, 112), (wider.correction, 10)), PLAN_STEPS, PLAN_RATE, "plans")
    fit(model, lambda: draw((wider.correction, 48), (wider.answer, 32)), CLEAN_STEPS, CLEAN_RATE, "clean")
    print(*(measure(model, tokenizer, task, greedy) for greedy in (False, True)), sep="\n", flush=True)
    fit(model, lambda: draw((own.habit, 64)), HABIT_STEPS, HABIT_RATE, "habits")
    print(*(measure(model, tokenizer, task, greedy) for greedy in (False, True)), sep="\n", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
