"""Which quantised weights are cached, and how exactly: a small Wan transformer and a small Flux, on a CPU.

    pip install gguf bitsandbytes torchao
    python benchmarks/quantised.py                 # all of them
    python benchmarks/quantised.py gguf:Q4_K bnb:nf4 "ao:Int8WeightOnlyConfig()" flux:gguf:Q8_0

Each line says which steps a session took of FULL, PARTIAL, REUSE; the error of a FULL step of it and of the forms of
`rewrite`; and that of a PARTIAL step of the forms on the inputs of the FULL step before it. `docs/memory.md` has the
table. No times are taken.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.errors import HetCacheWarning

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from backend_checks import compiled, max_error, plan_of, run
from models import call, make_loud, wan

ALL = (
    "none",
    *(
        f"gguf:{kind}"
        for kind in ["BF16", "Q8_0", "Q5_1", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
    ),
    *(f"bnb:{kind}" for kind in ("int8", "int8-threshold", "nf4", "nf4-double")),
    "ao:Int8WeightOnlyConfig()",
    "ao:Float8WeightOnlyConfig()",
    "ao:IntxWeightOnlyConfig()",
    "ao:Int8DynamicActivationIntxWeightConfig()",
    "ao:Int8DynamicActivationInt8WeightConfig()",
    "flux:none",
    "flux:gguf:Q8_0",
    "flux:bnb:int8",
    "flux:ao:Int8WeightOnlyConfig()",
)
WIDTH = 256
"""A block of GGUF's finer kinds."""
SCALES = {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where blocks of kinds that gguf cannot make hold their scales, in fp16: all else is drawn."""


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32}
    more = {"num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)}
    return make_loud(FluxTransformer2DModel(**config, **more, pooled_projection_dim=64, guidance_embeds=True))


def flux_call(seed: int) -> dict[str, Any]:
    """A call of 105 packed tokens, as `plan_of` has them."""
    draw, text = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)  # one prompt for all steps
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0), torch.arange(7.0))
    return {
        "hidden_states": torch.randn(1, 105, 64, generator=draw),
        "encoder_hidden_states": torch.randn(1, 11, 64, generator=text),
        "pooled_projections": torch.randn(1, 64, generator=text),
        "timestep": torch.tensor([1 - seed / 10]),
        "guidance": torch.tensor([3.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(11, 3),
        "return_dict": False,
    }


def in_blocks(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name]


def with_gguf(model: nn.Module, kind: str) -> nn.Module:
    """The model with linear layers as diffusers makes them of a GGUF file."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    weights, biases = {}, {}
    for name, layer in in_blocks(model):
        weight = layer.weight.detach()
        if kind in SCALES:
            shape = weight.numel() // block, size
            drawn = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            for place in SCALES[kind]:
                drawn[:, place : place + 2] = np.array([2e-4], dtype=np.float16).view(np.uint8)
            data = drawn.reshape(len(weight), -1)
        else:
            data = gguf.quants.quantize(weight.numpy(), number)
        weights[f"{name}.weight"] = GGUFParameter(torch.from_numpy(data), quant_type=number)
        biases[name] = layer.bias
    _replace_with_gguf_linear(model, torch.float32, weights)
    for name, bias in biases.items():
        layer = model.get_submodule(name)
        layer._parameters.update(weight=weights[f"{name}.weight"], bias=bias)
    return model


def with_bitsandbytes(model: nn.Module, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    for name, layer in in_blocks(model):
        weight = layer.weight.detach().clone()
        new: Any
        if kind.startswith("int8"):
            threshold = 6.0 if kind.endswith("threshold") else 0.0
            new = bnb.nn.Linear8bitLt(*weight.shape[::-1], has_fp16_weights=False, threshold=threshold)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            how = {"quant_type": "nf4", "compress_statistics": kind.endswith("double")}
            new = bnb.nn.Linear4bit(*weight.shape[::-1], compute_dtype=torch.float32, **how)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **how)
        new.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new.to("cpu"))
    return model.eval()


def with_torchao(model: nn.Module, config: str) -> nn.Module:
    from torchao import quantization

    names = {name for name, _ in in_blocks(model)}
    quantization.quantize_(model, eval(config, vars(quantization)), filter_fn=lambda _, name: name in names)
    return model


def quantised(spec: str) -> nn.Module:
    """The model that a line of `ALL` names."""
    base, spec = (flux(), spec.removeprefix("flux:")) if spec.startswith("flux:") else (None, spec)
    library, _, kind = spec.partition(":")
    if base is None:
        width = WIDTH if kind in SCALES else 64
        more = {"text_dim": width, "freq_dim": width, "ffn_dim": 2 * width, "num_layers": 1 if kind in SCALES else 2}
        base = wan(attention_head_dim=width // 2, in_channels=4, out_channels=4, **more)
    if library == "none":
        return base
    return {"gguf": with_gguf, "bnb": with_bitsandbytes, "ao": with_torchao}[library](base, kind)


@torch.no_grad()
def measure(spec: str) -> str:
    """A line of the table."""
    torch._dynamo.reset()
    model = quantised(spec)
    calls = [flux_call(seed) if spec.startswith("flux") else call(model, seed=seed) for seed in range(4)]
    truth = run(model, calls)
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FFPR")) as session:
        warnings.simplefilter("always", HetCacheWarning)
        outputs = run(fast, calls)
    steps = "".join(kind.letter for kind in session.stats.kinds)
    full = max(max_error(*pair) for pair in zip(outputs[:2], truth, strict=False))
    line = f"{spec:50} session {steps or 'not cached':10} FULL {full:.1e}"
    said = [str(warning.message) for warning in caught if issubclass(warning.category, HetCacheWarning)]
    try:
        forms = hetcache.rewrite(model, plan_of("FPR"), (), calls[0])
    except hetcache.UnsupportedGraphError as error:
        return "\n    ".join([line, *said[:1], f"rewrite: {error}"])
    output, cache = forms.full(**calls[0])
    again, _ = forms.partial(cache, **calls[0])
    errors = (max_error(one[0], truth[0]) for one in (output, again))
    line += " forms FULL {:.1e} PARTIAL {:.1e}".format(*errors)
    return "\n    ".join([f"{line} of {float(truth[0].abs().max()):.2g}", *said[:1]])


if __name__ == "__main__":
    for spec in sys.argv[1:] or ALL:
        print(measure(spec), flush=True)
