"""Quantised weights of a class of their own: GGUF as diffusers loads it, and what bitsandbytes is made of.

bitsandbytes is 43 MB, of which most are kernels for GPUs: `Nf4` and `int8` here have its structure, on operators of
our own. `benchmarks/quantised.py` runs the library itself. torchao's weights are in `test_adapters.py`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_checks import check, compiled, expected, frozen_calls, ignoring_time, max_error, plan_of, run
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from models import call, wan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile import StepKind
from hetcache_compile.capture.rewrite import Forms
from hetcache_compile.errors import HetCacheWarning, SessionError
from hetcache_compile.passes.analysis.flops import graph_flops
from hetcache_compile.passes.analysis.inputs import is_held, is_state
from hetcache_compile.passes.rules import quantised
from hetcache_compile.passes.testing.oracle import SIZES, OpCall, RefusedError, Sizes, T, Trace, check_rows
from hetcache_compile.passes.testing.oracle import call as op_call

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("fresh", "strict")

CONFIG = {"num_layers": 1, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
"""Every linear layer takes a multiple of 32 numbers: a block of GGUF's."""
LINEAR = nn.functional.linear
LIBRARY = torch.library.Library("hetcache_quantised", "DEF")
LIBRARY.define("product(Tensor x, Tensor weight, Tensor scales, Tensor? bias=None) -> Tensor")
LIBRARY.define("quantise_rows(Tensor x, float threshold=0.0) -> (Tensor, Tensor, Tensor?)")
LIBRARY.define("scaled_product(Tensor x, Tensor weight, Tensor rows, Tensor columns, Tensor? bias=None) -> Tensor")
OPS = torch.ops.hetcache_quantised


def quantise_rows(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, None]:
    scales = x.abs().amax(dim=-1, keepdim=True)
    return (x * (127 / scales)).round().to(torch.int8), scales.flatten(), None


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product = x.to(rows.dtype) @ weight.to(rows.dtype).t()
    scaled = product * (rows.reshape(*x.shape[:-1], 1) * columns / 127**2)
    return scaled if bias is None else scaled + bias


LIBRARY.impl("product", lambda x, weight, scales, bias=None: LINEAR(x, weight * scales, bias), "CPU")
LIBRARY.impl("quantise_rows", quantise_rows, "CPU")
LIBRARY.impl("scaled_product", scaled_product, "CPU")
torch.library.register_fake("hetcache_quantised::product", lambda x, w, s, b=None: x.new_empty(*x.shape[:-1], len(w)))
torch.library.register_fake("hetcache_quantised::quantise_rows", quantise_rows)
torch.library.register_fake("hetcache_quantised::scaled_product", scaled_product)
RULES = {
    OPS.product.default: quantised.product,
    OPS.quantise_rows.default: quantised.quantise_rows,
    OPS.scaled_product.default: quantised.scaled_product,
}


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our operators have rules by their names, as those of bitsandbytes have; nothing is said in a session."""
    for op, rule in RULES.items():
        monkeypatch.setitem(quantised.NAMED, op.name(), rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HetCacheWarning)
        yield


class Packed(nn.Parameter):
    """A parameter with attributes, like bitsandbytes' `Params4bit` and `Int8Params`."""

    scales: torch.Tensor

    def __new__(cls, weight: torch.Tensor) -> Packed:
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        made = torch.Tensor._make_subclass(cls, (weight / scales).round().to(torch.int8))
        made.scales = scales
        return made


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return OPS.product(x, weight, weight.scales, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ (ctx.weight * ctx.weight.scales), None, grads[0].sum(dim=(0, 1))


class Nf4(nn.Module):
    """Like `Linear4bit`: one operator takes the tokens, the packed weight, and what hangs on it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = Packed(linear.weight.detach()), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.weight, Packed)
        if torch.is_grad_enabled():
            return Multiply.apply(x, self.weight, self.bias)
        return OPS.product(x, self.weight, self.weight.scales, self.bias)


class Int8(Nf4):
    """Like `Linear8bitLt` without a threshold: tokens of a whole batch are quantised row by row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scales, _ = OPS.quantise_rows(x.reshape(-1, x.shape[-1]))
        made = OPS.scaled_product(rows, self.weight, scales, 127 * self.weight.scales.flatten(), self.bias)
        return made.reshape(*x.shape[:-1], -1)


def with_layers(layer: Callable[[nn.Linear], nn.Module]) -> WanTransformer3DModel:
    """A model with another kind of linear layer in its blocks, which ignores the time."""
    model = ignoring_time(wan(**CONFIG))
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child))
    return model


def from_gguf(model: WanTransformer3DModel, folder: Path, kind: str) -> WanTransformer3DModel:
    """The model as diffusers loads it from a GGUF file with quantised linear layers."""
    number = gguf.GGMLQuantizationType[kind]
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    writer = gguf.GGUFWriter(folder / "model.gguf", "wan")
    for name, tensor in model.state_dict().items():
        if name in linear:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(folder)
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return WanTransformer3DModel.from_single_file(
        str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=torch.float32
    )


def check_all(outputs: list[torch.Tensor], truth: torch.Tensor, tolerance: float) -> None:
    assert max(max_error(output.detach(), truth) for output in outputs) <= tolerance


@torch.no_grad()
def check_forms(forms: Forms, model: nn.Module, kwargs: dict[str, Any]) -> None:
    """A FULL step is the model; PARTIAL and REUSE steps on the same inputs repeat it."""
    truth = run(model, [kwargs])
    check(expected(forms, "FPR", [kwargs] * 3), truth * 3)


@pytest.mark.wide
@torch.no_grad()
def test_gguf(tmp_path: Path) -> None:
    """Exact on frozen inputs, in a session and as forms; FULL again when its weights are written to."""
    model = ignoring_time(from_gguf(wan(**CONFIG), tmp_path, "Q4_0"))
    fast, plan, calls = compiled(model), plan_of("FPRRR"), frozen_calls(call(model, seed=0), 5)
    truth = run(model, calls[:1])
    check_forms(hetcache.rewrite(model, plan, (), calls[0]), model, calls[0])
    with hetcache.session(plan) as session:
        outputs = run(fast, calls[:3])
        model.blocks[0].attn1.to_q.weight.copy_(model.blocks[0].attn1.to_k.weight)
        changed = run(model, calls[3:4])
        check(run(fast, calls[3:]), changed * 2)
    check(outputs, truth * 3)
    assert not torch.equal(truth[0], changed[0])
    assert all(type(output) is torch.Tensor for output in outputs)
    assert session.stats.kinds == [*StepKind, StepKind.FULL, StepKind.REUSE]


@pytest.mark.parametrize(
    "grad", [pytest.param(False, id="no_grad"), pytest.param(True, id="grad", marks=pytest.mark.wide)]
)
@pytest.mark.parametrize(("layer", "tolerance"), [(Nf4, 1e-5), (Int8, 0.03)])
def test_weights_with_attributes(layer: type[Nf4], tolerance: float, grad: bool) -> None:
    """Right on frozen inputs, also where Dynamo writes down how to go backwards; and never stale.

    The last bit of a number in fp32 may be another one in a smaller product, and tip the rounding of one in int8. That
    rules are exact shows `test_rules`.
    """
    model = with_layers(layer)
    calls = frozen_calls(call(model, seed=0, batch=2), 5)
    with hetcache.session(plan_of("FPRRR")) as session, torch.set_grad_enabled(grad):
        fast = compiled(model)
        check_all(run(fast, calls[:3]), run(model, calls[:1])[0], tolerance)
        model.blocks[0].attn1.to_q.weight.scales.mul_(2)
        check_all(run(fast, calls[3:]), run(model, calls[3:4])[0], 1e-5)
    assert session.stats.kinds == [*StepKind, StepKind.FULL, StepKind.REUSE]


def test_forms_of_weights_with_attributes() -> None:
    model = with_layers(Nf4)
    kwargs, plan = call(model, seed=0), plan_of("FPR")
    forms = hetcache.rewrite(model, plan, (), kwargs)
    assert "blocks.0.attn1.to_q.weight" in forms.program.targets.values()
    check_forms(forms, model, kwargs)
    positional = {name: kwargs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")}
    again = hetcache.rewrite(model, plan, tuple(positional.values()), {"return_dict": False})
    output, _ = again.full(*positional.values(), return_dict=False)
    check([output[0]], run(model, [kwargs]))
    linear = model.blocks[0].attn1.to_q
    linear.weight = Packed(torch.randn_like(linear.weight, dtype=torch.float32))
    with pytest.raises(SessionError, match=r"attn1.to_q.weight .* rewrite the model anew"):
        forms.full(**kwargs)


class Cut(Nf4):
    """What `torch.compile` cannot look through, as bitsandbytes with a threshold for outliers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_model_that_dynamo_cuts_is_refused() -> None:
    model = with_layers(Cut)
    with pytest.raises(hetcache.UnsupportedGraphError, match="Dynamo cannot capture it"):
        hetcache.rewrite(model, plan_of("FPR"), (), call(model, seed=0))


def test_products_count() -> None:
    """A plan's speed is estimated from FLOPs: those of a product with quantised weights are those of a linear layer."""
    model, plain = with_layers(Nf4), wan(**CONFIG)
    kwargs, plan = call(model, seed=0), plan_of("FPR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hetcache_compile.passes.analysis.flops.PRODUCTS", ("hetcache_quantised::product",))
        quantised_flops = graph_flops(hetcache.rewrite(model, plan, (), kwargs).program.module)
    assert quantised_flops == graph_flops(hetcache.rewrite(plain, plan, (), kwargs).program.module)


def rows_of(x: T) -> OpCall:
    return op_call(OPS.quantise_rows.default, x)


def scaled(x: T, weight: str = "kd") -> OpCall:
    rows = rows_of(x)
    parts = [op_call(operator.getitem, rows, number) for number in range(2)]
    return op_call(OPS.scaled_product.default, parts[0], T(weight), parts[1], T(weight[0]), T(weight[0]))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "whole",
    [
        *(op_call(OPS.product.default, T(x), T("kd"), T("k1"), T("k")) for x in ("nd", "bnd", "nbd", "bd")),
        *(scaled(T(x)) for x in ("nd", "bnd", "nbd", "bd")),
    ],
    ids=str,
)
def test_rules(whole: OpCall, sizes: Sizes) -> None:
    check_rows(whole, sizes)


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (op_call(OPS.product.default, T("dn"), T("kn"), T("k1")), "its weight carries the token axis"),
        (op_call(OPS.product.default, T("dn"), T("kN"), T("k1")), "it contracts the token axis"),
        (op_call(OPS.quantise_rows.default, T("dn")), "it scales over the token axis"),
        (op_call(OPS.quantise_rows.default, T("nd"), 6.0), "the outliers of one token change every other one"),
        (op_call(OPS.scaled_product.default, T("nd"), T("kd"), T("N"), T("k")), "different token axes"),
        (op_call(OPS.scaled_product.default, T("bd"), T("nd"), T("b"), T("n")), "its weight carries the token axis"),
        (op_call(OPS.scaled_product.default, T("bn"), T("kN"), T("b"), T("k")), "it contracts the token axis"),
    ],
    ids=str,
)
def test_rules_refuse(whole: OpCall, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        Trace(whole, SIZES["primes"])


@pytest.mark.parametrize(
    ("name", "state", "held"),
    [
        ("l_kwargs_hidden_states_", False, False),
        ("l_self_modules_rope_buffers_freqs_", True, False),
        ("l_self_dict_modules_a_parameters_weight_", True, True),
        ("l_self_dict_modules_a_parameters_weight_quant_state_absmax", True, True),
        ("l_self_modules_a_modules_to_q_state_cb", True, True),
    ],
)
def test_what_a_module_holds(name: str, state: bool, held: bool) -> None:
    assert (is_state(name), is_held(name)) == (state, held)
