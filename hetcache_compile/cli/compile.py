"""`hetcache compile`: make the forms of a plan ahead of time, for `hetcache edit --compiled`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import console, progress_bars
from .call import CallArguments, OwnFrames, OwnHeight, OwnWidth, call_arguments, check_call, inputs_of, size_of
from .common import Device, TextTokens, check_size, torch_device, torch_dtype


def compile_forms(
    model: Annotated[Path, typer.Argument(help="Local diffusers checkpoint, such as Wan2.1-VACE-1.3B-diffusers.")],
    plan: Annotated[Path, typer.Option(help="A plan from `hetcache plan`; others of the same budgets gain too.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    height: OwnHeight = None,
    width: OwnWidth = None,
    num_frames: OwnFrames = None,
    text_tokens: TextTokens = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="As in the edit; 1 turns guidance off. [default: the pipeline's]")
    ] = None,
    call: CallArguments = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Device = "auto",
) -> None:
    """Compile the forms of a plan, for later processes on machines like this one."""
    import numpy as np

    from ..compilation.artefact import check_writable, saving_compiled
    from ..edit.editing import EditRequest, compiled, load_pipeline, warm_up
    from ..plan.plan import Plan
    from ..runtime.backend import hetcache_backend

    known = Plan.load(plan)
    check_writable(out)
    given = call_arguments(call or ())
    inputs = inputs_of(model, None, None)
    check_call(inputs, given, prompt="", guidance_scale=guidance_scale)
    frames, rows, columns = size_of(inputs, num_frames, height, width)
    with console.status(f"loading {model}"):
        pipe = load_pipeline(model, torch_dtype(dtype), torch_device(device))
    if inputs.makes_video:
        check_size(rows, columns, frames, pipe)
    request = EditRequest(
        video=np.full((frames, rows, columns, 3), 128, dtype=np.uint8),
        mask=np.ones((frames, rows, columns), dtype=bool),
        prompt="",
        num_inference_steps=len(known.steps),
        guidance_scale=inputs.default("guidance_scale") if guidance_scale is None else guidance_scale,
        max_sequence_length=inputs.default("max_sequence_length", 512) if text_tokens is None else text_tokens,
        still=not inputs.takes_video,
        call=given,
    )
    with (
        saving_compiled(out, pipe.transformer),
        progress_bars() as progress,
        compiled(pipe, backend=hetcache_backend),
    ):
        seconds = warm_up(pipe, request, known, progress)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    print(f"compiled in {seconds:.0f} s; wrote {size:.1f} MiB to {out}")
