"""The invariant: a step computed from the cache of a full step on the same inputs equals that full step.

Whatever the model, the weights, the mask and M. Where the inputs do change, an independent reference says what a
partial step has to be: the plain model whose self-attention sees, at inactive tokens, the keys and values of the
last full step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Captured
from models import NUM_TOKENS, Case, to_tokens

from hetcache_compile import Plan, StepKind
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.passes.ir.form import Form

N = NUM_TOKENS
TOLERANCE = 1e-5  # absolute, outputs are of the order of 1 (at most about 6)

VACE, VACE_BATCH = Case("vace"), Case("vace", batch=2, config=(("vace_layers", (0,)),))
WAN = Case("wan")
FULL_SWEEP = {"vace": VACE, "wan-time-per-token": Case("wan", batch=2, time_per_token=True)}
OTHERS = {"vace-batch": VACE_BATCH, "wan": WAN}
ONE_BLOCK = (("num_layers", 1),)
ONE_OF_EACH = (("num_layers", 1), ("vace_layers", (0,)))
TRAPS = {
    # sizes that happen to be equal must not be taken for the same axis
    "N-is-width, T-is-heads": Case("vace", grid=(5, 3, 4), config=(*ONE_OF_EACH, ("num_attention_heads", 5))),
    "N-is-text-length-and-ffn-dim, T-is-batch": Case(
        "wan", batch=3, text_tokens=N, time_per_token=True, config=(*ONE_BLOCK, ("ffn_dim", N))
    ),
    "one-row, W-is-head-dim, patch-of-1": Case(
        "wan", grid=(2, 1, 12), batch=2, config=(*ONE_BLOCK, ("patch_size", (1, 1, 1)))
    ),
    "one-frame, fused-qkv": Case("vace", grid=(1, 5, 7), fused=True, config=ONE_OF_EACH),
}
BFLOAT16 = Case("vace", dtype=torch.bfloat16, config=ONE_OF_EACH)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def random_plan(case: Case, num_active: int, num_context: int | None = None, seed: int = 0) -> Plan:
    """A plan with M random active tokens and C random others (all others by default) as context."""
    order = np.random.default_rng([seed, num_active]).permutation(case.num_tokens)
    active, rest = np.sort(order[:num_active]), order[num_active:]
    context = np.sort(rest[: len(rest) if num_context is None else num_context])
    kind = np.zeros(case.num_tokens, dtype=np.uint8)
    return Plan(case.grid, active, context, kind, (StepKind.FULL,))


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; infinite if shapes differ or anything is no number."""
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    return float((a.float() - b.float()).abs().max())


def check_frozen(captured: Captured, num_active: int, seeds: range = range(2)) -> None:
    """Full, partial and reuse equal the model on the same inputs, for several masks, inputs and control scales."""
    forms = captured.forms(random_plan(captured.case, num_active))
    for seed in seeds:
        kwargs = captured.call(seed)
        forms = forms.for_plan(random_plan(captured.case, num_active, seed=seed))
        plain = captured.plain(kwargs)
        assert 1 < plain.abs().max() < 20
        full, cache = forms.full(**kwargs)
        assert max_error(full[0], plain) <= TOLERANCE
        partial, after_partial = forms.partial(cache, **kwargs)
        assert max_error(partial[0], plain) <= TOLERANCE
        reuse, _ = forms.reuse(cache, **kwargs)
        assert max_error(reuse[0], plain) <= TOLERANCE
        # and again, from what the partial step left behind
        assert max_error(forms.partial(after_partial, **kwargs)[0][0], plain) <= TOLERANCE
        assert max_error(forms.reuse(after_partial, **kwargs)[0][0], plain) <= TOLERANCE


@pytest.mark.parametrize("num_active", [1, 2, N // 3, N - 1, N])
@pytest.mark.parametrize("case", ids(FULL_SWEEP))
def test_frozen_input(captured: Callable[[Case], Captured], case: Case, num_active: int) -> None:
    check_frozen(captured(case), num_active, seeds=range(4))


@pytest.mark.parametrize("num_active", [1, 41, N - 1])
@pytest.mark.parametrize("case", ids(OTHERS))
def test_frozen_input_other_batches(captured: Callable[[Case], Captured], case: Case, num_active: int) -> None:
    check_frozen(captured(case), num_active)


@pytest.mark.parametrize("case", ids(TRAPS))
def test_frozen_input_traps(captured: Callable[[Case], Captured], case: Case) -> None:
    check_frozen(captured(case), case.num_tokens // 3)


def test_the_invariant_is_sensitive(captured: Callable[[Case], Captured]) -> None:
    """The same comparison fails by far if any one cache entry is wrong, or the indices are off by one token."""
    model = captured(VACE)
    plan = random_plan(VACE, N // 3)
    forms, kwargs = model.forms(plan), model.call(0)
    plain, (_, cache) = model.plain(kwargs), forms.full(**kwargs)
    assert len(cache) == 2 * 4 + 1  # keys and values of two main and two control blocks, and the output
    for name, tensor in cache.items():
        dim = next(entry.dim for entry in forms.cache_entries if entry.input_name == name)
        wrong = {**cache, name: tensor.roll(1, dims=dim) if "value" in name else tensor.roll(1, dims=-1)}
        assert max_error(forms.partial(wrong, **kwargs)[0][0], plain) > 100 * TOLERANCE, name
    active = plan.active_index.copy()
    active[0] = plan.context_index[-1]
    shifted = Plan(plan.grid, np.sort(active), plan.context_index[:-1], plan.token_kind, plan.steps)
    forms = model.forms(shifted)
    short = {k: v if "output" in k else v.narrow(2, 0, v.shape[2] - 1) for k, v in cache.items()}
    assert max_error(forms.partial(short, **kwargs)[0][0], plain) > 100 * TOLERANCE


@pytest.mark.parametrize("num_context", [0, 1, (N - 35) // 2, N - 36])
def test_context_left_out(captured: Callable[[Case], Captured], num_context: int) -> None:
    """C < N - M on frozen inputs: inactive tokens are those of the full step to the bit.

    Active tokens attend to fewer keys, so they are allowed to differ, and do.
    """
    model = captured(VACE)
    plan = random_plan(VACE, 35, num_context)
    forms, kwargs = model.forms(plan), model.call(0)
    full, cache = forms.full(**kwargs)
    partial, _ = forms.partial(cache, **kwargs)
    change = (to_tokens(partial[0]) - to_tokens(full[0])).abs().amax(dim=(0, 2))
    inactive = np.setdiff1d(np.arange(N), plan.active_index)
    assert change[inactive].max() == 0
    assert change[plan.active_index].min() > 0
    assert change.max() > 100 * TOLERANCE
    assert max_error(forms.reuse(cache, **kwargs)[0][0], full[0]) == 0


@contextlib.contextmanager
def self_attention(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, ...]], num_tokens: int
) -> Iterator[None]:
    """Let `change(key, value)` give the key, value and mask of every attention over `num_tokens` keys."""
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if key.shape[-2] == num_tokens:
            key, value, kwargs["attn_mask"] = change(key, value)
        return original(query, key, value, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


def reference_partial(
    model: Captured, plan: Plan, old: dict[str, Any], new: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """Tokens `[B, N, ...]` of a partial step on `new` after a full step on `old`, computed the slow way."""
    active = torch.zeros(N, dtype=torch.bool)
    active[plan.active_index] = True
    seen = active.clone()
    seen[plan.context_index] = True
    anchors = torch.from_numpy(plan.active_index[plan.token_anchors])
    cached: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
        cached.append((key, value))
        return key, value, None

    def replay(key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
        return read(key, cached[0][0]), read(value, cached.pop(0)[1]), seen[None, :]

    def read(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
        moved = then + (now - then)[..., anchors, :].mean(-3) if plan.context_motion else then
        return torch.where(active[:, None], now, moved)

    with self_attention(monkeypatch, record, N):
        before = model.plain(old)
    assert len(cached) == (4 if model.case.architecture == "vace" else 2)
    with self_attention(monkeypatch, replay, N):
        after = model.plain(new)
    assert not cached
    return torch.where(active[:, None], to_tokens(after), to_tokens(before))


@pytest.mark.parametrize(("num_context", "motion"), [(N - 35, 0), (40, 0), (0, 0), (N - 35, 1)])
@pytest.mark.parametrize("case", ids({"vace": VACE, "wan-time-per-token": FULL_SWEEP["wan-time-per-token"]}))
def test_new_inputs_against_reference(
    captured: Callable[[Case], Captured], case: Case, num_context: int, motion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents, timesteps, text, control latents and control scales all change after the full step."""
    model = captured(case)
    plan = replace(random_plan(case, 35, num_context), context_motion=motion)
    forms, old, new = model.forms(plan), model.call(0), model.call(1)
    expected = reference_partial(model, plan, old, new, monkeypatch)
    _, cache = forms.full(**old)
    partial, _ = forms.partial(cache, **new)
    assert max_error(to_tokens(partial[0]), expected) <= TOLERANCE


@pytest.mark.parametrize("case", ids({"vace": VACE}))
def test_all_tokens_active(captured: Callable[[Case], Captured], case: Case) -> None:
    """M = N needs nothing from the cache: a partial step on new inputs is the plain model on them."""
    model = captured(case)
    forms, old, new = model.forms(random_plan(case, N)), model.call(0), model.call(1)
    _, cache = forms.full(**old)
    partial, _ = forms.partial(cache, **new)
    assert max_error(partial[0], model.plain(new)) <= TOLERANCE
    assert max_error(partial[0], model.plain(old)) > 100 * TOLERANCE


def test_only_active_tokens_move(captured: Callable[[Case], Captured]) -> None:
    """After a partial step on new inputs: inactive tokens are the cache's, every active token is another."""
    model = captured(VACE_BATCH)
    plan = random_plan(VACE_BATCH, 35)
    forms, old, new = model.forms(plan), model.call(0), model.call(1)
    full, cache = forms.full(**old)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    partial, next_cache = forms.partial(cache, **new)
    change = (to_tokens(partial[0]) - to_tokens(full[0])).abs().amax(dim=2)
    inactive = np.setdiff1d(np.arange(N), plan.active_index)
    assert change[:, inactive].max() == 0
    assert change[:, plan.active_index].min() > 100 * TOLERANCE
    # what it leaves behind: its own output, the context of the full step; what it was given is untouched
    assert max_error(forms.reuse(next_cache, **new)[0][0], partial[0]) == 0
    assert max_error(forms.reuse(cache, **new)[0][0], full[0]) == 0
    for name, tensor in before.items():
        assert torch.equal(cache[name], tensor), name
        assert torch.equal(next_cache[name], tensor) == name.startswith("past_key_values"), name


def test_control_scale_is_read_each_step(captured: Callable[[Case], Captured]) -> None:
    """The scale is data: a partial step with another scale differs, and is right where all tokens are active."""
    model = captured(VACE)
    forms, kwargs = model.forms(random_plan(VACE, N)), model.call(0)
    louder = {**kwargs, "control_hidden_states_scale": torch.tensor([0.0, 2.5])}
    full, cache = forms.full(**kwargs)
    partial, _ = forms.partial(cache, **louder)
    assert max_error(partial[0], model.plain(louder)) <= TOLERANCE
    assert max_error(partial[0], full[0]) > 100 * TOLERANCE


def test_cache_is_what_the_entries_say(captured: Callable[[Case], Captured]) -> None:
    model = captured(VACE_BATCH)
    forms = model.forms(random_plan(VACE_BATCH, 35, 23))
    _, cache = forms.full(**model.call(0))
    assert list(cache) == [entry.input_name for entry in forms.cache_entries]
    for entry in forms.cache_entries:
        tensor = cache[entry.input_name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
        assert tensor.shape[entry.dim] == (23 if entry.rows == "context" else N)
    assert forms.cache_bytes == sum(tensor.numel() * tensor.element_size() for tensor in cache.values())


def run_in_place(model: Captured, form: Form, plan: Plan, buffers: dict[str, torch.Tensor], kwargs: Any) -> Any:
    """Run a form whose cache is in place, on buffers that are made when first needed."""
    form = in_process(form, plan.form_options)
    assert form.writes == ()
    for entry in form.reads:
        buffers.setdefault(entry.input_name, torch.full(entry.shape, torch.nan, dtype=entry.dtype))
    indices = [torch.from_numpy(getattr(plan, name)) for name in form.indices]
    reads = [buffers[entry.input_name] for entry in form.reads]
    with torch.no_grad():
        return form.module(*model.program.flat_inputs((), kwargs), *indices, *reads)[0]


@pytest.mark.parametrize(("num_active", "num_context"), [(1, N - 1), (35, N - 35), (35, 40), (N, 0)])
def test_forms_in_place(captured: Callable[[Case], Captured], num_active: int, num_context: int) -> None:
    """Buffers overwritten in place give what the functional forms give, over a chain of steps on new inputs."""
    model = captured(VACE)
    plan = random_plan(VACE, num_active, num_context)
    forms = model.forms(plan)
    cache: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    for seed, kind in enumerate(["full", "partial", "partial", "reuse", "partial", "full", "reuse", "partial"]):
        kwargs = model.call(seed)
        (expected,), cache = forms.run(kind, cache, (), kwargs)
        output = run_in_place(model, forms.by_kind[kind], plan, buffers, kwargs)
        assert max_error(output, expected) <= TOLERANCE, (seed, kind)


def test_bfloat16(captured: Callable[[Case], Captured]) -> None:
    """In bf16, full, partial and reuse equal the plain model as far as bf16 itself can tell.

    A product of M rows may be summed in another order than one of N rows, and roundings spread through the blocks.
    How far is what the model itself shows: its bf16 output is `rounding` away from fp32 arithmetic on the same
    weights and inputs. Two such outputs are at most twice as far from each other, and no farther on average.
    """
    model = captured(BFLOAT16)
    forms = model.forms(random_plan(BFLOAT16, 35))
    exact_model = BFLOAT16.build().float()
    for seed in range(3):
        forms, kwargs = forms.for_plan(random_plan(BFLOAT16, 35, seed=seed)), model.call(seed)
        exact = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        plain = model.plain(kwargs)
        rounding = (plain.float() - exact_model(**exact)[0]).abs()
        assert 0 < rounding.max() < 0.1
        full, cache = forms.full(**kwargs)
        partial, _ = forms.partial(cache, **kwargs)
        reuse, _ = forms.reuse(cache, **kwargs)
        for (output,) in (full, partial, reuse):
            assert output.dtype == torch.bfloat16
            difference = (output.float() - plain.float()).abs()
            assert difference.max() <= 2 * rounding.max()
            assert difference.mean() <= rounding.mean()


def test_fused_projections_are_fused(captured: Callable[[Case], Captured]) -> None:
    """The trap above is only one if the capture holds one product for queries, keys and values."""
    model = captured(TRAPS["one-frame, fused-qkv"])
    nodes = model.program.module.graph.nodes
    widths = [node.meta["val"].shape[-1] for node in nodes if node.target is torch.ops.aten.linear.default]
    assert widths.count(3 * 24) == 2  # one main and one control block
