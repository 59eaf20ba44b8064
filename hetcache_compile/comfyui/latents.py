"""Latents and masks as ComfyUI has them, on the token grid of a model.

Latents are `[B, C, H, W]` or `[B, C, T, H, W]`. Masks are fractional, 0 to 1, and 1 is generated anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MaskError, PlanError
from ..pipelines.call import on_grid
from ..pipelines.layout import Factors, patch_of
from ..plan.partition import Grid

VISIBLE = 1 / 510
"""Above it a value is not 0 in 8 bits. ComfyUI mixes known and generated latents by the mask, so a token with any such
value is generated in part."""


def patch_of_model(model: Any) -> Grid:
    """The patch size (frames, height, width) of a diffusion model of ComfyUI: latents to a token.

    Args:
        model: has a `patch_size`, or a `patchifier` with one, or `patch_spatial` and `patch_temporal`.

    Raises:
        PlanError: it has none of them.
    """
    for holder in (model, getattr(model, "patchifier", None)):
        if getattr(holder, "patch_size", None) is not None:
            return patch_of(holder)
    spatial = getattr(model, "patch_spatial", None)
    if spatial is None:
        raise PlanError(f"{type(model).__name__} has no patch size, so its tokens are not known")
    return getattr(model, "patch_temporal", 1), spatial, spatial


def grid_of(shape: Sequence[int], patch: Grid) -> Grid:
    """The token grid (T', H', W') of latents of this shape; models fill up the last patch.

    Raises:
        PlanError: these are no latents of pictures or of a video.
    """
    if len(shape) not in (4, 5):
        raise PlanError(f"latents of shape {list(shape)} are neither pictures [B, C, H, W] nor a video [B, C, T, H, W]")
    frames = shape[2] if len(shape) == 5 else 1
    return ceil(frames / patch[0]), ceil(shape[-2] / patch[1]), ceil(shape[-1] / patch[2])


def tokens_of_mask(
    mask: Any, shape: Sequence[int], patch: Grid, temporal_factor: int = 1, reference_frames: int = 0
) -> NDArray[np.bool_]:
    """The tokens that a mask covers any part of, as bool `[T', H', W']`.

    Pictures of one batch have one plan, so that the union of their masks counts.

    Args:
        mask: `[H, W]`, `[B, H, W]` or a `noise_mask` with an axis of channels. For a video B counts frames: pixel
            frames, or one that stands for all, but for the references; or latent frames, all of them.
        shape: of the latents.
        patch: latents to a token.
        temporal_factor: pixel frames to a latent frame, but for the first.
        reference_frames: latent frames in front that hold references, such as VACE's: they are kept.

    Raises:
        MaskError: it is empty, is not like the latents, or holds other values than 0 to 1.
        PlanError: see `grid_of`.
    """
    grid = grid_of(shape, patch)
    frames = _frames(mask) > VISIBLE
    if not bool(frames.any()):
        raise MaskError("the mask is empty: there is nothing to generate")
    latent_frames = shape[2] if len(shape) == 5 else 1
    if latent_frames == 1:  # pictures, with or without an axis of frames
        frames = frames.any(dim=0, keepdim=True)
    covered = frames.numpy()
    if len(covered) == latent_frames:
        temporal_factor, reference_frames = 1, 0
    return on_grid(covered, grid, Factors(temporal_factor, 1, patch), reference_frames)


def tokens_of_denoise_mask(mask: torch.Tensor, shape: Sequence[int], patch: Grid) -> NDArray[np.bool_]:
    """The same for the mask that a sampler has: of the latents' own shape, with 1 or C channels.

    Raises:
        MaskError: see `tokens_of_mask`.
        PlanError: see `grid_of`.
    """
    if mask.ndim != len(shape) or tuple(mask.shape[2:]) != tuple(shape[2:]):
        raise MaskError(f"the noise mask has shape {list(mask.shape)}, the latents have {list(shape)}")
    together = mask.amax(dim=(0, 1))
    return tokens_of_mask(together, shape, patch)


def _frames(mask: Any) -> torch.Tensor:
    """A mask as float `[frames, H, W]` on the CPU."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3, 4, 5) or not mask.numel():
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise MaskError(f"the mask must be a tensor [H, W] or [B, H, W], got {found}")
    values = mask.detach().float().cpu()
    if not bool(torch.isfinite(values).all()) or values.min() < -VISIBLE or values.max() > 1 + VISIBLE:
        raise MaskError(f"mask values must lie between 0 and 1, got {values.min():g} to {values.max():g}")
    if values.ndim == 5:
        values = values.amax(dim=(0, 1))  # [B, C, T, H, W]
    return values.reshape(-1, *values.shape[-2:])
