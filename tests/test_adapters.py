"""Adapters and quantised weights in a model: cached too, and never stale."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backend_checks import check, compiled, expected, plan_of, run, tiny_calls
from models import TinyDiT, call, wan
from torch import nn
from torch.fx import GraphModule

import hetcache_compile as hetcache
from hetcache_compile import StepKind
from hetcache_compile.capture.subclasses import PutTogether, Unwrapping
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.passes.ir.regions import regions_of

peft = pytest.importorskip("peft")
aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("fresh", "strict")

LORA = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)


class Int8(torch.Tensor):
    """A weight `[out, in]` of int8 with a scale for each row: a subclass that holds two tensors, like torchao's."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: object) -> Int8:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            states, weight, *bias = args
            return func(states, weight.codes * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        assert func is aten.detach.default, func
        return cls(args[0].codes.detach(), args[0].scale.detach())


def quantise(model: nn.Module, *, plainly: bool = False) -> None:
    """Put `Int8` into every linear layer of the blocks, or plain tensors of the same values."""
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            weight = Int8.of(module.weight.detach())
            module.weight = nn.Parameter(weight.codes * weight.scale if plainly else weight, requires_grad=False)


LIBRARY = torch.library.Library("hetcache_tests", "DEF")
LIBRARY.define("halved(Tensor x, Tensor scale) -> Tensor")
LIBRARY.impl("halved", lambda x, scale: torch.minimum(x * scale, x.abs()) * 0.5, "CompositeImplicitAutograd")


class Halving(TinyDiT):
    """Calls a composite operator of another library on its tokens."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        scale = latents.abs().amax(dim=1, keepdim=True)
        return super().forward(torch.ops.hetcache_tests.halved(latents, scale), text)


@pytest.fixture(autouse=True)
def said_nothing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HetCacheWarning)
        yield


CHANGES: list[Callable[[nn.Module], object]] = [
    lambda model: model.add_adapter(LORA),
    lambda model: model.set_adapters("default", 0.3),
    lambda model: model.fuse_lora(),
    lambda model: model.unload_lora(),
]


@pytest.mark.wide
def test_adapters_that_change_in_an_edit() -> None:
    """Each change makes the call after it FULL, on the new weights; the calls between are those of the plan."""
    model = wan(num_layers=1)
    fast, steps = compiled(model), "F" + "RR" * len(CHANGES)
    calls = [call(model, seed=seed) for seed in range(len(steps))]
    plain = []
    with hetcache.session(plan_of(steps)) as session:
        run(fast, calls[:1])
        for number, change in enumerate(CHANGES):
            change(model)
            after = calls[1 + 2 * number : 3 + 2 * number]
            output, _ = run(fast, after)
            plain.append(run(model, after[:1])[0])
            check([output], plain[-1:])
    assert "".join(kind.letter for kind in session.stats.kinds) == "F" + "FR" * len(CHANGES)
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(plain))


def test_a_quantised_model() -> None:
    """Its steps are those of a model with the same values, and it is FULL again when its weights are written to."""
    model, plain, other = wan(num_layers=1), wan(num_layers=1), wan(seed=1, num_layers=1)
    quantise(model)
    quantise(plain, plainly=True)
    quantise(other)
    fast, plan, steps = compiled(model), plan_of("FPRRR"), "FPR"
    calls = [call(model, seed=seed) for seed in range(5)]
    with hetcache.session(plan) as session:
        outputs = run(fast, calls[:3])
        weights = {name: value for name, value in other.state_dict().items() if isinstance(value, Int8)}
        model.load_state_dict(weights, strict=False)
        check(run(fast, calls[3:4]), run(model, calls[3:4]))
        run(fast, calls[4:])
    check(outputs, expected(hetcache.rewrite(plain, plan, (), calls[0]), steps, calls[:3]))
    assert session.stats.kinds == [*StepKind, StepKind.FULL, StepKind.REUSE]


def test_quantised_in_an_edit() -> None:
    model = wan(num_layers=1)
    fast, calls = compiled(model), [call(model, seed=seed) for seed in range(4)]
    with hetcache.session(plan_of("FRRR")) as session:
        run(fast, calls[:2])
        quantise(model)
        check(run(fast, calls[2:3]), run(model, calls[2:3]))
        run(fast, calls[3:])
    assert "".join(kind.letter for kind in session.stats.kinds) == "FRFR"


def test_weights_of_blocks_that_are_alike_are_put_together_alike() -> None:
    """Only then blocks are found to repeat, and are captured and compiled once."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> GraphModule:
        graphs.append(graph)
        return graph

    model = wan(num_layers=4)
    quantise(model)
    torch.compile(model, backend=keep)(**call(model, seed=0))
    plain = Unwrapping(graphs[0]).graph.graph
    together = [node.target for node in plain.nodes if isinstance(node.target, PutTogether)]
    assert len(together) == 4 * 10
    assert len(set(together)) == 3
    regions = regions_of(plain, lambda node: node.meta.get("example_value"), reorder=False)
    assert len({region.key for region in regions}) < len(regions)


def test_composite_operators_of_other_libraries() -> None:
    """Captured as the operators of ATen that they consist of."""
    model, plan, calls = Halving(), plan_of("FPR"), tiny_calls("FPR")
    with hetcache.session(plan, strict=True):
        outputs = run(compiled(model), calls)
    forms = hetcache.rewrite(model, plan, (), calls[0])
    check(outputs, expected(forms, "FPR", calls))
    assert not any("hetcache_tests" in str(node.target) for node in forms.program.module.graph.nodes)
