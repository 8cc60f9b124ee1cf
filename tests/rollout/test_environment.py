from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from families import EXPERTS, TINY

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.rollout import environment

LLAMA = TINY | {"architectures": ["LlamaForCausalLM"]}


def refusal(home: Path, ways: int = 1, **changes: Any) -> str:
    """The error of a model that `changes` spoil; nothing is left in the environment."""
    (home / "config.json").write_text(json.dumps(LLAMA | changes))
    config = Config()
    config.model.path, config.rollout.tensor_parallel = str(home), ways
    before = dict(os.environ)
    with pytest.raises(ConfigError) as error:
        environment.prepare(config, on_cuda=False)
    assert dict(os.environ) == before
    return str(error.value)


def test_head_width_that_the_cpu_attention_lacks(tmp_path: Path) -> None:
    assert "head_dim 16" in refusal(tmp_path, num_attention_heads=8, hidden_size=128)


@pytest.mark.parametrize(("width", "ways", "own"), [(48, 1, 48), (64, 4, 16)])
def test_expert_width_that_the_cpu_would_pad(tmp_path: Path, width: int, ways: int, own: int) -> None:
    mixture = {"architectures": ["Qwen3MoeForCausalLM"]} | EXPERTS | {"moe_intermediate_size": width}
    said = f"experts of {own} columns on a rank (rollout.tensor_parallel={ways})"
    assert said in refusal(tmp_path, ways, **mixture)


def test_a_task_that_has_imported_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", sys)
    config = Config()
    config.model.path, config.task.name = "embedded", "mine.judge"
    with pytest.raises(ConfigError, match=r"task\.name: mine\.judge imports vllm.* nemo_r3\.tasks\.worker"):
        environment.prepare(config, on_cuda=False)


@pytest.mark.parametrize("given", [{}, {"XDG_CACHE_HOME": "/large", "TRITON_CACHE_DIR": "/fast"}])
@pytest.mark.parametrize("home", ["missing/below", "ours"])
def test_caches_are_in_a_home_that_can_be_written_or_in_the_run_directory(
    home: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "missing").write_text("no directory")
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path / home), **given})
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    config = Config()
    config.model.path, config.run.dir = "embedded", str(tmp_path / "run")
    environment.prepare(config, on_cuda=False)
    found = {name: value for name, value in os.environ.items() if name in (*environment.CACHES, "VLLM_CACHE_ROOT")}
    moved = {name: str(tmp_path / "run" / ".cache" / folder) for name, folder in environment.CACHES.items()}
    assert found == ({} if home == "ours" else moved) | given
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize("name", ["VLLM_USE_DEEP_GEMM", "VLLM_ALLREDUCE_USE_FLASHINFER"])
def test_nothing_on_a_gpu_needs_nvcc_unless_it_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared({}, tmp_path, monkeypatch, on_cuda=True)[name] == "0"
    assert prepared({name: "1"}, tmp_path, monkeypatch, on_cuda=True)[name] == "1"
    assert name not in prepared({}, tmp_path, monkeypatch, on_cuda=False)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_this_vllm_reads_what_is_set_for_it(on_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    known = Path(spec.submodule_search_locations[0], "envs.py").read_text()
    names = [name for name in prepared({}, tmp_path, monkeypatch, on_cuda) if name.startswith("VLLM_")]
    assert len(names) >= 5
    assert [name for name in names if f'"{name}":' not in known] == []


def prepared(given: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch, on_cuda: bool) -> dict[str, str]:
    monkeypatch.setattr(os, "environ", {"HOME": str(home), **given})
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    config = Config()
    config.model.path, config.run.dir = "embedded", str(home / "run")
    environment.prepare(config, on_cuda)
    return dict(os.environ)
