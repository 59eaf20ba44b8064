"""What a partial step has to be, computed the slow way: the whole model, with the inactive tokens frozen.

The whole graph runs on new inputs. Wherever tokens meet (keys and values, sums over tokens, operators that are
computed whole, outputs), the rows of inactive tokens are put back to what they were on the old inputs. Tokens that are
neither active nor cached are left out of keys, values and sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Interpreter, Node

from hetcache_compile import Plan
from hetcache_compile.capture.capture import Program
from hetcache_compile.passes.analysis.analyse import Analysis
from hetcache_compile.passes.ir.axis import Accumulate, Attend, Leave, Tokens


def computed_rows(tokens: Tokens, active: Sequence[bool]) -> torch.Tensor:
    """Which entries of a token dim a partial step computes: active tokens, and rows that are no token."""
    rows = [True] * tokens.whole[0]
    for length in tokens.whole[1:]:
        rows += [*active, *[True] * length]
    return torch.tensor([row for _ in range(tokens.outer) for row in rows for _ in range(tokens.inner)])


class Frozen(Interpreter):
    """Runs a graph; where `old` holds an operand's value, the rows of its inactive tokens are those.

    Attention and sums see the tokens that are `seen_by_others` alone.
    """

    def __init__(
        self,
        program: Program,
        analysis: Analysis,
        active: Sequence[bool],
        old: dict[Any, torch.Tensor],
        seen_by_others: Sequence[bool],
    ):
        super().__init__(program.module)
        self.analysis, self.active, self.old, self.seen_by_others = analysis, active, old, seen_by_others
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
        result = self.without_the_others(n)
        self.env.update(saved)
        return result

    def without_the_others(self, n: Node) -> Any:
        """Run a node; an attention or a sum on fewer rows."""
        edits = [e for e in self.analysis.edits.get(n, ()) if isinstance(e, Attend | Accumulate)]
        if not edits or all(self.seen_by_others):
            return super().run_node(n)
        (edit,) = edits
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = list(args), dict(kwargs)

        def fewer(value: torch.Tensor, tokens: Tokens, dim: int) -> torch.Tensor:
            return value.index_select(dim, computed_rows(tokens, self.seen_by_others).nonzero().flatten())

        if isinstance(edit, Accumulate):
            args[0] = fewer(args[0], edit.left_tokens, edit.left_tokens.dim)
            args[1] = fewer(args[1], edit.right_tokens, edit.right_tokens.dim)
            return n.target(*args, **kwargs)  # type: ignore[operator]
        args[1:3] = [fewer(value, edit.tokens, edit.tokens.dim) for value in args[1:3]]
        if edit.mask is not None:
            place: Any = 3 if len(args) > 3 else "attn_mask"
            where: Any = args if len(args) > 3 else kwargs
            where[place] = fewer(where[place], edit.tokens, -1)
        return n.target(*args, **kwargs)  # type: ignore[operator]


def frozen_outputs(
    program: Program, analysis: Analysis, plan: Plan, old: dict[str, Any], new: dict[str, Any]
) -> list[Any]:
    """The flat outputs of a partial step on `new` after a full step on `old`."""
    everyone = [True] * prod(plan.grid)
    active, seen = [index in plan.active_index for index, _ in enumerate(everyone)], list(everyone)
    for index, is_active in enumerate(active):
        seen[index] = is_active or index in plan.context_index

    def run(
        kwargs: dict[str, Any], values: dict[Any, torch.Tensor], seen_by_others: Sequence[bool]
    ) -> tuple[list[Any], dict[Any, torch.Tensor]]:
        interpreter = Frozen(program, analysis, active, values, seen_by_others)
        inputs = program.flat_inputs((), kwargs)
        with torch.no_grad():
            outputs = interpreter.run(*inputs, enable_io_processing=False)
        return list(outputs), interpreter.seen

    _, values = run(old, {}, everyone)
    outputs, _ = run(new, values, seen)
    return outputs
