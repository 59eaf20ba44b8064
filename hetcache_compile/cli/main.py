"""The command line: `hetcache demo | plan | edit | compile | explain | estimate | calibrate | bench`.

Only it prints and exits.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..console import TokenInput, console, token_inputs
from ..errors import HetCacheError
from ..files import check_writable
from .bench import bench
from .calibrate import calibrate
from .call import CallArguments, OwnFrames, OwnHeight, OwnWidth, call_arguments, check_call, inputs_of, size_of
from .common import Device, Inner, Margin, ScheduleName, Steps, check_size, options_of, torch_device, torch_dtype
from .compile import compile_forms
from .edit import edit, run_edit
from .estimate import estimate_command
from .plan import make_plan

app = typer.Typer(
    help="Token-partitioned caching for diffusion transformers, as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command("compile")(compile_forms)
app.command("estimate")(estimate_command)
app.command()(edit)
app.command("plan")(make_plan)


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    scene: Annotated[
        str, typer.Option("--edit", help="remove: take the object away; replace: put in another.")
    ] = "remove",
    steps: Steps = 50,
    schedule: ScheduleName = None,
    margin: Margin = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    inner: Inner = "inductor",
    device: Device = "auto",
    eager: Annotated[bool, typer.Option(help="Time the uncompiled model too.")] = False,
) -> None:
    """Edit a clip with the reference model that is in the package, uncached and cached, and compare.

    Writes OUT/report.html, report.json, side_by_side.mp4, edit.mp4, plan.png and edit.hetplan.
    """
    from .. import reference
    from ..calibration.calibration import Calibration
    from ..edit.editing import EditRequest
    from ..edit.report import FILES

    check_writable(*(out / name for name in FILES))
    clip = reference.demo_clip(scene)
    with console.status("loading the reference model"):
        pipe = reference.load(torch_dtype(dtype), torch_device(device))
    assert clip.truth is not None
    request = EditRequest(
        video=clip.truth,
        mask=clip.mask,
        prompt=clip.prompt,
        num_inference_steps=steps,
        guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )
    run_edit(
        pipe, request, out, schedule, inner,
        baseline=True, eager=eager, calibration=Calibration.load(reference.CALIBRATION),
        **options_of(context, schedule, margin=margin),
    )  # fmt: skip


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(help="Local diffusers checkpoint, or package.module:function returning (model, kwargs, grid)."),
    ],
    height: OwnHeight = None,
    width: OwnWidth = None,
    num_frames: OwnFrames = None,
    call: CallArguments = None,
    active: Annotated[float, typer.Option(help="Share of tokens that are active.", min=0.0, max=1.0)] = 0.25,
    token_input: TokenInput = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this .svg or .html file.")] = None,
) -> None:
    """Show what the analysis finds in a model: where tokens are born and die, caches, FLOPs of each form."""
    import numpy as np

    from ..capture.explain import explain as explain_forms
    from ..capture.explain import write_picture
    from ..capture.rewrite import rewrite
    from ..edit.editing import load_pipeline
    from ..edit.first_call import call_of_function, call_of_pipeline
    from ..plan.plan import Plan

    if picture is not None:
        check_writable(picture)
    if ":" in model and not Path(model).exists():
        found = call_of_function(model)
    else:
        given = call_arguments(call or ())
        inputs = inputs_of(Path(model), None, None)
        check_call(inputs, given, prompt="")
        frames, rows, columns = size_of(inputs, num_frames, height, width)
        with console.status(f"loading {model}"):
            pipe = load_pipeline(Path(model), torch_dtype("float32"), "cpu")
        if inputs.makes_video:
            check_size(rows, columns, frames, pipe)
        found = call_of_pipeline(pipe, rows, columns, frames, given)
    number = int(np.prod(found.grid))
    plan = Plan.from_token_mask(np.arange(number) < max(1, round(active * number)), found.grid)
    plan = replace(plan, token_inputs=found.token_inputs)
    forms = rewrite(found.model, plan, found.args, found.kwargs, token_inputs=token_inputs(token_input))
    explanation = explain_forms(forms)
    print(explanation)
    if picture is not None:
        write_picture(explanation, picture)
        print(f"wrote {picture}")


def main() -> None:
    """Entry point: bad input is one clear line and exit status 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(variable, "1")
    try:
        app()
    except HetCacheError as error:
        print(f"hetcache: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("hetcache: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
