"""The reference model: its clips, codec, weights, and a training that goes on where it was stopped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hetcache_compile import reference
from hetcache_compile.calibration.output_weights import step_lengths
from hetcache_compile.edit.editing import EditRequest, run_pipeline
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.errors import InputFileError
from hetcache_compile.reference.clips import HELD_OUT_TEXTURES, TRAINING_TEXTURES, render_batch
from hetcache_compile.reference.codec import BlockTransformCodec


@pytest.fixture(scope="module")
def train():
    path = Path(__file__).parents[1] / "benchmarks" / "reference" / "train.py"
    spec = importlib.util.spec_from_file_location("reference_training", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe():
    return reference.load()


def test_held_out_clips_are_the_same_each_time_and_never_trained_on() -> None:
    first, again = reference.held_out(4), reference.held_out(4)
    assert len({clip.name for clip in first}) == 4
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.video, b.video)
        assert a.video.shape == (17, 128, 128, 3)
        assert (a.video[a.mask] == 128).all()
        np.testing.assert_array_equal(a.video[~a.mask], a.truth[~a.mask])
    assert not set(HELD_OUT_TEXTURES) & set(TRAINING_TEXTURES)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_mask_shares_are_about_what_was_asked_for(number: int) -> None:
    assert reference.procedural_clip(number).mask.mean() == pytest.approx(reference.MASK_SHARES[number], rel=0.25)


def test_a_prompt_names_the_object_only_where_it_is_masked() -> None:
    masked = render_batch(6, 5, 32, np.random.default_rng(0), mask_kinds=("object",)).object_masked
    border = render_batch(6, 5, 32, np.random.default_rng(0), mask_share=(0.04, 0.04), mask_kinds=("border",))
    # An object's own mask covers its centre as long as the centre is in the picture.
    assert masked.mean() > 0.6
    assert border.object_masked.mean() < 0.5


def test_the_codec_is_orthogonal_up_to_its_scale_and_codes_grey_as_zero() -> None:
    video = torch.randn(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    codec = BlockTransformCodec(z_dim=96, latents_mean=(0.0,) * 96, latents_std=(1.0,) * 96)
    codec.fit(video)
    latents = codec.encode(video).latent_dist.mode()
    assert latents.shape == (2, 96, 3, 4, 6)
    torch.testing.assert_close(codec.decode(latents).sample, video, atol=2e-5, rtol=0)
    assert codec.encode(torch.zeros_like(video)).latent_dist.mode().abs().max() == 0


def test_the_shipped_codec_keeps_what_matters(pipe) -> None:
    clip = reference.procedural_clip(1)
    video = torch.from_numpy(clip.truth).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    back = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample[0]
    frames = ((back + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    assert psnr(frames, clip.truth) > 38


def test_the_weights_are_small_enough_and_inpaint(pipe) -> None:
    size = sum(path.stat().st_size for path in reference.FOLDER.rglob("*") if path.is_file())
    assert size < 16e6
    clip = reference.procedural_clip(3)
    request = EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    frames = run_pipeline(pipe, request, "test", lambda *_: None).frames
    grey = psnr(clip.video, clip.truth, clip.mask)
    colour = clip.video[~clip.mask].mean(axis=0).round().astype(np.uint8)
    mean = psnr(np.where(clip.mask[..., None], colour, clip.video), clip.truth, clip.mask)
    assert psnr(frames, clip.truth, clip.mask) > max(grey, mean) + 3
    assert psnr(frames, clip.truth, ~clip.mask) > 30


def test_the_times_of_eight_few_steps_contain_those_of_four_and_each_is_eulers() -> None:
    scheduler = reference.load(few_steps=True).scheduler
    timesteps = {}
    for steps in (4, 8):
        scheduler.set_timesteps(steps)
        timesteps[steps], sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.double().numpy()
        np.testing.assert_allclose(step_lengths(scheduler, steps), sigmas[:-1] - sigmas[1:], rtol=1e-3)
    assert set(timesteps[4]) < set(timesteps[8])


def test_the_distilled_model_fills_holes_in_four_steps_without_guidance() -> None:
    clip = reference.held_out(1)[0]
    plain, pipe = reference.load(), reference.load(distilled=True)
    request = EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    frames = run_pipeline(pipe, request, "test", lambda *_: None).frames
    assert psnr(frames, clip.truth, clip.mask) > psnr(clip.video, clip.truth, clip.mask) + 10
    assert type(pipe.scheduler) is not type(plain.scheduler)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(pipe.transformer.parameters(), plain.transformer.parameters(), strict=True)
    ]
    assert any(moved)


def test_an_unknown_demo_edit_is_refused() -> None:
    with pytest.raises(InputFileError, match="remove or replace"):
        reference.demo_clip("explode")


def test_training_goes_on_where_it_was_stopped(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "STAGES", (train.Stage(16, 2, 2, 1e-3, False), train.Stage(32, 1, 2, 1e-3, True)))
    monkeypatch.setattr(train, "CODEC_STAGE", train.Stage(32, 2, 0, 0.0, False))
    monkeypatch.setattr(train, "mask_psnr", lambda *_: {})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    np.savez(tmp_path / "real.npz", clip=np.random.default_rng(0).integers(0, 256, (40, 3, 48, 64), np.uint8))
    device = torch.device("cpu")
    real = train.RealClips(tmp_path / "real.npz", device)

    def weights(training) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in training.ema.parameters()])

    whole = train.Training(tmp_path / "whole.pt", 0, device, real)
    whole.run(60, 60)
    stopped = train.Training(tmp_path / "stopped.pt", 0, device, real)
    stopped.run(0, 60)
    assert stopped.step == 1
    resumed = train.Training(tmp_path / "stopped.pt", 0, device, real)
    resumed.run(60, 60)
    assert resumed.step == whole.step == 4
    torch.testing.assert_close(weights(resumed), weights(whole), atol=1e-6, rtol=0)
    assert not torch.equal(weights(whole), weights(stopped))
