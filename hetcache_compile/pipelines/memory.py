"""How large the cache of a call will be, before anything is compiled, and what to choose where it must be smaller."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..capture.by_dynamo import capture_model
from ..capture.capture import Program, is_more_than_data
from ..capture.offloading import is_offloaded
from ..capture.rewrite import analysed, planned_token_inputs, unchanging_bytes
from ..errors import PlanError
from ..passes.analysis.analyse import Analysis
from ..passes.forms.pipeline import cache_of
from ..passes.ir.refusal import UnsupportedGraphError, shape_of
from ..plan.cache_size import CacheSize
from ..plan.plan import Plan
from .call import PlannedCall
from .observe import count_calls

ANY = "any"
"""An amount of memory that is only counted."""
READ_AND_FETCHED = 2
"""How many blocks' keys and values are on the device where the host has them: one is read, one is on its way."""
SMALLER: tuple[Mapping[str, Any], ...] = (
    {},
    {"cache_dtype": "bf16"},
    {"cache_dtype": "int8"},
    {"cache_device": "cpu"},
    {"cache_device": "cpu", "cache_dtype": "int8"},
    {"cache_dtype": "int8", "cached_ratio": 0.9},
    *(
        {"cache_dtype": "int8", "cached_ratio": share, "cached_by": chosen}
        for share in (0.75, 0.5, 0.25, 0.1)
        for chosen in ("attention", "distance")
    ),
)
"""What makes a cache smaller, from what costs the result least (docs/memory.md has what each costs): first other types
of keys and values, then their place, and only then fewer of them, by distance where attentions cannot choose.
`cached_shares` is not among them: with few PARTIAL steps it may lose more than it brings."""


@dataclass(frozen=True)
class Footprint:
    """One call of a model, of which any plan's cache can be counted.

    Attributes:
        program: the model's graph.
        branches: model calls in each step.
        has_gpu: whether there is a device whose memory is not the host's.
        offloaded: whether weights come to their device part by part: then nothing is kept beside the cache.
    """

    program: Program
    branches: int
    has_gpu: bool
    offloaded: bool = False
    _seen: dict[Hashable, tuple[Analysis, int]] = field(default_factory=dict, compare=False)
    """By grid and token inputs: the analysis, and bytes that are kept beside a cache on the device."""

    @classmethod
    def of(cls, pipe: Any, call: PlannedCall) -> Footprint:
        """That of a pipeline's call. The pipeline is run for one step, in which its models compute nothing.

        Raises:
            PlanError: the pipeline was not run, or does not run for a step, or its model cannot be captured.
        """
        first = call.first
        if first is None:
            raise PlanError(
                "the memory of a cache is that of a model call: give the prompt, and all else that the pipeline needs"
            )
        _check_callable(first.model, pipe._execution_device)
        try:
            program = capture_model(first.model, *_where_weights_are(first.model, first.args, first.kwargs))
        except UnsupportedGraphError as error:
            raise PlanError(f"the memory of the cache cannot be counted: {error}") from error
        results: Any = program.module.graph.output_node().args[0]
        device = pipe._execution_device
        answers = [torch.zeros(shape_of(node), dtype=node.meta["val"].dtype, device=device) for node in results]
        branches = count_calls(pipe, call.arguments, pytree.tree_unflatten(answers, program.out_spec))
        return cls(program, branches, torch.cuda.is_available(), is_offloaded(first.model))

    def ways(self, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What `SMALLER` has for this device, options left alone that are given."""
        here = [way for way in SMALLER if "cache_device" not in way or self.has_gpu]
        if "cached_ratio" in options:
            here = [way for way in here if "cached_ratio" not in way]
        free = [{name: value for name, value in way.items() if name not in options} for way in here]
        return [way for number, way in enumerate(free) if way not in free[:number]]

    def sized(self, plan: Plan) -> Plan:
        """The plan with the size of its cache.

        Raises:
            PlanError: the model's graph has not what the plan asks for.
        """
        try:
            found, beside = self._of(plan)
            entries = cache_of(found, plan.form_options)
        except UnsupportedGraphError as error:
            raise PlanError(f"the memory of the cache cannot be counted: {error}") from error
        layers = Counter[int | None]()
        for entry in entries:
            if entry.is_context:
                layers[entry.layer] += entry.num_bytes
        window = READ_AND_FETCHED * max(layers.values(), default=0)
        total = sum(entry.num_bytes for entry in entries) + (0 if plan.cache_device == "cpu" else beside)
        shareable = sum(entry.num_bytes for entry in entries if entry.group == "key_values")
        size = CacheSize(plan.form_options, total, layers.total(), window, self.branches, shareable)
        return replace(plan, counted=size)

    def _of(self, plan: Plan) -> tuple[Analysis, int]:
        """What all plans on a grid have in common: a search under a limit asks for many."""
        key = plan.grid, tuple(plan.token_inputs.items())
        if key not in self._seen:
            program, found = analysed(self.program, plan.grid, planned_token_inputs(self.program, plan))
            here = replace(plan, cache_device="same")
            self._seen[key] = found, 0 if self.offloaded else unchanging_bytes(program, found, here)
        return self._seen[key]


def _check_callable(model: Any, device: torch.device) -> None:
    """Raise `PlanError` where capture calls the model (see `capture.by_dynamo`), and that would be on the host."""
    weight = next(filter(is_more_than_data, model.parameters()), None)
    if weight is not None and weight.device.type != device.type:
        raise PlanError(
            f"the memory of the cache cannot be counted while the model is on {weight.device}: its weights are of "
            f"{type(weight).__name__}, of which a call is made. Leave memory= out, or move the model to {device} first"
        )


def _where_weights_are(model: Any, args: Any, kwargs: Any) -> Any:
    """The arguments on the device of the model's weights: an offloaded model is not where its inputs are yet."""
    weight = next(iter(model.parameters()), None)
    if weight is None:
        return args, kwargs
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(weight.device), (args, kwargs))


def host_bytes() -> int:
    """What caches may take of the host's memory: half of all that there is, where the system says that."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
