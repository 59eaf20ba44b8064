"""What a command finds out about the call of a pipeline before it reads the weights: arguments, pictures and sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputFileError, PlanError
from ..pipelines.inputs import Inputs, holds_pictures

ImageFile = Annotated[Path | None, typer.Option("--image", help="The picture to edit.")]
Prompt = Annotated[str | None, typer.Option(help="What to generate inside the mask.")]
CallArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        help="Another argument of the pipeline's call: strength=0.8, true_cfg_scale=4, control_image=depth.png, "
        "prompt_embeds=text.npy, ... Repeatable.",
    ),
]
OwnHeight = Annotated[
    int | None,
    typer.Option(
        help="Height in pixels. [default: a picture's own, up to a megapixel; the pipeline's for videos (Wan: 480)]",
        min=1,
    ),
]
OwnWidth = Annotated[int | None, typer.Option(help="Width in pixels. [default: like the height; Wan: 832]", min=1)]
OwnFrames = Annotated[
    int | None,
    typer.Option(
        help="Frames to edit: one more than a multiple of what the VAE takes together (Wan: 4). "
        "[default: the pipeline's, Wan: 81]",
        min=1,
    ),
]
OwnSteps = Annotated[
    int | None, typer.Option(help="Denoising steps. [default: those of the plan, or the pipeline's, Wan: 50]", min=1)
]
WAN = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50}
"""What Wan's pipelines make by default, for those that leave it open."""
PIXELS = 2**20
"""Of a picture whose size is not given, at most: what image models are trained on."""
MULTIPLE = 16
"""Of its height and width: what the usual VAE and patch make one token of."""
PICTURE_SIDE = 1024
"""Of a picture where none is given."""


def call_arguments(given: Iterable[str]) -> dict[str, Any]:
    """What `--call NAME=VALUE` says, once or more.

    A value is a file for an argument that takes pictures (see `holds_pictures`), and where it ends in .npy, an array of
    numbers; else it is JSON, such as a number; else text.

    Raises:
        PlanError: one is written otherwise.
        InputFileError: a file cannot be read.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise PlanError(f"--call takes NAME=VALUE, got {text}")
        found[name] = _value(name, value)
    return found


def _value(name: str, text: str) -> Any:
    import numpy as np
    import torch

    from ..edit.masks import load_array
    from ..edit.media import read_pictures

    if text.endswith(".npy"):
        return torch.from_numpy(np.ascontiguousarray(load_array(Path(text))))
    if holds_pictures(name):
        pictures = read_pictures(Path(text))
        return pictures[0] if len(pictures) == 1 else pictures
    try:
        return json.loads(text)
    except ValueError:
        return text


def inputs_of(model: Path, video: Path | None, image: Path | None) -> Inputs:
    """The arguments of a checkpoint's pipeline, for what is given to edit; without, as its class decides.

    Raises:
        InputFileError: no checkpoint there; both are given, or what the pipeline does not take.
    """
    from ..edit.editing import pipeline_class

    pipeline = pipeline_class(model)
    own = Inputs.of(pipeline)
    if video is None and image is None:
        return own
    if video is not None and image is not None:
        raise InputFileError("give --video or --image, not both")
    inputs = Inputs.of(pipeline, still=image is not None)
    if inputs.source is None:
        kind, other = ("video", "--image") if image is None else ("picture", "--video")
        raise InputFileError(f"{own.pipeline} takes no {kind}{f': give {other}' if own.source else ''}")
    return inputs


def check_source(inputs: Inputs, video: Path | None, image: Path | None) -> None:
    """See that what is edited is given.

    Raises:
        InputFileError: it is not.
    """
    if inputs.source is None:
        raise InputFileError(f"{inputs.pipeline} takes no picture and no video: it edits nothing")
    if video is None and image is None:
        needed = "--video, the video" if inputs.takes_video else "--image, the picture"
        raise InputFileError(f"{inputs.pipeline} needs {needed} that is edited")


OWN_OPTIONS: dict[str | None, str] = {
    "height": "--height", "width": "--width", "num_frames": "--num-frames", "num_inference_steps": "--steps",
    "prompt": "--prompt", "generator": "--seed", "output_type": "--out", "return_dict": "--out",
}  # fmt: skip
"""What gives these arguments, which the plan and the edit have to share."""


def check_call(inputs: Inputs, call: Mapping[str, Any], **options: Any) -> None:
    """See that the pipeline takes what is given, and is given what it cannot do without, as far as its signature says.

    Args:
        inputs: of the pipeline.
        call: of `call_arguments`.
        options: arguments that options of the command give, by name; None where the user did not.

    Raises:
        PlanError: it does not, or is not.
    """
    given = {name for name, value in options.items() if value is not None}
    found = (inputs.source, inputs.mask, "height", "width", "num_frames")
    own = {**OWN_OPTIONS, inputs.source: "--image or --video", inputs.mask: "--mask"}
    for name in call:
        if name in own:
            raise PlanError(f"--call {name}=... is not for what has an option of its own: use {own[name]}")
    if unknown := inputs.unknown({*given, *call}):
        known = ", ".join(inputs.parameters)
        raise PlanError(f"{inputs.pipeline} takes no {' and no '.join(unknown)}: its arguments are {known}")
    if missing := inputs.missing({*given, *call, *filter(None, found)}):
        options_of_call = " ".join(f"--call {name}=..." for name in missing)
        raise PlanError(f"{inputs.pipeline} cannot do without {' and '.join(missing)}: give {options_of_call}")


def check_prompt(inputs: Inputs, prompt: str | None, call: Mapping[str, Any]) -> None:
    """See that there is a prompt, or what stands for one.

    Raises:
        PlanError: there is none.
    """
    from ..edit.editing import is_encoded

    if prompt is None and "prompt" in inputs.parameters and not is_encoded("prompt", call):
        raise PlanError(f"{inputs.pipeline} needs --prompt, what to generate inside the mask")


def steps_of(inputs: Inputs | None, steps: int | None) -> int:
    """The number of denoising steps: those that are given, or the pipeline's own; without one Wan's."""
    name = "num_inference_steps"
    own = WAN[name] if inputs is None else inputs.default(name, WAN[name])
    return own if steps is None else steps


def size_of(
    inputs: Inputs | None,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    picture: Path | None = None,
) -> tuple[int, int, int]:
    """Frames, height and width of an edit: those that are given, else the picture's, or what the pipeline makes.

    Args:
        inputs: of the pipeline; None for Wan's sizes.
        num_frames: that are given.
        height: in pixels.
        width: in pixels.
        picture: or a mask of it, whose size counts where a picture is made.

    Raises:
        InputFileError: the picture cannot be read.
    """
    from ..edit.masks import size_in

    if inputs is None or inputs.makes_video:
        own = WAN if inputs is None else {name: inputs.default(name, usual) for name, usual in WAN.items()}
        return num_frames or own["num_frames"], height or own["height"], width or own["width"]
    if picture is None:
        return 1, height or PICTURE_SIDE, width or PICTURE_SIDE
    return 1, *size_of_picture(size_in(picture), height, width)


def size_of_picture(own: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """The size (height, width) that a picture is edited in: in its own shape, as far as it is not given."""
    if height is None and width is None:
        scale = min(1.0, math.sqrt(PIXELS / (own[0] * own[1])))
    else:
        scale = height / own[0] if height is not None else (width or 0) / own[1]
    rows, columns = (max(MULTIPLE, int(side * scale) // MULTIPLE * MULTIPLE) for side in own)
    return height or rows, width or columns
