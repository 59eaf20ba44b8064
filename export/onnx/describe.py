"""What the manifest says of an export: its forms with their inputs and outputs, the cache, the call they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch

from ...capture.rewrite import Forms, write_form
from ...engine.engine import flat_inputs
from ...engine.manifest import CacheSpec, DynamicDim, FormSpec, Manifest, PlanSpec, TensorSpec, WeightsSpec
from ...errors import ExportError
from ...passes.analysis.flops import graph_flops
from ...passes.ir.cache import CacheEntry
from ...passes.ir.form import Form
from ...provenance import __version__
from ..lowering.pipeline import Lowered, lower
from ..model.options import ExportOptions
from ..model.source import Source, describe_model
from . import dynamic

PLAN_FILE = "plan.hetplan"
PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Described:
    """The forms of an export, lowered, and what the manifest says of them."""

    lowered: dict[str, Lowered]
    specs: dict[str, FormSpec]
    cache: tuple[CacheSpec, ...]


def describe(source: Source, forms: Forms, options: ExportOptions) -> tuple[dict[str, Lowered], Manifest]:
    """The lowered forms, and their manifest but for hashes and weights.

    Raises:
        ExportError: a size that cannot be free, or a call that no manifest can hold.
    """
    plan = forms.plan
    described = lower_forms(forms, forms.by_kind, options)
    dims: dict[str, DynamicDim] = {}
    if options.dynamic_active:
        dims = dynamic.dynamic_dims(plan, options.dynamic_active)
        described = with_free_sizes(described, forms, options, dims)
    steps = "".join(kind.letter for kind in plan.steps)
    sizes = plan.num_active, plan.num_context, plan.num_merged
    manifest = Manifest(
        model=describe_model(source.model),
        plan=PlanSpec(PLAN_FILE, plan.grid, plan.num_tokens, *sizes, steps),
        dtype=options.dtype,
        opset=options.actual_opset,
        versions=versions(),
        latents=forms.analysis.token_sources,
        constants=constants_of(forms, source.kwargs),
        unused=unused_inputs(forms, source.kwargs, described.specs),
        dynamic_dims=dims,
        partial_flops=partial_flops(forms, options.dynamic_active),
        forms=described.specs,
        cache=described.cache,
        layers=layers_of(forms.cache_entries),
        weights=WeightsSpec("", 0, "", {}),
    )
    return described.lowered, manifest


def lower_forms(forms: Forms, by_kind: Mapping[str, Form], options: ExportOptions) -> Described:
    """Every form to export, lowered, and what the manifest says of it."""
    to_export = dict(by_kind)
    if options.baseline:
        to_export["plain"] = Form("plain", forms.program.module, (), (), ())
    lowered = {kind: lower(form, forms.program, options.actual_opset) for kind, form in to_export.items()}
    specs = {
        kind: FormSpec(f"{kind}.onnx", "", graph_flops(form.module), *io_of(form, lowered[kind]))
        for kind, form in to_export.items()
    }
    return Described(lowered, specs, tuple(map(cache_spec, by_kind["full"].writes)))


def with_free_sizes(
    described: Described, forms: Forms, options: ExportOptions, dims: Mapping[str, DynamicDim]
) -> Described:
    """The same forms, changed in place where a size depends on one of `dims`: lowered again for other budgets, they
    show where that is.

    Raises:
        ExportError: a size that cannot be free.
    """
    other_options = forms.plan.form_options.at(dynamic.second_budgets(forms.plan.budgets, dims))
    by_kind = {
        kind: write_form(kind, forms.program, forms.analysis, forms.plan, other_options) for kind in forms.by_kind
    }
    others = lower_forms(forms, by_kind, options)
    specs = {}
    for kind, spec in described.specs.items():
        dynamic.free_sizes(described.lowered[kind], others.lowered[kind])
        other = others.specs[kind]
        inputs = dynamic.named_dims(spec.inputs, other.inputs, dims)
        outputs = dynamic.named_dims(spec.outputs, other.outputs, dims)
        specs[kind] = replace(spec, inputs=inputs, outputs=outputs)
    return Described(described.lowered, specs, dynamic.named_dims(described.cache, others.cache, dims))


def io_of(form: Form, lowered: Lowered) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a form, in order."""
    nodes = [n for n in lowered.module.graph.nodes if n.op == "placeholder" and n.name not in lowered.weights]
    cached = {entry.input_name for entry in form.reads} | {entry.output_name for entry in form.writes}
    results: Any = lowered.module.graph.output_node().args[0]

    def spec(name: str, value: torch.Tensor) -> TensorSpec:
        role = "cache" if name in cached else "index" if name in form.indices else "model"
        return TensorSpec(name, dtype_name(value.dtype), tuple(value.shape), role)

    return (
        tuple(spec(name, node.meta["val"]) for name, node in zip(lowered.inputs, nodes, strict=True)),
        tuple(spec(name, node.meta["val"]) for name, node in zip(lowered.outputs, results, strict=True)),
    )


def cache_spec(entry: CacheEntry) -> CacheSpec:
    """The manifest's words for a cache entry."""
    return CacheSpec(
        entry.input_name, entry.output_name, dtype_name(entry.dtype), entry.shape, entry.module, entry.initial
    )


def layers_of(entries: Sequence[CacheEntry]) -> dict[str, str]:
    """Module path by layer number: the first part of an entry's name (`3` of `3.key`)."""
    numbered = {entry.name.split(".")[0]: entry.module for entry in entries if entry.group == "key_values"}
    return {number: module for number, module in numbered.items() if number.isdecimal()}  # no times of all layers


def constants_of(forms: Forms, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a call that the graphs take for granted, by flat name.

    Raises:
        ExportError: a value that JSON cannot hold, or names that are not those of the graph's inputs.
    """
    flat = flat_inputs(kwargs)
    if flat.keys() != set(forms.program.inputs):
        odd = ", ".join(flat.keys() ^ set(forms.program.inputs))
        raise ExportError(f"the inputs {odd} have other names in the graph: rename them in the model")
    python = {name: value for name, value in flat.items() if not isinstance(value, torch.Tensor)}
    for name, value in python.items():
        if not isinstance(value, bool | int | float | str | None):
            raise ExportError(f"the call has a {type(value).__name__} as {name}, which a manifest cannot hold")
    return python | {name: value.tolist() for name, value in forms.program.assumed.items()}


def unused_inputs(forms: Forms, kwargs: Mapping[str, Any], specs: Mapping[str, FormSpec]) -> tuple[str, ...]:
    """Tensors of a call that no form takes, by flat name."""
    taken = {spec.name for form in specs.values() for spec in form.inputs}
    tensors = (name for name, value in flat_inputs(kwargs).items() if isinstance(value, torch.Tensor))
    return tuple(name for name in tensors if name not in taken)


def partial_flops(forms: Forms, active: tuple[int, int, int] | None) -> dict[str, int]:
    """FLOPs of a partial step at each of these M, by M."""
    flops = {}
    for size in active or ():
        sized = forms.plan.form_options.at(dynamic.budgets_at(forms.plan, size))
        form = write_form("partial", forms.program, forms.analysis, forms.plan, sized)
        flops[str(size)] = graph_flops(form.module)
    return flops


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Versions of this package and of those that wrote the files."""
    found = {"hetcache_compile": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
