"""Joint and packed token axes through the public surface: names, offsets, buffers in place, data that is assumed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_check import distance, random_plan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture import assumed_values
from hetcache_compile.passes.forms.pipeline import in_process

GRID, N, TEXT, WIDTH = (2, 3, 5), 30, 11, 14


class Joint(nn.Module):
    """Text and packed tokens in one attention, with a mask over both; returns both."""

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([text, hidden_states], 1)
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=mask)
        text, tokens = x.split([text.shape[1], x.shape[1] - text.shape[1]], 1)
        return tokens, text.tanh()


def joint_inputs(seed: int, tokens: int = N, text: int = TEXT) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, text + tokens, text + tokens)
    mask[..., 7:text] = -3.0
    return {
        "hidden_states": torch.randn(1, tokens, WIDTH, generator=generator),
        "text": torch.randn(1, text, WIDTH, generator=generator),
        "mask": mask + torch.rand(mask.shape, generator=generator),
    }


def check_exact(forms: hetcache.Forms, model: nn.Module, kwargs: dict[str, Any]) -> None:
    plain = model(**kwargs)
    full, cache = forms.full(**kwargs)
    partial, after = forms.partial(cache, **kwargs)
    for output in (full, partial, forms.reuse(cache, **kwargs)[0], forms.reuse(after, **kwargs)[0]):
        assert distance(output, plain) <= 1e-5


def test_packed_tokens_are_found_where_one_input_can_be_them() -> None:
    forms = hetcache.rewrite(Joint(), random_plan(GRID, 10, 20, 0), kwargs=joint_inputs(0))
    assert forms.analysis.token_sources == ("hidden_states",)
    check_exact(forms, Joint(), joint_inputs(1))


def test_as_many_words_as_tokens_must_be_declared() -> None:
    """The trap: text length N. The error shows how to say which input holds the tokens."""
    kwargs, plan = joint_inputs(0, text=N), random_plan(GRID, 10, 20, 0)
    with pytest.raises(hetcache.UnsupportedGraphError) as caught:
        hetcache.rewrite(Joint(), plan, kwargs=kwargs)
    assert "several inputs may hold the 30 tokens: hidden_states (1, 30, 14) and text (1, 30, 14)" in str(caught.value)
    assert "token_inputs={'hidden_states': 1}" in str(caught.value)
    check_exact(hetcache.rewrite(Joint(), plan, kwargs=kwargs, token_inputs={"hidden_states": 1}), Joint(), kwargs)


def test_tokens_among_other_rows_of_an_input() -> None:
    """Reference tokens follow, as in image editing: said with the first row, computed in every form."""
    kwargs, plan = joint_inputs(0, tokens=N + 7), random_plan(GRID, 10, 20, 0)
    with pytest.raises(
        hetcache.GridMismatchError, match=r"is larger: say at which row .*\{'hidden_states': \(1, 0\)\}"
    ):
        hetcache.rewrite(Joint(), plan, kwargs=kwargs, token_inputs={"hidden_states": 1})
    for first in (0, 7, 3):
        forms = hetcache.rewrite(Joint(), plan, kwargs=kwargs, token_inputs={"hidden_states": (1, first)})
        check_exact(forms, Joint(), kwargs)
        assert forms.cache_entries[0].tokens.whole == (TEXT + first, 7 - first)


@pytest.mark.parametrize("num_context", [20, 13])
def test_joint_buffers_in_place(num_context: int) -> None:
    """A chain of steps on new inputs, with the cache overwritten in place, gives what the functional forms give."""
    plan = random_plan(GRID, 10, num_context, 0)
    forms = hetcache.rewrite(Joint(), plan, kwargs=joint_inputs(0))
    cache: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    for seed, kind in enumerate(["full", "partial", "reuse", "partial", "full", "partial"]):
        kwargs = joint_inputs(seed)
        expected, cache = forms.run(kind, cache, (), kwargs)
        form = in_process(forms.by_kind[kind], plan.form_options)
        for entry in form.reads:
            buffers.setdefault(entry.input_name, torch.full(entry.shape, torch.nan, dtype=entry.dtype))
        indices = [torch.from_numpy(getattr(plan, name)) for name in form.indices]
        reads = [buffers[entry.input_name] for entry in form.reads]
        outputs = form.module(*forms.program.flat_inputs((), kwargs), *indices, *reads)
        assert distance(list(outputs), list(expected)) <= 1e-5, (seed, kind)


def test_backend() -> None:
    model, plan = Joint(), random_plan(GRID, 10, 20, 0)
    kinds = hetcache.StepKind
    plan = replace(plan, steps=(kinds.FULL, kinds.PARTIAL, kinds.REUSE))
    options = {"inner": "eager", "token_inputs": {"hidden_states": 1}}
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options=options)
    kwargs = joint_inputs(0)
    with torch.no_grad(), hetcache.session(plan) as session:
        for _ in range(3):
            assert distance(compiled(**kwargs), model(**kwargs)) <= 1e-5
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 1}


def test_a_part_of_a_model_is_no_step() -> None:
    """Packed tokens and no time, as a block that is compiled by itself: nobody said that it is a whole model."""
    model, plan = Joint(), random_plan(GRID, 10, 20, 0)
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})
    kwargs = joint_inputs(0)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught, hetcache.session(plan) as session:
        warnings.simplefilter("always")
        for _ in range(3):
            assert distance(compiled(**kwargs), model(**kwargs)) == 0
    assert session.stats.kinds == []
    texts = [str(warning.message) for warning in caught if "hetcache" in str(warning.message)]
    assert "it takes tokens and no time" in texts[0]
    assert "compile the whole model" in texts[0]


class DropsPadding(nn.Module):
    """Attends to the text that a mask keeps, and branches on whether an image is given."""

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        words = text[:, text_mask[0].nonzero().flatten()]
        if not torch.all(image == 0):
            words = torch.cat([words, image], 1)
        x = torch.cat([hidden_states, words], 1)
        return F.scaled_dot_product_attention(x, x, x)[:, :N]


def padded_inputs(seed: int) -> dict[str, Any]:
    kwargs = joint_inputs(seed)
    del kwargs["mask"]
    return {**kwargs, "text_mask": torch.arange(TEXT)[None] < 7, "image": torch.ones(1, 3, WIDTH)}


def test_a_graph_that_depends_on_a_mask() -> None:
    model, plan = DropsPadding(), random_plan(GRID, 10, 20, 0)
    forms = hetcache.rewrite(model, plan, kwargs=padded_inputs(0))
    assert list(forms.program.assumed) == ["text_mask", "image"]
    check_exact(forms, model, padded_inputs(1))
    for name, other in (("text_mask", torch.arange(TEXT)[None] < 8), ("image", torch.zeros(1, 3, WIDTH))):
        with pytest.raises(hetcache.SessionError, match=f"captured for another value of {name}"):
            forms.full(**{**padded_inputs(0), name: other})


class SquareMask(nn.Module):
    """Padding is dropped, and a mask of all against all is made of the rest."""

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        x = torch.cat([text[:, text_mask[0]], hidden_states], 1)
        valid = F.pad(text_mask[:, text_mask[0]], (0, N), value=True)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=valid[:, :, None] & valid[:, None])[:, -N:]


@pytest.mark.parametrize(("largest", "constants"), [(2**24, True), (1000, False)])
def test_a_large_mask_is_left_to_the_graph(monkeypatch: pytest.MonkeyPatch, largest: int, constants: bool) -> None:
    monkeypatch.setattr(assumed_values, "LARGEST", largest)
    inputs = padded_inputs(0)
    del inputs["image"]
    forms = hetcache.rewrite(SquareMask(), random_plan(GRID, 10, 20, 0), kwargs=inputs)
    assert any(tensor.numel() == (7 + N) ** 2 for tensor in forms.program.state.values()) is constants
    check_exact(forms, SquareMask(), inputs)


def test_latents_that_decide_are_assumed_too() -> None:
    """A branch on the latents is right for these latents only: the next step says so instead of being wrong."""

    class Branch(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            x = hidden_states * (2 if hidden_states.sum() > 0 else 3)
            return F.scaled_dot_product_attention(x, x, x)

    inputs = {"hidden_states": torch.ones(1, N, WIDTH)}
    forms = hetcache.rewrite(Branch(), random_plan(GRID, 10, 20, 0), kwargs=inputs)
    check_exact(forms, Branch(), inputs)
    with pytest.raises(hetcache.SessionError, match="captured for another value of hidden_states"):
        forms.full(hidden_states=-inputs["hidden_states"])


class Remembers(nn.Module):
    """Makes a table in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(N).sin()[:, None]
        x = hidden_states + self.table
        return F.scaled_dot_product_attention(x, x, x)


def test_capture_leaves_no_trace_in_the_model() -> None:
    model, kwargs = Remembers(), {"hidden_states": torch.randn(1, N, WIDTH)}
    forms = hetcache.rewrite(model, random_plan(GRID, 10, 20, 0), kwargs=kwargs)
    assert model.table is None
    check_exact(forms, model, kwargs)
    assert not isinstance(model.table, torch._subclasses.FakeTensor)


def test_per_sample_rows_of_a_batch_share_a_mask() -> None:
    """Batches are rows beside each other: one mask for all, tokens folded with the batch included."""

    class Folded(nn.Module):
        def forward(self, hidden_states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            b = hidden_states.shape[0]
            x = torch.cat([hidden_states.reshape(b * N, WIDTH), time.flatten()[:, None]], 1).view(b, N, WIDTH + 1)
            return F.scaled_dot_product_attention(x, x, x)

    kwargs = {"hidden_states": torch.randn(3, N, WIDTH), "time": torch.rand(3, N)}
    forms = hetcache.rewrite(Folded(), random_plan(GRID, 10, 20, 0), kwargs=kwargs)
    assert forms.analysis.whole == {}
    check_exact(forms, Folded(), kwargs)
    assert np.prod(forms.cache_entries[0].shape) == 3 * 20 * (WIDTH + 1)
