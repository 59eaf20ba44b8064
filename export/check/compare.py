"""Check torch, onnxruntime and, with a GPU, TensorRT against each other on every form, with Polygraphy's comparator.

    python -m hetcache_compile.export.check.compare DIR --model MODEL

MODEL is what DIR was exported from. TensorRT takes part where DIR holds engines that this machine can run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...capture.rewrite import Forms, rewrite
from ...engine.engine import BUDGETS, sized
from ...engine.manifest import FormSpec, Manifest
from ...engine.runners import TENSORRT_PROVIDERS, TensorRTRunner, has_driver
from ...errors import HetCacheError, MissingExtraError
from ...plan.plan import Plan
from ..model.load_samples import read
from ..model.sample_call import CallShape
from ..model.sample_inputs import SAMPLES_FOLDER
from ..model.source import load_source
from .verify import TOLERANCES


def compare(folder: Path, model: str, component: str = "transformer") -> dict[str, bool]:
    """Whether all runners agree, by form.

    Raises:
        MissingExtraError: polygraphy or onnxruntime is not installed.
    """
    try:
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
        from polygraphy.comparator import Comparator, CompareFunc
    except ImportError as error:
        raise MissingExtraError("polygraphy", "trt-rtx") from error
    manifest = Manifest.load(folder)
    forms = forms_of(manifest, folder, model, component)
    agreed = {}
    for kind in forms.by_kind:
        form = manifest.forms[kind]
        feed = read(kind, folder / SAMPLES_FOLDER)
        runners = [
            as_polygraphy(f"torch {kind}", form, torch_function(forms, kind)),
            OnnxrtRunner(SessionFromOnnx(str(folder / form.file)), name=f"onnxruntime {kind}"),
            *(
                as_polygraphy(f"{provider} {kind}", form, tensorrt_function(folder, manifest, provider, kind))
                for provider, (engine, _, _) in TENSORRT_PROVIDERS.items()
                if engine in manifest.engines and has_driver()
            ),
        ]
        results = Comparator.run(runners, data_loader=[feed])
        tolerance = TOLERANCES[manifest.dtype]
        check = CompareFunc.simple(rtol=tolerance, atol=tolerance, check_error_stat="max")
        agreed[kind] = bool(Comparator.compare_accuracy(results, compare_func=check))
    return agreed


def forms_of(manifest: Manifest, folder: Path, model: str, component: str) -> Forms:
    """The forms of the model that the folder was exported from, for calls of the exported shape."""
    plan = Plan.load(folder / manifest.plan.file)
    shapes = {spec.name: spec.shape for spec in manifest.forms["full"].inputs}
    text = shapes.get("encoder_hidden_states", (1, 1))
    shape = CallShape(plan, batch=int(text[0]), text_tokens=int(text[1]))
    source = load_source(model, shape, manifest.dtype, component)
    return rewrite(source.model, plan, kwargs=source.kwargs)


def torch_function(forms: Forms, kind: str) -> Any:
    """A form in torch, from and to named tensors."""
    form = forms.by_kind[kind]
    names = [node.name for node in form.module.graph.nodes if node.op == "placeholder"]
    cached = {entry.input_name.replace(".", "_"): entry.input_name for entry in form.reads}

    def run(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = [forms.program.state.get(name, tensors.get(cached.get(name, name))) for name in names]
        with torch.no_grad():
            return list(pytree.tree_leaves(form.module(*values)))

    return run


def tensorrt_function(folder: Path, manifest: Manifest, provider: str, kind: str) -> Any:
    """A form in TensorRT, from and to named tensors."""
    runner = TensorRTRunner(folder, manifest, provider)
    run_engine = runner.prepare(kind)

    def run(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        inputs = {name: tensor.to(runner.device) for name, tensor in tensors.items()}
        sizes = {name: getattr(manifest.plan, name) for name in BUDGETS}
        outputs = {
            spec.name: torch.empty(
                sized(spec.shape, sizes),
                dtype=getattr(torch, spec.dtype), device=runner.device,
            )
            for spec in manifest.forms[kind].outputs
        }  # fmt: skip
        run_engine(inputs, outputs)
        torch.cuda.synchronize()
        return [tensor.cpu() for tensor in outputs.values()]

    return run


def as_polygraphy(name: str, form: FormSpec, function: Any) -> Any:
    """A Polygraphy runner around a function of named tensors."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class FunctionRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for spec in form.inputs:
                metadata.add(spec.name, spec.dtype, [s if isinstance(s, int) else -1 for s in spec.shape])
            return metadata

        def infer_impl(self, feed_dict: dict[str, Any]) -> Any:
            results = function({key: torch.as_tensor(value) for key, value in feed_dict.items()})
            names = [spec.name for spec in form.outputs]
            self.inference_time = 0.0
            return {key: to_array(value) for key, value in zip(names, results, strict=True)}

        def activate_impl(self) -> None:
            """Nothing to load."""

        def deactivate_impl(self) -> None:
            """Nothing to free."""

    return FunctionRunner(name=name)


def to_array(tensor: torch.Tensor) -> Any:
    """A numpy array; bfloat16, which numpy lacks, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def main() -> None:
    """Exit status 0 if all agree, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hetcache-export wrote")
    parser.add_argument("--model", required=True, help="what it was exported from")
    parser.add_argument("--component", default="transformer")
    arguments = parser.parse_args()
    try:
        agreed = compare(arguments.folder, arguments.model, arguments.component)
    except HetCacheError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)
    for kind, agrees in agreed.items():
        print(f"{kind}: {'agree' if agrees else 'DIFFER'}")
    sys.exit(not all(agreed.values()))


if __name__ == "__main__":
    main()
