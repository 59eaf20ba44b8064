"""Does an exported folder compute what torch computes? Every form, every output, every cache tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from ...capture.rewrite import Forms
from ...engine.engine import Engine
from ...engine.manifest import Manifest
from ...engine.runners import OrtRunner
from ...errors import ExportError
from ...passes.forms.merge import LOG_SIZE
from ...plan.schedule import StepKind
from ..model.options import Progress
from ..model.sample_inputs import sample_tensors, write_samples
from ..model.source import Source

TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference to torch, relative to the largest value of a tensor. Half precision differs by rounding order."""

AGREEING = {"fp32": 1.0, "fp16": 0.95, "bf16": 0.95}
"""The share of the centroids of K-means that must agree. In fp16, up to 2 % of the reference model's do not."""
CENTROID_DIMS = {"key": -2, "value": -2, LOG_SIZE: -1}
"""Which dim counts centroids, in the entries of an attention that draws its own clusters."""

ROUNDED = {torch.int8: 1.5 / 127, torch.bfloat16: 2.0**-7}
"""The same for keys and values that are rounded to be cached: a step, since rounding may fall to the other side."""

CHAIN = (StepKind.FULL, StepKind.PARTIAL, StepKind.PARTIAL, StepKind.REUSE)
"""Two PARTIAL steps, so that one of them reads what the other wrote."""


def verify_with_ort(
    folder: Path,
    manifest: Manifest,
    source: Source,
    forms: Forms,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Run every form on onnxruntime's CPU and in torch, on the same inputs and caches; keep the caches as samples.

    Raises:
        ExportError: a tensor differs by more than the type's tolerance.
        EngineError: onnxruntime cannot run a form (its CPU provider has no bf16).
    """
    engine = Engine(manifest, OrtRunner(folder, manifest, "ort-cpu"), forms.plan)
    tensors = sample_tensors(forms, source.kwargs)
    indices = {name: tensors[name] for name in engine.indices}
    inputs = {name: tensor for name, tensor in tensors.items() if name not in indices}
    errors: dict[str, float] = {}
    expected: dict[str, torch.Tensor] = {}
    cache = engine.begin(indices)
    for number, kind in enumerate(CHAIN):
        progress("checking with onnxruntime", number, len(CHAIN) + 1)
        with torch.no_grad():
            output, expected = forms.run(kind.form, expected, (), source.kwargs)
        write_samples(folder, kind.form, manifest.forms[kind.form], {**tensors, **expected})
        outputs, written = engine.run_form(kind.form, inputs, indices, cache)
        cache.update(written)
        wanted = dict(zip(outputs, pytree.tree_leaves(output), strict=True))
        agreeing = AGREEING[manifest.dtype]
        found = relative_errors({**outputs, **written}, {**wanted, **expected}, agreeing)
        rounded = {
            name: TOLERANCES[manifest.dtype] + ROUNDED[tensor.dtype]
            for name, tensor in written.items()
            if _is_rounded(tensor, engine.dtype)
        }
        check({f"{kind.form}.onnx, {name},": (found.pop(name), allowed) for name, allowed in rounded.items()})
        drawn = agreeing < 1 and any(name.endswith(f".{LOG_SIZE}") for name in written)
        if rounded or drawn:
            expected.update(written)  # other numbers, other outputs: both sides go on from one cache
        errors[kind.form] = max(*found.values(), errors.get(kind.form, 0.0))
    if "plain" in manifest.forms:
        with torch.no_grad():
            output = source.model(**source.kwargs)
        outputs, _ = engine.run_form("plain", inputs, indices, {})
        wanted = dict(zip(outputs, pytree.tree_leaves(output), strict=True))
        errors["plain"] = max(relative_errors(outputs, wanted).values())
    progress("checking with onnxruntime", len(CHAIN) + 1, len(CHAIN) + 1)
    check({f"{name}.onnx": (error, TOLERANCES[manifest.dtype]) for name, error in errors.items()})
    return replace(manifest, verified={**manifest.verified, "ort-cpu": errors})


def _is_rounded(tensor: torch.Tensor, computed_in: torch.dtype) -> bool:
    return tensor.dtype in ROUNDED and tensor.dtype != computed_in


def check(errors: Mapping[str, tuple[float, float]]) -> None:
    """Raise `ExportError` where an error is larger than what is allowed for it."""
    for name, (error, allowed) in errors.items():
        if not error <= allowed:
            raise ExportError(
                f"{name} differs from torch by {error:.1e} relative, more than {allowed:.1e}: this is a bug of the "
                "exporter, or the model overflows in this type"
            )


def relative_errors(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], agreeing: float = 1.0
) -> dict[str, float]:
    """Largest difference of each tensor of `actual`, relative to the largest value that was expected.

    Of the centroids of K-means, what a share `agreeing` of them keeps within: in half precision, rounding decides where
    a key goes that lies between two.
    """
    errors = {}
    for name, tensor in actual.items():
        wanted = expected[name].to(torch.float32).cpu()
        difference = (tensor.to(torch.float32).cpu() - wanted).abs()
        if not difference.numel():
            errors[name] = 0.0
            continue
        prefix, _, role = name.removesuffix(".scale").removesuffix(".1").rpartition(".")
        if f"{prefix}.{LOG_SIZE}" in actual and role in CENTROID_DIMS:
            centroids = difference.movedim(CENTROID_DIMS[role], 0).flatten(1).amax(1)
            largest = centroids.quantile(agreeing, interpolation="lower")
        else:
            largest = difference.max()
        error = float(largest / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        errors[name] = error if isfinite(error) else inf  # no number is less than another: `max` would lose it
    return errors
