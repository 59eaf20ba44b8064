"""Folders of models that are not Wan: a call made up from names and config, a recorded call, and clear refusals."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from zoo import ENTRIES
from zoo.entry import Entry

import hetcache_compile as hetcache
from hetcache_compile import Plan, engine
from hetcache_compile.engine.manifest import Manifest
from hetcache_compile.export.model.sample_call import CallShape, read_call, sample_call
from hetcache_compile.export.model.source import describe_model

pytest.importorskip("onnxscript", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")


TEXT = 11
BY_NAME = {entry.name: entry for entry in ENTRIES}
EXPORTED = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel")
CALLED = (
    *EXPORTED,
    "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "WanTransformer3DModel (2.2 TI2V)",
    "WanVACETransformer3DModel",
    "CogVideoXTransformer3DModel",
    "CogVideoXTransformer3DModel (1.5)",
    "MochiTransformer3DModel",
    "ZImageTransformer2DModel",
    "Flux2Transformer2DModel",
    "ChromaTransformer2DModel",
    "SkyReelsV2Transformer3DModel",
    "CosmosTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
)


def plan_of(entry: Entry) -> Plan:
    mask = np.zeros(np.prod(entry.grid), dtype=bool)
    mask[np.random.default_rng(0).permutation(mask.size)[: mask.size // 3]] = True
    return Plan.from_token_mask(mask, entry.grid, num_inference_steps=4)


@functools.cache
def built(name: str) -> torch.nn.Module:
    return BY_NAME[name].build()


@pytest.mark.parametrize("name", CALLED)
def test_a_call_of_the_plans_size_is_made_up(name):
    """What comes out has the size of the latents that went in."""
    plan = plan_of(BY_NAME[name])
    kwargs = sample_call(built(name), CallShape(plan, text_tokens=TEXT), torch.float32)
    with torch.no_grad():
        result = built(name)(**kwargs, return_dict=False)[0]
    latents = kwargs.get("hidden_states", kwargs.get("x"))
    for given, made in zip(latents, result, strict=True):
        assert made.shape == given.shape


def export(export_command, name, tmp_path, *extra):
    entry = BY_NAME[name]
    built(name).save_pretrained(tmp_path / "model")
    plan_of(entry).save(tmp_path / "edit.hetplan")
    out = tmp_path / "engine"
    return out, export_command(
        tmp_path / "model", "--plan", tmp_path / "edit.hetplan", "--out", out, "--text-tokens", TEXT, *extra
    )


@pytest.mark.wide
@pytest.mark.parametrize("name", EXPORTED)
def test_folders_of_other_models_are_exported_and_checked(name, export_command, tmp_path):
    out, (status, text, err) = export(export_command, name, tmp_path)
    assert status == 0, err
    assert "checked with ort-cpu" in text
    manifest = Manifest.load(out)
    assert max(manifest.verified["ort-cpu"].values()) < 1e-5
    assert manifest.cache
    # On another call than the one that the export was checked with.
    plan = plan_of(BY_NAME[name])
    kwargs = sample_call(built(name), CallShape(plan, text_tokens=TEXT, seed=1), torch.float32)
    loaded = engine.load(out)
    with torch.no_grad():
        expected = built(name)(**kwargs, return_dict=False)[0]
    assert float((loaded(**kwargs, return_dict=False)[0] - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.wide
def test_a_recorded_call_is_used_as_it_is(export_command, tmp_path):
    name = "LTXVideoTransformer3DModel"
    recorded = BY_NAME[name].inputs(seed=3)
    torch.save(recorded, tmp_path / "call.pt")
    out, (status, _, err) = export(export_command, name, tmp_path, "--call", tmp_path / "call.pt", "--no-baseline")
    assert status == 0, err
    manifest = Manifest.load(out)
    assert manifest.constants == {"num_frames": 3, "height": 5, "width": 7}
    samples = np.fromfile(out / "sample_inputs" / "full" / "hidden_states.bin", dtype=np.float32)
    np.testing.assert_array_equal(samples, recorded["hidden_states"].numpy().ravel())
    loaded = engine.load(out)
    with torch.no_grad():
        expected = built(name)(**recorded)[0]
    assert float((loaded(**recorded)[0] - expected).abs().max() / expected.abs().max()) < 1e-5
    with pytest.raises(hetcache.HetCacheError, match="another value of height"):
        loaded(**{**recorded, "height": 7, "width": 5})
    with pytest.raises(hetcache.HetCacheError, match="without frame_rate, it was called with frame_rate=25"):
        loaded(**recorded, frame_rate=25)


def test_what_is_no_recorded_call_is_one_clear_line(tmp_path):
    (tmp_path / "text").write_text("hello")
    torch.save([torch.zeros(1)], tmp_path / "list")
    for name, message in (("none", "cannot be read as"), ("text", "cannot be read as"), ("list", "no keyword arg")):
        with pytest.raises(hetcache.HetCacheError, match=message) as caught:
            read_call(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Kandinsky5Transformer3DModel", "visual_rope_pos, text_rope_pos): give --call FILE"),
        ("LatteTransformer3DModel", "has 3 frames, and the model takes pictures"),
    ],
)
def test_a_model_that_is_not_known_says_what_to_do(name, message, export_command, tmp_path):
    out, (status, _, err) = export(export_command, name, tmp_path)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("hetcache-export: ")]
    assert message in line
    assert not out.exists()


def test_where_a_made_up_call_fails_the_error_says_that_it_was_made_up(export_command, tmp_path):
    out, (status, _, err) = export(export_command, "DiTTransformer2DModel", tmp_path)
    assert status == 2
    assert "the sample call (hidden_states, timestep) was made up" in err
    assert "--call FILE" in err
    assert not out.exists()


@pytest.mark.wide
def test_a_mask_that_the_graph_depends_on_is_part_of_the_export(export_command, tmp_path):
    """Mochi's attention drops masked text: the graph is for one mask, and the engine takes no other."""
    name = "MochiTransformer3DModel"
    out, (status, _, err) = export(export_command, name, tmp_path, "--no-baseline", "--verify", "none")
    assert status == 0, err
    manifest = Manifest.load(out)
    assert manifest.constants == {"encoder_attention_mask": [[True] * TEXT]}
    assert manifest.unused == ("encoder_attention_mask",)
    kwargs = sample_call(built(name), CallShape(plan_of(BY_NAME[name]), text_tokens=TEXT), torch.float32)
    loaded = engine.load(out)
    assert loaded.model_inputs(kwargs).keys() == {"hidden_states", "encoder_hidden_states", "timestep"}
    kwargs["encoder_attention_mask"][0, -1] = False
    with pytest.raises(hetcache.HetCacheError, match="another value of encoder_attention_mask"):
        loaded.model_inputs(kwargs)


def test_a_config_has_one_hash_in_every_process() -> None:
    """diffusers lists the arguments that have their defaults in the order of a set, which differs between processes."""
    model = BY_NAME["FluxTransformer2DModel"].build()
    described = describe_model(model)
    assert described.config["patch_size"] == model.config.patch_size
    assert not any(name.startswith("_") for name in described.config)
    model.register_to_config(_use_default_values=["b", "a"])
    assert describe_model(model) == described
    model.register_to_config(patch_size=model.config.patch_size + 1)
    assert describe_model(model).config_sha256 != described.config_sha256
