from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import byte_level
import pytest
from refusals import refusal
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nemo_r3.config.task import DialogueConfig
from nemo_r3.dialogue import Dialogue, read_tokenizer, stop_token_ids
from nemo_r3.errors import UserError
from nemo_r3.models import EMBEDDED
from nemo_r3.tasks.protocol import Wording
from nemo_r3.types import Phase, Problem, Segment, Trajectory

WORDING = Wording("Make {target}.", "What went wrong?", "Try again.")
PROBLEM = Problem("p", "Make 7 from 1 2 3.", {})
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>", "<|begin|>", "<|endoftext|>"]
FOR_BPE_TOO = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
"""With it, transformers cleans up as its 5.0 did, whatever the kind of tokenizer."""

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = (  # Qwen2: a default system turn, and an end of turn that is not the tokenizer's eos
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + PLAIN.replace("<|end|>", "<|im_end|>")
)
LLAMA3 = (  # begins with a token of its own, prints a date, trims what is around a turn
    "<|begin|>Today: {{ date_string or 'never the same' }}\n"
    "{% for m in messages %}<|head|>{{ m['role'] }}<|tail|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
ROLE_ENDS = (  # GLM: the next role's token ends a turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STYLES = {"plain": PLAIN, "chatml": CHATML, "llama3": LLAMA3, "role ends": ROLE_ENDS}
CLOSES = {"plain": "<|end|>", "chatml": "<|im_end|>", "llama3": "<|eot|>", "role ends": "<|im_start|>"}

KEEP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"
GENERATE = ASK + "{% endif %}"
REFUSED = {
    "drops an earlier answer": "{% set messages = messages[-1:] %}" + PLAIN,
    "drops the reasoning": KEEP
    + "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|end|>\n{% endfor %}"
    + GENERATE,
    "trims or rewrites": KEEP + "{{ m['content'] | truncate(30, True) }}<|end|>\n{% endfor %}" + GENERATE,
    "repeats": KEEP + "{{ m['content'] }}{{ m['content'] }}<|end|>\n{% endfor %}" + GENERATE,
    "differently from a shorter one": KEEP
    + "{% if loop.index0 == messages|length - 3 %}(earlier){% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    + GENERATE,
    "could not be kept": KEEP
    + "{{ m['content'] }}<|end|>\n{% endfor %}"
    + ASK
    + "Answer: <think>\n</think>\n{% endif %}",
    "rewrites or moves": KEEP
    + "{% if m['role'] == 'assistant' %}(said) {% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    + GENERATE,
    "without a special token": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ",
    "cannot render this dialogue: TemplateError": "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}"
    + PLAIN,
    "cannot render this dialogue: TypeError": "{% for tool in tools %}{{ tool.name }}{% endfor %}" + PLAIN,
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    text = "user assistant system Make 7 from 1 2 3. What went wrong? Try again. a+b=7"
    return byte_level.trained([text], 400, SPECIAL)


def tokenizer_of(trained: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    eos = "<|endoftext|>" if template == CHATML else "<|end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=eos, additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = template
    return tokenizer


def dialogue_of(trained: Tokenizer, template: str, **settings: str) -> Dialogue:
    return Dialogue(tokenizer_of(trained, template), DialogueConfig(**settings), WORDING)


def said(phase: Phase, ids: Sequence[int]) -> Segment:
    return Segment(phase, tuple(ids), (-1.0,) * len(ids), 3)


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_dialogue_whose_turns_end_with_the_next_role_reads_as_its_template_would_render_it(
    trained: Tokenizer,
) -> None:
    """Turns with an end of their own are in test_families.py."""
    tokenizer, dialogue = tokenizer_of(trained, ROLE_ENDS), dialogue_of(trained, ROLE_ENDS)
    close = tokenizer.convert_tokens_to_ids(CLOSES["role ends"])
    asked = [PROBLEM.text, "1+2=7", WORDING.reflect, "I added wrongly.", WORDING.retry]
    attempt, reflection = ([*tokenizer.encode(f"{turn}\n"), close] for turn in asked[1::2])
    reflected = dialogue.reflect(dialogue.task(PROBLEM).then(said(Phase.ATTEMPT, attempt)), PROBLEM)
    trajectory = dialogue.retry(reflected.then(said(Phase.REFLECTION, reflection)), PROBLEM)
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(asked)]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(trajectory.ids) == expected
    assert [s.phase for s in trajectory.segments] == ["task", "attempt", "request", "reflection", "request"]


def test_the_retry_prompt_begins_with_exactly_context_and_reflection_ids(trained: Tokenizer, style: str) -> None:
    dialogue = dialogue_of(trained, STYLES[style])
    strange = [300, 9, 9, 77, 12, 300]  # ids that no tokenizer would choose for their own text
    context = dialogue.reflect(dialogue.task(PROBLEM).then(said(Phase.ATTEMPT, strange)), PROBLEM)
    reflected = context.then(said(Phase.REFLECTION, [*strange, dialogue.end_of_turn[0]]))
    retry = dialogue.retry(reflected, PROBLEM)
    assert retry.ids[: len(reflected)] == context.ids + [*strange, dialogue.end_of_turn[0]]
    longer = dialogue.reflect(retry.then(said(Phase.RETRY, strange)), PROBLEM)  # and on, for as many turns as one likes
    assert longer.ids[: len(retry)] == retry.ids
    assert longer.segments[-1].ids == context.segments[-1].ids


def test_the_later_turns_may_repeat_the_task(trained: Tokenizer) -> None:
    wording = Wording(retry="Again: {task} Think!")
    tokenizer = tokenizer_of(trained, CHATML)
    dialogue = Dialogue(tokenizer, DialogueConfig(), wording)
    reflected = dialogue.task(PROBLEM).then(said(Phase.REFLECTION, [50, 51]))
    for problem in (PROBLEM, replace(PROBLEM, text="Make {a} of 2.")):
        asked = tokenizer.decode(dialogue.retry(reflected, problem).segments[-1].ids)
        assert f"Again: {problem.text} Think!" in asked


def test_a_turn_ends_exactly_once(trained: Tokenizer, style: str) -> None:
    tokenizer, dialogue = tokenizer_of(trained, STYLES[style]), dialogue_of(trained, STYLES[style])
    close = tokenizer.convert_tokens_to_ids(CLOSES[style])
    task = dialogue.task(PROBLEM)
    ended = dialogue.reflect(task.then(said(Phase.ATTEMPT, [50, 51, close])), PROBLEM)
    cut = dialogue.reflect(task.then(said(Phase.ATTEMPT, [50, 51])), PROBLEM)
    if style == "role ends":  # a newline of the template's own comes before its end of turn
        assert ended.ids[len(task) + 3 :] == cut.ids[len(task) + 4 :]
    else:
        assert ended.ids == cut.ids
    assert cut.segments[-1].ids.count(close) == ended.segments[-1].ids.count(close) + 1
    assert close in dialogue.end_of_turn


def test_another_end_of_sequence_is_kept_and_the_template_still_closes(trained: Tokenizer) -> None:
    tokenizer, dialogue = tokenizer_of(trained, CHATML), dialogue_of(trained, CHATML)
    eos, close = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>"))
    assert set(dialogue.end_of_turn) == {eos, close}
    asked = dialogue.reflect(dialogue.task(PROBLEM).then(said(Phase.ATTEMPT, [50, eos])), PROBLEM)
    assert asked.segments[-1].ids[0] == close


def test_whitespace_around_an_answer_survives_a_template_that_trims(trained: Tokenizer) -> None:
    tokenizer, dialogue = tokenizer_of(trained, LLAMA3), dialogue_of(trained, LLAMA3)
    spaced = tokenizer.encode("\n\n  1+2=7 \n", add_special_tokens=False)
    asked = dialogue.reflect(dialogue.task(PROBLEM).then(said(Phase.ATTEMPT, spaced)), PROBLEM)
    assert "\n\n  1+2=7 \n<|eot|>" in tokenizer.decode(asked.ids)


@pytest.mark.parametrize("reason", REFUSED)
def test_templates_that_would_change_the_dialogue_are_refused(trained: Tokenizer, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        dialogue_of(trained, REFUSED[reason])


def test_tools_are_written_plainly_where_showing_them_would_drop_the_reasoning(trained: Tokenizer) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}" + REFUSED["drops the reasoning"] + "{% else %}" + PLAIN + "{% endif %}"
    )
    assert dialogue_of(trained, template).tools == "plain"
    with pytest.raises(UserError, match=r"dialogue\.tools: template: .*drops the reasoning"):
        dialogue_of(trained, template, tools="template")


def test_a_problem_that_the_template_fails_on_is_named(trained: Tokenizer) -> None:
    template = "{% if 'x' in messages[0]['content'] %}{{ 1 + messages[0]['content'] }}{% endif %}" + PLAIN
    with pytest.raises(UserError, match=r"problem 'odd': model\.path: the chat template cannot render .*TypeError"):
        dialogue_of(trained, template).task(Problem("odd", "Find x.", {}))


def test_no_template(trained: Tokenizer) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Dialogue(tokenizer_of(trained, None), DialogueConfig(), WORDING)


def test_system_turn(trained: Tokenizer) -> None:
    tokenizer = tokenizer_of(trained, PLAIN)
    assert "You are terse." in tokenizer.decode(dialogue_of(trained, PLAIN, system="You are terse.").task(PROBLEM).ids)
    silent = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(UserError, match=r"dialogue\.system"):
        dialogue_of(trained, silent, system="You are terse.")


def test_fingerprint_follows_what_a_first_answer_depends_on(trained: Tokenizer) -> None:
    prints = [
        dialogue_of(trained, PLAIN).fingerprint,
        dialogue_of(trained, CHATML).fingerprint,
        Dialogue(tokenizer_of(trained, PLAIN), DialogueConfig(), Wording("Other words.", "Why?", "Again.")).fingerprint,
        dialogue_of(trained, PLAIN, system="Hello.").fingerprint,
        Dialogue(tokenizer_of(trained, PLAIN), DialogueConfig(), WORDING, [5]).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert dialogue_of(trained, PLAIN).fingerprint == prints[0]


def test_only_a_sampled_turn_can_be_answered(trained: Tokenizer) -> None:
    dialogue = dialogue_of(trained, PLAIN)
    with pytest.raises(AssertionError):
        dialogue.reflect(Trajectory(dialogue.task(PROBLEM).segments), PROBLEM)


def test_stop_token_ids(tmp_path: Path) -> None:
    assert stop_token_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert stop_token_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert stop_token_ids(tmp_path) == [3, 4]


@pytest.mark.parametrize("text", ["{cut", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}'])
def test_stop_token_ids_that_cannot_be_read_are_refused_by_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=rf"model\.path: {tmp_path}/generation_config\.json"):
        stop_token_ids(tmp_path)


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """transformers would make an empty one of config.json."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, tmp_path)
    with pytest.raises(UserError, match=rf"model\.path: {tmp_path} has no tokenizer \(no tokenizer\.json, "):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, file: str, text: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    (model / file).write_text(text)
    assert f"model.path: {model} has no tokenizer that can be read: " in refusal(lambda: read_tokenizer(model))


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    """What transformers before 5.22 makes of a byte-level tokenizer.json whose class is LlamaTokenizer."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}))
    assert "misreads: it makes 'Whatisbrokenmayshowonlyhere.' of " in refusal(lambda: read_tokenizer(model))


@pytest.mark.parametrize(("prefix", "fits"), [(True, True), (False, False)])
def test_a_tokenizer_model_alone_is_read_only_if_texts_are_cut_as_sentencepiece_does(
    tmp_path: Path, prefix: bool, fits: bool
) -> None:
    """transformers 5.19 puts a space before a text whether the SentencePiece model asks for it or not."""
    model = tmp_path / "tokenizer.model"
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["What is broken may show only here, and what is not may not."] * 20),
        model_writer=made,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    model.write_bytes(made.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if fits:
        ids = read_tokenizer(tmp_path).encode("may not", add_special_tokens=False)
        assert ids == SentencePieceProcessor(model_file=str(model)).encode("may not")
    else:
        assert f" does not cut texts as {model} says; " in refusal(lambda: read_tokenizer(tmp_path))


def test_a_checkpoints_own_python_does_not_run_even_if_someone_says_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "custom code" in refusal(lambda: read_tokenizer(model))
    assert not (tmp_path / "ran").exists()


def test_a_sound_tokenizer_is_read() -> None:
    assert read_tokenizer(EMBEDDED).eos_token_id is not None


def test_decoding_leaves_spaces_alone_whatever_the_tokenizers_config_says(tmp_path: Path) -> None:
    model, said = tmp_path / "model", "what 's ( 7 , 3 ) ? n't . !"
    shutil.copytree(EMBEDDED, model)
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True, FOR_BPE_TOO: True}
    file.write_text(json.dumps(settings))
    tokenizer = read_tokenizer(model)
    ids = tokenizer.encode(said, add_special_tokens=False, verbose=False)
    assert PreTrainedTokenizerFast.from_pretrained(model).decode(ids) != said
    assert tokenizer.decode(ids, skip_special_tokens=True) == said
