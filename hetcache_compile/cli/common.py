"""What the commands share: options, the progress bar, checks of sizes and names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.methods import parse_option
from ..errors import MaskError, PlanError
from ..pipelines.layout import Factors
from ..pipelines.observe import models_of
from ..plan.options import PlanOptions
from ..plan.schedule import preset_options

ScheduleName = Annotated[
    str | None,
    typer.Option(
        help="full, quality, balanced, fast, paper-slow, paper-fast, teacache:THRESHOLD, optimal:BUDGET "
        "(with a calibration), or a cycle of F, P and R such as FRRP. "
        "[default: balanced; with a calibration optimal:1%]"
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        help="Reach of the margin around the mask, in tokens. [default: 2, or what an optimal schedule finds best]"
    ),
]
ContextRatio = Annotated[
    float, typer.Option(help="Share of context tokens that PARTIAL steps compute.", min=0.0, max=1.0)
]
Extrapolation = Annotated[
    int | None,
    typer.Option(
        help="Order at which outputs that a step does not compute are predicted; 0 repeats. "
        "[default: 1, or 0 for a model without a timestep]",
        min=0,
        max=2,
    ),
]
More = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another option of a plan: selection=hetcache, merged_ratio=0.25, ... Repeatable."),
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
NumFrames = Annotated[
    int, typer.Option(help="Frames to edit: one more than a multiple of what the VAE takes together (Wan: 4).", min=1)
]
Height = Annotated[int, typer.Option(help="Height in pixels.", min=1)]
Width = Annotated[int, typer.Option(help="Width in pixels.", min=1)]
MaskFile = Annotated[
    Path, typer.Option(help="White where to generate: video, folder, picture, .npy or .npz (docs/masks.md).")
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Masked is what is brighter than this share of white. [default: 0.5]", min=0.0, max=0.999),
]
Invert = Annotated[bool, typer.Option("--invert", help="Generate where the mask is black.")]
Labels = Annotated[
    str | None, typer.Option(help="Generate these objects of a label map, such as 1,3. [default: all objects]")
]
StartFrame = Annotated[int, typer.Option(help="First frame of the video to edit.", min=0)]
Memory = Annotated[
    str | None,
    typer.Option(help="What the cache may take on the device, such as 8GiB: a larger one is made smaller."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Classifier-free guidance; 1 turns it off. [default: 5; reference model: 2]")
]
TextTokens = Annotated[int | None, typer.Option(help="Text tokens. [default: 512; reference model: 16]", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]


def _inner(name: str) -> str:
    import torch

    if name not in torch._dynamo.list_backends(()) or name == "hetcache":
        raise PlanError(f"inner must be a backend of torch.compile, such as inductor or eager, got {name}")
    return name


Inner = Annotated[str, typer.Option(help="The torch.compile backend that compiles each form.", callback=_inner)]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]


def options_of(
    context: typer.Context, schedule: str | None, more: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    """Options of a plan, but for those that the user did not give and that a preset or a model decides.

    Raises:
        PlanError: one of `more` is not written as NAME=VALUE, or is no option of a plan.
    """
    given_by_name = dict(parse_option(text) for text in more or ())
    PlanOptions.check(given_by_name)
    own = preset_options(schedule)

    def given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")

    kept = {name: value for name, value in options.items() if value is not None and (name not in own or given(name))}
    return kept | given_by_name


def mask_options(threshold: float | None, invert: bool, labels: str | None, *, has_mask: bool = True) -> dict[str, Any]:
    """What the mask's options mean, for `read_mask`.

    Raises:
        MaskError: the labels are no whole numbers, or there is no mask.
    """
    if not has_mask and (invert or threshold is not None or labels is not None):
        raise MaskError("--threshold, --invert and --labels say how a mask is read: give --mask, or leave them out")
    try:
        numbers = None if labels is None else [int(label) for label in labels.split(",")]
    except ValueError as error:
        raise MaskError(f"labels must be whole numbers with commas between them, such as 1,3: got {labels}") from error
    return {"threshold": threshold, "invert": invert, "labels": numbers}


def check_size(height: int, width: int, num_frames: int, pipe: Any = None) -> None:
    """Raise `PlanError` for a video that the VAE and the patches cannot cut up: the pipeline's own, or else Wan's."""
    frames, rows, columns = size_factors(pipe)
    for name, value, factor in (("height", height, rows), ("width", width, columns)):
        if value % factor:
            raise PlanError(f"{name} must be a multiple of {factor}, got {value}")
    if num_frames % frames != 1 % frames:
        raise PlanError(f"the number of frames must be one more than a multiple of {frames}, got {num_frames}")


def size_factors(pipe: Any = None) -> tuple[int, int, int]:
    """Frames to a latent frame, and the pixels of a token: its height and its width. Wan's without a pipeline.

    Raises:
        PlanError: the pipeline lacks a part that says so.
    """
    if pipe is None:
        return WAN_FACTORS
    factors = Factors.of(pipe, models_of(pipe)[0])
    return factors.temporal, *factors.token_pixels


def torch_dtype(name: str) -> Any:
    """The torch type of that name."""
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise PlanError(f"dtype must be float32, bfloat16 or float16, got {name}")
    return getattr(torch, name)


def torch_device(name: str) -> str:
    """The device meant by `auto`."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


WAN_FACTORS = (4, 16, 16)
"""`size_factors` of Wan, for plans made without a model."""
