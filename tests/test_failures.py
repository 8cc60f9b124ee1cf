"""The failure bank: mined, resumed, damaged, of another model. What is drawn from it is in test_failure_sources.py."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from first_answers import ALONE, SHARD, STAMP, Scripted, attempt, bank, mine, problems, read
from refusals import refusal

from nemo_r3.errors import UserError
from nemo_r3.failures import bank as bank_module
from nemo_r3.failures.source import BankSource
from nemo_r3.failures.stamp import Stamp
from nemo_r3.failures.tally import Tally
from nemo_r3.files import _locks
from nemo_r3.runtime import World
from nemo_r3.types import Answer, Attempt, Phase, Problem, Segment, Trajectory


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "SHARD_PROBLEMS", SHARD)


def test_a_mined_bank_gives_back_every_rejected_answer(tmp_path: Path) -> None:
    mined, another_run_s = bank(tmp_path / "bank"), bank(tmp_path / "bank")
    rollout = Scripted(passes=1)
    assert not mined.is_complete()
    mined.mine(rollout, problems(3))
    assert mined.is_complete() and another_run_s.is_complete() and bank(tmp_path / "bank").is_complete()
    assert rollout.steps == {0}, "which no training step has"
    found = read(mined)
    assert [failure.id for failure in found] == ["p0/1", "p1/1", "p2/1"]
    assert found[2] == attempt(problems(3)[2], 1, False)


def test_mining_says_how_many_answers_were_cut(tmp_path: Path) -> None:
    class Cut(Scripted):
        def first_attempts(self, asked: Sequence[Problem], *more: Any, **settings: Any) -> list[Attempt]:
            attempts = super().first_attempts(asked, *more, **settings)
            return [replace(it, answer=replace(it.answer, finish_reason=self.reason(it))) for it in attempts]

        @staticmethod
        def reason(attempt: Attempt) -> str:
            return "length" if attempt.problem.id == "p0" or attempt.passed else "stop"

    bank(tmp_path).mine(Cut(passes=1), problems(4))
    _locks.pop().close()
    again = bank(tmp_path)
    assert again.is_complete()
    assert again.tally().truncated_share == 5 / 8, "those that passed count, too, and those of an earlier process"


def test_a_lost_shard_is_mined_again_and_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = problems(2 * SHARD + 3)
    first, again = Scripted(), Scripted()
    mine(tmp_path, first, many)
    whole = read(bank(tmp_path))
    lost = tmp_path / "shard_00001.jsonl"
    lost.unlink()
    assert not bank(tmp_path).is_complete()
    mine(tmp_path, again, many)
    assert (first.asked, again.asked) == (len(many), SHARD)
    assert f"{lost} is missing" in capsys.readouterr().err
    mined = bank(tmp_path)
    assert mined.is_complete() and read(mined) == whole
    assert mined.tally() == Tally(2 * len(many), len(many)), "of both processes"


def test_mining_resumes_behind_the_shards_that_are_whole(tmp_path: Path) -> None:
    class Killed(Scripted):
        def first_attempts(self, *args: Any, **kwargs: Any) -> list[Attempt]:
            if self.asked:
                raise KeyboardInterrupt
            return super().first_attempts(*args, **kwargs)

    many, again = problems(SHARD + 3), Scripted()
    with pytest.raises(KeyboardInterrupt):
        mine(tmp_path, Killed(), many)
    _locks.pop().close()
    assert not bank(tmp_path).is_complete()
    mine(tmp_path, again, many)
    assert again.asked == 3
    assert [failure.id for failure in read(bank(tmp_path))] == [f"{problem.id}/1" for problem in many]


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "rounds"), [(1, 1, [4, 4, 4, 1]), (2, 1, [8, 5]), (4, 2, [8, 5]), (8, 1, [13])]
)
def test_as_many_shards_are_asked_at_once_as_the_engines_need(
    tmp_path: Path, ranks: int, tensor_parallel: int, rounds: list[int]
) -> None:
    class Counting(Scripted):
        def first_attempts(self, asked: Sequence[Problem], *more: Any, **__: object) -> list[Attempt]:
            found.append(len(asked))
            return super().first_attempts(asked, *more)

    found: list[int] = []
    many = problems(3 * SHARD + 1)
    world = cast(World, SimpleNamespace(**vars(ALONE) | {"size": ranks}))
    wide = bank(tmp_path / "wide", world=world)
    wide._config.rollout.tensor_parallel = tensor_parallel
    wide.mine(Counting(), many)
    assert found == rounds
    assert wide.tally() == Tally(2 * len(many), len(many))
    bank(tmp_path / "narrow").mine(Scripted(), many)
    for file in (tmp_path / "narrow").glob("shard_*.jsonl"):
        assert file.read_bytes() == (tmp_path / "wide" / file.name).read_bytes()
    assert read(wide) == read(bank(tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("field", "value"), [("model", "m1"), ("problems", "p1"), ("verifier", "v2"), ("dialogue", "d1")]
)
def test_a_foreign_bank_is_refused_by_name_unless_told(tmp_path: Path, field: str, value: str) -> None:
    bank(tmp_path).mine(Scripted(), problems(2))
    other = Stamp(**{**vars(STAMP), field: value})
    assert f"mined otherwise: {field}" in refusal(lambda: bank(tmp_path, other))
    assert bank(tmp_path, other, allow_foreign=True).is_complete()


def test_a_foreign_bank_with_ids_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    def other_words(ids: Sequence[int]) -> str:
        return f"words {ids}"

    bank(tmp_path).mine(Scripted(), problems(2))
    other = replace(STAMP, model="m1")
    assert bank(tmp_path, decode=other_words, allow_foreign=True).is_complete()  # it is no foreign one
    said = r"failures\.path: .*another tokenizer.*'7 8'.*'words .*failures\.allow_foreign"
    with pytest.raises(UserError, match=said):
        bank(tmp_path, other, decode=other_words, allow_foreign=True)


def test_a_half_mined_foreign_bank_is_refused_even_when_told(tmp_path: Path) -> None:
    bank(tmp_path).mine(Scripted(), problems(2))
    bank(tmp_path)._write_index(2, complete=False)
    with pytest.raises(UserError, match="mined otherwise: model"):
        bank(tmp_path, Stamp(**{**vars(STAMP), "model": "m1"}), allow_foreign=True)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    bank(tmp_path).mine(Scripted(), problems(2))
    (tmp_path / "bank.json").unlink()
    with pytest.raises(UserError, match="no bank.json"):
        bank(tmp_path)


def test_a_bank_without_failures_says_why(tmp_path: Path) -> None:
    class NoRoom(Scripted):
        def first_attempts(self, asked: Sequence[Problem], *_: object, **__: object) -> list[Attempt]:
            answer = Answer(Segment(Phase.ATTEMPT, (), (), 0), "", "no_room")
            return [Attempt(problem, n, Trajectory(), answer, False) for problem in asked for n in range(2)]

    def why(name: str, **settings: object) -> str:
        said = refusal(bank(tmp_path / name, **settings).read)
        return said.partition("holds no failures, so there is nothing to reflect on: ")[2]

    mine(tmp_path / "passed", Scripted(passes=2), problems(2))
    assert why("passed") == "of 4 first answers 4 passed"
    mine(tmp_path / "long", NoRoom(), problems(2))
    assert why("long") == "of 4 first answers 4 found no room in rollout.max_model_len=4096"
    mine(tmp_path / "easy", Scripted(passes=1), problems(2))
    assert len(bank(tmp_path / "easy", max_solve_rate=0.5).read()) == 2
    assert why("easy", max_solve_rate=0.4) == (
        "of 4 first answers 2 passed, 2 are left out by failures.min_solve_rate=0 and max_solve_rate=0.4"
    )


@pytest.mark.parametrize(
    ("samples", "least", "most", "left"),
    [
        (4, 0.0, 0.25, {"p0": 4, "p1": 3}),
        (4, 0.0, 0.74, {"p0": 4, "p1": 3, "p2": 2}),
        (4, 0.26, 1.0, {"p2": 2, "p3": 1}),
        (32, 2 / 32, 3 / 32, {"p2": 30, "p3": 29}),  # solved as often as these, not less or more often
    ],
)
def test_only_problems_that_are_solved_as_often_as_asked_are_let_through(
    tmp_path: Path, samples: int, least: float, most: float, left: dict[str, int]
) -> None:
    class ByNumber(Scripted):
        """Passes as many of the answers to a problem as its number says."""

        def first_attempts(self, asked: Sequence[Problem], _: int, samples: int, **__: object) -> list[Attempt]:
            return [attempt(it, sample, sample < int(it.id[1:])) for it in asked for sample in range(samples)]

    found = bank(tmp_path, min_solve_rate=least, max_solve_rate=most, samples_per_problem=samples)
    found.mine(ByNumber(), problems(5))
    assert Counter(failure.problem.id for failure in read(found)) == left


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: text.index("\n") + 1], lambda text: text[:-9], lambda text: text + text],
    ids=["cut between lines", "cut within a line", "longer"],
)
@pytest.mark.parametrize("max_solve_rate", [1.0, 0.5])
def test_a_shard_that_was_cut_or_changed_is_refused_until_it_is_removed(
    tmp_path: Path, damage: Callable[[str], str], max_solve_rate: float
) -> None:
    mine(tmp_path, Scripted(), problems(3))
    shard = tmp_path / "shard_00000.jsonl"
    shard.write_text(damage(shard.read_text()))
    with pytest.raises(UserError, match=rf"{shard} was lost, cut or changed .* remove this file, and recipes.mine"):
        bank(tmp_path, max_solve_rate=max_solve_rate).read()
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard} was lost"):
        bank(tmp_path).read()
    mine(tmp_path, Scripted(), problems(3))
    assert len(bank(tmp_path, max_solve_rate=max_solve_rate).read()) == 3


def test_a_shard_that_changes_under_a_run_is_named(tmp_path: Path) -> None:
    bank(tmp_path).mine(Scripted(), problems(2))
    row = bank(tmp_path).read()[1]
    row.shard.write_text("")
    with pytest.raises(UserError, match=r"shard_00000\.jsonl was changed while this run used it"):
        row.load()


def test_all_ranks_draw_what_rank_0_reads(tmp_path: Path) -> None:
    bank(tmp_path / "here").mine(Scripted(), problems(9))
    said: list[Any] = []
    first = SimpleNamespace(is_main=True, on_main=lambda act: said.append(found := act()) or found)
    other = SimpleNamespace(is_main=False, on_main=lambda _: said.pop(0))

    def seen(path: Path, world: SimpleNamespace) -> list[Any]:
        found = bank(path, world=cast(World, world))
        source = BankSource(found.read(), 4, 1, cast(World, world))
        return [found.is_complete(), source.draw(1), source.draw(2)]

    assert seen(tmp_path / "here", first) == seen(tmp_path / "not here", other)


def test_a_bank_that_is_read_stays_on_the_disk(tmp_path: Path) -> None:
    class Long(Scripted):
        def first_attempts(self, asked: Sequence[Problem], *_: object, **__: object) -> list[Attempt]:
            return [long_attempt(problem, sample) for problem in asked for sample in range(2)]

    def long_attempt(problem: Problem, sample: int) -> Attempt:
        segment = Segment(Phase.ATTEMPT, tuple(range(1000, 1400)), (-0.5,) * 400, 0)
        context = Trajectory((Segment(Phase.TASK, (1, 5)), segment))
        return Attempt(problem, sample, context, Answer(segment, "7", "stop"), passed=False)

    bank(tmp_path).mine(Long(), problems(100))
    tracemalloc.start()
    try:
        rows = bank(tmp_path).read()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 200
    assert held < 500 * len(rows)  # bytes; its text has 5000 for each


@pytest.mark.parametrize(("part", "damaged"), [('"stamp"', ""), ('"asked": ', '"asked": 1'), ('"sum"', '"son"')])
def test_a_damaged_index_is_named(tmp_path: Path, part: str, damaged: str) -> None:
    index = tmp_path / "bank.json"
    bank(tmp_path).mine(Scripted(), problems(1))
    index.write_text(index.read_text().replace(part, damaged))
    with pytest.raises(UserError, match=r"bank\.json is damaged"):
        bank(tmp_path)


def test_rows_hold_ids_and_text(tmp_path: Path) -> None:
    mined = bank(tmp_path)
    mined.mine(Scripted(), problems(1))
    assert mined.example == attempt(problems(1)[0], 0, True)
    (row,) = (json.loads(line) for line in (tmp_path / "shard_00000.jsonl").read_text().splitlines())
    assert (row["attempt"], row["attempt_ids"], row["task_ids"]) == ("7 8", [7, 8, 2], [1, 5])
    assert (row["solve_rate"], row["weights_version"], row["finish_reason"]) == (0.5, 0, "stop")


def test_a_rejected_attempt_without_tokens_is_no_failure() -> None:
    problem = problems(1)[0]
    task = Trajectory((Segment(Phase.TASK, (1, 5)),))
    unsampled = Attempt(problem, 0, task, Answer(Segment(Phase.ATTEMPT, (), (), 0), "", "no_room"), False)
    assert not unsampled.is_failure
    assert not attempt(problem, 0, passed=True).is_failure
    assert attempt(problem, 0, passed=False).is_failure
