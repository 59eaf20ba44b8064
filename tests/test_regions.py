"""What repeats in a graph is found, captured once and compiled once, and nothing else changes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backend_checks import CountingInner, compiled, plan_of
from models import call, vace
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import hetcache_compile as hetcache
from hetcache_compile.capture.capture import Program, capture
from hetcache_compile.capture.regional import capture_by_regions
from hetcache_compile.compilation.options import BackendOptions
from hetcache_compile.compilation.regional import Chain, compile_by_regions, compile_whole
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.passes.ir.form import Form
from hetcache_compile.passes.ir.regions import arranged, regions_of

aten = torch.ops.aten
KINDS = ["full", "partial", "reuse"]


def deep(layers: int) -> Any:
    return vace(num_layers=layers, vace_layers=tuple(range(0, layers, 2)))


@pytest.fixture(scope="module")
def forms() -> dict[int, hetcache.Forms]:
    """Of models of two depths, with predictions, so that forms read and overwrite caches."""
    plan = plan_of("FPR", num_context=70)
    found = {}
    for layers in (4, 8):
        model = deep(layers)
        found[layers] = hetcache.rewrite(model, plan, kwargs=call(model))
    return found


def ready(forms: hetcache.Forms, kind: str, seed: int = 0) -> tuple[Form, list[Any]]:
    """A form as it runs in a process, and inputs for it."""
    form = in_process(forms.by_kind[kind], forms.plan.form_options)
    torch.manual_seed(seed)
    cache = [torch.randn(entry.shape).to(entry.dtype) for entry in form.reads]
    indices = [torch.as_tensor(getattr(forms.plan, name)) for name in form.indices]
    assert forms.model is not None
    return form, [*forms.program.flat_inputs((), call(forms.model)), *indices, *cache]


def value_of(node: Any) -> Any:
    return node.meta.get("val")


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether tensors are bit for bit equal, and other values equal."""
    return len(found) == len(expected) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_distinct_regions_do_not_grow_with_depth(forms: dict[int, hetcache.Forms], kind: str) -> None:
    distinct = {}
    for layers, of_depth in forms.items():
        graph = ready(of_depth, kind)[0].module.graph
        regions = regions_of(graph, value_of)
        assert sum(len(region.nodes) for region in regions) == len(graph.nodes) - 1 - len(
            graph.find_nodes(op="placeholder")
        )
        distinct[layers] = sum(len(nodes) for nodes in {region.key: region.nodes for region in regions}.values())
    further_control_blocks = 2  # each takes its scale out of one tensor, before all blocks
    assert distinct[8] - distinct[4] == (0 if kind == "reuse" else further_control_blocks)
    if kind != "reuse":
        assert distinct[8] < 0.4 * len(ready(forms[8], kind)[0].module.graph.nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_the_form_bit_for_bit(forms: dict[int, hetcache.Forms], kind: str) -> None:
    form, inputs = ready(forms[8], kind)
    _, given = ready(forms[8], kind)
    inner = CountingInner()
    run = compile_by_regions(form.module, inputs, inner)
    assert isinstance(run, Chain) == (kind != "reuse")
    assert inner.graphs <= 6
    expected = form.module(*inputs)
    found = run(*given)
    assert same(found, expected)
    assert same(given, inputs), "the same stores into the cache"


@torch.no_grad()
def test_values_go_when_nothing_needs_them(forms: dict[int, hetcache.Forms]) -> None:
    form, inputs = ready(forms[8], "full")
    alive: list[list[weakref.ref[torch.Tensor]]] = []
    most = 0

    def inner(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal most
            most = max(most, sum(any(one() is not None for one in given) for given in alive))
            results = graph(*args)
            alive.append([weakref.ref(result) for result in results])
            return results

        return run

    run = compile_by_regions(form.module, inputs, inner)
    run(*inputs)
    # What control blocks hand to the others, what comes before all blocks, and the last two regions.
    assert most <= 4 + 1 + 2 < len(alive)


@pytest.mark.parametrize("view", [False, True])
def test_a_store_waits_for_all_that_read_what_it_overwrites(view: bool) -> None:
    graph = Graph()
    buffer, new = graph.placeholder("buffer"), graph.placeholder("new")
    old = graph.call_function(aten.view.default, (buffer, [2, 3])) if view else buffer
    doubled = graph.call_function(aten.mul.Tensor, (new, 2.0))
    total = graph.call_function(aten.sum.default, (old,))
    shared = graph.call_function(aten.add.Tensor, (doubled, total))
    for _ in range(12):
        shared = graph.call_function(aten.add.Tensor, (shared, total))
    graph.call_function(aten.copy_.default, (buffer, doubled))
    graph.output((shared,))
    module = GraphModule(nn.Module(), graph)
    order = [node.name for node in arranged([node for node in graph.nodes if node.op == "call_function"])]
    assert order.index("copy__default") == order.index("sum_default") + 1, "at once behind the last that reads"
    expected_buffer, found_buffer = torch.arange(6.0).view(6), torch.arange(6.0).view(6)
    expected = module(expected_buffer, torch.ones(6))
    moved = Graph()
    names: dict[Any, Any] = {}
    for node in [*graph.find_nodes(op="placeholder"), *arranged([n for n in graph.nodes if n.op == "call_function"])]:
        names[node] = moved.node_copy(node, names.__getitem__)
    moved.output((names[shared],))
    found = Interpreter(GraphModule(nn.Module(), moved)).run(found_buffer, torch.ones(6))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found_buffer, expected_buffer)


# Capture


@pytest.fixture
def programs(fresh: None) -> Callable[[nn.Module, dict[str, Any]], tuple[Program, Program | None]]:
    """Captures a model as a whole and by regions, of the graph that Dynamo makes of it."""

    def both(model: nn.Module, kwargs: dict[str, Any]) -> tuple[Program, Program | None]:
        found: list[tuple[Program, Program | None]] = []

        def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
            found.append((capture(graph, tuple(inputs), {}), capture_by_regions(graph)))
            return graph

        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(**kwargs)
        return found[0]

    return both


@pytest.mark.wide
def test_capture_by_regions_is_capture(programs: Any) -> None:
    model = deep(6)
    kwargs = call(model)
    whole, regional = programs(model, kwargs)
    assert regional is not None

    def operators(program: Program) -> Counter[str]:
        return Counter(str(n.target) for n in program.module.graph.nodes if n.op == "call_function")

    assert operators(regional) == operators(whole)
    assert len(regional.inputs) == len(whole.inputs)
    assert not regional.state
    blocks = {
        str(list(node.meta["nn_module_stack"].values())[-1][0])
        for node in regional.module.graph.nodes
        if node.target is aten.scaled_dot_product_attention.default
    }
    assert len(blocks) == 2 * (6 + 3), "every attention is traced to its own block"


class StoresAcrossBlocks(nn.Module):
    """A block writes into a tensor that another one made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = torch.sin(layer(x)).cos().exp().tanh() + x
            total += x
        return total


def test_blocks_that_store_into_each_others_tensors_are_captured_whole(programs: Any) -> None:
    whole, regional = programs(StoresAcrossBlocks(), {"x": torch.ones(2, 8)})
    assert regional is None
    assert whole.module.graph.find_nodes(op="call_function", target=aten.linear.default)


# The backend


@pytest.mark.wide
def test_a_deep_model_in_a_session(fresh: None) -> None:
    """With regions and without: the same bits, and few graphs are compiled."""
    model = deep(5)
    kwargs = call(model)
    plan = plan_of("FPRPF")
    times = [kwargs["timestep"] - step for step in range(5)]
    outputs = {}
    counts = {}
    for regional in (True, False):
        torch._dynamo.reset()
        inner = CountingInner()
        fast = torch.compile(model, backend="hetcache", options={"inner": inner, "regional": regional})
        with torch.no_grad(), hetcache.session(plan, strict=True):
            outputs[regional] = [fast(**{**kwargs, "timestep": time})[0] for time in times]
        counts[regional] = inner.graphs
    assert all(torch.equal(a, b) for a, b in zip(outputs[True], outputs[False], strict=True))
    assert counts[False] == 3
    assert counts[True] <= 2 * 6 + 1


def test_what_is_rare_runs_as_it_is_written() -> None:
    graph = Graph()
    x = graph.call_function(aten.cos.default, (graph.placeholder("x"),))
    for _ in range(20):
        for _ in range(6):
            x = graph.call_function(aten.sin.default, (graph.call_function(aten.mul.Tensor, (x, 1.5)),))
    graph.output((graph.call_function(aten.exp.default, (x,)),))
    inputs = [torch.randn(3, 5)]
    module = with_values(GraphModule(nn.Module(), graph), inputs)
    compiled_operators = Counter[str]()

    def inner(part: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        compiled_operators.update(str(node.target) for node in part.graph.nodes if node.op == "call_function")
        return part

    run = compile_by_regions(module, inputs, inner)
    assert isinstance(run, Chain)
    assert set(compiled_operators) == {"aten.sin.default", "aten.mul.Tensor"}
    assert same(run(*inputs), module(*inputs))


def test_inductor_is_given_fixed_sizes() -> None:
    """Of real tensors it would make every size a symbol, and write its kernels for all sizes."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((graph.call_function(aten.mm.default, (x, w)),))
    inputs = [torch.randn(3, 5), nn.Parameter(torch.randn(5, 7))]
    sizes: list[Any] = []

    def look(given: Graph) -> None:
        sizes.extend(size for node in given.nodes if node.op == "placeholder" for size in node.meta["val"].shape)

    compiler = BackendOptions("inductor", inner_options={"post_grad_custom_pre_pass": look}).compiler()
    module = with_values(GraphModule(nn.Module(), graph), inputs)
    with torch.no_grad():
        run = compile_whole(module, inputs, compiler)
        torch.testing.assert_close(run(*inputs)[0], inputs[0] @ inputs[1])
    assert [type(size) for size in sizes] == [int] * 4


def with_values(module: GraphModule, inputs: Sequence[torch.Tensor]) -> GraphModule:
    """A graph whose nodes have fake values."""
    mode = torch._subclasses.FakeTensorMode()
    FakeTensorProp(module, mode).propagate(*inputs)
    return module


@pytest.mark.wide
@pytest.mark.parametrize("compile_form", [compile_by_regions, compile_whole])
def test_torchs_caches_hit(compile_form: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process compiles nothing; here, a second time with Inductor's memory of the first on disk only."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(30):
        x = graph.call_function(aten.sin.default, (graph.call_function(aten.mul.Tensor, (x, 1.5)),))
    graph.output((x,))
    inputs = [torch.randn(3, 5)]
    hits = []
    for _ in range(2):
        module = with_values(GraphModule(nn.Module(), graph), inputs)
        counters.clear()
        with torch.no_grad():
            run = compile_form(module, inputs, BackendOptions("inductor").compiler())
            torch.testing.assert_close(run(*inputs)[0], module(*inputs)[0])
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits[0] == 0
    assert hits[1] >= 1


@pytest.mark.wide
def test_an_inner_compiler_that_fails_on_a_block_leaves_the_plain_model(fresh: None) -> None:
    model = deep(4)
    kwargs = call(model)

    def inner(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        if len(graph.graph.nodes) < 400 and not graph.graph.find_nodes(op="call_module"):
            raise RuntimeError("no such kernel")
        return graph

    fast = compiled(model, inner)
    with torch.no_grad():
        expected = model(**kwargs)[0]
        with pytest.warns(hetcache.HetCacheWarning), hetcache.session(plan_of("FP")):
            assert torch.allclose(fast(**kwargs)[0], expected, atol=1e-6)
