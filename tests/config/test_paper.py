"""The configs of the paper's models: named after what they hold, nothing that is so anyway, fit for their model."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from paper_models import shape

from nemo_r3.config import Config, load
from nemo_r3.models import check_layout

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = sorted(CONFIGS.glob("*-*.yaml"), key=lambda path: path.name)
NAME = re.compile(r"(countdown|fc)-([a-z0-9.-]+)-(\d+)n(\d+)g-([a-z0-9]+)(-fp8|-lora|-eval)?")
TASKS = {"countdown": "countdown", "fc": "function_calling"}
TRAINED = {
    "countdown": {"qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b", "llama-3.2-3b"},
    "fc": {"qwen2-1.5b", "qwen2-7b", "llama-3.1-8b", "phi-3.5-mini"},
}
BEYOND = {"countdown": {"qwen2.5-32b", "llama-3.1-70b", "qwen3-30b-a3b"}, "fc": set[str]()}
"""Not trained in the paper."""
COMPARED = {"countdown": {"qwen2.5-32b", "qwen2.5-72b", "llama-3.1-70b"}, "fc": {"qwen2-72b", "llama-3.1-70b"}}


def parts(path: Path) -> tuple[str, str, int, int, str, str]:
    """Task, model, nodes, GPUs per node, layout and ending of a config's name."""
    found = NAME.fullmatch(path.stem)
    assert found, f"{path.name} is not named <task>-<model>-<nodes>n<gpus>g-<layout>[-fp8|-lora|-eval].yaml"
    task, model, nodes, gpus, layout, ending = found.groups()
    return task, model, int(nodes), int(gpus), layout, ending or ""


def layout_of(config: Config, ending: str) -> str:
    """The layout's name: what is above 1, or the engine's where nothing is trained."""
    if ending == "-eval":
        return f"tp{config.rollout.tensor_parallel}"
    actor = config.actor
    sizes = {"tp": actor.tensor_parallel, "pp": actor.pipeline_parallel}
    ranks = config.cluster.nodes * config.cluster.gpus_per_node
    sizes |= {"dp": ranks // (sizes["tp"] * sizes["pp"]), "ep": actor.expert_parallel}
    return "".join(f"{name}{size}" for name, size in sizes.items() if size > 1)


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


def test_every_model_of_the_paper_has_its_config() -> None:
    trained = {task: TRAINED[task] | BEYOND[task] for task in TASKS}
    for ending, models in (("", trained), ("-eval", COMPARED)):
        for task, expected in models.items():
            assert {parts(path)[1] for path in PAPER if parts(path)[0] == task and parts(path)[5] == ending} == expected


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path: Path) -> None:
    task, model, nodes, gpus, layout, ending = parts(path)
    config = load([str(path)])
    assert config.task.name == TASKS[task]
    assert (config.cluster.nodes, config.cluster.gpus_per_node) == (nodes, gpus)
    assert layout_of(config, ending) == layout
    assert (config.actor.lora_rank > 0) == (ending == "-lora")
    assert config.model.path.split("/")[1].lower().removesuffix("-instruct") == model
    check_layout(config, shape(model))


@pytest.mark.parametrize("path", [*PAPER, CONFIGS / "countdown.yaml", CONFIGS / "fc.yaml"], ids=lambda path: path.stem)
def test_a_config_holds_differences_only(path: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    parent = settings.pop("extends", None)
    bare = tmp_path / "bare.yaml"
    bare.write_text(f"extends: {CONFIGS / parent}" if parent else "{}")
    before = load([str(bare), "model.path=any"])
    for key, value in leaves(settings).items():
        assert value_of(before, key) != value, f"{key} is {value!r} anyway"


@pytest.mark.parametrize("path", [path for path in PAPER if parts(path)[5] != "-eval"], ids=lambda path: path.stem)
def test_training_has_the_papers_settings(path: Path) -> None:
    config = load([str(path)])
    assert config.algo.group_size * config.train.failures_per_step == 256
    lr = 5e-6 if config.actor.lora_rank else 5e-7
    # one node has no room for all experts' reference
    kl_beta = 0 if config.actor.expert_parallel > 1 and not config.actor.lora_rank else 0.001
    assert (config.train.steps, config.actor.lr, config.algo.kl_beta) == (1750, lr, kl_beta)
    assert (config.actor.lr_warmup_ratio, config.algo.loss) == (0.03, "grpo")
    assert config.failures.source == "bank" and config.failures.samples_per_problem <= 64
