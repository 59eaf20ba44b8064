"""Is one more call, for a later time, worth it in few steps? Fidelity against FLOPs, on the reference model.

    python benchmarks/look_ahead.py                    # writes benchmarks/results/look_ahead.json, after each clip

Each method edits clips with masks of 20 %. Fidelity is PSNR inside the mask to the uncached result of as many steps,
quality is PSNR there to the true video. The speed-up is in FLOPs of the model, by torch's counter on the forms of each
plan: 1 is the uncached edit, and the additional call counts. Forms run eagerly, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hetcache_compile as hetcache
from hetcache_compile import reference
from hetcache_compile.bench.calibrate import RecordedCall, recorded
from hetcache_compile.bench.methods import Method, parse_method
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.edit.editing import EditRequest, compiled, make_plan, run_pipeline
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.passes.analysis.flops import flop_counter
from hetcache_compile.provenance import provenance
from hetcache_compile.runtime.backend import hetcache_backend

RESULTS = Path(__file__).parent / "results"
SEARCHED = ("optimal:2x", "optimal:3x")
TOKENS = "+context_ratio=0+multiple=32+context_extrapolation=1"
MOVING = "+multiple=32+context_extrapolation=1+context_motion=1"
SHARING = MOVING + "+shared_context=1"
AHEAD = (
    *(f"{schedule}+margin={margin}{TOKENS}" for schedule, margin in (("FFP*R", 2), ("FFP*R", 1), ("FFP*RPR", 1))),
    *(f"{schedule}+margin={margin}{MOVING}" for schedule, margin in (("FFP*", 1), ("FFP*R", 1), ("FFP*RPR", 1))),
    *(f"{schedule}+margin=1{SHARING}" for schedule in ("FFP*", "FFP*RPR", "FFP*RPRPRR", "FP*RPR")),
)
"""Schedules with one more step, the second one. The last step of the reference model's scheduler moves the latents by a
hundredth of the way."""
SHARE = 0.2
OF_SIZE = reference.MASK_SHARES.index(SHARE)


def main() -> None:
    """Every method on every clip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="with masks of 20 %%")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at", type=float, default=0.45, help="the time of the additional step, of the first one's")
    parser.add_argument("--methods", default=",".join((*SEARCHED, *AHEAD)), help="those that start with FF look ahead")
    parser.add_argument("--out", type=Path, default=RESULTS / "look_ahead.json")
    args = parser.parse_args()
    methods = [parse_method(name) for name in args.methods.split(",")]
    pipe, cells = reference.load(), {}
    for number in range(args.clips):
        clip = reference.procedural_clip(OF_SIZE + number * len(reference.MASK_SHARES))
        request = EditRequest(
            video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=args.steps,
            guidance_scale=reference.GUIDANCE_SCALE, max_sequence_length=reference.MAX_TEXT_LENGTH,
        )  # fmt: skip
        with recorded(pipe, silent) as (recorder, observe):
            uncached = run_pipeline(pipe, request, "uncached", observe).frames
        call = recorder.steps[0][0]
        cells[clip.name] = {"full": {"quality_db": psnr(uncached, clip.truth, clip.mask)}}
        for method in methods:
            cell = edit(pipe, request, method, args.at, call)
            frames = cell.pop("frames")
            cell["fidelity_db"] = psnr(frames, uncached, clip.mask)
            cell["quality_db"] = psnr(frames, clip.truth, clip.mask)
            cells[clip.name][method.name] = cell
            print(clip.name, method.name, json.dumps(cell), file=sys.stderr)
        result = {**provenance("cpu"), "steps": args.steps, "at": args.at, "cells": cells}
        text = json.dumps({**result, "medians": medians(cells, methods)}, indent=2) + "\n"
        atomically(args.out, lambda temporary, text=text: Path(temporary).write_text(text))


def edit(pipe: Any, request: EditRequest, method: Method, at: float, call: RecordedCall) -> dict[str, Any]:
    """One edit by a method, and what it takes."""
    usual, steps = pipe.scheduler, request.num_inference_steps
    assert method.schedule is not None
    calibration = Calibration.load(reference.CALIBRATION) if method.needs_calibration else None
    if method.schedule.startswith("FF"):
        pipe.scheduler = hetcache.LookAhead(usual, at)
    try:
        plan = make_plan(
            pipe, request, method.schedule, calibration=calibration, **{"context_motion": 0, **method.options}
        )
        with (
            compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}),
            hetcache.session(plan, strict=True) as session,
        ):
            frames = run_pipeline(pipe, request, method.name, silent).frames
    finally:
        pipe.scheduler = usual
    flops = flops_of(pipe.transformer, plan, call)
    calls = session.stats.kinds
    every = steps * len(calls) / len(plan.steps)
    return {
        "frames": frames,
        "steps": "".join(kind.letter for kind in plan.steps),
        "active": plan.num_active / plan.num_tokens,
        "speedup_flops": every * flops["plain"] / sum(flops[kind.form] for kind in calls),
    }


def flops_of(model: torch.nn.Module, plan: hetcache.Plan, call: RecordedCall) -> dict[str, int]:
    """FLOPs of a call by form, and of the plain model."""
    forms = hetcache.rewrite(model, plan, call.args, call.kwargs)
    with flop_counter() as counter:
        model(*call.args, **call.kwargs)
    counted, cache = {"plain": counter.get_total_flops()}, {}
    for kind in forms.by_kind:
        with flop_counter() as counter:
            _, cache = forms.run(kind, cache, call.args, call.kwargs)
        counted[kind] = counter.get_total_flops()
    return counted


def medians(cells: Mapping[str, Mapping[str, Any]], methods: Sequence[Method]) -> dict[str, Any]:
    """Over the clips."""
    names = ("fidelity_db", "quality_db", "speedup_flops")
    return {
        method.name: {key: median(of[method.name][key] for of in cells.values()) for key in names} for method in methods
    }


def silent(stage: str, step: int, steps: int) -> None:
    """No progress."""


if __name__ == "__main__":
    with torch.no_grad():
        main()
