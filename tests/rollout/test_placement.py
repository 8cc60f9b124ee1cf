"""How engines are laid out over ranks."""

from __future__ import annotations

from pathlib import Path

from processes import run_script


def test_ranks_of_an_engine_meet_even_if_they_are_stages_of_a_pipeline() -> None:
    """Stages are in different numbers of groups, so no group may be named after how many its rank is in."""
    done = run_script(Path(__file__).with_name("fleet_probe.py"), ranks=2)
    assert done.stdout.split() == ["1", "True"], "all hear of it, and only when they ask"
