"""`export_model`: a model and a plan to a folder of ONNX files, weights, manifest and engines, all or nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..capture.rewrite import Forms
from ..engine.manifest import MANIFEST_FILE, Manifest
from ..errors import ExportError, MissingExtraError, NotEnoughMemoryError, is_out_of_memory
from ..passes.analysis.inputs import TokenInputs
from ..plan.plan import Plan
from .model.options import ExportOptions, Progress
from .model.sample_call import CallShape
from .model.sample_inputs import sample_tensors, write_samples
from .model.source import Source, load_source, rewrite_source
from .onnx.describe import PLAN_FILE, describe
from .onnx.folder import new_folder
from .serving import write_triton

__all__ = ["ExportOptions", "export_model"]

Check = Callable[[Path, Manifest, Source, Forms, Progress], Manifest]
"""Called as `check(folder, manifest, source, forms, progress)`; returns the manifest with what it found."""
Finish = Callable[..., Manifest]
"""Called as `finish(folder, manifest, progress=...)`; returns the manifest with what it put into the folder."""


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
    checks: Sequence[Check] = (),
    finish: Sequence[Finish] = (),
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
        checks: what to try on the written files while the model is in memory.
        finish: what else to put into the folder (engines) before it appears. The model is out of memory by then.
        progress: called before each part.

    Raises:
        ExportError: wrong options, nothing to export, or `out` is in use.
        UnsupportedGraphError: the model cannot be rewritten.
        GridMismatchError: the plan is for another grid.
        NotEnoughMemoryError: in whatever library memory ran out.
    """
    options = options or ExportOptions()
    options.check(plan)
    if plan.cache_dtype == "fp8":
        raise ExportError(
            "a cache in fp8 cannot be exported, since onnxruntime's CPU provider has no arithmetic to check it with: "
            "make the plan with cache_dtype=int8, which takes as many bytes"
        )
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


def write_onnx(
    folder: Path, source: Source, forms: Forms, options: ExportOptions, progress: Progress = lambda *_: None
) -> Manifest:
    """ONNX files, weights, sample inputs, plan and Triton configurations; the manifest is returned, not written."""
    from .onnx.files import save_forms  # needs the extra `ort`, which `require_onnx` asks for

    lowered, manifest = describe(source, forms, options)
    manifest = save_forms(folder, lowered, manifest, progress)
    forms.plan.save(folder / PLAN_FILE)
    tensors = sample_tensors(forms, source.kwargs)
    for kind, form in manifest.forms.items():
        write_samples(folder, kind, form, tensors)
    write_triton(folder, manifest)
    return manifest


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
