"""`hetcache plan`: which tokens of an edit are computed in which steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..console import console, warn
from ..errors import InputFileError, PlanError
from ..files import check_writable
from ..plan.cache_size import parse_bytes
from .calibrate import (
    CalibrationFile,
    calibrated_in_more,
    comparison,
    expectation,
    load_calibration,
    measured_elsewhere,
    not_counted,
)
from .call import (
    CallArguments,
    ImageFile,
    OwnFrames,
    OwnHeight,
    OwnSteps,
    OwnWidth,
    Prompt,
    call_arguments,
    check_call,
    inputs_of,
    size_of,
    steps_of,
)
from .common import (
    ContextRatio,
    Extrapolation,
    Invert,
    Labels,
    Margin,
    MaskFile,
    Memory,
    More,
    ScheduleName,
    StartFrame,
    Threshold,
    check_size,
    mask_options,
    options_of,
    size_factors,
    torch_dtype,
)


def make_plan(
    context: typer.Context,
    mask: MaskFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path("edit.hetplan"),
    preview: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to read patch size, VAE factors, scheduler and time embedding of."),
    ] = None,
    height: OwnHeight = None,
    width: OwnWidth = None,
    num_frames: OwnFrames = None,
    video: Annotated[
        Path | None, typer.Option(help="What is edited: a mask of its size, of another rate or length fits to it.")
    ] = None,
    image: ImageFile = None,
    prompt: Prompt = None,
    call: CallArguments = None,
    start_frame: StartFrame = 0,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    steps: OwnSteps = None,
    reference_images: Annotated[int, typer.Option(help="How many reference images the edit has.", min=0)] = 0,
    schedule: ScheduleName = None,
    budget: Annotated[
        str | None, typer.Option(help="The best schedule under 3x, a time factor, or 2%, an expected error.")
    ] = None,
    calibration: CalibrationFile = None,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    extrapolation: Extrapolation = None,
    more: More = None,
    memory: Memory = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, as for edit. [default: the calibration's, else bfloat16]")
    ] = None,
) -> None:
    """Partition the tokens of an edit and schedule its steps.

    Without --model the layout is Wan's: patches of 1x2x2 latents, 8 pixels and 4 frames to a latent. For a picture, or
    with --prompt or --call, the pipeline is run up to its first model call, on grey where there is no --video or
    --image; else the plan of a video is computed from its size. Where it is run, the size of the cache is known, with
    weights of --dtype.
    """
    import numpy as np

    from ..edit import editing
    from ..edit.media import GREY, read_mask, read_source
    from ..pipelines.memory import ANY
    from ..pipelines.planning import choices, plans_for
    from ..plan.crop import crop_advice
    from ..plan.options import USUAL
    from ..plan.plan import Plan
    from ..plan.preview import save_preview
    from ..plan.schedule import OPTIMAL, default_schedule

    check_writable(out, *([preview] if preview else []))
    if model is None and (image is not None or prompt is not None or call):
        raise InputFileError("--image, --prompt and --call are for a pipeline: give --model")
    known = load_calibration(calibration, model)
    if memory is not None:
        parse_bytes(memory)
        if model is None:
            raise PlanError("--memory is that of a model: give --model")
    if budget is not None:
        if schedule is not None:
            raise PlanError(f"--budget {budget} finds a schedule: leave --schedule {schedule} out, or the budget")
        schedule = OPTIMAL + budget
    schedule = default_schedule(known) if schedule is None else schedule
    measured_dtype = None if known is None else known.settings.get("dtype")
    given = call_arguments(call or ())
    inputs = inputs_of(model, video, image) if model is not None else None
    size = size_of(inputs, num_frames, height, width, image or mask)
    if inputs is not None:
        check_call(inputs, given, prompt="" if prompt is None else prompt)
    else:
        check_size(*size[1:], size[0])
    source = video or image
    of_mask = mask_options(threshold, invert, labels)
    size_from = mask if source is None and inputs is not None and not inputs.makes_video else source
    pixels = read_mask(mask, *size, start=start_frame, video=size_from, **of_mask)
    options = options_of(
        context, schedule, more, margin=margin, context_ratio=context_ratio, extrapolation=extrapolation
    )
    pipe, runs = None, False
    if model is not None and inputs is not None:
        runs = not inputs.makes_video or prompt is not None or bool(given)
        frames = read_source(source, *size, start_frame) if source is not None and runs else GREY
        with console.status(f"loading {model}"):
            pipe = editing.load_pipeline(model, torch_dtype(dtype or measured_dtype or "bfloat16"), "cpu")
        request = editing.EditRequest(
            video=np.broadcast_to(frames, (*size, 3)),
            mask=pixels,
            prompt=prompt or "",
            num_inference_steps=steps_of(inputs, steps),
            still=not inputs.takes_video,
            call=given,
        )
        if inputs.makes_video:
            check_size(*size[1:], size[0], pipe)
        of_call = (
            editing.planned_arguments(pipe, request)
            if runs
            else request.size | {"num_inference_steps": request.num_inference_steps}
        )
        taken = {name: value for name, value in of_call.items() if name in inputs.parameters}
        with console.status("planning"):
            considered = plans_for(
                pipe, mask=pixels, num_reference_images=reference_images or None, schedule=schedule, calibration=known,
                memory=memory or (ANY if runs else None), **taken, **options,
            )  # fmt: skip
    else:
        grid = reference_images + (size[0] - 1) // 4 + 1, size[1] // 16, size[2] // 16
        make = partial(
            Plan.from_mask, pixels, grid, num_inference_steps=steps_of(inputs, steps), schedule=schedule,
            reference_frames=reference_images, calibration=known, **USUAL,
        )  # fmt: skip
        with console.status("planning"):
            considered = choices(make, schedule, known, options)
    made = considered[0].plan
    made.save(out)
    if preview is not None:
        save_preview(made, preview)
    print(made.describe())
    if known is not None:
        chosen = {**options, "context_motion": made.context_motion}
        print(expectation(known.like({**chosen, **considered[0].options}), made))
        lines = comparison(considered), not_counted(known, schedule, chosen), calibrated_in_more(known, made)
        print("".join(lines), end="")
        warn(measured_elsewhere(known, pipe) if pipe is not None else ())
    if (inputs is None or inputs.makes_video) and (advice := crop_advice(made, pixels, size_factors(pipe)[1:])):
        print(advice)
    print(f"wrote {out}" + (f" and {preview}" if preview else ""))
