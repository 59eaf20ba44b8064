"""Files that are whole or not there: atomic writes, and arrays with a JSON header in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from .errors import HetCacheError, OutputFileError

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]
PathLike = str | os.PathLike[str]
ROOM = 2**20
"""Bytes that must be free where results are written."""


def check_writable(*paths: PathLike) -> None:
    """See before the long work whether files can be written after it. Nothing is left behind.

    Raises:
        OutputFileError: a path is a folder or stands under a file, or its folder is read-only or full.
    """
    for path in map(Path, paths):
        try:
            if path.is_dir():
                raise OutputFileError(f"{path} cannot be written: it is a folder")
            folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(ROOM))
        except NotADirectoryError as error:
            raise OutputFileError(f"{path} cannot be written: {folder} is no folder") from error
        except OSError as error:
            if isinstance(error, OutputFileError):
                raise
            raise OutputFileError(f"{path} cannot be written: {error.strerror}") from error


def atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: nobody sees half a file.

    Raises:
        OutputFileError: it cannot be written, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(descriptor)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputFileError(f"{path} cannot be written: {error}") from error


@dataclass(frozen=True)
class ArrayFile:
    """A kind of file: arrays and a JSON header in safetensors, with a schema version.

    Attributes:
        format: its name in the file, such as `hetplan`.
        noun: what a reader calls it, such as `plan`.
        version: of its schema. Files of another version are refused.
        remedy: what to do then.
        error: raised for any file that cannot be read.
    """

    format: str
    noun: str
    version: int
    remedy: str
    error: type[HetCacheError]

    def save(self, path: PathLike, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
        """Write the file, atomically."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        self.save_tensors(path, tensors, header)

    def save_tensors(self, path: PathLike, tensors: dict[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Write a file of tensors, of types that numpy may not know."""
        metadata = {"format": self.format, "schema_version": str(self.version), self.noun: json.dumps(header)}

        def write(temporary: str) -> None:
            save_file(tensors, temporary, metadata=metadata)
            _sort_metadata(temporary)

        atomically(Path(path), write)

    def load(self, path: PathLike, decode: Callable[[dict[str, Any], Arrays], T]) -> T:
        """What `decode(header, arrays)` makes of the file. Whatever goes wrong is the format's error, with the path."""

        def from_tensors(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> T:
            return decode(header, {name: tensor.numpy() for name, tensor in tensors.items()})

        return self.load_tensors(path, from_tensors)

    def load_tensors(self, path: PathLike, decode: Callable[[dict[str, Any], dict[str, torch.Tensor]], T]) -> T:
        """The same of a file whose types numpy may not know: `decode(header, tensors)`."""
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.format:
                    raise self.error(f"{path} is a safetensors file but not a {self.noun}")
                if metadata.get("schema_version") != str(self.version):
                    raise self.error(
                        f"{path} has {self.noun} schema {metadata.get('schema_version')}, this version reads "
                        f"{self.version}: {self.remedy}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return decode(json.loads(metadata[self.noun]), tensors)
        except FileNotFoundError as error:
            raise self.error(f"no {self.noun} at {path}") from error
        except self.error as error:
            raise error if str(path) in str(error) else self.error(f"{path}: {error}") from error
        except (SafetensorError, HetCacheError, OSError, KeyError, TypeError, ValueError) as error:
            raise self.error(f"{path} cannot be read as a {self.noun}: {error}") from error


def _sort_metadata(path: PathLike) -> None:
    """Make the bytes of a safetensors file those of its content: safetensors writes metadata in any order.

    Digests of calibrations say whether results belong together.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same text in another order is as long"
        file.seek(8)
        file.write(text.ljust(size))
