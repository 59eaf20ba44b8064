"""The token grid of a pipeline's call: read from its first model call, or computed from its factors and sizes.

Latents come in a few layouts, as videos or pictures with their channels, or packed into a sequence of tokens. Packed
ones say where each token stands: in ids, in a list of shapes, or in sizes beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch

from ..errors import PlanError
from ..plan.partition import Grid
from .observe import FirstCall

SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
"""What pipelines call the number of pixels to a latent; the first that there is."""
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""The same for frames."""
LAYOUTS = {5: ((2, 1), (1, 2), (1, 4)), 4: ((None, 1), (None, 3))}
"""Of latents with so many dims: their dims of frames and of channels, the usual ones first."""


@dataclass(frozen=True)
class Factors:
    """What a pipeline divides sizes by.

    Attributes:
        temporal: frames to a latent, but for the first frame.
        spatial: pixels to a latent, each way.
        patch: latents to a token, (frames, height, width).
    """

    temporal: int
    spatial: int
    patch: Grid

    @classmethod
    def of(cls, pipe: Any, model: Any) -> Factors:
        """Those of a pipeline.

        Raises:
            PlanError: it does not say them.
        """
        spatial = next((getattr(pipe, name) for name in SPATIAL if isinstance(getattr(pipe, name, None), int)), None)
        if spatial is None:
            raise PlanError(f"{type(pipe).__name__} does not say how many pixels a latent has: give mask on the grid")
        temporal = next((getattr(pipe, name) for name in TEMPORAL if isinstance(getattr(pipe, name, None), int)), 1)
        return cls(temporal, spatial, patch_of(model.config))

    @property
    def token_pixels(self) -> tuple[int, int]:
        """Height and width of a token, in pixels."""
        return self.spatial * self.patch[1], self.spatial * self.patch[2]

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames a video has."""
        return (num_frames - 1) // self.temporal + 1

    def frames(self, num_frames: int) -> int:
        """How many frames a pipeline makes of so many: those that fill their latents."""
        fits = num_frames % self.temporal == 1 % self.temporal
        return num_frames if fits else num_frames // self.temporal * self.temporal + 1


def patch_of(config: Any) -> Grid:
    """The patch size of a transformer's config as (frames, height, width): models write it in several ways."""
    given = getattr(config, "patch_size", None)
    if given is None:
        several = getattr(config, "all_patch_size", None) or (1,)
        given = several[0]
    if isinstance(given, int):
        return getattr(config, "patch_size_t", None) or 1, given, given
    sizes = tuple(given)
    return (1, *sizes) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])


def grid_of_call(call: FirstCall, height: int, width: int) -> Grid:
    """(T', H', W') of the tokens that are denoised.

    Args:
        call: the first model call.
        height: of the mask, which tells layouts apart.
        width: of the mask.

    Raises:
        PlanError: the call does not say.
    """
    arguments = call.arguments
    latents = next(iter(arguments.values()))
    if isinstance(latents, list | tuple):  # one entry for each sample of a batch
        latents = latents[0][None]
    if not isinstance(latents, torch.Tensor):
        raise PlanError(f"the first argument of {type(call.model).__name__} is no tensor, so there are no latents")
    if latents.ndim == 3:
        return _packed(arguments, latents.shape[1], type(call.model).__name__)
    patch = patch_of(call.model.config)
    fitting = [sizes for sizes in _unpacked(latents.shape, call.model.config) if _is_like(sizes[1:], height, width)]
    if not fitting:
        raise PlanError(
            f"{type(call.model).__name__} is given latents {list(latents.shape)}, which are not like a mask of "
            f"{height} x {width} (height x width): give the mask of the pictures that are edited"
        )
    t, h, w = fitting[0]
    return ceil(t / patch[0]), h // patch[1], w // patch[2]


def _unpacked(shape: Sequence[int], config: Any) -> Iterator[Grid]:
    """The sizes (frames, height, width) of latents, by each layout that can be meant, the likeliest first."""
    channels = {value for name, value in config.items() if "in_" in name and isinstance(value, int)}
    layouts = LAYOUTS.get(len(shape), ())
    for time, channel in sorted(layouts, key=lambda layout: shape[layout[1]] not in channels):
        space = [dim for dim in range(1, len(shape)) if dim not in (time, channel)]
        yield 1 if time is None else shape[time], shape[space[0]], shape[space[1]]


def _is_like(sizes: tuple[int, int], height: int, width: int) -> bool:
    """Whether latents of these sizes can be those of pictures of this height and width: to a latent."""
    h, w = sizes
    return abs(h * width - w * height) <= max(height, width)


def token_inputs_of(call: FirstCall, grid: Grid) -> dict[str, tuple[int, int]]:
    """The packed inputs that hold tokens of the grid: the dim of the tokens, and the row of the first, by name.

    They are the latents, and lists of as many rows, such as what a ControlNet adds in each block.
    """
    (name, latents), *others = call.arguments.items()
    if not isinstance(latents, torch.Tensor) or latents.ndim != 3:
        return {}
    length = latents.shape[1]
    first = _first_row(call.arguments, length, prod(grid))
    lists = [
        other
        for other, value in others
        if isinstance(value, list | tuple) and value and all(_has_rows(entry, length) for entry in value)
    ]
    return dict.fromkeys((name, *lists), (1, first))


def _has_rows(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == length


def _first_row(arguments: Mapping[str, Any], length: int, count: int) -> int:
    """Where the tokens of the grid begin in a sequence of `length`, `count` of them: references may stand in front."""
    for ids in _ids(arguments, length):
        return int((ids[:, 0] == ids[:, 0].min()).nonzero()[0]) if len(ids) > count else 0
    return 0


def _ids(arguments: Mapping[str, Any], length: int) -> Iterator[torch.Tensor]:
    """Tensors that say of each token where it stands, `[length, axes]`. Rows for the text may stand before those."""
    others = [value for value in list(arguments.values())[1:] if isinstance(value, torch.Tensor)]
    texts = {0, *(value.shape[1] for value in others if value.ndim > 2)}
    for ids in others:
        if ids.ndim in (2, 3) and ids.shape[-2] - length in texts and 2 < ids.shape[-1] < 6:
            yield ids.reshape(-1, *ids.shape[-2:])[0, -length:].double()


def _packed(arguments: Mapping[str, Any], length: int, name: str) -> Grid:
    """The grid of a packed sequence of `length` tokens, those of references among them."""
    frames, height, width = (arguments.get(axis) for axis in ("num_frames", "height", "width"))
    if isinstance(frames, int) and isinstance(height, int) and isinstance(width, int):
        return frames, height, width
    shapes = arguments.get("img_shapes")
    if shapes is not None:
        first = shapes[0]
        return tuple(first[0] if isinstance(first[0], list | tuple) else first)
    for ids in _ids(arguments, length):
        grid = _grid_of_ids(ids)
        if grid is not None:
            return grid
    raise PlanError(
        f"{name} is given {length} packed tokens, and nothing that says where they stand: give the mask on the token "
        "grid, [T', H', W']"
    )


def _grid_of_ids(ids: torch.Tensor) -> Grid | None:
    """The grid whose tokens these are, `[N, axes]`: frame, row, column, and what else there is.

    References differ from them in the first axis, and have higher numbers there.
    """
    own = ids[ids[:, 0] == ids[:, 0].min()]
    rows, columns = set(own[:, 1].tolist()), set(own[:, 2].tolist())
    frames, left = divmod(len(own), len(rows) * len(columns))
    return None if left or not frames else (frames, len(rows), len(columns))
