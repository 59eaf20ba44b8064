"""What the pass makes of one model of the zoo: exact, refused, or not capturable; used by tests and by the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from freezing import frozen_outputs
from torch.utils import _pytree as pytree
from zoo.entry import Entry

import hetcache_compile as hetcache
from hetcache_compile.capture.capture import Program, capture
from hetcache_compile.capture.rewrite import Forms, analysed
from hetcache_compile.passes.analysis.analyse import Analysis
from hetcache_compile.passes.ir.axis import Accumulate, Attend
from hetcache_compile.passes.writing.write import WRITERS
from hetcache_compile.plan.plan import Plan
from hetcache_compile.plan.schedule import StepKind

TOLERANCE = 1e-5  # relative to the largest value of an output; fp32 rounding through a few layers stays below


@dataclass(frozen=True)
class Verdict:
    """One row of the table of models.

    Attributes:
        name: of the entry.
        result: `exact`, `refused` or `not capturable`.
        error: the largest difference on frozen inputs to the plain model, relative to its largest value.
        changed_error: the same on new inputs, to the whole model with its inactive tokens frozen; with every inactive
            token cached, and with half of them, of which the others are left out of the whole model's attention.
        reason: the first line of why not.
        cached: attentions with a cache.
        whole: operators that look across tokens and are computed whole.
    """

    name: str
    result: str
    error: float = 0.0
    changed_error: float = 0.0
    reason: str = ""
    cached: int = 0
    whole: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v or k in ("name", "result")}


def random_plan(grid: tuple[int, int, int], num_active: int, num_context: int, seed: int) -> Plan:
    """Random active tokens, and random others as context."""
    order = np.random.default_rng(seed).permutation(int(np.prod(grid)))
    active, context = np.sort(order[:num_active]), np.sort(order[num_active : num_active + num_context])
    return Plan(grid, active, context, np.zeros(len(order), dtype=np.uint8), (StepKind.FULL,))


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def distance(actual: Any, expected: Any) -> float:
    """The largest difference of any output, relative to the largest value of that output."""
    worst = 0.0
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        if a.shape != b.shape or not torch.isfinite(a).all():
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)))
    return worst


def check(entry: Entry) -> Verdict:
    """Build, capture, analyse, rewrite, and measure."""
    model = entry.build()
    try:
        program = capture(model, (), entry.inputs())
    except hetcache.UnsupportedGraphError as error:
        return Verdict(entry.name, "not capturable", reason=str(error.reasons[0]).splitlines()[0])
    try:
        program, analysis = analysed(program, entry.grid, entry.token_inputs)
    except hetcache.UnsupportedGraphError as error:
        return Verdict(entry.name, "refused", reason="; ".join(str(r).splitlines()[0] for r in error.reasons))
    except hetcache.GridMismatchError as error:
        return Verdict(entry.name, "refused", reason=str(error))
    n = int(np.prod(entry.grid))
    m = max(1, n // 3)
    errors, changed = [], 0.0
    for num_context in (n - m, (n - m) // 2):
        plan = random_plan(entry.grid, m, num_context, seed=1)
        forms = write(program, analysis, plan)
        with torch.no_grad():
            old, new = entry.inputs(0), new_inputs(entry, program)
            plain = model(**old)
            full, cache = forms.full(**old)
            partial, _ = forms.partial(cache, **old)
            reuse, _ = forms.reuse(cache, **old)
            errors += [distance(full, plain), distance(reuse, plain)]
            if num_context == n - m:
                errors.append(distance(partial, plain))
            got, _ = forms.partial(cache, **new)
            changed = max(changed, distance(got, frozen_outputs(program, analysis, plan, old, new)))
    cached = len(analysis.of_type(Attend)) + len(analysis.of_type(Accumulate))
    whole = tuple(f"{r.op}: {r.reason}" for r in analysis.whole.values())
    tolerance = TOLERANCE
    if max(*errors, changed) > tolerance:
        tolerance = 2 * own_rounding(entry)
    result = "exact" if max(*errors, changed) <= tolerance else "wrong"
    return Verdict(entry.name, result, max(errors), changed, cached=cached, whole=whole)


def new_inputs(entry: Entry, program: Program) -> dict[str, Any]:
    """Another call; what the captured graph assumes stays the same."""
    old, new = entry.inputs(0), entry.inputs(1)
    leaves, spec = pytree.tree_flatten(((), old))
    names = dict(zip(program.inputs, leaves, strict=True))
    changed = pytree.tree_leaves(((), new))
    kept = [names[name] if name in program.assumed else leaf for name, leaf in zip(names, changed, strict=True)]
    return pytree.tree_unflatten(kept, spec)[1]


def own_rounding(entry: Entry) -> float:
    """How far fp32 takes the model's own output from that of float64: some models amplify a rounding a hundredfold."""
    model, inputs = entry.build(), entry.inputs()
    with torch.no_grad():
        plain = model(**inputs)
        double = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        return distance(plain, model.double()(**double))


def write(program: Program, analysis: Analysis, plan: Plan) -> Forms:
    by_kind = {kind: make(program.module, analysis, plan.budgets) for kind, make in WRITERS.items()}
    return Forms(program, analysis, plan, by_kind)
