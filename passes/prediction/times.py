"""The time of a step: which input holds it, and the arithmetic that it is kept in."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..analysis.inputs import is_state, plain_name
from ..analysis.time_input import time_input
from ..ir.cache import CacheEntry
from ..ir.editor import FormEditor
from ..ir.graphs import AddNode
from ..ir.refusal import Refusal, UnsupportedGraphError

aten = torch.ops.aten
NOT_COMPUTED = -1e30
"""The time of a value that was not computed yet. Not NaN, which engines may take for equal to itself."""


def time_of(form: FormEditor, name: str | None) -> Node:
    """The input that holds the time of a step, by default the one that `time_input` finds.

    Raises:
        UnsupportedGraphError: no input is the time.
    """
    inputs = [node for node in form.model_inputs if not is_state(node.name)]
    if name is None:
        found = time_input(form.model_inputs)
    else:
        found = next((node for node in inputs if name in (node.name, plain_name(node.name))), None)
    if found is None:
        names = ", ".join(node.name for node in inputs)
        reason = f"extrapolation needs the time of a step, and no input is called {name or 'timestep'} or used like one"
        help = f"make the plan with extrapolation=0 and context_extrapolation=0; the inputs are {names}"
        raise UnsupportedGraphError([Refusal(reason, help=help)])
    return found


def arithmetic_of(entry: CacheEntry) -> torch.dtype:
    """The type that an entry is predicted in and its times are kept in: its own, but at least float32."""
    return torch.promote_types(entry.dtype, torch.float32)


def latest_time(call: AddNode, time: Node, dtype: torch.dtype, device: torch.device) -> Node:
    """The time of a step, `[1]`. Where tokens have their own, the latest: those of a given first frame stand at 0.

    A model may be given its time on the host, and bring it to the device itself.
    """
    elsewhere = {} if time.meta["val"].device == device else {"device": device}
    flat = call(aten.view.default, call(aten._to_copy.default, time, dtype=dtype, **elsewhere), [-1])
    now: Node = call(aten.amax.default, flat, [0])
    return now
