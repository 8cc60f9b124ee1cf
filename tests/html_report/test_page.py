"""The page of whole, unfinished, damaged and hostile runs: what it shows, and that nothing in it acts."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_r3.config import Config, load
from nemo_r3.errors import UserError
from nemo_r3.html_report import MOST_BYTES, write_report

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
EMPTY_TAGS = {"meta", "input", "path"}
HOSTILE = (
    "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7 * 7 }} \u202eabc\x00\x1b[31m\ud800"
)
RATE = {"sampled": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 64}}


class Page(HTMLParser):
    """Tags with their attributes, and the text by the class of the element that it is in."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY_TAGS:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1][1] if self.open else "", data))

    def all(self, kind: str = "") -> str:
        return "\n".join(text for found, text in self.texts if not kind or kind in found.split())


def config_of(path: Path, *settings: str) -> Config:
    return load([QUICKSTART, f"run.dir={path}", *settings])


def page_of(path: Path, *settings: str) -> Page:
    return Page(write_report(config_of(path, *settings)))


def line(step: int, group: int, sample: int, **more: Any) -> str:
    shared = {"problem": f"problem {step}.{group}", "attempt": f"attempt {step}.{group}"} if sample == 0 else {}
    passed = sample % 2
    written = {"reflection": f"plan {step}.{group}.{sample}", "retry": f"answer {step}.{group}.{sample}"}
    ids = {"step": step, "group": group, "sample": sample, "problem_id": f"id-{step}-{group}"}
    return json.dumps(ids | {"retry_passed": bool(passed), "advantage": passed - 0.5} | shared | written | more)


def a_run(path: Path, steps: int, groups: int = 3, samples: int = 4) -> Path:
    (path / "rollouts").mkdir(parents=True)
    for step in range(1, steps + 1):
        lines = [line(step, group, sample) for group in range(groups) for sample in range(samples)]
        (path / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    metrics = [
        {"step": step, "loss": 0.0, "retry_success": step / steps, "groups_used": 2, "groups_dropped": 1, "kl": 0.1}
        | {"reflection_tokens": 30, "retry_tokens": 20, "truncated": 0.25}
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    return path


def test_a_whole_run(tmp_path: Path) -> None:
    path = a_run(tmp_path / "mine", 20)
    rates = {"first_try": RATE, "retry_success_fixed": RATE}
    summary = {"before": rates, "after": rates, "step": 20, "versions": {"torch": "2.13.0"}}
    (path / "summary.json").write_text(json.dumps(summary))
    page = page_of(path, "train.steps=20", "actor.lr=1e-3")
    text = " ".join(page.all().split())
    assert "mine embedded on countdown: 20 of 20 steps trained." in text
    assert "actor.lr 0.001 5e-07" in text and "torch 2.13.0" in text
    assert "second try on a failure 0.25 [0.20, 0.30] → 0.25 [0.20, 0.30]" in text
    assert [it["id"] for tag, it in page.tags if tag == "details" and "id" in it] == [
        f"step-{step}" for step in (1, 3, 5, 7, 9, 12, 14, 16, 18, 20)
    ]
    assert "plan 20.0.3" in page.all("reflection") and "plan 2.0.3" not in text
    assert "Step 20: 6 of 12 retries passed" in text
    assert sum(tag == "figure" for tag, _ in page.tags) == 5
    assert "mean of the last 5 steps: 0.05 → 0.9 each step: 0.05 → 1" in text and "used: 0.667 → 0.667" in text
    assert "reflection: 30 → 30 retry: 20 → 20" in text
    assert "MISMATCH: token_mult_prob_error above train.mismatch_warn=1.05 none" in text
    assert "share of first 5 steps last 5 steps" in text
    assert "reflections cut at their limit 25.0 % 25.0 % 25.0 % 1" in text


def test_what_was_measured_on_held_out_problems(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", 6)
    lines = [json.loads(one) for one in (path / "metrics.jsonl").read_text().splitlines()]
    for place, value in ((0, 0.25), (3, 0.75)):
        lines[place] |= {"held_out/first_try": 0.5, "held_out/second_try": value, "held_out/within_two": None}
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    sampled = [line(step, group, 0, advantage=None) for step in (0, 6) for group in range(5)]
    (path / "evaluation.jsonl").write_text("\n".join([*sampled, '{"step": "6"}', "{"]))
    page = page_of(path)
    text = " ".join(page.all().split())
    assert "held-out problems 1 2 3 4" not in text and "second try on a failure: 0.25 → 0.75" in text
    assert "first try: 0.5 → 0.5" in text and "within two tries: " not in text
    shown = page.all("reflection").split("\n")
    assert shown[:6] == [f"plan {step}.{group}.0" for step in (0, 6) for group in range(3)], "side by side"
    assert "Starting model ✗ retry failed problem id-0-0" in text, "and no advantage"
    assert "1 of the 12 lines" in text


def test_the_settings_that_the_run_recorded_count(tmp_path: Path) -> None:
    path, bank = a_run(tmp_path / "run", 2), tmp_path / "bank"
    recorded = {"model": {"path": "embedded"}, "run": {"dir": str(path)}, "failures": {"path": str(bank)}}
    recorded["cluster"] = {"setup": "export HF_TOKEN=hf_secret"}
    (path / "config.yaml").write_text(json.dumps(recorded | {"train": {"steps": 7, "mismatch_warn": 1.5}}))
    bank.mkdir()
    tally = {"asked": 9, "passed": 2, "no_room": 0, "truncated": 1}
    (bank / "bank.json").write_text(json.dumps({"tallies": {"shard_00000.jsonl": tally}}))
    text = " ".join(page_of(path, "train.steps=3").all().split())
    assert "2 of 7 steps" in text and "train.mismatch_warn=1.5" in text and "Mined 9 first answers" in text
    assert "hf_secret" not in text


def test_reflections_of_the_first_and_the_last_step_come_first(tmp_path: Path) -> None:
    shown = page_of(a_run(tmp_path / "run", 3)).all("reflection").split("\n")
    best = [f"plan {step}.{group}.1" for step in (1, 3) for group in range(3)]
    not_chosen = [f"plan {step}.{group}.0" for step in (1, 3) for group in range(3)]
    assert shown[:12] == not_chosen + best
    assert shown[12:16] == ["plan 1.0.1", "plan 1.0.3", "plan 1.0.0", "plan 1.0.2"], "then by advantage"


def test_reflections_have_their_verdict_and_marks_in_words(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", 1, groups=1, samples=2)
    failed, passed = {"retry_finish_reason": "length"}, {"finish_reason": "length", "reflection_solves": True}
    lines = [line(1, 0, 0, advantage=0.5, **failed), line(1, 0, 1, advantage=-0.5, **passed)]  # shuffled rewards
    (path / "rollouts" / "step_000001.jsonl").write_text("\n".join(lines))
    page = page_of(path)
    cards = [it["class"] for tag, it in page.tags if tag == "div" and (it.get("class") or "").startswith("card")]
    assert cards[-2:] == ["card cut failed", "card cut passed solves"]
    marks = ["retry cut at its limit", "gives the answer away", "reflection cut at its limit"]
    assert page.all("mark").split("\n")[-3:] == marks
    assert page.all("verdict").split("\n")[-2:] == ["✗ retry failed", "✓ retry passed"]
    assert page.all("advantage").split("\n")[-2:] == ["+0.50", "-0.50"]


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    path = a_run(tmp_path / "<script>alert(0)</script>".replace("/", "⁄"), 1)
    texts = dict.fromkeys(("problem", "attempt", "reflection", "retry", "problem_id"), HOSTILE)
    (path / "rollouts" / "step_000001.jsonl").write_text(line(1, 0, 0, **texts) + "\n" + line(1, 0, 1, **texts))
    (path / "summary.json").write_text(json.dumps({"versions": {HOSTILE: HOSTILE}}))
    (path / "rollouts" / "step_000002.jsonl").write_text("[")
    yaml = tmp_path / "hostile.yaml"
    reflect = json.dumps("</div><script>alert(3)</script>\u202e\x07")
    yaml.write_text(f"model: {{path: embedded}}\ndialogue: {{reflect: {reflect}}}\n")
    page = Page(file := write_report(load([str(yaml), f"run.dir={path}"])))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(it["content"] for _, it in page.tags if "content" in it)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    as_shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩")
    as_shown = as_shown.replace("\ud800", "⟨U+D800⟩")
    assert as_shown in page.all("reflection") and page.all("text").count(as_shown) > 4
    assert "</div><script>alert(3)</script>⟨U+202E⟩⟨U+0007⟩" in page.all("text")
    assert f"1 of the 1 lines of {path}/rollouts/step_000002.jsonl" in page.all()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]|https?:|@import|url\(", file.read_text())


def test_unfinished_and_damaged_runs_show_what_there_is(tmp_path: Path) -> None:
    begun = a_run(tmp_path / "begun", 3)
    written = (begun / "metrics.jsonl").read_text()
    (begun / "metrics.jsonl").write_text('{"step": 5}\n' + written + '{"step": 4, "lo\n{"loss": 0.1}\n')
    with (begun / "rollouts" / "step_000003.jsonl").open("a") as file:
        file.write(line(3, 7, 0)[:40])
    (begun / "rollouts" / "step_000001.jsonl").write_text("")
    (begun / "rollouts" / "step_best.jsonl").touch()  # a user's copy
    (begun / "failures").mkdir()
    (begun / "failures" / "bank.json").write_text("{")
    (begun / "summary.json").write_text('{"before": {')
    (begun / "config.yaml").write_text("actor: {lr: fast}")
    page = page_of(begun, "train.steps=40")
    text = " ".join(page.all().split())
    assert "5 of 40 steps trained" in text and "Not measured yet" in text
    assert "not in metrics.jsonl 1 4" in text and "share of first 2 steps last 2 steps" in text
    wrong = "actor.lr: expected a number, got 'fast'"
    assert all(it in text for it in ("1 of the 6 lines", "1 of the 13 lines", "summary.json", "bank.json", wrong))
    assert page.all("reflection").startswith("plan 2.0.0"), "the first step that has any"

    evaluated = tmp_path / "evaluated"
    evaluated.mkdir()
    seconds = {"mine": 5, "evaluate": {"wall": "long"}, "export": {}}
    (evaluated / "summary.json").write_text(json.dumps({"before": {"first_try": RATE}, "seconds": seconds}))
    assert "0.25 [0.20, 0.30] → -" in page_of(evaluated).all()
    (evaluated / "summary.json").write_text(json.dumps({"before": {"first_try": {"sampled": {"value": "high"}}}}))
    assert f"the rates in {evaluated}/summary.json" in page_of(evaluated).all()

    mined = tmp_path / "mined"
    (mined / "failures").mkdir(parents=True)
    tally = {"asked": 1200, "passed": 200, "no_room": 0, "truncated": 3}
    (mined / "failures" / "bank.json").write_text(json.dumps({"tallies": {"shard_00000.jsonl": tally}}))
    text = " ".join(page_of(mined).all().split())
    assert "Mined 1,200 first answers, of which 200 passed and 3 were cut" in text and "No rollouts yet" in text

    with pytest.raises(UserError, match=r"run\.dir: .*none holds nothing to report"):
        write_report(config_of(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_long_texts_are_cut_with_their_length_told_and_the_page_stays_small(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", 10, groups=0)
    texts = {"reflection": "begin" + "漢" * 5000 + "end", "retry": "\U000e0001" * 300}  # of many bytes, when shown
    lines = [line(1, group, sample, **texts) for group in range(6) for sample in range(20)]
    for file in (path / "rollouts").iterdir():
        file.write_text("\n".join(lines))
    page = page_of(path, f"dialogue.reflect={'x' * 3000}")
    assert (path / "report.html").stat().st_size < MOST_BYTES
    assert re.search(r"begin漢+\n\[\.\.\. cut here: 5,008 characters in all \.\.\.\]\n漢+end", page.all("reflection"))
    assert "cut here: 3,000 characters in all" in page.all("text"), "a setting"
    assert "4 reflections of advantages in between are not shown" in " ".join(page.all().split())


def test_a_page_of_a_thousand_steps_is_quick_and_small(tmp_path: Path) -> None:
    config = config_of(a_run(tmp_path / "run", 1000, groups=4))
    begun = time.process_time()
    assert write_report(config).stat().st_size < 1_000_000
    assert time.process_time() - begun < 5
