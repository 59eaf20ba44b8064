"""What happens at each call: which form runs, on whose cache.

A `CompiledGraph` stands where Dynamo would call the graph it captured. Everything a call needs that does not change
between calls is in a `Route`, made once for a graph, its shapes and what forms know of a plan (see `prepare`).
"""

from __future__ import annotations

import re
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..capture.capture import first_line
from ..capture.subclasses import Unwrapping
from ..compilation.options import BackendOptions, Compiled
from ..errors import (
    GridMismatchError,
    NonFiniteError,
    NotEnoughMemoryError,
    ParallelError,
    SessionError,
    UnsupportedGraphError,
    is_out_of_memory,
)
from ..passes.analysis.analyse import Analysis
from ..passes.analysis.inputs import is_held
from ..passes.ir.axis import AxisState
from ..passes.ir.cache import CacheEntry
from ..passes.ir.graphs import device_of
from ..passes.writing.batch import join_samples
from ..plan.schedule import StepKind
from ..ranks.context_parallel import why_not_shared_here
from ..ranks.parallel import guarded
from ..record.alike import check_alike, inputs_of
from ..record.caches import Correction, recorded_of
from ..record.record import RecordedStep
from ..record.signature import model_signature
from .branches import Branch, holds, remember
from .prepare import LOCK, CompiledForm, Prepared, Preparer, Roles, preparing
from .session import Call, Session, Turn, current_session
from .stats import Stopwatch
from .streaming import can_stream, free_bytes, host_buffers
from .weights import Weights

ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int)
"""What a model that attends has: the operator, or what attention by hand is made of."""

PART = "a part of a model"
PARALLEL = "a model that shares its work itself"
ASSUMED = "another value of an input that the graph depends on"
MOST_ROUTES = 64
"""Sets of shapes and options of plans for which one graph keeps its forms; the oldest goes first."""


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


@dataclass
class Route:
    """All that calls of one graph at one set of shapes need for plans that share forms.

    Attributes:
        prepared: what was made for the graph, of all samples.
        part: the same for the samples of one plan.
        roles: which input is what.
        key: tells caches of this graph and these shapes from others.
        weights: among the inputs.
        device: where the graph runs.
        analysis: of the part.
        forms: compiled ones, by kind.
    """

    prepared: Prepared
    part: Prepared
    roles: Roles
    key: Hashable
    weights: Weights
    device: torch.device
    analysis: Analysis
    forms: dict[StepKind, CompiledForm] = field(default_factory=dict)


class CompiledGraph:
    """What Dynamo calls in place of the graph it captured."""

    def __init__(self, graph: GraphModule, options: BackendOptions) -> None:
        self.graph = graph
        self.compiler = options.compiler()
        self.unwrapped = Unwrapping(graph)
        self.preparer = Preparer(self.unwrapped.graph, options)
        self.plain: Compiled | None = None
        """The plain graph as Dynamo had it compiled, if it was captured outside a session."""
        self.broken_by = graph_break_of(graph)
        self.not_whole = ""
        self._varying = varying_inputs(self.unwrapped.graph, self.preparer.floats)
        places = enumerate(self.unwrapped.graph.graph.find_nodes(op="placeholder"))
        self._held = frozenset(n for n, node in places if is_held(node.name)) - self.preparer.floats
        self._plain: dict[Hashable, Compiled] = {}
        self._weights: dict[Hashable, Weights] = {}
        self._prepared: dict[Hashable, Prepared] = {}
        self._routes: OrderedDict[Hashable, Route | Refused] = OrderedDict()

    def __call__(self, *given: Any) -> Any:
        """Run the graph, as the open session says, or plainly."""
        session = current_session()
        if session is None:
            return self.run_plain(given)
        inputs = self.unwrapped(given)
        shapes = self._varying(inputs)
        key = (shapes, session.route_key)
        route = self._routes.get(key)
        if not isinstance(route, Route):
            run = self.aside(session, route)
            if run is not None:
                return run(given)
        session.tried_calls += 1
        if route is None:
            route = self._routes[key] = self.find_route(session, given, inputs, shapes)
            if isinstance(route, Refused):
                session.agree_on_refusal(route.reason)
            while len(self._routes) > MOST_ROUTES:
                self._routes.popitem(last=False)
        if isinstance(route, Route):
            try:
                with torch.no_grad(), guarded(computes=True) if session.parallel else nullcontext():
                    return self.run_step(session, route, given, inputs)
            except NotCachedError as error:
                route = error.refused
                if route.topic != ASSUMED:
                    self._routes[key] = route
                session.agree_on_refusal(route.reason)
        session.refused(route.reason, route.cause, route.topic)
        return self.run_plain(given)

    def aside(self, session: Session, refused: Refused | None) -> Callable[[Sequence[Any]], Any] | None:
        """What runs in place of this call, uncounted, where something else answers for it.

        Args:
            session: the open one.
            refused: why the graph runs plainly, if that is known.
        """
        return None

    def run_plain(self, inputs: Sequence[Any]) -> Any:
        """The graph as Dynamo captured it, compiled by the inner compiler."""
        if self.plain is not None:
            return self.plain(*inputs)
        # Compiled late, outside Dynamo, the graph is static even where Dynamo captured it with dynamic sizes.
        key = signature_of(inputs)
        if key not in self._plain:
            with LOCK:
                if key not in self._plain:
                    self._plain[key] = self.compiler(self.graph, list(inputs))
        return self._plain[key](*inputs)

    def find_route(
        self, session: Session, given: Sequence[Any], inputs: Sequence[Any], shapes: Hashable
    ) -> Route | Refused:
        """What calls of these shapes need for the session's plan, or why they run plainly.

        Raises:
            GridMismatchError: the plan is for another grid than this model's, and no call before was on the plan's.
            SessionError: the batch cannot be shared among the session's plans.
        """
        reason = why_not_shared_here()
        if reason is not None:
            return Refused(reason, PARALLEL)
        if self.broken_by:
            return Refused(part_of_a_model(self.broken_by, self.not_whole), PART)
        plan = session.plan
        with preparing(), normal_mode():
            try:
                if shapes not in self._prepared:
                    self._prepared[shapes] = self.preparer.capture(inputs)
                    watched = self.unwrapped.watched(given, inputs)
                    self._weights[shapes] = Weights(
                        watched, self.unwrapped.parts, self._held, moving=bool(self.preparer.offloaded)
                    )
                prepared = self._prepared[shapes]
                analysis = self.preparer.analyse(prepared, plan)
                roles = self.preparer.roles(prepared, analysis, inputs)
                names = prepared.program.inputs
                latents = {names[number]: inputs[number] for number in roles.latents}
                part = self.preparer.part(prepared, latents, len(session.plans))
                if session.hoists:
                    part = self.preparer.hoisted(prepared, plan)
                analysis = self.preparer.analyse(part, plan)
            except GridMismatchError as error:
                if self._is_whole(shapes) and session.stats.kinds:
                    return refused_by(error)  # some pipelines go on with fewer frames
                if self._is_whole(shapes):
                    raise
                return Refused(part_of_a_model(str(error), self.not_whole), PART, error)  # or an encoder, compiled too
            except SessionError:
                raise
            except Exception as error:
                if self._is_whole(shapes):
                    return refused_by(error)
                return Refused(part_of_a_model(reason_of(error), self.not_whole), PART, error)
        return Route(prepared, part, roles, (self, shapes), self._weights[shapes], device_of(inputs), analysis)

    def _is_whole(self, shapes: Hashable) -> bool:
        """Whether the graph is known to be given a time and to attend: a part of a model does not, nor an encoder."""
        prepared = self._prepared.get(shapes)
        if prepared is None or self.preparer.time_of(prepared) is None:
            return False
        graph = prepared.program.module.graph
        return any(graph.find_nodes(op="call_function", target=operator) for operator in ATTENTION)

    def run_step(self, session: Session, route: Route, given: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """One call inside a session: choose the form, make it if need be, run it on the branch's buffers."""
        start = time.perf_counter()
        roles = route.roles
        self._check_assumed(route, inputs)
        watched = self.unwrapped.watched(given, inputs)
        anchor = route.weights.anchor(watched)
        model = self if anchor is None else anchor
        call = Call(
            model=model,
            owner=route.key,
            time=None if roles.time is None else time_value(inputs[roles.time]),
            latents=[inputs[number] for number in roles.latents],
            conditions=[inputs[number] for number in roles.conditions],
            weights=lambda thorough: route.weights.generation(model, watched, thorough),
            signature=lambda: signature_at(route, watched),
            can_share=True,
            settings=[inputs[number] for number in roles.settings_of(inputs)],
        )
        turn = session.begin(call)
        form = route.forms.get(turn.kind) or self._make_form(session, route, turn.kind, inputs)
        session.agree(turn, call, lambda: signature_at(route, watched))
        if turn.kind is StepKind.FULL and session.check_finite:
            check_finite(call.latents, turn.step, len(session.stats.kinds))
        number = turn.branch.number or 0
        if session.parallel is not None and not session.parallel.computes(number):
            session.finish(turn, call, Stopwatch(route.device).stop(), time.perf_counter() - start)
            return session.parallel.receive(number, output_values(route.prepared.program.module), route.device)
        if turn.recorded is not None:
            self._agree(session, turn.branch, turn.recorded, route, form, inputs)
        history = turn.branch.give_back() if turn.kind is StepKind.FULL else {}
        if turn.lender is not None:
            share(session, form, turn, route)
        buffers = self._buffers(session, form, turn.branch, route)
        compile_seconds = time.perf_counter() - start
        if turn.kind is StepKind.FULL:
            session.begun_full(turn)
            if session.plan.context_extrapolation and not turn.fresh:
                settle(turn.branch, route.device)
                go_on_from(history, turn.branch.memory(route.key))
        if turn.fresh and (turn.kind is StepKind.FULL or turn.recalls or turn.lender is not None):
            for own in buffers:
                forget(form, own, shared=turn.lender is not None)
        if turn.recorded is not None and turn.recalls:
            settle(turn.branch, route.device)
            session.restorers[0].restore(form.reads, buffers[0], turn.recorded.tensors, turn.branch.correction)
        if turn.lender is not None:
            settle(turn.branch, route.device)
            lent = turn.lender.memory(route.key)
            for p, own in enumerate(buffers):
                there = {entry.input_name: lent[p, entry.input_name] for entry in form.reads}
                session.restorers[p].restore(form.reads, own, there)
        run = form.streamed if turn.branch.hosted and form.streamed else form.run
        watch = Stopwatch(route.device)
        unchanging: Sequence[torch.Tensor] = ()
        if route.part.unchanging is not None and form.unchanging:
            with normal_mode(), torch._C.DisableTorchFunctionSubclass():
                anew = turn.kind is StepKind.FULL or turn.lender is not None
                unchanging = route.part.unchanging.of(turn.branch, route.key, turn.weights, inputs, anew=anew)
        results = []
        for p, own in enumerate(buffers):
            more = unchanging or route.part.samples[p]
            picked = form.pick((*inputs, *more) if more else inputs)
            indices = [
                session.index(name, route.device, p, kind=turn.weighed_as, step=turn.step) for name in form.indices
            ]
            # A form has the operators that a weight's class asked for when Dynamo looked through it.
            with torch._C.DisableTorchFunctionSubclass():
                results.append(own_outputs(run(*picked, *indices, *own), (*own, *unchanging)))
        session.finish(turn, call, watch.stop(), compile_seconds)
        if turn.recorded is not None and turn.corrects:
            settle(turn.branch, route.device)
            with normal_mode(), told_of_memory("another text needs a second cache beside that of the branch"):
                turn.branch.correction = Correction(form.reads, buffers[0], turn.recorded.tensors)
        if session.records(turn):
            self._keep(session, turn, call, route, form, inputs, buffers[0])
        outputs = join(results, route.part.outputs)
        return outputs if session.parallel is None else session.parallel.send(number, outputs)

    def _agree(
        self,
        session: Session,
        branch: Branch,
        recorded: RecordedStep,
        route: Route,
        form: CompiledForm,
        inputs: Sequence[Any],
    ) -> None:
        """See that the edit is one of the recorded clip, and let streamed steps read the record's own memory.

        Raises:
            RecordError: it is another one.
        """
        assert session.memory is not None
        if not branch.agrees:
            session.memory.check_entries(form.reads, session.plan)
            inactive = session.restorers[0].inactive
            with normal_mode():
                analysis = self.preparer.analyse(route.prepared, session.plan)
                check_alike(route.prepared.program, analysis, inputs, recorded.calls.inputs, inactive)
            branch.agrees = True
        if can_stream(route.device) and not branch.has_other_text:
            branch.memory(route.key)
            branch.hosted = True
            held, names = branch.num_bytes, [entry.input_name for entry in form.reads if entry.is_context]
            branch.lend({(0, name): recorded.tensors[name] for name in names})
            session.allocated(branch.num_bytes - held)

    def _keep(
        self,
        session: Session,
        turn: Turn,
        call: Call,
        route: Route,
        form: CompiledForm,
        inputs: Sequence[Any],
        buffers: Sequence[torch.Tensor],
    ) -> None:
        """Record what a FULL step left. Keys and values that are on the host change hands: later steps read them there.

        Raises:
            NotEnoughMemoryError: the host has no room for it.
        """
        branch = turn.branch
        needed = f"the record takes {session.stats.record_bytes / 2**30:.2g} GiB of the host's memory"
        with normal_mode(), told_of_memory(needed):
            tensors = recorded_of(form.reads, buffers, lambda entry: branch.hosted and entry.is_context)
        held = branch.num_bytes
        branch.lend({(0, name): tensor for name, tensor in tensors.items() if any(tensor is own for own in buffers)})
        session.allocated(branch.num_bytes - held)
        program, time = route.prepared.program, route.roles.time
        session.recorded(turn, call, lambda: inputs_of(program, route.analysis, inputs, time), tensors)

    def _buffers(self, session: Session, form: CompiledForm, branch: Branch, route: Route) -> list[list[torch.Tensor]]:
        """The buffers of each plan's samples.

        Raises:
            NotCachedError: there is not enough memory for them.
        """
        plans = range(len(session.plans))
        try:
            buffers = [buffers_for(session, form, branch, route.key, p, route.device) for p in plans]
            if route.part.unchanging is not None:
                held = branch.num_bytes
                with normal_mode():
                    route.part.unchanging.memory(branch, route.key, route.device)
                session.allocated(branch.num_bytes - held)
                session.stats.branch_bytes = max(session.stats.branch_bytes, branch.num_bytes)
            return buffers
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            session.release()
            needed = len(plans) * sum(entry.num_bytes for entry in form.reads) / 2**30
            reason = (
                f"there is not enough memory for the {needed:.2g} GiB of a cache: make the plan with "
                "cache_dtype='int8', cache_device='cpu', a smaller cached_ratio or merged_ratio, or without "
                "context_extrapolation"
            )
            if session.parallel is not None:
                raise ParallelError(reason) from error  # the others go on: a plain call would leave them waiting
            raise NotCachedError(Refused(reason, cause=error)) from error

    def _make_form(self, session: Session, route: Route, kind: StepKind, inputs: Sequence[Any]) -> CompiledForm:
        part = route.part
        with preparing(), normal_mode():
            try:
                more = part.samples[0] if part.unchanging is None else part.unchanging.empty(route.device)
                given = (*inputs, *more)
                form = route.forms[kind] = self.preparer.form(part, session.plan, kind.form, given, session.ranks)
            except Exception as error:
                raise NotCachedError(refused_by(error)) from error
        return form

    def _check_assumed(self, route: Route, inputs: Sequence[Any]) -> None:
        """Raise `NotCachedError` if an input that the graph was captured for has another value."""
        program = route.prepared.program
        for name, value in program.assumed.items():
            if not holds(remember([value])[0], inputs[program.inputs.index(name)]):
                reason = f"the graph was captured for another value of {name}, on which its shape depends"
                raise NotCachedError(Refused(reason, ASSUMED))


def refused_by(error: Exception) -> Refused:
    """What an error says of why calls run plainly."""
    return Refused(f"hetcache runs this graph unchanged, because {reason_of(error)}", cause=error)


def reason_of(error: Exception) -> str:
    """All that a refusal says; of other errors what they are."""
    if isinstance(error, UnsupportedGraphError | GridMismatchError):
        return str(error)
    return f"making it failed: {type(error).__name__}: {first_line(error)}"


def varying_inputs(graph: GraphModule, floats: frozenset[int]) -> Callable[[Sequence[Any]], Hashable]:
    """A function of inputs that tells apart what the graph may be called with.

    Dynamo guards the shapes that it captured, so only symbolic ones and Python values may vary.
    """
    places = list(enumerate(graph.graph.find_nodes(op="placeholder")))
    varying = [n for n, node in places if n not in floats and _may_vary(node.meta.get("example_value"))]
    if not varying and not floats:
        return lambda inputs: None

    def signature(inputs: Sequence[Any]) -> Hashable:
        return signature_of([inputs[n] for n in varying]), tuple(float(inputs[n]) for n in floats)

    return signature


def _may_vary(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return True


def signature_of(inputs: Sequence[Any]) -> Hashable:
    """What makes a graph static: shapes, strides, types and devices of tensors, values of anything else."""
    return tuple(
        (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else value
        for value in inputs
    )


@contextmanager
def normal_mode() -> Iterator[None]:
    """Tensors made here are of no inference mode, whatever mode the call is in: later calls may be in another one."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def time_value(time: Any) -> float:
    """The time of a step. Where tokens have their own, the latest: those of a given first frame stand at 0."""
    if not isinstance(time, torch.Tensor):
        return float(time)
    return float(time if time.numel() == 1 else time.detach().amax())


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


def buffers_for(
    session: Session, form: CompiledForm, branch: Branch, owner: Hashable, number: int, device: torch.device
) -> list[torch.Tensor]:
    """The branch's cache buffers for plan `number` that a form reads or writes; allocated once for a branch."""
    held = branch.num_bytes if not branch.has_memory(owner) else 0
    memory = branch.memory(owner)
    if held:
        session.allocated(-held)
    missing = [entry for entry in form.reads if (number, entry.input_name) not in memory]
    if missing:
        branch.hosted = branch.hosted or belongs_on_host(session, missing, device)
        with normal_mode():
            made = empty_buffers(missing, device, branch.hosted)
        for entry, buffer in zip(missing, made, strict=True):
            memory[number, entry.input_name] = buffer
            session.allocated(buffer.nbytes)
        session.stats.branch_bytes = max(session.stats.branch_bytes, branch.num_bytes)
    return [memory[number, entry.input_name] for entry in form.reads]


def share(session: Session, form: CompiledForm, turn: Turn, route: Route) -> None:
    """Let a branch read the keys and values of its lender in place of its own, which are given back."""
    session.begun_full(turn)
    branch, lender = turn.branch, turn.lender
    assert lender is not None
    held, lent = branch.num_bytes, lender.memory(route.key)
    branch.memory(route.key)
    branch.hosted = lender.hosted
    entries = [entry.input_name for entry in form.reads if entry.group == "key_values"]
    branch.lend({(p, name): lent[p, name] for p in range(len(session.plans)) for name in entries})
    session.allocated(branch.num_bytes - held)


def belongs_on_host(session: Session, entries: Sequence[CacheEntry], device: torch.device) -> bool:
    """Whether keys and values of a branch go into the host's memory: as the plan says, or where they do not fit."""
    if session.record is not None:
        return can_stream(device)  # the record is there
    where = session.plan.cache_device
    needed = sum(entry.num_bytes for entry in entries if entry.is_context)
    if where != "auto" or not needed or not can_stream(device):
        return where == "cpu" and can_stream(device)
    free = free_bytes(device)
    if needed <= free:
        return False
    session.warn(
        f"a cache of {needed / 2**30:.2g} GiB does not fit into the {max(free, 0) / 2**30:.2g} GiB that are free on "
        f"{device}, and is kept in the host's memory: each PARTIAL step copies it in. cache_dtype='int8' makes it "
        "smaller, cache_device='same' keeps it on the device"
    )
    return True


def empty_buffers(entries: Sequence[CacheEntry], device: torch.device, hosted: bool) -> list[torch.Tensor]:
    """Memory for cache entries: keys and values in the host's, if `hosted`."""
    there = iter(host_buffers([entry for entry in entries if hosted and entry.is_context]))
    return [
        next(there) if hosted and entry.is_context else torch.empty(entry.shape, dtype=entry.dtype, device=device)
        for entry in entries
    ]


@contextmanager
def told_of_memory(needed: str) -> Iterator[None]:
    """Where memory runs out, raise `NotEnoughMemoryError` that says for what."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"there is not enough memory: {needed}. Make the plan with cache_dtype='int8', with fewer FULL steps, or "
            "without context_extrapolation"
        ) from error


def signature_at(route: Route, inputs: Sequence[Any]) -> str:
    """What a record knows a model by, of a call's inputs."""
    program = route.prepared.program
    with torch._C.DisableTorchFunctionSubclass():
        return model_signature(program.module.graph, [*program.state.values(), *route.weights.of(inputs)])


def settle(branch: Branch, device: torch.device) -> None:
    """Wait for copies between a device and the host, before the host itself reads or writes what is there."""
    if branch.hosted and device.type == "cuda":
        torch.cuda.synchronize(device)


def go_on_from(history: Mapping[Hashable, torch.Tensor], memory: Mapping[Hashable, torch.Tensor]) -> None:
    """Copy what a FULL step reads of the cache before it (see `passes.prediction.predict`) out of a record's memory."""
    for name, tensor in history.items():
        memory[name].copy_(tensor)


def forget(form: CompiledForm, buffers: Sequence[torch.Tensor], *, shared: bool) -> None:
    """Nothing was computed yet: entries that say so. Keys and values that are shared are another branch's."""
    for entry, buffer in zip(form.reads, buffers, strict=True):
        if entry.initial is not None and not (shared and entry.group == "key_values"):
            buffer.fill_(entry.initial)


def own_outputs(outputs: Sequence[Any], buffers: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The outputs, with a copy of any that is a view of a branch's memory: a later step overwrites that one.

    A reuse step may return such a view, where nothing but views comes after the tokens; samplers keep outputs.
    """
    cached = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    return tuple(
        value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in cached else value
        for value in outputs
    )


def output_values(module: GraphModule) -> list[Any]:
    """What a captured graph returns: fake tensors, and anything else as it is."""
    results: Any = module.graph.output_node().args[0]
    return [result.meta["val"] if isinstance(result, Node) else result for result in results]


def join(results: Sequence[tuple[Any, ...]], states: Sequence[AxisState]) -> tuple[Any, ...]:
    """The outputs for a whole batch, from those for the samples of each plan."""
    if len(results) == 1:
        return results[0]
    return tuple(join_samples(parts, state) for *parts, state in zip(*results, states, strict=True))


def check_finite(latents: Sequence[torch.Tensor], step: int | None, calls: int) -> None:
    """Raise `NonFiniteError` if any of the latents holds NaN or infinity."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in latents):
        where = f"step {step}" if step is not None else f"call {calls}"
        raise NonFiniteError(
            f"the latents of {where} hold NaN or infinity: look at the step before, or at the model's dtype"
        )
