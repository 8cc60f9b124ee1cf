"""`HFTensors`: reads and checks the weights of a Hugging Face checkpoint, one tensor at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_r3.errors import ConfigError
from nemo_r3.files import read_json_object
from nemo_r3.models import convert, names
from nemo_r3.models.architecture import Architecture
from nemo_r3.models.names import Index


class HFTensors:
    """Reads parts of single tensors of a Hugging Face checkpoint directory (safetensors, one file or many).

    For a `with` statement. Only one file is open and mapped into memory at a time, because what was read of mapped
    files counts as this process's memory; a checkpoint's files are in the order of its layers.
    """

    def __init__(self, path: Path) -> None:
        """Finds out which file holds which tensor.

        Raises:
            ConfigError: there are no safetensors, or their index cannot be read.
        """
        self.path = path
        self._file = ""
        self._handle: Any = None
        index = path / "model.safetensors.index.json"
        if index.is_file():
            self.files = _weight_map(index)
        elif (path / "model.safetensors").is_file():
            with self._open("model.safetensors") as handle:
                self.files = dict.fromkeys(handle.keys(), "model.safetensors")
        else:
            raise ConfigError(f"model.path: {path} has no model.safetensors (pickled weights are not read)")

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file, self._handle = "", None

    def check(self, arch: Architecture) -> None:
        """Reads the headers of all files.

        Raises:
            ConfigError: a file is missing, empty or cut, or a tensor is missing or of another shape.
        """
        expected: dict[str, dict[str, torch.Size]] = defaultdict(dict)
        for row in names.rows(arch):
            whole = torch.empty(row.shape, device="meta")
            for name, part in zip(row.hf, convert.split(row, whole, arch), strict=True):
                expected[self._file_of(name)][name] = part.shape
        for file, shapes in expected.items():
            with self._open(file) as handle:
                for name, shape in shapes.items():
                    if (found := tuple(handle.get_slice(name).get_shape())) != shape:
                        raise ConfigError(
                            f"model.path: {self.path}: {name} has shape {found}, config.json says {tuple(shape)}"
                        )

    def read(self, name: str, index: Index) -> Tensor:
        """What `index` selects of a tensor, on the CPU: a view of the mapped file, read only when it is used.

        Raises:
            ConfigError: it is missing, or its file cannot be read.
        """
        with self._open(self._file_of(name)) as handle:
            tensor: Tensor = handle.get_slice(name)[index]
        return tensor

    def _file_of(self, name: str) -> str:
        if name not in self.files:
            raise ConfigError(f"model.path: {self.path} has no tensor {name!r}; config.json names another model?")
        return self.files[name]

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            if file != self._file:
                self._handle = safe_open(self.path / file, framework="pt")
                self._file = file
            yield self._handle
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model.path: {self.path / file} cannot be read ({error})") from error


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json_object(index, "model.path").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(f"model.path: {index} is no index of safetensors: it has no weight_map from tensors to files")
    return files
