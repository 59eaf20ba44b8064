"""What the forms of a model compute, move and cache, counted on few blocks and extended to all of them.

Blocks of one kind are alike, so each adds the same. The model is captured at a small depth, and once more with one
block more of each kind; the difference is what a block adds. A model whose class tells nothing of its blocks, or that
is hardly deeper, is captured whole. Weights hold no data: their memory is reserved and never touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any, TypeVar

import diffusers
import torch
from torch import nn

from ..capture.rewrite import Forms, rewrite
from ..errors import EstimateError
from ..export.model.sample_call import CallShape, sample_call
from ..export.model.source import cast_like_diffusers
from ..passes.forms.pipeline import in_process
from ..passes.ir.cache import CacheEntry
from ..plan.plan import Plan
from .models import KnownModel
from .work import Work, work_of

Key = TypeVar("Key", bound=Hashable)
PLAIN = "plain"


@dataclass(frozen=True)
class Inventory:
    """What is in a model and its forms.

    Attributes:
        work: of one call of the plain model (`plain`) and of each form, as it runs in a process.
        entries: cache entries of one branch; those of all layers that are alike are counted under one.
        parameters: how many there are, by type.
    """

    work: Mapping[str, Work]
    entries: Counter[CacheEntry]
    parameters: Counter[torch.dtype]

    @property
    def weights_bytes(self) -> int:
        """What the weights take."""
        return sum(count * dtype.itemsize for dtype, count in self.parameters.items())


def take_inventory(model: KnownModel, plan: Plan, dtype: torch.dtype, *, whole: bool = False) -> Inventory:
    """Count what a model takes with a plan.

    Args:
        model: by its config.
        plan: on the model's grid, references included.
        dtype: that the model is loaded in.
        whole: capture it with all its blocks.

    Raises:
        EstimateError: diffusers cannot build it from this config, or its blocks are not alike.
        UnsupportedGraphError: it cannot be rewritten.
    """
    missing = {} if whole else missing_blocks(model)
    base = _take(model, plan, dtype, missing)
    longer = {name: _take(model, plan, dtype, {**missing, name: count - 1}) for name, count in missing.items()}
    changes = [(missing[name], other) for name, other in longer.items()]
    try:
        return Inventory(
            {kind: _extended_work(work, [(n, o.work[kind]) for n, o in changes]) for kind, work in base.work.items()},
            _extended(base.entries, [(n, other.entries) for n, other in changes]),
            _extended(base.parameters, [(n, other.parameters) for n, other in changes]),
        )
    except ArithmeticError as error:
        raise EstimateError(f"the blocks of {model.name} are not alike: {error}") from error


def missing_blocks(model: KnownModel) -> dict[str, int]:
    """How many blocks of each kind the smallest model that shows all kinds lacks, where it is worth it."""
    missing = {}
    for name, least in model.depths.items():
        value = model.config.get(name) or ()
        count = (len(value) if isinstance(value, list | tuple) else int(value)) - least
        if count > 1:
            missing[name] = count
    return missing


def shortened(model: KnownModel, missing: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model with fewer blocks. Of a list of layers as many as remain stand at the first places."""
    changed = dict(model.config)
    for name in model.depths if missing else ():
        value, count = changed.get(name), missing.get(name, 0)
        if isinstance(value, list | tuple):
            changed[name] = list(range(len(value) - count))
        elif value is not None:
            changed[name] = value - count
    return changed


def build(model: KnownModel, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model without data in its weights.

    Raises:
        EstimateError: diffusers refuses the config.
    """
    try:
        with torch.device("meta"):
            module: nn.Module = getattr(diffusers, model.class_name).from_config(dict(config))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise EstimateError(f"diffusers cannot build a {model.class_name} from {model.source}: {error}") from error
    for part in module.modules():  # tables that are neither weights nor buffers
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, torch.empty_like(value, device="cpu"))
    return cast_like_diffusers(module, dtype).to_empty(device="cpu").eval().requires_grad_(False)


def forms_of(model: KnownModel, plan: Plan, dtype: torch.dtype, missing: Mapping[str, int]) -> Forms:
    """The forms of a model with fewer blocks, without data in its weights."""
    module = build(model, shortened(model, missing), dtype)
    kwargs = sample_call(module, CallShape(plan, text_tokens=model.text_tokens), dtype)
    kwargs["timestep"] = kwargs["timestep"].to(dtype)  # some pipelines cast it, and their models rely on that
    if model.time_per_token:
        kwargs["timestep"] = kwargs["timestep"][:, None].expand(-1, plan.num_tokens).contiguous()
    with redirect_stderr(StringIO()):  # torch prints the graph of an attempt that another one follows
        return rewrite(module, plan, kwargs=kwargs)


def _take(model: KnownModel, plan: Plan, dtype: torch.dtype, missing: Mapping[str, int]) -> Inventory:
    forms = forms_of(model, plan, dtype, missing)
    running = {kind: in_process(form, plan.form_options) for kind, form in forms.by_kind.items()}
    work = {PLAIN: work_of(forms.program.module), **{kind: work_of(form.module) for kind, form in running.items()}}
    parameters = Counter[torch.dtype]()
    assert forms.model is not None
    for parameter in forms.model.parameters():
        parameters[parameter.dtype] += parameter.numel()
    return Inventory(work, Counter(map(_anywhere, running["full"].reads)), parameters)


def _anywhere(entry: CacheEntry) -> CacheEntry:
    """The entry without what tells layers apart."""
    return replace(entry, name="", module="", layer=None)


def _extended(base: Counter[Key], changes: list[tuple[int, Counter[Key]]]) -> Counter[Key]:
    """The counts of the whole model.

    Raises:
        ArithmeticError: there would be less than none of something.
    """
    total = Counter(base)
    for count, other in changes:
        for key in {*base, *other}:
            total[key] += count * (other[key] - base[key])
    if lacking := [key for key, count in total.items() if count < 0]:
        raise ArithmeticError(f"a deeper model has fewer of {lacking[0]}")
    return +total


def _extended_work(base: Work, changes: list[tuple[int, Work]]) -> Work:
    """The work of the whole model."""

    def extended(values: Iterator[tuple[int, int]], first: int) -> int:
        return first + sum(count * (value - first) for count, value in values)

    return Work(
        _extended(base.operations, [(count, other.operations) for count, other in changes]),
        extended(((count, other.fused_bytes) for count, other in changes), base.fused_bytes),
        extended(((count, other.eager_bytes) for count, other in changes), base.eager_bytes),
    )
