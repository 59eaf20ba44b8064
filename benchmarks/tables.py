"""Put the tables of `benchmarks/results/*.json` into the pages that show them, between their markers.

python benchmarks/tables.py           # rewrites the pages
python benchmarks/tables.py --check   # exits 1 if a page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from front_report import front_table

ROOT = Path(__file__).parent.parent


def steps_table(result: dict) -> str:
    rows = ["| form | time / full | FLOPs / full | time ratio / FLOP ratio |", "| --- | --- | --- | --- |"]
    for name, row in sorted(result["forms"].items(), key=lambda item: -item[1]["seconds"]):
        share = name.removeprefix("partial ")
        label = f"partial, M/N = {share}" if share != name else name
        label = {"plain": "plain compiled model", "full": "full, with cache outputs"}.get(label, label)
        excess = f"{row['time_ratio'] / row['flop_ratio']:.2f}" if row["flop_ratio"] else "-"
        rows.append(f"| {label} | {row['time_ratio']:.3f} | {row['flop_ratio']:.3f} | {excess} |")
    model = result["model"]
    rows.append("")
    rows.append(
        f"WanVACE, {model['layers']} + {model['control_layers']} blocks of width {model['width']}, "
        f"{result['num_tokens']} tokens, {result['dtype']}, {result['processor']}, {result['threads']} threads, "
        f"torch {result['versions']['torch']}, medians of {result['rounds']} interleaved rounds: "
        f"`{result['command']}`."
    )
    return "\n".join(rows)


def reference_table(result: dict) -> str:
    methods = ("sampler", "mean_fill", "telea")
    groups: dict[str, list[dict]] = {}
    for name, clip in result["clips"].items():
        procedural = name[0].isdigit()
        groups.setdefault(f"masks of {name.split('-')[-1]} %" if procedural else f"real clip ({name})", []).append(clip)
        if procedural:
            groups.setdefault("all procedural clips", []).append(clip)
    rows = ["| clips | reference model | mean-colour fill | Telea per frame |", "| --- | --- | --- | --- |"]
    for label in sorted(groups, key=lambda label: (label[0] == "r", label[0] == "a", len(label), label)):
        clips = groups[label]
        figures = [sum(clip["psnr_db"][method] for clip in clips) / len(clips) for method in methods]
        rows.append(f"| {label} ({len(clips)}) | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    settings = result["settings"]
    rows.append("")
    rows.append(
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, {settings['dtype']}, "
        f"{result['processor']}, torch {result['versions']['torch']}: `python benchmarks/reference/evaluate.py`."
    )
    return "\n".join(rows)


def engine_table(result: dict) -> str:
    forms, shares = result["forms"], result["by_active_share"]
    rows = ["| form | time / full | FLOPs / full | time ratio / FLOP ratio |", "| --- | --- | --- | --- |"]
    named = {"plain (no cache outputs)": forms["plain"], "full": forms["full"]}
    named |= {f"partial, M/N = {float(share):g}": at for share, at in sorted(shares.items(), reverse=True)}
    named["reuse"] = forms["reuse"]
    for name, row in named.items():
        excess = f"{row['time_ratio'] / row['flop_ratio']:.2f}" if row["flop_ratio"] else "-"
        rows.append(f"| {name} | {row['time_ratio']:.3f} | {row['flop_ratio']:.3f} | {excess} |")
    steps = ", ".join(f"{count} {kind}" for kind, count in result["steps"].items())
    rows.append("")
    rows.append(
        f"Reference model, {result['num_tokens']} tokens, opset {result['opset']}, free sizes, {result['dtype']}; "
        f"{result['runs_on']}, {result['processor']}, {result['threads']} threads; medians of {result['rounds']} "
        f"interleaved rounds. The plan ({steps}) would take {result['predicted_speedup']:.1f}x less time than the "
        f"plain form at every step: `{result['command']}`."
    )
    return "\n".join(rows)


def export_size_table(result: dict) -> str:
    model, grid = result["model"], result["grid"]
    tokens = grid[0] * grid[1] * grid[2]
    return (
        f"The Wan2.1-VACE-1.3B architecture ({model['num_layers']} + {len(model['vace_layers'])} blocks) with random "
        f"{result['dtype']} weights and {tokens:,} tokens exports in {result['seconds']:.0f} s within "
        f"{result['peak_gib']:.1f} GiB; its weights are {result['weights_bytes'] / 2**30:.1f} GiB: "
        f"`{result['command']} --out DIR`."
    )


PAGES = {
    "engine": (engine_table, "README.md"),
    "export_size": (export_size_table, "README.md"),
    "front": (front_table, "README.md"),
    "steps": (steps_table, "README.md"),
    "reference": (reference_table, "hetcache_compile/reference/MODEL_CARD.md"),
}


def main() -> None:
    out_of_date = False
    for name, (table, page) in PAGES.items():
        path, measured = ROOT / page, ROOT / "benchmarks" / "results" / f"{name}.json"
        if not measured.exists():
            continue
        text, result = path.read_text(), json.loads(measured.read_text())
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        found = re.search(pattern, text, re.DOTALL)
        assert found, f"{page} has no markers for {name}"
        new = text[: found.start()] + found[1] + table(result) + "\n" + found[2] + text[found.end() :]
        out_of_date |= new != text
        if "--check" not in sys.argv:
            path.write_text(new)
    if "--check" in sys.argv:
        sys.exit(out_of_date)


if __name__ == "__main__":
    main()
