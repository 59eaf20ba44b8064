"""What the analysis found in a model: the rooms of its graph, births and deaths of tokens, caches, FLOPs, a picture.

A *room* is a part of the graph that computes alike: on whole inputs, on active tokens, on whole tensors that
depend on tokens (text rows of a joint attention, operators that look across tokens), or after the last token.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.fx import Node

from ..files import atomically
from ..passes.analysis.flops import graph_flops, node_flops
from ..passes.forms.pipeline import in_process
from ..passes.ir.axis import Accumulate, Attend, Enter, Leave, Piece, Tokens
from ..passes.ir.refusal import module_path, shape_of, source_line
from .rewrite import Forms

ROOMS = {
    "inputs": ("computed whole, depends on no token", "#c9d3df"),
    "tokens": ("computed on active tokens", "#5b9bd5"),
    "meeting": ("computed whole, depends on tokens", "#e8a33d"),
    "after": ("after the last token: all that a reuse step computes", "#8fbf7f"),
}


@dataclass(frozen=True)
class Event:
    """A place in the graph where something happens to the token axis."""

    what: str
    node: str
    shape: tuple[int, ...]
    state: str
    module: str
    source: str
    detail: str = ""

    def __str__(self) -> str:
        where = self.module or self.source or self.node
        return f"{self.what:9} {self.node} {self.shape} [{self.state}] {where}" + (
            f": {self.detail}" * bool(self.detail)
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. FLOPs are of one call, by form as it runs in a process and by room of the
    model's graph; bytes are of one cache."""

    rooms: Mapping[str, int]
    room_flops: Mapping[str, int]
    events: tuple[Event, ...]
    form_flops: Mapping[str, int]
    cache_bytes: int
    num_tokens: int
    num_active: int
    blocks: tuple[tuple[str, Mapping[str, int]], ...]
    """Top-level parts of the model in the order in which they run, with their FLOPs by room."""

    def __str__(self) -> str:
        lines = [
            f"{self.num_tokens} tokens, {self.num_active} of them active; cache {self.cache_bytes / 2**20:.2f} MiB"
        ]
        lines += ["", "rooms:"]
        total = max(1, sum(self.room_flops.values()))
        for room, (meaning, _) in ROOMS.items():
            share = 100 * self.room_flops[room] / total
            lines.append(f"  {room:8} {self.rooms[room]:5} nodes {share:5.1f} % of FLOPs  {meaning}")
        lines += ["", "forms:"]
        full = max(1, self.form_flops["full"])
        lines += [
            f"  {kind:8} {flops:.3e} FLOPs  {flops / full:.3f} of full" for kind, flops in self.form_flops.items()
        ]
        lines += ["", "tokens:", *(f"  {event}" for event in self.events)]
        return "\n".join(lines)


def explain(forms: Forms) -> Explanation:
    """Explain what `rewrite` made of a model."""
    module = forms.program.module
    room_of = rooms(forms)
    flops = node_flops(module)
    room_flops = Counter[str]()
    blocks: dict[str, Counter[str]] = {}
    for node, count in flops.items():
        room_flops[room_of[node]] += count
        blocks.setdefault(block_of(node), Counter())[room_of[node]] += count
    return Explanation(
        rooms=Counter(room_of.values()),
        room_flops=room_flops,
        events=tuple(event for node in module.graph.nodes for event in events_of(forms, node)),
        form_flops={
            kind: graph_flops(in_process(form, forms.plan.form_options).module) for kind, form in forms.by_kind.items()
        },
        cache_bytes=forms.cache_bytes,
        num_tokens=forms.plan.num_tokens,
        num_active=forms.plan.budgets.num_active,
        blocks=tuple(blocks.items()),
    )


def rooms(forms: Forms) -> dict[Node, str]:
    """The room of each operator."""
    analysis = forms.analysis
    depends: set[Node] = set()
    found: dict[Node, str] = {}
    for node in forms.program.module.graph.nodes:
        edits = analysis.edits.get(node, ())
        if any(isinstance(e, Enter | Leave) for e in edits) or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
        if node.op != "call_function":
            continue
        born = any(isinstance(e, Enter) for e in edits)
        if isinstance(analysis.states[node], Tokens | Piece) and not born:
            found[node] = "tokens"
        elif node not in depends or born:
            found[node] = "inputs"
        else:
            found[node] = "after" if node in analysis.after else "meeting"
    return found


def events_of(forms: Forms, node: Node) -> list[Event]:
    """Births, deaths, caches and whole operators at a node."""
    analysis = forms.analysis
    events = []
    for edit in analysis.edits.get(node, ()):
        if isinstance(edit, Enter):
            events.append(_event("born", node, str(edit.tokens)))
        elif isinstance(edit, Leave):
            final = "for good" if node in analysis.after else "merged with the cache for what follows"
            events.append(_event("dies", edit.operand, str(edit.tokens), final))
        elif isinstance(edit, Attend):
            mask = ", with a mask" if edit.mask is not None else ""
            events.append(_event("cached", node, str(edit.tokens), "keys and values" + mask))
        elif isinstance(edit, Accumulate):
            events.append(_event("cached", node, str(edit.left_tokens), "sum over the context"))
    if node in analysis.whole:
        events.append(_event("whole", node, str(analysis.states[node]), analysis.whole[node].reason))
    return events


def _event(what: str, node: Node, state: str, detail: str = "") -> Event:
    return Event(what, node.name, shape_of(node), state, module_path(node), source_line(node), detail)


def block_of(node: Node) -> str:
    """The top-level part of the model a node belongs to: `blocks.3`, `patch_embedding`."""
    parts = module_path(node).split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0] or "(model)"


def write_picture(explanation: Explanation, path: Path) -> None:
    """Write the explanation as SVG, or as HTML with the text below the picture."""
    picture = to_svg(explanation)
    if path.suffix == ".svg":
        text = picture
    else:
        text = (
            '<!doctype html><meta charset="utf-8"><title>hetcache explain</title>'
            f"<body style='font-family: sans-serif'>{picture}<pre>{html.escape(str(explanation))}</pre>"
        )
    atomically(path, lambda temporary: Path(temporary).write_text(text))


ROW, LEFT, WIDTH = 22, 190, 560


def to_svg(explanation: Explanation) -> str:
    """A bar for each part of the model, as long as its FLOPs, coloured by room, with marks for events."""
    marks: dict[str, Counter[str]] = {}
    for event in explanation.events:
        parts = event.module.split(".")
        name = ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0] or "(model)"
        marks.setdefault(name, Counter())[event.what] += 1
    largest = max((sum(flops.values()) for _, flops in explanation.blocks), default=1)
    lines: list[str] = []
    for number, (meaning, colour) in enumerate(ROOMS.values()):
        lines.append(f'<rect x="8" y="{8 + number * 18}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="28" y="{18 + number * 18}">{html.escape(meaning)}</text>')
    top = 24 + 18 * len(ROOMS)
    for row, (name, flops) in enumerate(explanation.blocks):
        y, x = top + row * ROW, float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        for room, (_, colour) in ROOMS.items():
            width = WIDTH * flops.get(room, 0) / largest
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>')
            x += width
        counts = ", ".join(f"{count} {what}" for what, count in marks.get(name, Counter()).items())
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 13}" fill="#555">{html.escape(counts)}</text>')
    height = top + ROW * len(explanation.blocks) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 190}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(lines)}</svg>'
    )
