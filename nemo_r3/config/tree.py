"""`Config`: the whole tree, whose larger sections have files of their own, and how two of them differ."""

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_r3.config.actor import ActorConfig
from nemo_r3.config.algo import AlgoConfig
from nemo_r3.config.cluster import ClusterConfig
from nemo_r3.config.failures import FailuresConfig
from nemo_r3.config.option import option
from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.config.schema import Leaf, leaves, show
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.config.train import TrainConfig


@dataclass
class RunConfig:
    """The run directory and its logs."""

    dir: str = option("", help="run directory; empty: runs/<config file's stem>", resume=True)
    tensorboard: bool = option(True, help="write TensorBoard events beside metrics.jsonl", resume=True)
    wandb_project: str = option("", help="Weights & Biases project that gets every step, too; empty: none", resume=True)
    mlflow_experiment: str = option("", help="MLflow experiment that gets every step, too; empty: none", resume=True)
    timeout_minutes: int = option(
        30,
        low=1,
        high=30 * 24 * 60,
        help="minutes a collective may wait, or a rank give no sign of life, before the job fails",
        resume=True,
    )


@dataclass
class ModelConfig:
    """The starting model, which is also the reference of the KL term."""

    path: str = option(
        "",
        help="directory or hub name of a Hugging Face checkpoint; 'embedded' is the tiny one shipped with nemo_r3",
        resume=True,
    )


@dataclass
class EvaluateConfig:
    """What `recipes.evaluate` measures, and training on its way; what `recipes.export` writes."""

    problems: int = option(0, low=0, help="held-out problems to use; 0: all", resume=True)
    every: int = option(
        0,
        low=0,
        help="training steps between measurements on these problems, held_out/ in metrics.jsonl; 0: none; TRL's "
        "`eval_steps`, verl's `test_freq`",
        resume=True,
    )
    checkpoint: str = option("", help="checkpoint to measure or export; empty: the newest of run.dir", resume=True)


@dataclass
class DrillConfig:
    """What recipes.drill does to a run."""

    kills: int = option(
        6, low=1, help="kills in all, in turns while it saves, by SIGUSR1, at random and while it mines", resume=True
    )


@dataclass
class Config:
    """Every setting of a run. A YAML file and `key=value` arguments hold only what differs from here."""

    seed: int = option(1, low=0, high=2**32 - 1, help="seeds sampling, problem order and shuffles")
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    drill: DrillConfig = field(default_factory=DrillConfig)


def shareable(config: Config) -> Config:
    """The config without `cluster.setup`, a script that may hold keys: for what others may see."""
    return replace(config, cluster=replace(config.cluster, setup=""))


def diff_for_resume(old: Config, new: Config) -> list[str]:
    """The forbidden differences between a run's config and the one it is resumed with: "key: old -> new".

    Settings marked `resume=True` (layout, train.steps, paths, logging) may differ.
    """
    return [
        f"{leaf.key}: {show(before)} -> {show(after)}"
        for leaf, before, after in differing(old, new)
        if not leaf.field.metadata["resume"]
    ]


def differing(old: Config, new: Config) -> list[tuple[Leaf, Any, Any]]:
    """The settings whose values differ, with both values."""
    compared = [(leaf, leaf.of(old), leaf.of(new)) for leaf in leaves(Config)]
    return [(leaf, before, after) for leaf, before, after in compared if before != after]
