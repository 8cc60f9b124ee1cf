"""Writes `<run.dir>/report.html`: what a run is, what it reached, and what the model wrote.

Works at any time of a run, on any machine that sees its directory; it needs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.html_report import write_report


def report(argv: Sequence[str]) -> None:
    """`python -m recipes.report CONFIG.yaml key=value ...`: of the run in `run.dir`."""
    print(f"report: {write_report(configuration.load(argv))}")


if __name__ == "__main__":
    entry.main(report)
