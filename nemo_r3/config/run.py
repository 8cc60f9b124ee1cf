"""`run`: where a run lives and what it prints."""

from dataclasses import dataclass

from nemo_r3.config.option import option


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
