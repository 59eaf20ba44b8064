"""Image models with a language model's parts: HiDream, OmniGen, GLM, ERNIE, JoyImage, FIBO 2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ErnieImageTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    OmniGenTransformer2DModel,
)
from torch import nn

from .entry import IMAGE, Draw, Entry, image, latents, newer, seeded, text_mask, tokens
from .images import HEADS, SQUARE, sized, text_to_image

BriaFibo2Transformer2DModel = newer("BriaFibo2Transformer2DModel")

PATCH = (1, 2, 2)
N, TEXT = tokens(IMAGE), 11
ITEMS = [IMAGE, (1, 3, 4)]
ALL_ITEMS = (1, 1, sum(map(tokens, ITEMS)))


def hidream(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "timesteps": draw.timestep(),
        "encoder_hidden_states_t5": draw(1, TEXT, 13),
        "encoder_hidden_states_llama3": draw(2, 1, 17, 19),
        "pooled_embeds": draw(1, 23),
        "return_dict": False,
    }


def hidream_square(seed: int = 0) -> dict[str, Any]:
    return {**hidream(seed), "hidden_states": image(Draw(seed + 1), 5, SQUARE, 2)}


def omnigen(seed: int = 0) -> dict[str, Any]:
    """Text tokens see what stands before them; the time token and the image tokens see all."""
    draw = Draw(seed)
    sees = torch.ones(TEXT + 1 + N, TEXT + 1 + N).tril()
    sees[TEXT:] = 1
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "timestep": draw.sigma(),
        "input_ids": draw.ints(31, 1, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": sees[None],
        "position_ids": torch.arange(TEXT + 1 + N)[None],
        "return_dict": False,
    }


def glm(seed: int = 0) -> dict[str, Any]:
    draw, kwargs = Draw(seed + 1), sized(seed)
    del kwargs["original_size"]
    prior = {"prior_token_id": draw.ints(31, 1, N), "prior_token_drop": torch.zeros(1, dtype=torch.bool)}
    return {**kwargs, **prior}


def ernie(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "timestep": draw.timestep(),
        "text_bth": draw(1, TEXT, 13),
        "text_lens": torch.tensor([8]),
        "return_dict": False,
    }


def joyimage(seed: int = 0) -> dict[str, Any]:
    """Latents of two items, `[1, items, C, T, H, W]`: a reference, then what is denoised."""
    draw = Draw(seed + 1)
    items = torch.stack([latents(draw, 5, IMAGE, PATCH) for _ in range(2)], dim=1)
    return {**text_to_image(seed), "hidden_states": items}


def joyimage_plus(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    patches = draw(1, tokens(ALL_ITEMS), 5, *PATCH)
    shapes = {"shape_list": [ITEMS], "encoder_hidden_states_mask": text_mask(TEXT).float()}
    return {**text_to_image(seed), "hidden_states": patches, **shapes}


def fibo2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "timestep": draw.sigma(),
        "encoder_hidden_states": draw(1, 2, TEXT, 13),
        "return_dict": False,
    }


def fibo2_edit(seed: int = 0) -> dict[str, Any]:
    return {**fibo2(seed), "context_latents": [image(Draw(seed + 1), 5, (1, 3, 4), 2)]}


def fibo2_masked(seed: int = 0) -> dict[str, Any]:
    return {**fibo2(seed), "encoder_attention_mask": text_mask(TEXT).bool()}


def build_hidream(experts: int) -> HiDreamImageTransformer2DModel:
    config = {
        "patch_size": 2,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [13, 19],
        "text_emb_dim": 23,
        "num_routed_experts": experts,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 4, 4),
        "max_resolution": (14, 14),
        "llama_layers": [0, 1],
    }
    return seeded(lambda: HiDreamImageTransformer2DModel(**HEADS, **config))


def build_omnigen() -> OmniGenTransformer2DModel:
    config = {
        "in_channels": 5,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 53,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 31,
        "rope_scaling": {"short_factor": [1.0] * 6, "long_factor": [1.5] * 6},
        "pos_embed_max_size": 9,
        "time_step_dim": 26,
    }
    return seeded(lambda: OmniGenTransformer2DModel(**config))


def build_glm() -> GlmImageTransformer2DModel:
    config = {
        "out_channels": 5,
        "num_layers": 2,
        "text_embed_dim": 13,
        "time_embed_dim": 26,
        "condition_dim": 22,
        "prior_vq_quantizer_codebook_size": 31,
    }
    return seeded(lambda: GlmImageTransformer2DModel(**HEADS, **config))


def build_ernie() -> ErnieImageTransformer2DModel:
    config = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 53,
        "in_channels": 5,
        "out_channels": 5,
        "patch_size": 2,
        "text_in_dim": 13,
        "rope_axes_dim": (2, 4, 6),
    }
    return seeded(lambda: ErnieImageTransformer2DModel(**config))


JOYIMAGE: dict[str, Any] = {
    "patch_size": list(PATCH),
    "in_channels": 5,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 13,
    "num_layers": 2,
    "rope_dim_list": [2, 4, 6],
}


def build_joyimage() -> JoyImageEditTransformer3DModel:
    return seeded(lambda: JoyImageEditTransformer3DModel(**JOYIMAGE))


def build_joyimage_plus() -> JoyImageEditPlusTransformer3DModel:
    return seeded(lambda: JoyImageEditPlusTransformer3DModel(**JOYIMAGE))


def build_fibo2() -> nn.Module:
    config = {
        "in_channels": 5,
        "dim": 24,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 13,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 3,
        "max_num_gist_tokens": 8,
        "gist_step": 1,
        "gist_min_text_len": 3,
        "gist_max_text_len": 17,
        "axes_dims": (2, 4, 6),
        "axes_lens": (37, 29, 31),
    }
    return seeded(lambda: BriaFibo2Transformer2DModel(**config))


HIDREAM = "image before text tokens along one axis; some text tokens are cut off and others joined before each block"
FIBO2 = "learned gist tokens, then image tokens along one axis; modulation is chosen for each token by a noise mask"
ENTRIES = (
    Entry(
        "HiDreamImageTransformer2DModel",
        lambda: build_hidream(4),
        hidream,
        IMAGE,
        note=HIDREAM + "; tokens are sorted by expert with counts that are data (numpy); an image that is not square "
        "is padded to max_resolution with zeros and masked",
    ),
    Entry(
        "HiDreamImageTransformer2DModel (no experts)",
        lambda: build_hidream(0),
        hidream,
        IMAGE,
        note=HIDREAM + "; an image that is not square is padded to max_resolution with zeros, and keys are multiplied "
        "by a mask before the rotary table",
    ),
    Entry(
        "HiDreamImageTransformer2DModel (no experts, square)",
        lambda: build_hidream(0),
        hidream_square,
        SQUARE,
        note=HIDREAM,
    ),
    Entry(
        "OmniGenTransformer2DModel",
        build_omnigen,
        omnigen,
        IMAGE,
        note="text, one time token, then image tokens along one axis; the square mask over all is an input: text is "
        "causal; a branch on the largest position is data; the call overwrites the buffer inv_freq",
    ),
    Entry(
        "GlmImageTransformer2DModel",
        build_glm,
        glm,
        IMAGE,
        note="text before image tokens along one axis; prior_token_id is a token input [1, N]; it is zeroed through a "
        "boolean index that is data",
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        build_ernie,
        ernie,
        IMAGE,
        note="image before text tokens; tokens stand in dim 0: [S, B, C]; a key mask made from text lengths; "
        "modulation is expanded over all tokens",
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        build_joyimage,
        joyimage,
        (2, *IMAGE[1:]),
        note="two items, [1, 2, C, T, H, W], are rolled along the items and folded into frames; the grid here is both, "
        "the item that is denoised first; image before text tokens along one axis",
    ),
    Entry(
        "JoyImageEditPlusTransformer3DModel",
        build_joyimage_plus,
        joyimage_plus,
        ALL_ITEMS,
        {"hidden_states": 1},
        note="packed patches [1, N, C, 1, 2, 2]: the token axis is folded into the batch for the patch convolution; "
        "the grid here is the patches of all items; image before text tokens; a key mask over both",
    ),
    Entry("BriaFibo2Transformer2DModel", build_fibo2, fibo2, IMAGE, note=FIBO2),
    Entry(
        "BriaFibo2Transformer2DModel (edit)",
        build_fibo2,
        fibo2_edit,
        IMAGE,
        note=FIBO2 + "; tokens of context images after those of the image",
    ),
    Entry(
        "BriaFibo2Transformer2DModel (masked)",
        build_fibo2,
        fibo2_masked,
        IMAGE,
        note=FIBO2 + "; how many gist tokens there are is read from the mask by tolist",
    ),
)
