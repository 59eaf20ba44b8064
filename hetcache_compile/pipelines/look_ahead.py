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
from collections.abc import Callable
from typing import Any, Self

import torch

from ..errors import PlanError

PROPORTIONAL = 1e-3
"""How far timesteps may be from noise levels, both as shares of the first: some are rounded to whole numbers."""


class LookAhead:
    """A scheduler of flow matching with one more step at a later time, right after the first.

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
            PlanError: `at` does not lie between 0 and 1, or the scheduler calls the model several times a step.
        """
        if not 0 < at < 1:
            raise PlanError(f"at must lie between 0 and 1, got {at}")
        if getattr(scheduler, "order", 1) != 1:
            raise PlanError(f"{type(scheduler).__name__} calls the model more than once a step: it cannot look ahead")
        self.scheduler, self.at = scheduler, at
        self.timesteps = self.sigmas = torch.zeros(0)
        self.num_inference_steps = 0
        self._next: torch.Tensor | None = None
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        """All else is the scheduler's."""
        if name == "scheduler":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)

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
            PlanError: its times are not those of flow matching.
        """
        self.scheduler.set_timesteps(*args, **kwargs)
        times, sigmas = self.scheduler.timesteps, getattr(self.scheduler, "sigmas", None)
        if sigmas is None or len(times) < 2 or not _proportional(times, sigmas[: len(times)]):
            raise PlanError(
                f"{type(self.scheduler).__name__} cannot look ahead: it needs two steps at least, at timesteps that "
                "are proportional to its noise levels, as in flow matching"
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

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `step`. The first one leads to the later time, the second to where the first would have."""
        if self._next is not None:
            after, self._next = self._next, None
            return self._result(after, kwargs)
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

    def _result(self, sample: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """What a step returns, as the caller wants it."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=sample) if kwargs.get("return_dict", True) else (sample,)


def _proportional(times: torch.Tensor, sigmas: torch.Tensor) -> bool:
    """Whether timesteps and noise levels are the same shares of the first ones."""
    shares = [values.double().cpu() / float(values[0]) for values in (times, sigmas)]
    return bool((shares[0] - shares[1]).abs().max() <= PROPORTIONAL)
