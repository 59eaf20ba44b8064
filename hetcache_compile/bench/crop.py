"""An edit of what is around the mask, as the edit of a smaller video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..edit.editing import EditRequest, call_arguments
from ..errors import MethodError
from ..pipelines.layout import Factors
from ..pipelines.observe import first_call, models_of
from ..plan.crop import Box


def box_of(pipe: Any, request: EditRequest, surroundings: float) -> Box:
    """What is cropped of a request's video; see `Box.around`."""
    return Box.around(request.mask, surroundings, Factors.of(pipe, models_of(pipe)[0]).token_pixels)


def cropped(pipe: Any, request: EditRequest, box: Box) -> EditRequest:
    """The request for what is in the box.

    Its noise is that of the whole video there, so that both results can be compared.

    Raises:
        MethodError: the pipeline's latents are no video.
    """
    noise = next(iter(first_call(pipe, call_arguments(pipe, request)).arguments.values()))
    if not isinstance(noise, torch.Tensor) or noise.ndim != 5:
        raise MethodError(f"{type(pipe).__name__} has no latents of a video, of which some could be cut out")
    pixels = Factors.of(pipe, models_of(pipe)[0]).spatial
    rows, columns = slice(box.top // pixels, box.bottom // pixels), slice(box.left // pixels, box.right // pixels)
    part = {"latents": noise[..., rows, columns].contiguous()}
    return replace(request, video=box.cut(request.video), mask=box.cut(request.mask), call={**request.call, **part})
