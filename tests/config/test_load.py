"""Reading a config: layers, `extends`, overrides, and every way it can be wrong."""

from pathlib import Path

import pytest
from refusals import refusal

from nemo_r3.config import load

MINIMAL = "model: {path: embedded}\n"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*argv: str) -> str:
    return refusal(lambda: load(argv))


def test_defaults_then_parents_then_file_then_overrides(tmp_path: Path) -> None:
    write(tmp_path, "grand.yaml", MINIMAL + "train: {steps: 1, save_every: 1, keep_checkpoints: 1}\nseed: 7")
    write(tmp_path, "deep/parent.yaml", "extends: ../grand.yaml\ntrain: {steps: 2, save_every: 2}")
    child = write(tmp_path, "child.yaml", "extends: deep/parent.yaml\ntrain:\n  steps: 3\nactor:\n")
    overrides = ("actor.lr=2e-4", "actor.lr=1e-4", "algo.trained_phases=[reflection, retry]", "task.options.count=3")
    config = load([child, *overrides])
    assert (config.train.steps, config.train.save_every, config.train.keep_checkpoints, config.seed) == (3, 2, 1, 7)
    assert (config.actor.lr, config.actor.adam_beta2) == (1e-4, 0.999)
    assert config.algo.trained_phases == ["reflection", "retry"]
    assert config.task.options == {"count": 3}


COUNTDOWN = "task: {name: countdown, options: {size: 9}}\ndialogue: {task: '{numbers}', retry: Again.}"


def test_another_task_leaves_out_what_belongs_to_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "dialogue: {task: 'Now: {problem}'}")
    write(tmp_path, "parent.yaml", "extends: base.yaml\n" + COUNTDOWN)
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\ntask: {name: lucky}")
    config = load([child])
    assert (config.task.name, config.task.options) == ("lucky", {})
    assert (config.dialogue.task, config.dialogue.retry) == ("Now: {problem}", "Again.")
    for arguments in (["task.options.x=1", "task.name=lucky"], ["task.name=lucky", "task.options.x=1"]):
        assert load([str(tmp_path / "parent.yaml"), *arguments]).task.options == {"x": 1}
    same = write(tmp_path, "same.yaml", "extends: parent.yaml\ntask: {name: countdown, options: {seed: 2}}")
    assert load([same]).task.options == {"size": 9, "seed": 2}
    assert load([same, "task.options.size=7"]).dialogue.task == "{numbers}"


def test_options_without_a_name_are_of_the_default_task(tmp_path: Path) -> None:
    write(tmp_path, "parent.yaml", MINIMAL + "task: {options: {size: 9}}")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\ntask: {name: lucky}")
    assert load([str(tmp_path / "parent.yaml"), "task.name=countdown"]).task.options == {"size": 9}
    assert load([child]).task.options == {}


def test_directories_follow_from_the_file_name(tmp_path: Path) -> None:
    path = write(tmp_path, "actor.lr=1e-5,seed=2/tiny.yaml", MINIMAL)  # a point of a sweep has settings in its path
    assert load([path]).run.dir == "runs/tiny"
    assert load([path]).failures.path == "runs/tiny/failures"
    assert load([path, "run.dir=/data/a"]).failures.path == "/data/a/failures"
    assert load([path, "failures.path=/bank"]).failures.path == "/bank"


def test_values_keep_their_types(tmp_path: Path) -> None:
    written = "rollout: {deterministic: null, temperature: 1}\ndialogue: {task: 'a: b'}"
    path = write(tmp_path, "a.yaml", MINIMAL + written)
    config = load([path, "run.dir='2024'", "dialogue.system=", "actor.lr=5e-7", "rollout.deterministic=true"])
    assert (config.run.dir, config.dialogue.system, config.dialogue.task) == ("2024", "", "a: b")
    assert isinstance(config.rollout.temperature, float) and config.rollout.deterministic is True


def test_a_home_directory_is_found_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = write(tmp_path, "a.yaml", MINIMAL + "evaluate: {checkpoint: ~/c}\nrun: {dir: ~/a}")
    config = load([file])
    assert (config.run.dir, config.evaluate.checkpoint) == ("/home/me/a", "/home/me/c")
    assert config.failures.path == "/home/me/a/failures"
    assert load([file, "failures.path=~/b"]).failures.path == "/home/me/b"
    assert load([file, "dialogue.chat_template=~/t.jinja"]).dialogue.chat_template == "/home/me/t.jinja"


def test_a_hash_sign_is_kept_where_yaml_keeps_it(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", MINIMAL)
    assert load([file, "run.dir='/a/b #1'"]).run.dir == "/a/b #1"
    assert load([file, "run.dir=/a/b#1"]).run.dir == "/a/b#1"


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["--help"]])
def test_no_file_named(argv: list[str]) -> None:
    assert "CONFIG.yaml key=value" in error_of(*argv) and "docs/config.md" in error_of(*argv)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such config file" in error_of(str(tmp_path / "nowhere.yaml"))
    child = write(tmp_path, "child.yaml", "extends: gone.yaml")
    assert "gone.yaml: no such config file" in error_of(child)
    assert f"childd: no such config file; did you mean {child}?" in error_of(child.removesuffix(".yaml") + "d")
    assert "did you mean" not in error_of(child)
    assert f"{child} extends it" in error_of(child)
    assert "cannot be read: Is a directory" in error_of(str(tmp_path))


def test_extends_in_a_circle(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: ./a.yaml")
    assert "a.yaml" in error_of(first) and "circle" in error_of(first)


@pytest.mark.parametrize("parent", ["3", "[a.yaml, b.yaml]", "''"])
def test_extends_names_one_file(tmp_path: Path, parent: str) -> None:
    assert "extends: expected the path of one YAML file" in error_of(write(tmp_path, "a.yaml", f"extends: {parent}"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed: 1\nrun: [1, }\n", "a.yaml:2: broken YAML"),
        ("seed: 1\nseed: 2\n", "a.yaml:2: broken YAML: found duplicate key seed"),
        ("run:\n\tdir: x\n", "a.yaml:2: broken YAML"),
        ("a: !!python/object:os.system x", "a.yaml:1: broken YAML"),
        ("model: {path: '${'}", "a.yaml: broken YAML"),
        ("- 1\n- 2\n", "a.yaml: expected sections and keys"),
        ("5", "a.yaml: broken YAML"),
        ("seed: 1\n---\nseed: 2\n", "a.yaml:2: broken YAML"),
        ("seed: !!bool 3", "a.yaml: broken YAML: a value is not what its !!type says"),
        ("seed: !!timestamp x", "a.yaml: broken YAML: a value is not what its !!type says"),
        ("train.steps: 3", "train.steps: unknown key; did you mean train: {steps: ...}?"),
        ("seed: " + "[" * 5000 + "]" * 5000, "a.yaml: broken YAML: nested too deeply"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, where: str) -> None:
    assert where in error_of(write(tmp_path, "a.yaml", text))


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "a.yaml: is not UTF-8 text" in error_of(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("actor.lrr=1", ["actor.lrr: unknown key; did you mean actor.lr?", "actor has tensor_parallel"]),
        ("group_size=4", ["group_size: unknown key; did you mean algo.group_size?"]),
        ("actor.learning_rate=1e-6", ["actor.learning_rate: unknown key; did you mean actor.lr?"]),
        ("num_generations=8", ["did you mean algo.group_size?"]),
        ("rollout.n=8", ["did you mean algo.group_size?"]),
        ("modle.path=x", ["modle: unknown key; did you mean model?"]),
        ("qqq.x=1", ["qqq: unknown key; the top level has seed, run"]),
        ("extends=a.yaml", ["extends: unknown key"]),
        ("seed=one", ["seed: expected an integer, got 'one'"]),
        ("seed=1.0", ["seed: expected an integer, got 1.0"]),
        ("seed=true", ["seed: expected an integer, got true"]),
        ("seed=null", ["seed: expected an integer, got null"]),
        ("seed.x=1", ["seed: expected an integer"]),
        ("run=", ["run: is a section, got ''"]),
        ("run=3", ["run: is a section, got 3", "run.dir"]),
        ("run.dir=2024", ["run.dir: expected text, got 2024; put quotes inside"]),
        ("run.tensorboard=1", ["run.tensorboard: expected true or false, got 1"]),
        ("actor.lr=.nan", ["actor.lr: expected a number, got nan"]),
        ("actor.lr=1" + "0" * 400, ["actor.lr: expected a number"]),
        ("rollout.deterministic=maybe", ["expected true or false or null"]),
        ("algo.trained_phases=retry", ["algo.trained_phases: expected a list, each element text, got 'retry'"]),
        ("algo.trained_phases=[1]", ["algo.trained_phases: expected a list"]),
        ("task.options=3", ["task.options: expected a mapping, got 3"]),
        ("task.options={1: 2}", ["task.options: its keys must be text, got 1"]),
        ("task.options.x=!!binary aGk=", ["task.options.x", "not allowed"]),
        ("run.dir=/a/b #1", ["YAML reads '#1' as a comment; put quotes inside the value"]),
        ("dialogue.system=#hi", ["YAML reads '#hi' as a comment"]),
        ("seed=-1", ["seed: -1 is not allowed; it must be at least 0"]),
        ("seed=18446744073709551616", ["seed: 18446744073709551616 is not allowed", "at most 4,294,967,295"]),
        ("rollout.temperature=0", ["rollout.temperature: 0 is not allowed; it must be at least 0.01 and at most 2"]),
        ("algo.mismatch_low=2", ["algo.mismatch_low: 2 is not allowed; it must be above 0 and at most 1"]),
        ("algo.mismatch_high=1", ["algo.mismatch_high: 1 is not allowed; it must be above 1"]),
        ("algo.loss=ppo", ["algo.loss: 'ppo' is not allowed; it must be one of grpo, dr_grpo, dapo, gspo, cispo"]),
        ("rollout.top_p=0.9", ["rollout.top_p: 0.9 is not allowed; it must be 1 (", "not the policy's"]),
        ("algo.trained_phases=[retry, task]", ["'task' is not allowed; it must be one of reflection, retry"]),
        ("model.path=${oc.env:HOME}", ["model.path: '${oc.env:HOME}' is not allowed", "write the value"]),
        ("model.path=???", ["model.path: '???' is not allowed"]),
        ("model.path=", ["model.path: name a Hugging Face checkpoint, by its directory or its name on the hub"]),
        ("seed", ["'seed': expected key=value"]),
        ("=3", ["expected key=value"]),
        ("a..b=3", ["expected key=value"]),
        ("--seed=3", ["unknown key"]),
        ("algo.trained_phases=[retry", ["the value is broken YAML"]),
    ],
)
def test_refused_overrides(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = error_of(write(tmp_path, "a.yaml", MINIMAL), override)
    assert all(part in message for part in parts), message


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, "parent.yaml", MINIMAL + "actor: {lrr: 1}")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml")
    assert error_of(child).startswith(f"{tmp_path / 'parent.yaml'}: actor.lrr: unknown key")


def test_environment_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "embedded")
    assert "not allowed" in error_of(write(tmp_path, "a.yaml", "model: {path: '${oc.env:MODEL}'}"))
    assert "not allowed" in error_of(write(tmp_path, "b.yaml", MINIMAL + "task: {options: {a: [{b: '${seed}'}]}}"))


def test_a_long_value_is_cut_short(tmp_path: Path) -> None:
    assert len(error_of(write(tmp_path, "a.yaml", MINIMAL), "seed=" + "x" * 10_000)) < 200
