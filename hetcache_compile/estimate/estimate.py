"""What caching would take and save on a model, from its config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..passes.forms.store import stored_as
from ..passes.ir.contract import CACHE_DTYPES
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .gpus import Gpu
from .inventory import PLAIN, Inventory, take_inventory
from .models import KnownModel

GIB = 2**30
STORED_AS = {name: "as computed" if name == "same" else name for name in CACHE_DTYPES}
LABELS = {PLAIN: "uncached", **{kind.form: kind.name for kind in StepKind}}


@dataclass(frozen=True)
class FormEstimate:
    """One call of one form.

    Attributes:
        flops: two for each multiply-add.
        attention_flops: those of them that are attention.
        bytes: moved to and from memory, compiled.
        seconds: predicted.
    """

    flops: int
    attention_flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class CacheEstimate:
    """Bytes of the caches, with keys and values cached in one type.

    Attributes:
        branch: of one branch of guidance, as the plan has it.
        edit: of all branches and experts.
        predicted_edit: the same where cached keys and values are predicted, which keeps two of each.
    """

    branch: int
    edit: int
    predicted_edit: int


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Attributes:
        model: name.
        class_name: in diffusers.
        called_like: where config and call are from.
        dtype: of weights and computation.
        plan: in words.
        steps: how many there are of each kind.
        branches: model calls in each step.
        experts: models that share the steps.
        num_tokens: on the token axis, references included.
        num_active: of them, computed in PARTIAL steps.
        parameters: of one expert.
        weights_bytes: of all experts.
        forms: one call of the uncached model (`plain`) and of each form.
        caches: by the type of cached keys and values.
        gpu: name.
        rates: in words.
        gpu_bytes: memory of the GPU.
        plan_flops: of all calls of the plan.
        plan_seconds: predicted, of all calls of the plan.
        uncached_flops: of as many uncached calls.
        uncached_seconds: predicted, of as many uncached calls.
    """

    model: str
    class_name: str
    called_like: str
    dtype: str
    plan: str
    steps: Mapping[str, int]
    branches: int
    experts: int
    num_tokens: int
    num_active: int
    parameters: int
    weights_bytes: int
    forms: Mapping[str, FormEstimate]
    caches: Mapping[str, CacheEstimate]
    gpu: str
    rates: str
    gpu_bytes: int
    plan_flops: int
    plan_seconds: float
    uncached_flops: int
    uncached_seconds: float

    @property
    def speedup(self) -> float:
        """How many times the plan is predicted to be faster than the uncached model, compiled too."""
        return self.uncached_seconds / self.plan_seconds

    def fits_with(self) -> str | None:
        """The first cache type with which weights and caches fit into the memory of the GPU; None where none does."""
        room = self.gpu_bytes - self.weights_bytes
        return next((name for name, cache in self.caches.items() if cache.edit <= room), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "speedup": self.speedup, "fits_with": self.fits_with()}

    def __str__(self) -> str:
        parameters = f"{self.parameters / 1e9:.2f} billion parameters"
        weights = f"{self.weights_bytes / GIB:.1f} GiB"
        experts = f"{self.experts} experts of {parameters} each" if self.experts > 1 else parameters
        lines = [
            f"{self.model}: {self.class_name}, {experts}, {weights} in {self.dtype}",
            f"config and call: {self.called_like}",
            *self.plan.splitlines(),
            "",
            f"{'one call':9} {'TFLOPs':>9} {'of uncached':>12} {'attention':>10} {'GB moved':>9} {'seconds':>9}",
        ]
        whole = self.forms[PLAIN]
        for kind, form in self.forms.items():
            attention = form.attention_flops / form.flops if form.flops else 0.0
            lines.append(
                f"{LABELS[kind]:9} {form.flops / 1e12:9.1f} {form.flops / whole.flops:12.1%} {attention:10.0%} "
                f"{form.bytes / 1e9:9.1f} {form.seconds:9.4f}"
            )
        lines += ["", f"{'cached K/V':12}{'one branch':>14}{'the edit':>14}{'and predicted K/V':>20}"]
        for name, cache in self.caches.items():
            sizes = (cache.branch, cache.edit, cache.predicted_edit)
            branch, edit, predicted = (f"{size / GIB:.2f} GiB" for size in sizes)
            lines.append(f"{STORED_AS[name]:12}{branch:>14}{edit:>14}{predicted:>20}")
        fit = self.fits_with()
        fits = "weights and caches fit" if fit == "same" else "weights and caches do not fit"
        fits += f", they would with K/V in {fit}" if fit not in ("same", None) else ""
        counted = f"{self.branches} branch" + "es" * (self.branches > 1)
        counted += f" x {self.experts} experts" * (self.experts > 1)
        lines += [
            "choose the type with cache_dtype, and predicted K/V with context_extrapolation",
            "",
            f"the edit has {counted}; activations, text encoder and VAE come on top of what is shown",
            f"{self.gpu}, {self.gpu_bytes / GIB:.0f} GiB: {fits}",
            f"the plan: {self.plan_flops / 1e15:.1f} of {self.uncached_flops / 1e15:.1f} PFLOPs, predicted "
            f"{self.plan_seconds:.1f} s of {self.uncached_seconds:.1f} s in the model ({self.speedup:.1f}x)",
            f"rates: {self.rates}",
        ]
        return "\n".join(lines)


def estimate(
    model: KnownModel, plan: Plan, gpu: Gpu, *, branches: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Estimate:
    """Estimate an edit.

    Args:
        model: by its config (see `models.find_model`).
        plan: on the model's grid, references included.
        gpu: whose rates are used (see `gpus.find_gpu`).
        branches: model calls in each step; by default what is usual for the model.
        dtype: that the model is loaded in.

    Raises:
        EstimateError: the model cannot be built from its config.
        GridMismatchError: the plan is for another grid.
        UnsupportedGraphError: the model cannot be rewritten.
    """
    branches = model.branches if branches is None else branches
    found = take_inventory(model, replace(plan, cache_dtype="same"), dtype)
    forms = {
        kind: FormEstimate(work.flops, work.attention_flops, work.bytes, gpu.seconds(work))
        for kind, work in found.work.items()
    }
    first = [forms[step.form] for step in plan.steps]
    others = [forms[others_form(step, plan)] for step in plan.steps]
    calls = [*first, *(branches - 1) * others]
    whole = forms[PLAIN]
    return Estimate(
        model=model.name, class_name=model.class_name, called_like=model.source,
        dtype=str(dtype).removeprefix("torch."), plan=plan.describe(),
        steps=dict(Counter(step.name for step in plan.steps)), branches=branches, experts=model.experts,
        num_tokens=plan.num_tokens, num_active=plan.num_active, parameters=found.parameters.total(),
        weights_bytes=model.experts * found.weights_bytes, forms=forms,
        caches={name: _caches(found, plan, name, branches, model.experts) for name in CACHE_DTYPES},
        gpu=gpu.name, rates=gpu.describe(), gpu_bytes=int(gpu.memory_gib * GIB),
        plan_flops=sum(call.flops for call in calls),
        plan_seconds=sum(call.seconds for call in calls),
        uncached_flops=len(calls) * whole.flops,
        uncached_seconds=len(calls) * whole.seconds,
    )  # fmt: skip


def others_form(step: StepKind, plan: Plan) -> str:
    """The form of all calls of a step but the first one."""
    return (StepKind.PARTIAL if plan.shared_context and step is StepKind.FULL else step).form


def _caches(found: Inventory, plan: Plan, dtype: str, branches: int, experts: int) -> CacheEstimate:
    sizes = {entry: n * sum(one.num_bytes for one in stored_as(entry, dtype)) for entry, n in found.entries.items()}
    branch = sum(sizes.values())
    context = sum(size for entry, size in sizes.items() if entry.is_context)
    added = 0 if plan.context_extrapolation else context
    shareable = sum(size for entry, size in sizes.items() if entry.group == "key_values")
    contexts = 1 if plan.shared_context else branches
    edit = branches * (branch - shareable) + contexts * shareable
    return CacheEstimate(branch, experts * edit, experts * (edit + contexts * added))
