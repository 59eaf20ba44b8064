"""Adapters and quantised weights, as peft and torchao put them into a model: cached too, and never stale."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from backend_checks import TOLERANCE, check, compiled, expected, max_error, plan_of, run
from models import call, wan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile import StepKind
from hetcache_compile.runtime.session import HetCacheWarning

peft = pytest.importorskip("peft")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.usefixtures("fresh", "strict")

LORA = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
QUANTISED = {
    "weights": (quantization.Int8WeightOnlyConfig, TOLERANCE),
    "weights and activations": (quantization.Int8DynamicActivationInt8WeightConfig, 0.05),
}
"""How a model is quantised, and how far results may be apart: an activation between two of 255 steps, of an output
whose largest are about 10, may be rounded either way."""


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


@pytest.mark.parametrize(("config", "tolerance"), QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_model(config: type, tolerance: float) -> None:
    """Its forms are those that `rewrite` makes, and it is FULL again when its weights are quantised anew."""
    model, steps = wan(num_layers=1), "FPRRR"
    quantization.quantize_(model, config())
    fast, plan = compiled(model), plan_of(steps)
    calls = [call(model, seed=seed) for seed in range(len(steps))]
    with hetcache.session(plan) as session:
        outputs = run(fast, calls[:3])
        want = expected(hetcache.rewrite(model, plan, (), calls[0]), steps[:3], calls[:3])
        other = wan(seed=1, num_layers=1)
        quantization.quantize_(other, config())
        model.load_state_dict(other.state_dict())
        check(run(fast, calls[3:4]), run(other, calls[3:4]))
        run(fast, calls[4:])
    assert max(map(max_error, outputs, want)) <= tolerance
    assert max_error(outputs[1], run(other, calls[1:2])[0]) > 20 * tolerance
    assert session.stats.kinds == [*StepKind, StepKind.FULL, StepKind.REUSE]


def test_quantised_in_an_edit() -> None:
    model = wan(num_layers=1)
    fast, calls = compiled(model), [call(model, seed=seed) for seed in range(4)]
    with hetcache.session(plan_of("FRRR")) as session:
        run(fast, calls[:2])
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        check(run(fast, calls[2:3]), run(model, calls[2:3]))
        run(fast, calls[3:])
    assert "".join(kind.letter for kind in session.stats.kinds) == "FRFR"
