"""Edits with any pipeline: what is found in its call's signature, what is asked for, and the report of a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline, FluxKontextInpaintPipeline
from PIL import Image
from pipelines import ROWS
from pipelines.flux import FILL, parts
from pipelines.parts import POOLED, TEXT_WIDTH, vae
from pipelines.qwen import LARGE
from pipelines.row import Row, picture
from pipelines_check import wrong_plan
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from zoo.entry import seeded

import hetcache_compile as hetcache
from hetcache_compile.cli.call import call_arguments, size_of, size_of_picture
from hetcache_compile.edit import editing
from hetcache_compile.edit.editing import EditRequest
from hetcache_compile.pipelines.inputs import Inputs, holds_pictures
from hetcache_compile.reference.demo import byte_tokenizer

BY_NAME = {row.name: row for row in ROWS}
FLUX_SIZE = ("--height", 16, "--width", 24)
QWEN_SIZE = ("--height", LARGE[1], "--width", LARGE[2])
RUN = ("--inner", "eager", "--dtype", "float32")


@pytest.fixture(scope="module")
def flux_fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint: text encoders too."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 16
    words = len(tokenizer)
    clip = {"hidden_size": POOLED, "intermediate_size": 29, "num_hidden_layers": 1, "num_attention_heads": 1}
    t5 = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 19, "num_layers": 1, "num_heads": 2}
    text = {
        "text_encoder": seeded(lambda: CLIPTextModel(CLIPTextConfig(vocab_size=words, **clip))),
        "text_encoder_2": seeded(lambda: T5EncoderModel(T5Config(vocab_size=words, **t5))),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }
    folder = tmp_path_factory.mktemp("flux")
    FluxFillPipeline(**{**parts(**FILL), **text}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_edit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint without a text encoder, and the prompt that stands in for it."""
    row, folder = BY_NAME["QwenImageEditPipeline"], tmp_path_factory.mktemp("qwen")
    row.build().save_pretrained(folder)
    np.save(folder / "text.npy", row.call()["prompt_embeds"].numpy())
    return folder, ("--call", f"prompt_embeds={folder / 'text.npy'}")


def save_inputs(folder: Path, size: tuple[int, int, int], name: str) -> tuple[Any, ...]:
    """A picture and its mask as files, and the options that name them."""
    picture(size).save(folder / "in.png")
    mask = BY_NAME[name].mask[0]
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return "--image", folder / "in.png", "--mask", folder / "mask.png"


@pytest.mark.wide
def test_flux_fill(hetcache_command, flux_fill, tmp_path) -> None:
    """The three commands on one folder; the pipeline has its own picture, mask and guidance."""
    files = save_inputs(tmp_path, (1, 16, 24), "FluxFillPipeline")
    status, out, err = hetcache_command("explain", flux_fill, *FLUX_SIZE)
    assert status == 0, err
    assert "keys and values" in out
    plan = ("plan", "--model", flux_fill, *files, "-o", tmp_path / "a.hetplan", "--steps", 4, "--schedule", "FPR")
    few = ("--margin", 0, "--set", "multiple=1", "--context-ratio", 0)
    status, out, err = hetcache_command(*plan, *FLUX_SIZE, *few, "--memory", "1KiB")
    assert status == 2
    assert "no plan keeps its cache within 1 KiB: the least is" in err
    status, out, err = hetcache_command(*plan, *FLUX_SIZE, *few, "--memory", "1MiB", "--dtype", "float32")
    assert status == 0, err
    assert "\nthe cache takes " in out
    made = hetcache.Plan.load(tmp_path / "a.hetplan")
    assert np.array_equal(made.active_mask, BY_NAME["FluxFillPipeline"].token_mask.ravel())
    assert made.token_inputs == {"hidden_states": (1, 0)}
    assert made.cache_dtype == "same"
    assert made.cache_size is not None
    assert len(made.timesteps) == 4
    status, _, err = hetcache_command(
        "edit", "--model", flux_fill, *files, "--prompt", "a cat", "--plan", tmp_path / "a.hetplan", *FLUX_SIZE, *RUN,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 1}
    assert report["guidance_scale"] == 30.0
    assert report["psnr_generative_db"] > 10
    assert report["psnr_context_db"] > 10
    assert report["speedup_vs_compiled"] > 0
    names = {"edit.png", "side_by_side.png", "plan.png", "edit.hetplan", "report.json", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out" / "edit.png") as edited, Image.open(tmp_path / "out" / "side_by_side.png") as side:
        assert edited.size == (24, 16)
        assert np.array_equal(np.asarray(side)[-16:, -24:], np.asarray(edited))
        assert side.width == 3 * 24
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<body class="compared still">' in page
    assert "1 frame of 24 x 16, 4 steps, guidance 30, seed 0" in page
    assert "See edit.png beside it" in page


@pytest.mark.wide
def test_flux_fill_compiled_ahead(hetcache_command, flux_fill, tmp_path) -> None:
    """A picture's forms too, by the pipeline's own guidance."""
    files = save_inputs(tmp_path, (1, 16, 24), "FluxFillPipeline")
    plan, made = tmp_path / "a.hetplan", tmp_path / "compiled"
    hetcache_command("plan", "--model", flux_fill, *files, "-o", plan, "--steps", 3, "--schedule", "FPR", *FLUX_SIZE)
    of_model = (flux_fill, "--plan", plan, "-o", made, *FLUX_SIZE, "--dtype", "float32")
    status, out, err = hetcache_command("compile", *of_model, "--call", "nothing=1")
    assert status == 2
    assert "takes no nothing" in err
    status, out, err = hetcache_command("compile", *of_model)
    assert status == 0, err
    assert "MiB to " in out
    status, _, err = hetcache_command(
        "edit", "--model", flux_fill, *files, "--prompt", "a cat", "--plan", plan, *FLUX_SIZE, "--dtype", "float32",
        "--no-baseline", "--compiled", made, "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 0}


@pytest.mark.parametrize("name", ["mask.png", pytest.param("mask.npy", marks=pytest.mark.wide)])
def test_a_plan_of_a_picture_needs_its_mask_alone(name, hetcache_command, flux_fill, tmp_path) -> None:
    """The size is the mask's own, cut to whole tokens of the usual size; the plan is that of the picture."""
    mask = np.zeros((41, 60), dtype=np.uint8)
    mask[:20, :30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", mask)
    picture((1, *mask.shape)).save(tmp_path / "in.png")
    plans = []
    for options in ((), ("--image", tmp_path / "in.png", "--prompt", "a cat")):
        status, _, err = hetcache_command(
            "plan", "--model", flux_fill, "--mask", tmp_path / name, *options, "-o", tmp_path / "a.hetplan",
            "--preview", tmp_path / "plan.png", "--steps", 3,
        )  # fmt: skip
        assert status == 0, err
        plans.append(hetcache.Plan.load(tmp_path / "a.hetplan"))
    assert plans[0].grid == (1, 8, 12)
    assert np.array_equal(plans[0].token_kind, plans[1].token_kind)
    with Image.open(tmp_path / "plan.png") as drawn:
        assert drawn.width > 300


@pytest.mark.wide
def test_qwen_image_edit(hetcache_command, qwen_edit, tmp_path) -> None:
    """It takes no mask: only the plan has it. Its references stand behind the tokens."""
    folder, text = qwen_edit
    files = save_inputs(tmp_path, LARGE, "QwenImageEditPipeline")
    status, out, err = hetcache_command("explain", folder, *text, *QWEN_SIZE)
    assert status == 0, err
    assert "keys and values" in out
    plan = ("plan", "--model", folder, *files[2:], *text, "-o", tmp_path / "a.hetplan", "--steps", 3, *QWEN_SIZE)
    status, _, err = hetcache_command(*plan, "--margin", 0, "--set", "multiple=1", "--context-ratio", 0)
    assert status == 0, err
    made = hetcache.Plan.load(tmp_path / "a.hetplan")
    assert np.array_equal(made.active_mask, BY_NAME["QwenImageEditPipeline"].token_mask.ravel())
    status, _, err = hetcache_command(
        "edit", "--model", folder, *files, *text, "--call", "true_cfg_scale=1", "--steps", 4, "--schedule", "FPR",
        *QWEN_SIZE, *RUN, "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 1}
    assert report["plan"]["num_tokens"] == 24
    assert report["call"] == {"true_cfg_scale": 1}
    assert report["psnr_generative_db"] is not None
    with Image.open(tmp_path / "out" / "edit.png") as edited:
        assert edited.size == LARGE[:0:-1]


def index(folder: Path, pipeline: str) -> Path:
    """A checkpoint without weights: what is told from its class alone is told before they are read."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        ("FluxFillPipeline", ("--prompt", "a"), "FluxFillPipeline needs --image, the picture that is edited"),
        ("WanVACEPipeline", ("--prompt", "a"), "WanVACEPipeline needs --video, the video that is edited"),
        ("FluxFillPipeline", ("--prompt", "a", "--video", "in.png"), "takes no video: give --image"),
        ("WanVACEPipeline", ("--prompt", "a", "--image", "in.png"), "takes no picture: give --video"),
        ("FluxFillPipeline", ("--image", "in.png", "--video", "in.png"), "give --video or --image, not both"),
        ("FluxPipeline", ("--prompt", "a"), "takes no picture and no video: it edits nothing"),
        ("FluxFillPipeline", ("--image", "in.png"), "FluxFillPipeline needs --prompt, what to generate"),
        ("FluxFillPipeline", ("--image", "in.png", "--prompt", "a", "--negative-prompt", "b"), "takes no negative_pro"),
        ("FluxFillPipeline", ("--image", "in.png", "--prompt", "a", "--call", "x=1"), "takes no x: its arguments are"),
        ("FluxFillPipeline", ("--image", "in.png", "--prompt", "a", "--call", "x"), "--call takes NAME=VALUE, got x"),
        ("FluxFillPipeline", ("--image", "in.png", "--prompt", "a", "--call", "mask_image=in.png"), "use --mask"),
        ("FluxFillPipeline", ("--image", "in.png", "--prompt", "a", "--call", "num_inference_steps=3"), "use --steps"),
        ("FluxFillPipeline", ("--image", "in.png", "--call", "prompt_embeds=no.npy"), "no file or folder at no.npy"),
        ("WanAnimatePipeline", ("--video", "in.png", "--prompt", "a"), "give --call image=... --call pose_video=..."),
        ("NoSuchPipeline", ("--image", "in.png", "--prompt", "a"), "holds a NoSuchPipeline, which diffusers"),
    ],
)  # fmt: skip
def test_what_is_missing_is_asked_for_before_weights_are_read(
    pipeline, options, message, hetcache_command, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture((1, 16, 16)).save("in.png")
    out = tmp_path / "out"
    model = index(tmp_path / "model", pipeline)
    status, _, err = hetcache_command("edit", "--model", model, "--mask", "mask.png", "--out", out, *options)
    assert status == 2
    assert message in " ".join(err.split())
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.wide
def test_a_picture_that_a_pipeline_misses_is_named(hetcache_command, tmp_path) -> None:
    """Its signature does not say so; it fails in its own way, before anything is compiled."""
    BY_NAME["FluxControlInpaintPipeline"].build().save_pretrained(tmp_path / "model")
    files = save_inputs(tmp_path, (1, 16, 24), "FluxControlInpaintPipeline")
    call = BY_NAME["FluxControlInpaintPipeline"].call()
    text = []
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        np.save(tmp_path / f"{name}.npy", call[name].numpy())
        text += ["--call", f"{name}={tmp_path / name}.npy"]
    edit = ("edit", "--model", tmp_path / "model", *files, *text, *FLUX_SIZE, *RUN, "--out", tmp_path / "out")
    status, _, err = hetcache_command(*edit)
    assert status == 2
    assert "it takes control_image" in err
    assert not (tmp_path / "out").exists()
    given = ("--call", f"control_image={tmp_path / 'in.png'}", "--call", "strength=0.6", "--no-baseline")
    status, _, err = hetcache_command(*edit, *given, "--steps", 5, "--schedule", "FPR")
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == {"FULL": 2, "PARTIAL": 1, "REUSE": 0}
    assert report["psnr_generative_db"] is None


FOUND = {
    "FluxInpaintPipeline": ("image", "mask_image"),
    "FluxKontextInpaintPipeline": ("image", "mask_image"),
    "StableDiffusion3InpaintPipeline": ("image", "mask_image"),
    "QwenImageInpaintPipeline": ("image", "mask_image"),
    "QwenImageControlNetInpaintPipeline": ("control_image", "control_mask"),
    "FluxPipeline": (None, None),
    "WanVACEPipeline": ("video", "mask"),
    "WanVideoToVideoPipeline": ("video", None),
    "WanImageToVideoPipeline (two experts)": ("image", None),
    "WanAnimatePipeline (replace)": ("background_video", "mask_video"),
    "CogVideoXVideoToVideoPipeline": ("video", None),
    "LucyEditPipeline": ("video", None),
}
"""The arguments of what is edited and of its mask."""


def request_of(row: Row, inputs: Inputs) -> EditRequest:
    """A row's call as a request: what a request has no name for is given by its own."""
    frames = np.random.default_rng(0).integers(0, 256, (*row.size, 3), dtype=np.uint8)
    call = row.call()
    named = {name: call.pop(name) for name in ("num_inference_steps", "guidance_scale") if name in call}
    found = (inputs.source, inputs.mask, "height", "width", "num_frames")
    others = {name: value for name, value in call.items() if name not in found}
    return EditRequest(frames, np.array(row.mask), "", still=not inputs.takes_video, call=others, **named)


@pytest.mark.parametrize("name", FOUND)
def test_a_request_is_run_by_the_names_of_arguments(name: str) -> None:
    """Planned, run and decoded; a pipeline may choose another number of frames than the request has."""
    row = BY_NAME[name]
    pipe = row.build()
    inputs = Inputs.of(type(pipe))
    assert (inputs.source, inputs.mask) == FOUND[name]
    request = request_of(row, inputs)
    plan = editing.make_plan(pipe, request, "full", margin=1, multiple=1)
    assert not wrong_plan(row, plan)
    run = editing.run_pipeline(pipe, request, "eager", lambda *_: None)
    assert len(run.seconds) == row.calls * row.steps == row.calls * len(plan.steps)
    assert run.frames is not None
    assert run.frames.shape[1:] == (*row.size[1:], 3)
    assert (len(run.frames) > 1) == inputs.makes_video


def test_a_pipeline_may_stretch_its_picture() -> None:
    """Kontext edits pictures in the sizes that it was trained in: here 16 x 20 pixels in 944 x 1104."""
    # Attention over as many latents takes minutes.
    pipe = FluxKontextInpaintPipeline(**{**parts(), "vae": vae(mid_block_add_attention=False)})
    row = BY_NAME["FluxKontextInpaintPipeline"]
    call = {name: value for name, value in row.call().items() if name in ("prompt_embeds", "pooled_prompt_embeds")}
    mask = np.zeros((1, 16, 20), dtype=bool)
    mask[:, :, 10:] = True
    request = EditRequest(np.zeros((1, 16, 20, 3), dtype=np.uint8), mask, "", still=True, call=call)
    plan = editing.make_plan(pipe, request, "full", margin=0, context_ratio=0, multiple=1)
    assert plan.grid == (1, 944 // 4, 1104 // 4)
    assert np.array_equal(plan.active_mask.reshape(plan.grid)[0, 0], np.arange(276) >= 138)
    crop = replace(request, call={**call, "padding_mask_crop": 4})
    with pytest.raises(hetcache.PlanError, match="padding_mask_crop edits a part of the picture"):
        editing.make_plan(pipe, crop, "full")


def test_a_strength_leaves_steps_to_warm_up() -> None:
    """As many as the plan has kinds of steps, whatever the strength."""
    row = BY_NAME["FluxInpaintPipeline"]
    pipe = row.build()
    request = request_of(row, Inputs.of(type(pipe)))
    for strength in (0.3, 0.6, 1.0):
        short = editing.shortened(pipe, replace(request, call={**request.call, "strength": strength}), 3)
        run = editing.run_pipeline(pipe, short, "eager", lambda *_: None, decode=False)
        assert 3 <= len(run.seconds) <= 4


def test_a_request_in_the_size_that_a_pipeline_chose() -> None:
    mask = np.zeros((2, 8, 8), dtype=bool)
    mask[1, :4] = True
    video = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    request = EditRequest(video, mask, "a cat")
    assert request.like(np.zeros((2, 8, 8, 3), dtype=np.uint8)) is request
    larger = request.like(np.zeros((3, 16, 24, 3), dtype=np.uint8))
    assert larger.video.shape == (3, 16, 24, 3)
    assert np.array_equal(larger.mask[1:], np.broadcast_to(np.arange(16)[:, None] < 8, (2, 16, 24)))
    assert not larger.mask[0].any()


def test_sizes_that_are_not_given() -> None:
    inputs = Inputs.of(type(BY_NAME["FluxFillPipeline"].build()))
    assert size_of(inputs, None, None, None) == (1, 1024, 1024)
    assert size_of(None, None, None, 640) == (81, 480, 640)
    assert size_of_picture((500, 700), None, None) == (496, 688)
    assert size_of_picture((3000, 4000), None, None) == (880, 1168)
    assert size_of_picture((3000, 4000), 600, None) == (600, 800)
    assert size_of_picture((3000, 4000), None, 300) == (224, 300)
    assert size_of_picture((3, 4), 5, 7) == (5, 7)


def test_other_arguments_of_a_call(tmp_path: Path) -> None:
    """Numbers, text, and files: pictures and encoded prompts."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        picture((1, 4, 6)).save(folder / f"{number}.png")
    np.save(tmp_path / "a.npy", np.ones((2, 3), dtype=np.float32))
    read = call_arguments(
        ["strength=0.8", "x=true", "sigmas=[1, 0.5]", "mode=replace", "prompt_2=a = b", f"image={folder / '0.png'}",
         f"video={folder}", f"text={tmp_path / 'a.npy'}", "none=null", "empty="]
    )  # fmt: skip
    plain = {"strength": 0.8, "x": True, "sigmas": [1, 0.5], "mode": "replace", "prompt_2": "a = b", "none": None}
    assert {name: read[name] for name in plain} == plain
    assert read["empty"] == ""
    assert read["image"].size == (6, 4)
    assert [frame.size for frame in read["video"]] == [(6, 4)] * 3
    assert torch.equal(read["text"], torch.ones(2, 3))
    for name, message in (("no.png", "no file or folder at"), ("empty", "holds no pictures")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(hetcache.HetCacheError, match=message):
            call_arguments([f"control_image={tmp_path / name}"])


def test_arguments_that_take_pictures() -> None:
    taking = ("image", "control_image", "pose_video", "reference_images", "image_reference", "control_mask")
    assert all(map(holds_pictures, taking))
    others = ("prompt_attention_mask", "negative_prompt_embeds_mask", "num_images_per_prompt", "image_embeds", "mode")
    assert not any(map(holds_pictures, others))
