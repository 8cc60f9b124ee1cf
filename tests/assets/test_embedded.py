"""The embedded model: loads offline from plain files, is small, and its chat template only ever appends."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_r3
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.tasks import load

MODEL = Path(nemo_r3.__file__).parent / "assets" / "countdown_tiny"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Use the numbers [8, 6, 4] to make 72."},
    {"role": "assistant", "content": "(8+6)+4"},
    {"role": "user", "content": "  No <b>&amp; \n\n{{ 7 }} \\boxed{漢} "},
    {"role": "assistant", "content": "I should be more careful.\n"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def task():
    settings = yaml.safe_load(QUICKSTART.read_text())
    return load(TaskConfig(**settings["task"]), DialogueConfig(**settings["dialogue"]))


def test_it_is_small_and_without_code() -> None:
    files = list(MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}


def test_it_divides_over_ranks(model, tokenizer) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 4, 2)
    assert config.vocab_size == len(tokenizer)
    assert config.vocab_size % 2 == config.hidden_size % 4 == config.intermediate_size % 4 == 0
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32


def test_turns_end_with_the_end_of_sequence_token(model, tokenizer) -> None:
    assert tokenizer.eos_token == "<|end|>"
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == len(CHAT)


def test_the_template_only_appends_and_keeps_text_verbatim(tokenizer) -> None:
    rendered = [tokenizer.apply_chat_template(CHAT[:length], tokenize=False) for length in range(1, len(CHAT) + 1)]
    for shorter, longer, message in zip(rendered, rendered[1:], CHAT[1:], strict=False):
        assert longer == f"{shorter}<|{message['role']}|>{message['content']}<|end|>"
    ids = [tokenizer.apply_chat_template(CHAT[:length], return_dict=False) for length in range(1, len(CHAT) + 1)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in zip(ids, ids[1:], strict=False))
    opened = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert rendered[2] == f"{opened}{CHAT[2]['content']}<|end|>"


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    for text in ("(8+4)*6 = 72", "  two  spaces\n\ttab ", "Ünï 漢字 🙂", "a<|b|>c 1234567"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_number_of_the_task_is_one_token(tokenizer, task) -> None:
    numbers = {problem.data["target"] for split in ("train", "test") for problem in task.problems(split)}
    assert all(len(tokenizer.encode(f" {number}", add_special_tokens=False)) == 1 for number in numbers)


def test_it_answers_in_the_tasks_form_and_is_not_good_at_it(model, tokenizer, task) -> None:
    problems = task.problems("test")[:100]
    chats = [[{"role": "user", "content": problem.text}] for problem in problems]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all((ids == tokenizer.eos_token_id).any(dim=1))
    right = sum(task.verify(problem, answer) for problem, answer in zip(problems, answers, strict=True))
    assert 5 <= right <= 60
