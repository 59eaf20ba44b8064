"""Sample inputs of the exported forms, for `polygraphy run full.onnx --data-loader-script sample_inputs/load.py:full`.

This file is copied into every export folder and needs nothing but numpy (and torch for bfloat16). Cache tensors that
were not shipped are drawn from a normal distribution: good for times, not for values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent


def read(kind: str, samples: Path = FOLDER) -> dict[str, Any]:
    """The inputs of one form, by name: numpy arrays, or torch tensors where numpy lacks the type."""
    manifest = json.loads((samples.parent / "manifest.json").read_text())
    sizes = {name: manifest["plan"][name] for name in manifest["dynamic_dims"]}
    generator = np.random.default_rng(0)
    inputs = {}
    for spec in manifest["forms"][kind]["inputs"]:
        shape = [sizes.get(size, size) for size in spec["shape"]]
        path = samples / kind / f"{spec['name']}.bin"
        raw = np.fromfile(path, dtype=np.uint8) if path.is_file() else None
        inputs[spec["name"]] = _array(raw, spec["dtype"], shape, generator)
    return inputs


def _array(raw: Any, dtype: str, shape: list[int], generator: np.random.Generator) -> Any:
    if dtype == "bfloat16":
        import torch

        if raw is None:
            return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(torch.bfloat16)
        return torch.from_numpy(raw).view(torch.bfloat16).reshape(shape)
    if raw is None:
        spread = 42 if dtype == "int8" else 1
        return (spread * generator.standard_normal(shape, dtype=np.float32)).astype(dtype)
    return raw.view(dtype).reshape(shape)


def full() -> Iterator[dict[str, Any]]:
    """Inputs of the full form."""
    yield read("full")


def partial() -> Iterator[dict[str, Any]]:
    """Inputs of the partial form."""
    yield read("partial")


def reuse() -> Iterator[dict[str, Any]]:
    """Inputs of the reuse form."""
    yield read("reuse")


def plain() -> Iterator[dict[str, Any]]:
    """Inputs of the unmodified model."""
    yield read("plain")
