"""One edit, run several ways through the same unmodified pipeline, timed and compared."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.engine import Engine
from ..errors import InputFileError, PlanError
from ..pipelines.planning import plan_for
from ..plan.partition import to_token_grid
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..runtime.backend import hetcache_backend
from ..runtime.session import session
from ..runtime.stats import Stats
from ..runtime.timing import Stopwatch
from .media import GREY, Frames, Playback, to_frames, to_pictures

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, step, steps)`."""


@dataclass(frozen=True)
class EditRequest:
    """What to edit, and how: the arguments of one pipeline call.

    The model sees grey inside the mask, which tells WanVACE to inpaint; with `keep_masked` it sees the video there. The
    result is shown as `playback` says.
    """

    video: Frames
    mask: NDArray[np.bool_]
    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    max_sequence_length: int = 512
    seed: int = 0
    keep_masked: bool = False
    playback: Playback = field(default_factory=Playback)

    @property
    def visible_video(self) -> Frames:
        """What the model gets to see."""
        return self.video if self.keep_masked else np.where(self.mask[..., None], GREY, self.video)

    @property
    def size(self) -> dict[str, int]:
        """Height, width and number of frames, by diffusers' names."""
        frames, height, width = self.mask.shape
        return {"height": height, "width": width, "num_frames": frames}


@dataclass(frozen=True)
class Run:
    """One way of running the edit. `frames` is None where only the time was asked for.

    `stats` is that of a session. It counts nothing where the graph was refused and ran plainly.
    """

    frames: Frames | None
    seconds: list[float]
    stats: Stats | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds in the transformers over all calls, from the median call of each step kind.

        The medians keep one hiccup of the machine from deciding a comparison.
        """
        if not self.stats or not self.stats.kinds:
            return len(self.seconds) * median(self.seconds)
        return sum(self.stats.steps[kind] * seconds for kind, seconds in self.median_seconds.items())

    @property
    def median_seconds(self) -> dict[str, float]:
        """Median seconds of a model call by step kind, everything between call and return included."""
        if not self.stats or not self.stats.kinds:
            return {StepKind.FULL.name: median(self.seconds)}
        by_kind: dict[str, list[float]] = {}
        for kind, seconds in zip(self.stats.kinds, self.seconds, strict=True):
            by_kind.setdefault(kind.name, []).append(seconds)
        return {kind.name: median(by_kind[kind.name]) for kind in StepKind if kind.name in by_kind}


def load_pipeline(folder: Path, dtype: torch.dtype, device: str, **components: Any) -> Any:
    """A local diffusers checkpoint that edits masked video. `components` replace its own, as in `from_pretrained`.

    Raises:
        InputFileError: no checkpoint there, or its pipeline takes no video and mask.
    """
    import diffusers
    import transformers

    if not (folder / "model_index.json").is_file():
        raise InputFileError(f"{folder} is no diffusers checkpoint: it has no model_index.json")
    _import_own_classes(folder / "model_index.json")
    try:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        with quiet_logging(diffusers.utils.logging):  # it warns of any codec that is not Wan's own class
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)
    except (OSError, ValueError, ImportError) as error:
        raise InputFileError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    parameters = inspect.signature(pipe.__call__).parameters
    missing = [name for name in ("video", "mask", "num_frames") if name not in parameters]
    if missing:
        raise InputFileError(f"{type(pipe).__name__} takes no {' and no '.join(missing)}: it edits no masked video")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _import_own_classes(index: Path) -> None:
    """Import the modules of this package that a checkpoint names: diffusers loads custom classes only from modules that
    were imported before."""
    package = __name__.partition(".")[0]
    for part in json.loads(index.read_text()).values():
        if isinstance(part, list) and str(part[0]).startswith(f"{package}."):
            importlib.import_module(part[0])


@contextmanager
def quiet_logging(logging: Any) -> Iterator[None]:
    """Only errors from a library's own logging module."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def make_plan(pipe: Any, request: EditRequest, schedule: str | None, **partition: Any) -> Plan:
    """The plan for a request."""
    return plan_for(
        pipe,
        mask=request.mask,
        num_inference_steps=request.num_inference_steps,
        schedule=schedule,
        **{**partition, **request.size},
    )


def check_plan(plan: Plan, pipe: Any, request: EditRequest) -> None:
    """See that a plan is one for this request.

    Raises:
        PlanError: it is for another token grid, or tokens that the mask covers are not active in it.
    """
    model = pipe.transformer_2 if pipe.transformer is None else pipe.transformer
    patch, rows, columns = model.config.patch_size  # not by `plan_for`, which asks a model more than an engine knows
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    frames, height, width = request.mask.shape
    grid = ((frames - 1) // temporal + 1) // patch, height // (spatial * rows), width // (spatial * columns)
    if grid != plan.grid:
        raise PlanError(f"the plan is for the token grid {plan.grid}, and this edit has {grid}: make another plan")
    masked = to_token_grid(request.mask, grid, temporal_factor=temporal, temporal_patch=patch).ravel()
    if missing := int((masked & ~plan.active_mask).sum()):
        raise PlanError(
            f"the plan is for another mask: {missing} of the {masked.sum()} tokens in this one are not active in it; "
            "make a plan with this mask"
        )


def run_eager(pipe: Any, request: EditRequest, progress: Progress) -> Run:
    """The pipeline as it is, for its time only."""
    return run_pipeline(pipe, request, "eager", progress, decode=False)


def run_compiled(pipe: Any, request: EditRequest, inner: str, progress: Progress) -> Run:
    """The same model compiled without us: the uncached result."""
    with compiled(pipe, backend=inner):
        warm_up(pipe, request, None, progress)
        return run_pipeline(pipe, request, "uncached", progress)


def run_hetcache(pipe: Any, request: EditRequest, plan: Plan, inner: str, progress: Progress) -> Run:
    """The model compiled with `hetcache_backend`, following the plan."""
    with compiled(pipe, backend=hetcache_backend, options={"inner": inner}):
        compile_seconds = warm_up(pipe, request, plan, progress)
        run = run_planned(pipe, request, plan, "hetcache", progress)
        assert run.stats is not None
        run.stats.compile_seconds += compile_seconds
        return run


def warm_up(pipe: Any, request: EditRequest, plan: Plan | None, progress: Progress) -> float:
    """Compile what a compiled pipeline will need, so that no compilation is timed.

    One step of each kind that the plan has, or of the plain model where there is no plan. Returns the seconds that
    making the plan's forms took.
    """
    if plan is None:
        run_pipeline(pipe, _short(request, 1), "compiling the plain model", progress, decode=False)
        return 0.0
    kinds = tuple(kind for kind in StepKind if kind in plan.steps)
    with session(plan.with_steps(kinds)) as opened:
        run_pipeline(pipe, _short(request, len(kinds)), "compiling the forms", progress, decode=False)
    return opened.stats.compile_seconds


def run_planned(pipe: Any, request: EditRequest, plan: Plan, stage: str, progress: Progress) -> Run:
    """One edit that follows the plan, on a pipeline compiled with `hetcache_backend`."""
    with session(plan) as opened:
        run = run_pipeline(pipe, request, stage, progress)
    return replace(run, stats=opened.stats)


def load_engine_pipeline(folder: Path, engine: Engine) -> Any:
    """A checkpoint whose transformer is an engine; the weights of its own transformer are not read."""
    pipe = load_pipeline(folder, engine.dtype, engine.device.type, transformer=None)
    pipe.transformer = engine
    return pipe


def run_pipeline(
    pipe: Any,
    request: EditRequest,
    stage: str,
    progress: Progress,
    *,
    decode: bool = True,
    latents: list[torch.Tensor] | None = None,
) -> Run:
    """One edit with the pipeline as it stands; without `decode` for its time only.

    A list `latents` gets those after each step.
    """

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(stage, step + 1, request.num_inference_steps)
        if latents is not None:
            latents.append(tensors["latents"].detach().clone())
        return tensors

    progress(stage, 0, request.num_inference_steps)
    output_type = "np" if decode else "latent"
    with _timed_calls(pipe) as watches:
        frames = pipe(**call_arguments(request), output_type=output_type, callback_on_step_end=after_step).frames
    return Run(to_frames(frames[0]) if decode else None, [watch.seconds for watch in watches])


def call_arguments(request: EditRequest) -> dict[str, Any]:
    """The arguments of the pipeline's call, but for what becomes of the result."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "video": to_pictures(request.visible_video),
        "mask": to_pictures(request.mask),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "max_sequence_length": request.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        **request.size,
    }


@contextmanager
def compiled(pipe: Any, **options: Any) -> Iterator[None]:
    """The pipeline with its transformers compiled; they are put back afterwards."""
    names = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]
    plain = {name: getattr(pipe, name) for name in names}
    try:
        for name, model in plain.items():
            setattr(pipe, name, torch.compile(model, **options))
        yield
    finally:
        for name, model in plain.items():
            setattr(pipe, name, model)
        torch._dynamo.reset()


@contextmanager
def _timed_calls(pipe: Any) -> Iterator[list[Stopwatch]]:
    """Time every call of the pipeline's transformers, whichever way they are compiled."""
    watches: list[Stopwatch] = []
    started: list[Stopwatch] = []
    handles = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is not None:
            device = model.device
            handles += [
                model.register_forward_pre_hook(lambda *_, d=device: started.append(Stopwatch(d))),
                model.register_forward_hook(lambda *_: watches.append(started.pop().stop())),
            ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()


def _short(request: EditRequest, steps: int) -> EditRequest:
    return replace(request, num_inference_steps=steps)
