"""Few steps: fidelity and quality against work, on the reference model with guidance and without.

    python benchmarks/few_steps.py                     # everything, into results/few_steps.json and few_steps.png
    python benchmarks/few_steps.py --clips 3 --models unguided:4,unguided:8 --methods optimal:2x,crop:0.5,steps:3
    python benchmarks/few_steps.py --device cuda --jobs 12     # 12 processes: each takes a model and a clip at a time

Methods are those of `hetcache bench quality` and of peers.py, by name. Each result is compared with the uncached one of
the same model and steps (fidelity), and with the true video (quality). Speed-ups are ratios of FLOPs, which a busy
machine does not change; with `--timed` times are taken too. Each model is calibrated first, in as many steps, on clips
that are not held out. `original@5:20` is a model with another guidance than its usual one. Cells and calibrations are
kept in out/few_steps, and a run that was cut short goes on there; the result is written as they are done. A method
takes the place of what an earlier run measured of it once it ran on as many clips.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from few_steps_report import save_plot
from front import as_many_steps, family, our_methods, read, rounded
from torch._subclasses.fake_tensor import FakeTensorMode

from hetcache_compile import Plan, reference, rewrite
from hetcache_compile.bench.calibrate import calibrate
from hetcache_compile.bench.methods import FULL, Method
from hetcache_compile.bench.quality import RESULT, Bench, Measured, Settings, bench_quality, file_digest
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.console import progress_bars
from hetcache_compile.edit.editing import call_arguments, make_plan
from hetcache_compile.edit.media import Clip
from hetcache_compile.files import atomically
from hetcache_compile.passes.analysis.flops import flop_counter, graph_flops
from hetcache_compile.pipelines.observe import first_call
from hetcache_compile.provenance import processor_name, provenance
from hetcache_compile.reference.few_steps import DIFFERENCE, add_difference

RESULTS = Path(__file__).parent / "results"
ORIGINAL, UNGUIDED, DISTILLED = "original", "unguided", "distilled"
"""As it is edited with; without guidance and with the solver for few steps; the same, distilled."""
MODELS = tuple(f"{model}:{steps}" for model, steps in ((ORIGINAL, 4), (ORIGINAL, 8), (ORIGINAL, 20),
                                                       (UNGUIDED, 4), (UNGUIDED, 8), (DISTILLED, 4), (DISTILLED, 8),
                                                       (DISTILLED, 20))
)  # fmt: skip
METHODS = (
    *(f"optimal:{times}x" for times in (1.5, 2, 3, 4)), *(f"optimal:{times}x+shared_context=1" for times in (2, 3, 4)),
    *(f"ahead:0.45+FFP*+margin={margin}" for margin in (0, 1)), "ahead:0.45+FFP*RPR+margin=1",
    *(f"ahead:0.45+{kinds}+margin=1+shared_context=1" for kinds in ("FFP*", "FFP*RPR", "FFP*RPRPRR")),
    "balanced", "paper-fast",
    *(f"steps:{number}" for number in (12, 8, 6, 5, 4, 3, 2)), *(f"unipc:{number}" for number in (12, 8, 6, 4, 3)),
    "crop:0.25", "crop:0.5", "crop:1", "crop:0.5+optimal:2x", *peers.NAMES,
)  # fmt: skip
CALIBRATED_ON = 6
"""Clips."""
MANY_STEPS = 20
LOOKS_AHEAD_IN = range(5, 13)
"""Steps. In fewer, one more call costs too much; in more, noise levels are near each other."""
WRITTEN_EVERY = 20
"""Seconds after which the result is written, with the cells that are there."""
OF_FIDELITY, OF_QUALITY = ("psnr_db",), ("psnr_db", "ssim", "flip", "warp_error")
REGIONS = ("generative", "band")


@dataclass(frozen=True)
class Work:
    """What a model call takes, in FLOPs.

    Attributes:
        call: of each call: keys and values of the text.
        token: of each token that is computed.
        pair: of each computed token and one that it attends to.
        embedding: of each token, computed or not: convolutions over the grid are computed whole.
        num_tokens: of a whole clip.
    """

    call: float
    token: float
    pair: float
    embedding: float
    num_tokens: int

    @classmethod
    def of(cls, pipe: Any, clip: Clip) -> Work:
        """From torch's counts of a call, of two calls of a part of the picture, and of a PARTIAL call."""
        bench = Bench(pipe, Settings("", max_sequence_length=reference.MAX_TEXT_LENGTH), lambda *_: None)
        request = bench.request(clip, Method(FULL))
        first, grid = first_call(pipe, call_arguments(pipe, request)), make_plan(pipe, request, "full").grid
        sizes, counts = [], []
        for rows, columns in ((1, 1), (2, 1), (2, 2)):
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode, flop_counter() as counter:
                given = {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                         for name, value in first.arguments.items()}  # fmt: skip
                for name, value in given.items():
                    if isinstance(value, torch.Tensor) and value.ndim == 5:
                        given[name] = value[..., : value.shape[3] // rows, : value.shape[4] // columns]
                first.model(**given)
            sizes.append(prod(grid) // (rows * columns))
            counts.append(counter.get_total_flops())
        call, every_token, pair = np.linalg.solve([[1, size, size**2] for size in sizes], counts)
        half = Plan.from_token_mask(np.arange(sizes[0]) % 2 == 0, grid)
        partial = graph_flops(rewrite(first.model, half, first.args, first.kwargs).by_kind["partial"].module)
        active = half.num_active
        passive = (partial - call - every_token * active - pair * active * sizes[0]) / (sizes[0] - active)
        return cls(call, every_token - passive, pair, passive, sizes[0])

    def of_call(self, computed: int, tokens: int) -> float:
        """FLOPs of a call that computes some of the tokens, and attends to all."""
        return self.call + (self.token + self.pair * tokens) * computed + self.embedding * tokens

    def cell(self, cell: dict[str, Any]) -> float:
        """FLOPs of an edit: counted, or from its calls by kind. REUSE steps have none to speak of."""
        if "flops" in cell:
            return float(cell["flops"])
        tokens, calls = cell["num_tokens"] or self.num_tokens, cell["calls"]
        partial = self.of_call(cell["num_active"] or 0, tokens)
        return calls.get("FULL", 0) * self.of_call(tokens, tokens) + calls.get("PARTIAL", 0) * partial


def load(kind: str, options: argparse.Namespace) -> Any:
    """The pipeline of a kind of model."""
    pipe = reference.load(device=options.device, few_steps=kind != ORIGINAL)
    if kind == DISTILLED:
        add_difference(pipe.transformer, options.difference)
    return pipe


def parsed(model: str) -> tuple[str, float, int]:
    """Kind, guidance and number of steps of a model such as `unguided:8` or `original@5:20`."""
    named, _, steps = model.partition(":")
    kind, _, scale = named.partition("@")
    usual = reference.GUIDANCE_SCALE if kind == ORIGINAL else 1.0
    return kind, float(scale) if scale else usual, int(steps)


def edited_with(model: str) -> dict[str, Any]:
    """Steps, guidance and text length of a model."""
    _, guidance_scale, steps = parsed(model)
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": reference.MAX_TEXT_LENGTH,
    }


def calibration_of(model: str, options: argparse.Namespace) -> Path:
    """The calibration of a model in as many steps, made if it is not there. Costs are those of the shipped one.

    The shipped one, of 50 steps with guidance, serves many steps with guidance: one of their own would take hours.
    """
    if options.calibration is not None:
        return Path(options.calibration)
    kind, _, steps = parsed(model)
    if kind == ORIGINAL and steps >= MANY_STEPS:
        return reference.CALIBRATION
    path = options.out / "calibrations" / f"{model.replace(':', '-')}.hetcal"
    path.parent.mkdir(parents=True, exist_ok=True)
    costs, clips = Calibration.load(reference.CALIBRATION).costs, reference.calibration_clips(CALIBRATED_ON)
    difference = file_digest(options.difference) if kind == DISTILLED else None
    settings, pipe = {"model": kind, "difference": difference}, load(kind, options)
    print("calibrating", model, flush=True)
    with progress_bars() as progress:
        calibrate(pipe, clips, path, progress, costs=costs, settings=settings, **edited_with(model))
    return path


def measure(model: str, number: int, names: Sequence[str], calibrated: Path, options: argparse.Namespace) -> None:
    """The missing cells of a model and number of steps, such as `unguided:8`, and of one held-out clip."""
    kind, _, _ = parsed(model)
    pipe, clip = load(kind, options), reference.procedural_clip(number)
    settings = Settings(
        f"reference, {kind}",
        **edited_with(model),
        inner="inductor" if options.timed else "eager",
        timed=options.timed,
        calibration=file_digest(calibrated),
    )
    wanted = [name for name in names if applies(name, model)]
    ours = our_methods([name for name in wanted if name.partition(":")[0] not in peers.PEERS])
    others = peers.rivals([name for name in wanted if name.partition(":")[0] in peers.PEERS], options.timed, {})
    measured, out = Measured(REGIONS, OF_FIDELITY, OF_QUALITY), cells_of(options.out, model, number)
    print(model, clip.name, flush=True)
    with progress_bars() as progress:
        for methods in (ours, *([Method(FULL), rival] for rival in others)):
            bench_quality(pipe, [clip], methods, settings, out, progress, Calibration.load(calibrated), measured)


def applies(name: str, model: str) -> bool:
    """Whether a method is another one than `full`, or than one that is measured anyway, on a model."""
    _, guidance_scale, steps = parsed(model)
    if name.startswith("ahead:") and steps not in LOOKS_AHEAD_IN:
        return False
    return not (as_many_steps(name, steps) or ("shared_context=1" in name and guidance_scale == 1))


def cells_of(out: Path, model: str, number: int) -> Path:
    """Where the cells of a model and a clip are kept."""
    return out / model.replace(":", "/") / f"{number:02d}"


def measured(tasks: Sequence[tuple[str, int]], names: Sequence[str], options: argparse.Namespace) -> Iterator[None]:
    """Calibrate, then measure models and clips in `--jobs` processes. Yields when one is done, and every few seconds.

    One that fails in a process of its own is reported, and leaves out that clip.
    """
    prepare(os.cpu_count() or 1)
    calibrated = {model: calibration_of(model, options) for model in dict.fromkeys(model for model, _ in tasks)}
    if options.jobs == 1:
        for model, number in tasks:
            measure(model, number, names, calibrated[model], options)
            yield
        return
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), prepare, (threads,)) as pool:
        left = {pool.submit(measure, *task, names, calibrated[task[0]], options): task for task in tasks}
        while left:
            done, _ = wait(left, timeout=WRITTEN_EVERY, return_when=FIRST_COMPLETED)
            for future in done:
                task = left.pop(future)
                if error := future.exception():
                    print("failed:", *task, flush=True)
                    traceback.print_exception(error)
            yield


def prepare(threads: int) -> None:
    """Of each process. Convolutions are not rounded to TF32, which fidelity to the last dB would show."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False


def collect(results: Sequence[dict[str, Any]], work: Work, machine: str) -> dict[str, Any]:
    """The figures that few_steps.json keeps of a model's `quality.json`, one or more, measured on a machine."""
    methods: dict[str, dict[str, Any]] = {}
    cells_of_clips = {clip: cells for result in results for clip, cells in sorted(result["cells"].items())}
    for clip, cells in cells_of_clips.items():
        full = work.cell(cells[FULL])
        for name, cell in cells.items():
            whose = "uncached" if name == FULL else family(name)
            method = methods.setdefault(name, {"family": whose, "machine": machine, "cells": {}})
            method["cells"][clip] = cell if "failed" in cell else brief(cell, full / work.cell(cell))
    masked = {name: clip["masked"] for result in results for name, clip in result["clips"].items()}
    return {"masked": {name: masked[name] for name in cells_of_clips}, "methods": methods}


def brief(cell: dict[str, Any], fewer_flops: float) -> dict[str, Any]:
    """A cell in few figures."""
    kept = {name: cell[name] for name in ("calls", "num_active", "num_tokens", "speedup") if cell.get(name) is not None}
    figures = {
        name: {region: {metric: cell[name][region][metric] for metric in metrics} for region in REGIONS}
        for name, metrics in (("fidelity", OF_FIDELITY), ("quality", OF_QUALITY))
        if cell[name] is not None
    }
    return rounded({**kept, "fewer_flops": fewer_flops, **figures})


def extended(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model: the methods of an earlier result, or those found now once they ran on its clips."""
    masked = {**earlier.get("masked", {}), **found["masked"]}
    methods = dict(earlier.get("methods", {}))
    for name, method in found["methods"].items():
        if name not in methods or ran_on(methods[name]) <= ran_on(method):
            methods[name] = method
    return {"masked": masked, "methods": methods}


def ran_on(method: dict[str, Any]) -> set[str]:
    """The clips of a method that did not fail."""
    return {clip for clip, cell in method["cells"].items() if "failed" not in cell}


def in_order(item: tuple[str, Any]) -> tuple[int, float, int]:
    """By model, by guidance, then by steps."""
    kind, guidance_scale, steps = parsed(item[0])
    return (ORIGINAL, UNGUIDED, DISTILLED).index(kind), guidance_scale, steps


def write(result: dict[str, Any], path: Path) -> None:
    text = json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n"
    atomically(path, lambda temporary: Path(temporary).write_text(text))
    save_plot(path.with_suffix(".png"), result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="how many held-out clips; mask sizes take turns")
    parser.add_argument("--models", default=",".join(MODELS), help="with their numbers of steps")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--timed", action="store_true", help="take times too, on a machine that does nothing else")
    parser.add_argument("--out", type=Path, default=Path("out/few_steps"), help="where cells are kept")
    parser.add_argument("--calibration", type=Path, help="for optimal schedules, in place of one of each model")
    parser.add_argument(
        "--difference", type=Path, default=DIFFERENCE, help="of distil.py, for models such as distilled:8"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work; not with --timed")
    parser.add_argument("--result", type=Path, default=RESULTS / "few_steps.json")
    options = parser.parse_args()
    if options.timed and options.jobs > 1:
        parser.error("processes beside each other cannot be timed: --jobs 1")
    names = [name for name in options.methods.split(",") if name]
    # What other runs measured stays. A run that is cut short has as many clips of each model.
    earlier = read(options.result).get("models", {})
    models = dict(earlier)
    tasks = [(model, number) for number in range(options.clips) for model in options.models.split(",")]
    machine = f"{processor_name(options.device)}, torch {torch.__version__}"
    work = Work.of(reference.load(), reference.procedural_clip(0))
    for _ in measured(tasks, names, options):
        for model in options.models.split(","):
            files = [cells_of(options.out, model, number) / RESULT for number in range(options.clips)]
            results = [result for file in files if (result := read(file)).get("cells")]
            if results:
                models[model] = extended(earlier.get(model, {}), collect(results, work, machine))
        write({**provenance(options.device), "models": dict(sorted(models.items(), key=in_order))}, options.result)
    print(f"wrote {options.result}")


if __name__ == "__main__":
    main()
