"""A resolved config: written, read back, and compared when a run resumes."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_r3.config import Config, diff_for_resume, load, to_yaml
from nemo_r3.config.schema import leaves

SOME = [
    "actor.lr=3.3e-7",
    "actor.adam_eps=1e-12",
    "algo.trained_phases=[retry, reflection]",
    "dialogue.reflect='yes: {task}\n\n  # two lines'",
    "rollout.deterministic=false",
    "task.options={depth: {a: [1, 2.5, null, '007', 1e5]}, empty: {}}",
]


def loaded(folder: Path, *overrides: str) -> Config:
    path = folder / "a.yaml"
    path.write_text("model: {path: embedded}\n")
    return load([str(path), *overrides])


def read_back(config: Config, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return load([str(path)])


def test_resolved_yaml_reads_back_the_same(tmp_path: Path) -> None:
    for config in (loaded(tmp_path), loaded(tmp_path, *SOME)):
        assert read_back(config, tmp_path) == config


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=30)
NUMBER = st.floats(allow_infinity=False, allow_nan=False)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXT.filter(lambda text: "${" not in text and text != "???"), min_size=9), numbers=st.lists(NUMBER)
)
def test_any_text_and_number_read_back_the_same(tmp_path: Path, texts: list[str], numbers: list[float]) -> None:
    config = loaded(tmp_path)
    config.dialogue.reflect = texts[0]
    config.task.options = {"texts": texts, "keys": dict.fromkeys(texts), "numbers": numbers}
    assert read_back(config, tmp_path) == config


def test_resume_may_change_layout_steps_and_paths(tmp_path: Path) -> None:
    old = loaded(tmp_path)
    new = loaded(
        tmp_path,
        *("actor.tensor_parallel=2", "actor.sequence_parallel=true", "rollout.tensor_parallel=2", "train.steps=9"),
        *("train.save_every=3", "run.dir=elsewhere", "failures.path=/bank", "model.path=/moved"),
        *("run.tensorboard=false", "run.wandb_project=p", "run.mlflow_experiment=e"),
    )
    assert diff_for_resume(old, new) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("actor.lr=1e-3", "actor.lr: 5e-07 -> 0.001"),
        ("seed=2", "seed: 1 -> 2"),
        ("algo.shuffle_rewards=true", "algo.shuffle_rewards: false -> true"),
        ("algo.trained_phases=[retry]", "algo.trained_phases: ['reflection'] -> ['retry']"),
        ("dialogue.reflect=Why?", "dialogue.reflect: null -> 'Why?'"),
        ("task.options.depth=2", "task.options: {} -> {'depth': 2}"),
    ],
)
def test_anything_else_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert diff_for_resume(loaded(tmp_path), loaded(tmp_path, override, "train.steps=9")) == [said]


def test_every_setting_says_whether_it_may_change() -> None:
    assert all(isinstance(leaf.field.metadata["resume"], bool) for leaf in leaves(Config))
