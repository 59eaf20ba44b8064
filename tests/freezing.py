"""What a partial step has to be, computed the slow way: the whole model, with the inactive tokens frozen.

The whole graph runs on new inputs. Wherever tokens meet (keys and values, sums over tokens, operators that are
computed whole, outputs), the rows of inactive tokens are put back to what they were on the old inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Interpreter, Node

from hetcache_compile import Plan
from hetcache_compile.capture import Program
from hetcache_compile.passes.analyse import Analysis
from hetcache_compile.passes.axis import Accumulate, Attend, Leave, Tokens


def computed_rows(tokens: Tokens, active: Sequence[bool]) -> torch.Tensor:
    """Which entries of a token dim a partial step computes: active tokens, and rows that are no token."""
    rows = [True] * tokens.whole[0]
    for length in tokens.whole[1:]:
        rows += [*active, *[True] * length]
    return torch.tensor([row for _ in range(tokens.outer) for row in rows for _ in range(tokens.inner)])


class Frozen(Interpreter):
    """Runs a graph; where `old` holds an operand's value, the rows of its inactive tokens are those."""

    def __init__(self, program: Program, analysis: Analysis, active: Sequence[bool], old: dict[Any, torch.Tensor]):
        super().__init__(program.module)
        self.analysis, self.active, self.old = analysis, active, old
        self.seen: dict[Any, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        frozen: dict[Node, torch.Tensor] = {}
        saved = {}
        for edit in self.analysis.edits.get(n, ()):
            if isinstance(edit, Attend):
                sides = [(edit.key, edit.tokens), (edit.value, edit.tokens)]
            elif isinstance(edit, Accumulate):
                sides = [(edit.left, edit.left_tokens), (edit.right, edit.right_tokens)]
            elif isinstance(edit, Leave):
                sides = [(edit.operand, edit.tokens)]
            else:
                continue
            for operand, tokens in sides:
                value = self.env[operand]
                self.seen[operand] = value
                if operand in self.old:
                    rows = computed_rows(tokens, self.active)
                    rows = rows.view([-1 if d == tokens.dim else 1 for d in range(value.ndim)])
                    frozen[operand] = torch.where(rows, value, self.old[operand])
        # A query may be the same node as a key: it is put back after the call, and its inactive rows do not matter.
        for operand, value in frozen.items():
            saved[operand] = self.env[operand]
            self.env[operand] = value
        result = super().run_node(n)
        self.env.update(saved)
        return result


def frozen_outputs(
    program: Program, analysis: Analysis, plan: Plan, old: dict[str, Any], new: dict[str, Any]
) -> list[Any]:
    """The flat outputs of a partial step on `new` after a full step on `old`, with every inactive token cached."""
    active = [False] * prod(plan.grid)
    for index in plan.active_index:
        active[index] = True

    def run(kwargs: dict[str, Any], values: dict[Any, torch.Tensor]) -> tuple[list[Any], dict[Any, torch.Tensor]]:
        interpreter = Frozen(program, analysis, active, values)
        inputs = program.flat_inputs((), kwargs)
        with torch.no_grad():
            outputs = interpreter.run(*inputs, enable_io_processing=False)
        return list(outputs), interpreter.seen

    _, values = run(old, {})
    outputs, _ = run(new, values)
    return outputs
