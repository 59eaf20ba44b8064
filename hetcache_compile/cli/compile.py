"""`hetcache compile`: make the forms of a plan ahead of time, for `hetcache edit --compiled`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import console, progress_bars
from .common import Device, Height, NumFrames, TextTokens, Width, check_size, torch_device, torch_dtype


def compile_forms(
    model: Annotated[Path, typer.Argument(help="Local diffusers checkpoint, such as Wan2.1-VACE-1.3B-diffusers.")],
    plan: Annotated[Path, typer.Option(help="A plan from `hetcache plan`; others of the same budgets gain too.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    height: Height = 480,
    width: Width = 832,
    num_frames: NumFrames = 81,
    text_tokens: TextTokens = None,
    guidance_scale: Annotated[float, typer.Option(help="As in the edit; 1 turns guidance off.")] = 5.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Device = "auto",
) -> None:
    """Compile the forms of a plan, for later processes on machines like this one."""
    import numpy as np

    from ..compilation.artefact import check_writable, saving_compiled
    from ..edit.editing import EditRequest, check_edits_video, compiled, load_pipeline, warm_up
    from ..plan.plan import Plan
    from ..runtime.backend import hetcache_backend

    known = Plan.load(plan)
    check_writable(out)
    check_edits_video(model)
    with console.status(f"loading {model}"):
        pipe = load_pipeline(model, torch_dtype(dtype), torch_device(device))
    check_size(height, width, num_frames, pipe)
    request = EditRequest(
        video=np.full((num_frames, height, width, 3), 128, dtype=np.uint8),
        mask=np.ones((num_frames, height, width), dtype=bool),
        prompt="",
        num_inference_steps=len(known.steps),
        guidance_scale=guidance_scale,
        max_sequence_length=512 if text_tokens is None else text_tokens,
    )
    with (
        saving_compiled(out, pipe.transformer),
        progress_bars() as progress,
        compiled(pipe, backend=hetcache_backend),
    ):
        seconds = warm_up(pipe, request, known, progress)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    print(f"compiled in {seconds:.0f} s; wrote {size:.1f} MiB to {out}")
