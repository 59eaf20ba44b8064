"""Crop and stitch, the rival of caches: the surroundings of a mask are edited as a smaller video, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MaskError
from .plan import Plan
from .schedule import StepKind


@dataclass(frozen=True)
class Box:
    """The same part of every frame, in pixels: rows from `top` to before `bottom`, columns from `left` to `right`."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def around(cls, mask: NDArray[np.bool_], surroundings: float, multiple: tuple[int, int]) -> Box:
        """The box around what the mask covers in any frame.

        Args:
            mask: bool `[T, H, W]`; H and W are multiples of `multiple`.
            surroundings: how far the box reaches past what is masked on each side, as a share of its height and its
                width; not past the edges of the picture.
            multiple: of which rows and columns the box begins and ends: those of a token.

        Raises:
            MaskError: the mask is empty.
        """
        if not mask.any():
            raise MaskError("the mask is empty: there is nothing to crop around")
        rows = _span(np.any(mask, axis=(0, 2)), surroundings, multiple[0])
        return cls(*rows, *_span(np.any(mask, axis=(0, 1)), surroundings, multiple[1]))

    def cut(self, video: Any) -> Any:
        """This part of an array `[T, H, W, ...]`."""
        return video[:, self.top : self.bottom, self.left : self.right]

    def paste(self, part: NDArray[np.uint8], video: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A copy of `[T, H, W, 3]` with another part here."""
        result = video.copy()
        self.cut(result)[:] = part
        return result


def _span(covered: NDArray[np.bool_], surroundings: float, multiple: int) -> tuple[int, int]:
    """Where the box begins and ends along one axis."""
    places = np.flatnonzero(covered)
    first, last = int(places[0]), int(places[-1]) + 1
    around = (last - first) * surroundings
    return (
        max(floor((first - around) / multiple) * multiple, 0),
        min(ceil((last + around) / multiple) * multiple, covered.size),
    )


SURROUNDINGS = 0.5
"""Of the crop that `crop_advice` thinks of."""


def crop_advice(plan: Plan, mask: NDArray[np.bool_], multiple: tuple[int, int]) -> str | None:
    """A line that says so if cropping would probably be the better choice, by sizes alone.

    The plain model computes all tokens of a crop in each step, a plan all tokens of the clip in FULL steps and the
    active ones in PARTIAL steps. The crop is better if it computes fewer in all.

    Args:
        plan: for the whole clip.
        mask: bool `[T, H, W]`, in pixels.
        multiple: rows and columns of a token, in pixels.
    """
    share = Box.around(mask, SURROUNDINGS, multiple).cut(mask).size / mask.size
    crop = share * plan.num_tokens * len(plan.steps)
    computed = plan.num_tokens * plan.steps.count(StepKind.FULL) + plan.num_active * plan.steps.count(StepKind.PARTIAL)
    if crop >= computed:
        return None
    return (
        f"the mask with half its size around it is {share:.0%} of the picture: all {len(plan.steps)} steps of such a "
        f"crop compute {crop:.0f} tokens, this plan {computed}; to edit the crop and put it back is probably better"
    )
