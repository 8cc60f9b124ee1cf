"""The real vLLM engine, alone and as a fleet, through one launch of probe.py each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import run_script

PROBE = Path(__file__).with_name("probe.py")
TOLERANCE = 1e-4


def launch(home: Path, verb: str, *rest: str, ranks: int = 1) -> list[dict[str, Any]]:
    run_script(PROBE, verb, home, *rest, ranks=ranks)
    return [json.loads((home / f"result-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("engine"), "engine")[0]


@pytest.fixture(scope="module", params=["1", "2"], ids=["two engines of one rank", "one engine of two ranks"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("fleet"), "fleet", request.param, ranks=2)


def test_scores_equal_transformers(engine: dict[str, Any]) -> None:
    assert engine["score_a"] < TOLERANCE
    assert engine["a_is_not_b"] > 1, "the models are too alike for these tests to see anything"


def test_sampled_logprobs_are_at_the_sampling_temperature(engine: dict[str, Any]) -> None:
    assert engine["sampled_a"] < TOLERANCE


def test_refit_is_exact_for_a_tied_head_and_an_odd_vocabulary(engine: dict[str, Any]) -> None:
    refit = engine["refit"]
    assert refit["score_b"] < TOLERANCE
    assert refit["sampled_b"] < TOLERANCE
    assert refit["version"] == 1


def test_without_the_guards_a_refit_is_silently_wrong(engine: dict[str, Any]) -> None:
    assert engine["refit"]["without_repack"] > 0.1, "vLLM renews a tied head by itself now: drop _repack"
    assert engine["refit"]["without_reset"] > 0.1, "vLLM forgets cached prefixes by itself now: drop the reset"
    assert max(engine["refit"]["restored"]) < TOLERANCE


def test_refit_refuses_what_would_corrupt(engine: dict[str, Any]) -> None:
    no_reset, missing, unfinished = engine["refit"]["errors"]
    assert "prefix cache" in no_reset
    assert "model.layers.1.mlp.up_proj.weight" in missing
    assert "unfinished" in unfinished


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(engine: dict[str, Any]) -> None:
    assert engine["alone"] == [True, True, True]
    assert engine["other_seed_differs"]


def test_finish_reasons(engine: dict[str, Any]) -> None:
    for reason, ends_with_a_stop, length in engine["endings"]:
        assert (reason == "stop") == ends_with_a_stop
        assert reason == "stop" or length == 24
    assert engine["endless"] == ["length", 24]


def test_prompts_are_cut_on_a_gpu_only(engine: dict[str, Any]) -> None:
    """vLLM's own choice for a GPU, None, would be 2048."""
    assert engine["batched_tokens"] == {"cpu": [4096, 20_000], "cuda": [8192, 8192]}


def test_attention_and_experts_on_a_gpu_need_no_compiler(engine: dict[str, Any]) -> None:
    """Left to itself, vLLM takes FlashInfer on Blackwell; for float32 FlashAttention would be refused."""
    assert engine["attention"] == {"cpu": [None] * 3, "cuda": ["FLASH_ATTN", "FLASH_ATTN", None]}
    assert engine["experts"] == {"cpu": ["auto", "auto"], "cuda": ["auto", "triton"]}


def test_a_vllm_for_other_devices_is_refused(engine: dict[str, Any]) -> None:
    (on_cpu, is_for_cpus), (is_for_gpus, on_cuda), (finds_none, _) = (
        engine["builds"][device] for device in ("cpu", "cuda", "")
    )
    assert on_cpu == on_cuda == "accepted"
    assert "is for CPUs, but torch finds a GPU" in is_for_cpus and "CUDA_VISIBLE_DEVICES" in is_for_cpus
    assert finds_none == is_for_gpus and "is for GPUs, but torch finds none" in is_for_gpus


def test_an_engine_that_slept_has_no_weights_until_it_is_given_some(engine: dict[str, Any]) -> None:
    found = engine["asleep"]
    assert (found["version"], found["slept"], found["woken"]) == (-1, [2], [[["weights"]]])
    assert "has slept: it needs a refit first" in found["refused"]


def test_greedy_takes_the_likeliest_token(engine: dict[str, Any]) -> None:
    assert engine["greedy"]


def test_retries_start_before_all_reflections_have_ended(engine: dict[str, Any]) -> None:
    events = engine["rollout"]["events"]
    first_retry = next(i for i, event in enumerate(events) if event.startswith("add retry"))
    last_reflection = max(i for i, event in enumerate(events) if event.startswith("end reflection"))
    assert first_retry < last_reflection
    for i, event in enumerate(events):
        if event.startswith("add retry"):  # nothing is sampled between a reflection's end and its retry's start
            before = [e for e in events[:i] if e.startswith(("end reflection", "add retry"))]
            assert sum(e.startswith("end") for e in before) > sum(e.startswith("add") for e in before)


def test_reflections_carry_the_logprobs_of_their_spliced_context(engine: dict[str, Any]) -> None:
    assert engine["rollout"]["logprob_error"] < TOLERANCE
    assert engine["rollout"]["versions"] == [6]
    assert engine["rollout"]["phases"] == ["task", "attempt", "request", "reflection", "request", "retry"]


def test_progress_counts_every_turn(engine: dict[str, Any]) -> None:
    told = [counts for counts in engine["rollout"]["told"] if "reflection" in counts]
    (ended, turns, _, begun), (*counts, _, _) = told[-1]["reflection"], told[-1]["retry"]
    assert counts == [ended, turns] and ended == turns > 0 == begun
    before_any = [it["reflection"] for it in told if it["reflection"][0] == 0 < it["reflection"][2]]
    assert before_any, "tokens of turns under way count, too"
    assert all(begun == pytest.approx(count / 32) for _, _, count, begun in before_any), "of 32 that each may have"


def test_a_stopped_step_continues_after_its_tokens(engine: dict[str, Any]) -> None:
    stopped = engine["rollout"]["stopped"]
    (first_begun, first), (again_begun, again) = stopped["counts"]
    assert first_begun > 5 and again_begun > 5 and first <= again < stopped["turns"]
    assert stopped["prefixes"], "a kept turn was sampled again"
    assert again_begun <= stopped["asked_at_last"] <= stopped["turns"] - (again - again_begun), (
        "an ended turn was asked"
    )
    assert stopped["seeds_differ"], "a turn that continues draws the random numbers of its beginning again"
    assert stopped["longest_begun"] == 16 and stopped["longest"] == 32, "the token limit counts from the turn's start"
    assert stopped["logprob_error"] < TOLERANCE
    assert stopped["of_another_step"] == 0


def test_an_engine_that_sleeps_cannot_sample_and_is_awake_at_the_end(engine: dict[str, Any]) -> None:
    sleep = engine["sleep"]
    assert sleep["asleep"] == ["kv_cache", "weights"] and "it needs a refit first" in sleep["refused"]
    assert sleep["loaded"] == [["kv_cache"], 7] and sleep["end"] == [[], False]
    assert sleep["awake"] == [[], 8]


def test_no_room_is_marked_and_not_rewarded(engine: dict[str, Any]) -> None:
    assert engine["rollout"]["no_room"] == [[True, True, True, 0.0], [False, True, True, 0.0]]


def test_ranks_and_engines_do_not_change_the_rollout(fleet: list[dict[str, Any]], engine: dict[str, Any]) -> None:
    for rank in fleet:
        for key, found in rank["before"].items():
            assert found == engine["rollout"][key], f"rank {rank['rank']}: {key}"
        assert rank["donated"] == engine["rollout"]["donated"] != []


def test_every_rank_hands_on_a_part_of_its_engines_results(fleet: list[dict[str, Any]]) -> None:
    """`all_gather_object` sends as much for every rank as for the one with the most; neighbours share a context."""
    first, last = fleet[0]["given"]
    assert sorted(first + last) == list(range(10))
    assert fleet[0]["tensor_parallel"] == 1 or (first, last) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


def test_what_is_mined_is_held_by_the_first_rank_alone(fleet: list[dict[str, Any]]) -> None:
    """64 ranks mining 8 answers of 1,024 tokens to each of 10,000 problems would hold 5.7 GB each."""
    first, last = (rank["mined"] for rank in fleet)
    assert len(set(first)) == 5 and last == []


def test_a_signal_to_one_rank_stops_all_ranks_of_its_engine_at_the_same_step(fleet: list[dict[str, Any]]) -> None:
    first, last = (rank["looks"] for rank in fleet)
    if fleet[0]["tensor_parallel"] == 1:
        assert (first, last) == (0, 1)
    else:
        assert 1 <= first == last <= 16


def test_ranks_of_an_engine_agree_though_it_is_a_step_ahead(fleet: list[dict[str, Any]]) -> None:
    if fleet[0]["stopped"] is None:
        assert not fleet[0]["ahead"]
        return
    first, second = fleet
    assert first["ahead"] and second["ahead"] and first["stopped"] == second["stopped"]
    stopped = first["stopped"]
    assert stopped["prefixes"] and stopped["seeds_differ"] and stopped["logprob_error"] < TOLERANCE
    assert 8 < stopped["longest_begun"] < 16, "a stop loses what is under way, and no more"


def test_vllms_groups_wait_as_long_as_ours(fleet: list[dict[str, Any]]) -> None:
    for rank in fleet:
        assert rank["patience"] == [20, 20]


def test_the_memory_of_an_engines_ranks_is_its_own_and_goes_with_them(fleet: list[dict[str, Any]]) -> None:
    """Linux says so of what no longer has its name."""
    first, second = (rank["shared"] for rank in fleet)
    run, names = first
    assert first == second and len(run) == 32, "what is random, and not vLLM's name for all"
    assert all(name.startswith(run) and name.endswith(" (deleted)") for name in names)


def test_every_rank_is_refitted(fleet: list[dict[str, Any]]) -> None:
    for rank in fleet:
        assert rank["score_b"] < TOLERANCE
        assert rank["after"] == rank["before"]
