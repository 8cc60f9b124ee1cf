"""A starting checkpoint is found where its name says, on disk or in the hub's cache."""

import shutil
import sys
from fnmatch import fnmatch
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread

import pytest

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import EMBEDDED, Architecture, architecture_of, location, model_path, planned_architecture

REVISION = "0123456789012345678901234567890123456789"


def located(name: str) -> Path:
    config = Config()
    config.model.path = name
    return model_path(config)


def planned(name: str) -> Architecture:
    config = Config()
    config.model.path = name
    return planned_architecture(config)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert located("embedded") == EMBEDDED
    assert located("/nowhere/at/all") == Path("/nowhere/at/all")
    assert located("~/models/x") == Path.home() / "models" / "x"
    assert located("org/model") == Path("org/model")


def test_a_hub_name_is_found_in_the_cache(hub: Path) -> None:
    home = hub / "models--org--tiny"
    shutil.copytree(EMBEDDED, home / "snapshots" / REVISION)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    assert architecture_of(located("org/tiny")) == planned("org/tiny") == architecture_of(EMBEDDED)


def test_of_a_model_on_the_hub_config_json_alone_is_downloaded_and_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "org" / "tiny" / "resolve" / "main").mkdir(parents=True)
    shutil.copy(EMBEDDED / "config.json", tmp_path / "org" / "tiny" / "resolve" / "main")
    asked = []

    class Hub(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert planned("org/tiny") == architecture_of(EMBEDDED)
        assert [path for path in asked if path.startswith("/org")] == ["/org/tiny/resolve/main/config.json"]
        assert not (tmp_path / "cache").exists()
        with pytest.raises(ConfigError, match="model.path: 'org/gone' is no directory here.*404"):
            planned("org/gone")
        server.shutdown()
    with pytest.raises(ConfigError, match="model.path: 'org/tiny' is no directory here.*ConnectError"):
        planned("org/tiny")


def test_a_hub_name_that_is_not_to_be_had_says_what_to_do(hub: Path) -> None:
    said = "model.path: 'org/gone' is no directory.*hf download org/gone.*config.json will do"
    for find in (located, planned):
        with pytest.raises(ConfigError, match=said):
            find("org/gone")


def test_without_the_hubs_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="model.path: 'org/tiny' is no directory here.*pip install huggingface-hub"):
        planned("org/tiny")


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(location, "HUB_SECONDS", 0.1)
        with pytest.raises(ConfigError, match="'org/silent' is no directory here.*Timeout"):
            planned("org/silent")


def test_of_a_checkpoint_nothing_pickled_is_downloaded_and_a_network_may_fail_without_words(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=r"'org/late' is no directory here.* gives \(TimeoutError\); download it"):
        located("org/late")
    wanted = {"model.safetensors", "tokenizer.json", "LICENSE", "LICENSE.md", "NOTICE.md", "USE_POLICY.md"}
    others = {"pytorch_model.bin", "original/consolidated.00.pth", "model-Q4_K_M.gguf", "README.md", "figures/a.png"}
    assert {name for name in wanted | others if matches(name, patterns)} == wanted


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
