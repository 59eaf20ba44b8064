"""What Dynamo hands over: the graph of a whole model, or of a part of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ...capture.offloading import is_offloaded
from ...compilation.options import BackendOptions
from ...sessions.session import Session
from ..dispatch import CompiledGraph
from ..refusals import Refused
from .model import ASIDE, why_only_in_parts
from .running import RunningCall


class DynamoGraph(CompiledGraph):
    """A graph of Dynamo: of a whole model, or of a part of one."""

    def __init__(self, graph: GraphModule, options: BackendOptions) -> None:
        super().__init__(graph, options)
        self.options = options
        self._only_in_parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def aside(self, session: Session, refused: Refused | None) -> Callable[[Sequence[Any]], Any] | None:
        """What runs a part of a model that was captured whole in this call, or of one that is refused whole."""
        if ASIDE.get():
            return self.run_plain if self.broken_by or refused is not None else None
        call = RunningCall.on_the_stack()
        if call is None or session.parallel is not None:
            return None
        if not call.taken:
            broken_by = self.broken_by or call.part
            if not broken_by and is_offloaded(call.model):
                broken_by = "hooks move its parts"
            if not broken_by or call.model in self._only_in_parts:
                return None
            self.not_whole = why_only_in_parts(call.model)
            if self.not_whole:
                self._only_in_parts.add(call.model)
                return None
            call.take_over(session, self.options, broken_by)
        return self._run_eagerly

    def _run_eagerly(self, inputs: Sequence[Any]) -> Any:
        """The graph as Dynamo captured it. Nothing is compiled for one call."""
        return self.graph(*inputs) if self.plain is None else self.plain(*inputs)
