"""One file for the weights of all forms: equal tensors are written once, and each ONNX file points into it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from ...engine.manifest import StoredTensor

WEIGHTS_FILE = "weights.bin"
SMALLEST = 1024
"""Bytes. Constants smaller than that stay inside the ONNX files; parameters never do."""
PAGE = 4096
"""Bytes. Tensors of a page and more begin on one, so that engines can map them instead of reading them."""


class WeightsFile:
    """Writes tensors one by one: no more than one is in memory twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._offsets: dict[str, int] = {}
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def move_out(self, model: ir.Model, parameters: set[str]) -> None:
        """Let the model's initializers point into the file, and write those that are not in it.

        `parameters` are names that mean the same tensor in every model.
        """
        for value in model.graph.initializers.values():
            tensor, name = value.const_value, value.name
            assert tensor is not None
            assert name is not None
            shared = name.removesuffix(".T") in parameters
            if not shared and tensor.nbytes < SMALLEST:
                continue
            known = self.tensors.get(name) if shared else None
            stored = known or self._store(tensor)
            self.tensors.setdefault(name, stored)
            value.const_value = ir.ExternalTensor(
                self.path.name,
                stored.offset,
                stored.length,
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=self.path.parent,
            )

    def _store(self, tensor: ir.TensorProtocol) -> StoredTensor:
        data = tensor.tobytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self._offsets:
            alignment = PAGE if len(data) >= PAGE else 64
            self._file.write(bytes(-self._file.tell() % alignment))
            self._offsets[sha256] = self._file.tell()
            self._file.write(data)
        shape = tuple(int(size) for size in tensor.shape.numpy())
        return StoredTensor(self._offsets[sha256], len(data), tensor.dtype.name.lower(), shape, sha256)
