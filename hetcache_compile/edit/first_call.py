"""One call of a model to look at: from a pipeline, stopped at its first model call, or from a Python function."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..errors import InputFileError
from ..pipelines.observe import first_call
from ..plan.partition import Grid


@dataclass(frozen=True)
class ModelCall:
    """A model, the arguments of a call of it, and the token grid (T', H', W') of that call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grid: Grid


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


def call_of_pipeline(pipe: Any, height: int, width: int, num_frames: int) -> ModelCall:
    """The first model call of a pipeline that edits masked video, on an empty video that is all mask."""
    from .editing import EditRequest, call_arguments, make_plan

    request = EditRequest(
        video=np.zeros((num_frames, height, width, 3), dtype=np.uint8),
        mask=np.ones((num_frames, height, width), dtype=bool),
        prompt="",
        num_inference_steps=1,
    )
    call = first_call(pipe, {**call_arguments(request), "output_type": "latent"})
    return ModelCall(call.model.eval(), call.args, call.kwargs, make_plan(pipe, request, "full").grid)
