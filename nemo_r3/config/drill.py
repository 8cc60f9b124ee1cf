"""`drill`: how often `recipes.drill` and `recipes.soak` interrupt a run."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class DrillConfig:
    """The resume drill; recipes.drill and recipes.soak read it."""

    kills: int = option(
        6,
        low=1,
        help="kills of recipes.drill (at random, while it saves and by SIGUSR1, in turns), or of recipes.soak in all",
        resume=True,
    )
