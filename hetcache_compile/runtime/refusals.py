"""Why a call runs plainly, in the words of a warning."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from torch.fx import GraphModule

from ..capture.capture import first_line
from ..errors import GridMismatchError, UnsupportedGraphError

PART = "a part of a model"
PARALLEL = "a model that shares its work itself"
ASSUMED = "another value of an input that the graph depends on"
"""Topics: of one, only the first refusal is said."""


@dataclass(frozen=True)
class Refused:
    """Why calls run plainly.

    Attributes:
        reason: in a sentence.
        topic: groups reasons of one kind.
        cause: what was raised, if something was.
    """

    reason: str
    topic: str | None = None
    cause: Exception | None = None


class NotCachedError(Exception):
    """A call cannot be cached: it runs plainly."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused


def refused_by(error: Exception) -> Refused:
    """What an error says of why calls run plainly."""
    return Refused(f"hetcache runs this graph unchanged, because {reason_of(error)}", cause=error)


def reason_of(error: Exception) -> str:
    """All that a refusal says; of other errors what they are."""
    if isinstance(error, UnsupportedGraphError | GridMismatchError):
        return str(error)
    return f"making it failed: {type(error).__name__}: {first_line(error)}"


def graph_break_of(graph: GraphModule) -> str:
    """Why Dynamo cut the model in two behind this graph, and where; empty where it did not."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    frames = list(reason.user_stack)
    place = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    cause = next(iter(str(reason.reason).strip().splitlines()), "a graph break")
    return f"{cause}{place}"


def part_of_a_model(reason: str, not_whole: str) -> str:
    """What to say of a graph that is no whole model; a hook that calls it is on the stack.

    Args:
        reason: why it is not cached.
        not_whole: why the model was not captured as a whole in its place, if that was tried.
    """
    help = (
        "Hooks on parts of the model do that (sequential offloading, layerwise casting: use "
        "pipe.enable_model_cpu_offload() or pipe.enable_group_offload() instead), model.compile_repeated_blocks(), and "
        "graph breaks: TORCH_LOGS=graph_breaks names them"
    )
    hooks = [f for f in traceback.extract_stack() if re.search(r"(diffusers|accelerate)[\\/]hooks\b", f.filename)]
    if hooks:
        help = (
            f"The hook {hooks[-1].name} at {hooks[-1].filename}:{hooks[-1].lineno} does that; for offloading use "
            "pipe.enable_model_cpu_offload(), or pipe.enable_group_offload() to memory, and leave layerwise casting off"
        )
    whole = f"The model cannot be captured as a whole, because {not_whole}. " if not_whole else ""
    return f"Dynamo hands over a part of a model, which runs uncached, because {reason}. {whole}{help}"
