"""One call of a model to look at: from a pipeline, stopped at its first model call, or from a Python function."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..errors import InputFileError
from ..pipelines.inputs import Inputs
from ..pipelines.layout import grid_of_call, token_inputs_of
from ..pipelines.observe import first_call
from ..plan.partition import Grid
from .editing import EditRequest, call_arguments


@dataclass(frozen=True)
class ModelCall:
    """A model, the arguments of a call of it, and the token grid (T', H', W') of that call.

    `token_inputs` are those of packed latents, as in `plan.Plan`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grid: Grid
    token_inputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def call_of_function(name: str) -> ModelCall:
    """The call that `package.module:function` returns as `(model, kwargs, grid)`.

    Raises:
        InputFileError: there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputFileError(f"{name} is no function to call: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise InputFileError(f"{name} must return (model, kwargs, grid), a module, a dict and three sizes")
    model, kwargs, grid = made
    return ModelCall(model.eval(), (), kwargs, tuple(grid))


def call_of_pipeline(pipe: Any, height: int, width: int, num_frames: int, call: Mapping[str, Any]) -> ModelCall:
    """The first model call of a pipeline, on an empty picture or video that is all mask.

    Args:
        pipe: any with a `transformer`.
        height: in pixels.
        width: in pixels.
        num_frames: 1 for a picture.
        call: other arguments of the pipeline's call, by name.

    Raises:
        PlanError: the pipeline does not run with these arguments, or its call does not say where its tokens stand.
    """
    request = EditRequest(
        video=np.zeros((num_frames, height, width, 3), dtype=np.uint8),
        mask=np.ones((num_frames, height, width), dtype=bool),
        prompt="",
        num_inference_steps=1,
        still=not Inputs.of(type(pipe)).takes_video,
        call=call,
    )
    found = first_call(pipe, {**call_arguments(pipe, request), "output_type": "latent"})
    grid = grid_of_call(found, height, width)
    return ModelCall(found.model.eval(), found.args, found.kwargs, grid, token_inputs_of(found, grid))
