"""How near can any schedule come in few steps? All of them are tried, on the reference model: the limit of a search.

    python benchmarks/every_schedule.py --jobs 2      # writes benchmarks/results/every_schedule.json, after each task

Each clip has a mask of 20 %. For each margin, every schedule of FULL, PARTIAL and REUSE whose speed-up lies in one of
the bands is followed, with and without predicted keys and values, and with the weights of outputs that a search would
choose. Fidelity is PSNR inside the mask to the uncached
result of as many steps. A speed-up is in FLOPs by torch's counter on the forms; nothing is timed, and forms run
eagerly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from few_steps import prepare
from look_ahead import OF_SIZE, flops_of, silent

import hetcache_compile as hetcache
from hetcache_compile import reference
from hetcache_compile.bench.calibrate import recorded
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.calibration.output_weights import step_lengths
from hetcache_compile.edit.editing import EditRequest, compiled, make_plan, run_pipeline
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.provenance import provenance
from hetcache_compile.runtime.backend import hetcache_backend

RESULTS = Path(__file__).parent / "results"
BANDS = {2: (2.0, 2.3), 3: (3.0, 3.45)}
"""Speed-ups looked at, in FLOPs: from, and to."""
KINDS = {kind.letter: kind for kind in hetcache.StepKind}
BEST = 5
"""Schedules that are kept of each clip, margin, prediction and band."""


@torch.no_grad()
def try_all(number: int, margin: float, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The clip's name, and by prediction and band what was found."""
    clip = reference.procedural_clip(OF_SIZE + number * len(reference.MASK_SHARES))
    pipe, found = reference.load(device=options.device), dict[str, Any]()
    lengths = step_lengths(pipe.scheduler, options.steps)
    request = EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=options.steps,
        guidance_scale=reference.GUIDANCE_SCALE, max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    with recorded(pipe, silent) as (recorder, observe):
        uncached = run_pipeline(pipe, request, "uncached", observe).frames
    call = recorder.steps[0][0]
    for prediction in options.predictions:
        plan = make_plan(
            pipe, request, "FP" + "R" * (options.steps - 2), margin=margin, context_ratio=0, multiple=32,
            context_extrapolation=prediction, extrapolation=1,
        )  # fmt: skip
        calibration = Calibration.load(reference.CALIBRATION).like({"context_extrapolation": prediction})
        share = plan.num_active / plan.num_tokens
        flops = flops_of(pipe.transformer, plan, call)
        costs = {kind.letter: flops[kind.form] / flops["plain"] for kind in hetcache.StepKind}
        with compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}):
            for band in (BANDS[speedup] for speedup in options.speedups):
                tried, end = [], time.monotonic() + options.seconds
                every = list(schedules(options.steps, costs, band))
                for letters in random.Random(0).sample(every, len(every)):
                    if time.monotonic() > end:
                        break
                    kinds = [KINDS[letter] for letter in letters]
                    weighted = calibration.scheduled(plan, kinds, timesteps=plan.timesteps, lengths=lengths)
                    with hetcache.session(weighted, strict=True):
                        frames = run_pipeline(pipe, request, letters, silent).frames
                    fidelity = psnr(frames, uncached, clip.mask)
                    tried.append((fidelity, letters, options.steps / sum(costs[letter] for letter in letters)))
                tried.sort(reverse=True)
                found[f"margin {margin:g}, prediction {prediction}, {band[0]:g}x"] = {
                    "active": share, "tried": len(tried), "all": len(every),
                    "best": [dict(zip(("psnr_db", "steps", "speedup"), row, strict=True)) for row in tried[:BEST]],
                }  # fmt: skip
    return clip.name, found


def schedules(steps: int, costs: dict[str, float], band: tuple[float, float]) -> Iterator[str]:
    """All that begin with a FULL step and have a speed-up in the band."""
    for rest in itertools.product("FPR", repeat=steps - 1):
        letters = "F" + "".join(rest)
        if band[0] <= steps / sum(costs[letter] for letter in letters) <= band[1]:
            yield letters


def best_of(clips: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By band: each clip's best, whatever its margin and prediction, and the median of these."""
    result = {}
    for speedup in BANDS:
        name = f"{speedup}x"
        best = {
            clip: max(
                (row["psnr_db"] for key, of in found.items() if key.endswith(name) for row in of["best"]), default=0
            )
            for clip, found in clips.items()
        }
        if any(best.values()):
            result[name] = {"clips": best, "median": median(best.values())}
    return result


def main() -> None:
    """Every margin of every clip, in processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=3, help="with masks of 20 %%")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--margins", type=float, nargs="+", default=[0, 1, 2])
    parser.add_argument("--predictions", type=int, nargs="+", default=[1, 0], help="of cached keys and values")
    parser.add_argument("--speedups", type=int, nargs="+", default=list(BANDS), choices=list(BANDS))
    parser.add_argument(
        "--seconds",
        type=float,
        default=1e9,
        help="for each clip, margin, prediction and band: schedules are tried in a drawn order until then",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "every_schedule.json")
    options = parser.parse_args()
    clips: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), prepare, (1,)) as pool:
        tasks = itertools.product(range(options.clips), options.margins)
        for future in as_completed([pool.submit(try_all, *task, options) for task in tasks]):
            name, found = future.result()
            clips.setdefault(name, {}).update(found)
            print(name, json.dumps(found), flush=True)
            result = {**provenance(options.device), "steps": options.steps, "clips": clips, "best": best_of(clips)}
            text = json.dumps(result, indent=1) + "\n"
            atomically(options.out, lambda temporary, text=text: Path(temporary).write_text(text))


if __name__ == "__main__":
    main()
