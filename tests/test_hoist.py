"""Keys and values of the text: made once for a branch, by value what each call would make, and anew where they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import N, check, compiled, expected, max_error, plan_of, run, tiny_calls
from models import GRID, TinyDiT, call, tiny_call, wan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture.rewrite import hoisted
from hetcache_compile.runtime.unchanging import Unchanging


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys and values were made, each time."""
    found: list[int] = []
    init = Unchanging.__init__

    def counting(self: Unchanging, *args: Any) -> None:
        init(self, *args)
        make = self._make

        def counted(*inputs: torch.Tensor) -> Any:
            found.append(len(self._names))
            return make(*inputs)

        self._make = counted  # type: ignore[assignment]

    monkeypatch.setattr(Unchanging, "__init__", counting)
    torch._dynamo.reset()
    return found


def test_a_graph_in_two() -> None:
    """What is hoisted, and the rest on it, give together what the whole gives."""
    model = wan()
    given = call(model)
    forms = hetcache.rewrite(model, plan_of("F"), (), given)
    parts = hoisted(forms.program, forms.analysis, None)
    assert parts is not None
    names = [node.name for node in forms.program.module.graph.find_nodes(op="placeholder")]
    inputs = dict(zip(names, forms.program.flat_inputs((), given), strict=True))
    unchanging = parts.graphs.before(*(inputs[name] for name in parts.graphs.takes))
    assert len(unchanging) == 2 * model.config.num_layers  # keys and values of each block
    assert sum(one.nbytes for one in unchanging) == parts.graphs.num_bytes == forms.unchanging_bytes > 0
    assert torch.equal(parts.program.module(*inputs.values(), *unchanging)[0], model(**given)[0])


@pytest.mark.parametrize("same", [True, False], ids=["one tensor", "equal ones"])
def test_made_once_for_a_branch(made: list[int], same: bool) -> None:
    model, plan = wan(), plan_of("FPRPF")
    calls = [[call(model, seed=50 * branch + step) for step in range(5)] for branch in range(2)]
    if same:
        for branch in calls:
            for one in branch:
                one["encoder_hidden_states"] = branch[0]["encoder_hidden_states"]
    fast, outputs = compiled(model), [list[torch.Tensor](), list[torch.Tensor]()]
    with hetcache.session(plan, strict=True) as session:
        for step in range(5):
            for branch, held in zip(calls, outputs, strict=True):
                held += run(fast, [branch[step]])
    assert len(made) == 2
    forms = hetcache.rewrite(model, plan, (), calls[0][0])
    for branch, held in zip(calls, outputs, strict=True):
        check(held, expected(forms, "FPRPF", branch))
    assert session.stats.cache_bytes == 2 * forms.buffer_bytes


def test_made_again_in_the_next_edit_in_the_same_memory(made: list[int]) -> None:
    """A CUDA graph reads there."""
    model, plan = TinyDiT(), plan_of("FP")
    forms, fast = hetcache.rewrite(model, plan, (), tiny_call(0)), compiled(model)
    with hetcache.session(plan, strict=True) as session:
        places = []
        for first in (0, 50):
            calls = tiny_calls("FP", first)
            check(run(fast, calls), expected(forms, "FP", calls))
            (branch,) = next(iter(session._models.values())).branches()
            places.append({name: one.data_ptr() for name, one in branch._memory.items()})
    assert places[0] == places[1]
    assert len(made) == 2


@pytest.mark.parametrize("how", ["in place", "another tensor", "in place, inference mode"])
def test_a_text_that_changes_midway(made: list[int], how: str) -> None:
    """In calls that have a name nothing else looks at it."""
    model, plan = TinyDiT(), plan_of("FPPP")
    calls = tiny_calls("FPPP")
    other = torch.randn(calls[0]["text"].shape, generator=torch.Generator().manual_seed(1))
    truths = [{**one, "text": calls[0]["text"] if step < 2 else other} for step, one in enumerate(calls)]
    fast, outputs = compiled(model), []
    with torch.inference_mode("inference" in how), hetcache.session(plan, strict=True) as session:
        text = calls[0]["text"].clone()
        assert text.is_inference() == ("inference" in how)
        for step, one in enumerate(calls):
            if step == 2:
                text = text.copy_(other) if how.startswith("in place") else other
            with session.branch("cond"):
                outputs += run(fast, [{**one, "text": text}])
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPPP", truths))
    assert len(made) == 2


def test_weights_that_change_midway(made: list[int]) -> None:
    """Such as a LoRA that is fused: the step is FULL, and its text is another one."""
    model, plan = TinyDiT(), plan_of("FPPP")
    calls, fast = tiny_calls("FPPP"), compiled(model)
    with hetcache.session(plan) as session:
        outputs = run(fast, calls[:2])
        with torch.no_grad():
            model.embed_text.weight.mul_(1.5)
        after = run(fast, calls[2:])
    assert [kind.letter for kind in session.stats.kinds] == ["F", "P", "F", "P"]
    assert len(made) == 2
    check(after, expected(hetcache.rewrite(model, plan, (), calls[2]), "FP", calls[2:]))
    assert max_error(outputs[1], model(**calls[1])) > 1e-3


class Modulated(TinyDiT):
    """Its text is another one at each time."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, text * timestep.view(-1, 1, 1) / 1000)


class Noisy(TinyDiT):
    """Its text is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_text = nn.Sequential(nn.Dropout(0.5), self.embed_text)


def test_what_is_not_hoisted(made: list[int]) -> None:
    """What the time goes into; random numbers; where keys and values are on the host; a batch of several masks."""
    calls = [{**one, "timestep": torch.tensor([900.0 - 100 * step])} for step, one in enumerate(tiny_calls("FP"))]
    model: nn.Module = Modulated()
    with hetcache.session(plan_of("FP"), strict=True):
        run(compiled(model), calls)
    host = replace(plan_of("FP"), cache_device="cpu")
    forms = hetcache.rewrite(TinyDiT(), host, (), tiny_call(0))
    assert forms.unchanging_bytes == 0
    for plans in (host, [plan_of("FP", seed=seed) for seed in range(2)]):
        with hetcache.session(plans, strict=True):
            run(compiled(TinyDiT()), tiny_calls("FP", batch=2))
    noisy = Noisy().train()
    program = hetcache.rewrite(noisy, plan_of("F"), (), tiny_call(0))
    assert hoisted(program.program, program.analysis, None) is None
    assert not made


def test_a_text_as_long_as_the_latents(made: list[int]) -> None:
    model, plan = TinyDiT(), plan_of("FPF")
    calls = tiny_calls("FPF", text_tokens=N)
    with hetcache.session(plan, strict=True):
        outputs = run(compiled(model), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPF", calls))


def test_autocast(made: list[int]) -> None:
    """The text is cast as in the call."""
    model, plan = TinyDiT(), plan_of("F")
    (given,) = tiny_calls("F")
    fast = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        truth = model(**given)
        with hetcache.session(plan, strict=True):
            output = fast(**given)
    assert len(made) == 1
    assert torch.equal(output, truth)


def test_a_second_edit_from_memory(made: list[int]) -> None:
    """Each of its steps is PARTIAL: their text is made once."""
    plan = hetcache.Plan.from_token_mask(np.arange(N) < 35, GRID, num_inference_steps=3, schedule="FFF")
    model, calls = TinyDiT(), tiny_calls("FFF")
    fast = compiled(model)
    with hetcache.session(plan, strict=True, record=True) as first:
        truths = run(fast, calls)
    with hetcache.session(plan, strict=True, memory_of=first.record) as second:
        outputs = run(fast, calls)
    assert second.stats.recalled == 3
    check(outputs, truths)
    check(truths, run(model, calls))
    assert len(made) == 2
