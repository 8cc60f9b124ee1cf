"""`failures`: where the failed first attempts come from."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class FailuresConfig:
    """The failure bank: first answers that the verifier rejected."""

    source: str = option(
        "bank",
        choices=("bank", "online"),
        help="bank: mined once from the starting model; online: drawn from the current policy",
    )
    path: str = option("", help="directory of the bank; empty: <run.dir>/failures", resume=True)
    problems: int = option(0, low=0, help="training problems to mine; 0: all")
    samples_per_problem: int = option(1, low=1, high=64, help="first answers sampled per problem")
    max_solve_rate: float = option(
        1.0, above=0.0, high=1.0, help="leave out problems solved more often than this; 1: off"
    )
    min_solve_rate: float = option(
        0.0, low=0.0, high=1.0, help="leave out problems solved less often than this; 0: off"
    )
    allow_foreign: bool = option(
        False, help="accept a complete bank that was mined otherwise, with the same tokenizer", resume=True
    )
