"""One edit, run several ways through the same unmodified pipeline, timed and compared."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Resampling

from ..engine.engine import Engine
from ..errors import InputFileError, PlanError
from ..pipelines.call import planned_call
from ..pipelines.inputs import MASKS, Inputs
from ..pipelines.observe import models_of
from ..pipelines.planning import plan_for
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..runtime.backend import hetcache_backend
from ..sessions.session import session
from ..sessions.stats import Stats, Stopwatch
from .media import GREY, Frames, Playback, to_frames, to_pictures

STRENGTHS = ("strength", "denoise_strength")
"""Arguments that leave out the first steps: a strength of 0.6 leaves 0.6 of them."""
Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, step, steps)`."""


@dataclass(frozen=True)
class EditRequest:
    """What to edit, and how: the arguments of one pipeline call.

    Where an argument is None, the pipeline's own default holds.

    Attributes:
        video: uint8 `[T, H, W, 3]`; one frame, or `T` like it, where a picture is edited.
        mask: bool `[T, H, W]`, true where to generate.
        prompt: what to generate; not given to the pipeline if `call` has it encoded (`prompt_embeds`).
        still: whether a picture is edited, and not a video.
        keep_masked: a pipeline that generates where its video is grey, such as WanVACE, sees what the video has there.
        playback: how the result is shown.
        call: other arguments of the call, by name.
    """

    video: Frames
    mask: NDArray[np.bool_]
    prompt: str
    negative_prompt: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    seed: int = 0
    still: bool = False
    keep_masked: bool = False
    playback: Playback = field(default_factory=Playback)
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> dict[str, int]:
        """Height, width and number of frames, by diffusers' names."""
        frames, height, width = self.mask.shape
        return {"height": height, "width": width, "num_frames": frames}

    def like(self, result: Frames) -> EditRequest:
        """The request in the size and the number of frames of a result: pipelines may choose their own.

        Frames that a pipeline adds at the end are compared with the last one.
        """
        shape = result.shape[:3]
        if shape == self.mask.shape:
            return self
        kept = np.minimum(np.arange(shape[0]), len(self.mask) - 1)
        video, mask = (
            np.stack([np.asarray(picture.resize(shape[:0:-1], how)) for picture in to_pictures(frames[kept])])
            for frames, how in ((self.video, Resampling.LANCZOS), (self.mask, Resampling.NEAREST))
        )
        return replace(self, video=video, mask=mask > 0)


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


def pipeline_class(folder: Path) -> type:
    """The class of a local diffusers checkpoint's pipeline; no weights are read.

    Raises:
        InputFileError: no checkpoint there, or its class is none of diffusers.
    """
    import diffusers

    index = folder / "model_index.json"
    if not index.is_file():
        raise InputFileError(f"{folder} is no diffusers checkpoint: it has no model_index.json")
    try:
        name = json.loads(index.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise InputFileError(f"{index} cannot be read: {error}") from error
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise InputFileError(f"{folder} holds a {name}, which diffusers {diffusers.__version__} does not have")
    return found


def load_pipeline(folder: Path, dtype: torch.dtype, device: str, **components: Any) -> Any:
    """A local diffusers checkpoint. `components` replace its own, as in `from_pretrained`.

    It may lack parts that a call can do without, such as text encoders where encoded prompts are given.

    Raises:
        InputFileError: no checkpoint there, or one that cannot be loaded.
    """
    import diffusers
    import transformers

    pipeline_class(folder)
    index = json.loads((folder / "model_index.json").read_text())
    _import_own_classes(index)
    components = {name: None for name, part in index.items() if part == [None, None]} | components
    try:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        with quiet_logging(diffusers.utils.logging):  # it warns of any codec that is not Wan's own class
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)
    except (OSError, ValueError, ImportError) as error:
        raise InputFileError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_edits_video(folder: Path) -> None:
    """See that a checkpoint edits masked video, before it is loaded.

    Raises:
        InputFileError: its pipeline takes no video, no mask or no number of frames.
    """
    inputs = Inputs.of(pipeline_class(folder))
    missing = [name for name in ("video", "mask", "num_frames") if name not in inputs.parameters]
    if missing:
        raise InputFileError(f"{inputs.pipeline} takes no {' and no '.join(missing)}: it edits no masked video")


def _import_own_classes(index: Mapping[str, Any]) -> None:
    """Import the modules of this package that a checkpoint names: diffusers loads custom classes only from modules that
    were imported before."""
    package = __name__.partition(".")[0]
    for part in index.values():
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
    """The plan for a request, read from the pipeline's first model call."""
    return plan_for(pipe, mask=request.mask, schedule=schedule, **partition, **planned_arguments(pipe, request))


def check_plan(plan: Plan, pipe: Any, request: EditRequest) -> None:
    """See that a plan is one for this request.

    Raises:
        PlanError: it is for another token grid or another number of steps, or tokens that the mask covers are not
            active in it.
    """
    call = planned_call(pipe, request.mask, planned_arguments(pipe, request))
    if call.grid != plan.grid:
        raise PlanError(f"the plan is for the token grid {plan.grid}, and this edit has {call.grid}: make another plan")
    if plan.timesteps.size not in (0, call.timesteps.size):
        raise PlanError(
            f"the plan has {len(plan.steps)} steps, and this edit {call.timesteps.size}: give it the number of steps "
            "and the strength that the plan was made with"
        )
    if missing := int((call.mask.ravel() & ~plan.active_mask).sum()):
        raise PlanError(
            f"the plan is for another mask: {missing} of the {call.mask.sum()} tokens in this one are not active in "
            "it; make a plan with this mask"
        )


def planned_arguments(pipe: Any, request: EditRequest) -> dict[str, Any]:
    """What `plan_for` gets of a request's call; it is given the mask by itself."""
    arguments = {**call_arguments(pipe, request), "output_type": "latent"}
    return {name: value for name, value in arguments.items() if name not in MASKS}


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
        run_pipeline(pipe, shortened(pipe, request, 1), "compiling the plain model", progress, decode=False)
        return 0.0
    kinds = tuple(kind for kind in StepKind if kind in plan.steps)
    spare = StepKind.FULL  # pipelines round what a strength leaves out in two ways
    with session(plan.with_steps((*kinds, spare))) as opened:
        run_pipeline(pipe, shortened(pipe, request, len(kinds)), "compiling the forms", progress, decode=False)
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
    given = {**call_arguments(pipe, request), "output_type": "np" if decode else "latent"}
    if "callback_on_step_end" in Inputs.of(type(pipe)).parameters:
        given["callback_on_step_end"] = after_step
    with _timed_calls(pipe) as watches:
        output = pipe(**given)
    frames = None
    if decode:  # the first sample: a video of its own, or the first of the pictures
        frames = to_frames(output.frames[0] if hasattr(output, "frames") else output.images[:1])
    return Run(frames, [watch.seconds for watch in watches])


def call_arguments(pipe: Any, request: EditRequest) -> dict[str, Any]:
    """The arguments of the pipeline's call, as far as it takes them, but for what becomes of the result."""
    inputs = Inputs.of(type(pipe), request.still)
    hidden = inputs.fills and not request.keep_masked
    seen = np.where(request.mask[..., None], GREY, request.video) if hidden else request.video
    pictures, masks = to_pictures(seen), to_pictures(request.mask)
    arguments: dict[str, Any] = {
        "prompt": None if is_encoded("prompt", request.call) else request.prompt,
        "negative_prompt": None if is_encoded("negative_prompt", request.call) else request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "max_sequence_length": request.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        **request.size,
    }
    for name, shown in ((inputs.source, pictures), (inputs.mask, masks)):
        if name is not None:
            arguments[name] = shown if inputs.takes_video else shown[0]
    taken = {name: arguments[name] for name in inputs.parameters if arguments.get(name) is not None}
    return {**taken, **{name: _to_model(value, pipe) for name, value in request.call.items()}}


def is_encoded(text: str, call: Mapping[str, Any]) -> bool:
    """Whether a call is given what stands for a text, such as `prompt_embeds`: pipelines take one or the other."""
    return any(name.startswith(f"{text}_embeds") for name in call)


def _to_model(value: Any, pipe: Any) -> Any:
    """A tensor, such as an encoded prompt, where the model is and in its type; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(pipe.device, models_of(pipe)[0].dtype if value.is_floating_point() else value.dtype)


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


def shortened(pipe: Any, request: EditRequest, steps: int) -> EditRequest:
    """The request in so many steps, beside those that a strength leaves out; in one more by the rounding of some."""
    inputs = Inputs.of(type(pipe))
    strength = min(float(request.call.get(name, inputs.default(name, 1.0))) for name in STRENGTHS)
    return replace(request, num_inference_steps=math.ceil(steps / strength))
