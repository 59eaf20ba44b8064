"""Let a form write its cache into buffers that its caller owns, instead of returning new tensors."""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule

from .forms import CacheEntry, Form


def write_in_place(form: Form) -> Form:
    """A form with `writes` empty: every entry it writes is one of its `reads`, and is overwritten.

    The pair of a functional form and this pass is JAX's `discharge` the other way round: state is explicit in the
    graph we reason about, and memory stays where it is in the graph that runs.
    """
    graph = copy.deepcopy(form.module.graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    num_outputs = len(results) - len(form.writes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    reads = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
    last = placeholders[-1]
    for entry, value in zip(form.writes, results[num_outputs:], strict=True):
        if entry not in reads:
            with graph.inserting_after(last):
                last = reads[entry] = graph.placeholder(entry.input_name.replace(".", "_"))
            last.meta["val"] = value.meta["val"]
        with graph.inserting_before(output):
            graph.call_function(torch.ops.aten.copy_.default, (reads[entry], value))
    output.args = (tuple(results[:num_outputs]),)
    graph.lint()
    entries: tuple[CacheEntry, ...] = tuple(reads)
    return Form(form.kind, GraphModule(form.module, graph), form.indices, entries, ())
