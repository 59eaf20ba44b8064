"""What pipelines of several families share: the VAE of images, the scheduler, the sizes of images."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from zoo.entry import seeded

from .row import row

IMAGE = (1, 16, 24)
"""A call for 4 x 6 tokens: the VAE halves height and width, and so does the patch."""
IMAGE_GRID = (1, 4, 6)
EIGHTH = (1, 64, 96)
"""A call for 4 x 6 tokens where the VAE divides height and width by 8."""
EIGHTH_VAE: dict[str, Any] = {
    "block_out_channels": (4,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CHANNELS = 2
TEXT, TEXT_WIDTH, POOLED = 7, 13, 17


def vae(**changes: Any) -> AutoencoderKL:
    """An image VAE that halves height and width."""
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": CHANNELS,
        "sample_size": IMAGE[2],
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return seeded(lambda: AutoencoderKL(**{**config, **changes}))


def flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of most flow models; its shift depends on the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0, **changes})


image_row = partial(row, size=IMAGE, grid=IMAGE_GRID, layout="BCHW")
packed_row = partial(image_row, layout="BNC")
"""The row of an image pipeline that packs its latents into tokens."""
