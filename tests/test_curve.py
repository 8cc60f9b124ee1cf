"""The picture of the learning curve."""

import math
import struct
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from nemo_r3 import curve
from nemo_r3.series import moving_mean


def metrics_of(steps: int, kl: bool) -> list[dict[str, Any]]:
    """A run of growing success whose every third step was empty; of the other steps' groups 3 in 4 were used."""
    lines = []
    for step in range(1, steps + 1):
        empty = step % 3 == 0
        known = {"loss": 0.1, "grad_norm": 1.0, "reward": step / steps, "retry_success": step / steps}
        known |= {"token_mult_prob_error": 1.0} | ({"kl": 0.001 * step} if kl else {})
        counts = {"step": step, "groups_used": 0 if empty else 3, "groups_dropped": 4 if empty else 1}
        lines.append(counts | {"time/update": 0.5} | {name: None if empty else value for name, value in known.items()})
    return lines


def pixels(picture: Path) -> tuple[int, int]:
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures, save = [], Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(("steps", "kl"), [(60, True), (6, False), (1, True), (0, False)])
def test_curve(tmp_path: Path, saved: list[Figure], steps: int, kl: bool) -> None:
    picture = tmp_path / "curve.png"
    curve.draw(metrics_of(steps, kl), picture)
    assert pixels(picture) == (1200, 500)
    success, groups, *drift = saved[0].axes
    numbers = list(range(1, steps + 1))
    rising = [math.nan if step % 3 == 0 else step / steps for step in numbers]

    dots, mean = success.lines
    assert [(line.get_marker(), line.get_linestyle()) for line in (dots, mean)] == [("o", "None"), ("None", "-")]
    np.testing.assert_array_equal(dots.get_xydata(), np.reshape([*zip(numbers, rising, strict=True)], (-1, 2)))
    np.testing.assert_array_equal(mean.get_ydata(), moving_mean(rising, 6 if steps == 60 else 5))

    everything, used = groups.containers
    assert [bar.get_height() for bar in everything] == [1.0] * steps
    assert [bar.get_height() for bar in used] == [0.0 if step % 3 == 0 else 0.75 for step in numbers]
    colors = {to_hex(bar.get_facecolor()) for bar in everything}, {to_hex(bar.get_facecolor()) for bar in used}
    assert colors == (({curve.GREY}, {curve.BLUE}) if steps else (set(), set()))

    known = [[step, 0.001 * step] for step in numbers if step % 3]
    assert [axes.lines[0].get_xydata().tolist() for axes in drift] == ([known] if kl else [])


def test_the_kl_of_a_single_step_is_seen(tmp_path: Path, saved: list[Figure]) -> None:
    """As of a run that breaks at once: before the first update it is 0, and later steps have none."""
    lines = metrics_of(3, False)
    curve.draw([lines[0] | {"kl": 0.0}, *({**line, "kl": None} for line in lines[1:])], tmp_path / "curve.png")
    (line,) = saved[0].axes[2].lines
    assert line.get_xydata().tolist() == [[1.0, 0.0]]
    picture = matplotlib.image.imread(tmp_path / "curve.png")
    assert (abs(picture[..., :3] - to_rgb(curve.ORANGE)) < 0.01).all(-1).sum() > 10, "pixels"


def test_held_out_problems_are_beside_the_steps_failures(tmp_path: Path, saved: list[Figure]) -> None:
    measured = {1: {"held_out/second_try": 0.125}, 5: {"held_out/second_try": None}, 9: {"held_out/second_try": 0.5}}
    curve.draw([line | measured.get(line["step"], {}) for line in metrics_of(10, False)], tmp_path / "curve.png")
    *_, held_out = saved[0].axes[0].lines
    assert held_out.get_xydata().tolist() == [[1.0, 0.125], [9.0, 0.5]]
