"""The command line: `hetcache-export MODEL --plan P --out DIR [--trt]`. Only this module prints and exits."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import TokenInput, progress_bars, token_inputs
from ..errors import ExportError, HetCacheError

if TYPE_CHECKING:
    from ..engine.manifest import Manifest
    from .trt.build import EngineKind

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Local diffusers pipeline or model folder; or package.module:factory, a function that takes the plan "
            "and returns a module, or (module, keyword arguments of a call). Its code is run."
        ),
    ],
    plan: Annotated[Path, typer.Option(help="A plan from `hetcache plan`: grid, M, C and indices.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an older export there is replaced.")],
    trt: Annotated[
        str,
        typer.Option(help="Build engines: auto, tensorrt (on this GPU), rtx (ahead of time, no GPU needed), or none."),
    ] = "none",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    opset: Annotated[str, typer.Option(help="20 to 25, or auto: 20, and 23 for bf16.")] = "auto",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPUs that rtx engines are for, such as 8.9; may be given several times."),
    ] = None,
    dynamic_active: Annotated[
        str | None, typer.Option(help="MIN:OPT:MAX, the numbers of active tokens that the engines take.")
    ] = None,
    verify: Annotated[
        str,
        typer.Option(help="Compare with torch: ort, none, or auto: ort where it is installed and has the type."),
    ] = "auto",
    component: Annotated[str, typer.Option(help="Which model of the pipeline.")] = "transformer",
    batch: Annotated[int, typer.Option(help="Batch of a call; 2 for guidance in one call.", min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of a call.", min=1)] = 512,
    call: Annotated[
        Path | None,
        typer.Option(help="A real call's keyword arguments, saved with torch.save, as docs/export.md shows."),
    ] = None,
    token_input: TokenInput = None,
    baseline: Annotated[bool, typer.Option(help="Export the unmodified model too, to measure against.")] = True,
) -> None:
    """Export a model's full, partial and reuse forms to ONNX and TensorRT, with the cache as inputs and outputs.

    OUT gets full.onnx, partial.onnx, reuse.onnx, plain.onnx, weights.bin (shared), manifest.json, plan.hetplan,
    sample_inputs/, triton/ and engines/. It appears when everything has been written and checked.
    """
    from ..plan.plan import Plan
    from .check.verify import verify_with_ort
    from .exporter import export_model
    from .model.options import ExportOptions
    from .model.sample_call import CallShape
    from .trt.build import build_engines

    known_plan = Plan.load(plan)
    checked = _verifies(verify, dtype)
    engine_kind = _engine_kind(trt, dtype, compute_capability or [])
    options = ExportOptions(dtype, _opset(opset), baseline, _sizes(dynamic_active))
    build = partial(build_engines, kind=engine_kind, capabilities=compute_capability or []) if engine_kind else None
    with progress_bars() as progress:
        manifest = export_model(
            model,
            known_plan,
            out,
            options,
            shape=CallShape(known_plan, batch, text_tokens),
            component=component,
            call=call,
            token_inputs=token_inputs(token_input),
            checks=[verify_with_ort] if checked else [],
            finish=[build] if build else [],
            progress=progress,
        )
    _report(out, manifest)


def _report(out: Path, manifest: Manifest) -> None:
    """Say what was written, checked and built."""
    print(f"wrote {out}: {', '.join(form.file for form in manifest.forms.values())}, opset {manifest.opset}")
    for provider, errors in manifest.verified.items():
        print(f"checked with {provider}: largest relative difference to torch {max(errors.values()):.1e}")
    for kind, engines in manifest.engines.items():
        ran = "" if engines.executed else "; built, not executed"
        targets = " ".join(engines.compute_capabilities) or "this GPU"
        print(f"{len(engines.forms)} {kind} engines for {targets}{ran}")


def _engine_kind(trt: str, dtype: str, capabilities: list[str]) -> EngineKind | None:
    """Which engines to build; wrong options and missing packages are found before anything is written."""
    from .trt.build import check_capabilities, choose_kind

    if trt == "none":
        if capabilities:
            raise ExportError("--compute-capability needs --trt=rtx")
        return None
    kind = choose_kind(trt)
    check_capabilities(kind, capabilities, dtype)
    return kind


def _verifies(verify: str, dtype: str) -> bool:
    """Whether to compare with torch on onnxruntime."""
    from importlib.util import find_spec

    if verify not in ("auto", "ort", "none"):
        raise ExportError(f"--verify takes ort, none or auto, got {verify}")
    if verify == "ort" and dtype == "bf16":
        raise ExportError("onnxruntime's CPU provider has no bf16: export with --verify none, or another --dtype")
    return verify == "ort" or (verify == "auto" and dtype != "bf16" and find_spec("onnxruntime") is not None)


def _opset(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ExportError(f"--opset takes a number or auto, got {text}")
    return int(text)


def _sizes(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ExportError(f"--dynamic-active takes MIN:OPT:MAX, got {text}")
    smallest, usual, largest = map(int, parts)
    return smallest, usual, largest


def spread_options(arguments: list[str]) -> list[str]:
    """What click lacks: `--trt` without a value is auto, and `--compute-capability 8.9 12.0` takes several."""
    spread: list[str] = []
    for number, argument in enumerate(arguments):
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        if argument == "--trt" and following not in ("auto", "none", "rtx", "tensorrt"):
            spread.append("--trt=auto")
        elif re.fullmatch(r"\d+\.\d", argument) and spread[-2:-1] == ["--compute-capability"]:
            spread += ["--compute-capability", argument]
        else:
            spread.append(argument)
    return spread


def main() -> None:
    """Entry point: bad input is one clear line and exit status 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an error: what is half written is removed
    try:
        app(spread_options(sys.argv[1:]))
    except (HetCacheError, OSError) as error:
        print(f"hetcache-export: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("hetcache-export: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
