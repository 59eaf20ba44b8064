"""What the call of a pipeline takes, read from its signature: which argument is edited, and which takes the mask."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

VIDEOS = ("video", "background_video")
"""Arguments that take the frames that are edited, as a list of pictures."""
PICTURES = ("image", "control_image")
"""Arguments that take the one picture that is edited. A control image lies under its mask where there is no other."""
MASKS = ("mask", "mask_video", "mask_image", "control_mask")
"""Arguments that take a mask: a list of pictures beside a video, else one picture."""

PICTURE_WORDS = ("image", "images", "video", "mask", "reference")
"""The last word of arguments that take pictures; `prompt_attention_mask` and others of a prompt are none."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a pipeline's call.

    Attributes:
        pipeline: the name of its class.
        parameters: of the call, by name.
        source: the argument that takes what is edited; None where nothing is.
        mask: the argument that takes the mask; None where only the plan has one.
    """

    pipeline: str
    parameters: Mapping[str, inspect.Parameter]
    source: str | None
    mask: str | None

    @classmethod
    def of(cls, pipeline: type, still: bool | None = None) -> Inputs:
        """Those of a pipeline's class. `still` says that a picture is edited, or that none is; without it the class
        decides, and a video comes before a picture."""
        parameters = dict(list(inspect.signature(pipeline.__call__).parameters.items())[1:])
        sources = (*VIDEOS, *PICTURES) if still is None else PICTURES if still else VIDEOS
        source = next((name for name in sources if name in parameters), None)
        mask = next((name for name in MASKS if name in parameters), None)
        return cls(pipeline.__name__, parameters, source, mask)

    @property
    def takes_video(self) -> bool:
        """Whether what is edited is a video."""
        return self.source in VIDEOS

    @property
    def makes_video(self) -> bool:
        """Whether the result is a video: of one, or of a picture and a number of frames."""
        return self.takes_video or "num_frames" in self.parameters

    @property
    def fills(self) -> bool:
        """Whether the pipeline generates where its video is grey: the others hide what is masked by themselves."""
        return (self.source, self.mask) == ("video", "mask")

    def default(self, name: str, other: Any = None) -> Any:
        """The default of an argument; `other` where it has none, or the pipeline decides."""
        parameter = self.parameters.get(name)
        known = parameter is not None and parameter.default not in (None, inspect.Parameter.empty)
        return parameter.default if parameter is not None and known else other

    def unknown(self, given: Iterable[str]) -> list[str]:
        """Those of these names that are no arguments."""
        return sorted(set(given) - set(self.parameters))

    def missing(self, given: Iterable[str]) -> list[str]:
        """The arguments that have no default and are not among these."""
        names = set(given)
        return [
            n for n, parameter in self.parameters.items() if parameter.default is parameter.empty and n not in names
        ]


def holds_pictures(name: str) -> bool:
    """Whether an argument of this name takes pictures, such as `control_image` or `pose_video`."""
    words = name.split("_")
    return words[-1] in PICTURE_WORDS and "prompt" not in words
