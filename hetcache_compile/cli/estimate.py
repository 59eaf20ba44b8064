"""`hetcache estimate`: what caching would take and save on a model, before anything of it is downloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import console
from ..errors import EstimateError
from .common import (
    ContextRatio,
    Extrapolation,
    Invert,
    Labels,
    Margin,
    MaskFile,
    More,
    ScheduleName,
    Threshold,
    mask_options,
    options_of,
    torch_dtype,
)

if TYPE_CHECKING:
    from ..estimate.models import KnownModel
    from ..plan.plan import Plan

Size = tuple[int | None, int | None, int | None]


def estimate_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A local diffusers folder, of which the transformer's config.json is enough, or a name."),
    ],
    height: Annotated[int | None, typer.Option(help="Height in pixels. [default: usual for the model]", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. [default: usual for the model]", min=1)] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames. [default: usual for the model]", min=1)] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan from `hetcache plan`.")] = None,
    mask: MaskFile | None = None,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    active: Annotated[
        float, typer.Option(help="Share of tokens that are active, without a plan and a mask.", min=0.0, max=1.0)
    ] = 0.25,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [default: usual for the model]", min=1)] = None,
    branches: Annotated[
        int | None, typer.Option(help="Model calls in a step: 2 with guidance. [default: usual for the model]", min=1)
    ] = None,
    schedule: ScheduleName = None,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    extrapolation: Extrapolation = None,
    more: More = None,
    gpu: Annotated[str, typer.Option(help="Whose rates to predict with, such as h100, h200, a100, rtx4090.")] = "h100",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate FLOPs, bytes, caches and seconds of an edit from a model's config: no weights, no network, no GPU.

    Seconds are predicted from stated rates of the GPU, for compiled forms: see docs/estimate.md.
    """
    from ..estimate.estimate import estimate
    from ..estimate.gpus import find_gpu
    from ..estimate.models import find_model
    from ..plan.options import USUAL

    known, card, kind = find_model(model), find_gpu(gpu), torch_dtype(dtype)
    given = (height, width, num_frames)
    reading = mask_options(threshold, invert, labels, has_mask=mask is not None)
    if plan is not None:
        if mask is not None or steps is not None or schedule is not None:
            raise EstimateError("--plan has a mask and steps already: leave --mask, --steps and --schedule out")
        made = _load(plan, known, given)
    else:
        options = options_of(
            context, schedule, more, margin=margin, context_ratio=context_ratio, extrapolation=extrapolation
        )
        options = {**USUAL, "schedule": schedule or "balanced", **options}
        made = _make(
            known, _size(known, given), mask, reading, active, num_inference_steps=steps or known.steps, **options
        )
    with console.status(f"counting what {known.name} computes"):
        found = estimate(known, made, card, branches=branches, dtype=kind)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)


def _size(model: KnownModel, given: Size) -> tuple[int, int, int]:
    """Height, width and frames: those given, and the model's usual ones."""
    height, width, num_frames = (one or usual for one, usual in zip(given, model.size, strict=True))
    return height, width, num_frames


def _load(file: Path, model: KnownModel, given: Size) -> Plan:
    """A plan of a file. Without a size it is taken as it is.

    Raises:
        EstimateError: the size that is given makes another grid.
    """
    from ..plan.plan import Plan

    plan = Plan.load(file)
    grid = model.with_references(model.grid_of(*_size(model, given)))
    if any(given) and plan.grid != grid:
        raise EstimateError(f"{file} is for a token grid of {plan.grid}, but this size makes {grid} of {model.name}")
    return plan


def _make(
    model: KnownModel,
    size: tuple[int, int, int],
    mask: Path | None,
    reading: dict[str, Any],
    active: float,
    **options: Any,
) -> Plan:
    """A plan of a mask, read as `reading` says, or of a share of active tokens. Those of references are context.

    Raises:
        EstimateError: an option is for a plan of a mask.
    """
    import numpy as np

    from ..edit.media import read_mask
    from ..plan.options import WHERE_IT_CAN
    from ..plan.partition import to_token_grid
    from ..plan.plan import Plan

    grid = model.grid_of(*size)
    whole = model.with_references(grid)
    if mask is not None:
        height, width, num_frames = size
        pixels = read_mask(mask, num_frames, height, width, **reading)
        tokens = to_token_grid(pixels, grid, temporal_factor=model.token[0])
        references = np.zeros((whole[0] - grid[0], *grid[1:]), dtype=bool)
        return Plan.from_mask(np.concatenate([tokens, references]), whole, **options)
    options.pop("context_ratio", None)  # there always; the share is of all tokens that are computed
    shared_context = options.pop("shared_context", 0)
    if of_mask := options.keys() - {
        "num_inference_steps",
        "schedule",
        "extrapolation",
        "context_extrapolation",
        "context_motion",
    }:
        raise EstimateError(f"{', '.join(sorted(of_mask))} of a plan needs a mask: give --mask or --plan")
    count = max(1, round(active * int(np.prod(grid))))
    if options["context_motion"] == WHERE_IT_CAN:
        options["context_motion"] = int(count < np.prod(whole))  # no option in its way can be given here
    made = Plan.from_token_mask(np.arange(np.prod(whole)) < count, whole, **options)
    return replace(made, shared_context=shared_context)
