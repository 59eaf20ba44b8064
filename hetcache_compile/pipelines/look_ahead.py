"""One more model call, for a later time: what the context will be is nearly known from the second call on.

In few steps, what is stale in a PARTIAL step are keys and values of the context: they are of an old noise level. In
flow matching the path of the latents is nearly straight, so after the first step the latents of a later time are known
well enough to compute the context there. Between two FULL calls, one at each end, keys and values are read on the line
through both (`context_extrapolation=1`): no PARTIAL step goes far beyond what was computed.

The call is a step of the scheduler, and so a step of the plan, whatever runs the model: a session, forms, an exported
engine. Its output is not used, and the samples are those of the scheduler without it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

import torch

from ..errors import PlanError
from .observe import models_of

PROPORTIONAL = 1e-3
"""How far timesteps may be from noise levels, both as shares of the first: some are rounded to whole numbers."""
OWN = ("scheduler", "at", "timesteps", "sigmas", "num_inference_steps", "_next", "_begun")
"""Attributes that are not the scheduler's."""
TRIED_ON = (1, 4, 1, 2, 2)
"""The shape of latents `[B, C, T, H, W]` that a step is tried on."""


class LookAhead:
    """A scheduler of flow matching with one more step at a later time, right after the first.

    It passes for one of the scheduler's class, and hands on whatever else is read from it or set on it.

    Attributes:
        scheduler: the one that it is made of, which knows nothing of the additional step.
        at: the time of this step, as a share of the first one's.
        timesteps: `[S + 1]`, of all steps in their order.
        sigmas: `[S + 2]`, their noise levels, and the one of the end.
        num_inference_steps: S + 1.

    Example:
        >>> pipe.scheduler = LookAhead(pipe.scheduler)  # doctest: +SKIP
        >>> plan = plan_for(pipe, ..., schedule="FFP*", context_extrapolation=1)  # doctest: +SKIP
    """

    def __init__(self, scheduler: Any, at: float = 0.45) -> None:
        """Wrap a scheduler of diffusers.

        Raises:
            PlanError: `at` does not lie between 0 and 1, or the scheduler calls the model several times a step or tells
                it where a step leads.
        """
        check_ahead(at)
        if getattr(scheduler, "order", 1) != 1:
            raise PlanError(f"{type(scheduler).__name__} calls the model more than once a step: it cannot look ahead")
        if "r_timestep" in inspect.signature(scheduler.step).parameters:
            name = type(scheduler).__name__
            raise PlanError(f"{name} asks the model for the way to the next time, which changes: it cannot look ahead")
        self.scheduler, self.at = scheduler, at
        self.timesteps = self.sigmas = torch.zeros(0)
        self.num_inference_steps = 0
        self._next: torch.Tensor | None = None
        self._begun = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The scheduler's: pipelines ask for it, to know which arguments it takes."""
        return type(self.scheduler)

    def __getattr__(self, name: str) -> Any:
        """All else is the scheduler's."""
        if name == "scheduler":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """All else is the scheduler's."""
        if name in OWN or name in vars(LookAhead):
            object.__setattr__(self, name, value)
        else:
            setattr(self.scheduler, name, value)

    def __copy__(self) -> Self:
        """With a scheduler and times of its own, as copies of diffusers' schedulers."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self), scheduler=copy.copy(self.scheduler))
        return other

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """The scheduler's, with its signature: pipelines look at the names of its parameters."""
        return functools.wraps(self.scheduler.set_timesteps)(functools.partial(self._set_timesteps))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The scheduler's `set_timesteps`.

        Raises:
            PlanError: its times are not those of flow matching, or its steps add noise.
        """
        self.scheduler.set_timesteps(*args, **kwargs)
        times, sigmas = self.scheduler.timesteps, getattr(self.scheduler, "sigmas", None)
        if sigmas is None or len(times) < 2 or not _proportional(times, sigmas[: len(times)]):
            raise PlanError(
                f"{type(self.scheduler).__name__} cannot look ahead: it needs two steps at least, at timesteps that "
                "are proportional to its noise levels, as in flow matching"
            )
        if _adds_noise(self.scheduler):
            raise PlanError(
                f"the steps of {type(self.scheduler).__name__} add noise, so what a later time would be is not known "
                "after the first one: it cannot look ahead"
            )
        share, first = self.at, times[:1].double()
        while bool(((ahead := (share * first).to(times.dtype)) == times).any()):  # a step is known by its time
            share -= min(1e-3, share / 2)
        noise = (ahead.double() / float(times[0]) * float(sigmas[0])).to(sigmas)
        self.timesteps = torch.cat([times[:1], ahead, times[1:]])
        self.sigmas = torch.cat([sigmas[:1], noise, sigmas[1:]])
        self.num_inference_steps = len(self.timesteps)
        self._next, self._begun = None, False

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The scheduler's `set_begin_index`.

        Raises:
            PlanError: the edit leaves out the first steps.
        """
        if begin_index:
            raise PlanError("an edit that leaves out its first steps (a strength below 1) cannot look ahead")
        self.scheduler.set_begin_index(begin_index)

    @property
    def scale_noise(self) -> Callable[..., torch.Tensor]:
        """The scheduler's, by which pipelines put the known part of latents back after each step.

        After the first one the latents are those of the later time, of which the scheduler knows nothing.
        """
        usual = self.scheduler.scale_noise

        @functools.wraps(usual)
        def scale_noise(sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
            if self._next is None:
                return usual(sample, timestep, noise)  # type: ignore[no-any-return]
            sigma = self.sigmas[1].to(sample)
            return sigma * noise + (1 - sigma) * sample

        return scale_noise

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `step`. The first one leads to the later time, the second to where the first would have.

        Raises:
            PlanError: the latents have another shape in the second one.
        """
        if self._next is not None:
            after, self._next = self._next, None
            if after.shape != sample.shape:
                raise PlanError("the pipeline gave its latents another shape at the later time: it cannot look ahead")
            return self._result(after, kwargs)
        if not self._begun:
            self._hand_on_sigmas()
        result = self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
        if self._begun:
            return result  # to look at a time again would wait for the device
        self._begun = True
        if float(timestep) != float(self.timesteps[0]):
            return result
        after = self._next = result[0]
        first, ahead, second = self.sigmas[:3].tolist()
        line = sample.float() + (after.float() - sample.float()) * ((first - ahead) / (first - second))
        return self._result(line.to(after.dtype), kwargs)

    def _hand_on_sigmas(self) -> None:
        """Pipelines may have set noise levels, such as the last one."""
        sigmas = self.scheduler.sigmas
        sigmas[0], sigmas[1:] = self.sigmas[0], self.sigmas[2:]

    def _result(self, sample: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """What a step returns, as the caller wants it."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=sample) if kwargs.get("return_dict", True) else (sample,)


def check_ahead(at: float) -> None:
    """Raise `PlanError` if a later time is no share of the first one."""
    if not 0 < at < 1:
        raise PlanError(f"the later time must lie between 0 and 1, as a share of the first one, got {at}")


def check_one_model(pipe: Any) -> None:
    """Raise `PlanError` if a pipeline looks ahead and has two experts, each for some of the noise levels."""
    if isinstance(pipe.scheduler, LookAhead) and len(models_of(pipe)) > 1:
        raise PlanError(
            f"{type(pipe).__name__} has two models, each for some of the noise levels, and the later time may be the "
            "other one's: it cannot look ahead"
        )


def _adds_noise(scheduler: Any) -> bool:
    """Whether two first steps from the same latents differ. Nobody's random numbers are used up.

    Raises:
        PlanError: its steps take more than the model's output.
    """
    time = scheduler.timesteps[0]
    devices = [time.device] if time.device.type == "cuda" else []
    output, sample = torch.randn((2, *TRIED_ON), generator=torch.Generator().manual_seed(0)).to(time.device)
    try:
        with torch.random.fork_rng(devices=devices):
            first, second = (copy.deepcopy(scheduler).step(output, time, sample)[0] for _ in range(2))
    except Exception as error:
        name = type(scheduler).__name__
        raise PlanError(f"a step of {name} was tried and failed, so it cannot look ahead: {error}") from error
    return not torch.equal(first, second)


def _proportional(times: torch.Tensor, sigmas: torch.Tensor) -> bool:
    """Whether timesteps and noise levels are the same shares of the first ones."""
    shares = [values.double().cpu() / float(values[0]) for values in (times, sigmas)]
    return bool((shares[0] - shares[1]).abs().max() <= PROPORTIONAL)
