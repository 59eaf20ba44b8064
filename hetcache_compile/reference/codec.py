"""The reference model's latent codec: a linear transform of pixel blocks, with AutoencoderKLWan's interface.

A Karhunen-Loève transform (principal components of blocks of 2 frames x 4 x 4 pixels x RGB, the optimal linear
transform coding) keeps the strongest `z_dim` components. It costs one strided convolution in each direction, so
times measured with the reference model are times of the transformer. Components are divided by a power of their
standard deviation below 1: weak ones stay weaker than strong ones, and are generated later.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

FRAMES, PIXELS = 2, 4
"""A block is 2 frames of 4 x 4 pixels; like Wan's, the codec gives the first frame a latent frame of its own."""


class BlockTransformCodec(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Video `[B, 3, 1 + 2 k, 4 h, 4 w]` from -1 to 1, to and from latents `[B, z_dim, 1 + k, h, w]`.

    Grey (0) is coded as 0, and blocks are coded apart from one another: masked blocks tell nothing of what they hid.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        z_dim: int = 32,
        latents_mean: tuple[float, ...] = (0.0,) * 32,
        latents_std: tuple[float, ...] = (1.0,) * 32,
    ) -> None:
        super().__init__()
        self.temperal_downsample = (False, True)  # diffusers' spelling: 2 spatial halvings, 1 of them temporal too
        shape = (z_dim, 3, FRAMES, PIXELS, PIXELS)
        self.analysis = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.synthesis = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Latents, as `latent_dist.mode()` (there is nothing to sample)."""
        x = torch.cat([x[:, :, :1]] * (FRAMES - 1) + [x], dim=2)
        latents = F.conv3d(x, self.analysis, stride=(FRAMES, PIXELS, PIXELS))
        distribution = SimpleNamespace(mode=lambda: latents, sample=lambda generator=None: latents)
        return SimpleNamespace(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """The video of latents."""
        x = F.conv_transpose3d(z, self.synthesis, stride=(FRAMES, PIXELS, PIXELS))[:, :, FRAMES - 1 :]
        return SimpleNamespace(sample=x) if return_dict else (x,)

    @torch.no_grad()
    def fit(self, videos: torch.Tensor, exponent: float = 0.5) -> torch.Tensor:
        """Set the transform from videos `[B, 3, T, H, W]`; returns the variance of all components, descending.

        Args:
            videos: from -1 to 1, sizes as in `encode`.
            exponent: components are divided by `std ** exponent`, and by one number for all so that the mean
                variance of the kept ones is 1.
        """
        x = torch.cat([videos[:, :, :1]] * (FRAMES - 1) + [videos], dim=2)
        blocks = x.unfold(2, FRAMES, FRAMES).unfold(3, PIXELS, PIXELS).unfold(4, PIXELS, PIXELS)
        rows = blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 3 * FRAMES * PIXELS**2).double()
        variance, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        variance, vectors = variance.flip(0), vectors.flip(1)
        kept = variance[: self.config.z_dim]
        scale = kept.sqrt() ** exponent
        scale = scale * ((kept / scale**2).mean().sqrt())
        basis = vectors[:, : self.config.z_dim].T
        self.analysis.copy_((basis / scale[:, None]).reshape(self.analysis.shape))
        self.synthesis.copy_((basis * scale[:, None]).reshape(self.synthesis.shape))
        return torch.as_tensor(variance)
