"""Transformers written as other codebases write them: complex rotary tables, fused projections with flash-attn's
layout, einops; Python branches, lists as inputs, dataclasses as outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from freezing import frozen_outputs
from models import make_loud
from models_check import distance
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.passes.rules.table import RULES

aten = torch.ops.aten
T, H, W = GRID = (3, 5, 7)
N, TEXT, HEADS, HEAD, CHANNELS = 105, 11, 2, 12, 3
WIDTH = HEADS * HEAD
VIDEO = (1, CHANNELS, T, 2 * H, 2 * W)


class ComplexRope(nn.Module):
    """Rotary positions as complex numbers, text and video side by side in each block, an adaptive norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(CHANNELS * 4, WIDTH)
        self.text, self.time = nn.Linear(13, WIDTH), nn.Linear(1, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 53), nn.GELU("tanh"), nn.Linear(53, WIDTH))
        self.head = nn.Linear(WIDTH, CHANNELS * 4)

    def positions(self, count: int) -> torch.Tensor:
        """`[L + N, HEAD / 2]`: text stands at 0, tokens in a row."""
        place = torch.cat([torch.zeros(count), torch.arange(1, N + 1)])
        angles = torch.outer(place, 100 ** -(torch.arange(0, HEAD, 2) / HEAD))
        return torch.polar(torch.ones_like(angles), angles)

    def attend(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2)) * rope).flatten(3)
            for t in (q, k)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, video: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        b = video.shape[0]
        x = video.view(b, CHANNELS, T, H, 2, W, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(b, N, -1)
        x = torch.cat([self.text(text), self.patch(x)], dim=1)
        scale1, shift1, gate1, scale2, shift2, gate2 = self.time(t[:, None])[:, None].chunk(6, dim=-1)
        rope = self.positions(text.shape[1])
        for _ in range(2):
            x = x + gate1 * self.attend(F.layer_norm(x, (WIDTH,)) * (1 + scale1) + shift1, rope)
            x = x + gate2 * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + scale2) + shift2)
        x = self.head(x[:, text.shape[1] :]).view(b, T, H, W, 2, 2, CHANNELS)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(video.shape)


@torch.library.custom_op("hetcache_tests::flash_attention", mutates_args=())
def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`[batch, tokens, heads, features]`, as flash-attn lays them out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


@flash_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(q)


@dataclass
class Output:
    sample: torch.Tensor
    hidden: list[torch.Tensor]


torch.utils._pytree.register_dataclass(Output)


class FusedFlash(nn.Module):
    """One product for queries, keys and values; an attention operator of its own; hidden states as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.position = nn.Parameter(torch.zeros(1, N, WIDTH))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.RMSNorm(WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH), "q": nn.RMSNorm(HEAD),
                 "up": nn.Linear(WIDTH, 2 * 31), "down": nn.Linear(31, WIDTH)}
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, CHANNELS * 4)

    def forward(self, x: torch.Tensor, controls: list[torch.Tensor], residual: bool = True) -> Output:
        x = self.embed(x).flatten(2).mT + self.position
        hidden = []
        for block, control in zip(self.blocks, controls, strict=True):
            q, k, v = block["qkv"](block["norm"](x)).unflatten(-1, (3, HEADS, HEAD)).unbind(2)
            y = flash_attention(block["q"](q), block["q"](k), v, 0.3).flatten(2)
            x = x + y if residual else y
            gate, value = block["up"](x).chunk(2, -1)
            x = x + block["down"](F.silu(gate) * value) + control
            hidden.append(x)
        return Output(self.head(x), hidden)


class Einops(nn.Module):
    """Latents by `rearrange`, heads by `rearrange`, positions added for each axis, grouped queries, a text mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text = nn.Linear(CHANNELS * 4, WIDTH), nn.Linear(13, WIDTH)
        self.rows, self.columns = nn.Parameter(torch.zeros(H, WIDTH)), nn.Parameter(torch.zeros(W, WIDTH))
        self.frames = nn.Parameter(torch.zeros(T, WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * HEAD)
        self.head = nn.Linear(WIDTH, CHANNELS * 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(rearrange(x, "b c t (h p) (w q) -> b t h w (p q c)", p=2, q=2))
        x = x + repeat(self.frames, "t d -> t h w d", h=H, w=W) + self.rows[:, None] + self.columns
        x = torch.cat([rearrange(x, "b t h w d -> b (t h w) d"), self.text(text)], 1)
        mask = F.pad(text_mask, (N, 0), value=True)
        for _ in range(2):
            q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=HEADS)
            k, v = rearrange(self.kv(x), "b n (two heads d) -> two b heads n d", two=2, heads=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)
            x = x + rearrange(y, "b heads n d -> b n (heads d)")
        x = self.head(x[:, :N])
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=T, h=H, w=W, p=2, q=2)


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]
CASES: dict[str, Case] = {
    "complex rope": (
        ComplexRope,
        lambda: {"video": torch.randn(VIDEO), "t": torch.rand(1), "text": torch.randn(1, TEXT, 13)},
    ),
    "fused qkv, flash-attn": (
        FusedFlash,
        lambda: {"x": torch.randn(VIDEO), "controls": [torch.randn(1, N, WIDTH) for _ in range(2)]},
    ),
    "einops": (
        Einops,
        lambda: {
            "x": torch.randn(VIDEO), "text": torch.randn(1, TEXT, 13), "text_mask": torch.arange(TEXT)[None] < 8,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def flash_rule() -> Iterator[None]:
    op = torch.ops.hetcache_tests.flash_attention.default
    hetcache.register_attention(op, rows=-3)
    yield
    del RULES[op]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_styles(case: Case) -> None:
    """On frozen inputs all forms are the model; on new inputs a partial step is the model with tokens frozen."""
    torch.manual_seed(0)
    model, draw = make_loud(case[0]()), case[1]
    old, new = draw(), draw()
    plan = hetcache.Plan.from_token_mask(np.random.default_rng(0).permutation(N) < N // 3, GRID)
    forms = hetcache.rewrite(model, plan, kwargs=old)
    assert forms.analysis.whole == {}
    assert len([entry for entry in forms.cache_entries if entry.name.endswith("key")]) == 2
    with torch.no_grad():
        plain = model(**old)
        full, cache = forms.full(**old)
        partial, after = forms.partial(cache, **old)
        reuse, _ = forms.reuse(after, **old)
        for output in (full, partial, reuse):
            assert type(output) is type(plain)
            assert distance(output, plain) <= 1e-5
        changed, _ = forms.partial(cache, **new)
        assert distance(changed, frozen_outputs(forms.program, forms.analysis, plan, old, new)) <= 1e-5
        assert distance(changed, plain) > 0.1


def test_an_attention_operator_without_a_rule_says_so() -> None:
    del RULES[torch.ops.hetcache_tests.flash_attention.default]
    model, draw = CASES["fused qkv, flash-attn"]
    plan = hetcache.Plan.from_token_mask(np.arange(N) < 9, GRID)
    with pytest.raises(hetcache.UnsupportedGraphError, match=r"flash_attention\.default: no rule"):
        hetcache.rewrite(model(), plan, kwargs=draw())
    hetcache.register_attention(torch.ops.hetcache_tests.flash_attention.default, rows=-3)


class Outspoken(ComplexRope):
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        warnings.warn("of the model", FutureWarning, stacklevel=1)
        return super().forward(**inputs)


def test_capturing_shows_the_warnings_of_the_model_only() -> None:
    """torch warns of a class of its own whenever it copies a tree."""
    plan = hetcache.Plan.from_token_mask(np.arange(N) < 9, GRID)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hetcache.rewrite(Outspoken(), plan, kwargs=CASES["complex rope"][1]())
    assert {str(warning.message) for warning in caught} == {"of the model"}
