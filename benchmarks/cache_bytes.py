"""What fewer bytes of cache cost: one plan of the reference model, its keys and values cached in many ways.

    python benchmarks/cache_bytes.py              # 8 clips, into results/cache_bytes.json and .png
    python benchmarks/cache_bytes.py --clips 2

Every way is compared with the uncached result, and with the same plan whose cache is as computed. Cells are kept in
out/cache_bytes, and a run that was cut short goes on there. No times are taken: they are in `steps.py` and `gpu.py`.

Beside that, what rounding alone costs: the error of a PARTIAL step on the inputs of the FULL step before it, where an
exact cache has none. There 4 bits are tried too, which no plan has.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from front_report import mask_size

from hetcache_compile import reference
from hetcache_compile.bench.methods import FULL, parse_methods
from hetcache_compile.bench.quality import Settings, bench_quality, file_digest, frames_file, load_frames
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.capture.rewrite import rewrite, write_forms
from hetcache_compile.console import progress_bars
from hetcache_compile.edit.editing import EditRequest, make_plan, run_pipeline
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.passes.ir.contract import CACHE_DTYPES
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parent / "results" / "cache_bytes.json"
PLAN = "optimal:4x"
WAYS = (
    "cache_dtype=bf16",
    "cache_dtype=fp8",
    "cache_dtype=int8",
    "cached_ratio=0.9+cache_dtype=int8",
    "cached_ratio=0.5+cache_dtype=int8",
    "merged_ratio=0.5+cache_dtype=int8",
    "merged_ratio=0.25+cache_dtype=int8",
    "cached_ratio=0.25",
    "context_extrapolation=0+cache_dtype=int8",
    *(
        f"context_extrapolation=0+cache_dtype=int8+{way}"
        for way in (
            "cached_ratio=0.5",
            "cached_ratio=0.5+cached_by=attention",
            "cached_ratio=0.25",
            "cached_ratio=0.25+cached_by=attention",
            "merged_ratio=0.25",
        )
    ),
)
"""Options of the plan beside its own. Without predicted keys and values the search finds other steps."""
FOUR_BITS = {"int8, values in 4 bits": {"key": 8, "value": 4}, "4 bits": {"key": 4, "value": 4}}
"""Bits of keys and values, by what the table calls them."""
IDENTICAL_DB = 99.0
"""In place of an infinite ratio: above what 8 bits can show."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="held-out clips")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--rounded", type=int, default=2, help="of these, clips to measure what rounding costs")
    parser.add_argument("--cells", type=Path, default=Path("out/cache_bytes"), help="where cells are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    clips = reference.held_out(options.clips)
    methods = parse_methods(",".join([PLAN, *(f"{PLAN}+{way}" for way in WAYS)]))
    settings = Settings(
        "reference",
        num_inference_steps=options.steps,
        guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
        inner="eager",
        timed=False,
        calibration=file_digest(reference.CALIBRATION),
    )
    with progress_bars() as progress:
        found = bench_quality(
            reference.load(), clips, methods, settings, options.cells, progress, Calibration.load(reference.CALIBRATION)
        )
    rows: dict[str, Any] = {}
    for method in methods:
        if method.name == FULL:
            continue
        way = method.name.removeprefix(PLAN).removeprefix("+") or "as computed"
        rows[way] = {clip.name: cell_of(found, options.cells, clip, method.name) for clip in clips}
    rounding = {clip.name: rounding_errors(clip) for clip in clips[: options.rounded]}
    result = {**provenance("cpu"), "plan": PLAN, "steps": options.steps, "ways": rows, "rounding": rounding}
    atomically(options.out, lambda temporary: Path(temporary).write_text(json.dumps(result, indent=1) + "\n"))
    save_plot(result, options.out.with_suffix(".png"))


def cell_of(found: dict[str, Any], cells: Path, clip: Any, method: str) -> dict[str, float]:
    """Bytes of the edit's caches, of those of the plan's own, and decibels inside the mask."""
    cell, own = (found["cells"][clip.name][name] for name in (method, PLAN))
    frames = {name: load_frames(frames_file(cells, clip.name, name)) for name in (method, PLAN, FULL)}

    def likeness(to: str) -> float:
        return round(psnr(frames[method], frames[to], clip.mask) or IDENTICAL_DB, 2)

    return {
        "bytes": cell["cache_bytes"],
        "share": round(cell["cache_bytes"] / own["cache_bytes"], 4),
        "to_uncached_db": likeness(FULL),
        "to_exact_cache_db": likeness(PLAN),
    }


@torch.no_grad()
def rounding_errors(clip: Any, steps: int = 8) -> dict[str, list[float]]:
    """Relative errors (L2) of the output of a PARTIAL step on frozen inputs, by type, at the first, middle and last
    step of an edit."""
    pipe, calls = reference.load(), []

    def record(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    request = EditRequest(
        clip.video, clip.mask, clip.prompt, num_inference_steps=steps, guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    run_pipeline(pipe, request, "recording", lambda *_: None, decode=False)
    hook.remove()
    plan = make_plan(pipe, request, "full")
    exact = rewrite(pipe.transformer, plan, *calls[0])
    errors: dict[str, list[float]] = {}
    for args, kwargs in (calls[0], calls[len(calls) // 2], calls[-1]):
        (truth,), cache = exact.full(*args, **kwargs)
        for dtype in CACHE_DTYPES:
            forms = write_forms(exact.program, exact.analysis, replace(plan, cache_dtype=dtype))
            _, stored = forms.full(*args, **kwargs)
            errors.setdefault(dtype, []).append(relative(forms.partial(stored, *args, **kwargs)[0][0], truth))
        for name, bits in FOUR_BITS.items():
            rounded = {key: to_bits(value, bits.get(key.rpartition(".")[2])) for key, value in cache.items()}
            errors.setdefault(name, []).append(relative(exact.partial(rounded, *args, **kwargs)[0][0], truth))
    return errors


def to_bits(value: torch.Tensor, bits: int | None) -> torch.Tensor:
    """Rounded to so many bits, with a scale for each token and head; as it is where there is no number of them."""
    if bits is None:
        return value
    largest = 2 ** (bits - 1) - 1
    scale = (value.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(value.dtype).tiny)
    return (value / scale).round().clamp(-largest, largest) * scale


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def points(result: dict[str, Any], size: str | None = None) -> dict[str, dict[str, float]]:
    """Medians over the clips of a mask size, by way; over all clips without one."""
    return {
        way: {
            name: median(cell[name] for clip, cell in cells.items() if size in (None, mask_size(clip)))
            for name in next(iter(cells.values()))
        }
        for way, cells in result["ways"].items()
    }


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Share of the bytes against likeness to the uncached result: a line for each mask size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({mask_size(clip) for cells in result["ways"].values() for clip in cells}, key=int)
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.5), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for way, point in points(result, size).items():
            axis.plot(point["share"], point["to_uncached_db"], "o", label=way)
        axis.set(title=f"{size} % masks", xlabel="bytes of the cache, as a share", ylabel="dB to the uncached result")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


if __name__ == "__main__":
    main()
