"""The whole experiment as a chain of Slurm jobs: mine -> train -> evaluate -> export.

python -m slurm.launch CONFIG.yaml key=value ... [--cluster FILE.yaml] [--sweep key=value,value ...]
                       [--mine|--train|--evaluate|--export key=value ...] [--from STAGE] [--dry-run | --local]
python -m slurm.launch status RUN_DIR
python -m slurm.launch cancel RUN_DIR

Every stage is a job (in a sweep, a job array) that Slurm starts when the one before has succeeded. submitit writes and
submits the batch scripts; they run slurm/train.sh, so every stage is checked, saved and requeued like a training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from nemo_r3.actor.manifest import check_start
from nemo_r3.capacity import disk_problem
from nemo_r3.config import Config, check_world, load
from nemo_r3.config.cluster import ClusterConfig
from nemo_r3.config.schema import Layer, build
from nemo_r3.errors import ConfigError, ModelNotFoundError, UserError
from nemo_r3.models import Architecture, planned_architecture
from nemo_r3.plan import plan_of
from nemo_r3.progress import warn
from slurm import chain
from slurm.chain import JobArray
from slurm.job import SCRIPT, resource_warning
from slurm.stage import STAGES, Stage

SHARED = {"actor", "algo", "evaluate", "seed", "train"}
"""A failure bank does not depend on these sections, so all points of a sweep over them share one."""
OWN = {"run.dir", "failures.path"}
"""What cannot be swept: each point has its own, or all share one."""
LONGEST_LABEL = 230
"""Of a point: its run directory and a stage's exit code are named after it, and names have at most 255 bytes."""


def job_arrays(args: argparse.Namespace) -> list[JobArray]:
    """The chain that a command line asks for, checked.

    Raises:
        ConfigError: which stage, setting or file is wrong.
    """
    cluster = _cluster_settings(args.cluster) if args.cluster else []
    base = [args.config[0], *cluster, *args.config[1:]]
    config = load(base)
    folder = chain.folder_of(Path(config.run.dir))
    points = _points(args.sweep)
    shares = all(key.partition(".")[0] in SHARED for point in points for key in point)
    arrays = []
    for recipe in STAGES[STAGES.index(args.first) :]:
        if recipe == "mine" and config.failures.source == "online":
            continue
        own = getattr(args, recipe)
        if recipe == "mine" and shares:
            argvs = {"": [*base, *own]}
        else:
            argvs = {_label(point): [*base, *_settings(config, point, shares), *own] for point in points}
        configs = [_checked(recipe, argv) for argv in argvs.values()]
        stages = (Stage(recipe, label, tuple(argv), folder) for label, argv in argvs.items())
        arrays.append(JobArray(tuple(stages), configs[0]))
    return arrays


def _checked(recipe: str, argv: Sequence[str]) -> Config:
    try:
        config = load(argv)
        cluster = config.cluster
        if not any(re.match("--(ntasks|gpus|gres)", option) for option in cluster.options):  # else Slurm has the number
            check_world(config, cluster.nodes * (cluster.gpus_per_node or 1))
    except ConfigError as error:
        raise ConfigError(f"stage {recipe}: {error}") from None
    return config


def verdicts(arrays: Sequence[JobArray], disk: bool) -> list[str]:
    """Whether the trainings of a chain fit their GPUs and nodes, a line each; nothing of those that name no GPUs.

    With `disk`, `run.dir` and `train.start_from` are on this machine what they will be in the jobs.

    Raises:
        ConfigError: one does not fit, and which settings would; or it has no checkpoint to start from.
    """
    lines: list[str] = []
    trainings = list[tuple[Config, Architecture, Path]]()
    for stage in (stage for array in arrays if array.recipe == "train" for stage in array.stages):
        config = load(stage.argv)
        checkpoints = Path(config.run.dir, "checkpoints")
        if disk:
            check_start(config.train.start_from, checkpoints)
        if not config.cluster.gpus_per_node:
            continue
        try:
            arch = planned_architecture(config)
            plan = plan_of(config, arch)
            plan.check()
        except ModelNotFoundError as error:
            lines.append(f"not checked whether training fits: {error}")
            continue
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
        trainings.append((config, arch, checkpoints))
        lines.append(f"train {plan.verdict}")
    if disk and trainings and (problem := disk_problem(*trainings)):
        raise ConfigError(f"stage train: {problem}")
    return lines


def _cluster_settings(path: str) -> list[str]:
    """A cluster's file as key=value settings.

    Raises:
        ConfigError: it cannot be read, or holds anything but settings of `cluster`.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--cluster {path}: {' '.join(reason.split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--cluster {path}: expected settings of `cluster`, as in `partition: gpu`")
    build(ClusterConfig, [Layer(values, f"{path}: ")], "cluster")
    return [f"cluster.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]  # JSON is YAML


def _points(sweep: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of a sweep's values; without a sweep, one empty combination."""
    axes = {}
    for text in sweep:
        key, equals, values = text.partition("=")
        if not equals or not values or key in axes or key in OWN:
            raise ConfigError(
                f"--sweep {text}: expected key=value,value with keys that differ, and not {' or '.join(sorted(OWN))}"
            )
        axes[key] = re.split(r",(?![^\[{]*[\]}])", values)  # no comma within brackets
        if len(set(axes[key])) < len(axes[key]):
            raise ConfigError(f"--sweep {text}: a value comes twice")
        if key.startswith("cluster."):
            raise ConfigError(f"--sweep {text}: the jobs of an array have one size; set it for a stage, as in --train")
        if len({_label({key: value}) for value in axes[key]}) < len(axes[key]):
            raise ConfigError(f"--sweep {text}: two values would share one run directory")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if (longest := max(map(len, map(_label, points)))) > LONGEST_LABEL:
        raise ConfigError(
            f"--sweep: a point's settings become the name of its run directory, and {longest} characters are more than "
            f"{LONGEST_LABEL}: shorten the values, or submit a chain for each"
        )
    return points


def _label(point: dict[str, str]) -> str:
    return ",".join(f"{key}={re.sub(r'[^-+.=a-zA-Z0-9]', '_', value)}" for key, value in point.items())


def _settings(config: Config, point: dict[str, str], shares: bool) -> list[str]:
    """A point's settings, with its own run directory below the chain's, and the shared bank if it can be shared."""
    if not point:
        return []
    bank = [f"failures.path={config.failures.path}"] if shares else []
    return [*(f"{key}={value}" for key, value in point.items()), f"run.dir={config.run.dir}/{_label(point)}", *bank]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m slurm.launch", usage=(__doc__ or "").split("\n\n")[1])
    made.add_argument("config", nargs="+", metavar="CONFIG.yaml key=value", help="as for the recipes")
    made.add_argument("--cluster", metavar="FILE.yaml", help="what a cluster's jobs have in common: slurm/clusters/")
    made.add_argument("--sweep", nargs="+", default=[], metavar="key=value,value", help="an array job per stage")
    made.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0], help="the stage to begin with")
    for recipe in STAGES:
        made.add_argument(f"--{recipe}", nargs="+", default=[], metavar="key=value", help=f"settings of {recipe} alone")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the batch scripts; submit nothing")
    how.add_argument("--local", action="store_true", help="run the chain here, one stage after the other")
    return made


def run_here(arrays: Sequence[JobArray]) -> None:
    """Runs a chain on this machine. Exits with the code of the first stage that fails."""
    stages = [stage for array in arrays for stage in array.stages]
    chain.refuse_another(stages[0].folder)
    chain.record(stages[0].folder, [(stage, "") for stage in stages])
    for array in arrays:
        for stage in array.stages:
            print(f"--- {stage.name}", flush=True)
            stage.run_here(ranks=array.config.cluster.gpus_per_node or 1)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        if argv and (about := {"status": chain.status, "cancel": chain.cancel}.get(argv[0])):
            if len(argv) != 2:
                raise UserError(
                    f"{argv[0]}: expected the chain's run directory, got {shlex.join(argv[1:]) or 'nothing'}"
                )
            print(about(Path(argv[1])))
            return 0
        args = parser().parse_intermixed_args(argv)
        arrays = job_arrays(args)
        if args.local:
            run_here(arrays)
            return 0
        if not Path(SCRIPT).is_file():
            raise UserError(f"{Path.cwd()} is not the repository's root, where the jobs start: go there")
        for warning in filter(None, dict.fromkeys(resource_warning(array.config) for array in arrays)):
            warn(warning)
        for verdict in dict.fromkeys(verdicts(arrays, disk=not args.dry_run)):
            print(f"{'# ' if args.dry_run else ''}{verdict}")
        print(chain.batch_scripts(arrays) if args.dry_run else chain.submit(arrays))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
