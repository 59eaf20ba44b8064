"""Let a form keep its cache in buffers that its caller owns, instead of taking and returning tensors.

The functional form is the one we reason about and export. This pass makes the one that runs in a process: state
stays where it is in memory, and a second edit allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteInPlace(FormPass):
    """`writes` is empty: every entry that the form touches is one of its `reads`, a buffer, and is overwritten."""

    name = "in place"
    ensures = frozenset({Trait.IN_PLACE})
    ends = frozenset({Trait.FUNCTIONAL})
    makes_tensors = False

    def edit(self, form: FormEditor) -> None:
        """Store every entry at the end of the graph; compilers sink the write into what computes the value."""
        writes = form.writes
        buffers = {entry: form.read(entry) for entry in writes}
        for entry, value in writes.items():
            store = form.at_end()(aten.copy_.default, buffers[entry], value)
            store.meta |= {key: value.meta[key] for key in ("stack_trace", "nn_module_stack") if key in value.meta}
        form.writes = {}
