"""What a plan has to know of one call of a pipeline: which tokens are masked, and the times of its steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import MaskError, PlanError
from ..plan.mask import to_mask
from ..plan.partition import Grid, latents_to_tokens
from .inputs import Inputs
from .layout import Factors, grid_of_call, token_inputs_of
from .look_ahead import check_one_model
from .observe import FirstCall, first_call, models_of, noise_levels

SIZES = frozenset({"height", "width", "num_frames", "num_inference_steps", "guidance_scale", "output_type"})
"""Arguments of a pipeline that say nothing of what is edited: with these alone it cannot be run."""


@dataclass(frozen=True)
class PlannedCall:
    """One call of a pipeline.

    Attributes:
        grid: (T', H', W') of the tokens that are denoised.
        mask: bool `grid`.
        timesteps: float64 `[S]` in the scheduler's units.
        sigmas: float64 `[S]`, or empty.
        token_inputs: see `plan.Plan`.
        first: the first model call, where the pipeline was run.
        arguments: that it was run with.
    """

    grid: Grid
    mask: NDArray[np.bool_]
    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    token_inputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first: FirstCall | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def planned_call(
    pipe: Any, mask: Any, arguments: Mapping[str, Any], num_reference_images: int | None = None
) -> PlannedCall:
    """What a call is, from its first model call if the arguments suffice to run the pipeline.

    Arguments as in `plan_for` of `planning`.

    Raises:
        PlanError: the arguments do not say, or its scheduler cannot look ahead.
        MaskError: the mask is none, or does not fit.
    """
    check_one_model(pipe)
    size = _size(arguments)
    pixels = to_mask(mask, size=size)
    if set(arguments) <= SIZES:
        return _computed(pipe, pixels, arguments, num_reference_images or 0)
    if arguments.get("padding_mask_crop") is not None:
        raise PlanError("padding_mask_crop edits a part of the picture, which the mask does not fit: crop both first")
    given = dict(arguments)
    inputs = Inputs.of(type(pipe))
    if inputs.mask is not None and given.get(inputs.mask) is None:
        pictures = [Image.fromarray(frame.astype(np.uint8) * 255) for frame in pixels]
        given[inputs.mask] = pictures if inputs.takes_video else pictures[0]
    call = first_call(pipe, given)
    grid = grid_of_call(call, *(size or pixels.shape[1:]))
    factors = Factors.of(pipe, call.model)
    frames = _default(pipe, arguments, "num_frames", len(pixels))
    references = _references(factors, grid, frames) if num_reference_images is None else num_reference_images
    stretched = _has_size_of(pixels, given.get(inputs.source or ""))
    mask = on_grid(pixels, grid, factors, references, stretched=stretched)
    return PlannedCall(grid, mask, call.timesteps, call.sigmas, token_inputs_of(call, grid), call, given)


def _has_size_of(pixels: NDArray[np.bool_], pictures: Any) -> bool:
    """Whether a mask is of these pictures, or this one, as far as its size says."""
    first = next(iter(pictures), None) if isinstance(pictures, list | tuple) else pictures
    return isinstance(first, Image.Image) and first.size == pixels.shape[:0:-1]


def _computed(pipe: Any, pixels: NDArray[np.bool_], arguments: Mapping[str, Any], references: int) -> PlannedCall:
    """What a call is, by sizes alone."""
    model = models_of(pipe)[0]
    model = getattr(model, "_orig_mod", model)
    factors = Factors.of(pipe, model)
    height, width = _size(arguments) or pixels.shape[1:]
    frames = factors.frames(_default(pipe, arguments, "num_frames", len(pixels)))
    rows, columns = factors.token_pixels
    if height % rows or width % columns:
        raise PlanError(f"height and width must be multiples of {rows} and {columns}, got {height} and {width}")
    latent_frames = references + factors.latent_frames(frames)
    if latent_frames % factors.patch[0]:
        raise PlanError(f"{latent_frames} latent frames are no multiple of the patch size {factors.patch[0]}")
    grid = latent_frames // factors.patch[0], height // rows, width // columns
    if pixels.shape not in (grid, (frames, height, width), (1, height, width)):
        shapes = f"{(frames, height, width)} pixels, or one still, or {grid} tokens"
        raise MaskError(f"the mask has shape {pixels.shape}, this call needs {shapes}")
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(_default(pipe, arguments, "num_inference_steps", 50))
    except ValueError as error:
        raise PlanError(
            f"the times of {type(pipe).__name__} depend on the call ({error}): give its prompt, and all else that "
            "you give the pipeline"
        ) from error
    timesteps = torch.as_tensor(scheduler.timesteps).double().cpu().numpy()
    mask = on_grid(pixels, grid, factors, references)
    return PlannedCall(grid, mask, timesteps, noise_levels(scheduler, len(timesteps)))


def on_grid(
    pixels: NDArray[np.bool_], grid: Grid, factors: Factors, references: int = 0, *, stretched: bool = False
) -> NDArray[np.bool_]:
    """A mask in pixels, or already on the grid, as bool `grid`.

    Pipelines may scale their pictures first, so a token is masked where any pixel is that it covers a part of. With
    `stretched` they may change their shape too: the mask is known to be that of the pictures.

    Raises:
        MaskError: it has another number of frames, or another shape than the pictures.
    """
    if pixels.shape == grid:
        return pixels
    frames, height, width = pixels.shape
    if not stretched and abs(grid[1] * width - grid[2] * height) > max(height, width):
        raise MaskError(
            f"the mask has {height} x {width} pixels (height x width), the call has {grid[1]} x {grid[2]} tokens: give "
            "the mask of the pictures that are edited"
        )
    scaled = pixels
    for axis in (1, 2):
        size, tokens = pixels.shape[axis], grid[axis]
        ends = [-(-(place + 1) * size // tokens) for place in range(tokens)]
        starts = [place * size // tokens for place in range(tokens)]
        scaled = np.stack([scaled.take(range(*span), axis).any(axis) for span in zip(starts, ends, strict=True)], axis)
    latent_frames = grid[0] * factors.patch[0] - references
    if frames not in (1, factors.temporal * latent_frames):  # a codec that takes the first frame alone
        wanted = 1 + factors.temporal * (latent_frames - 1)
        if not wanted - factors.temporal * factors.patch[0] < frames < wanted + factors.temporal:
            raise MaskError(f"the mask has {frames} frames, the call has {wanted}, in {latent_frames} latent frames")
        groups = [scaled[:1], *np.split(scaled[1:wanted], range(factors.temporal, wanted - 1, factors.temporal))]
    else:
        groups = np.split(scaled, latent_frames) if frames > 1 else [scaled] * latent_frames
    # Frames that a pipeline adds at the end are like the last one.
    latent = [np.asarray(group.any(axis=0)) for group in groups if len(group)]
    latent += [latent[-1]] * (latent_frames - len(latent))
    return latents_to_tokens(np.stack(latent), grid, factors.patch[0], references)


def _references(factors: Factors, grid: Grid, num_frames: int) -> int:
    """How many latent frames stand in front that are not of the video, which may be filled up to whole patches."""
    patch = factors.patch[0]
    tokens = -(-factors.latent_frames(num_frames) // patch)
    return max(0, grid[0] - tokens) * patch


def _size(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = arguments.get("height"), arguments.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _default(pipe: Any, arguments: Mapping[str, Any], name: str, other: int) -> int:
    """An argument, else its default in the pipeline's signature, else another number."""
    given = arguments.get(name)
    return int(Inputs.of(type(pipe)).default(name, other) if given is None else given)
