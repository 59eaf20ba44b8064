"""Put the tables of `benchmarks/results/*.json` into the pages that show them, between their markers.

python benchmarks/tables.py           # rewrites the pages
python benchmarks/tables.py --check   # exits 1 if a page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, median

from estimate_report import estimate_errors_table, estimate_gpus_table, estimate_models_table
from few_steps_report import ahead_table, few_steps_table, moving_table, shared_table, times_table
from front_report import FEWER_STEPS, LIBRARIES, OURS, THE_PAPER, front_table, mask_size, points
from gpu_report import gpu_caches_table, gpu_table
from memory_report import cache_bytes_table, layer_shares_table, rounding_table

ROOT = Path(__file__).parent.parent
SHORT_STEPS, SHORT_SIZE, SHORT_SPEEDS = "50", "20", (2.5, 4.0, 6.0)
"""What the README's small table shows of the front: number of steps, mask size, least speed-ups."""


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


def few_steps_reference_table(result: dict) -> str:
    """Means over clips. Only clips that every sampler has, so that lines can be compared."""
    samplers = list(dict.fromkeys(name for clip in result["clips"].values() for name in clip))
    clips = {name: clip for name, clip in result["clips"].items() if set(samplers) <= set(clip)}
    groups = list(dict.fromkeys(size_of(name) for name in clips))
    heads = ["", "model calls", "to the teacher's 50 steps", *(f"to the truth, {group}" for group in groups)]
    rows = [f"| {' | '.join([*heads, 'SSIM', 'FLIP'])} |", "| --- |" + " --- |" * (len(heads) + 1)]
    for sampler in samplers:
        cells = {name: clip[sampler] for name, clip in clips.items()}
        near = [cell["to_teacher"] for cell in cells.values() if cell["to_teacher"] is not None]
        truth = {name: cell["to_truth"] for name, cell in cells.items()}
        by_group = [[cell["psnr_db"] for name, cell in truth.items() if size_of(name) == group] for group in groups]
        figures = [
            str(result["calls"].get(sampler, "-")), f"{mean(near):.1f}" if near else "-",
            *(f"{mean(of_group):.1f}" for of_group in by_group),
            *(f"{mean(cell[metric] for cell in truth.values()):.3f}" for metric in ("ssim", "flip")),
        ]  # fmt: skip
        rows.append(f"| {sampler} | {' | '.join(figures)} |")
    rows.append("")
    rows.append(
        f"PSNR in dB inside the mask, means over {len(clips)} clips that were never trained on; SSIM and FLIP against "
        f"the truth, inside the mask. {result['processor']}, torch {result['versions']['torch']}: "
        "`python benchmarks/reference/evaluate_few_steps.py`."
    )
    return "\n".join(rows)


def size_of(clip: str) -> str:
    """The group of a held-out clip."""
    return f"masks of {mask_size(clip)} %" if clip[0].isdigit() else f"real clip ({clip})"


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


def short_table(result: dict) -> str:
    """The README's part of the front. Methods with options are left out: the best of many would flatter."""
    shown = {OURS: "this package", THE_PAPER: THE_PAPER, FEWER_STEPS: FEWER_STEPS, "": "caches of diffusers, cache-dit"}
    found = [point for point in points(result, SHORT_STEPS, SHORT_SIZE) if "+" not in point["method"]]
    rows = ["| | " + " | ".join(f"at least {speed:g}x" for speed in SHORT_SPEEDS) + " |"]
    rows.append("| --- |" + " --- |" * len(SHORT_SPEEDS))
    for family, label in shown.items():
        prefixes = (family,) if family else LIBRARIES
        measured = [point for point in found if point["family"].startswith(prefixes)]
        rows.append(f"| {label} | " + " | ".join(best_cell(measured, speed) for speed in SHORT_SPEEDS) + " |")
    clips = sum(mask_size(clip) == SHORT_SIZE for clip in result["steps"][SHORT_STEPS]["masked"])
    rows += ["", short_caption(result, clips)]
    return "\n".join(rows)


def best_cell(measured: list[dict], speed: float) -> str:
    """The best of the points that are fast enough, in words."""
    fast = [point for point in measured if point["speedup"] >= speed]
    best = max(fast, key=lambda point: point["psnr_db"], default=None)
    return f"{best['psnr_db']:.1f} dB, {best['speedup']:.1f}x: `{best['method']}`" if best else "none is as fast"


def short_caption(result: dict, clips: int) -> str:
    return (
        f"Reference model, {SHORT_STEPS} steps, {clips} held-out clips with masks of {SHORT_SIZE} % of the pixels; "
        "median PSNR to the uncached result inside the mask; speed-up in transformer time over the same model compiled "
        f"without this package, on one clip. {result['processor']} (a CPU), {result['threads']} threads, torch "
        f"{result['versions']['torch']}."
    )


def picture_caption(result: dict) -> str:
    steps = ", ".join(f"{count} {kind}" for kind, count in result["steps"].items())
    return (
        f"Frame {result['frame']} of the demo. Tokens: red is generated, yellow is the margin around it, grey is "
        "known, dark is known but computed too. "
        f"The cached run made {sum(result['steps'].values())} model calls: {steps} (plan `{result['schedule']}`). "
        f"Inside the mask its PSNR to the uncached result is {result['psnr_generative_db']:.1f} dB: "
        "`python benchmarks/readme_picture.py`."
    )


BENCHMARKS = "docs/benchmarks.md"
MODEL_CARD = "hetcache_compile/reference/MODEL_CARD.md"
MEMORY = "docs/memory.md"
ESTIMATE = "docs/estimate.md"


def ladder_table(result: dict) -> str:
    rows = [
        "| token grid | values of M | of multiples of 32 | M against multiples of 32 |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["grids"].items():
        counts, ratio = row["values_of_m"], row["m_ratio"]
        rows.append(
            f"| {'x'.join(map(str, row['grid']))} ({name}) | {counts['ladder']} | {counts['multiples of 32']} | "
            f"{ratio['median']:.2f} in the median, {ratio['p90']:.2f} at nine tenths |"
        )
    rows += ["", f"{result['masks']} random boxes, still over the clip: `python benchmarks/ladder.py`."]
    return "\n".join(rows)


def soak_text(result: dict) -> str:
    return (
        f"{result['edits']} edits of random boxes, each in a session of its own: {result['values_of_m']} values of M, "
        f"{result['graphs_compiled']} graphs compiled, the last in edit {result['last_compilation_in_edit'] + 1}; "
        f"{result['kib_per_edit_second_half']:.1f} KiB of resident memory more per edit in the second half. "
        f"{result['differ_in_reverse_order']} differ in any bit when all are made once more in reverse order, and "
        f"{result['mismatches']} of {result['compared_with_a_model_compiled_anew']} from the same edit on a model "
        f"compiled anew. Functional forms, which have no session, give the same to "
        f"{result['largest_error_to_functional_forms']:.0e}. "
        f"Tiny Wan, {result['processor']}: `python benchmarks/soak.py`."
    )


def fresher_context_table(result: dict) -> str:
    """Each way to keep the context fresh, by schedule and mask size."""
    cells = result["cells"]
    groups = {group: [clip for clip in cells if mask_size(clip) == group] for group in map(mask_size, cells)}
    schedules = list(next(iter(cells.values())))
    columns = [(schedule, group) for schedule in schedules for group in sorted(groups, key=int)]
    heads = [f"`{schedule}`, {group} %" for schedule, group in columns]
    rows = [f"| context | {' | '.join(heads)} |", "| --- |" + " --- |" * len(columns)]
    for way in next(iter(cells.values()))[schedules[0]]:
        found = [[cells[clip][schedule][way] for clip in groups[group]] for schedule, group in columns]
        figures = [
            f"{median(c['psnr_db'] for c in of):.1f} dB, {median(c['fewer_flops'] for c in of):.2f}x" for of in found
        ]
        rows.append(f"| {f'`{way}`' if '=' in way else way} | {' | '.join(figures)} |")
    rows.append("")
    rows.append(
        f"Reference model without guidance, {len(cells)} held-out clips, 8 steps, margin {result['margin']:g}; medians "
        "inside the mask to the uncached result, and FLOPs of all steps FULL over those of the schedule. The last two "
        f"rows are plans in sessions, the others are simulated. {result['processor']}, torch "
        f"{result['versions']['torch']}: `python benchmarks/{result['command']}`."
    )
    return "\n".join(rows)


def cold_start_table(result: dict) -> str:
    """CPU seconds of each way, by depth."""
    labels = {
        "hetcache": "the forms FULL, PARTIAL and REUSE",
        "hetcache again": "the same in a second process",
        "compiled blocks": "the plain model, `compile_repeated_blocks()`",
        "compiled": "the plain model, `torch.compile`",
    }
    depths = result["depths"]
    heads = [f"{depth.replace('+', ' + ')} blocks" for depth in depths]
    rows = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(depths)]
    for way, label in labels.items():
        cells = [f"{cells[way]['seconds']:.0f} s" if way in cells else "-" for cells in depths.values()]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    rows += [
        "",
        f"CPU seconds from the first call until one step of each was done, with empty caches. WanVACE of tiny width, "
        f"{result['processor']}, torch {result['versions']['torch']}: `python benchmarks/cold_start.py`.",
    ]
    return "\n".join(rows)


def overhead_table(result: dict) -> str:
    """Milliseconds of a REUSE call, by depth."""
    rows = ["| | parameters | Dynamo's floor | REUSE call | ours |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| {name} | {row['parameters']} | {row['floor_ms']:.2f} ms | {row['reuse_ms']:.2f} ms | "
        f"{row['overhead_ms']:.2f} ms |"
        for name, row in result["depths"].items()
    ]
    rows += ["", f"{result['processor']}, one thread, torch {result['versions']['torch']}: `{result['command']}`."]
    return "\n".join(rows)


def second_edit_table(result: dict) -> str:
    """What a second edit costs and how close it is: medians over the clips of a mask size, by model and steps."""
    from second_edit import MARGIN, SKIPS, UNCACHED, points

    rows = []
    for way, clips in result["clips"].items():
        *model, steps = way.split(", ")
        kind = "distilled" if "distilled" in model else "original"
        margin = [option for option in model if option != kind] or [f"margin {MARGIN:g}"]
        sizes = dict(sorted(points(result, way).items(), key=lambda item: int(item[0])))
        columns = " | ".join(f"masks of {size} %" for size in sizes)
        rows += [
            f"| {kind}, {steps} steps, {margin[0]}; {len(clips)} clips | {columns} |",
            "| --- " * (1 + len(sizes)) + "|",
        ]
        for edit in dict.fromkeys(name.split("|")[0] for edits in sizes.values() for name in edits):
            shown = []
            for edits in sizes.values():
                cells = [edits.get(f"{edit}|{name}") for name in (UNCACHED, SKIPS, result["schedule"])]
                shown.append("; ".join(
                    f"{cell['flops']:.2f}, {likeness_of(cell['to_uncached_db'])}" if cell else "-" for cell in cells
                ))  # fmt: skip
            rows.append(f"| {edit} | {' | '.join(shown)} |")
        rows.append("")
    where = f"{result['processor']}, torch {result['versions']['torch']}: `{result['command']}`"
    rows.append(
        "FLOPs as a share of those of an uncached edit, and PSNR to it: after an uncached first edit; after it, with "
        f"one step REUSE; after `{result['schedule']}`. Reference model, held-out clips, medians over those of a mask "
        f'size, the original with guidance in two calls. {where}. The row "first" is the first edit itself.'
    )
    return "\n".join(rows)


def likeness_of(decibels: float) -> str:
    return "identical" if decibels >= 99 else f"{decibels:.1f} dB"


def ranks_table(result: dict) -> str:
    """What edits take on several GPUs, by a model."""
    links = list(result["links"])
    rows = []
    for model in result["models"]:
        height, width, frames = model["size"]
        letters = ", ".join(f"{count} {kind.upper()}" for kind, count in model["steps"].items())
        rows += [
            f"**{model['model']}**, {height} x {width}, {frames} frames, {model['tokens']:,} tokens; {letters}:", "",
            f"| GPUs | FULL | PARTIAL | sent in FULL | in PARTIAL | cache | edit, {' | edit, '.join(links)} |",
            f"| --- {'| --- ' * (5 + len(links))}|",
        ]  # fmt: skip
        by_size = {row["ranks"]: row for row in model["rows"]}
        shapes = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)]
        for guidance, size in shapes:
            row, calls = by_size[size], 2 // guidance
            name = f"{guidance * size}" if guidance * size == 1 else f"{guidance * size}: {guidance} x {size}"
            edits = [f"{row[link]['edit'] / guidance:.1f} s" for link in links]
            one, other = row[links[0]]["full"], row[links[0]]["partial"]
            rows.append(
                f"| {name} | {one:.3f} s | {other:.3f} s | {row['full_bytes'] / 2**30:.2f} GiB | "
                f"{row['partial_bytes'] / 2**30:.2f} GiB | {calls * row['cache_bytes'] / 2**30:.1f} GiB | "
                f"{' | '.join(edits)} |"
            )
        rows.append("")
    sources = "; ".join(
        f"{link}: {rate['bytes_per_second'] / 1e9:.0f} GB/s ({rate['source']})"
        for link, rate in result["links"].items()
    )
    rows.append(
        f"GPUs as `guidance x rows`. Seconds of a call, with {links[0]}, and bytes that a GPU sends in it; an edit is "
        f"50 steps of two calls, M/N {result['active']}. Seconds of compute: the roofline of [estimates](estimate.md) "
        f"({result['gpu']}) on the graphs of one rank; bytes are counted in them. {sources}; taken to be reached. "
        f"`{result['command']}`."
    )
    return "\n".join(rows)


TABLES = (
    ("estimate_errors", "estimate", estimate_errors_table, ESTIMATE),
    ("estimate_models", "estimate", estimate_models_table, ESTIMATE),
    ("estimate_gpus", "estimate", estimate_gpus_table, ESTIMATE),
    ("picture", "picture", picture_caption, "README.md"),
    ("short", "front", short_table, "README.md"),
    ("engine", "engine", engine_table, BENCHMARKS),
    ("export_size", "export_size", export_size_table, BENCHMARKS),
    ("front", "front", front_table, BENCHMARKS),
    ("few_steps", "few_steps", few_steps_table, BENCHMARKS),
    ("few_steps_ahead", "few_steps", ahead_table, BENCHMARKS),
    ("few_steps_times", "few_steps_times", times_table, BENCHMARKS),
    ("steps", "steps", steps_table, BENCHMARKS),
    ("cold_start", "cold_start", cold_start_table, BENCHMARKS),
    ("gpu", "gpu", gpu_table, BENCHMARKS),
    ("gpu_81_frames", "gpu_caches", gpu_table, BENCHMARKS),
    ("gpu_14b", "gpu_14b", gpu_table, BENCHMARKS),
    ("gpu_beside", "gpu_beside", gpu_table, BENCHMARKS),
    ("gpu_caches", "gpu_caches", gpu_caches_table, MEMORY),
    ("cache_bytes", "cache_bytes", cache_bytes_table, MEMORY),
    ("rounding", "cache_bytes", rounding_table, MEMORY),
    ("layer_shares", "layer_shares", layer_shares_table, MEMORY),
    ("second_edit", "second_edit", second_edit_table, "docs/second-edit.md"),
    ("gpu_first_blocks", "gpu_first_blocks", gpu_table, BENCHMARKS),
    ("ranks", "ranks", ranks_table, "docs/parallel.md"),
    ("overhead", "overhead", overhead_table, BENCHMARKS),
    ("ladder", "ladder", ladder_table, BENCHMARKS),
    ("soak", "soak", soak_text, BENCHMARKS),
    ("moving", "moving", moving_table, "docs/plan-options.md"),
    ("shared_context", "shared_context", shared_table, "docs/plan-options.md"),
    ("fresher_context", "fresher_context", fresher_context_table, BENCHMARKS),
    ("reference", "reference", reference_table, MODEL_CARD),
    ("few_steps_reference", "reference_few_steps", few_steps_reference_table, MODEL_CARD),
)
"""Marker, result, what makes text of it, page. Links in the text start at the root of the repository."""


def from_page(text: str, page: str) -> str:
    """The text with its links as `page` needs them."""
    return text.replace("](benchmarks/", "](" + "../" * page.count("/") + "benchmarks/")


def updated(text: str, marker: str, table: str, page: str) -> str:
    """The page's text with a new table between its markers."""
    found = re.search(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", text, re.DOTALL)
    assert found, f"{page} has no markers for {marker}"
    return text[: found.start()] + found[1] + from_page(table, page) + "\n" + found[2] + text[found.end() :]


def main() -> None:
    out_of_date = []
    for marker, name, table, page in TABLES:
        path, measured = ROOT / page, ROOT / "benchmarks" / "results" / f"{name}.json"
        if not measured.exists():
            continue
        text = path.read_text()
        new = updated(text, marker, table(json.loads(measured.read_text())), page)
        if new != text:
            out_of_date.append(f"{page}: {marker}")
        if "--check" not in sys.argv:
            path.write_text(new)
    if "--check" in sys.argv and out_of_date:
        sys.exit(f"run python benchmarks/tables.py, these are out of date: {', '.join(out_of_date)}")


if __name__ == "__main__":
    main()
