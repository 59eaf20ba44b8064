"""Triton Inference Server: model configurations, in `triton/`. docs/serving.md says how they are used.

* One for each form, stateless: cache tensors are plain inputs and outputs, which shared memory passes on uncopied.
* One for all forms together, `hetcache`, in which the cache is Triton's implicit state: an output named there is the
  same sequence's next input, and never leaves the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..engine.manifest import CacheSpec, FormSpec, Manifest, TensorSpec

TRITON_FOLDER = "triton"
CACHED_FORMS = ("full", "partial", "reuse")
STEP_KIND = TensorSpec("step_kind", "int32", (1,), "model")
"""Which form a request runs: the value of a `StepKind`."""


def write_triton(folder: Path, manifest: Manifest) -> None:
    """Write the configurations, and the states that must not begin as zeros."""
    configs = {f"hetcache_{kind}": form_config(kind, manifest.forms[kind]) for kind in CACHED_FORMS}
    configs["hetcache"] = sequence_config(manifest)
    for name, text in configs.items():
        path = folder / TRITON_FOLDER / name / "config.pbtxt"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for entry in initial_states(manifest):
        path = folder / TRITON_FOLDER / "hetcache" / "initial_state" / entry.input
        path.parent.mkdir(exist_ok=True)
        np.full(initial_shape(entry, manifest), entry.initial, dtype=entry.dtype).tofile(path)


def initial_states(manifest: Manifest) -> list[CacheSpec]:
    """The cache entries for which it matters what they hold before the first step."""
    return [entry for entry in manifest.cache if entry.initial is not None]


def initial_shape(entry: CacheSpec, manifest: Manifest) -> tuple[int, ...]:
    """Its shape for the plan's own budgets."""
    return tuple(size if isinstance(size, int) else int(getattr(manifest.plan, size)) for size in entry.shape)


def form_config(kind: str, form: FormSpec) -> str:
    """`config.pbtxt` of one form, for Triton's onnxruntime backend."""
    head = [f'name: "hetcache_{kind}"', 'backend: "onnxruntime"', f'default_model_filename: "{form.file}"']
    return _config(head, form.inputs, form.outputs)


def sequence_config(manifest: Manifest) -> str:
    """`config.pbtxt` of all forms as one stateful model, for a backend that runs the form `step_kind` asks for.

    A sequence is one branch of guidance of one edit, and its first request is a full step. That reads no keys and
    values; what it does read (the times of earlier steps, for extrapolation) begins as a file says.
    """
    inputs: dict[str, TensorSpec] = {STEP_KIND.name: STEP_KIND}
    outputs: dict[str, TensorSpec] = {}
    for kind in CACHED_FORMS:
        form = manifest.forms[kind]
        inputs.update({spec.name: spec for spec in form.inputs if spec.role != "cache"})
        outputs.update({spec.name: spec for spec in form.outputs if spec.role != "cache"})
    states = "".join(_state(entry, manifest) for entry in manifest.cache)
    return _config(
        ['name: "hetcache"', 'backend: "hetcache"'],
        inputs.values(),
        outputs.values(),
        "sequence_batching {\n  direct { }\n" + states + "}",
    )


def _config(head: list[str], inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], *more: str) -> str:
    lines = [*head, "max_batch_size: 0"]
    lines += [_tensor("input", spec) for spec in inputs] + [_tensor("output", spec) for spec in outputs]
    return "\n".join([*lines, *more, "instance_group [ { count: 1 kind: KIND_GPU } ]"]) + "\n"


def _tensor(side: str, spec: TensorSpec) -> str:
    kind = TRITON_TYPES[spec.dtype]
    return f'{side} [ {{ name: "{spec.name}" data_type: TYPE_{kind} dims: {_dims(spec.shape)} }} ]'


def _state(entry: CacheSpec, manifest: Manifest) -> str:
    kind = TRITON_TYPES[entry.dtype]
    begin = ""
    if entry.initial is not None:
        begin = (
            f' initial_state: {{ name: "{entry.input}" data_type: TYPE_{kind} '
            f'dims: {_dims(initial_shape(entry, manifest))} data_file: "{entry.input}" }}'
        )
    return (
        f'  state [ {{ input_name: "{entry.input}" output_name: "{entry.output}" '
        f"data_type: TYPE_{kind} dims: {_dims(entry.shape)}{begin} }} ]\n"
    )


def _dims(shape: Sequence[int | str]) -> str:
    return "[ " + ", ".join("-1" if isinstance(size, str) else str(size) for size in shape) + " ]"


TRITON_TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL",
    "int8": "INT8",
}  # fmt: skip
