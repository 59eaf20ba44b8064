"""Whatever people have as a mask, as bool `[T, H, W]`: pictures, arrays and tensors, of 0/1, 0/255, 16 bits or labels.

White is generated, as in diffusers and ComfyUI. Values that can mean several things are refused, with what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from ..errors import MaskError

THRESHOLD = 0.5
"""Masked is what lies above this share of white, as in diffusers."""
CHANNELS = (1, 3, 4)
"""How long an axis of channels is: grey, colours, colours and alpha."""
SHAPES = "[frames, height, width], [height, width], or either with a channel or a batch of one"
COLOURED = 64
"""By how many of 255 levels the channels of a pixel differ where it has a colour, and not only compression noise."""
GREY = (0.1, 0.9)
MOST_GREY = 0.5
"""A mask has at most this share of its pixels between these shares of white: else it is a photo or a gradient."""
MOST_LABELS = 64
"""A mask with more values than this is no label map."""


@dataclass(frozen=True)
class Levels:
    """What the pixels of a mask hold.

    Attributes:
        value: `[..., H, W]`, of any type: the brightest channel, so that red on black is white on black.
        alpha: as `value`, or None where there is none.
        coloured: whether some pixels are not grey.
    """

    value: NDArray[Any]
    alpha: NDArray[Any] | None = None
    coloured: bool = False


def to_mask(
    mask: Any,
    *,
    size: tuple[int, int] | None = None,
    threshold: float | None = None,
    invert: bool = False,
    labels: Sequence[int] | None = None,
) -> NDArray[np.bool_]:
    """A mask in memory as bool `[T, H, W]`, true where to generate. T is 1 for a single picture.

    Args:
        mask: what a diffusers pipeline takes, and more. A picture or a list of pictures (Pillow); an array, tensor or
            list `[H, W]`, `[T, H, W]`, with a channel axis (1, 3 or 4 long) behind or before the sizes, with a batch
            axis of 1 in front. Values: bool; 0 and 1; 0 to 255; 16 bits; floats from 0 to 1; labels of objects, where 0
            is the background.
        size: height and width, or divisors of both, where known: they tell a channel axis from a width.
        threshold: masked is what lies above this share of white. By default 0.5, and all objects of a label map.
        invert: black is generated, in place of white.
        labels: the objects of a label map that are generated.

    Raises:
        MaskError: no such shape, or values that are no mask or can mean several things.
    """
    levels = levels_of(mask, size=size, labelled=labels is not None)
    return mask_of(levels, threshold=threshold, invert=invert, labels=labels)


def levels_of(mask: Any, *, size: tuple[int, int] | None = None, labelled: bool = False) -> Levels:
    """The levels `[T, H, W]` of a mask in memory, see `to_mask`; with `labelled` palettes are read as their indices."""
    parts = list(mask) if isinstance(mask, list | tuple) else [mask]
    if parts and isinstance(parts[0], list | tuple) and any(isinstance(part, Image.Image) for part in parts[0]):
        _one_of_a_batch(len(parts))
        parts = list(parts[0])
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    if 0 < len(pictures) < len(parts):
        raise MaskError("the mask is a list of pictures and other things")
    if pictures:
        return stack_levels([levels_of_picture(picture, labelled=labelled) for picture in pictures])
    return _of_array(_as_array(mask), size)


def levels_of_picture(picture: Image.Image, *, labelled: bool = False) -> Levels:
    """The levels `[H, W]` of a picture of any mode."""
    if picture.mode == "P" and labelled:
        return Levels(np.asarray(picture))
    if picture.mode == "P":
        levels = _of_channels(np.asarray(picture.convert("RGBA" if "transparency" in picture.info else "RGB")))
        if not levels.coloured:
            return levels
        # The colours of a palette are names of objects: none of them is half masked for being dark.
        return Levels(np.where(levels.value > 0, np.uint8(255), np.uint8(0)), levels.alpha, coloured=True)
    if picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16"):
        array = np.asarray(picture)
        return Levels(array.astype(array.dtype.newbyteorder("=")))
    if picture.mode not in ("LA", "RGB", "RGBA"):
        picture = picture.convert("RGBA" if picture.mode in ("PA", "La", "RGBa") else "RGB")
    return _of_channels(np.asarray(picture))


def stack_levels(parts: Sequence[Levels]) -> Levels:
    """The levels `[T, H, W]` of those `[H, W]` of each frame."""
    values = [part.value for part in parts]
    if len({value.shape for value in values}) > 1:
        raise MaskError("the pictures of the mask have different sizes")
    if len({value.dtype for value in values}) > 1:
        values = [value.astype(np.uint8) * 255 if value.dtype == np.bool_ else value for value in values]
    if len(types := {value.dtype.name for value in values}) > 1:
        raise MaskError(f"the pictures of the mask have different depths: {', '.join(sorted(types))}")
    alpha = None
    if any(part.alpha is not None for part in parts):
        alpha = np.stack([np.full(p.value.shape, np.uint8(255)) if p.alpha is None else p.alpha for p in parts])
    return Levels(np.stack(values), alpha, any(part.coloured for part in parts))


def mask_of(
    levels: Levels,
    *,
    threshold: float | None = None,
    invert: bool = False,
    labels: Sequence[int] | None = None,
    exact: bool = True,
) -> NDArray[np.bool_]:
    """What levels mask, see `to_mask`.

    Args:
        levels: with `[T, H, W]`.
        threshold: see `to_mask`.
        invert: see `to_mask`.
        labels: see `to_mask`.
        exact: false for values that were compressed with loss: what is nearly black is then no label.
    """
    if threshold is not None and (labels is not None or not 0 <= threshold < 1):
        raise MaskError("give either labels or a threshold from 0 to 1 (a share of white)")
    if labels is not None and (levels.coloured or not exact):
        why = "colours" if levels.coloured else "values that were compressed with loss"
        raise MaskError(f"labels pick values of a label map, and the mask has {why}")
    value = levels.value if levels.alpha is None else _with_alpha(levels)
    masked = _decide(value, threshold, labels, exact, levels.coloured)
    if levels.coloured and masked.all():
        raise MaskError("the mask has colours but no black: give a mask with white, or one colour, on black")
    return ~masked if invert else masked


def describe(value: NDArray[Any]) -> str:
    """The values of an array in words, such as "the values 0, 1, 2"."""
    if value.dtype.kind in "iu" and len(distinct := _count(value)[0]) <= 8:
        return f"the value{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct))}"
    return f"values from {value.min():g} to {value.max():g}"


def _as_array(mask: Any) -> NDArray[Any]:
    """Numpy knows neither bfloat16 nor other devices, and has no name for a ragged list."""
    if isinstance(mask, list | tuple) and any(isinstance(part, torch.Tensor) for part in mask):
        mask = [_as_array(part) for part in mask]
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        mask = mask.float() if mask.is_floating_point() else mask
    try:
        array = np.asarray(mask)
    except ValueError as error:
        raise MaskError(f"the mask must be {SHAPES}: {error}") from error
    if array.ndim not in range(2, 6) or array.size == 0:
        raise MaskError(f"the mask must be {SHAPES}, got shape {array.shape}")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise MaskError("the mask must hold finite numbers or booleans")
    return array


def _of_array(array: NDArray[Any], size: tuple[int, int] | None) -> Levels:
    """The levels `[T, H, W]` of `[H, W]`, `[T, H, W]`, `[T, C, H, W]`, `[C, T, H, W]`, a batch of one, and so on."""
    shape = array.shape
    if _channels_last(shape, size):
        lead = shape[:-3]
    elif len(shape) == 5:
        _one_of_a_batch(shape[0])
        # Diffusers puts frames before channels: so it is where both may be channels.
        channels = 2 if shape[2] in CHANNELS else 1
        array, lead = np.moveaxis(array, channels, -1), (1, shape[3 - channels])
    elif len(shape) == 4 and (shape[1] in CHANNELS or shape[0] in CHANNELS):
        channels = 1 if shape[1] in CHANNELS else 0
        array, lead = np.moveaxis(array, channels, -1), (shape[1 - channels],)
    else:
        array, lead = array[..., None], shape[:-2]
    if len(lead) > 1:
        _one_of_a_batch(lead[0])
    if array.shape[-1] not in CHANNELS:
        raise MaskError(f"the mask must be {SHAPES}, got shape {shape}")
    return _of_channels(array.reshape(-1, *array.shape[-3:]))


def _channels_last(shape: tuple[int, ...], size: tuple[int, int] | None) -> bool:
    if len(shape) < 3 or shape[-1] not in CHANNELS:
        return False
    if size is None:
        return True

    def fits(height: int, width: int) -> bool:
        assert size is not None
        return height % size[0] == 0 and width % size[1] == 0

    return fits(*shape[-3:-1]) and not fits(*shape[-2:])


def _one_of_a_batch(count: int) -> None:
    if count != 1:
        raise MaskError(f"these are {count} masks: make a plan for each sample of the batch")


def _of_channels(array: NDArray[Any]) -> Levels:
    """The levels of `[..., H, W, C]`: grey, grey and alpha, colours, colours and alpha."""
    channels = array.shape[-1]
    alpha = array[..., -1] if channels in (2, 4) else None
    if channels < 3:
        return Levels(array[..., 0], alpha)
    colours = [array[..., channel] for channel in range(3)]
    # Pairs, since a maximum over a short last axis is slow.
    brightest = np.maximum(np.maximum(colours[0], colours[1]), colours[2])
    if array.dtype == np.bool_:
        return Levels(brightest, alpha)
    darkest = np.minimum(np.minimum(colours[0], colours[1]), colours[2])
    return Levels(brightest, alpha, bool((brightest - darkest).max() > COLOURED / 255 * _white(brightest.max())))


def _with_alpha(levels: Levels) -> NDArray[Any]:
    """The channel that holds the mask: alpha where it varies, else the colours."""
    assert levels.alpha is not None
    opaque = levels.alpha > THRESHOLD * _white(levels.alpha.max())
    if opaque.all():
        return levels.value
    if not opaque.any():
        raise MaskError("the mask is transparent everywhere: give one without an alpha channel")
    seen = levels.value[opaque] / _white(levels.value.max())
    black, white = (seen <= GREY[0]).mean(), (seen >= GREY[1]).mean()
    if min(black, white) > 0.01 and black + white > 1 - GREY[0]:
        raise MaskError(
            f"the mask has two masks: {opaque.mean():.0%} of it is opaque, and of that {white:.0%} is white and "
            f"{black:.0%} black; give one without an alpha channel, or the alpha channel alone"
        )
    return levels.alpha


def _white(high: Any) -> int:
    """The value of white, by the largest value there is."""
    white = next((white for white in (1, 255, 65535) if high <= white), None)
    if white is None:
        raise MaskError(f"the mask holds values up to {high:g}: white is 1, 255 or 65535")
    return white


def _decide(
    value: NDArray[Any], threshold: float | None, labels: Sequence[int] | None, exact: bool, coloured: bool
) -> NDArray[np.bool_]:
    if value.dtype == np.bool_:
        value = value if labels is None else value.astype(np.uint8)
    low, high = value.min(), value.max()
    if low < 0:
        raise MaskError(f"mask values must lie between 0 and 1, 0 and 255 or 0 and 65535, got {low:g} to {high:g}")
    if value.dtype.kind == "f" and (high > 1 or labels is not None) and (value == np.rint(value)).all():
        value = value.astype(np.int64)
    if labels is not None:
        return _pick(value, labels)
    if value.dtype == np.bool_:
        return value
    white = _white(high) if exact else 255
    if threshold is None and value.dtype.kind in "iu" and white > 1:
        return np.asarray(value > _cut(value, white, exact, coloured))
    return np.asarray(value > (THRESHOLD if threshold is None else threshold) * white)


def _pick(value: NDArray[Any], labels: Sequence[int]) -> NDArray[np.bool_]:
    """The pixels of some objects."""
    if value.dtype.kind == "f":
        raise MaskError(f"labels pick whole numbers, and the mask holds {describe(value)}")
    masked = np.isin(value, labels)
    if missing := sorted(set(labels) - set(np.unique(value[masked]).tolist())):
        raise MaskError(f"no pixel has the label {', '.join(map(str, missing))}: the mask holds {describe(value)}")
    return masked


def _cut(value: NDArray[Any], white: int, exact: bool, coloured: bool) -> float:
    """Above which whole number a pixel is masked: above half of white, or above 0 where the numbers are labels."""
    distinct, counts = _count(value)
    cut = THRESHOLD * white
    above = distinct > cut
    if exact and len(distinct) <= 2 and (distinct[0] == 0 or above.any()):
        return 0 if distinct[0] == 0 else cut
    if above[distinct > 0].all():
        return cut
    if exact and (len(distinct) <= 2 or (len(distinct) <= MOST_LABELS and _fill_areas(value, distinct))):
        if distinct[0] == 0 and (coloured or not above.any()):  # a colour names an object, however dark it is
            return 0
        raise MaskError(
            f"the mask holds {describe(value)}, which may be labels or shades: give labels (such as {distinct[-1]}), "
            "or a threshold"
        )
    share = counts[(distinct > GREY[0] * white) & (distinct < GREY[1] * white)].sum() / counts.sum()
    if share > MOST_GREY or (exact and not above.any()):
        raise MaskError(f"the mask holds {describe(value)}, {share:.0%} of it grey: give a threshold")
    return cut


def _count(value: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The whole numbers that occur, and how often."""
    if value.max() >= 2**16 or value.min() < 0:
        distinct, counts = np.unique(value, return_counts=True)
        return distinct, counts
    # `np.unique` sorts, which takes ten times as long; all frames at once would be copied to 64 bits.
    frames = [np.bincount(frame.ravel(), minlength=int(value.max()) + 1) for frame in value]
    counts = np.sum(frames, axis=0)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _fill_areas(value: NDArray[Any], distinct: NDArray[Any]) -> bool:
    """Whether each number fills at least 3 x 3 pixels somewhere: labels do, soft edges and noise do not."""
    left = set(distinct.tolist())
    for frame in value:
        flat = frame[minimum_filter(frame, 3) == maximum_filter(frame, 3)]
        left -= set(np.unique(flat).tolist())
        if not left:
            return True
    return False
