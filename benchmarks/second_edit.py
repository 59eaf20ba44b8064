"""The second edit of a clip: what it costs where it reads the record of the first, and how close it is.

    python benchmarks/second_edit.py                  # into results/second_edit.json
    python benchmarks/second_edit.py --clips 0 1 2 --steps 8
    python benchmarks/second_edit.py --distilled --steps 4 --margin 0     # what other runs measured stays

The second edit has the same mask, text and noise; another text; other noise inside the mask; or a mask that is moved by
1, 2 or 4 tokens, planned for both masks together. Each is compared, inside its mask, with its own uncached result. Two
records are read: of an uncached first edit, after which every step is PARTIAL, or every step but one is and that one
REUSE, and of a first edit that followed a searched plan, whose steps the second one follows too. Cost is counted in
FLOPs: no times are taken.

Edits are kept in out/second_edit as they are done, and a run that was cut short goes on there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from front_report import mask_size

import hetcache_compile as hetcache
from hetcache_compile import Plan, Record, StepKind, reference
from hetcache_compile.calibration.calibration import Calibration
from hetcache_compile.capture.rewrite import write_form
from hetcache_compile.edit.editing import EditRequest, compiled, make_plan, planned_arguments, run_pipeline
from hetcache_compile.edit.media import Clip, Frames
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.passes.analysis.flops import graph_flops
from hetcache_compile.pipelines.observe import first_call
from hetcache_compile.provenance import provenance
from hetcache_compile.runtime.backend import hetcache_backend

RESULT = Path(__file__).parent / "results" / "second_edit.json"
UNCACHED, SCHEDULE, SKIPS = "uncached", "optimal:2x", "uncached, one REUSE"
OTHER_TEXT = "a white star moves up over pattern"
MOVES = (1, 2, 4)
PIXELS = 8
"""Of one token, in height and width."""
IDENTICAL_DB = 99.0
"""In place of an infinite ratio: above what 8 bits can show."""
MARGIN = 2.0
SKIPPED = -2
"""The step that is REUSE."""


@dataclass(frozen=True)
class Second:
    """A second edit: its request, and the mask that it is planned for."""

    name: str
    request: EditRequest
    planned: EditRequest


class Edits:
    """The edits of one clip in so many steps.

    The margin holds in all plans: a search that chose it anew for another mask would leave the record behind.
    """

    def __init__(
        self, pipe: Any, clip: Clip, steps: int, calibration: Calibration, guidance_scale: float, margin: float
    ) -> None:
        self.pipe, self.clip, self.steps, self.calibration = pipe, clip, steps, calibration
        self.options = {"margin": margin, "context_extrapolation": 0}
        request = EditRequest(
            clip.truth, clip.mask, clip.prompt, num_inference_steps=steps, guidance_scale=guidance_scale,
            max_sequence_length=reference.MAX_TEXT_LENGTH,
        )  # fmt: skip
        call = first_call(pipe, planned_arguments(pipe, request) | {"mask": None})
        self.noise = torch.randn(call.arguments["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
        self.first = replace(request, call={"latents": self.noise})
        self.forms = hetcache.rewrite(call.model, self.plan(self.first, "full"), call.args, call.kwargs)
        self.flops: dict[tuple[str, int], int] = {}

    def plan(self, request: EditRequest, schedule: Any) -> Plan:
        return make_plan(self.pipe, request, schedule, calibration=self.calibration, **self.options)

    def seconds(self) -> list[Second]:
        """The second edits."""
        inside = in_latents(self.plan(self.first, "full"), self.noise.shape)
        other = torch.randn(self.noise.shape, generator=torch.Generator().manual_seed(1))
        edits = [
            ("the same", self.first),
            ("another text", replace(self.first, prompt=OTHER_TEXT)),
            ("other noise in the mask", replace(self.first, call={"latents": torch.where(inside, other, self.noise)})),
        ]
        found = [Second(name, request, request) for name, request in edits]
        for tokens in MOVES:
            moved = replace(self.first, mask=shifted(self.clip.mask, tokens * PIXELS))
            both = replace(self.first, mask=self.clip.mask | moved.mask)
            found.append(Second(f"moved by {tokens}", moved, both))
        return found

    def run(self, request: EditRequest, plan: Plan | None, **session: Any) -> tuple[Frames, Any]:
        """The frames of an edit, and its session."""
        if plan is None:
            return run_pipeline(self.pipe, request, "", ignore).frames, None
        with hetcache.session(plan, strict=True, **session) as opened:
            frames = run_pipeline(self.pipe, request, "", ignore).frames
        return frames, opened

    def cost(self, plan: Plan, kinds: Sequence[StepKind]) -> float:
        """FLOPs of the calls of an edit, as a share of those of the uncached one."""
        total = 0
        for kind in kinds:
            key = (kind.form, plan.num_active)
            if key not in self.flops:
                form = write_form(kind.form, self.forms.program, self.forms.analysis, plan)
                self.flops[key] = graph_flops(form.module)
            total += self.flops[key]
        full = self.flops.setdefault(("full", 0), graph_flops(self.forms.by_kind["full"].module))
        return total / (full * len(kinds))

    def row(self, plan: Plan, opened: Any, frames: Frames, uncached: Frames, request: EditRequest) -> dict[str, Any]:
        """What is recorded of one edit."""
        likeness = partial(psnr, frames)
        row = {
            "steps": "".join(kind.letter for kind in opened.stats.kinds),
            "active": round(plan.num_active / plan.num_tokens, 4),
            "flops": round(self.cost(plan, opened.stats.kinds), 4),
            "to_uncached_db": likeness(uncached, request.mask) or IDENTICAL_DB,
            "context_db": likeness(uncached, ~request.mask) or IDENTICAL_DB,
        }
        if request.prompt == self.clip.prompt:
            row["to_truth_db"] = likeness(self.clip.truth, request.mask) or IDENTICAL_DB
            row["uncached_to_truth_db"] = psnr(uncached, self.clip.truth, request.mask) or IDENTICAL_DB
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}

    def measure(self, result: dict[str, Any], save: Callable[[], None]) -> None:
        """Put the edits of the clip that a result lacks into it."""
        missing = [second for second in self.seconds() if second.name not in result["second"]]
        if not missing:
            return
        records: dict[str, tuple[Plan, Record]] = {}
        truth: Frames | None = None
        for name, schedule in ((UNCACHED, "full"), (SCHEDULE, SCHEDULE)):
            plan = self.plan(self.first, schedule)
            plan = replace(plan, steps=(StepKind.FULL,) * self.steps) if name == UNCACHED else plan
            frames, opened = self.run(self.first, plan, record=True)
            truth = frames if truth is None else truth
            records[name] = plan, opened.record
            row = self.row(plan, opened, frames, truth, self.first)
            result["first"][name] = {**row, "record_bytes": opened.record.num_bytes}
        own, record = records[UNCACHED]
        skipping = list(own.steps)
        skipping[SKIPPED] = StepKind.REUSE
        records[SKIPS] = replace(own, steps=tuple(skipping)), record
        for second in missing:
            uncached = truth if second.request is self.first else self.run(second.request, None)[0]
            rows = {}
            for name, (own, record) in records.items():
                plan = self.plan(second.planned, list(own.steps))
                frames, opened = self.run(second.request, plan, memory_of=record)
                rows[name] = self.row(plan, opened, frames, uncached, second.request)
            result["second"][second.name] = rows
            save()


def ignore(*_: Any) -> None:
    """No progress is shown."""


def shifted(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask moved to the right, or to the left where it would leave the picture."""
    right, left = np.zeros_like(mask), np.zeros_like(mask)
    right[..., pixels:], left[..., :-pixels] = mask[..., :-pixels], mask[..., pixels:]
    return right if right.sum() >= left.sum() else left


def in_latents(plan: Plan, shape: Sequence[int]) -> torch.Tensor:
    """The generated tokens of a plan as a mask of latents `[1, 1, T, H, W]`."""
    mask = torch.from_numpy(plan.tokens_of(hetcache.TokenKind.GENERATIVE))
    for dim, size in enumerate(shape[-3:]):
        mask = mask.repeat_interleave(size // mask.shape[dim], dim)
    return mask[None, None]


def points(result: dict[str, Any], steps: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians over the clips of each mask size: size, edit and record, figure."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for clip, found in result["clips"][steps].items():
        group = groups.setdefault(mask_size(clip), {})
        for name, row in found["first"].items():
            group.setdefault(f"first|{name}", []).append(row)
        for edit, rows in found["second"].items():
            for name, row in rows.items():
                group.setdefault(f"{edit}|{name}", []).append(row)
    return {
        size: {
            edit: {name: median(row[name] for row in rows) for name, value in rows[0].items() if name != "steps"}
            for edit, rows in group.items()
        }
        for size, group in groups.items()
    }


def save_json(path: Path, value: dict[str, Any]) -> None:
    atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=1) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=range(6), help="held-out clips, by number")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20], help="numbers of denoising steps")
    parser.add_argument("--distilled", action="store_true", help="the model for few steps, without guidance")
    parser.add_argument("--margin", type=float, default=MARGIN, help="of all plans, in tokens")
    parser.add_argument("--cells", type=Path, default=Path("out/second_edit"), help="where clips are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    pipe, calibration = reference.load(distilled=options.distilled), Calibration.load(reference.CALIBRATION)
    guidance_scale = 1.0 if options.distilled else reference.GUIDANCE_SCALE
    way = ("distilled, " if options.distilled else "") + (f"margin {options.margin:g}, " * (options.margin != MARGIN))
    found = json.loads(options.out.read_text())["clips"] if options.out.exists() else {}
    found |= {f"{way}{steps}": {} for steps in options.steps}
    for number in options.clips:
        clip = reference.procedural_clip(number)
        for steps in options.steps:
            name = f"{way}{steps}"
            cell = options.cells / f"{name}-{clip.name}.json"
            measured = json.loads(cell.read_text()) if cell.exists() else {"first": {}, "second": {}}
            save = partial(save_json, cell, measured)
            edits = Edits(pipe, clip, steps, calibration, guidance_scale, options.margin)
            with compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}):
                edits.measure(measured, save)
            found[name][clip.name] = measured
            save_json(options.out, {**provenance("cpu"), "schedule": SCHEDULE, "clips": found})


if __name__ == "__main__":
    main()
