"""`explain`: rooms, events, FLOPs and the picture; and its command."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GRID, NUM_TOKENS, TinyDiT, tiny_call
from torch import nn
from typer.testing import CliRunner

import hetcache_compile as hetcache
from hetcache_compile.capture.capture import capture
from hetcache_compile.capture.explain import Explanation, explain, write_picture
from hetcache_compile.cli.main import app
from hetcache_compile.errors import InputFileError
from hetcache_compile.passes.analysis.flops import graph_flops
from hetcache_compile.reference.demo import save_random_checkpoint

QUARTER = NUM_TOKENS // 4


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    plan = hetcache.Plan.from_token_mask(torch.arange(NUM_TOKENS).numpy() < QUARTER, GRID)
    return explain(hetcache.rewrite(TinyDiT(), plan, kwargs=tiny_call(0)))


def test_events(explanation: Explanation) -> None:
    assert [event.what for event in explanation.events] == ["born", "cached", "dies"]
    born, cached, dies = explanation.events
    assert (born.shape, born.state) == ((1, 22, NUM_TOKENS), "token axis at dim 2")
    assert cached.detail == "keys and values"
    assert dies.detail == "for good"
    assert all("models.py" in event.source for event in explanation.events)


def test_flops_are_those_of_the_arithmetic(explanation: Explanation) -> None:
    """Two for each multiply-add: patches, text, attention to text, qkv, attention, output."""
    width, text = 22, 11
    words = 2 * text * 13 * width

    def patches(rows: int) -> int:
        return 2 * rows * 5 * 4 * width

    def blocks(rows: int) -> int:
        products = rows * width * (3 * width + 20)
        return 2 * (products + 2 * rows * width * text + 2 * rows * width * NUM_TOKENS)

    assert explanation.form_flops["full"] == patches(NUM_TOKENS) + words + blocks(NUM_TOKENS)
    assert explanation.form_flops["partial"] == patches(QUARTER) + words + blocks(QUARTER)
    assert explanation.form_flops["reuse"] == 0
    assert explanation.room_flops["inputs"] == patches(NUM_TOKENS) + words
    assert explanation.room_flops["tokens"] == blocks(NUM_TOKENS)
    assert sum(explanation.room_flops.values()) == explanation.form_flops["full"]


def test_attention_counts_where_a_processor_has_a_kernel_of_its_own_for_it() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    program = capture(Attention(), (torch.randn(1, 2, 32, 16),), {})
    assert graph_flops(program.module) == 2 * 2 * (2 * 32 * 32 * 16)


def test_pictures(explanation: Explanation, tmp_path: Path) -> None:
    write_picture(explanation, tmp_path / "x.svg")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"embed", "qkv", "out"} <= set(texts)
    write_picture(explanation, tmp_path / "x.html")
    assert "token axis at dim 2" in (tmp_path / "x.html").read_text()


class Mixing(nn.Module):
    """Tokens, a text row that attends to them, and a mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 14, (1, 2, 2), (1, 2, 2))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(x).flatten(2).transpose(1, 2)
        text = text + F.scaled_dot_product_attention(text, x, x)
        return x - x.mean(1, keepdim=True), text.sin()


def test_what_depends_on_tokens_and_is_whole() -> None:
    model, args = Mixing(), (torch.randn(1, 3, 2, 6, 10), torch.randn(1, 11, 14))
    plan = hetcache.Plan.from_token_mask(torch.arange(30).numpy() < 10, (2, 3, 5))
    found = explain(hetcache.rewrite(model, plan, args))
    assert [event.what for event in found.events] == ["born", "cached", "dies", "whole", "dies"]
    assert found.rooms["meeting"] >= 3
    assert "it reduces over the token axis" in str(found)


def tiny() -> tuple[nn.Module, dict[str, Any], tuple[int, int, int]]:
    return TinyDiT(), tiny_call(0), GRID


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiny_module", sys.modules[__name__])
    result = CliRunner().invoke(app, ["explain", "tiny_module:tiny", "--picture", str(tmp_path / "x.html")])
    assert result.exit_code == 0, result.output
    assert "token axis at dim 2" in result.output
    assert (tmp_path / "x.html").exists()


def test_command_on_a_checkpoint(tmp_path: Path) -> None:
    """A folder as `from_pretrained` reads it: the pipeline itself makes the call that is looked at."""
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    size = ["--height", "48", "--width", "64", "--num-frames", "5"]
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "model"), *size, "--picture", str(tmp_path / "x.svg")])
    assert result.exit_code == 0, result.output
    assert "24 tokens, 6 of them active" in result.output
    for attention in ("blocks.0.attn1", "vace_blocks.0.attn1"):
        assert attention in result.output
    assert (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no_such_module:f"], "no_such_module:f is no function to call"),
        (["json:loads"], "json:loads is no function"),
        (["no/such/folder"], "no/such/folder is no diffusers checkpoint"),
    ],
)
def test_bad_model(arguments: list[str], error: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert isinstance(result.exception, InputFileError)
    assert error in str(result.exception)
