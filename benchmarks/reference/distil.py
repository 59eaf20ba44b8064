"""Distil the reference editor to 4 or 8 steps without guidance: a low-rank difference to its weights.

    python benchmarks/reference/distil.py --state out/distil --export out/distil/difference.safetensors
    python benchmarks/reference/distil.py --device cuda --minutes 4 --files 32 --clips 32 --size 128 --batch 32 ...

Piecewise rectified flow (Yan et al., arXiv 2405.07510). The teacher's path from noise to clip, with guidance, is cut
into four windows of time. In each the student learns to go straight from where the path enters it to where it leaves:
four steps do with one call in each window, eight with two. Paths are computed first and kept in files; the training
draws from them. It can be stopped at any time and goes on from its last path and checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from train import RealClips, Stage, control_latents, loss_weight, token_ids, training_batch

from hetcache_compile import reference
from hetcache_compile.files import atomically

WINDOWS, STEPS_IN_WINDOW = 4, 4
"""The teacher takes so many steps in each window, by two-step Adams-Bashforth: about as near to the path as 50 of
Euler."""
PATHS = Stage(size=64, batch=4, steps=16, learning_rate=0.0, decay=False)
"""Files of paths: `steps` of `batch` clips each. Clips of 64 x 64 pixels teach the model of 128 x 128 at a ninth of the
time, which is what a CPU has."""
BATCH, RANK, LEARNING_RATE, WARM_UP = 4, 32, 1e-3, 50
LOG = Path(__file__).parents[1] / "results" / "reference_distillation.json"
VALIDATION = Stage(size=128, batch=2, steps=1, learning_rate=0.0, decay=False)


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a difference of a low rank that is trained."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for the weights `W + up @ down`."""
        result: torch.Tensor = self.linear(x) + self.up(self.down(x))
        return result


def with_low_rank(model: nn.Module, rank: int) -> nn.Module:
    """A copy of the model in which each linear layer has a difference; nothing else is trained."""
    student = copy.deepcopy(model).requires_grad_(False)
    linears = [(name, module) for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        parent, _, child = name.rpartition(".")
        setattr(student.get_submodule(parent), child, LowRank(module, rank))
    return student


@dataclass(frozen=True)
class Paths:
    """The teacher's paths for some clips.

    Attributes:
        points: `[WINDOWS + 1, B, Z, T', h, w]`, the latents where windows begin, and at the end.
        control: the model's control input.
        text: `[B, L, C]`, the encoded captions.
        weight: `[B, 1, T', h, w]`, of the loss.
        video: `[B, 3, T, H, W]`, the clips.
        mask: `[B, 1, T, H, W]`.
    """

    points: torch.Tensor
    control: torch.Tensor
    text: torch.Tensor
    weight: torch.Tensor
    video: torch.Tensor
    mask: torch.Tensor

    def clips(self, chosen: Sequence[int]) -> Paths:
        """Some of them."""
        parts = {name: value[list(chosen)] for name, value in vars(self).items() if name != "points"}
        return Paths(points=self.points[:, list(chosen)], **parts)


class Teacher:
    """The reference model as it is, and the times of the windows."""

    def __init__(self, device: torch.device) -> None:
        self.pipe, self.device = reference.load(device=str(device)), device
        self.scheduler = reference.few_steps_scheduler()

    def times(self, steps: int) -> tuple[list[float], list[float]]:
        """The timesteps of so many steps, and their sigmas, 0 at the end."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist(), self.scheduler.sigmas.tolist()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """As the pipeline does: padded with zeros."""
        ids = token_ids(self.pipe.tokenizer, captions, self.device)
        real = (ids != 0).long()
        text: torch.Tensor = self.pipe.text_encoder(ids, attention_mask=real).last_hidden_state * real[..., None]
        return text

    @torch.no_grad()
    def paths(self, stage: Stage, seed: int, number: int, real: RealClips) -> Paths:
        """The paths of one file."""
        batch = training_batch(stage, seed, number, real, self.device)
        control = control_latents(self.pipe.vae, batch.video, batch.mask)
        latents = self.pipe.vae.encode(batch.video).latent_dist.mode()
        text, empty = self.encode(batch.captions), self.encode([""] * len(latents))
        generator = torch.Generator().manual_seed(seed * 10**9 + number)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        points = self.points(noise, control, torch.cat([text, empty]))
        weight = loss_weight(batch.mask, latents.shape[2])
        return Paths(points, control, text, weight, batch.video, batch.mask)

    def points(self, noise: torch.Tensor, control: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Where windows begin, and the end. `texts` are the captions' and, behind all of them, no captions'."""
        timesteps, sigmas = self.times(WINDOWS * STEPS_IN_WINDOW)
        x, before, points = noise, None, [noise]
        for step, timestep in enumerate(timesteps):
            with autocast(self.device):
                text, empty = self.pipe.transformer(
                    torch.cat([x, x]), torch.full((len(texts),), timestep, device=self.device), texts,
                    control_hidden_states=torch.cat([control, control]), return_dict=False,
                )[0].float().chunk(2)  # fmt: skip
            velocity = empty + reference.GUIDANCE_SCALE * (text - empty)
            length = sigmas[step + 1] - sigmas[step]
            slope = 0.0 if before is None else (velocity - before) / (sigmas[step] - sigmas[step - 1])
            x, before = x + length * velocity + length**2 / 2 * slope, velocity
            if (step + 1) % STEPS_IN_WINDOW == 0:
                points.append(x)
        return torch.stack(points)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, as the reference model was trained; a CPU gains nothing by it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Distillation:
    """The student, and everything that a checkpoint holds.

    Args:
        folder: of paths and the checkpoint.
        steps: of the training; its rate falls to 0 over them.
        seed: of clips, noise and their order.
        device: where it is done.
        stage: the paths that are trained on.
        batch: clips of one training step.
        rank: of the difference.
    """

    def __init__(
        self, folder: Path, steps: int, seed: int, device: torch.device, stage: Stage = PATHS, batch: int = BATCH,
        rank: int = RANK,
    ) -> None:  # fmt: skip
        self.folder, self.steps, self.seed, self.device = folder, steps, seed, device
        self.stage, self.batch = stage, batch
        folder.mkdir(parents=True, exist_ok=True)
        self.real = RealClips(folder / "real.npz", device)
        self.teacher = Teacher(device)
        torch.manual_seed(seed)
        self.student = with_low_rank(self.teacher.pipe.transformer, rank).to(device)
        self.trained = {name: weight for name, weight in self.student.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds, self.log = 0, 0.0, list[dict[str, Any]]()
        self.state = folder / "state.pt"
        if self.state.exists():
            saved = torch.load(self.state, map_location=device, weights_only=True)
            self.student.load_state_dict(saved["trained"], strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]

    def save(self) -> None:
        """Write a checkpoint, atomically."""
        trained = {name: weight.detach() for name, weight in self.trained.items()}
        temporary = self.state.with_suffix(".tmp")
        optimizer = self.optimizer.state_dict()
        kept = {"step": self.step, "seconds": self.seconds, "log": self.log}
        torch.save({"trained": trained, "optimizer": optimizer, **kept}, temporary)
        os.replace(temporary, self.state)

    def paths(self) -> Paths:
        """All that are trained on; those without a file are computed."""
        files = [self.file(self.stage, self.seed, number) for number in range(self.stage.steps)]
        parts = [torch.load(file, map_location=self.device, weights_only=True) for file in files]
        return Paths(
            **{name: torch.cat([part[name] for part in parts], dim=int(name == "points")) for name in parts[0]}
        )

    def file(self, stage: Stage, seed: int, number: int) -> Path:
        """The file of some paths, which is written if it is not there."""
        path = self.folder / f"paths-{stage.size}-{seed}-{number:03d}.pt"
        if not path.exists():
            start = time.monotonic()
            paths = vars(self.teacher.paths(stage, seed, number, self.real))
            atomically(path, lambda temporary: torch.save(paths, temporary))
            print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
        return path

    def run(self, minutes: float, every: float) -> None:
        """Train until all steps are done or the time is over, with a checkpoint every few minutes.

        The rate falls to 0 by then, whichever comes first. Paths are no part of the time.
        """
        paths = self.paths()
        file = self.file(VALIDATION, self.seed + 1, 0)
        validation = Paths(**torch.load(file, map_location=self.device, weights_only=True))
        if self.step == 0:
            self.evaluate(validation)
        losses, start, before = list[torch.Tensor](), time.monotonic(), self.seconds
        last = start
        while (done := max(self.step / self.steps, self.seconds / (minutes * 60))) < 1:
            losses.append(self.advance(paths, done))
            self.seconds = before + time.monotonic() - start
            if self.step % 25 == 0 or self.step < 4:
                self.report({"step": self.step, "loss": float(torch.stack(losses).mean())}, start)
                losses = []
            if time.monotonic() - last > every * 60:
                self.evaluate(validation)
                self.save()
                last = time.monotonic()
        self.evaluate(validation)
        self.save()

    def advance(self, paths: Paths, done: float) -> torch.Tensor:
        """One step of the training, of which a share is done; returns its loss."""
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / WARM_UP) * (1 - done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(paths)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def loss(self, paths: Paths) -> torch.Tensor:
        """Mask-weighted squared error of the way to the end of the window, over the length of that way.

        Each clip has a window of its own, and begins where the path enters it or half-way on the straight line.
        """
        generator = np.random.default_rng([self.seed, self.step])
        chosen = paths.clips(generator.choice(len(paths.text), self.batch, replace=False).tolist())
        moments = generator.integers(0, 2 * WINDOWS, self.batch)
        timesteps, sigmas = self.teacher.times(2 * WINDOWS)
        x, target, length = [], [], []
        for clip, moment in enumerate(moments.tolist()):
            first = moment // 2
            begin, end = chosen.points[first, clip], chosen.points[first + 1, clip]
            straight = (begin - end) / (sigmas[2 * first] - sigmas[2 * first + 2])
            x.append(begin + (sigmas[moment] - sigmas[2 * first]) * straight)
            target.append(straight)
            length.append(sigmas[moment] - sigmas[2 * first + 2])
        when = torch.tensor([timesteps[moment] for moment in moments], device=self.device)
        with autocast(self.device):
            velocity = self.student(
                torch.stack(x), when, chosen.text, control_hidden_states=chosen.control, return_dict=False
            )[0].float()
        weight = chosen.weight * torch.tensor(length, device=self.device).view(-1, 1, 1, 1, 1)
        error = (velocity - torch.stack(target)) ** 2
        return (error * weight).sum() / (chosen.weight.sum() * error.shape[1])

    def report(self, entry: dict[str, Any], start: float) -> None:
        """One line of progress."""
        self.log.append(entry)
        print(json.dumps(entry), f"{time.monotonic() - start:.0f} s", flush=True)

    @torch.no_grad()
    def evaluate(self, validation: Paths) -> None:
        """PSNR inside the mask of the student's 4 and 8 steps, to the teacher's result and to the clips."""
        decode = self.teacher.pipe.vae.decode
        teacher = decode(validation.points[-1]).sample
        entry: dict[str, Any] = {"step": self.step}
        for steps in (WINDOWS, 2 * WINDOWS):
            x = validation.points[0]
            timesteps, sigmas = self.teacher.times(steps)
            for step, timestep in enumerate(timesteps):
                velocity = self.student(
                    x, torch.full((len(x),), timestep, device=self.device), validation.text,
                    control_hidden_states=validation.control, return_dict=False,
                )[0]  # fmt: skip
                x = x + (sigmas[step + 1] - sigmas[step]) * velocity
            result = decode(x).sample
            for name, other in (("teacher", teacher), ("truth", validation.video)):
                entry[f"{steps} steps to {name}"] = masked_psnr(result, other, validation.mask)
        entry["teacher to truth"] = masked_psnr(teacher, validation.video, validation.mask)
        self.log.append(entry)
        print(json.dumps(entry), flush=True)

    def export(self, file: Path, log: Path) -> None:
        """Write the difference in bf16, by the names that `load_lora_weights` of diffusers knows; and the log."""
        parts = {"down": "lora_A", "up": "lora_B"}
        tensors = {}
        for name, weight in self.trained.items():
            module, part, _ = name.rsplit(".", 2)
            tensors[f"transformer.{module}.{parts[part]}.weight"] = weight.detach().to("cpu", torch.bfloat16)
        atomically(file, lambda temporary: save_file(tensors, temporary))
        log.write_text(json.dumps(self.log) + "\n")


def masked_psnr(video: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> float:
    """In dB, the mean over clips."""
    error = ((video.clamp(-1, 1) - other.clamp(-1, 1)) ** 2 * mask).sum((1, 2, 3, 4)) / (3 * mask.sum((1, 2, 3, 4)))
    return float((10 * torch.log10(4 / error)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("out/distil"), help="folder of paths and the checkpoint")
    parser.add_argument("--export", type=Path, help="where to write the difference when the time is over")
    parser.add_argument("--steps", type=int, default=500, help="of the training; its rate falls to 0 over them")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time, all runs together")
    parser.add_argument("--every", type=float, default=10.0, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", type=int, default=PATHS.steps, help="of paths")
    parser.add_argument("--clips", type=int, default=PATHS.batch, help="whose paths are in each file")
    parser.add_argument("--size", type=int, default=PATHS.size, help="of these clips, in pixels")
    parser.add_argument("--batch", type=int, default=BATCH, help="clips of one training step")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    stage = Stage(size=options.size, batch=options.clips, steps=options.files, learning_rate=0.0, decay=False)
    distillation = Distillation(
        options.state, options.steps, options.seed, torch.device(options.device), stage, options.batch, options.rank
    )
    distillation.run(options.minutes, options.every)
    if options.export:
        distillation.export(options.export, options.log)


if __name__ == "__main__":
    main()
