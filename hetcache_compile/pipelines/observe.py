"""What a pipeline asks its model first: its preparation is run, up to the first call of the model.

So sizes, references, packing and times are read from the pipeline itself, whatever it does to get there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import HetCacheError, PlanError
from .inputs import Inputs, holds_pictures

MODELS = ("transformer", "transformer_2")
"""What pipelines call the models that denoise."""


class _StopError(Exception):
    """Ends a pipeline at its first model call. Only an error does so before the model has computed."""


@dataclass(frozen=True)
class FirstCall:
    """The first model call of a pipeline.

    Attributes:
        model: that was called, without what `torch.compile` puts around it.
        args: of the call.
        kwargs: of the call.
        timesteps: float64 `[S]` that the pipeline is about to go through, in the scheduler's units.
        sigmas: float64 `[S]`, their noise levels, or empty.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, in the order of the model's signature: the latents come first."""
        signature = inspect.signature(self.model.forward)
        first = next(iter(signature.parameters.values()))
        if first.kind is first.VAR_POSITIONAL:  # an engine takes any names: their order is that of the call
            return dict(self.kwargs)
        return dict(signature.bind(*self.args, **self.kwargs).arguments)


def models_of(pipe: Any) -> list[Any]:
    """The models of a pipeline that denoise, as it holds them.

    Raises:
        PlanError: it has none.
    """
    # Not `or`: the truth of a compiled module is its length, and most have none.
    found = [model for model in (getattr(pipe, name, None) for name in MODELS) if model is not None]
    if not found:
        raise PlanError(f"{type(pipe).__name__} has no transformer")
    return found


def first_call(pipe: Any, arguments: Mapping[str, Any]) -> FirstCall:
    """Run the pipeline up to its first model call. It, its scheduler and all generators are left as they were.

    Raises:
        PlanError: the pipeline does not get there with these arguments.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def stop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((model, args, kwargs))
        raise _StopError

    with ExitStack() as stack:
        for model in models_of(pipe):
            stack.callback(model.register_forward_pre_hook(stop, with_kwargs=True).remove)
        stack.enter_context(_kept(pipe, arguments))
        try:
            with suppress(_StopError):
                pipe(**arguments)
        except HetCacheError:
            raise
        except Exception as error:
            reason, missing = str(error).partition("\n")[0], _pictures_left_out(pipe, arguments)
            raise PlanError(
                f"{type(pipe).__name__} does not run with these arguments, {type(error).__name__}: {reason}. Give all "
                f"that the pipeline needs{f'; it takes {missing} too' if missing else ''}"
            ) from error
        if not calls:
            raise PlanError(f"{type(pipe).__name__} calls no transformer with these arguments")
        model, args, kwargs = calls[0]
        timesteps, sigmas = _times(pipe)
    return FirstCall(getattr(model, "_orig_mod", model), args, kwargs, timesteps, sigmas)


def count_calls(pipe: Any, arguments: Mapping[str, Any], answer: Any) -> int:
    """How often a pipeline calls its models in its first step: the branches of guidance. They compute nothing.

    It, its scheduler and all generators are left as they were.

    Args:
        pipe: the pipeline.
        arguments: of its call.
        answer: what each call returns, of the type that the model returns.

    Raises:
        PlanError: the pipeline does not get to the end of a step with these arguments.
    """
    calls = 0

    def count(*_args: Any, **_kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return answer

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise _StopError

    with ExitStack() as stack:
        stack.enter_context(_kept(pipe, arguments))
        for name in MODELS:
            if (model := getattr(pipe, name, None)) is not None:
                plain = getattr(model, "_orig_mod", model)
                setattr(pipe, name, plain)
                stack.enter_context(_attributes(plain, forward=count, _compiled_call_impl=None))
        pipe.scheduler.step = stop
        try:
            with suppress(_StopError):
                pipe(**arguments)
        except HetCacheError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise PlanError(f"{type(pipe).__name__} does not run for a step with these arguments, {reason}") from error
    return calls


@contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object itself, put back afterwards: hooks of other libraries set the same ones."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(owner).pop(name, None)
        vars(owner).update(before)


def _pictures_left_out(pipe: Any, arguments: Mapping[str, Any]) -> str:
    """The arguments of pictures and videos that were not given: what a pipeline may miss, and rarely says itself."""
    names = Inputs.of(type(pipe)).parameters
    return ", ".join(name for name in names if holds_pictures(name) and arguments.get(name) is None)


@contextmanager
def _kept(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """The pipeline with a scheduler of its own, without a progress bar; its attributes and generators put back."""
    given = arguments.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    states = [generator.get_state() for generator in generators]
    attributes = dict(vars(pipe))
    vars(pipe).pop("_num_timesteps", None)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(**{**getattr(pipe, "_progress_bar_config", {}), "disable": True})
    devices = range(torch.cuda.device_count())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        vars(pipe).clear()
        vars(pipe).update(attributes)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _times(pipe: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The times that are left, and their noise levels: a strength leaves out the first ones."""
    scheduler = pipe.scheduler
    timesteps = torch.as_tensor(scheduler.timesteps).double().cpu().numpy()
    if len(timesteps) - 1 == getattr(scheduler, "num_inference_steps", None):  # some keep the end too, as no step
        timesteps = timesteps[:-1]
    sigmas = noise_levels(scheduler, len(timesteps))
    left = getattr(pipe, "_num_timesteps", None)
    if isinstance(left, int) and 0 < left < len(timesteps):
        timesteps, sigmas = timesteps[-left:], sigmas[-left:]
    return timesteps, sigmas


def noise_levels(scheduler: Any, num_steps: int) -> NDArray[np.float64]:
    """The noise levels of the steps, or none: schedulers keep one more, for the end."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) not in (num_steps, num_steps + 1):
        return np.zeros(0)
    return torch.as_tensor(sigmas).double().cpu().numpy()[:num_steps]
