"""Let the forms predict what a step does not compute, instead of repeating what was computed last.

Between steps the model's output moves on a smooth curve over the time of the flow. Each cached output keeps the
last `order` computed ones beside it, and the times of all of them; wherever a form reads a cached output it gets the
Lagrange polynomial through these points at the present time: order 0 repeats, order 1 is a straight line (TaylorSeer,
arXiv 2503.06923, extrapolates features over the step number; here it is the output, over the time itself).

=========  ==========================================================================
form       after the pass
=========  ==========================================================================
full       computed outputs and their times move down by one; the new ones go on top
partial    inactive rows are predicted; then as in full
reuse      the output is predicted; nothing is written
=========  ==========================================================================

A step at the time of the last one (a second-order solver, a test on frozen inputs) replaces it instead. Rows that a
partial step predicted lie on the polynomial they came from, so predicting from them again follows the same curve.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from .axis import Tokens
from .forms import CacheEntry, Form, has_side_effect, verify_shapes
from .refusal import Refusal, UnsupportedGraphError

aten = torch.ops.aten
MAX_ORDER = 2


def extrapolate(form: Form, order: int, time_input: str | None = None) -> Form:
    """The form with its outputs predicted at order 0, 1 or 2.

    Args:
        form: functional, as `forms` writes it.
        order: degree of the polynomial; 0 changes nothing.
        time_input: the placeholder that holds the time of the step; by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """
    if order == 0:
        return form
    graph = copy.deepcopy(form.module.graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    before = _Inputs(graph, form, placeholders)
    time = _time(graph, placeholders[: len(placeholders) - len(form.indices) - len(form.reads)], time_input)
    outputs = [entry for entry in dict.fromkeys((*form.reads, *form.writes)) if entry.group == "output"]
    histories = {entry: [before.read(past) for past in history_of(entry, order)] for entry in outputs}
    times = before.read(_times_entry(outputs[0], order))
    call = _caller(graph)
    now = call(aten.amax.default, call(aten._to_copy.default, time, dtype=torch.float32))
    weights = lagrange_weights(call, times, now, order)
    if form.kind != "full":
        for entry in outputs:
            _predict(call, before.inputs[entry], histories[entry], weights, entry)
    writes: dict[CacheEntry, Node] = {}
    if form.writes:
        repeated = call(aten.eq.Tensor, call(aten.select.int, times, 0, 0), now)
        for entry in outputs:
            newer = [before.inputs[entry], *histories[entry][:-1]]
            for past, old, new in zip(history_of(entry, order), histories[entry], newer, strict=True):
                writes[past] = call(aten.where.self, repeated, old, new)
        earlier = call(aten.slice.Tensor, times, 0, 0, order)
        pushed = call(aten.cat.default, [call(aten.view.default, now, [1]), earlier])
        writes[_times_entry(outputs[0], order)] = call(aten.where.self, repeated, times, pushed)
    return before.finish(writes)


def history_of(entry: CacheEntry, order: int) -> list[CacheEntry]:
    """The entries behind a cached output: `past_output.0.1` is what was computed one step earlier."""
    return [replace(entry, name=f"{entry.name}.{age}") for age in range(1, order + 1)]


def _times_entry(entry: CacheEntry, order: int) -> CacheEntry:
    """When each kept output was computed, latest first; NaN where nothing was computed yet."""
    return CacheEntry(
        "times", "none", 0, (order + 1,), torch.float32, entry.module, Tokens(0), group="output", initial=math.nan
    )


def lagrange_weights(call: Callable[..., Node], times: Node, now: Node, order: int) -> list[Node]:
    """The weight of each kept output at time `now`, and whether it counts: points of time NaN do not."""
    points = [call(aten.select.int, times, 0, i) for i in range(order + 1)]
    known = [call(aten.eq.Tensor, point, point) for point in points]
    one, zero = (call(aten.full_like.default, now, value) for value in (1.0, 0.0))
    weights = []
    for i, point in enumerate(points):
        weight = one
        for j, other in enumerate(points):
            if i != j:
                factor = call(aten.div.Tensor, call(aten.sub.Tensor, now, other), call(aten.sub.Tensor, point, other))
                weight = call(aten.where.self, known[j], call(aten.mul.Tensor, weight, factor), weight)
        weights.append(call(aten.where.self, known[i], weight, zero))
    return weights


def _predict(
    call: Callable[..., Node], cached: Node, history: list[Node], weights: list[Node], entry: CacheEntry
) -> None:
    """Every reader of the cached output gets the prediction. Unset memory times a weight of 0 must not be NaN."""
    readers = list(cached.users)
    total = None
    for tensor, weight in zip([cached, *history], weights, strict=True):
        term = call(aten.mul.Tensor, call(aten._to_copy.default, tensor, dtype=torch.float32), weight)
        absent = call(aten.eq.Scalar, weight, 0)
        term = call(aten.masked_fill.Scalar, term, absent, 0)
        total = term if total is None else call(aten.add.Tensor, total, term)
    assert total is not None
    prediction = call(aten._to_copy.default, total, dtype=entry.dtype)
    for reader in readers:
        reader.replace_input_with(cached, prediction)


def _caller(graph: Graph) -> Callable[..., Node]:
    """A function that adds calls in front of the body, where every input is there and nothing is overwritten yet."""
    body = next(node for node in graph.nodes if node.op != "placeholder")

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_before(body):
            node = graph.call_function(op, args, kwargs)
        node.meta["hetcache"] = "extrapolate"
        return node

    return call


class _Inputs:
    """The placeholders of a form, which the pass adds to behind the ones there are."""

    def __init__(self, graph: Graph, form: Form, placeholders: list[Node]) -> None:
        self.graph, self.form, self.last = graph, form, placeholders[-1]
        values = [node.meta["val"] for node in placeholders if isinstance(node.meta["val"], FakeTensor)]
        self.mode = values[0].fake_mode
        self.device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
        self.inputs = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
        for entry in form.writes:
            if entry.group == "output" and entry not in self.inputs:
                self.read(entry)

    def read(self, entry: CacheEntry) -> Node:
        """The input that holds an entry."""
        if entry not in self.inputs:
            with self.graph.inserting_after(self.last):
                node = self.graph.placeholder(entry.input_name.replace(".", "_"))
            with self.mode:
                node.meta["val"] = torch.empty(entry.shape, dtype=entry.dtype, device=self.device)
            self.inputs[entry] = self.last = node
        return self.inputs[entry]

    def finish(self, writes: dict[CacheEntry, Node]) -> Form:
        """The form with more state. History is stored first: it reads what the outputs are about to overwrite."""
        output = self.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        count = len(results) - len(self.form.writes)
        output.args = ((*results[:count], *writes.values(), *results[count:]),)
        self.graph.eliminate_dead_code(has_side_effect)
        self.graph.lint()
        module = GraphModule(self.form.module, self.graph)
        verify_shapes(module, {})
        return Form(self.form.kind, module, self.form.indices, tuple(self.inputs), (*writes, *self.form.writes))


def _time(graph: Graph, inputs: list[Node], name: str | None) -> Node:
    found = [node for node in inputs if (name is None and "timestep" in node.name) or node.name == name]
    if len(found) != 1:
        names = ", ".join(node.name for node in inputs if not node.name.startswith("p_"))
        reason = "extrapolation needs the time of a step, and no input is called timestep"
        raise UnsupportedGraphError([Refusal(reason, help=f"the inputs are {names}")])
    return found[0]
