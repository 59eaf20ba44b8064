"""`rewrite`: the functional heart. A model and a plan in, forms with an explicit cache out, no hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import GridMismatchError, SessionError
from ..passes.analysis.analyse import Analysis, analyse
from ..passes.analysis.hoist import Hoisted, hoist
from ..passes.analysis.inputs import TokenInputs, holds_input
from ..passes.analysis.time_input import time_input
from ..passes.forms import pipeline
from ..passes.forms.collectives import Ranks
from ..passes.ir.cache import CacheEntry
from ..passes.ir.contract import STEP_WEIGHTS, FormOptions
from ..passes.ir.editor import PassError
from ..passes.ir.form import Form
from ..passes.ir.graphs import device_of
from ..passes.ir.refusal import Refusal, UnsupportedGraphError, shape_of
from ..plan.plan import Plan
from .by_dynamo import capture_model
from .capture import Program

Cache = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Forms:
    """The forms of one model for one plan. Call `full`, `partial` and `reuse` like the model.

    `full(*args, **kwargs)` returns `(output, cache)`; the others take the cache first and return the next one. `full`
    begins an edit; `run("full", cache, args, kwargs)` goes on with one, so that later predictions can start from what
    was computed before. A cache is a dict from `CacheEntry.input_name` to tensor; forms never change one in place.
    Other plans with the same budgets can use the same forms: pass their indices with `for_plan`.

    Forms run on the weights that the model has now, loaded and fused since or not. A cache knows nothing of that: after
    a change begin with a full step.
    """

    program: Program
    analysis: Analysis
    plan: Plan
    by_kind: Mapping[str, Form]
    model: nn.Module | None = None

    def __post_init__(self) -> None:
        """Raise `PassError` if a form reads a cache entry that no step before it can have written."""
        full = self.by_kind["full"]
        known = {entry.input_name: entry for entry in (*full.reads, *full.writes)}
        for kind, form in self.by_kind.items():
            for entry in form.reads:
                found = known.get(entry.input_name)
                if found == entry or kind == "full":
                    continue
                theirs = "has no such entry" if found is None else f"has it as {_tensor(found)}"
                raise PassError(
                    f"the {kind} form reads {entry.input_name} as {_tensor(entry)}; the full form {theirs}: a pass has "
                    "to change an entry in every form"
                )

    @property
    def cache_entries(self) -> tuple[CacheEntry, ...]:
        """What the cache holds, in order."""
        return self.by_kind["full"].writes

    @property
    def cache_bytes(self) -> int:
        """Size of one cache: one branch of guidance, all layers."""
        return sum(entry.num_bytes for entry in self.cache_entries)

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffers that a session keeps for one branch (see `passes.forms.all_rows`), and of
        `unchanging_bytes`."""
        reads = pipeline.in_process(self.by_kind["full"], self.plan.form_options).reads
        return sum(entry.num_bytes for entry in reads) + self.unchanging_bytes

    @property
    def unchanging_bytes(self) -> int:
        """Size of the keys and values of the text and the like that a session keeps for one branch beside its cache."""
        return unchanging_bytes(self.program, self.analysis, self.plan)

    def for_plan(self, plan: Plan) -> Forms:
        """The same forms for another mask with the same grid and budgets."""
        if different := self.plan.form_options.differences(plan.form_options):
            raise SessionError(f"these forms are for a plan with another {different}: rewrite the model for this one")
        for form in self.by_kind.values():
            check_weights(form.indices, plan)
        return Forms(self.program, self.analysis, plan, self.by_kind, self.model)

    def full(self, *args: Any, **kwargs: Any) -> tuple[Any, Cache]:
        """The plain model, and a fresh cache."""
        return self.run("full", {}, args, kwargs)

    def partial(self, cache: Cache, *args: Any, **kwargs: Any) -> tuple[Any, Cache]:
        """Compute the active tokens only; the rest comes from `cache`."""
        return self.run("partial", cache, args, kwargs)

    def reuse(self, cache: Cache, *args: Any, **kwargs: Any) -> tuple[Any, Cache]:
        """Compute no token: the output of the last computed step."""
        return self.run("reuse", cache, args, kwargs)

    def run(
        self, kind: str, cache: Cache, args: Sequence[Any], kwargs: Mapping[str, Any], step: int | None = None
    ) -> tuple[Any, Cache]:
        """Run the form `kind`; with `step`, the number of a step, as the plan's weights say (see
        `passes.prediction.step_weights`)."""
        form = self.by_kind[kind]
        program = self.program if self.model is None else self.program.with_weights_of(self.model)
        inputs = program.flat_inputs(args, kwargs)
        device = device_of(inputs)
        values = {name: getattr(self.plan, name) for name in form.indices}
        if step is not None and self.plan.weights.size:
            values[STEP_WEIGHTS] = self.plan.weights[step]
        indices = [torch.as_tensor(values[name], device=device) for name in form.indices]
        if kind == "full":
            cache = {e.input_name: e.empty(device) for e in form.reads} | cache
        missing = [entry.input_name for entry in form.reads if entry.input_name not in cache]
        if missing:
            raise SessionError(f"the cache lacks {', '.join(missing)}: pass what a full step returned")
        # A form has the operators that a weight's class asked for when it was captured.
        with torch._C.DisableTorchFunctionSubclass():
            results = form.module(*inputs, *indices, *(cache[entry.input_name] for entry in form.reads))
        num_outputs = len(results) - len(form.writes)
        written = {e.input_name: t for e, t in zip(form.writes, results[num_outputs:], strict=True)}
        return pytree.tree_unflatten(results[:num_outputs], self.program.out_spec), {**cache, **written}


def _tensor(entry: CacheEntry) -> str:
    """How an entry lies in memory, such as `float16 [1, 2, 30, 8], rows context`."""
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}, rows {entry.rows}"


def write_form(
    kind: str,
    program: Program,
    analysis: Analysis,
    plan: Plan,
    options: FormOptions | None = None,
    ranks: Ranks | None = None,
) -> Form:
    """One functional form of a program for a plan, by default with the plan's own options and for one process.

    Raises:
        UnsupportedGraphError: the graph has not what the plan asks for.
    """
    form = pipeline.write_form(kind, program.module, analysis, options or plan.form_options, ranks)
    check_weights(form.indices, plan)
    return form


def check_weights(indices: Sequence[str], plan: Plan) -> None:
    """Raise `UnsupportedGraphError` if the plan has weights that the form cannot take. Plans share forms whether they
    have weights or not, so forms that were made for another plan have to be checked too."""
    if plan.weights.size and STEP_WEIGHTS not in indices:
        reason = "something other than moves comes after the last token, where a step's weights cannot reach it"
        raise UnsupportedGraphError([Refusal(reason, help="make the plan with multistep=0")])


def rewrite(
    model: nn.Module,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    token_inputs: TokenInputs | None = None,
) -> Forms:
    """Rewrite one call of `model` into its full, partial and reuse forms.

    Args:
        model: any module; it is not changed, and the forms share its weights.
        plan: grid, indices and budgets.
        args: positional arguments of a sample call; shapes and Python values become static.
        kwargs: keyword arguments of it.
        token_inputs: tensor inputs that hold packed tokens already, with the dim of their token axis, or
            `(dim, first token row)` where the dim holds other rows too. By default as the plan says; else found by
            itself where it is clear.

    Raises:
        UnsupportedGraphError: with every reason why the graph cannot be rewritten.
        GridMismatchError: the plan is for another grid.
    """
    model = getattr(model, "_orig_mod", model)
    program = capture_model(model, args, kwargs or {})
    token_inputs = token_inputs or planned_token_inputs(program, plan)
    program, analysis = analysed(program, plan.grid, token_inputs)
    return replace(write_forms(program, analysis, plan), model=model)


def analysed(
    program: Program, grid: tuple[int, int, int], token_inputs: TokenInputs | None
) -> tuple[Program, Analysis]:
    """The analysis of a program, and the program with the graph that was analysed. For errors see `analyse`."""
    analysis = analyse(program.module, grid, token_inputs)
    return replace(program, module=analysis.module), analysis


@dataclass(frozen=True)
class Hoist:
    """A program without what makes keys and values that no step changes, which are its last inputs.

    Attributes:
        program: the rest.
        analysis: of it.
        graphs: what was taken apart.
    """

    program: Program
    analysis: Analysis
    graphs: Hoisted


def hoisted(program: Program, analysis: Analysis, token_inputs: TokenInputs | None) -> Hoist | None:
    """The two parts of a program, or None where it has but one.

    Args:
        program: the whole.
        analysis: of it.
        token_inputs: that it was analysed with.
    """
    inputs = [node for node in program.module.graph.nodes if node.name in program.inputs]
    time = time_input(inputs)
    varying = [node.name for node in inputs if node is time or node.name in analysis.token_sources]
    found = hoist(program.module, varying)
    if found is None:
        return None
    names = (*program.inputs, *found.names)
    in_spec = pytree.tree_structure((tuple(range(len(names))), {}))
    rest = replace(program, module=found.rest, inputs=names, in_spec=in_spec)
    try:
        rest, again = analysed(rest, analysis.grid, token_inputs)
    except (UnsupportedGraphError, GridMismatchError):
        return None  # keys and values may be as long as the latents, and be taken for them
    return Hoist(rest, again, found) if again.token_sources == analysis.token_sources else None


def unchanging_bytes(program: Program, analysis: Analysis, plan: Plan) -> int:
    """Bytes that a session keeps for one branch beside its cache, in the place where it keeps the cache."""
    if plan.cache_device == "cpu":
        return 0
    found = hoisted(program, analysis, planned_token_inputs(program, plan))
    return 0 if found is None else found.graphs.num_bytes


def planned_token_inputs(program: Program, plan: Plan) -> TokenInputs | None:
    """Those inputs of a program that hold tokens by the plan; None where there are none.

    A model may be given references in its first call only: in later ones the tokens begin elsewhere.
    """
    inputs = [node for node in program.module.graph.nodes if node.name in program.inputs]

    def fits(name: str, dim: int, first: int) -> bool:
        shapes = [shape_of(node) for node in inputs if holds_input(node.name, name)]
        return bool(shapes) and all(shape[dim] >= first + plan.num_tokens for shape in shapes)

    return {name: where for name, where in plan.token_inputs.items() if fits(name, *where)} or None


def write_forms(program: Program, analysis: Analysis, plan: Plan, ranks: Ranks | None = None) -> Forms:
    """Every form of a program that was captured and analysed, for any plan on its grid; or one rank's."""
    by_kind = {kind: write_form(kind, program, analysis, plan, ranks=ranks) for kind in pipeline.KINDS}
    return Forms(program, analysis, plan, by_kind)
