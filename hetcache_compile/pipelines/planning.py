"""Plans for one call of a diffusers pipeline, and the options that choose how it is cached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..calibration.best_schedule import Expectation, expect
from ..calibration.output_weights import step_lengths
from ..calibration.schedule_search import Budget
from ..errors import PlanError
from ..plan.cache_size import format_bytes, parse_bytes
from ..plan.options import USUAL, PlanOptions
from ..plan.plan import Plan
from ..plan.schedule import OPTIMAL, Schedule, default_schedule, preset_options, time_distances
from .call import PlannedCall, planned_call
from .memory import ANY, Footprint, host_bytes
from .observe import models_of

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration


def plan_for(
    pipe: Any,
    *,
    mask: Any,
    schedule: Schedule | None = None,
    calibration: Calibration | None = None,
    memory: int | str | None = None,
    num_reference_images: int | None = None,
    **arguments: Any,
) -> Plan:
    """A plan for one call of a diffusers pipeline that edits pictures or videos.

    Give it the mask, and what you give the pipeline. With a prompt, or what stands for one, the pipeline is run up to
    its first model call: the token grid, the times and the references are those of that call. Without one they are
    computed from the sizes and the pipeline's own factors, as far as these say.

    Where the schedule is searched for, so is the margin, and whether cached keys and values are predicted, unless they
    are given: the plan is the best of `plans_for`.

    Args:
        pipe: a pipeline with a `transformer`; it is not changed.
        mask: what the pipeline takes, or anything else that `mask.to_mask` takes, in pixels: a frame for each of the
            video's, or one that stands for all; or on the token grid, `[T', H', W']`.
        schedule: see `schedule.make_schedule`; `"teacache:d"` uses the model's own time embedding. By default
            `"balanced"`, and `"optimal:1%"` with a calibration.
        calibration: of this model, for an `"optimal:..."` schedule, and for the weights of outputs.
        memory: what the cache may take on the device that the model runs on, such as `"8GiB"` or a number of bytes:
            where it takes more, it is made smaller by what costs the result least (see `memory.SMALLER`). Then the size
            is known (`Plan.cache_size`); `"any"` says it and changes nothing. It takes the pipeline's first step and a
            capture of its model.
        num_reference_images: how many latent frames of references stand in front; found where the pipeline is run.
        arguments: of the pipeline's call, such as `prompt`, `image`, `height`, `width`, `num_frames`, `strength` and
            `num_inference_steps`; and fields of `PlanOptions`. A preset's own options hold unless they are given. By
            default `extrapolation` is 1 where the model takes a `timestep`, else 0, and `context_motion` is 1 where
            the other options leave it.

    Raises:
        PlanError: the pipeline does not run with these arguments, or they do not say enough, or an option is none, or
            no cache takes so little memory.
        MaskError: the mask is none, or is not like the pictures of the call.
    """
    return plans_for(
        pipe, mask=mask, schedule=schedule, calibration=calibration, memory=memory,
        num_reference_images=num_reference_images, **arguments,
    )[0].plan  # fmt: skip


def plans_for(
    pipe: Any,
    *,
    mask: Any,
    schedule: Schedule | None = None,
    calibration: Calibration | None = None,
    memory: int | str | None = None,
    num_reference_images: int | None = None,
    **arguments: Any,
) -> list[Choice]:
    """Every plan that `plan_for` chooses from, the best first; arguments and errors are those of `plan_for`."""
    options = {name: arguments.pop(name) for name in PlanOptions.names() if name in arguments}
    PlanOptions.check(options)
    _check_arguments(pipe, arguments)
    limit = None if memory is None or memory == ANY else parse_bytes(memory)
    call = planned_call(pipe, mask, arguments, num_reference_images)
    schedule = default_schedule(calibration) if schedule is None else schedule
    make = partial(_plan_for, pipe, call, schedule, calibration)
    if memory is None:
        return choices(make, schedule, calibration, options)
    footprint = Footprint.of(pipe, call)
    return smaller_choices(make, schedule, calibration, options, footprint, limit)


def _check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    known = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    for name in arguments:
        if name not in known:
            options = ", ".join(PlanOptions.names())
            raise PlanError(
                f"{name!r} is neither an argument of {type(pipe).__name__} nor an option: options are {options}, "
                f"arguments {', '.join(known)}"
            )


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
        known = calibration.like({**options, **chosen, "context_motion": plan.context_motion})
        shared = bool(plan.shared_context)
        expected = expect(known, plan.steps, timesteps, share, plan.prediction, shared_context=shared)
        found.append(Choice(plan, chosen, expected))
    if refused is not None and not found:
        raise refused
    return sorted(found, key=partial(_rank, by_error=by_error))


def smaller_choices(
    make: Callable[..., Plan],
    schedule: Schedule,
    calibration: Calibration | None,
    options: Mapping[str, Any],
    footprint: Footprint,
    limit: int | None,
) -> list[Choice]:
    """The plans of `choices` whose cache takes no more than `limit` bytes on the device, the best first.

    Where none of them is so small, `memory.SMALLER` makes them smaller. What changes only how keys and values are
    kept is compared by what the calibration expects; fewer of them, which it may know nothing of, are the last resort.

    Raises:
        PlanError: no plan can be made, or none is so small.
    """
    found: list[Choice] = []
    least: tuple[int, str] | None = None
    for smaller in footprint.ways(options):
        if found and "cached_ratio" in smaller:
            break
        try:
            considered = [
                replace(choice, plan=footprint.sized(choice.plan))
                for choice in choices(make, schedule, calibration, {**options, **smaller})
            ]
        except PlanError:
            if not smaller:
                raise
            continue
        for choice in considered:
            plan = choice.plan
            size = plan.cache_size
            assert size is not None
            hosted = plan.cache_device == "cpu"
            needed = size.on_device(hosted=hosted)
            chosen = {**choice.options, **smaller}
            if limit is None or (needed <= limit and not (hosted and size.on_host > host_bytes())):
                found.append(replace(choice, options=chosen))
            elif least is None or needed < least[0]:
                words = ", ".join(f"{name} {value}" for name, value in chosen.items())
                least = needed, f"with {words}" if words else "as asked for"
        if limit is None or (found and "cached_ratio" in smaller):
            break
    if not found:
        assert least is not None
        assert limit is not None
        raise PlanError(
            f"no plan keeps its cache within {format_bytes(limit)}: the least is {format_bytes(least[0])}, {least[1]}"
        )
    if calibration is None or found[0].expectation is None:
        return found
    by_error = isinstance(schedule, str) and Budget.parse(schedule.removeprefix(OPTIMAL)).error is None
    return sorted(found, key=partial(_rank, by_error=by_error))  # stable: of equal ones the first way


def _rank(choice: Choice, by_error: bool) -> tuple[float, float]:
    assert choice.expectation is not None
    key = choice.expectation.error, choice.expectation.seconds
    return key if by_error else key[::-1]


def _plan_for(
    pipe: Any, call: PlannedCall, schedule: Schedule, calibration: Calibration | None, **options: Any
) -> Plan:
    """One plan, see `plan_for`."""
    model = models_of(pipe)[0]
    model = getattr(model, "_orig_mod", model)
    takes_time = "timestep" in inspect.signature(model.forward).parameters
    options = {**USUAL, "extrapolation": int(takes_time), **preset_options(schedule), **options}
    steps = len(call.timesteps)
    measured = calibration is not None and options.get("cached_shares") == "measured"
    given = {**options, "cached_shares": "same"} if measured else options
    plan = replace(
        Plan.from_mask(call.mask, call.grid, num_inference_steps=steps, schedule="full", **given),
        timesteps=call.timesteps,
        sigmas=call.sigmas,
        distances=distances_of(model, call.timesteps),
        token_inputs=call.token_inputs,
    )
    if calibration is None:
        return plan.with_schedule(schedule)
    if measured:
        plan = replace(plan, cached_counts=calibration.counts_for(plan))
    varied = {**options, "context_motion": plan.context_motion}
    return calibration.like(varied).scheduled(
        plan, schedule, timesteps=call.timesteps, lengths=step_lengths(pipe.scheduler, steps),
        multistep=bool(options.get("multistep", True)), distances=plan.distances if plan.distances.size else None,
    )  # fmt: skip


def distances_of(model: Any, timesteps: NDArray[np.float64]) -> NDArray[np.float64]:
    """See `time_distances`; empty for a model whose time embedding is not of diffusers' kind."""
    try:
        return time_distances(model, torch.as_tensor(timesteps, dtype=torch.float32))
    except PlanError:
        return np.zeros(0)
