"""What an edit leaves behind: `report.json`, `report.html`, `plan.png`, and the videos or pictures side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import atomically
from ..plan.plan import Plan
from ..plan.preview import save_preview
from ..plan.schedule import StepKind
from ..provenance import provenance
from .editing import EditRequest, Run
from .media import stack_side_by_side, tint, write_picture, write_video
from .metrics import psnr
from .page import Words, render_page

VIDEOS = ("edit.mp4", "side_by_side.mp4")
"""The result, alone and beside the input."""
PICTURES = ("edit.png", "side_by_side.png")
"""The same of a single frame."""
FILES = (*VIDEOS, *PICTURES, "plan.png", "edit.hetplan", "report.json", "report.html")
"""What `write_report` may write."""
BUSY = 1.2
"""FULL and uncached calls that differ by more than this factor were not measured under the same conditions."""


def make_report(
    request: EditRequest, plan: Plan, cached: Run, uncached: Run | None, eager: Run | None, device: str
) -> dict[str, Any]:
    """The figures of an edit. Times are of the transformers only, by medians; speed-ups are ratios of one run.

    PSNR is to the uncached result, None where the two are identical.
    """
    assert cached.stats is not None
    report: dict[str, Any] = {
        **provenance(device),
        "speedup_vs_compiled": None,
        "speedup_vs_eager": None,
        "psnr_overall_db": None,
        "psnr_generative_db": None,
        "psnr_context_db": None,
        "identical": None,
        "steps": cached.stats.steps,
        "seconds": cached.median_seconds,
        "total_seconds": {"hetcache": cached.total_seconds},
        "full_over_compiled": None,
        "compile_seconds": cached.stats.compile_seconds,
        "cache_bytes": cached.stats.cache_bytes,
        "plan": {
            "grid": list(plan.grid),
            "num_tokens": plan.num_tokens,
            "num_active": plan.num_active,
            "num_context": plan.num_context,
            "schedule": plan.schedule,
            "steps": "".join(kind.letter for kind in plan.steps),
        },
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "call": {name: value for name, value in request.call.items() if isinstance(value, str | int | float)},
    }
    if uncached is not None:
        assert uncached.frames is not None
        assert cached.frames is not None
        report["speedup_vs_compiled"] = uncached.total_seconds / cached.total_seconds
        report["total_seconds"]["compiled"] = uncached.total_seconds
        report["full_over_compiled"] = cached.median_seconds["FULL"] / uncached.median_seconds["FULL"]
        report["identical"] = bool((uncached.frames == cached.frames).all())
        for name, region in (("overall", None), ("generative", request.mask), ("context", ~request.mask)):
            report[f"psnr_{name}_db"] = psnr(cached.frames, uncached.frames, region)
    if eager is not None:
        report["speedup_vs_eager"] = eager.total_seconds / cached.total_seconds
        report["total_seconds"]["eager"] = eager.total_seconds
    return report


def write_report(
    folder: Path, report: dict[str, Any], request: EditRequest, plan: Plan, cached: Run, uncached: Run | None
) -> None:
    """Write every file of an edit into `folder`. Its video has the rate and the sound of the input; one frame is a
    picture."""
    assert cached.frames is not None
    videos, titles = [tint(request.video, request.mask)], ["input, mask in red"]
    if uncached is not None and uncached.frames is not None:
        videos.append(uncached.frames)
        titles.append("uncached")
    videos.append(cached.frames)
    speedup = report["speedup_vs_compiled"]
    titles.append("hetcache" + (f", {speedup:.2f}x" if speedup else ""))
    stacked = stack_side_by_side(videos, titles)
    if len(cached.frames) == 1:
        for name, picture in zip(PICTURES, (cached.frames[0], stacked[0]), strict=True):
            write_picture(folder / name, picture)
    else:
        silent = replace(request.playback, sound=None)
        for name, video, like in zip(VIDEOS, (cached.frames, stacked), (request.playback, silent), strict=True):
            write_video(folder / name, video, like=like)
    save_preview(plan, folder / "plan.png")
    plan.save(folder / "edit.hetplan")
    text = json.dumps(report, indent=2) + "\n"
    atomically(folder / "report.json", lambda temporary: Path(temporary).write_text(text))
    words = Words(headline(report), table_rows(report), busy_machine_warning(report))
    page = render_page(report, words, request, plan, cached, uncached)
    atomically(folder / "report.html", lambda temporary: Path(temporary).write_text(page, "utf-8"))


def busy_machine_warning(report: dict[str, Any]) -> str | None:
    """A line to show when the runs cannot be compared: a FULL call does what an uncached call does."""
    ratio = report["full_over_compiled"]
    if ratio is None or 1 / BUSY <= ratio <= BUSY:
        return None
    return (
        f"the machine was busy: FULL calls took {ratio:.2f}x the time of uncached calls, and should take the "
        "same; repeat the run before you trust its speed-ups"
    )


def headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter most, in words: how fast and how close, as far as that was measured, at what memory."""
    rows = [
        (f"speed-up over {name}", _times(report[key]))
        for name, key in (("the compiled model", "speedup_vs_compiled"), ("eager", "speedup_vs_eager"))
        if report[key] is not None
    ]
    if report["identical"] is not None:
        rows.append(("PSNR in the mask, to the uncached result", _decibels(report, "generative")))
    return [*rows, ("cache", _mebibytes(report))]


def table_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures in words, for the terminal and the page."""
    steps = [
        (f"{kind.name} calls", f"{report['steps'][kind.name]} of {report['seconds'][kind.name]:.4f} s (median)")
        for kind in StepKind
        if report["steps"][kind.name]
    ]
    return [
        ("speed-up over the compiled model", _times(report["speedup_vs_compiled"])),
        ("speed-up over eager", _times(report["speedup_vs_eager"])),
        *steps,
        ("PSNR to the uncached result, masked region", _decibels(report, "generative")),
        ("PSNR to the uncached result, context", _decibels(report, "context")),
        ("PSNR to the uncached result, overall", _decibels(report, "overall")),
        ("cache", _mebibytes(report)),
        ("compilation", f"{report['compile_seconds']:.1f} s (once)"),
    ]


def _decibels(report: dict[str, Any], region: str) -> str:
    if report["identical"] is None:
        return "not compared"
    value = report[f"psnr_{region}_db"]
    return "identical" if value is None else f"{value:.1f} dB"


def _times(speedup: float | None) -> str:
    return "not measured" if speedup is None else f"{speedup:.2f}x"


def _mebibytes(report: dict[str, Any]) -> str:
    return f"{report['cache_bytes'] / 2**20:.1f} MiB"
