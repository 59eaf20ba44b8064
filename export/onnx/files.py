"""Write and check the ONNX files of a folder, one form at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from ...engine.manifest import FormSpec, Manifest, TensorSpec, WeightsSpec, sha256_of
from ...errors import ExportError
from ..lowering.pipeline import Lowered
from ..model.options import Progress
from .to_onnx import to_onnx
from .weights import WEIGHTS_FILE, WeightsFile


def save_forms(folder: Path, lowered: Mapping[str, Lowered], manifest: Manifest, progress: Progress) -> Manifest:
    """Write every form and the weights they share; the manifest with their hashes."""
    specs: dict[str, FormSpec] = {}
    with WeightsFile(folder / WEIGHTS_FILE) as weights:
        for number, (kind, form) in enumerate(lowered.items()):
            progress("writing ONNX", number, len(lowered))
            spec = manifest.forms[kind]
            model = to_onnx(form, spec, manifest.opset, {**manifest_summary(manifest), "hetcache.form": kind})
            weights.move_out(model, set(form.names.values()))
            ir.save(model, folder / spec.file)
            del model
            gc.collect()
            specs[kind] = replace(spec, sha256=sha256_of(folder / spec.file))
    progress("writing ONNX", len(lowered), len(lowered))
    for spec in specs.values():
        check_file(folder / spec.file, spec)
    path = folder / WEIGHTS_FILE
    stored = WeightsSpec(WEIGHTS_FILE, path.stat().st_size, sha256_of(path), dict(weights.tensors))
    return replace(manifest, forms=specs, weights=stored)


def manifest_summary(manifest: Manifest) -> dict[str, str]:
    """What every ONNX file says about itself: enough to use it without the manifest beside it."""
    return {
        "hetcache.version": manifest.versions["hetcache_compile"],
        "hetcache.model": manifest.model.class_name,
        "hetcache.model_config_sha256": manifest.model.config_sha256,
        "hetcache.plan": json.dumps({"grid": manifest.plan.grid, "num_active": manifest.plan.num_active,
                                     "num_context": manifest.plan.num_context}),
        "hetcache.cache": json.dumps({entry.output: entry.input for entry in manifest.cache}),
        "hetcache.layers": json.dumps(manifest.layers),
    }  # fmt: skip


def check_file(path: Path, spec: FormSpec) -> None:
    """Checker and shape inference over the whole file, and inputs and outputs as the manifest says.

    Raises:
        ExportError: the file is not valid, which is a bug of the exporter.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is no valid ONNX file: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    found = [(value_spec(value), "input") for value in graph.input] + [(value_spec(v), "output") for v in graph.output]
    expected = [(s, "input") for s in spec.inputs] + [(s, "output") for s in spec.outputs]
    if [(f.name, f.dtype, f.shape, place) for f, place in found] != [
        (s.name, s.dtype, s.shape, place) for s, place in expected
    ]:
        raise ExportError(f"{path.name} has other inputs and outputs than the form it was made from")


def value_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """An input or output as ONNX declares it."""
    kind = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorSpec(value.name, dtype, shape, "")
