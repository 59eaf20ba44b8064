"""Why a graph cannot be rewritten, in words a person can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Node

from .axis import AxisState


@dataclass(frozen=True)
class Refusal:
    """One reason: what stands in the way, where, and what would help."""

    reason: str
    op: str = ""
    operands: str = ""
    module: str = ""
    source: str = ""
    help: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.reason}" if self.op else self.reason]
        for label, text in (
            ("operands", self.operands),
            ("module", self.module),
            ("source", self.source),
            ("help", self.help),
        ):
            if text:
                lines.append(f"    {label}: {text}")
        return "\n".join(lines)


class HetCacheError(Exception):
    """Base of this package's own errors."""


class GridMismatchError(HetCacheError, ValueError):
    """No patch embedding makes the plan's token grid, or a token input has another number of tokens."""


class UnsupportedGraphError(HetCacheError):
    """The graph cannot be rewritten. `reasons` holds every `Refusal`, not only the first."""

    def __init__(self, reasons: Sequence[Refusal]) -> None:
        self.reasons = tuple(reasons)
        count = f"{len(self.reasons)} reason" + ("s" if len(self.reasons) != 1 else "")
        super().__init__(f"the graph cannot be rewritten, {count}:\n" + "\n".join(f"- {r}" for r in self.reasons))


def refuse(node: Node, states: dict[Node, AxisState], reason: str, help: str = "") -> Refusal:
    """A `Refusal` for `node`, with its operands' shapes and states, module path and source line."""
    operands = ", ".join(
        f"{operand.name} {tuple(shape_of(operand))} [{states[operand]}]"
        for operand in node.all_input_nodes
        if operand in states
    )
    return Refusal(
        reason=reason,
        op=str(node.target),
        operands=operands,
        module=module_path(node),
        source=source_line(node),
        help=help,
    )


def shape_of(node: Node) -> tuple[int, ...]:
    """The static shape of a node's (first) result; `()` if it has none."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return tuple(int(size) for size in getattr(value, "shape", ()))


def module_path(node: Node) -> str:
    """The dotted path of the innermost module that made `node`, or an empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    # Dynamo writes L['self'].__dict__['_modules']['blocks'].0.attn1 where torch.export writes blocks.0.attn1.
    path = re.sub(r"^L\['[^']*'\]\.?", "", path)
    path = re.sub(r"__dict__\['_modules'\]\['([^']+)'\]", r"\1", path)
    return re.sub(r"(?:_modules)?\['([^']+)'\]", r".\1", path).strip(".")


def source_line(node: Node) -> str:
    """`file:line: code` of the innermost Python frame outside torch that made `node`, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [frame for frame in frames if not frame[0].startswith((TORCH, "<"))] or frames  # "<eval_with_key>": generated
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{file}:{line}: {code.strip()}"


TORCH = str(Path(torch.__file__).parent) + "/"
"""Frames inside torch say nothing of the model: `nn.LayerNorm` is best shown where it is called."""
