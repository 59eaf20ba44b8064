"""Plans for one call of a diffusers pipeline, and the options that choose how it is cached."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration.best_schedule import Expectation, expect
from ..calibration.output_weights import step_lengths
from ..calibration.schedule_search import Budget
from ..errors import MaskError, PlanError
from ..plan.mask import to_mask
from ..plan.options import PlanOptions
from ..plan.plan import Plan
from ..plan.schedule import OPTIMAL, Schedule, default_schedule, preset_options, time_distances

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration


def plan_for(
    pipe: Any,
    *,
    mask: Any,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int = 50,
    num_reference_images: int = 0,
    schedule: Schedule | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Plan:
    """A plan for one call of a diffusers video pipeline, with the pipeline's own factors, model and scheduler.

    Where the schedule is searched for, so is the margin, and whether cached keys and values are predicted, unless they
    are given: the plan is the best of `choices`.

    Args:
        pipe: a pipeline with `vae_scale_factor_temporal`, `vae_scale_factor_spatial`, `scheduler` and
            `transformer` (whose config has `patch_size`); it is not changed.
        mask: what the pipeline takes, or anything else that `mask.to_mask` takes: `num_frames` frames, or one that
            stands for all, of `height` x `width` pixels; or on the token grid.
        height: of the video, in pixels.
        width: of the video, in pixels.
        num_frames: of the video, rounded like the pipeline does.
        num_inference_steps: as passed to the pipeline.
        num_reference_images: how many reference images the call has.
        schedule: see `schedule.make_schedule`; `"teacache:d"` uses the model's own time embedding. By default
            `"balanced"`, and `"optimal:1%"` with a calibration.
        calibration: of this model, for an `"optimal:..."` schedule, and for the weights of outputs.
        options: fields of `PlanOptions`. A preset's own options hold unless they are given. By default
            `extrapolation` is 1 where the model takes a `timestep`, else 0.

    Raises:
        PlanError: the size is no multiple of what the model needs, the pipeline lacks a part, or an option is none.
    """
    PlanOptions.check(options)
    mask = to_mask(mask, size=(height, width))
    schedule = default_schedule(calibration) if schedule is None else schedule
    make = partial(
        _plan_for, pipe, mask, (num_frames, height, width), num_inference_steps, num_reference_images, schedule,
        calibration,
    )  # fmt: skip
    return choices(make, schedule, calibration, options)[0].plan


@dataclass(frozen=True)
class Choice:
    """A plan that was considered, what was chosen in it, and what a calibration expects of it, if there is one."""

    plan: Plan
    options: Mapping[str, Any]
    expectation: Expectation | None = None


def choices(
    make: Callable[..., Plan], schedule: Schedule, calibration: Calibration | None, options: Mapping[str, Any]
) -> list[Choice]:
    """Every plan that a search compares, the best first; without a search the one that is asked for.

    The best has the least expected error under a time factor, and the least expected time under an error bound.

    Args:
        make: makes a plan, given options by name.
        schedule: of the plan. Only an optimal one is searched for.
        calibration: knows what the options it varied cost and save (see `Calibration.variants`).
        options: those given: they are not chosen.

    Raises:
        PlanError: no plan can be made.
    """
    if calibration is None or not (isinstance(schedule, str) and schedule.startswith(OPTIMAL)):
        return [Choice(make(**options), {})]
    by_error = Budget.parse(schedule.removeprefix(OPTIMAL)).error is None
    found, refused = [], None
    for chosen in calibration.alternatives(options):
        try:
            plan = make(**options, **chosen)
        except PlanError as error:
            refused = error
            continue
        timesteps = plan.timesteps if plan.timesteps.size else calibration.timesteps_for(len(plan.steps))
        share = plan.num_active / plan.num_tokens
        known = calibration.like({**options, **chosen})
        found.append(Choice(plan, chosen, expect(known, plan.steps, timesteps, share, plan.prediction)))
    if refused is not None and not found:
        raise refused
    return sorted(found, key=partial(_rank, by_error=by_error))


def _rank(choice: Choice, by_error: bool) -> tuple[float, float]:
    assert choice.expectation is not None
    key = choice.expectation.error, choice.expectation.seconds
    return key if by_error else key[::-1]


def _plan_for(
    pipe: Any,
    mask: Any,
    size: tuple[int, int, int],
    num_inference_steps: int,
    num_reference_images: int,
    schedule: Schedule,
    calibration: Calibration | None,
    **options: Any,
) -> Plan:
    """One plan, see `plan_for`."""
    num_frames, height, width = size
    # Not `or`: the truth of a compiled module is its length, and most have none.
    models = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    model = next((model for model in models if model is not None), None)
    if model is None or not hasattr(pipe, "vae_scale_factor_temporal"):
        raise PlanError(f"{type(pipe).__name__} is no video pipeline with a transformer")
    model = getattr(model, "_orig_mod", model)
    takes_time = "timestep" in inspect.signature(model.forward).parameters
    options = {"extrapolation": int(takes_time), **preset_options(schedule), **options}
    patch_t, patch_h, patch_w = model.config.patch_size
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    if height % (spatial * patch_h) or width % (spatial * patch_w):
        raise PlanError(
            f"height and width must be multiples of {spatial * patch_h} and {spatial * patch_w}, "
            f"got {height} and {width}"
        )
    if num_frames % temporal != 1 % temporal:
        num_frames = num_frames // temporal * temporal + 1
    latent_frames = num_reference_images + (num_frames - 1) // temporal + 1
    if latent_frames % patch_t:
        raise PlanError(f"{latent_frames} latent frames are no multiple of the patch size {patch_t}")
    grid = (latent_frames // patch_t, height // (spatial * patch_h), width // (spatial * patch_w))
    pixels = (num_frames, height, width)
    if np.shape(mask) not in (grid, pixels, (1, height, width)):
        raise MaskError(f"the mask has shape {np.shape(mask)}, this call needs {pixels} pixels or {grid} tokens")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    distances = time_distances(model, scheduler.timesteps)
    timesteps = scheduler.timesteps.double().cpu().numpy()
    plan = replace(
        Plan.from_mask(
            mask, grid, num_inference_steps=len(distances), schedule="full", temporal_factor=temporal,
            temporal_patch=patch_t, reference_frames=num_reference_images, **options,
        ),
        timesteps=timesteps,
        sigmas=_sigmas_of(scheduler, len(distances)),
        distances=distances,
    )  # fmt: skip
    if calibration is None:
        return plan.with_schedule(schedule)
    return calibration.like(options).scheduled(
        plan, schedule, timesteps=timesteps, lengths=step_lengths(pipe.scheduler, num_inference_steps),
        multistep=bool(options.get("multistep", True)), distances=distances,
    )  # fmt: skip


def _sigmas_of(scheduler: Any, num_steps: int) -> Any:
    """The noise levels of the steps, or none: schedulers keep one more, for the end."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) not in (num_steps, num_steps + 1):
        return np.zeros(0)
    return np.asarray(sigmas, dtype=np.float64)[:num_steps]
