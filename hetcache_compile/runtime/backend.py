"""`torch.compile(model, backend=hetcache_backend)`: the plain model outside a session, the plan's forms inside.

Capture, analysis, forms and compilation all wait for the first call that needs them, and are kept: by input
shapes, by grid, and by what forms know of a plan. A new mask with the same budgets compiles nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._guards import CompileContext
from torch.fx import GraphModule

from ..compilation.options import BackendOptions, Compiled
from ..errors import HetCacheWarning
from ..sessions.context import own_session
from .whole.dynamo import DynamoGraph
from .whole.running import runs_whole_in_sessions


def warn_of_recompile_limit() -> None:
    """Say when Dynamo will compile this model no more: further shapes and changed models run eagerly, uncached."""
    compile_id = CompileContext.current_compile_id()
    limit = getattr(torch._dynamo.config, "recompile_limit", None)
    if compile_id is None or limit is None or compile_id.frame_compile_id is None:
        return
    if compile_id.frame_compile_id + 1 >= limit:
        warnings.warn(
            f"hetcache: Dynamo has compiled this model {limit} times, which is its limit: for another shape, or after "
            "another change to the model, it runs eagerly and uncached. TORCH_LOGS=recompiles shows why; "
            "torch._dynamo.config.recompile_limit is the limit",
            HetCacheWarning,
            stacklevel=2,
        )


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
    compiled = DynamoGraph(graph, BackendOptions.of(options, mode))
    if not runs_whole_in_sessions():
        warn_of_recompile_limit()
    if own_session() is None:
        compiled.plain = compiled.compiler(graph, list(example_inputs))
    return compiled
