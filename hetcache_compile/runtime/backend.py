"""`torch.compile(model, backend=hetcache_backend)`: the plain model outside a session, the plan's forms inside.

Capture, analysis, forms and compilation all wait for the first call that needs them, and are kept: by input
shapes, by grid, and by budgets. A new mask with the same budgets compiles nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..errors import NonFiniteError, SessionError, UnsupportedGraphError
from ..passes.analysis.analyse import Analysis, analyse
from ..passes.analysis.inputs import TokenInputs
from ..passes.forms.pipeline import in_process
from ..passes.ir.axis import AxisState
from ..passes.ir.form import Form
from ..passes.writing.batch import SAMPLE_INDEX, join_samples, take_samples
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .capture import Program, capture, with_input_names
from .rewrite import check_weights, write_form
from .session import Branch, Session, current_session
from .timing import Stopwatch

Compiled = Callable[..., Any]
OPTIONS = ("inner", "inner_options", "token_inputs")


def hetcache_backend(
    graph: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Compiled:
    """The torch.compile backend; also registered as `"hetcache"`.

    Args:
        graph: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: of `torch.compile`. `inner`: the backend that compiles each form, a name or a callable
            (default `"inductor"`). `inner_options`: passed on to it. `token_inputs`: as in `rewrite`, for a model
            that takes packed tokens, where it is not clear which input holds them.

    Outside a session the compiled model is what `inner` makes of the graph. Inside one, a graph that cannot be
    rewritten runs like that too, after one warning with the reasons. A session is for inference: its outputs
    carry no gradient.
    """
    options = dict(options or {})
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown options {unknown}: hetcache_backend takes {', '.join(OPTIONS)}")
    inner = inner_backend(options.get("inner", "inductor"), options.get("inner_options"))
    compiled = CompiledGraph(graph, inner, options.get("token_inputs"))
    if current_session() is None:
        compiled.plain = inner(graph, list(example_inputs))
    return compiled


def inner_backend(inner: str | Compiled, options: Mapping[str, Any] | None) -> Compiled:
    """The function `(graph, inputs) -> callable` that compiles forms."""
    if callable(inner):
        compile_graph: Compiled = inner
    elif inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return lambda graph, inputs: compile_fx(graph, inputs, config_patches=dict(options or {}))
    else:
        compile_graph = torch._dynamo.lookup_backend(inner)
    if options:
        return lambda graph, inputs: compile_graph(graph, inputs, options=dict(options))
    return compile_graph


@dataclass
class Specialised:
    """A graph for one set of input shapes: its program, and what was made from it so far.

    With several plans, `parts` holds the graph for the samples of one plan, by the number of plans. Such a graph has
    one more input, which is `samples[p]` for plan p, and says where the samples lie in each output.
    """

    program: Program
    samples: tuple[tuple[torch.Tensor, ...], ...] = ((),)
    outputs: tuple[AxisState, ...] = ()
    parts: dict[int, Specialised] = field(default_factory=dict)
    analyses: dict[Hashable, Analysis] = field(default_factory=dict)
    forms: dict[tuple[Hashable, str], tuple[Form, Compiled]] = field(default_factory=dict)


class CompiledGraph:
    """What Dynamo calls in place of the graph it captured."""

    def __init__(self, graph: GraphModule, inner: Compiled, token_inputs: TokenInputs | None = None) -> None:
        self.graph, self.inner, self.token_inputs = graph, inner, token_inputs
        self.plain: Compiled | None = None
        """The plain graph as Dynamo had it compiled, if it was captured outside a session."""
        self._static_plain: dict[Hashable, Compiled] = {}
        self._specialised: dict[Hashable, Specialised] = {}
        self._refused: set[Hashable] = set()

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, as the open session says, or plainly."""
        session = current_session()
        if session is None:
            return self.run_plain(inputs)
        weighted = session.plan.weights.size > 0
        refusal = (signature_of(inputs), session.plan.form_options, weighted, len(session.plans))
        if refusal in self._refused:
            return self.run_plain(inputs)
        with torch.no_grad():
            try:
                return self.run_step(session, inputs)
            except UnsupportedGraphError as error:
                warnings.warn(f"hetcache runs this graph unchanged, because {error}", stacklevel=2)
                self._refused.add(refusal)
        return self.run_plain(inputs)

    def run_plain(self, inputs: Sequence[Any]) -> Any:
        """The graph as Dynamo captured it, compiled by `inner`."""
        if self.plain is not None:
            return self.plain(*inputs)
        # Compiled late, outside Dynamo, the graph is static even where Dynamo captured it with dynamic sizes.
        key = signature_of(inputs)
        if key not in self._static_plain:
            self._static_plain[key] = self.inner(self.graph, list(inputs))
        return self._static_plain[key](*inputs)

    def run_step(self, session: Session, inputs: Sequence[Any]) -> Any:
        """One call inside a session: choose the form, make it if need be, run it on the branch's buffers."""
        start = time.perf_counter()
        known = self.specialise(inputs)
        analysis = self.analyse(known, session.plan)
        by_name = dict(zip(known.program.inputs, inputs, strict=True))
        sources = {name: by_name[name] for name in analysis.token_sources if name in by_name}
        latents = list(sources.values())
        conditions = [t for t in inputs if is_condition(t) and not any(t is latent for latent in latents)]
        # Dynamo may run one graph for two modules of the same structure (two experts): weights tell them apart.
        weights = next((t for t in inputs if isinstance(t, torch.nn.Parameter)), None)
        cache_key = (self, id(weights), signature_of(inputs))
        kind, branch = session.next_step(cache_key, latents, conditions)
        if kind is StepKind.FULL and session.check_finite:
            check_finite(latents, branch.step)
        part = self.part(known, sources, len(session.plans))
        analysis = self.analyse(part, session.plan)
        form, run = self.form(part, analysis, session.plan, kind, (*inputs, *part.samples[0]))
        device = device_of(inputs)
        buffers = [buffers_for(form, branch, (cache_key, p), device) for p, _ in enumerate(session.plans)]
        compile_seconds = time.perf_counter() - start
        # While a FULL step writes the buffers they hold no valid cache: an error must not leave half of one.
        if kind is StepKind.FULL:
            if cache_key not in branch.filled:
                for own in buffers:
                    forget(form, own)
            branch.filled.discard(cache_key)
        watch = Stopwatch(device)
        results = []
        for p, own in enumerate(buffers):
            indices = [session.index(name, device, p, kind=kind, step=branch.step) for name in form.indices]
            outputs = run(*part.program.flat_inputs((*inputs, *part.samples[p]), {}), *indices, *own)
            results.append(own_outputs(outputs, own))
        branch.filled.add(cache_key)
        branch.step += 1
        session.count(kind, watch.stop(), compile_seconds)
        return join(results, part.outputs)

    def specialise(self, inputs: Sequence[Any]) -> Specialised:
        """The program for inputs of these shapes."""
        key = signature_of(inputs)
        if key not in self._specialised:
            names = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
            program = with_input_names(capture(self.graph, tuple(inputs), {}), names)
            self._specialised[key] = Specialised(program)
        return self._specialised[key]

    def analyse(self, known: Specialised, plan: Plan) -> Analysis:
        """The analysis for the plan's grid."""
        if plan.grid not in known.analyses:
            known.analyses[plan.grid] = analyse(known.program.module, plan.grid, self.token_inputs)
        return known.analyses[plan.grid]

    def part(self, known: Specialised, latents: Mapping[str, torch.Tensor], num_plans: int) -> Specialised:
        """The graph for the samples of one plan: for every `num_plans`-th sample of the batch, the latents' dim 0.

        Raises:
            SessionError: the batch cannot be shared among the plans.
            UnsupportedGraphError: the samples of a batch meet somewhere.
        """
        if num_plans == 1:
            return known
        first = next(iter(latents.values()), None)
        if first is None:
            raise SessionError("the session has several plans, but the latents of this model have no batch dim")
        size = first.shape[0]
        if size % num_plans:
            raise SessionError(
                f"the session has {num_plans} plans, but the batch has {size} samples: give a multiple of {num_plans}"
            )
        if num_plans not in known.parts:
            program = known.program
            module, outputs = take_samples(program.module, latents, size, size // num_plans)
            in_spec = pytree.tree_structure((tuple(range(len(program.inputs) + 1)), {}))
            program = replace(program, module=module, inputs=(*program.inputs, SAMPLE_INDEX), in_spec=in_spec)
            samples = [torch.arange(p, size, num_plans, device=first.device) for p in range(num_plans)]
            known.parts[num_plans] = Specialised(program, tuple((index,) for index in samples), outputs)
        return known.parts[num_plans]

    def form(
        self, known: Specialised, analysis: Analysis, plan: Plan, kind: StepKind, inputs: Sequence[Any]
    ) -> tuple[Form, Compiled]:
        """The compiled form for these budgets, with its cache in place."""
        key = (plan.form_options, kind.form)
        if key not in known.forms:
            form = write_form(kind.form, known.program, analysis, plan)
            form = in_process(form, plan.form_options)
            device = device_of(inputs)
            indices = [torch.as_tensor(getattr(plan, name), device=device) for name in form.indices]
            buffers = [torch.empty(e.shape, dtype=e.dtype, device=device) for e in form.reads]
            sample = [*known.program.flat_inputs(inputs, {}), *indices, *buffers]
            known.forms[key] = form, self.inner(form.module, sample)
        check_weights(known.forms[key][0], plan)
        return known.forms[key]


def buffers_for(form: Form, branch: Branch, cache_key: Hashable, device: torch.device) -> list[torch.Tensor]:
    """The branch's cache buffers that a form reads or writes; allocated once for a branch."""
    buffers = branch.buffers.setdefault(cache_key, {})
    for entry in form.reads:
        if entry.input_name not in buffers:
            buffers[entry.input_name] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    return [buffers[entry.input_name] for entry in form.reads]


def forget(form: Form, buffers: Sequence[torch.Tensor]) -> None:
    """Nothing was computed yet: entries that say so."""
    for entry, buffer in zip(form.reads, buffers, strict=True):
        if entry.initial is not None:
            buffer.fill_(entry.initial)


def own_outputs(outputs: Sequence[Any], buffers: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The outputs, with a copy of any that is a view of a cache buffer: the next step overwrites that one.

    A reuse step may return such a view, where nothing but views comes after the tokens; samplers keep outputs.
    """
    cached = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    return tuple(
        value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in cached else value
        for value in outputs
    )


def join(results: Sequence[tuple[Any, ...]], states: Sequence[AxisState]) -> tuple[Any, ...]:
    """The outputs for a whole batch, from those for the samples of each plan."""
    if len(results) == 1:
        return results[0]
    return tuple(join_samples(parts, state) for *parts, state in zip(*results, states, strict=True))


def check_finite(latents: Sequence[torch.Tensor], step: int) -> None:
    """Raise `NonFiniteError` if any of the latents holds NaN or infinity."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in latents):
        raise NonFiniteError(
            f"the latents of step {step} hold NaN or infinity: look at the step before, or at the model's dtype"
        )


def signature_of(inputs: Sequence[Any]) -> Hashable:
    """What makes a graph static: shapes, types and devices of tensors, values of anything else."""
    return tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value
        for value in inputs
    )


def is_condition(value: Any) -> bool:
    """A tensor of at least three dims that is no weight: text states, control latents, image states."""
    return isinstance(value, torch.Tensor) and value.ndim >= 3 and not is_weight(value)


def is_weight(value: torch.Tensor) -> bool:
    """Parameters, and buffers that Dynamo lifted (which look like any tensor, but never change)."""
    return isinstance(value, torch.nn.Parameter)


def device_of(inputs: Sequence[Any]) -> torch.device:
    """The device of the graph: the first that is not the CPU, if any."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), devices[0])
