"""Fresher context for less: what PARTIAL steps gain if the context that they read is less stale.

    python benchmarks/fresher_context.py --clips 3    # a quarter of an hour, into results/fresher_context.json

Ways to keep the context fresh are simulated, to see which are worth a pass: the plain model computes every token in
every call, and hooks put cached keys and values where a PARTIAL step would read them. Two rows are plans in a session:
one as it is, with which its simulation has to agree, and one with `context_motion=1`, the way that was built.
Fidelity is PSNR to the uncached result of as many steps, inside the mask and outside, work is in FLOPs of the model as
counted by few_steps.py. The reference model without guidance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_steps import UNGUIDED, Work, edited_with

import hetcache_compile as hetcache
from hetcache_compile import Plan, reference
from hetcache_compile.bench.calibrate import computed_by
from hetcache_compile.edit.editing import EditRequest, compiled, make_plan, run_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.plan.schedule import StepKind
from hetcache_compile.provenance import provenance
from hetcache_compile.runtime.backend import hetcache_backend

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Way:
    """How PARTIAL steps keep the context.

    Attributes:
        name: for the table.
        box: the context is divided into boxes of so many tokens `(t, h, w)`, of which each step computes one;
            none: no context is computed.
        in_turn: another one in each step.
        moved: the other tokens of a box move by the change of its computed one.
        mean: all keys and values move by the mean of their true changes, one vector for each attention. No step knows
            it: this is the most that a correction for the time alone can bring, however it is calibrated.
        known: outputs of the context are noise minus clip, as they are where a straight path ends at the clip; in other
            ways they go on linearly from the last two.
    """

    name: str
    box: tuple[int, int, int] | None = None
    in_turn: bool = True
    moved: bool = False
    mean: bool = False
    known: bool = False


STALE = "as it is"
WAYS = (
    Way(STALE),
    Way("outputs of the context known", known=True),
    Way("moved by the mean change, which no step knows", mean=True),
    Way("a quarter computed in turn", (1, 2, 2)),
    Way("one of 27 computed", (3, 3, 3), in_turn=False),
    Way("one of 27 computed, the others moved", (3, 3, 3), in_turn=False, moved=True),
    Way("one of 8 computed, the others moved", (2, 2, 2), in_turn=False, moved=True),
    Way("one of 8 computed in turn, the others moved", (2, 2, 2), moved=True),
)
PLANS: dict[str, dict[str, Any]] = {
    f"{STALE}, in a session": {},
    "context_motion=1": {"context_motion": 1, "context_ratio": 0.05},
}
"""Options of plans in a session."""
KINDS = {kind.letter: kind for kind in StepKind}
SCHEDULES = ("FPPPPPPP", "FPPPFPPP", "FPRPFPRP")


@dataclass
class Simulation:
    """An edit in which hooks on the attentions stand in for the cache.

    Attributes:
        plan: of the edit: its active tokens, without context.
        way: how the context is kept.
        kinds: of the steps, as letters.
        noise: the latents of the first call.
        clip: latents of the clip as the model is given them, right outside the mask.
    """

    plan: Plan
    way: Way
    kinds: str
    clip: torch.Tensor
    noise: torch.Tensor | None = None
    computed: list[int] = field(default_factory=list)
    cache: dict[Any, torch.Tensor] = field(default_factory=dict)
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        grid, box = self.plan.grid, self.way.box or (1, 1, 1)
        places = np.unravel_index(np.arange(self.plan.num_tokens), grid)
        boxes = [place // size for place, size in zip(places, box, strict=True)]
        members = [place % size for place, size in zip(places, box, strict=True)]
        sizes = [-(-length // size) for length, size in zip(grid, box, strict=True)]
        self.cluster = torch.from_numpy(np.ravel_multi_index(boxes, sizes))
        self.member = torch.from_numpy(np.ravel_multi_index(members, box))
        self.context = torch.from_numpy(~self.plan.active_mask)
        self.active = ~self.context

    @property
    def step(self) -> int:
        return len(self.computed) - 1

    def keep(self, module: torch.nn.Module, _: Any, new: torch.Tensor) -> torch.Tensor:
        """The keys or values `[1, N, C]` that an attention reads in place of new ones: a hook of its projection."""
        if self.kinds[self.step] == "P":
            old, context = self.cache[module], self.context
            read = torch.where(self.active[:, None], new, old)
            if self.way.mean:
                read = torch.where(context[:, None], old + (new - old)[:, context].mean(1), read)
            elif self.way.moved:
                read = torch.where(context[:, None], old + self.of_clusters(new - old), read)
            new = read
        self.cache[module] = new
        return new

    def of_clusters(self, change: torch.Tensor) -> torch.Tensor:
        """For each token the mean change of the computed context in its box; 0 where there is none."""
        chosen = self.context & self.active
        count = int(self.cluster.max()) + 1
        total = change.new_zeros(1, count, change.shape[-1]).index_add_(1, self.cluster[chosen], change[:, chosen])
        number = torch.bincount(self.cluster[chosen], minlength=count).clamp(min=1)
        return (total / number[:, None])[:, self.cluster]

    def call(self, forward: Callable[..., Any], **arguments: Any) -> tuple[torch.Tensor]:
        """One call of the model in place of `forward`."""
        step = len(self.computed)
        latents, time = arguments["hidden_states"], arguments["timestep"].flatten()[0]
        self.noise = latents.clone() if self.noise is None else self.noise
        chosen = torch.zeros_like(self.context)
        if self.way.box:
            size = prod(self.way.box)
            chosen = self.member == (step % size if self.way.in_turn else size // 2)
        self.active = torch.ones_like(self.context) if self.kinds[step] == "F" else ~self.context | chosen
        if self.kinds[step] == "R":
            self.computed.append(0)
            return (self.predicted(time),)
        self.computed.append(int(self.active.sum()))
        output = forward(**arguments)[0]
        active = self.in_latents(self.active, output)
        times = torch.full_like(output, time)
        if self.kinds[step] == "P":
            (last, at), (before, ahead) = self.outputs
            result = torch.where(active, output, self.predicted(time))
            moved = [(new, old) for new, old in zip((output, times), (last, at), strict=True)]
            kept = tuple(torch.where(active, new, old) for new, old in moved)
            older = tuple(torch.where(active, new, old) for new, old in zip((last, at), (before, ahead), strict=True))
            self.outputs = [(kept[0], kept[1]), (older[0], older[1])]
            return (result,)
        self.outputs = [(output, times), self.outputs[0] if self.outputs else (output, times)]
        return (output,)

    def predicted(self, time: torch.Tensor) -> torch.Tensor:
        """What a step returns of what it does not compute."""
        (last, at), (before, ahead) = self.outputs
        span = at - ahead
        slope = torch.where(span == 0, 0, (last - before) / torch.where(span == 0, 1, span))
        line = last + slope * (torch.full_like(at, time) - at)
        if not self.way.known:
            return line
        assert self.noise is not None
        return torch.where(self.in_latents(self.context, last), self.noise - self.clip, line)

    def in_latents(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Tokens `[N]` as a mask of latents `[1, C, T, H, W]`."""
        mask = tokens.reshape(self.plan.grid)
        for dim, size in enumerate(latents.shape[-3:]):
            mask = mask.repeat_interleave(size // mask.shape[dim], dim)
        return mask.expand_as(latents)

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Let a model compute so for one edit."""
        forward = model.forward
        attentions = [block.attn1 for block in (*model.blocks, *model.vace_blocks)]
        hooks = [part.register_forward_hook(self.keep) for one in attentions for part in (one.norm_k, one.to_v)]
        try:
            with computed_by(model, lambda **arguments: self.call(forward, **arguments)):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def edit_clip(pipe: Any, number: int, work: Work, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Every schedule and way on one held-out clip, by the clip's name."""
    clip, steps = reference.procedural_clip(number), len(SCHEDULES[0])
    request = EditRequest(video=clip.video, mask=clip.mask, prompt=clip.prompt, **edited_with(f"{UNGUIDED}:{steps}"))
    given: dict[str, Any] = {}

    def look(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        given.update(arguments)

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    uncached = run_pipeline(pipe, request, "uncached", silent).frames
    hook.remove()
    channels = given["hidden_states"].shape[1]
    known = given["control_hidden_states"][:, :channels]  # the clip with a grey mask, before the masked part
    cells: dict[str, Any] = {}
    for schedule in SCHEDULES:
        kinds = [KINDS[letter] for letter in schedule]
        usual = {"margin": options.margin, "context_ratio": 0.0, "multiple": 1, "context_motion": 0}
        plan = make_plan(pipe, request, kinds, **usual)
        tokens = plan.num_tokens
        cells[schedule] = {}
        for way in WAYS:
            simulated = Simulation(plan, way, schedule, known)
            with simulated.running(pipe.transformer):
                frames = run_pipeline(pipe, request, way.name, silent).frames
            flops = sum(work.of_call(computed, tokens) for computed in simulated.computed if computed)
            cells[schedule][way.name] = cell(frames, uncached, clip, steps * work.of_call(tokens, tokens) / flops)
        for name, changed in PLANS.items():
            plan = make_plan(pipe, request, kinds, **{**usual, **changed})
            with (
                compiled(pipe, backend=hetcache_backend, options={"inner": "eager"}),
                hetcache.session(plan, strict=True),
            ):
                frames = run_pipeline(pipe, request, name, silent).frames
            amounts = {StepKind.FULL: tokens, StepKind.PARTIAL: plan.num_active, StepKind.REUSE: 0}
            computed = [amounts[kind] for kind in plan.steps]
            flops = sum(work.of_call(number, tokens) for number in computed if number)
            cells[schedule][name] = cell(frames, uncached, clip, steps * work.of_call(tokens, tokens) / flops)
        print(clip.name, schedule, json.dumps(cells[schedule]), file=sys.stderr)
    return clip.name, cells


def cell(frames: Any, uncached: Any, clip: Clip, fewer_flops: float) -> dict[str, float]:
    """Likeness to the uncached result inside the mask and outside, to the true video inside, and work."""
    figures = {
        "psnr_db": psnr(frames, uncached, clip.mask),
        "context_db": psnr(frames, uncached, ~clip.mask),
        "quality_db": psnr(frames, clip.truth, clip.mask),
    }
    return {name: round(value, 3) for name, value in figures.items() if value is not None} | {
        "fewer_flops": round(fewer_flops, 4)
    }


def silent(stage: str, step: int, steps: int) -> None:
    """No progress."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="how many held-out clips; mask sizes take turns")
    parser.add_argument("--margin", type=float, default=1.0, help="of the active tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "fresher_context.json")
    options = parser.parse_args()
    pipe, work, cells = reference.load(few_steps=True), Work.of(reference.load(), reference.procedural_clip(0)), {}
    for number in range(options.clips):
        name, found = edit_clip(pipe, number, work, options)
        cells[name] = found
        result = {**provenance("cpu"), "margin": options.margin, "cells": cells}
        text = json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n"
        atomically(options.out, lambda temporary, text=text: Path(temporary).write_text(text))


if __name__ == "__main__":
    with torch.no_grad():
        main()
