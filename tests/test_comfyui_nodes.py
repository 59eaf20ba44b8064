"""What of the nodes for ComfyUI needs no run of a model: masks on the token grid, inputs of nodes, a workflow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hetcache_compile as hetcache
from hetcache_compile.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from hetcache_compile.comfyui.latents import grid_of, patch_of_model, tokens_of_denoise_mask, tokens_of_mask
from hetcache_compile.comfyui.nodes import HetCacheSettings
from hetcache_compile.comfyui.sampling import SCHEDULES, Settings

EXAMPLE = Path(__file__).parent.parent / "examples" / "comfyui_inpaint.json"


def test_a_fractional_mask_is_generated_where_it_is_seen() -> None:
    mask = torch.zeros(8, 8)
    mask[0, 0], mask[7, 7], mask[0, 7] = 0.01, 1.0, 1e-4
    tokens = tokens_of_mask(mask, (1, 4, 8, 8), (1, 2, 2))
    assert np.argwhere(tokens[0]).tolist() == [[0, 0], [3, 3]]


def test_patches_that_are_not_full() -> None:
    """Models fill up 9 x 7 latents to 10 x 8."""
    mask = torch.zeros(1, 1, 9, 7)
    mask[..., 8, 6] = 1
    tokens = tokens_of_denoise_mask(mask, (1, 4, 9, 7), (1, 2, 2))
    assert tokens.shape == grid_of((1, 4, 9, 7), (1, 2, 2)) == (1, 5, 4)
    assert np.argwhere(tokens).tolist() == [[0, 4, 3]]


def frames_of(mask: torch.Tensor, latent_frames: int, references: int = 0) -> list[int]:
    tokens = tokens_of_mask(mask, (1, 4, latent_frames, 8, 8), (1, 2, 2), 4, references)
    return sorted({int(frame) for frame, *_ in np.argwhere(tokens)})


def test_frames_of_a_mask() -> None:
    pixels = torch.zeros(9, 64, 64)
    pixels[4] = 1
    assert frames_of(pixels, 3) == [1], "frames 1 to 4 are the second latent frame"
    assert frames_of(pixels, 5, 2) == [3], "two references stand in front"
    assert frames_of(pixels[4:5], 5, 2) == [2, 3, 4], "one mask for all frames but the references"
    assert frames_of(pixels[4:5], 3) == [0, 1, 2], "one mask for all frames"
    assert frames_of(pixels, 9) == [4], "a mask for each latent frame"
    assert frames_of(pixels, 1) == [0], "a batch of pictures, which have an axis of frames in some models"
    for latent_frames in (
        2,
        5,
    ):  # more of them may be references, or the mask that of another clip: that is not guessed
        with pytest.raises(hetcache.MaskError, match="the mask has 9 frames"):
            frames_of(pixels, latent_frames)


def test_patch_sizes() -> None:
    class Model:
        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)

    assert patch_of_model(Model(patch_size=2)) == (1, 2, 2)
    assert patch_of_model(Model(patch_size=[1, 2, 2])) == (1, 2, 2)
    assert patch_of_model(Model(patchifier=Model(patch_size=(1, 1, 1)))) == (1, 1, 1)
    assert patch_of_model(Model(patch_spatial=2, patch_temporal=1)) == (1, 2, 2)


def test_latents_that_are_packed() -> None:
    with pytest.raises(hetcache.PlanError, match="neither pictures"):
        grid_of((1, 1, 500), (1, 2, 2))


def test_nodes_are_as_comfyui_wants_them() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in NODE_CLASS_MAPPINGS.values():
        function: Callable[..., Any] = getattr(node, node.FUNCTION)
        inputs = [name for group in node.INPUT_TYPES().values() for name in group]
        assert list(function.__code__.co_varnames[1 : function.__code__.co_argcount]) == inputs
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))


def test_the_settings_node_shows_the_defaults() -> None:
    fields = HetCacheSettings.INPUT_TYPES()["required"]
    defaults = {name: options[1]["default"] for name, options in fields.items()}
    assert HetCacheSettings().make(**defaults) == (Settings(),)
    assert fields["schedule"][0] == list(SCHEDULES) == ["full", "quality", "balanced", "fast"]


def test_nothing_of_comfyui_is_imported() -> None:
    code = "import sys, hetcache_compile.comfyui; assert not any(m.split('.')[0] == 'comfy' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_workflow() -> None:
    """Its links fit, and our nodes in it have the inputs and values that they take."""
    workflow = json.loads(EXAMPLE.read_text())
    ours = {name: node for name, node in workflow.items() if node["class_type"] in NODE_CLASS_MAPPINGS}
    assert {node["class_type"] for node in ours.values()} == set(NODE_CLASS_MAPPINGS)
    for node in workflow.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(source in workflow for source, _ in links)
    for node in ours.values():
        groups = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        known = {name: kind for group in groups.values() for name, kind in group.items()}
        assert set(groups.get("required", {})) <= set(node["inputs"]) <= set(known)
        for name, value in node["inputs"].items():
            choices = known[name][0]
            if isinstance(choices, list):
                assert value in choices
