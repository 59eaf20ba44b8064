"""Models that diffusers and accelerate move to the device and away again: cached as planned, or said why not.

There is no second device here. accelerate's own hook is told that the device is `cpu:0`, which is not `cpu` to torch:
so it copies every weight before each call, as a move from a device to another does.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from backend_checks import GRID, Kwargs, check, compiled, expected, plan_of, run, tiny_calls
from diffusers.hooks import HookRegistry, ModelHook, group_offloading
from models import TinyDiT, call, vace, wan
from pipelines import ROWS
from pipelines_check import compile_models, mixed
from test_streaming import Device
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture import capture, offloading, structure
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.runtime import buffers, dispatch, prepare
from hetcache_compile.runtime.streaming import AHEAD
from hetcache_compile.runtime.whole import captured, dynamo
from hetcache_compile.sessions.session import Session

pytestmark = pytest.mark.usefixtures("fresh")
BY_NAME = {row.name: row for row in ROWS}
HERE = torch.device("cpu")
ELSEWHERE = torch.device("cpu:0")
IN_PLACE: dict[str, Any] = {"backend": "hetcache", "options": {"inner": "eager"}}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def letters(session: Session) -> str:
    return "".join(kind.letter for kind in session.stats.kinds)


def hooked_then_compiled(model: Any) -> Any:
    cpu_offload_with_hook(model, ELSEWHERE)
    return compiled(model)


def compiled_then_hooked(model: Any) -> Any:
    fast = compiled(model)
    cpu_offload_with_hook(fast, ELSEWHERE)
    return fast


def compiled_in_place(model: Any) -> Any:
    model.compile(**IN_PLACE)
    cpu_offload_with_hook(model, ELSEWHERE)
    return model


def calls_of(model: Any, steps: str) -> list[Kwargs]:
    return [call(model, seed=seed) for seed in range(len(steps))]


def tiny() -> Any:
    return TinyDiT()


def control() -> Any:
    return vace(num_layers=2, vace_layers=(0,))


@pytest.mark.parametrize("on_host", [False, True], ids=["cache on the device", "cache on the host"])
@pytest.mark.parametrize("way", [hooked_then_compiled, compiled_then_hooked, compiled_in_place])
@pytest.mark.parametrize("build", [tiny, pytest.param(control, marks=pytest.mark.wide)])
def test_a_model_that_moves_before_each_call(
    build: Callable[[], Any], way: Callable[[Any], Any], on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first move looks like a change: FULL. From then on the weights are known, in later edits too."""
    device = Device()
    if on_host:
        for module in (buffers, dispatch, prepare):
            monkeypatch.setattr(module, "can_stream", lambda _: True)
        monkeypatch.setattr(prepare, "transfers_of", lambda _: device)
    steps, model = "FPRPF", build()
    calls = tiny_calls(steps) if build is tiny else calls_of(model, steps)
    plan = replace(plan_of(steps), cache_device="cpu")
    forms = hetcache.rewrite(model, plan, (), calls[0])
    truths = {given: expected(forms, given, calls) for given in (steps, "FFRPF")}
    fast = way(model)
    torch._dynamo.utils.counters.clear()
    for given in ("FFRPF", steps, steps):
        with hetcache.session(plan, strict=True) as session:
            outputs = run(fast, calls)
        assert letters(session) == given
        assert session.stats.unplanned == 0
        check(outputs, truths[given])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert bool(device.log) is on_host


def moved(model: Any) -> None:
    model._apply(torch.clone)


def test_a_change_is_seen_among_moves() -> None:
    """Also one that leaves every sum of numbers as it is: rows in another order."""
    model, calls = TinyDiT(), tiny_calls("FPPPPPP")
    fast, weight = compiled(model), model.out.weight
    changes = {3: lambda: weight.mul_(1.5), 5: lambda: setattr(weight, "data", weight.data.flip(0))}
    with hetcache.session(plan_of("FPPPPPP"), strict=True) as session:
        for step, kwargs in enumerate(calls):
            moved(model)
            changes.get(step, lambda: None)()
            (output,) = run(fast, [kwargs])
            if session.stats.kinds[-1].letter == "F":
                check([output], run(model, [kwargs]))
    assert letters(session) == "FFPFPFP"


def test_the_same_weights_loaded_again_are_no_change() -> None:
    model, calls = TinyDiT(), tiny_calls("FPPP")
    fast = compiled(model)
    with hetcache.session(plan_of("FPPP"), strict=True) as session:
        for kwargs in calls:
            fast(**kwargs)
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert letters(session) == "FFPP"


def test_a_hook_is_no_part_of_the_model() -> None:
    """It is left out where a model is captured, and what it holds is not copied: the model that it moves away."""
    model, plan = TinyDiT(), plan_of("FP")
    (kwargs,) = tiny_calls("F")
    truth = model(**kwargs)

    class Large(torch.nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("it was copied")

    _, before = cpu_offload_with_hook(Large(2, 3), ELSEWHERE)
    cpu_offload_with_hook(model, ELSEWHERE, prev_module_hook=before)
    check([hetcache.rewrite(model, plan, (), kwargs).full(**kwargs)[0]], [truth])
    check(run(model, [kwargs]), [truth])


def plan_for(row: Any, pipe: Any, **changes: Any) -> hetcache.Plan:
    arguments = {**row.call(), **row.guided, "output_type": "latent", "margin": 1, "multiple": 1, **changes}
    return hetcache.plan_for(pipe, mask=row.mask, schedule="full", **arguments)


def compile_in_place(pipe: Any) -> None:
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).compile(**IN_PLACE)


def edited_without(row: Any) -> tuple[Any, Any, str]:
    """A pipeline anew, and what an edit without offload gave: its result, and the kinds of its steps."""
    pipe = row.build()
    compile_models(pipe)
    with hetcache.session(mixed(plan_for(row, pipe)), strict=True) as session:
        truth = row.run(pipe, 0, True)
    torch._dynamo.reset()
    return row.build(), truth, letters(session)


@pytest.mark.wide
@pytest.mark.parametrize("compile_first", [True, False])
def test_a_pipeline_with_model_offload(compile_first: bool) -> None:
    """Its hooks are renewed at the end of each edit. The size of its cache is known before, and what it holds."""
    row = BY_NAME["FluxInpaintPipeline"]
    pipe, truth, planned = edited_without(row)
    if compile_first:
        compile_models(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    if not compile_first:
        compile_in_place(pipe)
    torch._dynamo.utils.counters.clear()
    plan = mixed(plan_for(row, pipe, memory="any"))
    for edit in range(3):
        with hetcache.session(plan, strict=True) as session:
            output = row.run(pipe, 0, True)
        if edit:
            assert letters(session) == planned
            torch.testing.assert_close(torch.as_tensor(output), torch.as_tensor(truth))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert plan.cache_size is not None
    assert plan.cache_size.edit == session.stats.cache_bytes


@pytest.mark.wide
def test_two_experts_with_model_offload() -> None:
    row = next(row for row in ROWS if hasattr(row.build(), "transformer_2") and row.build().transformer_2 is not None)
    pipe = row.build()
    compile_models(pipe)
    guided = bool(row.guided)
    plan = mixed(plan_for(row, pipe))
    with hetcache.session(plan, strict=True) as session:
        truth = row.run(pipe, 0, guided)
    planned, held = letters(session), session.stats.cache_bytes
    pipe.enable_model_cpu_offload(device="cpu")
    for edit in range(3):
        with hetcache.session(plan, strict=True) as session:
            output = row.run(pipe, 0, guided)
        if edit:
            assert (letters(session), session.stats.cache_bytes) == (planned, held)
            torch.testing.assert_close(torch.as_tensor(output), torch.as_tensor(truth))


@pytest.mark.wide
def test_a_compiled_model_that_hooks_replaced() -> None:
    """Compiled after the offload and held in the pipeline, it is replaced by the plain one after the first edit."""
    row = BY_NAME["FluxInpaintPipeline"]
    pipe = row.build()
    pipe.enable_model_cpu_offload(device="cpu")
    compile_models(pipe)
    plan = mixed(plan_for(row, pipe))
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan):
        warnings.simplefilter("always")
        row.run(pipe, 0, True)
        assert not [one for one in caught if issubclass(one.category, HetCacheWarning)]
        row.run(pipe, 0, True)
        row.run(pipe, 0, True)
    said = [str(one.message) for one in caught if issubclass(one.category, HetCacheWarning)]
    assert len(said) == 1
    assert "pipe.transformer is compiled no more" in said[0]
    assert "pipe.transformer.compile(backend=hetcache_backend)" in said[0]
    with pytest.raises(hetcache.SessionError, match="compiled no more"), hetcache.session(plan, strict=True):
        row.run(pipe, 0, True)


SLOW = pytest.mark.wide
"""Dynamo makes a graph for each part of the model."""
GROUPS: dict[str, Callable[[Any], object]] = {
    "blocks": lambda model: model.enable_group_offload(HERE, num_blocks_per_group=1),
    "leaves": lambda model: model.enable_group_offload(HERE, offload_type="leaf_level"),
}


def grouped(model: Any, hooks: str, first: str) -> Any:
    """Compiled, with diffusers' hooks on its parts, in one order or the other."""
    fast = compiled(model) if first == "compiled" else None
    GROUPS[hooks](model)
    return compiled(model) if fast is None else fast


@pytest.mark.parametrize(("hooks", "first"), [("blocks", "compiled"), pytest.param("leaves", "offloaded", marks=SLOW)])
def test_group_offload_is_cached(hooks: str, first: str) -> None:
    """Strictly, in each edit; outside sessions the hooks run."""
    steps, model = "FPRPF", wan(num_layers=2)
    calls, plan = calls_of(model, steps), plan_of(steps)
    truths = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls)
    plain = run(model, calls[:1])
    fast = grouped(model, hooks, first)
    for _ in range(2):
        with hetcache.session(plan, strict=True) as session:
            check(run(fast, calls), truths)
        assert letters(session) == steps
    check(run(fast, calls[:1]), plain)
    check(expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls), truths)


class Residents:
    """A device of its own: what diffusers has brought there, and what is copied in."""

    def __init__(self) -> None:
        self.known: dict[int, torch.Tensor] = {}
        self.here: set[int] = set()
        self.start()

    def start(self) -> None:
        self.fetched: list[int] = []
        self.out = self.now = self.most = 0

    def moved(self, group: Any, here: bool) -> None:
        """A move gives weights other memory."""
        modules = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
        for tensor in (*modules, *group.parameters, *group.buffers):
            self.known[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
            (self.here.add if here else self.here.discard)(id(tensor))

    def is_elsewhere(self, tensor: torch.Tensor, _: torch.device | None = None) -> bool:
        return id(tensor) in self.known and id(tensor) not in self.here

    def facts(self, weights: Sequence[dict[str, torch.Tensor | None]]) -> list[Any]:
        held = [tensor for holder in weights for tensor in holder.values()]
        return [*OWN_FACTS(weights), *(tensor is not None and self.is_elsewhere(tensor) for tensor in held)]

    def run_part(self, part: dynamo.DynamoGraph, inputs: Sequence[Any]) -> Any:
        assert not any(self.is_elsewhere(value) for value in inputs if isinstance(value, torch.Tensor))
        return OWN_RUN(part, inputs)

    def fetch(self, host: torch.Tensor, *, empty: bool) -> torch.Tensor:
        self.fetched.append(id(host))
        tensor = torch.empty_like(host) if empty else host.detach().clone()
        self.now += host.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone, host.nbytes)
        return tensor

    def _gone(self, num_bytes: int) -> None:
        self.now -= num_bytes

    def ready(self, fetched: torch.Tensor) -> torch.Tensor:
        return fetched

    def store(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        self.out += 1
        host.copy_(tensor)


OWN_FACTS, OWN_RUN = structure._facts_of, dynamo.DynamoGraph._run_eagerly


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Residents:
    """Group offloading, as if weights were elsewhere until they are brought."""
    device = Residents()
    onload, offload = (torch.compiler.disable(lambda group, here=here: device.moved(group, here)) for here in (1, 0))
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    for module in (capture, captured, offloading):
        monkeypatch.setattr(module, "lies_elsewhere", device.is_elsewhere)
    monkeypatch.setattr(structure, "_facts_of", device.facts)
    monkeypatch.setattr(dynamo.DynamoGraph, "_run_eagerly", lambda part, inputs: device.run_part(part, inputs))
    monkeypatch.setattr(prepare, "transfers_of", lambda _: device)
    return device


@pytest.mark.parametrize(
    ("on_host", "regional"), [(True, True), *(pytest.param(*case, marks=SLOW) for case in [(0, 1), (1, 0), (0, 0)])]
)
def test_weights_come_when_they_are_needed(
    device: Residents, on_host: bool, regional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is fetched once a step, and those of a few blocks are there at a time. Later edits too, captured once."""
    for module in (buffers, dispatch, prepare):
        monkeypatch.setattr(module, "can_stream", lambda _: on_host)
    model, blocks, steps = wan(num_layers=4), 4, "FPRF"
    calls, plan = calls_of(model, steps), replace(plan_of(steps), cache_device="cpu")
    truths = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls)
    model.enable_group_offload(HERE, num_blocks_per_group=1)
    fast = torch.compile(model, backend="hetcache", options={"inner": "eager", "regional": regional})
    weights = {id(weight): weight.nbytes for weight in model.parameters()}
    for _ in range(2):
        with hetcache.session(plan, strict=True) as session:
            for kwargs, truth in zip(calls, truths, strict=True):
                device.start()
                check(run(fast, [kwargs]), [truth])
                kind = session.stats.kinds[-1].letter
                fetched = [at for at in device.fetched if at in weights]
                assert sorted(fetched) == sorted([] if kind == "R" else weights)
                assert bool(device.out) == (on_host and kind == "F")
                if regional and not on_host:
                    assert device.most < sum(weights.values()) * (AHEAD + 1.5) / blocks
        assert letters(session) == steps
        assert not device.here
    assert len(fast.forward._captures) == 1


@pytest.mark.wide
@pytest.mark.parametrize(("hooks", "first"), [("leaves", "offloaded"), ("blocks", "compiled")])
def test_plain_calls_around_sessions(device: Residents, hooks: str, first: str) -> None:
    """diffusers' hooks bring the weights then, as ever. Nothing is said."""
    steps, model = "FPR", wan(num_layers=1)
    calls, plan = calls_of(model, steps), plan_of(steps)
    truths, plain = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls), run(model, calls[:1])
    fast = grouped(model, hooks, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HetCacheWarning)
        check(run(fast, calls[:1]), plain)
        for _ in range(2):
            with hetcache.session(plan, strict=True) as session:
                check(run(fast, calls), truths)
            assert letters(session) == steps
            check(run(fast, calls[:1]), plain)


class Sorted(nn.Module):
    """Keeps a table that it makes of the numbers in a buffer, in its first call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.table = model, None
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Any) -> Any:
        if self.table is None:
            self.table = torch.ones(int(self.order[self.order > 0].max())).sum() / 3
        return self.model(x) * self.table


@pytest.mark.wide
def test_a_table_made_of_a_buffer_in_the_first_call(device: Residents) -> None:
    steps, model = "FPR", wan(num_layers=1)
    model.blocks[0].ffn = Sorted(model.blocks[0].ffn)
    calls, plan = calls_of(model, steps), plan_of(steps)
    run(model, calls[:1])
    truths = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls)
    model.blocks[0].ffn.table = None
    fast = grouped(model, "blocks", "compiled")
    with hetcache.session(plan, strict=True) as session:
        check(run(fast, calls), truths)
    assert letters(session) == steps


def test_a_second_edit_with_group_offload(device: Residents) -> None:
    model, size = wan(num_layers=1), int(np.prod(GRID))
    calls = calls_of(model, "FFF")
    plan = hetcache.Plan.from_token_mask(np.arange(size) < 20, GRID, num_inference_steps=3, schedule="F")
    plain = run(model, calls)
    fast = grouped(model, "blocks", "compiled")
    with hetcache.session(plan, strict=True, record=True) as session:
        check(run(fast, calls), plain)
    with hetcache.session(plan, strict=True, memory_of=session.record) as again:
        check(run(fast, calls), plain)
    assert letters(again) == "PPP"


def test_a_forward_that_is_replaced_is_seen() -> None:
    """Where diffusers has hooked the module, or has looked for hooks."""
    model, plan = wan(num_layers=1), plan_of("FP")
    calls = calls_of(model, "FP")
    fast = grouped(model, "blocks", "compiled")
    with hetcache.session(plan, strict=True):
        run(fast, calls)
    model.blocks[0].forward = lambda *args, **kwargs: args[0] * 2
    truths = run(model, calls)
    with pytest.warns(HetCacheWarning, match=r"hooks on blocks\.0"), hetcache.session(plan):
        check(run(fast, calls), truths)


@pytest.mark.wide
def test_offload_that_ends_and_begins_again(device: Residents) -> None:
    """Between edits of a model that was captured whole."""
    model, steps = wan(num_layers=1), "FPR"
    calls, plan = calls_of(model, steps), plan_of(steps)
    truths = expected(hetcache.rewrite(model, plan, (), calls[0]), steps, calls)
    fast = grouped(model, "blocks", "compiled")

    def end() -> None:
        for module in model.modules():
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook("group_offloading", recurse=False)
        device.here |= device.known.keys()

    for change, runs_on in ((None, HERE), (end, None), (lambda: GROUPS["leaves"](model), HERE)):
        if change is not None:
            change()
        with hetcache.session(plan, strict=True) as session:
            check(run(fast, calls), truths)
        assert letters(session) == steps
        assert fast.forward._device == runs_on


def test_hooks_that_were_removed_are_none() -> None:
    model = wan(num_layers=1)
    cpu_offload(model, HERE)
    remove_hook_from_module(model, recurse=True)
    calls, plan = calls_of(model, "FP"), plan_of("FP")
    fast = grouped(model, "blocks", "compiled")
    with hetcache.session(plan, strict=True) as session:
        run(fast, calls)
    assert letters(session) == "FP"


def test_what_stands_in_for_a_weight() -> None:
    """Of its kind, as a copy of it is, without numbers; and all in the memory of the largest."""
    here = offloading.StandIns(HERE)
    for tensor in (torch.ones(3, 5).T, torch.ones(()), torch.ones(0, 4), torch.ones(7, dtype=torch.bfloat16)[::2]):
        one, copy = here.like(tensor), torch.empty_like(tensor)
        assert (one.dtype, one.shape, one.stride()) == (copy.dtype, copy.shape, copy.stride())
        assert not one.any()
    large = here.like(torch.ones(9, 9))
    assert here.like(torch.ones(2)).data_ptr() == large.data_ptr()


class Doubled(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 2


@pytest.mark.wide
def test_a_hook_that_comes_later_is_seen() -> None:
    """One that does more than move weights, after an edit without it."""
    model, plan = wan(num_layers=1), plan_of("FP")
    calls = calls_of(model, "FP")
    fast = grouped(model, "blocks", "compiled")
    with hetcache.session(plan, strict=True):
        run(fast, calls)
    HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(Doubled(), "doubled")
    truths = run(model, calls)
    with pytest.warns(HetCacheWarning, match=r"hooks on blocks\.0"), hetcache.session(plan):
        check(run(fast, calls), truths)


def test_weights_on_disk_are_refused(tmp_path: Path) -> None:
    model, plan = wan(num_layers=1), plan_of("F")
    calls = calls_of(model, "F")
    truths = run(model, calls)
    model.enable_group_offload(HERE, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    with pytest.warns(HetCacheWarning, match="weights are on disk"), hetcache.session(plan):
        check(run(compiled(model), calls), truths)


@pytest.mark.wide
@pytest.mark.parametrize("compile_first", [True, False])
def test_a_pipeline_with_group_offload(compile_first: bool) -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    pipe, truth, planned = edited_without(row)
    if compile_first:
        compile_in_place(pipe)
    pipe.enable_group_offload(onload_device=HERE, offload_type="block_level", num_blocks_per_group=1)
    if not compile_first:
        compile_in_place(pipe)
    plan = mixed(plan_for(row, pipe, memory="any"))
    for _ in range(2):
        with hetcache.session(plan, strict=True) as session:
            output = row.run(pipe, 0, True)
        assert letters(session) == planned
        torch.testing.assert_close(torch.as_tensor(output), torch.as_tensor(truth))
    assert plan.cache_size is not None
    assert plan.cache_size.edit == session.stats.cache_bytes


@pytest.mark.wide
@pytest.mark.parametrize("first", ["offloaded", "compiled"])
def test_sequential_offload_is_one_warning(first: str) -> None:
    """Its hooks are on the model's layers, and cut it into as many graphs; it runs as it would without a session."""
    model = wan(num_layers=1)
    calls = calls_of(model, "FP")
    truths = run(model, calls)
    fast = compiled(model) if first == "compiled" else None
    cpu_offload(model, HERE)
    fast = compiled(model) if fast is None else fast
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FP")) as session:
        warnings.simplefilter("always")
        check(run(fast, calls), truths)
    said = [str(one.message) for one in caught if issubclass(one.category, HetCacheWarning)]
    reason, closing = (text for text in said if "which is its limit" not in text)  # of Dynamo, for so many parts
    assert "pipe.enable_model_cpu_offload()" in reason
    assert "calls ran plainly" in closing
    assert not session.stats.kinds


@pytest.mark.wide
def test_group_offload_of_all_but_the_model_that_denoises() -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    pipe = row.build()
    pipe.enable_group_offload(HERE, offload_type="leaf_level", exclude_modules=["transformer"])
    compile_models(pipe)
    plan = mixed(plan_for(row, pipe, memory="any"))
    letters_of = []
    for _ in range(2):
        with hetcache.session(plan, strict=True) as session:
            row.run(pipe, 0, True)
        letters_of.append(letters(session))
    assert letters_of == [letters(session)] * 2
    assert set(letters_of[0]) == {"F", "P"}
