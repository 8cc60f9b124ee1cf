"""What a plan says: numbers by hand, refusals with a way out, the machine it is for, and the documents."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import plans
import pytest
from paper_models import shape
from refusals import refusal

from nemo_r3.actor.head import CHUNK_ELEMENTS
from nemo_r3.capacity import Node, checkpoint_bytes
from nemo_r3.config import Config, load
from nemo_r3.errors import ConfigError
from nemo_r3.models import EMBEDDED, architecture_of
from nemo_r3.models.flops import training_cost
from nemo_r3.models.names import count_parameters
from nemo_r3.plan import ASSUMED, HEAD_LOGITS, Plan, activation_bytes, plan_of
from nemo_r3.units import GIB
from recipes.plan import describe, describe_step, longest_rows
from recipes.plan import plan as recipe

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SMALL_GPU = Node("laptop", 1, 24 * GIB, 30 * GIB)


def plan(model: str, config: str, *settings: str, here: Node | None = None) -> Plan:
    return plan_of(load([str(CONFIGS / f"{config}.yaml"), *settings]), shape(model), here, "a small GPU")


def numbers(text: str) -> dict[str, list[str]]:
    """The table's cells, by the names of its rows."""
    rows = re.findall(r"^  (\S.*?)  +(\S.*)$", text, flags=re.MULTILINE)
    return {name: cells.split() for name, cells in rows}


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def test_the_8b_on_one_node_by_hand() -> None:
    text = describe(plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "cluster.memory_gb=1800"))
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    parameters = 32 * layer + 2 * 128256 * 4096 + 4096
    half = parameters / 2
    update = 2 * half + 4 * half + 12 * half / 4 + 2 * half
    gpu, share = 79 * 2**30, 79 * 2**30 / 2
    cuda = 2 * 2**30
    assert numbers(text) == {
        "weights": [gib(2 * half)] * 3,
        "gradients": [gib(4 * half)] * 2 + ["-"],
        "optimizer state": [gib(3 * half)] * 2 + ["-"],
        "reference": [gib(2 * half)] * 2 + ["-"],
        "vLLM's weights": ["-", *[gib(2 * parameters)] * 2],
        "vLLM's KV cache, at most": ["-", *[gib(share - 2 * parameters)] * 2],
        "CUDA, NCCL and kernels": ["2.0"] * 3,
        "together": [gib(update + cuda), gib(update + share + cuda), gib(2 * half + share + cuda)],
        "left": [gib(gpu - update - cuda), gib(gpu - update - share - cuda), gib(gpu - 2 * half - share - cuda)],
        "activations, about": ["3.5", "-", "-"],
    }
    tokens = int((share - 2 * parameters) / (2 * 32 * 8 * 128 * 2))  # key and value, layers, heads, channels, bytes
    assert f"at most {tokens:,} tokens of an engine: {tokens // 4096} whole dialogues" in text
    assert f"{gib(14 * parameters)} GiB of each node to save, {gib(8 * (3 + 2) * half)} GiB to offload" in text
    assert f"disk      3 x {gib(14 * parameters)} GiB" in text and f"export    {gib(4 * parameters)} GiB" in text
    assert "data parallel 4" in text and "8 engines of 1 rank\n" in text


def test_the_70b_on_four_nodes_by_hand() -> None:
    text = describe(plan("llama-3.1-70b", "countdown-llama-3.1-70b-4n8g-tp8pp4"))
    layer = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192
    vocabulary = 128256 * 8192
    parameters, last_stage = 80 * layer + 2 * vocabulary + 8192, (20 * layer + vocabulary + 8192) / 8
    found = numbers(text)
    assert found["optimizer state"] == [gib(12 * last_stage)] * 2 + ["-"], "one copy: nothing is shared"
    assert found["together"][0] == gib((2 + 4 + 12 + 2) * last_stage + 2 * 2**30)
    assert found["vLLM's weights"][1] == gib(2 * parameters / 8)
    tokens = int((79 * 2**29 - 2 * parameters / 8) / (2 * 80 * 1 * 128 * 2))
    assert f"at most {tokens:,} tokens of an engine: {tokens // 4096} whole dialogues" in text
    assert f"{gib(14 * parameters / 4)} GiB of each node to save, {gib(8 * 14 * last_stage)} GiB to offload" in text
    assert "32 on 4 nodes" in text and "4 engines of 8 ranks" in text


MIXTURE = "countdown-qwen3-30b-a3b-1n8g-tp2dp4ep8"


def test_experts_count_as_a_whole_in_memory_and_by_what_a_token_passes_in_flops() -> None:
    """Of 128 experts a GPU has 16, whole; TP2 cuts all else; the state of AdamW is shared by all that hold a copy."""
    planned = plan("qwen3-30b-a3b", MIXTURE)
    attention, expert, router = 2 * 2048 * (4096 + 512), 3 * 2048 * 768, 128 * 2048
    experts, vocabulary, norms = 48 * 128 * expert, 2 * 151936 * 2048, 48 * (2 * 2048 + 2 * 128) + 2048
    rest = 48 * (attention + router) + vocabulary + norms
    held = rest / 2 + experts / 8
    found = numbers(describe(planned))
    assert found["weights"][0] == gib(2 * held) and found["gradients"][0] == gib(4 * held)
    assert found["optimizer state"][0] == gib(12 * (rest + experts) / 8)
    assert found["vLLM's weights"][1] == gib(2 * (rest + experts) / 2)
    assert "data parallel 4, expert parallel 8\n" in describe(planned)
    assert training_cost(planned.arch).per_token == 6 * 48 * (attention + 8 * expert + router)
    columns = 8 * 768
    kept = 2 * 2048 + 2 * 2048 + 512 + (3 * columns + 8 * 2048) / 2  # a rank routes half of the tokens
    working = 2048 + (3 * columns + 8 * 2048) / 2
    small_head = replace(planned.arch, vocab_size=8)
    assert activation_bytes(planned.config, small_head, 1000, 1) == 2 * 1000 * (48 * 1024 + kept + working)
    planned.config.actor.expert_parallel = 1  # TP2 cuts each expert, and a rank sees the tokens of both
    more = 2 * 8 * 2048 / 2
    assert activation_bytes(planned.config, small_head, 1000, 1) == 2 * 1000 * (48 * 1024 + kept + working + more)
    assert count_parameters(planned.arch) == rest + experts


def test_lora_of_a_30b_with_experts_fits_two_gpus() -> None:
    """Nothing of router and experts is copied, has gradients or state, or is in a checkpoint."""
    planned = plan("qwen3-30b-a3b", "countdown-qwen3-30b-a3b-1n2g-tp2ep2-lora")
    whole = plan("qwen3-30b-a3b", MIXTURE, "cluster.gpus_per_node=2", "actor.expert_parallel=2")
    attention, fed = 2 * 2048 * (4096 + 512), 8 * 3 * 2048 * 768 + 128 * 2048
    # A + B of query, key and value, output: TP2 cuts B, in the last A
    factors = 2 * (2048 + 4096) + 2 * (2048 + 512)
    own = 2 * (2048 + 4096 // 2) + 2 * (2048 + 512 // 2)
    found = numbers(describe(planned))
    assert found["weights"] == numbers(describe(whole))["weights"]
    assert found["gradients"] == found["optimizer state"] == ["-"] * 3
    assert found["reference"][0] == gib(2 * 48 * attention / 2)
    assert found["LoRA's factors and their state"][0] == gib(16 * 48 * 32 * own)
    assert checkpoint_bytes(planned.config, planned.arch) == 12 * 48 * 32 * factors
    assert training_cost(planned.arch, lora=True).per_token == 2 * 48 * 2 * (attention + fed)
    assert planned.verdict.startswith("fits: 47 GiB of each GPU are left")
    planned.check()
    assert refusal(whole.check).startswith("the actor needs ")
    said = (describe_step(plan("qwen3-30b-a3b", MIXTURE, f"actor.lora_rank={rank}")) for rank in (32, 0))
    lora, full = (float(re.findall(r"an update of (\S+) FLOPs", step)[0]) for step in said)
    assert lora / full == pytest.approx((2 + 1) / (3 + 1), abs=0.03), "no weight has a gradient; the reference scores"
    head = planned.arch.vocab_size // 2 * 2048
    one_token = [activation_bytes(it.config, it.arch, 1, 1) > 2 * head for it in (planned, whole)]
    assert one_token == [False, True], "nor has the head"


@pytest.mark.parametrize(("groups", "said"), [(32, ", 32 of them idle (train.failures_per_step=32)\n"), (64, "\n")])
def test_engines_without_a_failure_to_work_on(groups: int, said: str) -> None:
    settings = ("cluster.nodes=64", f"train.failures_per_step={groups}")
    text = describe(plan("llama-3.1-70b", "countdown-llama-3.1-70b-4n8g-tp8pp4", *settings))
    assert f"64 engines of 8 ranks{said}" in text


def test_what_a_step_of_the_8b_computes_at_most() -> None:
    """32 groups of 8 reflections of 256 tokens on contexts of 3,840; a row's last token is never an input."""
    said = describe_step(plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4"))
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    tokens, pairs = 3840 + 8 * 255, 3840 * 3841 / 2 + 8 * (255 * 3840 + 255 * 256 / 2)
    group = 2 * 32 * layer * tokens + 4 * 32 * 4096 * pairs + 2 * 128256 * 4096 * 8 * 256
    flops = 32 * group * (3 + 1)  # the reference runs forward alone
    assert f"at most {256 * (256 + 512):,} sampled tokens, and an update of {flops:.1e} FLOPs" in said
    assert f"{flops / 8:.1e} in 8 microbatches on each rank" in said
    said = describe_step(plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "train.updates_per_step=4"))
    flops = 8 * group * (4 * 3 + 4 + 3)  # and the old policy of all updates but the first
    assert f"and 4 updates, {flops:.1e} FLOPs: {flops / 8:.1e} in 8 microbatches on each rank" in said
    alone = describe_step(plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "algo.kl_beta=0"))
    assert f"and an update of {32 * group * 3:.1e} FLOPs" in alone
    said = describe_step(plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "train.updates_per_step=32"))
    assert "in 32 microbatches on each rank" in said, "at least one per update"
    retries = plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "algo.trained_phases=[retry]")
    assert {row.shared for row in longest_rows(retries)} == {4096 - 256 - 512}


@pytest.mark.parametrize(("settings", "idle"), [((), 3 / (32 + 3)), (("train.updates_per_step=4",), 3 / (8 + 3))])
def test_how_long_a_pipelines_stages_idle(settings: tuple[str, ...], idle: float) -> None:
    """Of 4 stages, each idles while 3 more microbatches pass in every update."""
    said = describe_step(plan("llama-3.1-70b", "countdown-llama-3.1-70b-4n8g-tp8pp4", *settings))
    assert said.endswith(f" in 32 microbatches on each rank; its pipeline stage idles for {idle:.0%} of the time")


@pytest.mark.parametrize(
    ("model", "settings", "why", "fits"),
    [
        ("llama-3.1-8b", ["actor.offload_optimizer=false"], "the actor's 41 GiB", "actor.offload_optimizer=true"),
        ("qwen2.5-32b", [], "the actor needs 168 GiB", "actor.tensor_parallel=8 rollout.tensor_parallel=2"),
        ("llama-3.1-8b", ["cluster.gpu_memory_gb=40"], "the actor needs 41 GiB", "actor.tensor_parallel=4"),
        (
            "llama-3.1-70b",
            ["rollout.tensor_parallel=4"],
            "the actor needs 361 GiB",
            "cluster.nodes=4 actor.pipeline_parallel=2 actor.tensor_parallel=8",
        ),
        (
            "llama-3.1-8b",
            ["cluster.memory_gb=200", "actor.tensor_parallel=4"],
            "each node has 200 GiB of host memory for this run, and its 8 ranks need 105 to save",
            "cluster.nodes=2",
        ),
        ("qwen2.5-1.5b", ["cluster.gpu_memory_gb=8"], "the actor needs 8 GiB", "actor.pipeline_parallel=2"),  # no TP4
        (
            "llama-3.1-8b",
            ["cluster.gpu_memory_gb=40", "cluster.nodes=4", "cluster.gpus_per_node=2"],
            "the actor needs 41 GiB",
            "actor.pipeline_parallel=2",
        ),
        (  # in BF16 actor.tensor_parallel=8 fits, which leaves 3,696 columns: no multiple of 32
            "qwen2-72b",
            ["cluster.nodes=4", "cluster.gpu_memory_gb=139", "rollout.tensor_parallel=8", "actor.precision=mxfp8"],
            "the actor needs 296 GiB",
            "actor.pipeline_parallel=2 actor.tensor_parallel=4",
        ),
        ("llama-3.1-8b", ["cluster.gpu_memory_gb=2"], "the actor needs 41 GiB", None),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_layout_that_does(
    model: str, settings: list[str], why: str, fits: str | None
) -> None:
    config = "countdown-llama-3.1-8b-1n8g-tp2dp4"
    message = refusal(lambda: plan(model, config, *settings).check())
    assert message.startswith(why)
    assumed = "; GPUs of 79 GiB are assumed (cluster.gpu_memory_gb)"
    assert ("assumed" in message) == (assumed in message) == ("gpu_memory" not in str(settings))
    if fits is None:
        assert "this fits" not in message
    else:
        assert message.endswith(f"; this fits: {fits}")
        plan(model, config, *settings, *fits.split()).check()


def test_experts_that_do_not_fit_are_shared_among_more_ranks() -> None:
    message = refusal(lambda: plan("qwen3-30b-a3b", MIXTURE, "actor.expert_parallel=2").check())
    assert message.startswith("the actor needs 1") and message.endswith("; this fits: actor.expert_parallel=8")
    assert "a larger actor.expert_parallel, actor.tensor_parallel or" in message
    assert "actor.pipeline_parallel, or train LoRA (actor.lora_rank); GPUs of" in message


def test_without_a_number_of_gpus_there_are_as_many_ranks_as_share_the_experts() -> None:
    assert plan("qwen3-30b-a3b", MIXTURE, "cluster.gpus_per_node=0").ranks == 8
    pipeline = "cluster.gpus_per_node=0", "cluster.nodes=2", "actor.pipeline_parallel=3"
    assert plan("qwen3-30b-a3b", MIXTURE, *pipeline).node.ranks == 12


@pytest.mark.parametrize(
    ("settings", "here", "gpu", "host", "ranks"),
    [
        (["cluster.gpus_per_node=8"], None, 79, math.inf, 8),
        (["cluster.gpus_per_node=8"], SMALL_GPU, 24, math.inf, 8),
        (["cluster.gpus_per_node=8", "cluster.gpu_memory_gb=139"], SMALL_GPU, 139, math.inf, 8),
        (["cluster.gpus_per_node=8", "cluster.memory_gb=500"], SMALL_GPU, 24, 500, 8),
        ([], SMALL_GPU, 24, 30, 1),
        ([], replace(SMALL_GPU, gpu=0), 0, 30, 1),
        (["cluster.memory_gb=500", "actor.tensor_parallel=2", "cluster.nodes=2"], None, 0, 500, 1),
        (["cluster.nodes=2"], None, 0, math.inf, 1),
        (["actor.tensor_parallel=2", "actor.pipeline_parallel=2", "rollout.tensor_parallel=2"], None, 0, math.inf, 4),
    ],
)
def test_the_machine_is_what_the_config_says_else_this_one(
    settings: list[str], here: Node | None, gpu: int, host: float, ranks: int
) -> None:
    node = plan("qwen2.5-1.5b", "quickstart", *settings, here=here).node
    assert (node.gpu / GIB, node.host / GIB, node.ranks) == (gpu, host, ranks)


def test_without_gpus_everything_is_host_memory() -> None:
    planned = plan("qwen2.5-1.5b", "quickstart", "train.save_in_background=true", here=replace(SMALL_GPU, gpu=0))
    parameters = 28 * (1536 * (2 * 1536 + 2 * 256 + 3 * 8960 + 2) + 1536 + 2 * 256) + 151936 * 1536 + 1536
    text = describe(planned)
    counts = {"weights": 4, "gradients": 4, "optimizer state": 8, "reference": 4, "copies for a save": 16}
    assert {name: numbers(text)[name] for name in counts} == {name: [gib(n * parameters)] for name, n in counts.items()}
    needs = f"host      {gib((sum(counts.values()) + 4) * parameters)} GiB of each node"  # 4: vLLM's weights
    assert f"{needs} before activations and KV cache; it has 30.0 GiB\n" in text
    why = refusal(planned.check)
    assert "laptop has 30.0 GiB of host memory for this run, and without a GPU" in why
    assert "this fits" not in why, "a second laptop is not to be had"
    assert plan("qwen2.5-1.5b", "quickstart", here=Node("x", 1, 0, 99 * GIB)).verdict.startswith("fits")


def test_what_is_shared_across_nodes_is_remarked() -> None:
    within = "cluster.nodes=8", "cluster.gpus_per_node=4", "actor.tensor_parallel=4", "rollout.tensor_parallel=4"
    assert "leaves a node" not in plan("llama-3.1-70b", "countdown-llama-3.1-70b-4n8g-tp8pp4", *within).verdict
    across = plan("llama-3.1-70b", "countdown-llama-3.1-70b-4n8g-tp8pp4", *within[:2]).verdict
    for name in ("actor", "rollout"):
        assert f"; {name}.tensor_parallel=8 leaves a node of 4 GPUs: each layer waits for the network" in across
    one = plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "cluster.nodes=2", "cluster.gpus_per_node=5")
    assert "; actor.tensor_parallel=2 leaves a node of 5 GPUs" in one.verdict and "rollout.tensor" not in one.verdict
    experts = plan("qwen3-30b-a3b", MIXTURE, "cluster.nodes=2", "actor.expert_parallel=16").verdict
    assert "; actor.expert_parallel=16 leaves a node of 8 GPUs: each layer waits for the network" in experts


def test_without_gpus_a_table_has_what_the_settings_take() -> None:
    settings = ("rollout.tensor_parallel=2", "actor.offload_optimizer=true")
    found = numbers(describe(plan("qwen2.5-1.5b", "quickstart", *settings)))
    assert (found["copies for a save"], found["its buffers, offloading"]) == (["-"], found["optimizer state"])
    assert found["vLLM's KV cache, at most"] == ["0.5"], "an engine's ranks share it"
    assert "it has an unknown amount (cluster.memory_gb=0)" in describe(plan("qwen2.5-1.5b", "quickstart"))
    assert "LoRA's factors and their state" not in found
    assert numbers(describe(plan("qwen2.5-1.5b", "quickstart", "actor.lora_rank=64")))["LoRA's factors and their state"]
    small = plan_of(load([str(CONFIGS / "quickstart.yaml")]), architecture_of(EMBEDDED))
    assert "MiB of each rank's host memory" in describe(small)


def test_a_layout_that_divides_nothing_is_refused() -> None:
    settings = ("actor.precision=fp8-blockwise",)
    with pytest.raises(ConfigError, match=r"on a rank are 3696 \(29568 / actor.tensor_parallel=8\)"):
        plan("qwen2-72b", "countdown-llama-3.1-70b-4n8g-tp8pp4", *settings)
    with pytest.raises(ConfigError, match="actor.tensor_parallel=4 does not divide the model's 2 key/value heads"):
        plan("qwen2.5-1.5b", "countdown-qwen2.5-1.5b-1n8g-dp8", "actor.tensor_parallel=4")


def test_activations_at_the_shape_that_was_measured() -> None:
    """An H200 took 62.95 GiB with SwiGLU fused (docs/log.md, "the first GPU"), 20 bytes a parameter of them no
    activations; 25,542 tokens in 4 microbatches, with 4,386 trained tokens in the largest."""
    arch = replace(shape("llama-3.1-8b"), num_layers=8)
    measured = 62.95 * GIB - 20 * 2_795_573_248
    assert activation_bytes(Config(), arch, tokens=6418, trained=4386) == pytest.approx(measured, rel=0.05)
    assert HEAD_LOGITS == CHUNK_ELEMENTS["cuda"]


def test_activations_of_a_pipeline_of_shards_and_with_recompute_by_hand() -> None:
    config, tokens = Config(), 1000
    arch = replace(shape("llama-3.1-8b"), num_layers=8, vocab_size=8)  # its head is not what takes most
    wide, queries, keys, columns = 4096, 4096, 1024, 14336

    def found(**settings: Any) -> float:
        for name, value in settings.items():
            setattr(config.actor, name, value)
        return activation_bytes(config, arch, tokens, trained=1)

    kept, working = 4 * wide + 2 * queries + 2 * keys + 3 * columns, 2 * wide + 3 * columns
    one = 2 * tokens * (8 * kept + working)
    assert found() == found(recompute="selective") == one
    assert found(recompute="full") == 2 * tokens * (8 * wide + kept + working)
    assert found(recompute="none", pipeline_parallel=2) == 2 * tokens * (2 * 4 * kept + working), "two under way"
    assert found(pipeline_parallel=1, tensor_parallel=2, sequence_parallel=True) == one / 2
    assert found(sequence_parallel=False) == one / 2 + 2 * tokens * (8 * 4 + 2) * wide / 2


def test_a_plan_looks_for_the_checkpoint_that_a_run_starts_from(tmp_path: Path) -> None:
    settings = [str(CONFIGS / "quickstart.yaml"), f"run.dir={tmp_path}", f"train.start_from={tmp_path}/gone"]
    assert refusal(lambda: recipe(settings)).startswith(f"train.start_from: {tmp_path}/gone is no complete checkpoint")


def test_activations_that_do_not_fit_are_said_but_not_refused() -> None:
    planned = plan("llama-3.1-8b", "countdown-llama-3.1-8b-1n8g-tp2dp4", "actor.microbatch_tokens=100000")
    planned.check()
    assert planned.verdict.startswith("fits: 36 GiB of each GPU are left for activations, which take about ")
    planned.config.actor.recompute = "none"
    planned.check()
    assert planned.verdict.startswith("fits but for activations: 36 GiB of each GPU are left, they take about ")
    assert "actor.recompute=full" in planned.verdict
    planned.config.rollout.sleep, planned.config.rollout.gpu_memory_utilization = False, 0.25
    assert "16 GiB of each GPU are left" in planned.verdict, "without the quarter of 79 that stays vLLM's"


@pytest.mark.parametrize(
    "path", [path for path in sorted(CONFIGS.glob("*-*.yaml")) if "-eval" not in path.stem], ids=lambda path: path.stem
)
def test_the_configs_fit_gpus_of_80_gb(path: Path) -> None:
    model = re.fullmatch(r"(?:countdown|fc)-(.+)-\d+n\d+g-\S+", path.stem)
    assert model
    planned = plan(model[1], path.stem)
    assert planned.source == ASSUMED and planned.verdict.startswith("fits: ")
    planned.check()


@pytest.mark.parametrize(
    ("model", "gpus", "config", "settings"),
    [
        ("qwen2.5-1.5b", 1, "countdown-qwen2.5-1.5b-1n8g-dp8", ""),
        ("qwen2.5-3b", 1, "countdown-qwen2.5-3b-1n8g-dp8", "actor.offload_optimizer=true"),
        ("llama-3.1-8b", 4, "countdown-llama-3.1-8b-1n8g-tp2dp4", "actor.tensor_parallel=4"),
        ("qwen2.5-7b", 4, "countdown-qwen2.5-7b-1n8g-tp2dp4", "actor.tensor_parallel=4"),
        ("llama-3.1-70b", 8, "countdown-llama-3.1-70b-4n8g-tp8pp4", "cluster.nodes=8"),
    ],
)
def test_the_layouts_that_docs_training_advises_fit(model: str, gpus: int, config: str, settings: str) -> None:
    plan(model, config, f"cluster.gpus_per_node={gpus}", *settings.split()).check()


def test_docs_training_has_these_numbers() -> None:
    page = plans.PAGE.read_text()
    assert page == plans.rewritten(page), "python tests/plans.py rewrites it"
    hosts = []
    for config, nodes in (("8b-1n8g-tp2dp4", 1), ("70b-4n8g-tp8pp4", 4), ("70b-4n8g-tp8pp4", 8)):
        model = f"llama-3.1-{config.partition('-')[0]}"
        size = plan(model, f"countdown-llama-3.1-{config}", f"cluster.nodes={nodes}").size
        hosts.append(round(8 * (size.saved + size.offloaded) / GIB))
    one, four, eight = hosts
    said = f"{one} GiB for the 8B on one node, {four} GiB on each of four nodes for the 70B, and {eight} GiB on each of"
    assert said in " ".join(page.split())
