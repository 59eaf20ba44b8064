"""Procedural clips with captions and masks: shapes that move over panning textures under changing light.

Everything is drawn from one seeded generator and rendered in batches on any device, so that a GPU can train on
clips that no disk holds. Training and held-out clips differ in their seeds and in their texture families.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

COLOURS = {
    "red": (0.85, 0.15, 0.12), "green": (0.2, 0.65, 0.25), "blue": (0.15, 0.3, 0.8), "yellow": (0.95, 0.85, 0.2),
    "orange": (0.95, 0.55, 0.15), "purple": (0.5, 0.2, 0.65), "white": (0.93, 0.93, 0.93), "black": (0.08, 0.08, 0.1),
    "grey": (0.5, 0.5, 0.5), "brown": (0.45, 0.3, 0.15),
}  # fmt: skip
TEXTURES = ("clouds", "stripes", "checks", "spots", "rings", "bricks")
TRAINING_TEXTURES = ("clouds", "stripes", "checks", "spots")
HELD_OUT_TEXTURES = ("rings", "bricks")
"""Never seen in training; captions call them by the word `pattern`, which training uses for every family."""
SHAPES = ("disc", "box", "triangle", "star", "ring")
MASKS = ("box", "ellipse", "brush", "border", "object")
CAPTION_WORDS = (
    *COLOURS, *TRAINING_TEXTURES, *SHAPES, "pattern", "a", "over", "only", "moves", "left", "right", "up", "down",
    "still", "real", "video",
)  # fmt: skip
NOISE_SIZE = 64
"""Size of the periodic noise picture behind clouds and spots."""


@dataclass(frozen=True)
class Batch:
    """Rendered clips.

    Attributes:
        video: `[B, 3, T, H, W]`, -1 to 1.
        mask: `[B, 1, T, H, W]`, 1 where the model is to generate.
        captions: what a clip shows; the object is named only where there is one.
        object_masked: `[B]`, share of frames in which the centre of the first object's place is masked.
    """

    video: torch.Tensor
    mask: torch.Tensor
    captions: list[str]
    object_masked: torch.Tensor


def render_batch(
    count: int,
    frames: int,
    size: int,
    generator: np.random.Generator,
    device: torch.device | str = "cpu",
    textures: Sequence[str] = TRAINING_TEXTURES,
    mask_share: tuple[float, float] = (0.04, 0.6),
    mask_kinds: Sequence[str] = MASKS,
) -> Batch:
    """`count` clips of `frames` frames of `size` x `size` pixels.

    The numbers that describe a clip are drawn on the CPU; pixels are made on `device`, noise pictures too.
    """
    draw = Draw(generator, count, torch.device(device))
    family = draw.choice(len(textures))
    background = render_background(draw, [textures[i] for i in family], frames, size)
    objects = [Mover.draw(draw, frames) for _ in range(2)]
    present = draw.generator.random((2, count)) < np.array([[0.75], [0.5]])
    video = background
    for mover, here in zip(reversed(objects), reversed(present), strict=True):
        video = mover.paint(video, draw.put(here.astype(np.float32)), size)
    video = relight(draw, video)
    mask = render_mask(draw, objects[0], frames, size, mask_share, mask_kinds)
    captions = [caption(draw, i, objects[0] if present[0, i] else None, textures[family[i]]) for i in range(count)]
    return Batch(video.clamp(0, 1) * 2 - 1, mask, captions, share_masked(objects[0], mask))


class Draw:
    """Random numbers for a whole batch, on the device."""

    def __init__(self, generator: np.random.Generator, count: int, device: torch.device) -> None:
        self.generator, self.count, self.device = generator, count, device

    def put(self, array: NDArray[np.float32]) -> torch.Tensor:
        """An array on the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """`[B, *shape]`, uniform."""
        return self.put(self.generator.uniform(low, high, (self.count, *shape)).astype(np.float32))

    def choice(self, options: int) -> NDArray[np.int64]:
        """`[B]` of 0 to options - 1."""
        return self.generator.integers(0, options, self.count)

    def colours(self) -> tuple[torch.Tensor, list[str]]:
        """`[B, 3]` near named colours, and their names."""
        names = [list(COLOURS)[i] for i in self.choice(len(COLOURS))]
        base = np.array([COLOURS[name] for name in names])
        return self.put((base + self.generator.normal(0, 0.04, base.shape)).clip(0, 1).astype(np.float32)), names


def pixel_grid(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of pixel centres, `[1, 1, size, size]`, -1 to 1."""
    axis = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    return axis.view(1, 1, 1, size), axis.view(1, 1, size, 1)


def over_time(frames: int, device: torch.device) -> torch.Tensor:
    """`[1, T]`, 0 to 1 over 17 frames whatever the length: speeds are per frame."""
    return (torch.arange(frames, device=device) / 16).view(1, frames)


def render_background(draw: Draw, families: list[str], frames: int, size: int) -> torch.Tensor:
    """`[B, 3, T, H, W]`, 0 to 1: a texture seen by a camera that pans, turns and zooms.

    A small picture shows a smaller piece of the same world: scales do not depend on `size`.
    """
    x, y = pixel_grid(size, draw.device)
    t = over_time(frames, draw.device)
    view = size / 128
    turn = draw.uniform(-0.15, 0.15, 1) * t + draw.uniform(0, 2 * math.pi, 1)
    zoom = view * torch.exp(draw.uniform(-0.2, 0.2, 1) * t + draw.uniform(-0.4, 0.4, 1))
    pan = draw.uniform(-0.6, 0.6, 2, 1) * t[:, None] + draw.uniform(-20, 20, 2, 1)
    cos, sin = (f(turn)[..., None, None] for f in (torch.cos, torch.sin))
    zoom = zoom[..., None, None]
    u = zoom * (cos * x - sin * y) + pan[:, 0, :, None, None]
    v = zoom * (sin * x + cos * y) + pan[:, 1, :, None, None]
    value = texture(draw, families, u, v)
    dark, light = (draw.colours()[0] for _ in range(2))
    tint = lookup(noise_pictures(draw, 3, 2.5), u / 8, v / 8) * draw.uniform(0, 0.35, 1, 1, 1, 1)
    return blend(dark, light, value) + tint - tint.mean(dim=(2, 3, 4), keepdim=True)


def blend(first: torch.Tensor, second: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Two colours `[B, 3]` mixed by `value` `[B, T, H, W]`: `[B, 3, T, H, W]`."""
    a, b = first[:, :, None, None, None], second[:, :, None, None, None]
    return a + (b - a) * value[:, None]


def texture(draw: Draw, families: list[str], u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[B, T, H, W]`, 0 to 1: each sample's family, evaluated at world coordinates u and v."""

    def each(low: float, high: float) -> torch.Tensor:
        return draw.uniform(low, high, 1, 1, 1)

    noise = lookup(noise_pictures(draw, 1, 1.6), u / 4, v / 4)[:, 0]
    frequency, sharp = each(1.0, 4.0) * math.pi, each(1.0, 8.0)
    waves = torch.sin(frequency * u), torch.sin(frequency * v)
    bend = 0.3 * noise
    row = v * frequency / math.pi
    shifted = u * frequency / (2 * math.pi) + 0.5 * torch.floor(row).remainder(2)
    joint = torch.minimum(_saw(shifted), 0.5 * _saw(row))
    by_name = {
        "clouds": 0.5 + 0.35 * noise,
        "stripes": torch.sigmoid(sharp * (waves[0] + bend)),
        "checks": torch.sigmoid(2 * sharp * waves[0] * waves[1]),
        "spots": torch.sigmoid(2 * sharp * (noise - each(0.0, 0.8))),
        "rings": torch.sigmoid(sharp * torch.sin(frequency * torch.hypot(u.remainder(3) - 1.5, v.remainder(3) - 1.5))),
        "bricks": torch.sigmoid(60 * (joint - 0.08)) * (0.75 + 0.15 * noise),
    }
    result = torch.zeros_like(u)
    for name in sorted(set(families)):
        chosen = draw.put(np.array([family == name for family in families], dtype=np.float32))
        result = result + by_name[name] * chosen[:, None, None, None]
    return result


def _saw(x: torch.Tensor) -> torch.Tensor:
    """Distance to the next whole number."""
    return (x - torch.round(x)).abs()


def noise_pictures(draw: Draw, channels: int, exponent: float) -> torch.Tensor:
    """`[B, channels, S, S]` periodic noise of unit variance, whose spectrum falls as `frequency ** -exponent`."""
    shape = (draw.count, channels, NOISE_SIZE, NOISE_SIZE)
    seed = int(draw.generator.integers(2**62))
    white = torch.randn(shape, generator=torch.Generator(draw.device).manual_seed(seed), device=draw.device)
    f = torch.fft.fftfreq(NOISE_SIZE, device=draw.device) * NOISE_SIZE
    weight = (f[:, None] ** 2 + f[None, :] ** 2).clamp(min=1) ** (-exponent / 2)
    weight[0, 0] = 0
    noise = torch.fft.ifft2(torch.fft.fft2(white) * weight).real
    scaled: torch.Tensor = noise / noise.std(dim=(2, 3), keepdim=True)
    return scaled


def lookup(pictures: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Periodic pictures `[B, C, S, S]` at coordinates `[B, T, H, W]` of period 1: `[B, C, T, H, W]`, bilinear."""
    size = pictures.shape[-1]
    padded = F.pad(pictures, (0, 1, 0, 1), mode="circular")
    at = torch.stack([u.remainder(1), v.remainder(1)], dim=-1) * 2 - 1
    count, frames, height, width, _ = at.shape
    sampled = F.grid_sample(padded, at.view(count, frames * height, width, 2), align_corners=True)
    assert padded.shape[-1] == size + 1
    return sampled.view(count, -1, frames, height, width)


@dataclass(frozen=True)
class Mover:
    """One object of each clip: where it is at each time, and how it looks."""

    x: torch.Tensor
    y: torch.Tensor
    angle: torch.Tensor
    radius: torch.Tensor
    colour: torch.Tensor
    second: torch.Tensor
    bands: torch.Tensor
    shapes: list[str]
    names: list[str]
    velocity: NDArray[np.float32]

    @classmethod
    def draw(cls, draw: Draw, frames: int) -> Mover:
        """Objects that move straight, sway and turn."""
        t = over_time(frames, draw.device)
        velocity = draw.generator.uniform(-1.1, 1.1, (draw.count, 2)).astype(np.float32)
        velocity *= draw.generator.random((draw.count, 1)) < 0.85
        start = draw.uniform(-0.6, 0.6, 2)
        speed = draw.put(velocity)
        sway = draw.uniform(0, 0.15, 1) * torch.sin(draw.uniform(2, 8, 1) * t + draw.uniform(0, 6.3, 1))
        colour, names = draw.colours()
        second, _ = draw.colours()
        return cls(
            x=start[:, :1] + speed[:, :1] * (t - 0.4) + sway,
            y=start[:, 1:] + speed[:, 1:] * (t - 0.4) - sway,
            angle=draw.uniform(-2, 2, 1) * t + draw.uniform(0, 6.3, 1),
            radius=draw.uniform(0.16, 0.42, 1),
            colour=colour,
            second=second,
            bands=draw.uniform(0, 1, 1) * (draw.uniform(0, 1, 1) < 0.5),
            shapes=[SHAPES[i] for i in draw.choice(len(SHAPES))],
            names=names,
            velocity=velocity,
        )

    def paint(self, video: torch.Tensor, present: torch.Tensor, size: int) -> torch.Tensor:
        """`video` `[B, 3, T, H, W]` with the objects of the samples where `present` `[B]` is 1."""
        px, py = pixel_grid(size, video.device)
        dx, dy = px - self.x[..., None, None], py - self.y[..., None, None]
        cos, sin = (f(self.angle)[..., None, None] for f in (torch.cos, torch.sin))
        u = (cos * dx - sin * dy) / self.radius[..., None, None]
        v = (sin * dx + cos * dy) / self.radius[..., None, None]
        outside = self._outside(u, v)
        edge = size / 2 * self.radius[..., None, None]
        alpha = torch.sigmoid(-2 * edge * outside) * present[:, None, None, None]
        stripes = torch.sigmoid(8 * torch.sin(7 * u)) * self.bands[..., None, None]
        look = blend(self.colour, self.second, stripes) * (1 - 0.25 * (u * u + v * v).clamp(max=2))[:, None]
        return video + (look - video) * alpha[:, None]

    def _outside(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Distance-like function of each sample's shape: negative inside."""
        r = torch.sqrt(u * u + v * v + 1e-6)
        around = torch.atan2(v, u + 1e-6)
        by_name = {
            "disc": r - 1,
            "box": torch.maximum(u.abs(), v.abs()) - 0.85,
            "triangle": torch.maximum(v - 0.6, 0.866 * u.abs() - 0.5 * v - 0.6),
            "star": r - 0.7 - 0.3 * torch.cos(5 * around),
            "ring": (r - 0.75).abs() - 0.25,
        }
        result = torch.zeros_like(r)
        for name in sorted(set(self.shapes)):
            chosen = torch.tensor([shape == name for shape in self.shapes], device=u.device, dtype=u.dtype)
            result = result + by_name[name] * chosen[:, None, None, None]
        return result


def relight(draw: Draw, video: torch.Tensor) -> torch.Tensor:
    """Light that changes over time, and from one side to the other."""
    frames, size = video.shape[2], video.shape[3]
    t = over_time(frames, draw.device)
    x, y = pixel_grid(size, draw.device)
    angle = draw.uniform(0, 2 * math.pi, 1) + draw.uniform(-2, 2, 1) * t
    side = (torch.cos(angle)[..., None, None] * x + torch.sin(angle)[..., None, None] * y) * draw.uniform(
        0, 0.2, 1, 1, 1
    )
    flicker = draw.uniform(0, 0.2, 1) * torch.sin(draw.uniform(0.5, 5, 1) * t + draw.uniform(0, 6.3, 1))
    return video * (1 + side + flicker[..., None, None])[:, None]


def render_mask(
    draw: Draw, mover: Mover, frames: int, size: int, share: tuple[float, float], kinds: Sequence[str]
) -> torch.Tensor:
    """`[B, 1, T, H, W]` of 0 and 1, of about the share of pixels asked for; half of them move.

    `object` masks follow the clip's first object and are as large as it is, whether it is painted or not.
    """
    x, y = pixel_grid(size, draw.device)
    t = over_time(frames, draw.device)
    area = torch.exp(draw.uniform(math.log(share[0]), math.log(share[1]), 1))
    aspect = torch.exp(draw.uniform(-0.5, 0.5, 1))
    half_x, half_y = area.sqrt() * aspect, area.sqrt() / aspect
    moves = draw.put((draw.generator.random((draw.count, 1)) < 0.5).astype(np.float32))
    inside = (1 - area.sqrt()).clamp(min=0.05)
    cx = inside * draw.uniform(-1, 1, 1) + moves * draw.uniform(-0.7, 0.7, 1) * (t - 0.5)
    cy = inside * draw.uniform(-1, 1, 1) + moves * draw.uniform(-0.7, 0.7, 1) * (t - 0.5)
    dx, dy = (x - cx[..., None, None]).abs(), (y - cy[..., None, None]).abs()
    hx, hy = half_x[..., None, None], half_y[..., None, None]
    follow = torch.hypot(x - mover.x[..., None, None], y - mover.y[..., None, None])
    frame = torch.sqrt(1 - area)[..., None, None]
    by_name = {
        "box": (dx < hx) & (dy < hy),
        "ellipse": (dx / hx) ** 2 + (dy / hy) ** 2 < 4 / math.pi,
        "brush": _brush(draw, cx, cy, x, y, area),
        "border": torch.maximum(x.abs(), y.abs()).expand(draw.count, frames, size, size) > frame,
        "object": follow < 1.25 * mover.radius[..., None, None],
    }
    chosen = [kinds[i] for i in draw.choice(len(kinds))]
    mask = torch.zeros((draw.count, frames, size, size), device=draw.device)
    for name in sorted(set(chosen)):
        here = draw.put(np.array([kind == name for kind in chosen], dtype=np.float32))
        mask = mask + by_name[name].float() * here[:, None, None, None]
    return mask[:, None]


def _brush(
    draw: Draw, cx: torch.Tensor, cy: torch.Tensor, x: torch.Tensor, y: torch.Tensor, area: torch.Tensor
) -> torch.Tensor:
    """A thick stroke: the union of discs along a random walk."""
    points, stroke = 8, (area.sqrt() * 0.55)[..., None, None]
    steps = draw.generator.normal(0, 0.3, (2, points, draw.count, 1)).cumsum(axis=1).astype(np.float32)
    result = torch.zeros_like(x + cy[..., None, None], dtype=torch.bool)
    for step_x, step_y in zip(draw.put(steps[0]), draw.put(steps[1]), strict=True):
        px, py = (cx + step_x * area.sqrt() * 2)[..., None, None], (cy + step_y * area.sqrt() * 2)[..., None, None]
        result = result | (torch.hypot(x - px, y - py) < stroke)
    return result


def share_masked(mover: Mover, mask: torch.Tensor) -> torch.Tensor:
    """`[B]`: share of frames in which the object's centre is masked."""
    centres = torch.stack([mover.x, mover.y], dim=-1)[:, None, :, None]
    frames = mask.shape[2]
    at_centre = [F.grid_sample(mask[:, :, t], centres[:, :, t], align_corners=False) for t in range(frames)]
    return torch.stack(at_centre).mean(dim=(0, 2, 3, 4))


def caption(draw: Draw, index: int, mover: Mover | None, family: str) -> str:
    """What clip `index` shows. Half of the time the texture is only called a pattern, held-out ones always."""
    named = family in TRAINING_TEXTURES and draw.generator.random() < 0.5
    ground = family if named else "pattern"
    if mover is None:
        return f"only {ground}"
    vx, vy = mover.velocity[index]
    if max(abs(vx), abs(vy)) < 0.15:
        motion = "still"
    elif abs(vx) >= abs(vy):
        motion = "moves right" if vx > 0 else "moves left"
    else:
        motion = "moves down" if vy > 0 else "moves up"
    return f"a {mover.names[index]} {mover.shapes[index]} {motion} over {ground}"
