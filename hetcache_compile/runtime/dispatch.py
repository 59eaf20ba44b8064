"""What happens at each call: which form runs, on whose cache.

A `CompiledGraph` stands where Dynamo would call the graph it captured. Everything a call needs that does not change
between calls is in a `Route`, made once for a graph, its shapes and what forms know of a plan (see `prepare`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..capture.subclasses import Unwrapping
from ..compilation.options import BackendOptions, Compiled
from ..errors import GridMismatchError, ParallelError, SessionError, is_out_of_memory
from ..passes.analysis.analyse import Analysis
from ..passes.analysis.inputs import is_held
from ..passes.ir.axis import AxisState
from ..passes.ir.graphs import device_of
from ..passes.writing.batch import join_samples
from ..plan.schedule import StepKind
from ..ranks.context_parallel import why_not_shared_here
from ..ranks.parallel import guarded
from ..record.alike import check_alike, inputs_of, setting_differs
from ..record.caches import Correction, recorded_of
from ..record.record import RecordedStep
from ..record.signature import model_signature
from ..sessions.branches import Branch, holds, remember
from ..sessions.calls import Call, Turn
from ..sessions.session import Session, current_session
from ..sessions.stats import Stopwatch
from .buffers import (
    buffers_for,
    normal_mode,
    own_outputs,
    prepare_buffers,
    read_in_place,
    settle,
    share,
    told_of_memory,
)
from .inputs import check_finite, signature_of, time_value, varying_inputs
from .prepare import LOCK, CompiledForm, Prepared, Preparer, Roles, preparing
from .refusals import (
    ASSUMED,
    PARALLEL,
    PART,
    NotCachedError,
    Refused,
    graph_break_of,
    part_of_a_model,
    reason_of,
    refused_by,
)
from .streaming import can_stream
from .weights import Weights

ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int)
"""What a model that attends has: the operator, or what attention by hand is made of."""

MOST_ROUTES = 64
"""Sets of shapes and options of plans for which one graph keeps its forms; the oldest goes first."""


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
        session.notices.tried_calls += 1
        if route is None:
            route = self._routes[key] = self.find_route(session, given, inputs, shapes)
            if isinstance(route, Refused):
                session.agreement.on_refusal(route.reason)
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
                session.agreement.on_refusal(route.reason)
        session.notices.refused(route.reason, route.cause, route.topic)
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
        self._check_assumed(route, inputs)
        call = self._call(route, self.unwrapped.watched(given, inputs), inputs)
        turn = session.begin(call)
        form = route.forms.get(turn.kind) or self._make_form(session, route, turn.kind, inputs)
        session.agreement.on_call(turn, call)
        if turn.kind is StepKind.FULL and session.check_finite:
            check_finite(call.latents, turn.step, len(session.stats.kinds))
        number = turn.branch.number or 0
        if session.parallel is not None and not session.parallel.computes(number):
            session.finish(turn, call, Stopwatch(route.device).stop(), time.perf_counter() - start)
            return session.parallel.receive(number, output_values(route.prepared.program.module), route.device)
        if turn.recorded is not None:
            self._check_clip(session, turn.branch, turn.recorded, route, form, inputs)
        history = turn.branch.give_back() if turn.kind is StepKind.FULL else {}
        if turn.lender is not None:
            share(session, form, turn, route.key)
        buffers = self._buffers(session, form, turn.branch, route)
        compile_seconds = time.perf_counter() - start
        prepare_buffers(session, form, turn, route.key, route.device, buffers, history)
        watch = Stopwatch(route.device)
        results = self._run_form(session, route, form, turn, inputs, buffers)
        session.finish(turn, call, watch.stop(), compile_seconds)
        if turn.recorded is not None and turn.corrects:
            settle(turn.branch, route.device)
            with normal_mode(), told_of_memory("another text needs a second cache beside that of the branch"):
                turn.branch.correction = Correction(form.reads, buffers[0], turn.recorded.tensors)
        if session.records(turn):
            self._keep(session, turn, call, route, form, inputs, buffers[0])
        outputs = join(results, route.part.outputs)
        return outputs if session.parallel is None else session.parallel.send(number, outputs)

    def _call(self, route: Route, watched: Sequence[Any], inputs: Sequence[Any]) -> Call:
        """What the session needs to know of a call."""
        roles, anchor = route.roles, route.weights.anchor(watched)
        model = self if anchor is None else anchor
        return Call(
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

    def _run_form(
        self,
        session: Session,
        route: Route,
        form: CompiledForm,
        turn: Turn,
        inputs: Sequence[Any],
        buffers: Sequence[Sequence[torch.Tensor]],
    ) -> list[tuple[Any, ...]]:
        """What a form returns for the samples of each plan."""
        unchanging: Sequence[torch.Tensor] = ()
        if route.part.unchanging is not None and form.unchanging:
            with normal_mode(), torch._C.DisableTorchFunctionSubclass():
                anew = turn.kind is StepKind.FULL or turn.lender is not None
                unchanging = route.part.unchanging.of(turn.branch, route.key, turn.weights, inputs, anew=anew)
        run = form.streamed if turn.branch.hosted and form.streamed else form.run
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
        return results

    def _check_clip(
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
            RecordError: it is another one, or run otherwise.
        """
        assert session.memory is not None
        program = route.prepared.program
        settings = {program.inputs[number]: inputs[number] for number in route.roles.recorded}
        if other := branch.other_setting(recorded.settings, settings):
            raise setting_differs(other, settings[other], recorded.settings[other])
        if recorded.calls not in branch.seen:
            session.memory.check_entries(form.reads, session.plan)
            inactive = session.restorers[0].inactive
            with normal_mode():
                analysis = self.preparer.analyse(route.prepared, session.plan)
                check_alike(program, analysis, inputs, recorded.calls.inputs, inactive)
            branch.seen.add(recorded.calls)
        if can_stream(route.device) and not branch.has_other_text:
            read_in_place(session, form, branch, route.key, recorded)

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
        program, analysis = route.prepared.program, route.analysis
        settings = {program.inputs[number]: inputs[number] for number in route.roles.recorded}
        session.recorded(turn, call, lambda: inputs_of(program, analysis, inputs), settings, tensors)

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


def signature_at(route: Route, inputs: Sequence[Any]) -> str:
    """What a record knows a model by, of a call's inputs."""
    program = route.prepared.program
    with torch._C.DisableTorchFunctionSubclass():
        return model_signature(program.module.graph, [*program.state.values(), *route.weights.of(inputs)])


def output_values(module: GraphModule) -> list[Any]:
    """What a captured graph returns: fake tensors, and anything else as it is."""
    results: Any = module.graph.output_node().args[0]
    return [result.meta["val"] if isinstance(result, Node) else result for result in results]


def join(results: Sequence[tuple[Any, ...]], states: Sequence[AxisState]) -> tuple[Any, ...]:
    """The outputs for a whole batch, from those for the samples of each plan."""
    if len(results) == 1:
        return results[0]
    return tuple(join_samples(parts, state) for *parts, state in zip(*results, states, strict=True))
