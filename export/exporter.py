"""`export_model`: a model and a plan to a folder of ONNX files, weights, manifest and engines, all or nothing."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..engine.engine import BUDGETS, flat_inputs
from ..engine.manifest import MANIFEST_FILE, CacheSpec, FormSpec, Manifest, PlanSpec, TensorSpec, WeightsSpec
from ..errors import (
    ExportError,
    MissingExtraError,
    NotEnoughMemoryError,
    Refusal,
    UnsupportedGraphError,
    is_out_of_memory,
)
from ..passes.analysis.flops import graph_flops
from ..passes.analysis.inputs import TokenInputs
from ..passes.ir.cache import CacheEntry
from ..passes.ir.form import Form
from ..runtime.rewrite import Forms, rewrite, write_form
from .lowering.lower import FIRST_FUSED_OPSET, Lowered, lower
from .model.sample_call import REMEDY, CallShape
from .model.source import Source, describe_model, load_source
from .onnx import dynamic

if TYPE_CHECKING:
    from ..plan.plan import Plan

PLAN_FILE = "plan.hetplan"
PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy")
Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: fp32, fp16 or bf16.
        opset: 20 or later; None chooses 20, or 23 for bf16, which older opsets lack.
        baseline: export the unmodified model too, to measure against.
        dynamic_active: smallest, usual and largest M, or None for the plan's M only.
    """

    dtype: str = "fp32"
    opset: int | None = None
    baseline: bool = True
    dynamic_active: tuple[int, int, int] | None = None

    @property
    def actual_opset(self) -> int:
        """The opset, chosen by the type where it is not given."""
        return self.opset or (FIRST_FUSED_OPSET if self.dtype == "bf16" else 20)

    def check(self, plan: Plan) -> None:
        """Raise `ExportError` for what ONNX cannot express, and what engines cannot do."""
        if plan.selects_at_run_time:
            raise ExportError(
                f"engines keep their active tokens: make the plan with selection=uniform, not {plan.selection}"
            )
        if self.dynamic_active and plan.num_merged < plan.num_context:
            raise ExportError("--dynamic-active needs all cached tokens: make the plan with merged_ratio=1")
        if not 20 <= self.actual_opset <= 25:
            raise ExportError(f"opset must be from 20 to 25, got {self.opset}")
        if self.dtype == "bf16" and self.actual_opset < FIRST_FUSED_OPSET:
            raise ExportError(f"bf16 needs opset {FIRST_FUSED_OPSET} or later: leave --opset at auto")


def export_model(
    model: str,
    plan: Plan,
    out: Path,
    options: ExportOptions | None = None,
    *,
    shape: CallShape | None = None,
    component: str = "transformer",
    call: Path | None = None,
    token_inputs: TokenInputs | None = None,
    checks: Sequence[Callable[[Path, Manifest, Source, Forms, Progress], Manifest]] = (),
    finish: Sequence[Callable[..., Manifest]] = (),
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Export a model for a plan.

    Args:
        model: see `source.load_source`.
        plan: grid, budgets, indices and steps.
        out: the folder to write. An older export there is replaced; anything else is left alone.
        options: how to export.
        shape: batch and text length of the calls.
        component: which of a pipeline's models.
        call: a recorded call (see `sample_call.read_call`); by default one is made up.
        token_inputs: see `hetcache_compile.rewrite`.
        checks: each gets the folder, the manifest so far, the model, its forms and `progress`, and returns the
            manifest.
        finish: what else to put into the folder (engines) before it appears; each gets the folder, the manifest so
            far and `progress=`, and returns the manifest. The model is out of memory by then.
        progress: called before each part.

    Raises:
        ExportError: wrong options, nothing to export, or `out` is in use.
        UnsupportedGraphError: the model cannot be rewritten.
        GridMismatchError: the plan is for another grid.
        NotEnoughMemoryError: in whatever library memory ran out.
    """
    options = options or ExportOptions()
    options.check(plan)
    require_onnx()
    with _memory_errors(progress) as progress, new_folder(out) as folder:
        progress("loading the model", 0, 1)
        source = load_source(model, shape or CallShape(plan), options.dtype, component, call)
        progress("rewriting", 0, 1)
        forms = rewrite_source(source, plan, token_inputs)
        manifest = write_onnx(folder, source, forms, options, progress)
        for check in checks:
            manifest = check(folder, manifest, source, forms, progress)
        del source, forms
        gc.collect()
        for step in finish:
            manifest = step(folder, manifest, progress=progress)
        (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest


def rewrite_source(source: Source, plan: Plan, token_inputs: TokenInputs | None = None) -> Forms:
    """The forms of a model; where its call was made up, an error says that this may be the reason."""
    try:
        return rewrite(source.model, plan, kwargs=source.kwargs, token_inputs=token_inputs)
    except UnsupportedGraphError as error:
        if not source.made_up:
            raise
        names = ", ".join(source.kwargs)
        hint = f"the sample call ({names}) was made up from the model's config: if it is not how the model is called"
        raise UnsupportedGraphError([*error.reasons, Refusal(hint, help=REMEDY)]) from error


def write_onnx(
    folder: Path, source: Source, forms: Forms, options: ExportOptions, progress: Progress = lambda *_: None
) -> Manifest:
    """ONNX files, weights, sample inputs, plan and Triton configurations; the manifest is returned, not written."""
    from .check.samples import write_samples
    from .onnx.files import save_forms
    from .serving import write_triton

    described = describe(source, forms, options)
    manifest = save_forms(folder, *described, progress)
    forms.plan.save(folder / PLAN_FILE)
    tensors = sample_tensors(forms, source.kwargs)
    for kind, form in manifest.forms.items():
        write_samples(folder, kind, form, tensors)
    write_triton(folder, manifest)
    return manifest


def describe(source: Source, forms: Forms, options: ExportOptions) -> tuple[dict[str, Lowered], Manifest]:
    """The lowered forms, and their manifest but for hashes and weights."""
    lowered, specs = lower_forms(forms, forms.by_kind, options)
    cache = tuple(map(cache_spec, forms.cache_entries))
    dims = {}
    if options.dynamic_active:
        dims = dynamic.dynamic_dims(forms.plan, options.dynamic_active)
        options = forms.plan.form_options.at(dynamic.second_budgets(forms.plan.budgets, dims))
        by_kind = {kind: write_form(kind, forms.program, forms.analysis, forms.plan, options) for kind in forms.by_kind}
        others, other_specs = lower_forms(forms, by_kind, options)
        for kind, form in lowered.items():
            dynamic.free_sizes(form, others[kind])
            mine, other = specs[kind], other_specs[kind]
            inputs = dynamic.named_dims(mine.inputs, other.inputs, dims)
            outputs = dynamic.named_dims(mine.outputs, other.outputs, dims)
            specs[kind] = replace(mine, inputs=inputs, outputs=outputs)
        cache = dynamic.named_cache(cache, tuple(map(cache_spec, by_kind["full"].writes)), dims)
    plan = forms.plan
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
        unused=unused_inputs(forms, source.kwargs, specs),
        dynamic_dims=dims,
        partial_flops=partial_flops(forms, options.dynamic_active),
        forms=specs,
        cache=cache,
        layers=layers_of(forms.cache_entries),
        weights=WeightsSpec("", 0, "", {}),
    )
    return lowered, manifest


def lower_forms(
    forms: Forms, by_kind: Mapping[str, Form], options: ExportOptions
) -> tuple[dict[str, Lowered], dict[str, FormSpec]]:
    """Every form to export, lowered, and what the manifest says of it."""
    to_export = dict(by_kind)
    if options.baseline:
        to_export["plain"] = Form("plain", forms.program.module, (), (), ())
    lowered = {kind: lower(form, forms.program, options.actual_opset) for kind, form in to_export.items()}
    specs = {
        kind: FormSpec(f"{kind}.onnx", "", graph_flops(form.module), *io_of(form, lowered[kind]))
        for kind, form in to_export.items()
    }
    return lowered, specs


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


def sample_tensors(forms: Forms, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's inputs and the plan's indices, by name."""
    placeholders = [n.name for n in forms.program.module.graph.nodes if n.op == "placeholder"]
    values = forms.program.flat_inputs((), kwargs)
    tensors = {
        name: value
        for name, value in zip(placeholders, values, strict=True)
        if name in forms.program.inputs and isinstance(value, torch.Tensor)
    }
    indices = dict.fromkeys((*BUDGETS.values(), *(name for form in forms.by_kind.values() for name in form.indices)))
    return tensors | {name: torch.as_tensor(getattr(forms.plan, name)) for name in indices}


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


def require_onnx() -> None:
    """Raise `MissingExtraError` if the packages that write ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "ort") from error


@contextmanager
def _memory_errors(progress: Progress) -> Iterator[Progress]:
    """Say in which stage memory ran out, and what needs less of it; `progress`, listened to."""
    stages = [""]

    def listen(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        progress(stage, done, total)

    try:
        yield listen
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"not enough memory for {stages[-1] or 'the export'}: less is needed with --dtype fp16 or bf16, with "
            "--no-baseline, without --trt, and with --verify none"
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at the end, if nothing went wrong.

    Raises:
        ExportError: `out` holds something that is no export.
    """
    if out.exists() and not ((out / MANIFEST_FILE).is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise ExportError(f"{out} exists and is no earlier export: choose another --out, or remove it")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.exists():
            # A folder with files in it cannot be renamed over: move the old one away first.
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
            os.replace(out, old / out.name)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
