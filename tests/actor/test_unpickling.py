"""Checkpoints of someone else: what in them could run as code does not."""

from __future__ import annotations

import io
import os
import pickle
from functools import partial
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal
from torch.distributed.checkpoint import CheckpointException

from nemo_r3.actor.unpickling import ANYTHING, WEIGHTS_ONLY, without_code
from nemo_r3.errors import UserError

ALONE: Any = SimpleNamespace(on_main=lambda act: act())


class Forged:
    """Makes a directory when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def called(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function of a module; `pickle.dumps` would not write a name with dots."""
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "mkdir"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
        ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.state_dict.StateDictOptions"),
    ],
)
def test_a_forged_metadata_is_refused_before_it_runs(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(called(module, name, str(tmp_path / "made")))

    def read() -> None:
        with without_code(tmp_path, ALONE):
            pass

    assert f"{tmp_path}/.metadata cannot be read (it names {module}.{name}, which may run" in refusal(read)
    assert not (tmp_path / "made").exists()


def attribute_of(module: str, holder: str, name: str) -> bytes:
    """A pickle that asks for an attribute of what a module holds."""
    texts = [b"\x8c" + bytes([len(it)]) + it.encode() for it in ("builtins", "getattr", module, holder, name)]
    return b"\x80\x04" + b"".join(texts[:2]) + b"\x93" + b"".join(texts[2:4]) + b"\x93" + texts[4] + b"\x86R."


def test_a_member_of_an_enumeration_is_read_as_debians_python_writes_it(tmp_path: Path) -> None:
    """Python 3.11.2 calls getattr for one."""
    metadata = "torch.distributed.checkpoint.metadata"
    (tmp_path / ".metadata").write_bytes(attribute_of(metadata, "_MEM_FORMAT_ENCODING", "TORCH_CHANNELS_LAST"))
    with without_code(tmp_path, ALONE):
        pass
    for holder, name in (("_MEM_FORMAT_ENCODING", "mro"), ("TensorProperties", "create_from_tensor")):
        (tmp_path / ".metadata").write_bytes(attribute_of(metadata, holder, name))
        with pytest.raises(UserError, match="it asks for an attribute"), without_code(tmp_path, ALONE):
            pass


def test_a_metadata_that_is_cut_or_of_another_torch_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (b"", pickle.dumps({})[:-2], called("torch.distributed.checkpoint.metadata", "Newer", "")):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"\.metadata cannot be read \("), without_code(tmp_path, ALONE):
            pass


def test_an_object_among_the_shards_is_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reader asks for weights_only=False, and the environment may, too."""
    monkeypatch.setenv(ANYTHING, "1")
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    forged, plain = io.BytesIO(), io.BytesIO()
    torch.save(Forged(tmp_path / "made"), forged)
    torch.save(torch.ones(1, dtype=torch.uint8), plain)

    def read(as_a_shards: bool) -> None:
        with without_code(tmp_path, ALONE):
            try:
                torch.load(io.BytesIO(forged.getvalue()), weights_only=False)
            except pickle.UnpicklingError as error:
                if as_a_shards:
                    raise CheckpointException("read", {1: (error, StackSummary())}) from error
                raise

    for as_a_shards in (True, False):
        said = refusal(partial(read, as_a_shards))
        assert said.startswith(f"{tmp_path} cannot be read: an object in it is no plain data")
    with without_code(tmp_path, ALONE):
        assert torch.load(io.BytesIO(plain.getvalue()), weights_only=False) == 1
    assert not (tmp_path / "made").exists() and WEIGHTS_ONLY not in os.environ
    assert os.environ[ANYTHING] == "1"
