"""`manifest.json`: what an export folder holds. Exporters write it, the engine runtime and other programs read it.

`manifest.schema.json` beside this file describes it for programs in other languages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EngineError

FORMAT, SCHEMA_VERSION = "hetcache-export", 2
MANIFEST_FILE = "manifest.json"
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. A dim is a number, or the name of one of `Manifest.dynamic_dims`.

    `role` is `model` (an argument or result of the model), `index` (token indices of the plan) or `cache`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str


@dataclass(frozen=True)
class CacheSpec:
    """A tensor that passes from step to step: what leaves a form as `output` enters later ones as `input`.

    Before the first step of an edit it must hold `initial`; null: whatever it likes.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    module: str
    initial: float | None = None


@dataclass(frozen=True)
class FormSpec:
    """One graph. `flops` counts matrix products, convolutions and attention of one call."""

    file: str
    sha256: str
    flops: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the weights file. `sha256` is of its bytes, little-endian, row-major."""

    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class WeightsSpec:
    """The weights that all forms share, by module path; a name that ends in `.T` is stored transposed."""

    file: str
    num_bytes: int
    sha256: str
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class ModelSpec:
    """What was exported. `config_sha256` is of the sorted JSON of `config`."""

    class_name: str
    config: dict[str, Any]
    config_sha256: str


@dataclass(frozen=True)
class PlanSpec:
    """The plan that the forms were made for; `file` is a copy of it. `steps` has a letter F, P or R for each step."""

    file: str
    grid: tuple[int, int, int]
    num_tokens: int
    num_active: int
    num_context: int
    num_merged: int
    steps: str


@dataclass(frozen=True)
class DynamicDim:
    """The sizes that a named dim can take."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class EngineFile:
    """One built engine."""

    file: str
    num_bytes: int
    sha256: str
    build_seconds: float


@dataclass(frozen=True)
class EngineSpec:
    """Engines of one kind. `executed` says whether they were run after the build, on the machine that built them."""

    version: str
    compute_capabilities: tuple[str, ...]
    executed: bool
    forms: dict[str, EngineFile]


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`.

    Attributes:
        model: what was exported.
        plan: what the forms were made for.
        dtype: fp32, fp16 or bf16.
        opset: of ONNX.
        versions: of the packages that wrote the files.
        latents: the inputs that become tokens; they tell guidance calls apart.
        constants: arguments of the model that the graphs are right for only at these values: Python values, and
            tensors (as nested lists) on which the shape of the graph depends.
        unused: tensor arguments of the model that no form needs.
        dynamic_dims: sizes of the named dims.
        partial_flops: FLOPs of the partial form by M, at the smallest, usual and largest M of free sizes.
        forms: by kind.
        cache: what passes from step to step.
        layers: module path by layer number.
        weights: shared by all forms.
        engines: by kind.
        verified: largest relative difference to torch, by provider and form.
    """

    model: ModelSpec
    plan: PlanSpec
    dtype: str
    opset: int
    versions: dict[str, str]
    latents: tuple[str, ...]
    constants: dict[str, Any]
    unused: tuple[str, ...]
    dynamic_dims: dict[str, DynamicDim]
    partial_flops: dict[str, int]
    forms: dict[str, FormSpec]
    cache: tuple[CacheSpec, ...]
    layers: dict[str, str]
    weights: WeightsSpec
    engines: dict[str, EngineSpec] = field(default_factory=dict)
    verified: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        header = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
        return json.dumps(header | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the file's text.

        Raises:
            EngineError: another format or version, or a field is missing.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise EngineError("the manifest is of another program")
            if data.get("schema_version") != SCHEMA_VERSION:
                raise EngineError(
                    f"the manifest has schema {data.get('schema_version')}, this version reads {SCHEMA_VERSION}: "
                    "export anew"
                )
            manifest: Manifest = _read(cls, data)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"the manifest cannot be read: {error!r}") from error
        return manifest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of an export folder.

        Raises:
            EngineError: there is none, or it cannot be read.
        """
        try:
            return cls.from_json((folder / MANIFEST_FILE).read_text())
        except OSError as error:
            raise EngineError(f"{folder} is no export folder: it has no {MANIFEST_FILE}") from error
        except EngineError as error:
            raise EngineError(f"{folder / MANIFEST_FILE}: {error}") from error


def check_files(folder: Path, manifest: Manifest, kind: str | None) -> None:
    """Compare the files that a provider reads with the hashes that the exporter wrote down.

    Args:
        folder: the export.
        manifest: of it.
        kind: of the engines that will run, or None for the ONNX files and their weights.

    Raises:
        EngineError: a file is missing, or holds something else than what was exported.
    """
    if kind is None:
        files = {form.file: form.sha256 for form in manifest.forms.values()}
        files[manifest.weights.file] = manifest.weights.sha256
    else:
        files = {engine.file: engine.sha256 for engine in manifest.engines[kind].forms.values()}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise EngineError(f"{path} is missing: export the model again")
        if sha256_of(path) != expected:
            raise EngineError(
                f"{path} is damaged or was changed after the export: export the model again, "
                "or load it with verify=False"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(kind: Any, value: Any) -> Any:
    """A value of JSON as the annotated type: dataclasses, tuples and dicts of them, and plain values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f.name for f in dataclasses.fields(kind)]
        return kind(**{name: _read(hints[name], value[name]) for name in fields})  # type: ignore[operator]
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"expected an object, got {value!r}")
        return {key: _read(arguments[1], item) for key, item in value.items()}
    allowed = arguments if origin is types.UnionType else (float, int) if kind is float else (kind,)
    if kind is not Any and not isinstance(value, allowed):
        raise TypeError(f"expected {kind}, got {value!r}")
    return value
