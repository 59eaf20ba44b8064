"""The tables of `estimate.py`: predicted beside known times, all models, the rates of GPUs."""

from __future__ import annotations


def estimate_errors_table(result: dict) -> str:
    """Predicted times beside published and measured ones."""
    rows = ["| | known | predicted | error |", "| --- | --- | --- | --- |"]
    for row in result["published"]:
        height, width, frames = row["size"]
        way = f"FlashAttention-{row['attention'][2:]}, {'eager' if row['eager'] else 'compiled'}"
        clip = f"{height} x {width}, {frames} frames"
        rows.append(f"| {row['model']}, {clip}, {row['what']}, {row['gpu'].upper()}, {way} | {_times(row)} |")
    for row in result["measured"]:
        form = row["form"].upper() + (f", {row['mask']}" if row["form"] == "partial" else "")
        rows.append(
            f"| {row['model']}, {row['frames']} frames, {form} ([ours](benchmarks.md#on-a-gpu)) | {_times(row)} |"
        )
    sources = dict.fromkeys(row["source"] for row in result["published"])
    caches = {(row["model"], row["frames"]): row for row in result["caches"]}
    sizes = ", ".join(
        f"{row['predicted_bytes']:,} of {row['bytes']:,} for {model} at {frames} frames"
        for (model, frames), row in caches.items()
    )
    rows += [
        "",
        f"Published: {'; '.join(sources)}. Bytes of one branch's cache in our own runs, predicted of measured: "
        f"{sizes}. `python benchmarks/estimate.py`.",
    ]
    return "\n".join(rows)


def _times(row: dict) -> str:
    known, predicted = (f"{_digits(row[name])} s" for name in ("seconds", "predicted_seconds"))
    return f"{known} | {predicted} | {100 * row['error']:+.0f} %"


def _digits(value: float) -> str:
    """The value with three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def estimate_models_table(result: dict) -> str:
    """What caching takes and saves on every known model."""
    rows = [
        "| model | size | tokens | PFLOPs of an edit | attention | in the model | K/V in bf16 | in int8 | weights |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["models"].items():
        (height, width, frames), plain = row["size"], row["forms"]["plain"]
        size = f"{height} x {width}" + (f", {frames} frames" if frames > 1 else "")
        uncached, cached = _digits(row["uncached_seconds"]), _digits(row["plan_seconds"])
        seconds = f"{uncached} to {cached} s ({row['speedup']:.1f}x)"
        petaflops = " to ".join(_digits(row[name] / 1e15) for name in ("uncached_flops", "plan_flops"))
        cells = [name, size, f"{row['num_tokens']:,}", petaflops]
        cells += [f"{100 * plain['attention_flops'] / plain['flops']:.0f} %", seconds]
        cells += [f"{row['caches'][dtype]['edit'] / 2**30:.1f} GiB" for dtype in ("bf16", "int8")]
        cells.append(f"{row['weights_bytes'] / 2**30:.1f} GiB")
        rows.append(f"| {' | '.join(cells)} |")
    some = next(iter(result["models"].values()))
    rows += [
        "",
        f"Predicted, compiled, on an {some['gpu']}: {100 * result['active']:.0f} % of the tokens active, schedule "
        f"`{result['schedule']}`, sizes, steps and guidance usual for the model, all branches and experts counted. "
        f"`python benchmarks/estimate.py`.",
    ]
    return "\n".join(rows)


def estimate_gpus_table(result: dict) -> str:
    """The rates, and where they are from."""
    rows = [
        "| GPU | products | attention | FlashAttention-2 | memory | source |", "| --- | --- | --- | --- | --- | --- |"
    ]  # fmt: skip
    for name, card in result["gpus"].items():
        rates = " | ".join(f"{card[kind] / 1e12:.0f} TFLOP/s" for kind in ("matmul", "sdpa", "fa2"))
        rows.append(f"| {name} | {rates} | {card['memory'] / 1e12:.2f} TB/s | {card['source']} |")
    return "\n".join(rows)
