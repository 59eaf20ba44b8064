"""What becomes of a pipeline with a session: the verdict of a row of `tests/pipelines`, on an unmodified pipeline."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pipelines.row import Row

import hetcache_compile as hetcache
from hetcache_compile import Plan
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.pipelines.observe import models_of
from hetcache_compile.plan.partition import TokenKind

MIXED = ("full", "partial", "reuse", "full", "reuse")
"""Kinds of steps, from the first: rows have two to five."""
LONG = 8
"""Steps of an edit where those of the row do not suffice to see one that is not FULL."""


@dataclass
class Verdict:
    """What was found of a row.

    Attributes:
        result: `cached`; `fewer`, where more calls are FULL than planned; `plain`, where the graph is refused and the
            pipeline gives what it always gives; `no plan`; `broken`, where the pipeline itself does not run; `wrong`.
        reason: why it is not cached.
        grid: of the plan.
        steps: kinds of the calls of a mixed plan without guidance, a letter each.
        guided: the same with guidance; empty where the pipeline has none.
    """

    name: str
    result: str
    reason: str = ""
    grid: tuple[int, ...] = ()
    steps: str = ""
    guided: str = ""
    wrong: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Without what is empty."""
        found = {name: value for name, value in vars(self).items() if value}
        return found | {"grid": list(self.grid)} if self.grid else found


def check(row: Row) -> Verdict:
    """Plan its call, run it all FULL and mixed, with guidance and without, two edits in a session each time."""
    if row.reason:
        return Verdict(row.name, "broken", row.reason)
    try:
        plan = plan_of(row)
    except hetcache.HetCacheError as error:
        return Verdict(row.name, "no plan", str(error))
    verdict = Verdict(row.name, "cached", grid=plan.grid)
    verdict.wrong += wrong_plan(row, plan)
    for guided in (False, True) if row.guided else (False,):
        _run(row, plan, guided, verdict)
    if verdict.wrong:
        verdict.result = "wrong"
    return verdict


def plan_of(row: Row, **changes: Any) -> Plan:
    """The plan for a row's call, as a user makes it, with a margin of one token and every step FULL."""
    generator = torch.Generator().manual_seed(0)
    arguments = {**row.call(), "output_type": "latent", "generator": generator, **changes}
    mask = arguments.pop("mask", row.mask)
    return hetcache.plan_for(row.build(), mask=mask, schedule="full", multiple=1, margin=1, **arguments)


def wrong_plan(row: Row, plan: Plan) -> list[str]:
    """What is wrong with the tokens of a plan."""
    if plan.grid != row.grid:
        return [f"the plan has grid {plan.grid}, right is {row.grid}"]
    generative = plan.tokens_of(TokenKind.GENERATIVE).reshape(plan.grid)
    own = generative.any(axis=(1, 2))  # frames of references, which stand in front, are never masked
    right = np.array_equal(generative[own], row.token_mask[own]) and own[-1] and (np.diff(own) >= 0).all()
    return [] if right else ["the plan has other tokens masked than the pipeline"]


def mixed(plan: Plan) -> Plan:
    """The same plan with steps of every kind."""
    return plan.with_schedule(list(MIXED[: len(plan.steps)]))


def _run(row: Row, plan: Plan, guided: bool, verdict: Verdict) -> None:
    """Two edits under each plan; what is not as it must be goes into `verdict.wrong`."""
    torch._dynamo.reset()
    expected = [row.run(row.build(), seed, guided) for seed in range(2)]
    pipe, cached = row.build(), mixed(plan)
    compile_models(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HetCacheWarning)
        with hetcache.session(plan):
            full = [row.run(pipe, seed, guided) for seed in range(2)]
        with hetcache.session(cached) as session:
            edits = [row.run(pipe, seed, guided) for seed in range(2)]
        with hetcache.session(cached):
            alone = row.run(pipe, 1, guided)
    how = "with guidance" if guided else "without guidance"
    for seed, (one, other) in enumerate(zip(full, expected, strict=True)):
        if not torch.equal(one, other):
            verdict.wrong.append(f"{how}, edit {seed}: all FULL differs by {float((one - other).abs().max()):.1e}")
    if not torch.equal(edits[1], alone):
        verdict.wrong.append(f"{how}: the second edit in a session is not that of a session of its own")
    if not all(bool(torch.isfinite(one).all()) for one in edits):
        verdict.wrong.append(f"{how}: not finite")
    said = [str(one.message).removeprefix("hetcache: ") for one in caught if one.category is HetCacheWarning]
    kinds = "".join(kind.letter for kind in session.stats.kinds)
    kinds = kinds[: len(kinds) // 2] if kinds[: len(kinds) // 2] * 2 == kinds else kinds
    if said:
        verdict.result, verdict.reason = "fewer" if kinds else "plain", without_places(said[0])
        verdict.guided, verdict.steps = (kinds, verdict.steps) if guided else (verdict.guided, kinds)
        return
    planned = letters(cached, row, guided)
    if set(kinds) == {"F"} != set(planned):
        kinds, planned = _longer(row, guided)
    elif np.array_equal(edits[0], expected[0]):
        verdict.wrong.append(f"{how}: nothing was left out")
    if set(kinds) == {"F"}:
        verdict.wrong.append(f"{how}: every call is FULL, planned are {planned}")
    elif kinds != planned:
        verdict.result, verdict.reason = "fewer", f"planned are {planned}: more calls are FULL"
        if kinds.count("F") <= planned.count("F"):
            verdict.wrong.append(f"{how}: the calls were {kinds}, planned are {planned}")
    if guided:
        verdict.guided = kinds
    else:
        verdict.steps = kinds


def letters(plan: Plan, row: Row, guided: bool) -> str:
    """The kinds of the calls of an edit, as planned."""
    return "".join(kind.letter * (row.guided_calls if guided else row.calls) for kind in plan.steps)


def _longer(row: Row, guided: bool) -> tuple[str, str]:
    """The kinds of the calls of a longer edit, and those planned."""
    pipe = row.build()
    compile_models(pipe)
    plan = plan_of(row, num_inference_steps=LONG)
    plan = plan.with_schedule(["full", *["reuse"] * (len(plan.steps) - 2), "partial"])
    with hetcache.session(plan) as session:
        row.run(pipe, 0, guided, num_inference_steps=LONG)
    return "".join(kind.letter for kind in session.stats.kinds), letters(plan, row, guided)


def without_places(reason: str) -> str:
    """A reason without the folder that packages are installed in, and without the advice behind it."""
    return re.sub(r"\S*/(site-packages/|(?=diffusers/))", "", reason).partition(". Hooks on parts of the model")[0]


def compile_models(pipe: Any) -> None:
    """Compile what denoises, with `eager` inside."""
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) in models_of(pipe):
            setattr(pipe, name, torch.compile(getattr(pipe, name), backend="hetcache", options={"inner": "eager"}))
