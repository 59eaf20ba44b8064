"""Fidelity to the uncached result against time, on the reference model: ours, the paper's, fewer steps, other caches.

    python benchmarks/front.py                   # everything, into results/front.json and front.png: hours
    python benchmarks/front.py --fidelity-only   # what a busy machine may do: all clips, no times
    python benchmarks/front.py --clips 3 --methods balanced,steps:20,taylorseer:3 --steps 50

Cells are kept in out/front, and a run that was cut short goes on there. Times depend on the mask's size and hardly on
what is in the clip, so they are taken on one clip of each size, those of other libraries' caches, which take no notice
of the mask, on one clip; the other clips add fidelity. Every cell in out/front goes into the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from diffusers import UniPCMultistepScheduler
from front_report import ADDED, CROPPED, FEWER_STEPS, OURS, RIVALS_TIMED_ON, THE_PAPER, mask_size, save_plot

from hetcache_compile import reference
from hetcache_compile.bench.methods import FULL, Method, parse_methods
from hetcache_compile.bench.quality import RESULT, Settings, bench_quality, file_digest
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.console import progress_bars
from hetcache_compile.edit.editing import EditRequest, Progress, Run, run_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.errors import InputFileError
from hetcache_compile.files import atomically
from hetcache_compile.passes.ir.contract import STRATEGIES
from hetcache_compile.plan.schedule import preset_options
from hetcache_compile.provenance import provenance

RESULTS = Path(__file__).parent / "results"
STEPS = (50, 20)
MAIN = (
    "optimal:1%", "optimal:2x", "optimal:3x", "optimal:4x", "optimal:6x", "optimal:8x", "optimal:9x",
    "balanced", "paper-slow", "paper-fast",
    *(f"{solver}:{number}" for solver in ("steps", "unipc") for number in (20, 12, 8, 6)),
    "crop:0.25", "crop:0.5", "crop:1", "crop:0.5+optimal:3x",
)  # fmt: skip
"""The fronts. Fewer steps with the reference model's own solver, Euler's, and with that of Wan's pipelines."""
ADDITIONS = (
    "paper-fast+margin=2", "paper-fast+o1",
    "balanced+o0", "balanced+o2", "balanced+multistep=0", "balanced+selection=none", "balanced+selection=hetcache",
    "balanced+context_extrapolation=1", "balanced+merged_ratio=0.25+merging=kmeans", "balanced+merged_ratio=0.25",
    "balanced+cached_ratio=0.25",
    "optimal:4x+o0", "optimal:4x+o2", "optimal:4x+multistep=0", "optimal:4x+merged_ratio=0.25+merging=kmeans",
    "optimal:4x+context_ratio=1",
)  # fmt: skip
"""What is predicted, what is computed, what attention reads, which steps: each part added to the paper's method or to a
fixed cycle, or changed in the searched plan. Where all of the context is computed, a PARTIAL step saves nothing, and
the search takes FULL and REUSE steps only."""


FEWER = ("steps", "unipc")
"""Kinds of methods that take fewer steps."""


def family(name: str) -> str:
    """Whose method it is."""
    kind = name.partition(":")[0]
    if kind in peers.PEERS:
        return peers.PEERS[kind].label
    if kind in FEWER:
        return FEWER_STEPS
    if kind == "crop":
        return CROPPED
    if kind.startswith("paper-"):
        return ADDED if "+" in name else THE_PAPER
    return OURS


def chosen_methods(names: Sequence[str], steps: int) -> tuple[list[str], list[str]]:
    """Ours and step reduction, where that takes fewer steps than `full`; other libraries'."""
    others = [name for name in names if name.partition(":")[0] in peers.PEERS]
    return [name for name in names if name not in others and not as_many_steps(name, steps)], others


def as_many_steps(name: str, steps: int) -> bool:
    kind, _, number = name.partition(":")
    return kind in FEWER and int(number) >= steps


def our_methods(names: Sequence[str]) -> list[Method]:
    """`full`, and all methods but those of other libraries' caches."""
    unipc = [name for name in names if name.startswith("unipc:")]
    others = parse_methods(",".join(name for name in names if name not in unipc))
    return [*others, *(Method(name, steps=int(name.partition(":")[2]), runner=solve_with_unipc) for name in unipc)]


def solve_with_unipc(pipe: Any, request: EditRequest, progress: Progress) -> tuple[Run, dict[str, Any]]:
    """The plain model with UniPC (arXiv 2302.04867) of order 2, the solver of Wan's pipelines."""
    usual = pipe.scheduler
    config = usual.config  # which names its shift by the kind of solver
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.get("flow_shift", config.get("shift")),
    )
    try:
        return run_pipeline(pipe, request, "denoising", progress), {}
    finally:
        pipe.scheduler = usual


def timed_clips(clips: Sequence[Clip]) -> list[Clip]:
    """The first clip of each mask size."""
    first: dict[str, Clip] = {}
    for clip in clips:
        first.setdefault(mask_size(clip.name), clip)
    return list(first.values())


def measure(pipe: Any, clips: Sequence[Clip], names: Sequence[str], steps: int, options: argparse.Namespace) -> None:
    """The missing cells of one number of steps. Other libraries' methods run one by one: each starts Dynamo anew."""
    ours, others = chosen_methods(names, steps)
    timed = [] if options.fidelity_only else timed_clips(clips)
    timed_of_rivals = [clip for clip in timed if mask_size(clip.name) == RIVALS_TIMED_ON]
    run_cells(pipe, timed, our_methods(ours), steps, True, options)
    for rival in peers.rivals(others, True, {}, tuple(options.ways.split(","))):
        run_cells(pipe, timed_of_rivals, [Method(FULL), rival], steps, True, options)
    run_cells(pipe, without(clips, timed), our_methods(ours), steps, False, options)
    for rival in peers.rivals(others, False, {}):
        run_cells(pipe, without(clips, timed_of_rivals), [Method(FULL), rival], steps, False, options)


def without(clips: Sequence[Clip], others: Sequence[Clip]) -> list[Clip]:
    """The clips of other names."""
    names = {clip.name for clip in others}
    return [clip for clip in clips if clip.name not in names]


def run_cells(
    pipe: Any, clips: Sequence[Clip], methods: Sequence[Method], steps: int, timed: bool, options: argparse.Namespace
) -> None:
    """The missing cells of some methods, of which the first is `full`."""
    if not clips or len(methods) < 2:
        return
    settings = Settings(
        "reference",
        num_inference_steps=steps,
        guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
        inner="inductor" if timed else "eager",
        timed=timed,
        calibration=file_digest(options.calibration),
    )
    calibration = Calibration.load(options.calibration)
    print(steps, "steps:", ", ".join(method.name for method in methods[1:]), flush=True)
    with progress_bars() as progress:
        bench_quality(pipe, clips, methods, settings, folder(options.out, steps, timed), progress, calibration)


def folder(out: Path, steps: int, timed: bool) -> Path:
    return out / str(steps) / ("timed" if timed else "fidelity")


def collect(out: Path, steps: int, ratios: dict[str, float]) -> dict[str, Any]:
    """Every cell of one number of steps, in few figures; `ratios` are those of `full_over_plain`."""
    parts = {timed: read(folder(out, steps, timed) / RESULT) for timed in (True, False)}
    clips = {name: clip["masked"] for part in parts.values() for name, clip in part.get("clips", {}).items()}
    cells: dict[str, dict[str, Any]] = {}
    for timed in (False, True):
        for clip, methods in parts[timed].get("cells", {}).items():
            for name, cell in methods.items():
                if name != FULL:
                    ratio = ratios.get(what_full_steps_do(name, clip))
                    cells.setdefault(name, {})[clip] = brief(steadied(cell, ratio))
    methods = {name: {"family": family(name), "cells": cells[name]} for name in cells}
    return {"masked": clips, "methods": methods}


def full_over_plain(timed: Sequence[dict[str, Any]], earlier: dict[str, float]) -> dict[str, float]:
    """What a FULL step takes of a plain call, by what it does: the median over all cells that follow a plan.

    The `earlier` ratios stay: cells of an earlier result rest on them, and all cells have to rest on the same.
    """
    ratios: dict[str, list[float]] = {}
    for part in timed:
        for clip, methods in part.get("cells", {}).items():
            for name, cell in methods.items():
                if cell.get("num_active") and cell.get("full_over_compiled"):
                    ratios.setdefault(what_full_steps_do(name, clip), []).append(cell["full_over_compiled"])
    return {what: rounded(median(found)) for what, found in ratios.items()} | earlier


def what_full_steps_do(name: str, clip: str) -> str:
    """What FULL steps of a method do beside writing the cache, which takes time of its own; K-means by how much."""
    schedule, *_ = name.split("+")
    options = {**preset_options(schedule), **dict(part.split("=") for part in name.split("+") if "=" in part)}
    if options.get("selection") in STRATEGIES:
        return "choosing tokens"
    clustering = f"clustering the context of {mask_size(clip)} % masks"
    return clustering if options.get("merging") == "kmeans" else "writing the cache"


def steadied(cell: dict[str, Any], ratio: float | None) -> dict[str, Any]:
    """A cell whose speed-up is a ratio within its own run, where that has FULL steps (or plain ones).

    They are spread over the run, so a machine that is busier at one time than at another does not tell; the plain calls
    beside the cell are from the time before it.
    """
    beside = cell.get("full_over_compiled")
    if not beside or not cell.get("speedup"):
        return cell
    return {**cell, "speedup": cell["speedup"] * beside / ((ratio or 1.0) if cell.get("num_active") else 1.0)}


def extended(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """With the cells of an earlier result that this one lacks.

    Raises:
        InputFileError: they were measured with something else.
    """
    belongs = ("versions", "processor", "threads", "guidance_scale", "calibration")
    changed = [name for name in belongs if earlier and earlier.get(name) != result[name]]
    if changed:
        raise InputFileError(f"the earlier result was measured otherwise (other {', '.join(changed)})")
    merged: dict[str, Any] = {**earlier.get("steps", {})}
    for steps, part in result["steps"].items():
        before = merged.get(steps, {"masked": {}, "methods": {}})
        methods = dict(before["methods"])
        for name, method in part["methods"].items():
            cells = {**methods.get(name, {}).get("cells", {}), **method["cells"]}
            methods[name] = {**method, "cells": cells}
        merged[steps] = {"masked": {**before["masked"], **part["masked"]}, "methods": methods}
    # What measures all of it, not the last part of it.
    command = {"command": Path(__file__).name} if earlier else {}
    return {**result, **command, "steps": merged}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def brief(cell: dict[str, Any]) -> dict[str, Any]:
    """The figures that front.json keeps of a cell."""
    if "failed" in cell:
        return cell
    kept = (
        "seconds",
        "speedup",
        "calls",
        "median_seconds",
        "num_active",
        "num_tokens",
        "way",
        "broken",
        "frozen_input_error",
    )
    regions = ("generative", "context", "overall")
    return {
        **{name: rounded(cell[name]) for name in kept if cell.get(name) is not None},
        "psnr_db": {region: rounded(cell["fidelity"][region]["psnr_db"]) for region in regions},
    }


def rounded(value: Any) -> Any:
    """Five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(result: dict[str, Any], path: Path) -> None:
    text = json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n"
    atomically(path, lambda temporary: Path(temporary).write_text(text))
    save_plot(path.with_suffix(".png"), result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=9, help="how many held-out clips; mask sizes take turns")
    parser.add_argument("--first", type=int, default=0, help="the first of them, to share the work out")
    parser.add_argument(
        "--methods",
        default=",".join((*MAIN, *ADDITIONS, *peers.NAMES)),
        help="comma-separated: as in hetcache bench quality, and peers'; empty for what is in --out only",
    )
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="numbers of steps")
    parser.add_argument("--ways", default=",".join(peers.WAYS), help="in which other libraries' caches are tried")
    parser.add_argument("--fidelity-only", action="store_true", help="no times")
    parser.add_argument("--out", type=Path, default=Path("out/front"), help="where cells are kept")
    parser.add_argument("--extend", action="store_true", help="keep what --result holds already of other clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--calibration",
        type=Path,
        default=reference.CALIBRATION,
        help="for optimal schedules; the shipped one's times are of a CPU (hetcache calibrate --device cuda)",
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "front.json")
    options = parser.parse_args()
    # Quality against ground truth is not asked here, and is slow to measure.
    pipe, clips = (
        reference.load(device=options.device),
        [replace(clip, truth=None) for clip in reference.held_out(options.first + options.clips)[options.first :]],
    )
    for steps in map(int, options.steps.split(",")):
        measure(pipe, clips, [name for name in options.methods.split(",") if name], steps, options)
    measured = sorted((int(part.name) for part in options.out.iterdir()), reverse=True)
    earlier = read(options.result) if options.extend else {}
    timed = [read(folder(options.out, steps, timed=True) / RESULT) for steps in measured]
    ratios = full_over_plain(timed, earlier.get("full_over_plain", {}))
    result = {
        **provenance(str(pipe.device)),
        "guidance_scale": reference.GUIDANCE_SCALE,
        "calibration": file_digest(options.calibration),
        "full_over_plain": ratios,
        "steps": {str(steps): collect(options.out, steps, ratios) for steps in measured},
    }
    write(extended(result, earlier), options.result)
    print(f"wrote {options.result}")


if __name__ == "__main__":
    main()
