"""Where a partial form runs, only the active tokens' patches are embedded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_checks import plan_of
from models import GRID, call, vace
from torch import nn
from torch.fx import Graph
from torch.nn import functional

import hetcache_compile as hetcache
from hetcache_compile.passes.forms.patches import embed
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.passes.rules.patches import CONVOLUTIONS, is_patchify

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "patch"), [((12,), (3,)), ((6, 8), (2, 2)), ((4, 6, 10), (1, 2, 2)), ((4, 4, 6), (2, 1, 3))]
)
def test_chosen_patches_are_embedded_as_a_convolution_embeds_them(
    size: tuple[int, ...], patch: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 5, *size, dtype=torch.float64)
    weight = torch.randn(7, 5, *patch, dtype=torch.float64)
    shift = torch.randn(7, dtype=torch.float64) if bias else None
    whole = CONVOLVE[len(size)](latents, weight, shift, stride=patch).flatten(2)
    index = torch.randperm(whole.shape[2])[:3]
    (found,) = embed(latents, weight, shift, index)
    torch.testing.assert_close(found, whole[..., index], rtol=1e-13, atol=1e-13)


def convolutions(form: Any) -> int:
    return sum(node.target in CONVOLUTIONS for node in form.module.graph.nodes)


@torch.no_grad()
def test_a_partial_form_embeds_active_tokens_alone() -> None:
    model = vace().double()
    inputs = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in call(model).items()}
    forms = hetcache.rewrite(model, plan_of("FPR"), kwargs=inputs)
    functional_form = forms.by_kind["partial"]
    running = in_process(functional_form, forms.plan.form_options)
    assert convolutions(functional_form) == 2  # of the latents, and of what controls them
    assert convolutions(running) == 0
    assert convolutions(in_process(forms.by_kind["full"], forms.plan.form_options)) == 2  # bit for bit the model's
    indices = {name: torch.as_tensor(getattr(forms.plan, name)) for name in running.indices}
    given = forms.program.flat_inputs((), inputs)
    rows = {entry.input_name: torch.randn(entry.shape, dtype=entry.dtype) for entry in running.reads}
    (found,) = running.module(*given, *indices.values(), *(rows[e.input_name].clone() for e in running.reads))
    context = torch.as_tensor(forms.plan.context_index)
    kept = [
        rows[e.input_name] if e.shape == rows[e.input_name].shape else rows[e.input_name].index_select(e.dim, context)
        for e in functional_form.reads
    ]
    named = [torch.as_tensor(getattr(forms.plan, name)) for name in functional_form.indices]
    expected = functional_form.module(*given, *named, *kept)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Embedding(nn.Module):
    """One attention over embedded latents, by a filter of so many groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 2), groups=groups)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = self.patch(hidden_states).flatten(2).transpose(1, 2) + timestep
        query, key, value = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(rows).chunk(3, 2))
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.out(rows + attended)
        return out


@pytest.mark.parametrize(("groups", "left"), [(1, 0), (2, 1)])
def test_what_is_no_product_of_rows_stays_a_convolution(groups: int, left: int) -> None:
    latents = torch.randn(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
    inputs = {"hidden_states": latents, "timestep": torch.ones(1, 1, 1)}
    forms = hetcache.rewrite(Embedding(groups).eval(), plan_of("FPR"), kwargs=inputs)
    assert convolutions(in_process(forms.by_kind["partial"], forms.plan.form_options)) == left


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transposed_convolution_makes_no_patches(transposed: bool) -> None:
    """Of a kernel of 1 and as many channels as before, only its flag tells it from a product by rows."""
    graph = Graph()
    latents, weight = (graph.placeholder(name) for name in ("latents", "weight"))
    latents.meta["val"], weight.meta["val"] = torch.empty(1, 4, 12), torch.empty(4, 4, 1)
    arguments = (latents, weight, None, [1], [0], [1], transposed, [0], 1)
    node = graph.call_function(torch.ops.aten.convolution.default, arguments)
    assert is_patchify(node) is not transposed
