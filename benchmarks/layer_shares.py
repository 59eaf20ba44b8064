"""What it brings that attentions cache numbers of tokens of their own (`cached_shares="measured"`), in the same bytes.

    python benchmarks/layer_shares.py             # 5 clips with masks of 20 %, into results/layer_shares.json

What the generated tokens give to inactive ones in each attention is in the calibration that comes with the reference
model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from front_report import mask_size

from hetcache_compile import Plan, reference
from hetcache_compile.bench.methods import FULL, parse_method
from hetcache_compile.bench.quality import Bench, Settings, file_digest
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.edit.editing import compiled
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.plan.options import CACHED_SHARES
from hetcache_compile.provenance import provenance
from hetcache_compile.runtime.backend import hetcache_backend

RESULT = Path(__file__).parent / "results" / "layer_shares.json"
PLANS = ("optimal:4x", "balanced")
KEPT = "context_extrapolation=0+cached_by=attention+cached_ratio"
SIZE = 20


def edited(clip: Any, settings: Settings, name: str, known: Calibration) -> tuple[Any, Any, Plan | None]:
    """The frames of an edit, its stats and its plan."""
    torch._dynamo.reset()
    pipe = reference.load()
    static: dict[str, Any] = {"backend": hetcache_backend, "options": {"inner": settings.inner}, "dynamic": False}
    with compiled(pipe, **static):
        run, plan, _, _ = Bench(pipe, settings, lambda *_: None, known).run(clip, parse_method(name))
    return run.frames, run.stats, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=5, help=f"held-out clips with masks of {SIZE} %%")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the inactive tokens that is cached")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    clips = [clip for clip in reference.held_out(16) if mask_size(clip.name) == str(SIZE)][: options.clips]
    known = Calibration.load(reference.CALIBRATION)
    settings = Settings(
        "reference", num_inference_steps=options.steps, guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH, inner="eager", timed=False,
        calibration=file_digest(reference.CALIBRATION),
    )  # fmt: skip
    cells: dict[str, dict[str, Any]] = {schedule: {} for schedule in PLANS}
    for clip in clips:
        truth, _, _ = edited(clip, settings, FULL, known)
        for schedule in PLANS:
            found = {}
            for shares in CACHED_SHARES:
                method = f"{schedule}+{KEPT}={options.ratio}+cached_shares={shares}"
                frames, stats, plan = edited(clip, settings, method, known)
                assert plan is not None
                decibels = round(psnr(frames, truth, clip.mask) or np.inf, 2)
                counts = list(plan.cached_counts) or plan.num_context
                found[shares] = {"bytes": stats.cache_bytes, "steps": stats.steps, "cached": counts, "db": decibels}
            assert found["measured"]["bytes"] <= found["same"]["bytes"]
            cells[schedule][clip.name] = found
            print(schedule, clip.name, found, flush=True)
    gains = {
        schedule: median(cell["measured"]["db"] - cell["same"]["db"] for cell in of_clips.values())
        for schedule, of_clips in cells.items()
    }
    result = {
        **provenance("cpu"), "steps": options.steps, "ratio": options.ratio, "attentions": known.attentions,
        "given_to_inactive": known.relevance.sum(axis=1).round(4).tolist(),
        "cells": cells, "median_gain_db": {name: round(gain, 2) for name, gain in gains.items()},
    }  # fmt: skip
    atomically(options.out, lambda temporary: Path(temporary).write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
