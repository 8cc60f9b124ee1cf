"""Training in emulated FP8 against float32: is the difference more than another seed makes?

    python -m benchmarks.emulated_fp8      -> benchmarks/results/emulated_fp8.json; a run that is there is not repeated

The quickstart's 50 updates, five seeds in float32 and the same five for each of two recipes: inputs, weights and
gradients in the formats of `fp8-tensorwise` and `fp8-blockwise`, scaled by the largest number of the moment, of a
tensor or of a tile along what is summed; the first and the last layer left out. Numbers are rounded to FP8 and
multiplied in float32, in which a tensor core sums them. `..._in_float32` is what the weights that FP8 has trained give
on the same batch without any rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import ROOT, machine, results, versions
from nemo_r3.actor.numerics import MATRICES, rounded
from nemo_r3.precision import PRECISIONS, Recipe
from nemo_r3.types import UpdateBatch

SEEDS, UPDATES, WINDOW = (1, 2, 3, 4, 5), 50, 10
IN_FLOAT32 = {"loss_in_float32": "loss", "kl_in_float32": "kl"}
METRICS = ("loss", "kl", *IN_FLOAT32, "retry_success", "token_mult_prob_error")
RECIPES = ("fp8-tensorwise", "fp8-blockwise")
FP32 = "fp32"


class Product(torch.autograd.Function):
    """x [.., in] times weight [out, in], transposed, with FP8 operands in all three products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        """[.., out]."""
        rounded_weight = rounded(weight, torch.float8_e4m3fn, recipe.weight_tile)
        ctx.recipe = recipe
        ctx.save_for_backward(x, rounded_weight)
        return rounded(x, torch.float8_e4m3fn, recipe.tile) @ rounded_weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        (x, weight), recipe = ctx.saved_tensors, ctx.recipe
        dtype = torch.float8_e5m2 if recipe.format == "hybrid" else torch.float8_e4m3fn
        along_tokens = recipe.tile and recipe.tile[::-1]
        columns = rounded(grad.flatten(0, -2), dtype, along_tokens)
        inputs = rounded(x.flatten(0, -2), torch.float8_e4m3fn, along_tokens)
        return rounded(grad, dtype, recipe.tile) @ weight, columns.T @ inputs, None


class Emulation:
    """FP8 in a policy's layers, and a look past it.

    Attributes:
        recipe: how numbers are rounded.
        exact: whether nothing is rounded for the moment.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Changes no policy yet."""
        self.recipe, self.exact = recipe, False

    def update(self, trainer: Any, update: Callable[[UpdateBatch], dict[str, float]], batch: UpdateBatch) -> Any:
        """The trainer's update, with what the batch's loss would have been without rounding."""
        from nemo_r3.actor import cpu

        self.exact = True
        with trainer.at_work(), cpu.cuda_stand_in():
            microbatches, _ = trainer.policy.microbatches(batch.rows)
            sums = trainer._accumulate(microbatches, *trainer._given([microbatches])[0])
        self.exact = False
        return update(batch) | {name: sums[of] for name, of in IN_FLOAT32.items()}


def emulate(trunk: nn.Module, emulation: Emulation) -> int:
    """Puts the product into the matrices of all layers but the first and the last; how many it found."""
    recipe = emulation.recipe
    layers = trunk.get_submodule("decoder.layers")
    assert isinstance(layers, nn.ModuleList)
    count = 0
    for layer in list(layers)[recipe.edges : len(layers) - recipe.edges]:
        for name in MATRICES:
            matrix = layer.get_submodule(name)
            assert matrix.bias is None, "the embedded model has none"

            def forward(x: Tensor, matrix: nn.Module = matrix) -> tuple[Tensor, None]:
                return (x @ matrix.weight.T if emulation.exact else Product.apply(x, matrix.weight, recipe)), None

            matrix.forward = forward
            count += 1
    return count


def train(name: str, arguments: Sequence[str]) -> None:
    """`recipes.train` with a policy whose layers multiply in emulated FP8, as the precision `name` does."""
    from nemo_r3 import entry
    from recipes import train as recipe

    fp8, start = PRECISIONS[name].fp8, recipe.start_trainer
    assert fp8 is not None

    def start_emulating(setup: Any) -> Any:
        trainer, emulation = start(setup), Emulation(fp8)
        assert emulate(trainer.policy.module, emulation) == 2 * len(MATRICES)
        trainer.update = partial(emulation.update, trainer, trainer.update)
        return trainer

    recipe.start_trainer = start_emulating
    sys.argv = [sys.argv[0], *arguments]
    entry.main(recipe.train)


def run(seed: int, precision: str, home: Path, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The metrics of a run, which is begun, or goes on, where it is not complete."""
    path = home / f"{precision}_{seed}"
    begin = [sys.executable, "-W", "ignore", "-m"]
    begin += ["recipes.train"] if precision == FP32 else ["benchmarks.emulated_fp8", "--train", precision]
    settings = [f"seed={seed}", f"run.dir={path}", f"failures.path={home}/failures", f"train.steps={UPDATES}", *more]
    with (home / f"{path.name}.log").open("a") as log:
        subprocess.run([*begin, "configs/quickstart.yaml", *settings], cwd=ROOT, stdout=log, stderr=log, check=True)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def windows(runs: Sequence[list[dict[str, Any]]], name: str) -> list[list[float]]:
    """Means over each `WINDOW` updates, of each run: [window][run]. Steps without an update have no loss."""
    found = []
    for first in range(0, len(runs[0]), WINDOW):
        values = [[line[name] for line in run[first : first + WINDOW] if line[name] is not None] for run in runs]
        found.append([statistics.fmean(of) for of in values if of])
    return found


def verdict(fp32: Sequence[list[dict[str, Any]]], fp8: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Per metric and window the float32 seeds' extremes, FP8's mean, and FP8's runs; whether the mean lies within."""
    found = {}
    for name in METRICS:
        rows = []
        for theirs, ours in zip(windows(fp32, IN_FLOAT32.get(name, name)), windows(fp8, name), strict=True):
            low, high, mean = min(theirs), max(theirs), statistics.fmean(ours)
            rows.append({"fp32": [low, high], "fp8_mean": mean, "fp8": ours, "within": low <= mean <= high})
        found[name] = rows
    return found


def main() -> None:
    """Runs what is not there yet, two at a time, and writes the comparison."""
    if sys.argv[1:2] == ["--train"]:
        return train(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "emulated_fp8")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    mine = [
        "recipes.mine",
        "configs/quickstart.yaml",
        f"run.dir={options.home}",
        f"failures.path={options.home}/failures",
    ]
    subprocess.run([sys.executable, "-W", "ignore", "-m", *mine], cwd=ROOT, check=True)
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            (seed, precision): pool.submit(run, seed, precision, options.home)
            for seed in options.seeds
            for precision in (FP32, *RECIPES)
        }
        runs = {key: job.result() for key, job in jobs.items()}
    found = {
        name: verdict(*([runs[seed, precision] for seed in options.seeds] for precision in (FP32, name)))
        for name in RECIPES
    }
    for name, metrics in found.items():
        for metric, rows in metrics.items():
            for number, row in enumerate(rows, 1):
                (low, high), said = row["fp32"], "within" if row["within"] else "OUTSIDE"
                span = f"fp32 {low:.5f} to {high:.5f}, fp8 {row['fp8_mean']:.5f} {said}"
                print(f"{name} {metric:22s} up to update {number * WINDOW:2d}: {span}")
    numbers = {"metrics": found, "seeds": list(options.seeds), "updates": UPDATES, "machine": machine(1)}
    out = results("emulated_fp8.json", len(options.seeds) < len(SEEDS))
    out.write_text(json.dumps(numbers | {"versions": versions(("torch", "megatron-core"))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
