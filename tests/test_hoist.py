"""Keys and values of the text: made in FULL steps, for PARTIAL ones what they would make, and anew where they must."""

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


@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.wide)], ids=["one tensor", "equal ones"])
def test_made_in_full_steps_alone(made: list[int], same: bool) -> None:
    model, plan = wan(), plan_of("FPRPFP")
    calls = [[call(model, seed=50 * branch + step) for step in range(6)] for branch in range(2)]
    if same:
        for branch in calls:
            for one in branch:
                one["encoder_hidden_states"] = branch[0]["encoder_hidden_states"]
    fast, outputs = compiled(model), [list[torch.Tensor](), list[torch.Tensor]()]
    with hetcache.session(plan, strict=True) as session:
        for step in range(6):
            for branch, held in zip(calls, outputs, strict=True):
                held += run(fast, [branch[step]])
    assert len(made) == session.stats.kinds.count(hetcache.StepKind.FULL) == 4
    forms = hetcache.rewrite(model, plan, (), calls[0][0])
    for branch, held in zip(calls, outputs, strict=True):
        check(held, expected(forms, "FPRPFP", branch))
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
    assert len(made) == 3 + 1


class Telling(TinyDiT):
    """Returns its text too."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> Any:
        return super().forward(latents, text), self.embed_text(text)


def test_a_text_that_is_returned(made: list[int]) -> None:
    """REUSE steps need it too, and what was returned is the caller's."""
    model, plan = Telling(), plan_of("FRP")
    fast, outputs, truths = compiled(model), [], []
    with hetcache.session(plan, strict=True), torch.no_grad():
        for first in (0, 50):
            for one in tiny_calls("FRP", first):
                outputs.append(fast(**one)[1])
                truths.append(model(**one)[1])
    check(outputs, truths)


class Scaled(TinyDiT):
    """A buffer is in its text, and an input whose name looks like a weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, latents: torch.Tensor, text: torch.Tensor, c_gate: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, text * self.scale * c_gate)


@pytest.mark.parametrize("steps", [pytest.param("FF", marks=pytest.mark.wide), "FP"])
@pytest.mark.parametrize("how", ["in place", "another buffer", "another gate", "data"])
def test_what_torch_does_not_count(made: list[int], how: str, steps: str) -> None:
    """A FULL step is right whatever was done; a PARTIAL one but for writes through `.data`."""
    model, plan = Scaled(), plan_of(steps)
    calls = [{**one, "c_gate": torch.ones(1)} for one in tiny_calls(steps)]
    fast, outputs = compiled(model), []
    with hetcache.session(plan, strict=True) as session:
        for step, one in enumerate(calls):
            if step == 1 and how == "in place":
                model.scale.mul_(1.5)
            elif step == 1 and how == "another buffer":
                model.scale = model.scale * 1.5
            elif step == 1 and how == "another gate":
                one["c_gate"] = torch.full((1,), 1.5)
            elif step == 1:
                one["text"] = calls[0]["text"]
                one["text"].data.mul_(1.5)
            with session.branch("cond"):
                outputs += run(fast, [one])
    if steps == "FF":
        check(outputs[1:], [model(**calls[1])])
    elif how != "data":
        first = {"in place": 1 / 1.5, "another buffer": 1 / 1.5}.get(how, 1.0)  # the forms have the buffer as it is now
        begun = {**calls[0], "text": calls[0]["text"] * first}
        check(outputs, expected(hetcache.rewrite(model, plan, (), calls[1]), steps, [begun, calls[1]]))
    assert len(made) == (1 if (how, steps) == ("data", "FP") else 2)


def test_numpy_writes_where_the_text_lies(made: list[int]) -> None:
    """Each call has an object of its own, on one memory."""
    model, plan = TinyDiT(), plan_of("FPPP")
    calls = tiny_calls("FPPP")
    memory = calls[0]["text"].numpy().copy()
    fast, outputs, given = compiled(model), [], []
    with hetcache.session(plan, strict=True) as session:
        for step, one in enumerate(calls):
            if step == 2:
                memory *= 1.5
            given.append({**one, "text": torch.from_numpy(memory.copy())})
            with session.branch("cond"):
                outputs += run(fast, [{**one, "text": torch.from_numpy(memory)}])
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPPP", given))
    assert len(made) == 2


class Split(TinyDiT):
    """Keys and values are two halves of one product, which may be expanded to a batch."""

    def __init__(self, expands: bool) -> None:
        super().__init__()
        self.expands, self.keys = expands, nn.Linear(13, 44)

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = self.keys(text[:1]).expand(len(text), -1, -1) if self.expands else self.keys(text)
        key, value = both.chunk(2, dim=-1)
        tokens = latents.flatten(2).transpose(1, 2) @ torch.ones(5, 22) / 5
        seen = nn.functional.scaled_dot_product_attention(tokens, key, value)
        return super().forward(latents) + seen.mean()


@pytest.mark.parametrize("expands", [False, True])
def test_halves_of_one_product(expands: bool) -> None:
    """They are kept as one, with no gaps between."""
    forms = hetcache.rewrite(Split(expands), plan_of("F"), (), tiny_call(0, batch=2))
    parts = hoisted(forms.program, forms.analysis, None)
    assert parts is not None
    assert len(parts.graphs.names) == 1
    (value,) = (node.meta["val"] for node in parts.graphs.before.graph.output_node().all_input_nodes)
    assert value.untyped_storage().nbytes() == parts.graphs.num_bytes == (1 if expands else 2) * 11 * 44 * 4


class Refined(TinyDiT):
    """Its text attends to itself first."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            text = text + nn.functional.scaled_dot_product_attention(text, text * self.embed.bias[:13], text)
        return super().forward(latents, text)


def test_what_only_others_are_made_of_is_not_kept() -> None:
    forms = hetcache.rewrite(Refined(), plan_of("F"), (), tiny_call(0))
    parts = hoisted(forms.program, forms.analysis, None)
    assert parts is not None
    assert len(parts.graphs.names) == 1


@pytest.mark.wide
def test_an_interrupt_while_they_are_made(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = wan(), plan_of("FPPP")
    calls = [call(model, seed=step) for step in range(4)]
    other = torch.randn(calls[0]["encoder_hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    fast, copy, left = compiled(model), torch.Tensor.copy_, [2]

    def stopping(self: torch.Tensor, *args: Any) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return copy(self, *args)

    with hetcache.session(plan, strict=True) as session, session.branch("cond"):
        outputs = run(fast, calls[:2])
        monkeypatch.setattr(torch.Tensor, "copy_", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(fast, [{**calls[2], "encoder_hidden_states": other}])
        monkeypatch.undo()
        outputs += run(fast, calls[2:])
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPPP", calls))
