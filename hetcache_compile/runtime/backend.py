"""`torch.compile(model, backend=hetcache_backend)`: the plain model outside a session, the plan's forms inside.

Capture, analysis, forms and compilation all wait for the first call that needs them, and are kept: by input
shapes, by grid, and by what forms know of a plan. A new mask with the same budgets compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from .dispatch import CompiledGraph
from .options import BackendOptions, Compiled
from .session import own_session


def hetcache_backend(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The torch.compile backend; also registered as `"hetcache"`.

    Args:
        graph: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: of `torch.compile`: Inductor's, for each form.
        options: of `torch.compile`: fields of `BackendOptions`.

    Outside a session the compiled model is what the inner compiler makes of the graph. Inside one, a graph that cannot
    be rewritten runs like that too, after one warning with the reasons. A session is for inference: its outputs
    carry no gradient.

    Raises:
        ValueError: there is no such option or mode.
    """
    compiled = CompiledGraph(graph, BackendOptions.of(options, mode))
    if own_session() is None:
        compiled.plain = compiled.compiler(graph, list(example_inputs))
    return compiled
