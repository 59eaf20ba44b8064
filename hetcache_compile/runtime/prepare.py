"""What happens once for a graph and a set of input shapes: capture, analysis, forms, compilation.

`Prepared` keeps what was made; `dispatch` runs it. Everything here runs under Dynamo's compile lock: threads that meet
a cold model at the same time take turns.
"""

from __future__ import annotations

import copy
import gc
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..capture.capture import Program, capture, with_input_names, with_places_settled
from ..capture.offloading import StandIns
from ..capture.regional import capture_by_regions
from ..capture.rewrite import analysed, check_weights, hoisted, planned_token_inputs, write_form
from ..compilation.cuda_graphs import Recorder
from ..compilation.options import BackendOptions, Compiled
from ..compilation.regional import compile_by_regions, compile_whole
from ..errors import SessionError
from ..passes.analysis.analyse import Analysis
from ..passes.analysis.hoist import is_unchanging
from ..passes.analysis.inputs import TokenInputs, is_state
from ..passes.analysis.time_input import time_input
from ..passes.forms.collectives import Ranks
from ..passes.forms.pipeline import in_process
from ..passes.ir.axis import Accumulate, AxisState, Enter
from ..passes.ir.cache import CacheEntry
from ..passes.ir.form import Form
from ..passes.ir.graphs import device_of, graph_module
from ..passes.ir.refusal import Refusal, UnsupportedGraphError
from ..passes.writing.batch import SAMPLE_INDEX, take_samples
from ..plan.plan import Plan
from ..record.alike import is_setting
from .streaming import WEIGHT, Streamed, can_stream, transfers_of, uses_of
from .unchanging import Unchanging

LOCK: Any = getattr(torch._dynamo.convert_frame, "compile_lock", None) or threading.RLock()
"""Held while anything is made: capture must not run while Dynamo compiles in another thread."""
OBJECTS = 100_000
"""New objects between two looks for garbage while graphs are made: they live in the hundred thousands, and to look
through them at Python's usual pace takes an eighth of the time."""
MOST_FORMS = 24
"""Compiled forms that are kept for one graph and set of shapes; the one not used for longest goes first."""


@contextmanager
def preparing() -> Iterator[None]:
    """Hold `LOCK`, and let Python look for garbage less often."""
    with LOCK:
        usual = gc.get_threshold()
        gc.set_threshold(max(usual[0], OBJECTS) if usual[0] else 0, *usual[1:])
        try:
            yield
        finally:
            gc.set_threshold(*usual)


@dataclass(frozen=True)
class CompiledForm:
    """A form, compiled.

    Attributes:
        run: takes the inputs that `pick` takes, the indices, and the cache's buffers.
        pick: of all inputs of the graph, in a tuple, those that the form uses.
        indices: names of what it takes of a plan.
        reads: its cache entries, in order.
        streamed: the same where keys and values are in the host's memory; None where the device has no other.
        unchanging: whether it takes keys and values that no step changes.
    """

    run: Compiled
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    indices: tuple[str, ...]
    reads: tuple[CacheEntry, ...]
    streamed: Compiled | None = None
    unchanging: bool = False


@dataclass(frozen=True)
class Roles:
    """Which inputs of a graph are what, by position."""

    latents: tuple[int, ...]
    conditions: tuple[int, ...]
    time: int | None
    settings: tuple[int, ...] = ()
    """Scales and the like. Whole numbers are left out: they may be lengths of texts."""
    recorded: tuple[int, ...] = ()
    """Settings, whole numbers too: an edit from memory has to have the recorded ones."""

    def settings_of(self, inputs: Sequence[Any]) -> Sequence[int]:
        """The settings of a call, and the time where tokens have times of their own."""
        time = None if self.time is None else inputs[self.time]
        by_token = isinstance(time, torch.Tensor) and time.numel() > 1
        return (*self.settings, self.time) if by_token and self.time is not None else self.settings


@dataclass
class Prepared:
    """A graph for one set of input shapes, and what was made of it.

    With several plans, `parts` holds the graph for the samples of one plan, by the number of plans. Such a graph has
    one more input, which is `samples[p]` for plan p, and says where the samples lie in each output. `hoisted` holds the
    graph whose last inputs `unchanging` makes, or None where there is nothing to make, by what an analysis depends on.
    """

    program: Program
    samples: tuple[tuple[torch.Tensor, ...], ...] = ((),)
    outputs: tuple[AxisState, ...] = ()
    parts: dict[int, Prepared] = field(default_factory=dict)
    unchanging: Unchanging | None = None
    hoisted: dict[Hashable, Prepared | None] = field(default_factory=dict)
    analyses: dict[Hashable, Analysis] = field(default_factory=dict)
    forms: OrderedDict[Hashable, CompiledForm] = field(default_factory=OrderedDict)


class Preparer:
    """Makes what a graph's calls need, when they first need it.

    Args:
        graph: as Dynamo captured it.
        options: of the backend.
        offloaded: the inputs that are weights in the host's memory, by position.
    """

    def __init__(self, graph: GraphModule, options: BackendOptions, offloaded: frozenset[int] = frozenset()) -> None:
        self.graph, self.options, self.offloaded = graph, options, offloaded
        self.compiler = options.compiler(records=False)
        self.floats = wrapped_floats(graph)

    def capture(self, inputs: Sequence[Any]) -> Prepared:
        """The program for inputs of these shapes.

        Raises:
            UnsupportedGraphError: it cannot be captured.
        """
        names = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        graph = without_grad_modes(with_numbers(self.graph, inputs, self.floats))
        program = capture_by_regions(graph)
        program = with_places_settled(program, inputs) if program else capture(graph, tuple(inputs), {})
        return Prepared(with_input_names(program, names))

    def analyse(self, prepared: Prepared, plan: Plan) -> Analysis:
        """The analysis for the plan's grid.

        Raises:
            UnsupportedGraphError: the graph cannot be rewritten.
            GridMismatchError: the plan is for another grid.
        """
        key = _analysed_for(plan)
        if key not in prepared.analyses:
            program, analysis = analysed(prepared.program, plan.grid, self._token_inputs(prepared, plan))
            if program.module is not prepared.program.module:
                prepared.program = program
                prepared.analyses.clear()  # they know the nodes of the graph before
            prepared.analyses[key] = analysis
        return prepared.analyses[key]

    def _token_inputs(self, prepared: Prepared, plan: Plan) -> TokenInputs | None:
        return self.options.token_inputs or planned_token_inputs(prepared.program, plan)

    def time_of(self, prepared: Prepared) -> int | None:
        """The position of the input that holds the time of a step."""
        names = prepared.program.inputs
        found = time_input([node for node in prepared.program.module.graph.nodes if node.name in names])
        return None if found is None else names.index(found.name)

    def roles(self, prepared: Prepared, analysis: Analysis, inputs: Sequence[Any]) -> Roles:
        """Which input is what.

        Raises:
            UnsupportedGraphError: the graph is a part of a model, which cannot know what step it is in.
        """
        names = prepared.program.inputs
        latents = tuple(number for number, name in enumerate(names) if name in analysis.token_sources)
        time = self.time_of(prepared)
        packed = all(node.op == "placeholder" for node, _ in analysis.of_type(Enter))
        if time is None and packed and not self.options.token_inputs:
            raise UnsupportedGraphError(
                [
                    Refusal(
                        "it takes tokens and no time: a part of a model, such as one block",
                        help="compile the whole model, torch.compile(model, backend=hetcache_backend), in place of "
                        "model.compile_repeated_blocks() or of its blocks",
                    )
                ]
            )
        conditions = tuple(
            number
            for number, (name, value) in enumerate(zip(names, inputs, strict=True))
            if number not in (*latents, time) and is_condition(name, value)
        )
        recorded = tuple(
            number
            for number, (name, value) in enumerate(zip(names, inputs, strict=True))
            if number not in (*latents, time) and is_setting(name, value)
        )
        settings = tuple(number for number in recorded if inputs[number].is_floating_point())
        return Roles(latents, conditions, time, settings, recorded)

    def part(self, prepared: Prepared, latents: Mapping[str, torch.Tensor], num_plans: int) -> Prepared:
        """The graph for the samples of one plan: for every `num_plans`-th sample of the batch, the latents' dim 0.

        Raises:
            SessionError: the batch cannot be shared among the plans.
            UnsupportedGraphError: the samples of a batch meet somewhere.
        """
        if num_plans == 1:
            return prepared
        first = next(iter(latents.values()), None)
        if first is None:
            raise SessionError("the session has several plans, but the latents of this model have no batch dim")
        size = first.shape[0]
        if size % num_plans:
            raise SessionError(
                f"the session has {num_plans} plans, but the batch has {size} samples: give a multiple of {num_plans}"
            )
        if num_plans not in prepared.parts:
            program = prepared.program
            module, outputs = take_samples(program.module, latents, size, size // num_plans)
            in_spec = pytree.tree_structure((tuple(range(len(program.inputs) + 1)), {}))
            program = replace(program, module=module, inputs=(*program.inputs, SAMPLE_INDEX), in_spec=in_spec)
            samples = [torch.arange(p, size, num_plans, device=first.device) for p in range(num_plans)]
            prepared.parts[num_plans] = Prepared(program, tuple((index,) for index in samples), outputs)
        return prepared.parts[num_plans]

    def hoisted(self, prepared: Prepared, plan: Plan) -> Prepared:
        """The graph without what makes keys and values that no step changes; itself if it has none."""
        if self.offloaded:
            return prepared  # weights are on the device while their block runs
        key = _analysed_for(plan)
        if key not in prepared.hoisted:
            analysis = self.analyse(prepared, plan)
            found = hoisted(prepared.program, analysis, self._token_inputs(prepared, plan))
            rest = None
            if found is not None:
                rest = Prepared(found.program, unchanging=Unchanging(found.graphs, prepared.program))
                rest.analyses[key] = found.analysis
            prepared.hoisted[key] = rest
        return prepared.hoisted[key] or prepared

    def form(
        self, prepared: Prepared, plan: Plan, kind: str, inputs: Sequence[Any], ranks: Ranks | None = None
    ) -> CompiledForm:
        """The compiled form of a kind for a plan's budgets, on buffers; or one rank's.

        Raises:
            UnsupportedGraphError: the graph has not what the plan asks for.
            Exception: whatever the inner compiler raises.
        """
        # Sums over the context are of its tokens by index, so no form that makes them serves other budgets.
        analysis = self.analyse(prepared, plan)
        options = plan.form_options if analysis.of_type(Accumulate) else plan.form_options.for_kind(kind)
        key = (options, kind, ranks, *plan.token_inputs.items())
        if key not in prepared.forms:
            program = prepared.program
            form = write_form(kind, program, analysis, plan, options, ranks)
            form, pick = without_unused_inputs(in_process(form, options), program)
            device = device_of(inputs)
            indices = [torch.as_tensor(getattr(plan, name), device=device) for name in form.indices]
            here = StandIns(device)
            alike = [here.like(value) if n in self.offloaded else value for n, value in enumerate(inputs)]
            given = [*pick(alike), *indices]  # the cache may be larger than the device: it is made up block by block
            compile_form = compile_by_regions if self.options.regional else compile_whole
            run = compile_form(form.module, given, self.compiler, f"{kind} form")
            # Copies to and from the host are in no graph.
            numbers = enumerate(pick(range(len(inputs))))
            weights = {place: WEIGHT for place, n in numbers if isinstance(n, int) and n in self.offloaded}
            streams = can_stream(device)
            streamed = Streamed(run, {**weights, **uses_of(form)}, transfers_of(device)) if streams else None
            if weights:
                run = Streamed(run, weights, transfers_of(device))
            elif self.options.records and device.type == "cuda" and ranks is None:  # a graph of collectives is untried
                run = Recorder(run, stays_in_memory(form, program), f"{kind} form")
            unchanging = any(is_unchanging(node.name) for node in form.module.graph.find_nodes(op="placeholder"))
            prepared.forms[key] = CompiledForm(run, pick, form.indices, form.reads, streamed, unchanging)
            while len(prepared.forms) > MOST_FORMS:
                prepared.forms.popitem(last=False)
        prepared.forms.move_to_end(key)
        check_weights(prepared.forms[key].indices, plan)
        return prepared.forms[key]


def _analysed_for(plan: Plan) -> Hashable:
    """What of a plan an analysis depends on."""
    return plan.grid, tuple(plan.token_inputs.items())


def with_numbers(graph: GraphModule, inputs: Sequence[Any], floats: frozenset[int]) -> GraphModule:
    """The graph with numbers in place of its inputs that are numbers: sizes, and floats that Dynamo makes symbolic.

    The inputs stay, unused. Dynamo hands a float over as a tensor, and asks for its item.
    """
    graph = graph_module(graph, copy.deepcopy(graph.graph))
    places = list(graph.graph.find_nodes(op="placeholder"))
    for number, (node, value) in enumerate(zip(places, inputs, strict=True)):
        if isinstance(value, int | float):
            _put(node, value)
        elif number in floats:
            for item in [user for user in node.users if user.target == "item"]:
                _put(item, float(value))
                graph.graph.erase_node(item)
    graph.recompile()
    return graph


def without_grad_modes(graph: GraphModule) -> GraphModule:
    """The graph, a copy, without nodes that switch gradients off and on: a form runs without any.

    Where gradients are on, Dynamo writes an autograd function down with them, in a graph of its own inside, and
    `torch.export` cannot take those apart.
    """
    inner = {name: part for name, part in graph.named_children() if isinstance(part, GraphModule)}
    for name, part in inner.items():
        setattr(graph, name, without_grad_modes(graph_module(part, copy.deepcopy(part.graph))))
    switches = graph.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    for node in switches:
        graph.graph.erase_node(node)
    if switches:
        graph.recompile()
    return graph


def _put(node: Node, value: float) -> None:
    """Let every user of a node have a number in its place."""

    def number(used: Node) -> Any:
        return value if used is node else used

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, number), map_arg(user.kwargs, number)


def wrapped_floats(graph: GraphModule) -> frozenset[int]:
    """The inputs that are floats of Python which Dynamo hands over as tensors. It tells while it compiles only."""
    places = enumerate(graph.graph.find_nodes(op="placeholder"))
    return frozenset(n for n, node in places if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


def without_unused_inputs(form: Form, program: Program) -> tuple[Form, Callable[[Sequence[Any]], tuple[Any, ...]]]:
    """The form without the model's inputs that it does not use, and what picks the others from a call's inputs."""
    by_name = {name: number for number, name in enumerate(program.inputs)}
    numbers: list[int] = []
    constants: list[tuple[int, Any]] = []
    for node in [node for node in form.module.graph.nodes if node.op == "placeholder"]:
        if node.name in program.state:
            if node.users:
                constants.append((len(numbers) + len(constants), program.state[node.name]))
            else:
                form.module.graph.erase_node(node)
        elif node.name in by_name:
            if node.users:
                numbers.append(by_name[node.name])
            else:
                form.module.graph.erase_node(node)
    form.module.recompile()
    return form, _picker(numbers, constants)


def _picker(numbers: list[int], constants: list[tuple[int, Any]]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if not numbers:
        fixed = tuple(value for _, value in constants)
        return lambda inputs: fixed
    take = operator.itemgetter(*numbers)
    if constants:

        def pick(inputs: Sequence[Any]) -> tuple[Any, ...]:
            values = [inputs[number] for number in numbers]
            for place, value in constants:
                values.insert(place, value)
            return tuple(values)

        return pick
    return take if len(numbers) > 1 else lambda inputs: (take(inputs),)


def stays_in_memory(form: Form, program: Program) -> list[bool]:
    """Which inputs of a form are weights or its cache, or what else is kept for a branch."""
    placeholders = form.module.graph.find_nodes(op="placeholder")
    num_others = len(placeholders) - len(form.reads)
    return [
        number >= num_others or is_state(node.name) or is_unchanging(node.name) or node.name in program.state
        for number, node in enumerate(placeholders)
    ]


def is_condition(name: str, value: Any) -> bool:
    """Text states, control latents, pooled embeddings: a tensor that may tell branches of guidance apart."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or is_state(name):
        return False
    return value.ndim >= 2 and value.dtype != torch.bool
