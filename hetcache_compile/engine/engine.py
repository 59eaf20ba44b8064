"""Exported engines as a drop-in `transformer` of a diffusers pipeline.

    from hetcache_compile import engine

    pipe.transformer = engine.load("out/engine", provider="ort-cpu")
    with hetcache.session(pipe.transformer.plan):
        frames = pipe(...).frames

Inside a session each call runs the form that the plan names, on the branch's own buffers; outside one it is the
plain model. Cache buffers are bound, never copied: what `full` writes is what `partial` reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import EngineError, SessionError
from ..passes.analysis.time_input import NAMES
from ..passes.ir.contract import STEP_WEIGHTS
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..runtime.inputs import check_finite, time_value
from ..sessions.calls import Call
from ..sessions.session import Session, current_session
from ..sessions.stats import Stopwatch
from .manifest import FormSpec, Manifest, TensorSpec, check_files
from .runners import RUNNERS, TENSORRT_PROVIDERS, Runner, form_of

Buffers = dict[Any, torch.Tensor]


def load(folder: str | PathLike[str], provider: str = "ort-cpu", *, verify: bool = True) -> Engine:
    """Load what `hetcache-export` wrote.

    Args:
        folder: its `--out`.
        provider: `ort-cpu`, `ort-cuda`, `tensorrt` or `tensorrt-rtx`.
        verify: compare the files with the hashes in the manifest, which reads them once.

    Raises:
        EngineError: no export folder, a file in it is missing or damaged, or the provider cannot run here.
        MissingExtraError: the provider's package is not installed.
    """
    if provider not in RUNNERS:
        raise EngineError(f"unknown provider {provider!r}: give one of {', '.join(RUNNERS)}")
    manifest = Manifest.load(Path(folder))
    if verify:
        kind = TENSORRT_PROVIDERS[provider][0] if provider in TENSORRT_PROVIDERS else None
        if kind is None or kind in manifest.engines:
            check_files(Path(folder), manifest, kind)
    runner = RUNNERS[provider](Path(folder), manifest, provider)
    return Engine(manifest, runner, Plan.load(Path(folder) / manifest.plan.file))


class Engine(nn.Module, CacheMixin):  # type: ignore[misc]
    """The exported model. Call it like the diffusers model that it was made from.

    `plan` is the one it was exported with; a session may use any plan with the same grid and budgets.
    """

    def __init__(self, manifest: Manifest, runner: Runner, plan: Plan) -> None:
        super().__init__()
        self.manifest, self.runner, self.plan = manifest, runner, plan
        self.config = FrozenDict(manifest.model.config)
        self.device = runner.device
        self.dtype: torch.dtype = DTYPES[manifest.dtype]
        taken = (s.name for form in manifest.forms.values() for s in form.inputs if s.role == "index")
        self.indices = tuple(dict.fromkeys((*BUDGETS.values(), *taken)))
        """What the forms take of a plan."""
        self._time_name = _time_name(manifest)
        self._plain_indices = {name: torch.as_tensor(getattr(plan, name), device=self.device) for name in self.indices}

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One call of the model: the next step of the open session, or the plain model."""
        if args:
            raise TypeError("an engine takes its inputs by name")
        inputs = self.model_inputs(kwargs)
        session = current_session()
        outputs = self.run_plain(inputs) if session is None else self.run_step(session, inputs)
        if not return_dict or list(outputs) != ["sample"]:
            return tuple(outputs.values())
        return Transformer2DModelOutput(sample=outputs["sample"])

    def model_inputs(self, kwargs: Mapping[str, Any]) -> Buffers:
        """The tensors of a call on the engine's device, in the exported types.

        Raises:
            EngineError: an input is missing, of another shape, was not exported, or has another value than the one
                that the graphs were made for.
        """
        full = form_of(self.manifest, "full")
        specs = {spec.name: spec for spec in full.inputs if spec.role == "model"}
        given = self._without_constants(flat_inputs(kwargs))
        if given.keys() != specs.keys():
            raise EngineError(
                f"the engine was exported for the inputs {', '.join(specs)}, it was called with {', '.join(given)}"
            )
        inputs = {}
        for name, spec in specs.items():
            if tuple(given[name].shape) != spec.shape:
                raise EngineError(
                    f"the engine was exported for {name} {list(spec.shape)}, it was called with "
                    f"{list(given[name].shape)}: export it for this size, batch and text length"
                )
            inputs[name] = given[name].to(self.device, dtype_of(spec)).contiguous()
        return inputs

    def _without_constants(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call that are no constants of the export and are needed."""
        constants, tensors = self.manifest.constants, {}
        for name, value in given.items():
            plain = value.tolist() if isinstance(value, torch.Tensor) and name in constants else value
            if name in constants and plain != constants[name]:
                raise EngineError(
                    f"the engine was exported for another value of {name}, on which its graphs depend: "
                    "export it with this value"
                )
            if isinstance(value, torch.Tensor):
                if name not in self.manifest.unused:
                    tensors[name] = value
            elif name not in constants and value not in (None, False):
                raise EngineError(f"the engine was exported without {name}, it was called with {name}={value!r}")
        return tensors

    def run_plain(self, inputs: Buffers) -> Buffers:
        """The model without a plan: the baseline form, or a full step whose cache is dropped."""
        kind = "plain" if "plain" in self.manifest.forms else "full"
        cache = self.begin(self._plain_indices) if kind == "full" else {}
        outputs, _ = self.run_form(kind, inputs, self._plain_indices, cache)
        return outputs

    def run_step(self, session: Session, inputs: Buffers) -> Buffers:
        """The step of the session that comes now."""
        session.notices.tried_calls += 1
        if len(session.plans) > 1:
            raise SessionError("an engine has one mask for all samples of a batch: open a session with one plan")
        if session.record is not None or session.memory is not None:
            raise SessionError("an engine keeps no record of an edit: use the model compiled with hetcache_backend")
        self.check_plan(session.plan)
        latents = [inputs[name] for name in self.manifest.latents if name in inputs]
        others = [value for name, value in inputs.items() if name not in (*self.manifest.latents, self._time_name)]
        call = Call(
            model=self,
            owner=self,
            time=time_value(inputs[self._time_name]) if self._time_name in inputs else None,
            latents=latents,
            conditions=[value for value in others if value.ndim >= 2 and value.dtype != torch.bool],
        )
        start = time.perf_counter()
        turn = session.begin(call)
        run = self.runner.prepare(turn.kind.form)
        load_seconds = time.perf_counter() - start
        indices = {name: session.index(name, self.device, kind=turn.kind, step=turn.step) for name in self.indices}
        held = turn.branch.num_bytes
        buffers = turn.branch.memory(self)
        if turn.kind is StepKind.FULL:
            if session.check_finite:
                check_finite(latents, turn.step, len(session.stats.kinds))
            session.begun_full(turn)
            if turn.fresh:
                buffers.update(self.begin(indices))
        watch = Stopwatch(self.device)
        outputs, written = self.run_form(turn.kind.form, inputs, indices, buffers, run)
        _keep(buffers, written)
        session.allocated(turn.branch.num_bytes - held)
        session.finish(turn, call, watch.stop(), load_seconds)
        return outputs

    def begin(self, indices: Mapping[str, torch.Tensor]) -> Buffers:
        """The part of the cache that a full step reads, in its state before the first step of an edit."""
        reads = {spec.name for spec in form_of(self.manifest, "full").inputs}
        sizes = {dim: len(indices[name]) for dim, name in BUDGETS.items()}
        return {
            entry.input: torch.full(
                sized(entry.shape, sizes), entry.initial or 0.0, dtype=getattr(torch, entry.dtype), device=self.device
            )
            for entry in self.manifest.cache
            if entry.input in reads
        }

    def run_form(
        self,
        kind: str,
        inputs: Buffers,
        indices: Mapping[str, torch.Tensor],
        cache: Buffers,
        run: Callable[[Buffers, Buffers], None] | None = None,
    ) -> tuple[Buffers, Buffers]:
        """Run one form.

        Args:
            kind: its name.
            inputs: the model's inputs.
            indices: what `self.indices` names, of a plan.
            cache: by the names that forms read it by; what `begin` gives before the first full step. Buffers in it
                are used again where that is safe.
            run: the form, if it is loaded already.

        Returns:
            The model's outputs by name, and the cache entries that were written, by the names they are read by.
        """
        form = form_of(self.manifest, kind)
        known = {**cache, **inputs, **indices}
        missing = [spec.name for spec in form.inputs if spec.name not in known]
        if missing:
            raise EngineError(f"the {kind} form lacks {', '.join(missing)}: start from `begin`, with a full step")
        given = {spec.name: known[spec.name] for spec in form.inputs}
        sizes = named_sizes(form, given)
        reads = {entry.output: entry.input for entry in self.manifest.cache}
        outputs: Buffers = {}
        written: Buffers = {}
        for spec in form.outputs:
            name = reads.get(spec.name)
            # A form must not write what it reads: such an entry has a second buffer.
            buffer = None if name is None else cache.get(_spare(name) if name in given else name)
            shape = sized(spec.shape, sizes)
            if buffer is None or list(buffer.shape) != shape:
                buffer = torch.empty(shape, dtype=dtype_of(spec), device=self.device)
            outputs[spec.name] = buffer
            if name is not None:
                written[name] = buffer
        (run or self.runner.prepare(kind))(given, outputs)
        return {name: tensor for name, tensor in outputs.items() if name not in reads}, written

    def check_plan(self, plan: Plan) -> None:
        """Raise `SessionError` if the engine was exported for a plan with other sizes or options."""
        if plan.cache_device == "cpu":
            raise SessionError("an engine keeps its cache on its own device: make the plan without cache_device")
        made_for, asked = self.plan.form_options, plan.form_options
        for name in BUDGETS:
            dynamic = self.manifest.dynamic_dims.get(name)
            if dynamic and dynamic.min <= getattr(plan, name) <= dynamic.max:
                asked = asked._replace(**{name: getattr(made_for, name)})
        if plan.num_merged == plan.num_context and asked.num_context == made_for.num_context == made_for.num_merged:
            asked = asked._replace(num_merged=made_for.num_merged)
        if different := made_for.differences(asked):
            raise SessionError(
                f"the engine was exported for a plan with another {different}: export it with this plan, or make the "
                "plan alike"
            )
        if plan.weights.size and STEP_WEIGHTS not in self.indices:
            raise SessionError("the engine takes no weights of outputs: make the plan with multistep=0")


def _time_name(manifest: Manifest) -> str:
    """The input that holds the time of a step, by the names that models give it; empty if there is none."""
    names = [spec.name for spec in form_of(manifest, "full").inputs if spec.role == "model"]
    named = [known for known in NAMES if known in names]
    return next(iter([*named, *(name for name in names if "timestep" in name)]), "")


def named_sizes(form: FormSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes of a form's named dims, from its inputs."""
    return {
        size: int(tensors[spec.name].shape[dim])
        for spec in form.inputs
        for dim, size in enumerate(spec.shape)
        if isinstance(size, str)
    }


def flat_inputs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those in lists and dicts one by one: `x_0` is the first of the list `x`."""
    leaves, _ = pytree.tree_flatten_with_path(dict(kwargs))
    return {"_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf for path, leaf in leaves}


def sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> list[int]:
    """A shape of the manifest with its named dims at these sizes."""
    return [size if isinstance(size, int) else sizes[size] for size in shape]


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch type of an input or output."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _keep(buffers: Buffers, written: Buffers) -> None:
    """What a step wrote is what the next one reads. The two buffers of an entry that is both take turns."""
    for name, tensor in written.items():
        old = buffers.get(name)
        buffers[name] = tensor
        if old is not None and old is not tensor:
            buffers[_spare(name)] = old


def _spare(name: str) -> str:
    return f"spare {name}"


BUDGETS = {"num_active": "active_index", "num_context": "context_index"}
"""Sizes that a manifest may leave free, by the index whose length they are."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
