"""`write_report`: report.html in a run directory."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nemo_r3.config import Config, shareable
from nemo_r3.config.schema import show
from nemo_r3.config.tree import differing
from nemo_r3.errors import UserError
from nemo_r3.failures.tally import Tally, total
from nemo_r3.files import write_whole
from nemo_r3.html_report import chart, health, rollouts
from nemo_r3.html_report.chart import Chart, draw
from nemo_r3.html_report.read import RunFiles, read_run
from nemo_r3.results import HEADINGS, NOTE, rates
from nemo_r3.series import column, moving_mean, window_of
from nemo_r3.visible import visible

MOST_BYTES = 4_000_000
LIMITS = (8000, 4000, 2000, 1000, 500, 250)
"""Texts are cut to the first of these lengths that keeps the page within MOST_BYTES; the last one always does."""
LONGEST_SETTING = 2000
HELD_OUT = {"second_try": "second try on a failure", "within_two": "within two tries", "first_try": "first try"}
"""The curves of what is measured on held-out problems during training, in the words of the results."""


def write_report(config: Config) -> Path:
    """Writes `<run.dir>/report.html`: settings, results, curves, dialogues and health, as far as there are any.

    The page asks for nothing outside of itself, runs no script, and has at most MOST_BYTES. The config names the
    directory; its other settings count where none are recorded there.

    Raises:
        UserError: the directory holds no run.
        OSError: the page cannot be written.
    """
    run = read_run(config)
    out = run.path / "report.html"
    write_whole(out, _page(run))
    return out


def _page(run: RunFiles) -> str:
    """The page, with the longest texts that keep it within MOST_BYTES."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("nemo_r3", "html_report"),
    )
    template, contents = environment.get_template("page.html"), _contents(run)
    page = ""
    for limit in LIMITS:
        page = template.render(contents, limit=limit, cut=_cutter(limit))
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _shown(value: Any) -> Any:
    """A value as the page shows it, or what a macro of the page has made of one."""
    return value if hasattr(value, "__html__") else visible(str(value))


def _cutter(limit: int) -> Callable[[str], str]:
    """Cuts a text to `limit` characters, two thirds of them from its beginning, and says how long it is."""

    def cut(text: str) -> str:
        if len(text) <= limit and len(shown := visible(text)) <= limit:
            return shown
        of_head, of_tail = limit * 2 // 3, limit // 3  # what is HIDDEN grows by being shown
        head, tail = visible(text[:of_head])[:of_head], visible(text[-of_tail:])[-of_tail:]
        return f"{head}\n[... cut here: {len(text):,} characters in all ...]\n{tail}"

    return cut


def _contents(run: RunFiles) -> dict[str, Any]:
    """What page.html shows, by the names that it has there."""
    shown = rollouts.read_steps(run.rollouts, run.unread)
    return {
        "run": run,
        "name": run.path.resolve().name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "last_step": int(run.metrics[-1]["step"]) if run.metrics else 0,
        "settings": _settings(run.config),
        "mined": _mined(run.bank),
        "rates": _rates(run),
        "headings": HEADINGS,
        "rates_note": NOTE,
        "held_out": rollouts.read_evaluation(run.path / "evaluation.jsonl", run.unread),
        "charts": _charts(run),
        "chart": chart,
        "steps": shown,
        "ends": [shown[0], shown[-1]] if len(shown) > 1 else shown,
        "rollouts": rollouts,
        "health": health,
        "marked": health.marked_steps(run.metrics, run.config.train),
        "shares": health.shares(run.metrics),
        "phases": health.phases(run.metrics, run.summary),
        "speeds": health.speeds(run.metrics),
        "most_bytes": MOST_BYTES,
    }


def _settings(config: Config) -> list[tuple[str, str, str]]:
    """Key, value and default of the settings that differ from their defaults."""
    cut = _cutter(LONGEST_SETTING)
    return [
        (leaf.key, cut(str(value)), show(default)) for leaf, default, value in differing(Config(), shareable(config))
    ]


def _rates(run: RunFiles) -> list[tuple[str, ...]]:
    """The evaluation's table, if there was one."""
    try:
        return rates(run.summary) if {"before", "after"} & run.summary.keys() else []
    except UserError:
        run.unread.append(f"the rates in {run.path / 'summary.json'}")
        return []


def _mined(bank: dict[str, Any]) -> Tally | None:
    """How the first answers of the bank fared."""
    try:
        return total(bank["tallies"].values())
    except (KeyError, TypeError, AttributeError):
        return None


def _charts(run: RunFiles) -> list[Chart]:
    """The curves that the run has values for."""
    metrics = run.metrics
    steps = [line["step"] for line in metrics]

    def drawn(title: str, names: dict[str, str], high: float = 0.0) -> Chart | None:
        return draw(title, steps, {label: column(metrics, name) for name, label in names.items()}, high=high)

    window = window_of(len(steps))
    measured = [line for line in metrics if "held_out/first_try" in line]
    success, mismatch = column(metrics, "retry_success"), column(metrics, "token_mult_prob_error")
    warn = [run.config.train.mismatch_warn if math.isfinite(value) else math.nan for value in mismatch]
    used, dropped = column(metrics, "groups_used"), column(metrics, "groups_dropped")
    charts = [
        draw(
            "retry success on the steps' failures",
            steps,
            {f"mean of the last {window} steps": moving_mean(success, window), "each step": success},
            high=1.0,
            dots="each step",
        ),
        draw(
            "held-out problems",
            [line["step"] for line in measured],
            {label: column(measured, f"held_out/{name}") for name, label in HELD_OUT.items()},
            high=1.0,
        ),
        draw(
            "share of groups used: rewards differ",
            steps,
            {"used": [mine / (mine + other or 1) for mine, other in zip(used, dropped, strict=True)]},
            high=1.0,
        ),
        drawn("mean tokens", {"reflection_tokens": "reflection", "retry_tokens": "retry"}),
        drawn("KL to the starting model (kl)", {"kl": "kl"}),
        drawn("gradient norm before clipping (grad_norm)", {"grad_norm": "grad_norm"}),
        draw(
            "vLLM against actor (token_mult_prob_error)",
            steps,
            {"token_mult_prob_error": mismatch, "train.mismatch_warn": warn},
            low=1.0,
        ),
        drawn(
            "shares of reflections and retries",
            {"truncated": "reflection cut", "retries_truncated": "retry cut", "reflection_solves": "gives answer away"},
            high=1.0,
        ),
        drawn("seconds by phase", {f"time/{phase}": phase for phase in ("rollout", "update", "refit", "save")}),
    ]
    return [made for made in charts if made]
