"""What servers show of a run. Those that need wandb or MLflow run where the `track` extra is installed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3 import signals, trackers
from nemo_r3.config import Config, load
from nemo_r3.errors import UserError
from nemo_r3.trackers import InBackground, Metrics, background

LINES = [{"step": step, "loss": step / 4, "kl": None} for step in range(1, 6)]


def settings(path: Path, *overrides: str) -> Config:
    (path / "run.yaml").write_text("model: {path: embedded}\nrun: {tensorboard: false}\n")
    return load([str(path / "run.yaml"), f"run.dir={path}/run", *overrides])


@pytest.mark.parametrize(("library", "setting"), [("wandb", "run.wandb_project"), ("mlflow", "run.mlflow_experiment")])
def test_a_library_that_is_missing_is_refused(
    library: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # importing it fails
    trackers.check(settings(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match=rf"^{setting}: {library} cannot be imported .*\[track\]"):
        trackers.check(settings(tmp_path, f"{setting}=x"), tmp_path / "run")


def test_mlflow_neither_waits_minutes_for_a_server_nor_sends_telemetry_unless_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "9"})
    asked = []

    def get_experiment_by_name(name: str) -> None:
        asked.append((name, dict(os.environ)))
        raise ConnectionError("nobody answers")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(get_experiment_by_name=get_experiment_by_name))
    with pytest.raises(
        UserError, match=r"^run.mlflow_experiment: ConnectionError \(nobody answers\) \(MLFLOW_TRACKING"
    ):
        trackers.check(settings(tmp_path, "run.mlflow_experiment=x"), tmp_path / "run")
    quiet = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_DISABLE_TELEMETRY": "true"}
    assert asked == [("x", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "9", **quiet})]


class Service:
    """A server that is down at times, and what has arrived there."""

    def __init__(self) -> None:
        self.run_id = "7"
        self.begun_with: list[str | None] = []
        self.steps, self.codes = list[int](), list[int]()
        self.down, self.stuck = Event(), Event()

    def make(self, run_id: str | None) -> Service:
        self.begun_with.append(run_id)
        return self

    def log(self, step: int, metrics: Metrics) -> None:
        while self.stuck.is_set():
            time.sleep(0.01)
        if self.down.is_set():
            raise ConnectionError("nobody\nanswers")
        self.steps.append(step)

    def summarise(self, results: Metrics) -> None:
        self.steps.append(-1)

    def close(self, code: int) -> None:
        self.codes.append(code)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(background, "STOP_SECONDS", 0.1)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stuck.clear()


def process(service: Service, home: Path, steps: range, place: str = "team") -> InBackground:
    """What a process does that logs these steps, up to its end."""
    shown = InBackground("run.server", place, home / "service" / "sent.json", service.make)
    for step in steps:
        shown.log(step, {"loss": 0.5})
    return shown


def test_the_next_process_continues_the_run_and_repeats_no_step(tmp_path: Path, service: Service) -> None:
    process(service, tmp_path, range(1, 6)).close(1)
    process(service, tmp_path, range(1, 8)).close(0)
    assert (service.begun_with, service.steps, service.codes) == ([None, "7"], [1, 2, 3, 4, 5, 6, 7], [1, 0])
    elsewhere = Service()
    process(elsewhere, tmp_path, range(1, 9), place="another team").close(0)
    assert (elsewhere.begun_with, elsewhere.steps) == ([None], [1, 2, 3, 4, 5, 6, 7, 8]), "the whole run, as a new one"


def test_a_server_that_comes_back_gets_everything(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    service.down.set()
    shown = process(service, tmp_path, range(1, 4))
    time.sleep(0.1)
    assert service.steps == []
    service.down.clear()
    shown.summarise({"before": 0.5})
    shown.close(0)
    assert (service.steps, service.codes) == ([1, 2, 3, -1], [0])
    assert capsys.readouterr().err.count("warning: run.server: ConnectionError (nobody answers); the run goes on") == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["down", "stuck"])
def test_a_lost_server_holds_nothing_up_and_gets_the_steps_later(
    fault: str, tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(service, fault).set()
    begun = time.monotonic()
    process(service, tmp_path, range(1, 4)).close(75)
    assert time.monotonic() - begun < 2
    said = capsys.readouterr().err
    assert "warning: run.server: not everything was sent" in said
    assert ("run.server: waiting up to 0 s for what is not sent yet" in said) == (fault == "stuck")
    assert (service.steps, service.codes) == ([], [])
    later = Service()
    process(later, tmp_path, range(1, 5)).close(0)
    assert (later.begun_with, later.steps) == (["7"], [1, 2, 3, 4])


@pytest.mark.usefixtures("impatient")
def test_results_may_take_longer_than_a_stop_waits(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.stuck.set()
    shown = process(service, tmp_path, range(1, 2))
    shown.summarise({"before": 0.5})
    Timer(0.5, service.stuck.clear).start()
    shown.close(0)
    assert (service.steps, service.codes) == ([1, -1], [0])
    assert capsys.readouterr().err == "run.server: waiting up to 30 s for what is not sent yet\n"


def test_no_server_is_given_the_line_that_may_hold_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def server(setting: str, place: str, file: Path, make: partial[Any]) -> SimpleNamespace:
        given.append(make.args[0].cluster.setup)
        return SimpleNamespace(close=lambda code: None)

    monkeypatch.setattr(trackers, "InBackground", server)
    asked = ("run.wandb_project=x", "run.mlflow_experiment=x", "cluster.setup=export KEY=secret")
    trackers.open_all(settings(tmp_path, *asked), tmp_path / "run", 0, [])
    trackers.close(0)
    assert given == ["", ""]


PROCESS = """
import json, sys
from pathlib import Path
from nemo_r3 import trackers
from nemo_r3.config import load

lines, code, results, *arguments = sys.argv[1:]
lines, config = json.loads(lines), load(arguments)
path = Path(config.run.dir)
path.mkdir(exist_ok=True)
trackers.check(config, path)
trackers.open_all(config, path, len(lines) - 2, lines[:-2])
for line in lines[-2:]:
    trackers.log(line)
if json.loads(results):
    trackers.show_results(config, path, json.loads(results))
trackers.close(int(code))
"""


def end_to_end(path: Path, setting: str) -> None:
    """Two processes: steps 1 to 3, and a stop; steps 4 and 5, and results."""
    settings(path)
    for lines, code, results in ((LINES[:3], signals.STOPPED, {}), (LINES, 0, {"after/first_try": 0.5})):
        given = [json.dumps(lines), str(code), json.dumps(results), str(path / "run.yaml"), f"run.dir={path}/run"]
        given.append("cluster.setup=export KEY=secret")
        subprocess.run([sys.executable, "-c", PROCESS, *given, f"{setting}=project"], check=True, timeout=120)


def test_weights_and_biases_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    end_to_end(tmp_path, "run.wandb_project")
    run_id = json.loads((tmp_path / "run/wandb/sent.json").read_text())["run_id"]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    stopped, done = (list(records(file)) for file in files[:2])
    assert [steps_of(part) for part in (stopped, done)] == [[(1, 0.25), (2, 0.5), (3, 0.75)], [(4, 1.0), (5, 1.25)]]
    assert any(record.HasField("preempting") for record in stopped)
    assert [record.exit.exit_code for record in (stopped + done) if record.HasField("exit")] == [75, 0]
    (run,) = [record.run for record in done if record.HasField("run")]
    assert (run.display_name, run.project) == (f"{tmp_path.name}/run", "project")
    shown = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (shown["model"]["path"], shown["cluster"]["setup"]) == ("embedded", "")
    summary = {item.key: item.value_json for record in records(files[2]) for item in record.summary.update}
    assert summary["after/first_try"] == "0.5"


def records(file: Path) -> Iterator[Any]:
    """The records of a W&B file: LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def steps_of(part: list[Any]) -> list[tuple[int, float]]:
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in part
        if record.HasField("history")
    ]
    return [(row["_step"], row["loss"]) for row in rows]


def test_wandb_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["[]", "0", "{}", str(tmp_path / "run.yaml"), f"run.dir={tmp_path}/run", "run.wandb_project=x"]
    settings(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROCESS, *given], capture_output=True, text=True, timeout=120)
    assert "UserError: run.wandb_project: there is no login; say `wandb login`" in done.stderr


def test_mlflow_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/server")
    end_to_end(tmp_path, "run.mlflow_experiment")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert (run.info.run_name, run.info.status) == (f"{tmp_path.name}/run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(line["step"], line["loss"]) for line in LINES]
    assert (run.data.params["model.path"], run.data.params["cluster.setup"]) == ("embedded", "")
    assert run.data.metrics["after/first_try"] == 0.5
