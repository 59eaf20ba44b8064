"""Wan, and what grew from it: SkyReels-V2, ChronoEdit, Lucy Edit, AnyFlow, Helios.

The VAE halves time, and quarters height and width; a patch is 2 x 2 latents.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LucyEditPipeline,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from zoo.entry import seeded
from zoo.wan import CONFIG

from .row import STEPS, embeds, mask_video, picture, row, video

SIZE = (5, 32, 48)
GRID = (3, 4, 6)
CHANNELS = 5
SHAPE = (1, CHANNELS, 3, 8, 12)
TEXT, TEXT_WIDTH = 7, CONFIG["text_dim"]
FACE = 8
CONDITIONED = {"in_channels": 2 * CHANNELS + 2}
"""The first frame, and which frames are known, join the latents along channels."""
WITH_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 24}
BLOCK: dict[str, Any] = {**CONFIG, "num_layers": 1}


def vae(**changes: Any) -> AutoencoderKLWan:
    config = {
        "base_dim": 4,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True, False],
        "latents_mean": [0.1] * CHANNELS,
        "latents_std": [1.5] * CHANNELS,
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
    }
    return seeded(lambda: AutoencoderKLWan(**{**config, **changes}))


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def transformer(**changes: Any) -> WanTransformer3DModel:
    return seeded(lambda: WanTransformer3DModel(**{**BLOCK, **changes}))


def image_encoder() -> dict[str, Any]:
    """CLIP's image encoder: 17 tokens of width 16."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    return {"image_encoder": seeded(lambda: CLIPVisionModel(config)), "image_processor": processor}


def parts(**changes: Any) -> dict[str, Any]:
    """Of most pipelines here; the model is Wan's own unless another is given."""
    plain = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": scheduler()}
    return {**plain, "transformer": transformer(), **changes}


def call(**changes: Any) -> dict[str, Any]:
    _, height, width = SIZE
    return {
        "prompt_embeds": embeds(TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1),
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        **changes,
    }


def frames(**changes: Any) -> dict[str, Any]:
    return call(num_frames=SIZE[0], **changes)


def vace_parts() -> dict[str, Any]:
    config = {**BLOCK, "vace_layers": (0,), "vace_in_channels": 2 * CHANNELS + 4 * 4}
    return parts(transformer=seeded(lambda: WanVACETransformer3DModel(**config)))


def vace() -> dict[str, Any]:
    return frames(video=video(SIZE), mask=mask_video(SIZE, GRID))


def vace_with_reference() -> dict[str, Any]:
    return {**vace(), "reference_images": [picture(SIZE, seed=2)]}


def experts(**changes: Any) -> dict[str, Any]:
    """Wan 2.2: the second model takes over below a time."""
    models = {"transformer": transformer(**changes), "transformer_2": transformer(ffn_dim=47, **changes)}
    return parts(**models, boundary_ratio=0.9)


def per_token() -> dict[str, Any]:
    """Wan 2.2 TI2V: a time for each token; a first frame stands in the latents, at time 0."""
    return parts(expand_timesteps=True)


def with_first_frame() -> dict[str, Any]:
    """Wan 2.1: the model attends to the first frame's embedding too."""
    return parts(transformer=transformer(**CONDITIONED, **WITH_IMAGE), **image_encoder())


def first_frame() -> dict[str, Any]:
    # With an image, the model takes all but the last 512 tokens of the context for the image.
    text = {"prompt_embeds": embeds(512, TEXT_WIDTH), "negative_prompt_embeds": embeds(512, TEXT_WIDTH, seed=1)}
    return frames(image=picture(SIZE), **text)


def animate_parts() -> dict[str, Any]:
    config = {
        **BLOCK,
        "in_channels": 2 * CHANNELS + 4,
        "latent_channels": CHANNELS,
        **WITH_IMAGE,
        "motion_encoder_channel_sizes": {"4": 13, "8": 11},
        "motion_encoder_size": FACE,
        "motion_style_dim": 19,
        "motion_dim": 3,
        "motion_encoder_dim": 23,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 3,
        "inject_face_latents_blocks": 1,
    }
    # The pipeline writes masks for a VAE that quarters time.
    quarters = vae(temperal_downsample=[True, True], scale_factor_temporal=4)
    model = seeded(lambda: WanAnimateTransformer3DModel(**config))
    return parts(transformer=model, vae=quarters, **image_encoder())


def animate() -> dict[str, Any]:
    videos = {"pose_video": video(SIZE, seed=2), "face_video": video((SIZE[0], FACE, FACE), seed=3)}
    call = first_frame()
    del call["num_frames"]
    return {**call, **videos, "segment_frame_length": SIZE[0]}


def replace_person() -> dict[str, Any]:
    return {
        **animate(),
        "mode": "replace",
        "background_video": video(SIZE, seed=4),
        "mask_video": mask_video(SIZE, GRID),
    }


def skyreels(**changes: Any) -> SkyReelsV2Transformer3DModel:
    return seeded(lambda: SkyReelsV2Transformer3DModel(**{**BLOCK, **changes}))


def skyreels_parts() -> dict[str, Any]:
    return parts(transformer=skyreels())


def skyreels_image() -> dict[str, Any]:
    return parts(transformer=skyreels(**CONDITIONED, **WITH_IMAGE), **image_encoder())


def chronoedit() -> dict[str, Any]:
    config = {**BLOCK, **CONDITIONED, **WITH_IMAGE}
    return parts(transformer=seeded(lambda: ChronoEditTransformer3DModel(**config)), **image_encoder())


def lucy() -> dict[str, Any]:
    """The video that is edited joins the latents along channels."""
    return parts(transformer=transformer(in_channels=2 * CHANNELS), expand_timesteps=True)


def anyflow() -> dict[str, Any]:
    model = seeded(lambda: AnyFlowTransformer3DModel(**BLOCK))
    return parts(transformer=model, scheduler=FlowMapEulerDiscreteScheduler())


def first_known() -> dict[str, Any]:
    """Without a negative prompt: the pipeline would join it to the other one even if nothing guides."""
    return frames(video=video(SIZE)[:1], negative_prompt_embeds=None)


ANYFLOW_GUIDED = {"guidance_scale": 3.0, "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1)}


def helios() -> dict[str, Any]:
    config = {name: value for name, value in BLOCK.items() if name != "rope_max_seq_len"}
    model = seeded(lambda: HeliosTransformer3DModel(**config, rope_dim=(4, 4, 4)))
    return parts(transformer=model, scheduler=HeliosScheduler(stages=1))


def one_chunk() -> dict[str, Any]:
    """One loop over the steps; the known frames are tokens of their own in front, and return with the result."""
    return frames(video=video(SIZE), num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1])


wan_row = partial(row, size=SIZE, grid=GRID, shape=SHAPE, guided={"guidance_scale": 3.0})
ROWS = (
    wan_row(WanVACEPipeline, vace_parts, vace, mask_argument="mask", source_argument="video"),
    wan_row(
        WanVACEPipeline,
        vace_parts,
        vace_with_reference,
        "reference",
        grid=(4, 4, 6),
        shape=(1, CHANNELS, 4, 8, 12),
    ),
    wan_row(WanPipeline, parts, frames),
    wan_row(WanPipeline, experts, frames, "two experts"),
    wan_row(WanPipeline, per_token, frames, "a time for each token"),
    wan_row(WanImageToVideoPipeline, with_first_frame, first_frame),
    wan_row(
        WanImageToVideoPipeline, lambda: experts(**CONDITIONED), lambda: frames(image=picture(SIZE)), "two experts"
    ),
    wan_row(WanImageToVideoPipeline, per_token, lambda: frames(image=picture(SIZE)), "a time for each token"),
    wan_row(
        WanVideoToVideoPipeline,
        parts,
        lambda: call(video=video(SIZE), strength=0.7),
        steps=2,
    ),
    wan_row(WanAnimatePipeline, animate_parts, animate),
    wan_row(
        WanAnimatePipeline,
        animate_parts,
        replace_person,
        "replace",
        mask_argument="mask_video",
        source_argument="background_video",
    ),
    wan_row(SkyReelsV2Pipeline, skyreels_parts, frames),
    wan_row(SkyReelsV2ImageToVideoPipeline, skyreels_image, first_frame),
    wan_row(SkyReelsV2DiffusionForcingPipeline, skyreels_parts, lambda: frames(prompt=None)),
    wan_row(
        SkyReelsV2DiffusionForcingPipeline,
        skyreels_parts,
        lambda: frames(prompt=None, ar_step=1, causal_block_size=1),
        "frame after frame",
        steps=5,
    ),
    wan_row(SkyReelsV2DiffusionForcingImageToVideoPipeline, skyreels_parts, lambda: frames(image=picture(SIZE))),
    wan_row(
        SkyReelsV2DiffusionForcingVideoToVideoPipeline,
        skyreels_parts,
        lambda: frames(video=video(SIZE)[:1], overlap_history=1),
    ),
    wan_row(ChronoEditPipeline, chronoedit, first_frame),
    wan_row(
        ChronoEditPipeline,
        chronoedit,
        lambda: {**first_frame(), "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1},
        "temporal reasoning",
        shape=(1, CHANNELS, 2, 8, 12),
    ),
    wan_row(LucyEditPipeline, lucy, lambda: frames(video=video(SIZE))),
    wan_row(AnyFlowPipeline, anyflow, first_known, layout="BTCHW", guided=ANYFLOW_GUIDED, guided_calls=1),
    wan_row(HeliosPipeline, helios, one_chunk, shape=(1, CHANNELS, 6, 8, 12)),
)
