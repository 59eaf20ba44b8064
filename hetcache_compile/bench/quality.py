"""`hetcache bench quality`: how much faster each method is, and how far its result is from the uncached one.

Methods are those of `methods`. Every clip x method is a *cell*. Cells are written as they are done, and a run that
was cut short goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.calibration import Calibration
from ..edit.editing import EditRequest, Progress, Run, compiled, make_plan, run_pipeline, run_planned, warm_up
from ..edit.media import Clip, Frames
from ..edit.metrics import BAND, METRICS, REGIONS, Comparison, check_extra, compare
from ..errors import InputFileError, MethodError, PlanError
from ..files import atomically
from ..pipelines.look_ahead import LookAhead
from ..plan.options import USUAL
from ..plan.plan import Plan
from ..plan.schedule import preset_options
from ..provenance import provenance
from ..runtime.backend import hetcache_backend
from .crop import box_of, cropped
from .methods import FULL, Method

RESULT = "quality.json"
MOST_SIZES = 64
"""Crops may have so many sizes: Dynamo compiles the plain model for each."""
BESIDE = 3
"""Steps of the plain model that are timed beside each cell: machines do not stay as fast as they were."""


@dataclass(frozen=True)
class Settings:
    """What is the same in every cell.

    `levels` keeps the number of compilations small: M is rounded up to a multiple of N / levels, so that clips whose
    masks are of about one size share their budgets, and with them their compiled forms. `margin` and `context_ratio`
    hold where neither the method nor its preset says otherwise; without a margin, `plan_for` chooses it. Without
    `timed` only fidelity is measured, which a busy machine does not change. `calibration` names the one that optimal
    schedules rest on.
    """

    model: str
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    max_sequence_length: int = 512
    seed: int = 0
    inner: str = "inductor"
    margin: float | None = None
    context_ratio: float = 0.05
    levels: int = 16
    band: int = BAND
    timed: bool = True
    calibration: str | None = None


@dataclass(frozen=True)
class Measured:
    """What is measured of each result: metrics against the uncached one and against the truth, and where."""

    regions: Sequence[str] = REGIONS
    fidelity: Sequence[str] = METRICS
    quality: Sequence[str] = METRICS


def bench_quality(
    pipe: Any,
    clips: Sequence[Clip],
    methods: Sequence[Method],
    settings: Settings,
    out: Path,
    progress: Progress,
    calibration: Calibration | None = None,
    measured: Measured = Measured(),
) -> dict[str, Any]:
    """Run the cells that `out` lacks. The results are in `out/quality.json`, the frames in `out/frames`.

    Times are seconds in the transformer, by medians (see `Run.total_seconds`). A speed-up is to as many calls as `full`
    takes of the plain model, timed beside the cell.

    Raises:
        InputFileError: no clips, clips of several sizes or of one name, or `out` holds results of another setting.
        MissingExtraError: the extra `quality` is not installed.
        PlanError: no method `full` in front, or a method that asks for what cannot be planned.
    """
    check_extra()
    _check_clips(clips)
    if not methods or methods[0].name != FULL:
        raise PlanError("the first method must be full: the others are compared with it")
    result = open_result(out, pipe, clips, settings)
    for clip in clips:
        if not _done(result, out, clip, methods[0]):
            result["cells"].pop(clip.name, None)
    missing = [(clip, method) for clip in clips for method in methods if not _done(result, out, clip, method)]
    if not missing:
        return result
    bench = Bench(pipe, settings, progress, calibration, measured)
    bench.check(clips[0], methods)
    # Outside a session hetcache_backend's model is the plain one, so both can take turns on each clip.
    static = {"backend": hetcache_backend, "options": {"inner": settings.inner}, "dynamic": False}
    with compiled(pipe, **static), torch._dynamo.config.patch(recompile_limit=MOST_SIZES):
        for number, (clip, method) in enumerate(missing):
            progress("cells", number, len(missing))
            cells = result["cells"].setdefault(clip.name, {})
            cells[method.name] = bench.cell(clip, method, out, cells.get(FULL))
            save_result(out, result)
    progress("cells", len(missing), len(missing))
    return result


class Bench:
    """A compiled pipeline that remembers what it was warmed up for."""

    def __init__(
        self, pipe: Any, settings: Settings, progress: Progress, calibration: Calibration | None = None,
        measured: Measured = Measured(),
    ) -> None:  # fmt: skip
        self.pipe, self.settings, self.progress, self.calibration = pipe, settings, progress, calibration
        self.measured = measured
        self._warm: set[Any] = set()

    def check(self, clip: Clip, methods: Sequence[Method]) -> None:
        """Plan each method once, so that a wrong one is told before anything runs."""
        for method in methods:
            if method.needs_calibration and self.calibration is None:
                raise PlanError(f"{method.name} needs a calibration: give the file of `hetcache calibrate`")
            if method.schedule is not None:
                with self.scheduled(method):
                    self.plan(self.request(clip, method), method)

    def cell(self, clip: Clip, method: Method, out: Path, full: dict[str, Any] | None) -> dict[str, Any]:
        """What is recorded of one clip and method; `full` is the cell of the uncached result."""
        try:
            with self.scheduled(method):
                run, plan, plain_call, more = self.run(clip, method)
        except MethodError as error:
            return {"failed": str(error)}
        frames = run.frames
        assert frames is not None
        if method.surroundings is not None:
            box = box_of(self.pipe, self.request(clip, Method(FULL)), method.surroundings)
            frames = box.paste(frames, clip.video)
        save_frames(frames_file(out, clip.name, method.name), frames)
        uncached = load_frames(frames_file(out, clip.name, FULL)) if full else None
        num_calls = full["calls"]["FULL"] if full else len(run.seconds)
        another = method.runner is not None and method.steps is None
        took = times_of_another(run, plain_call, num_calls) if another else times(run, plan, plain_call, num_calls)
        if method.surroundings is not None:
            took["full_over_compiled"] = None  # the calls beside are of the whole clip
            took["num_tokens"] = make_plan(self.pipe, self.request(clip, method), "full").num_tokens
        return {
            **took,
            **more,
            "fidelity": self.figures(frames, uncached, clip, self.measured.fidelity),
            "quality": self.figures(frames, clip.truth, clip, self.measured.quality),
        }

    def figures(
        self, frames: Frames, reference: Frames | None, clip: Clip, metrics: Sequence[str]
    ) -> Comparison | None:
        """The comparison with a reference, where there is one."""
        if reference is None:
            return None
        band, regions = self.settings.band, self.measured.regions
        return compare(frames, reference, clip.mask, band=band, inside=regions, metrics=metrics)

    @contextmanager
    def scheduled(self, method: Method) -> Iterator[None]:
        """The pipeline has the steps of a method."""
        usual = self.pipe.scheduler
        try:
            if method.ahead is not None:
                self.pipe.scheduler = LookAhead(usual, method.ahead)
            yield
        finally:
            self.pipe.scheduler = usual

    def run(self, clip: Clip, method: Method) -> tuple[Run, Plan | None, float | None, dict[str, Any]]:
        """One cell: its run, the plan that it followed, the median seconds of a plain call at that time, and more."""
        request, timed = self.request(clip, method), self.settings.timed
        plan = self.plan(request, method) if method.schedule else None
        beside = None
        if timed:
            whole = self.request(clip, Method(FULL))
            self.warm_up(whole, None)
            if plan is not None or method.surroundings is not None:
                self.warm_up(request, plan)
            if method.name != FULL:
                short = replace(whole, num_inference_steps=BESIDE)
                plain = run_pipeline(self.pipe, short, "timing the plain model", self.progress, decode=False)
                beside = plain.median_seconds["FULL"]
        if method.runner is not None:
            run, more = method.runner(self.pipe, request, self.progress)
            return run, None, beside, more
        if plan is not None:
            return run_planned(self.pipe, request, plan, "denoising", self.progress), plan, beside, {}
        run = run_pipeline(self.pipe, request, "denoising", self.progress)
        return run, None, run.median_seconds["FULL"] if timed and method.name == FULL else beside, {}

    def request(self, clip: Clip, method: Method) -> EditRequest:
        """The edit of one cell: of the clip, or of what is cropped of it."""
        whole = EditRequest(
            video=clip.video,
            mask=clip.mask,
            prompt=clip.prompt,
            num_inference_steps=method.steps or self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            max_sequence_length=self.settings.max_sequence_length,
            seed=self.settings.seed,
        )
        if method.surroundings is None:
            return whole
        return cropped(self.pipe, whole, box_of(self.pipe, whole, method.surroundings))

    def warm_up(self, request: EditRequest, plan: Plan | None) -> None:
        """Compile what is not compiled yet."""
        needs = {(plan.form_options, kind) for kind in plan.steps} if plan else {request.mask.shape}
        if not needs <= self._warm:
            warm_up(self.pipe, request, plan, self.progress)
            self._warm |= needs

    def plan(self, request: EditRequest, method: Method) -> Plan:
        """A plan whose budgets are those of the mask's size group."""
        assert method.schedule is not None
        usual = {"margin": self.settings.margin} if self.settings.margin is not None else {}
        num_tokens = make_plan(self.pipe, request, "full").num_tokens
        options = {
            "multiple": -(-num_tokens // self.settings.levels),
            "context_ratio": self.settings.context_ratio,
            **usual,
            **preset_options(method.schedule),
            **method.options,
        }
        calibration = self.calibration if method.ahead is None else None  # it knows nothing of such a step
        return make_plan(self.pipe, request, method.schedule, calibration=calibration, **options)


def times(run: Run, plan: Plan | None, plain_call: float | None, num_calls: int) -> dict[str, Any]:
    """What one cell took, against `num_calls` calls of the plain model of `plain_call` seconds each.

    None in place of every time where nothing was timed beside it.
    """
    by_kind = run.median_seconds
    return {
        "seconds": run.total_seconds if plain_call else None,
        "speedup": num_calls * plain_call / run.total_seconds if plain_call else None,
        "calls": run.stats.steps if run.stats else {"FULL": len(run.seconds)},
        "median_seconds": by_kind if plain_call else None,
        "plain_call_seconds": plain_call,
        "full_over_compiled": by_kind["FULL"] / plain_call if plain_call else None,
        "num_active": plan.num_active if plan else None,
        "num_tokens": plan.num_tokens if plan else None,
        "cache_bytes": run.stats.cache_bytes if run.stats else None,
    }


def times_of_another(run: Run, plain_call: float | None, num_calls: int) -> dict[str, Any]:
    """`times` of a method whose calls differ in ways of its own: their sum counts."""
    return {
        "seconds": sum(run.seconds) if plain_call else None,
        "speedup": num_calls * plain_call / sum(run.seconds) if plain_call else None,
        "calls": {"ALL": len(run.seconds)},
        "median_seconds": None,
        "plain_call_seconds": plain_call,
        "full_over_compiled": None,
        "num_active": None,
        "num_tokens": None,
        "cache_bytes": None,
    }


def open_result(out: Path, pipe: Any, clips: Sequence[Clip], settings: Settings) -> dict[str, Any]:
    """The results so far, or none yet; with the clips of this run.

    Raises:
        InputFileError: the results there belong to another model, machine, setting or clip.
    """
    belongs = {
        **provenance(str(pipe.device)),
        "settings": {**asdict(settings), "weights": weights_digest(pipe), "usual_options": dict(USUAL)},
    }
    known = {clip.name: describe_clip(clip) for clip in clips}
    path = out / RESULT
    if not path.exists():
        return {**belongs, "clips": known, "cells": {}}
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        # Without times, clips can be shared out among processes of fewer threads.
        free = {"command"} if settings.timed else {"command", "threads"}
        old = {name: result[name] for name in belongs if name not in free}
        clips_then, _ = result["clips"], result["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputFileError(f"{path} holds no results of `bench quality`: give another --out") from error
    changed = [name for name in old if old[name] != belongs[name]]
    changed += [f"clip {name}" for name in known if name in clips_then and clips_then[name] != known[name]]
    if changed:
        raise InputFileError(
            f"{path} holds results of another run (other {', '.join(changed)}): give another --out, or remove it"
        )
    return {**result, **belongs, "clips": {**clips_then, **known}}


def describe_clip(clip: Clip) -> dict[str, Any]:
    """What tells one clip from another of the same name."""
    digest = hashlib.sha256()
    for array in (clip.video, clip.mask, clip.truth):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return {
        "prompt": clip.prompt,
        "shape": list(clip.video.shape),
        "masked": float(clip.mask.mean()),
        "digest": digest.hexdigest()[:16],
    }


def weights_digest(pipe: Any) -> str:
    """A short name for a pipeline's weights and scheduler: a checkpoint trained further is another model."""
    config = dict(pipe.scheduler.config)
    if "_use_default_values" in config:  # from a set, so in another order in each process
        config["_use_default_values"] = sorted(config["_use_default_values"])
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for key, weight in module.state_dict().items():
                digest.update(f"{name}.{key} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def file_digest(path: Path | None) -> str | None:
    """A short name for what is in a file, None for none."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def frames_file(out: Path, clip: str, method: str) -> Path:
    """Where the frames of a cell are."""
    return out / "frames" / file_name(clip) / f"{file_name(method)}.npz"


def file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]", "_", name)


def save_frames(path: Path, frames: Frames) -> None:
    """Write frames without loss, atomically."""
    atomically(path, lambda temporary: np.savez_compressed(temporary, frames=frames))


def load_frames(path: Path) -> Frames:
    """Frames as `save_frames` wrote them."""
    with np.load(path) as file:
        return np.asarray(file["frames"], dtype=np.uint8)


def save_result(out: Path, result: dict[str, Any]) -> None:
    """Write `quality.json`, atomically."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    atomically(out / RESULT, lambda temporary: Path(temporary).write_text(text))


def _done(result: dict[str, Any], out: Path, clip: Clip, method: Method) -> bool:
    cell = result["cells"].get(clip.name, {}).get(method.name)
    return cell is not None and ("failed" in cell or frames_file(out, clip.name, method.name).exists())


def _check_clips(clips: Sequence[Clip]) -> None:
    if not clips:
        raise InputFileError("there are no clips to edit")
    names = [file_name(clip.name) for clip in clips]
    if len(set(names)) < len(names):
        raise InputFileError(f"clips need names of their own, got {', '.join(names)}")
    for clip in clips:
        truth = clip.video if clip.truth is None else clip.truth
        if not clip.video.shape == truth.shape == (*clip.mask.shape, 3) == clips[0].video.shape:
            raise InputFileError(
                f"clip {clip.name} must have frames, mask and truth of the size of the first, {clips[0].video.shape}: "
                f"got {clip.video.shape}, {clip.mask.shape} and {truth.shape}"
            )
