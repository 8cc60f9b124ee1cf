"""`drill`: how often `recipes.drill` and `recipes.soak` interrupt a run."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class DrillConfig:
    """The resume drill; recipes.drill and recipes.soak read it."""

    kills: int = option(
        6,
        low=1,
        help="times the run is ended: at a random moment, while it saves, and by SIGUSR1, in turns",
        resume=True,
    )
