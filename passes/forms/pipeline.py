"""The passes that make a form, in order, and what runs them.

A form is written from the analysis by `write`. Then come the passes that a plan's options ask for, and last, for a form
that runs in a process, those that put its cache in place.
"""

from __future__ import annotations

from torch.fx import GraphModule

from ..analysis.analyse import Analysis
from ..analysis.time_input import time_input
from ..ir.cache import CacheEntry
from ..ir.contract import FormOptions
from ..ir.editor import FormPass
from ..ir.form import Form
from ..ir.pipeline import run_passes
from ..prediction.extrapolate import Extrapolate
from ..prediction.motion import MoveContext
from ..prediction.predict import PredictContext
from ..writing.cache_layout import cache_layout
from ..writing.write import WRITERS
from .all_rows import KeepAllRows
from .buffers import WriteInPlace
from .collectives import Ranks
from .keep_relevant import KeepRelevant
from .merge import MergeContext
from .patches import EmbedActive
from .select import SelectActive
from .shard import write_share
from .store import StoreCache

KINDS = tuple(WRITERS)
"""The forms of a model."""


def functional_passes(options: FormOptions, time: str | None = None) -> list[FormPass]:
    """What makes the form that is reasoned about and exported: its cache enters and leaves as tensors.

    Args:
        options: what the form knows of a plan.
        time: the model's input that holds the time of a step, if it is known.
    """
    chooses = options.selection != "fixed"
    passes: list[FormPass] = []
    if chooses or options.context_motion:
        passes += [KeepAllRows(options.num_tokens)]
    if chooses:
        passes += [SelectActive(options.selection, options.num_tokens, options.num_active)]
    if options.context_motion:
        passes += [MoveContext(options.num_tokens, options.num_active)]
    if options.cached_by == "attention":
        passes += [KeepRelevant(options.num_tokens, options.num_active, options.num_context, options.cached_counts)]
    if options.merges:
        passes += [MergeContext(options.num_context, options.num_merged, options.merging)]
    if options.context_extrapolation:
        passes += [PredictContext(time)]
    if options.extrapolation:
        passes += [
            Extrapolate(
                options.extrapolation, options.num_tokens, options.num_active, weighted=not chooses, time_input=time
            )
        ]
    if options.cache_dtype != "same":
        passes += [StoreCache(options.cache_dtype)]
    return passes


def in_process_passes(options: FormOptions) -> list[FormPass]:
    """What makes of a functional form the one that runs in a process: its cache is buffers that it overwrites."""
    has_all_rows = options.selection != "fixed" or options.context_motion
    whole = [KeepAllRows(options.num_tokens)] if options.caches_all and not has_all_rows else []
    return [*whole, EmbedActive(), WriteInPlace()]


def cache_of(analysis: Analysis, options: FormOptions) -> tuple[CacheEntry, ...]:
    """What a session keeps for one branch of a graph, without writing a form: what `in_process` forms read.

    Raises:
        UnsupportedGraphError: the graph has not what a pass needs.
    """
    entries = tuple(cache_layout(analysis, options.budgets).values())
    for one in (*functional_passes(options), *in_process_passes(options)):
        entries = one.cached(entries)
    return entries


def write_form(
    kind: str, source: GraphModule, analysis: Analysis, options: FormOptions, ranks: Ranks | None = None
) -> Form:
    """One functional form of a graph.

    Args:
        kind: one of `KINDS`.
        source: normalised graph.
        analysis: of it.
        options: what the form knows of a plan.
        ranks: the processes that share its rows, if there are several.

    Raises:
        UnsupportedGraphError: the graph has not what a pass needs.
    """
    if ranks is None or ranks.size == 1:
        form = WRITERS[kind](source, analysis, options.budgets)
    else:
        form = write_share(kind, source, analysis, options, ranks)
    # A reuse form may not embed the time any more, by which it is found where its name says nothing.
    time = time_input(list(source.graph.find_nodes(op="placeholder")))
    passes = functional_passes(options, None if time is None else time.name)
    return run_passes(f"{kind} form", passes, form, lambda form: form.module)


def in_process(form: Form, options: FormOptions) -> Form:
    """A functional form as it runs in a process."""
    return run_passes(f"{form.kind} form in process", in_process_passes(options), form, lambda form: form.module)
