"""`without_code`: lets torch read a checkpoint as data alone, whoever made it.

torch pickles two parts of a checkpoint, and a pickle may call any function when it is read: .metadata, which says where
the parts of all tensors are, and the objects among the shards.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException  # a BaseException

from nemo_r3.errors import UserError, in_one_line
from nemo_r3.runtime import World

METADATA = ".metadata"
DESCRIBING = tuple(f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem"))
"""Modules whose dataclasses and enumerations describe tensors and their places."""
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""With it `torch.load` reads tensors and plain values, and nothing else, whatever its caller asks for."""
ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""The opposite, which some set for other programs; torch refuses to load while both are set."""


@contextmanager
def without_code(checkpoint: Path, world: World) -> Iterator[None]:
    """Checks .metadata on rank 0, and has torch read nothing else but data within this block; every rank calls this.

    Raises:
        UserError: .metadata names what describes no tensor, or is no pickle; or torch refuses an object elsewhere.
    """
    world.on_main(lambda: _check(checkpoint / METADATA))
    before = {name: os.environ.pop(name) for name in (WEIGHTS_ONLY, ANYTHING) if name in os.environ}
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        if not any(isinstance(failure, pickle.UnpicklingError) for failure, _ in failures):
            raise
        raise UserError(
            f"{checkpoint} cannot be read: an object in it is no plain data and may run as code; remove that checkpoint"
        ) from error
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ.update(before)


def _check(metadata: Path) -> None:
    with metadata.open("rb") as file:
        try:
            _Descriptions(file).load()
        except Exception as error:  # of any type: pickle raises what the content makes of it
            raise UserError(f"{metadata} cannot be read ({in_one_line(error)}); remove that checkpoint") from error


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What describes tensors; a name with dots would lead out of its module."""
        if module in DESCRIBING and "." not in name:
            found = super().find_class(module, name)
            if is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum)):
                return found
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it names {module}.{name}, which may run as code and describes no tensor")


def _member(of: Any, name: str) -> Any:
    """In place of `getattr`, with which Python 3.11.2, Debian 12's, pickles a member of an enumeration."""
    if isinstance(of, type) and issubclass(of, Enum) and name in of.__members__:
        return of[name]
    raise pickle.UnpicklingError("it asks for an attribute, which may run as code and describes no tensor")
