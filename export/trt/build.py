"""TensorRT engines of exported forms, through Polygraphy's loaders: TensorRT, and TensorRT for RTX without a GPU.

TensorRT for RTX builds ahead of time for the compute capabilities one names. TensorRT builds for the GPU that it
finds. Everything else is one code path.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...engine.manifest import EngineFile, EngineSpec, FormSpec, Manifest, sha256_of
from ...engine.runners import has_driver, import_tensorrt
from ...errors import ExportError, MissingExtraError
from ..model.options import Progress

ENGINES_FOLDER = "engines"
DEFAULT_CAPABILITIES = ("8.9", "12.0")


@dataclass(frozen=True)
class EngineKind:
    """A flavour of TensorRT."""

    name: str
    module: str
    package: str
    extra: str
    ahead_of_time: bool


RTX = EngineKind("rtx", "tensorrt_rtx", "tensorrt-rtx-cu12", "trt-rtx", ahead_of_time=True)
TENSORRT = EngineKind("tensorrt", "tensorrt", "tensorrt", "trt", ahead_of_time=False)
KINDS = {kind.name: kind for kind in (RTX, TENSORRT)}


def choose_kind(name: str) -> EngineKind:
    """The kind that `--trt=NAME` means; `auto` is TensorRT where it and a GPU are present, and RTX otherwise.

    Raises:
        ExportError: no such kind, or TensorRT without a GPU.
        MissingExtraError: its package is not installed.
    """
    if name == "auto":
        name = "tensorrt" if importlib.util.find_spec("tensorrt") and has_driver() else "rtx"
    if name not in KINDS:
        raise ExportError(f"--trt takes auto, {' or '.join(KINDS)}, got {name}")
    kind = KINDS[name]
    import_tensorrt(kind.module, kind.extra)
    if not kind.ahead_of_time and not has_driver():
        raise ExportError("--trt=tensorrt builds on the GPU that will run the engines, and no driver is found here")
    return kind


def build_engines(
    folder: Path,
    manifest: Manifest,
    kind: EngineKind,
    capabilities: Sequence[str] = (),
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Build an engine for each form into `folder/engines/<kind>`; the manifest with them.

    Args:
        folder: holds the ONNX files and their weights.
        manifest: of the folder.
        kind: which TensorRT.
        capabilities: compute capabilities such as 8.9, for kinds that build ahead of time; else the GPU's own.
        progress: called before each engine.

    Raises:
        ExportError: a form cannot be built, with TensorRT's own words.
        MissingExtraError: polygraphy is not installed.
    """
    targets = tuple(capabilities or DEFAULT_CAPABILITIES) if kind.ahead_of_time else ()
    if capabilities and not kind.ahead_of_time:
        raise ExportError(f"--compute-capability is for --trt=rtx: {kind.name} builds for the GPU it runs on")
    check_capabilities(kind, targets, manifest.dtype)
    target = folder / ENGINES_FOLDER / kind.name
    target.mkdir(parents=True)
    files = {}
    for number, (name, form) in enumerate(manifest.forms.items()):
        progress(f"building {kind.name} engines", number, len(manifest.forms))
        start = time.perf_counter()
        path = target / f"{name}.engine"
        path.write_bytes(build_engine(folder / form.file, form, manifest, kind, targets))
        gc.collect()  # the network holds the weights
        seconds = time.perf_counter() - start
        relative = path.relative_to(folder).as_posix()
        files[name] = EngineFile(relative, path.stat().st_size, sha256_of(path), seconds)
    progress(f"building {kind.name} engines", len(manifest.forms), len(manifest.forms))
    spec = EngineSpec(metadata.version(kind.package), targets, executed=False, forms=files)
    return replace(manifest, engines={**manifest.engines, kind.name: spec})


def check_capabilities(kind: EngineKind, capabilities: Sequence[str], dtype: str) -> None:
    """Raise `ExportError` for GPUs that the installed TensorRT does not know, or that lack the type."""
    if not capabilities:
        return
    known = import_tensorrt(kind.module, kind.extra).ComputeCapability.__members__
    names = sorted((name[2:-1] + "." + name[-1] for name in known if name.startswith("SM")), key=float)
    unknown = [capability for capability in capabilities if capability not in names]
    if unknown:
        raise ExportError(f"TensorRT for RTX has no compute capability {unknown[0]}: it has {', '.join(names)}")
    old = [capability for capability in capabilities if float(capability) < 8.0]
    if dtype == "bf16" and old:
        raise ExportError(f"GPUs of compute capability {old[0]} have no bf16: export with --dtype fp16")


def build_engine(
    path: Path, form: FormSpec, manifest: Manifest, kind: EngineKind, capabilities: Sequence[str]
) -> memoryview:
    """The engine of one ONNX file, in TensorRT's own memory: it is as large as the weights.

    Raises:
        ExportError: TensorRT does not take it, or its inputs and outputs are not the form's.
    """
    polygraphy = polygraphy_for(kind)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            builder, network, parser = polygraphy.read_network(str(path), strongly_typed=True)
            check_network(network, form, path.name)
            allow_any_attention(network, kind)
            options: dict[str, Any] = {"profiles": profiles_of(form, manifest, polygraphy)}
            if capabilities:
                pairs = [capability.split(".") for capability in capabilities]
                options["compute_capabilities"] = [(int(major), int(minor)) for major, minor in pairs]
            config = polygraphy.config_class(**options)
            data = polygraphy.build((builder, network, parser), config)
    except polygraphy.error as error:
        raise ExportError(
            f"{path.name} cannot be built with {kind.module}: {reason(said.getvalue(), error)}"
        ) from error
    return memoryview(data)


def reason(log: str, error: Exception) -> str:
    """TensorRT's own error lines in one, without Polygraphy's marks; Polygraphy's message if there are none."""
    lines = [line.split("[E]", 1)[1].strip() for line in log.splitlines() if "[E]" in line]
    return "; ".join(dict.fromkeys(lines)) or " ".join(str(error).split())


def check_network(network: Any, form: FormSpec, name: str) -> None:
    """Inputs and outputs as TensorRT read them, against the manifest: an engine can only be asked on a GPU."""
    for tensors, specs in (
        ([network.get_input(i) for i in range(network.num_inputs)], form.inputs),
        ([network.get_output(i) for i in range(network.num_outputs)], form.outputs),
    ):
        found = {t.name: (tuple(t.shape), _dtype_name(t.dtype)) for t in tensors}
        expected = {s.name: (tuple(-1 if isinstance(d, str) else d for d in s.shape), s.dtype) for s in specs}
        if found != expected:
            wrong = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise ExportError(
                f"{name}: TensorRT reads {wrong} as {found.get(wrong)}, the manifest says {expected.get(wrong)}"
            )


def allow_any_attention(network: Any, kind: EngineKind) -> None:
    """Let TensorRT take an ONNX Attention apart where it has no fused kernel, such as in float32.

    A file can ask for that only by an attribute that ONNX does not allow.
    """
    tensorrt = import_tensorrt(kind.module, kind.extra)
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = tensorrt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def profiles_of(form: FormSpec, manifest: Manifest, polygraphy: Polygraphy) -> list[Any] | None:
    """The optimisation profile of a form with free dims."""
    if all(isinstance(size, int) for spec in form.inputs for size in spec.shape):
        return None
    profile = polygraphy.profile_class()
    for spec in form.inputs:
        if any(isinstance(size, str) for size in spec.shape):
            profile.add(spec.name, *(sizes_at(spec.shape, manifest, bound) for bound in ("min", "opt", "max")))
    return [profile]


def sizes_at(shape: Sequence[int | str], manifest: Manifest, bound: str) -> tuple[int, ...]:
    """A shape with its named dims at their smallest, usual or largest size."""
    return tuple(size if isinstance(size, int) else int(getattr(manifest.dynamic_dims[size], bound)) for size in shape)


def _dtype_name(dtype: Any) -> str:
    return TENSORRT_TYPES.get(dtype.name, str(dtype.name).lower())


@dataclass(frozen=True)
class Polygraphy:
    """What we use of Polygraphy."""

    read_network: Callable[..., Any]
    build: Callable[..., Any]
    config_class: Callable[..., Any]
    profile_class: Callable[..., Any]
    error: type[Exception]


def polygraphy_for(kind: EngineKind) -> Polygraphy:
    """Polygraphy on one flavour of TensorRT.

    Its TensorRT modules bind themselves to a flavour when they are imported, so one process cannot use both.

    Raises:
        ExportError: this process has used the other flavour.
        MissingExtraError: it is not installed.
    """
    try:
        from polygraphy import config

        if "polygraphy.backend.trt" not in sys.modules:
            config.USE_TENSORRT_RTX = kind is RTX
        from polygraphy.backend import tensorrt_rtx, trt
        from polygraphy.exception import PolygraphyException
    except ImportError as error:
        raise MissingExtraError("polygraphy", kind.extra) from error
    if bool(config.USE_TENSORRT_RTX) is not (kind is RTX):
        raise ExportError("this process has built engines of another kind already: build each kind in its own")
    return Polygraphy(
        trt.network_from_onnx_path,
        trt.engine_bytes_from_network,
        tensorrt_rtx.CreateConfigRTX if kind is RTX else trt.CreateConfig,
        trt.Profile,
        PolygraphyException,
    )


TENSORRT_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
