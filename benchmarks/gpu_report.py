"""The tables of `gpu.py`: calls on a GPU, and forms with other caches."""

from __future__ import annotations

from statistics import median


def gpu_table(result: dict) -> str:
    """What one call takes, by size of the clip; errors; and what the first call takes."""
    sections, model = result["sections"], result["model"]
    clips = [name.removesuffix(", forms") for name in sections if name.endswith(", forms")]
    columns: list[dict[str, str]] = []
    for clip in clips:
        forms = sections[f"{clip}, forms"]
        by_mask = {name: row for name, row in forms.items() if name.startswith("M/N")}
        first = next(iter(by_mask.values()))
        full = median(row["full"]["seconds"] for row in by_mask.values())
        column = {"tokens": f"{first['tokens']:,}"}
        for way in ("eager", "compiled", "compiled blocks"):
            if f"{clip}, {way}" in sections:
                column[f"plain, {way}"] = f"{1e3 * sections[f'{clip}, {way}']['seconds']:.1f} ms"
        column["FULL"] = f"{1e3 * full:.1f} ms"
        recorded = sections.get(f"{clip}, CUDA graphs", {})
        for name, row in by_mask.items():
            seconds = row["partial"]["seconds"]
            column[f"PARTIAL, {name}"] = f"{1e3 * seconds:.1f} ms ({seconds / full:.2f})"
            if name in recorded:
                seconds = recorded[name]["partial"]["seconds"]
                column[f"PARTIAL, {name}, in a CUDA graph"] = f"{1e3 * seconds:.1f} ms ({seconds / full:.2f})"
        column["REUSE"] = f"{1e3 * median(row['reuse']['seconds'] for row in by_mask.values()):.2f} ms"
        for name, row in by_mask.items():
            if "edit" in row:
                column[f"50 steps `FPRRR...`, {name}"] = _edit(row, full)
                if name in recorded and "edit" in recorded[name]:
                    column[f"50 steps `FPRRR...`, {name}, in CUDA graphs"] = _edit(recorded[name], full)
        for cache in ("TaylorSeer", "cache-dit"):
            if other := sections.get(f"{clip}, {cache}"):
                way, row = min(
                    ((way, other[way]) for way in ("eager", "compiled blocks")), key=lambda one: one[1]["seconds"]
                )
                gain = other["steps"] * full / row["seconds"]
                column[f"50 steps, {cache}, 1 in 5 computed"] = f"{row['seconds']:.1f} s ({gain:.1f}x; {way})"
        column["cache of one branch"] = f"{first['cache_bytes'] / 2**30:.2f} GiB"
        column["peak memory"] = f"{first['peak_bytes'] / 2**30:.1f} GiB"
        cold = first["cold_seconds"]
        column["first call of FULL, PARTIAL, REUSE"] = ", ".join(
            f"{cold[kind]:.0f} s" for kind in ("full", "partial", "reuse")
        )
        columns.append(column)
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [f"| | {' | '.join(clips)} |", "| --- |" + " --- |" * len(clips)]
    rows += [f"| {name} | {' | '.join(column.get(name, '-') for column in columns)} |" for name in names]
    errors = sections.get("errors", {})
    worst = {
        dtype: (row["plain"], max(value for name, value in row.items() if name != "plain"))
        for dtype, row in errors.items()
        if dtype != "section_seconds"
    }
    told = " and ".join(f"{ours:.1e} in {dtype} (plain model {plain:.1e})" for dtype, (plain, ours) in worst.items())
    notes = [
        f"The shapes of Wan2.1-VACE-{model['size']}, {model['layers']} + {model['control_layers']} blocks, "
        f"480 x 832 pixels, bfloat16, random weights, {result['processor']}, torch {result['versions']['torch']}: "
        f"`{result['command']}`."
    ]
    if told:
        notes.append(f"Largest error of any form on inputs that do not change, against float64: {told}.")
    if rates := sections.get("rates"):
        notes.append(
            f"The GPU's own rates in this run: products {rates['matmul_flops'] / 1e12:.0f} TFLOP/s, attention "
            f"{rates['attention_flops'] / 1e12:.0f} TFLOP/s, copies {rates['copy_bytes'] / 1e12:.1f} TB/s."
        )
    rows += ["", " ".join(notes)]
    return "\n".join(rows)


def _edit(row: dict, full: float) -> str:
    """Seconds of an edit, and how often they go into as many FULL calls."""
    edit = row["edit"]
    return f"{edit['seconds']:.1f} s ({sum(edit['steps'].values()) * full / edit['seconds']:.1f}x)"


def gpu_caches_table(result: dict) -> str:
    """Forms with other caches, by the time of the ones whose cache is as computed."""
    sections, rows = result["sections"], ["| cache | FULL | PARTIAL | 50 steps | cache of one branch | peak memory |"]
    rows += ["| --- |" + " --- |" * 5]
    (clip,) = {name.split(", ")[0] for name in sections if ", " in name}
    (share,) = {name for name in sections[f"{clip}, forms"] if name.startswith("M/N")}
    own = sections[f"{clip}, forms"][share]
    for name in sorted((name.split(", ")[1] for name in sections if ", " in name), key=lambda name: name != "forms"):
        row = sections[f"{clip}, {name}"][share]
        seconds = {kind: (row[kind]["seconds"], own[kind]["seconds"]) for kind in ("full", "partial")}
        ratios = [f"{1e3 * its:.0f} ms ({its / of_own:.2f})" for its, of_own in seconds.values()]
        rows.append(
            f"| {'as computed' if name == 'forms' else name} | {' | '.join(ratios)} | {row['edit']['seconds']:.1f} s | "
            f"{row['cache_bytes'] / 2**30:.2f} GiB | {row['peak_bytes'] / 2**30:.1f} GiB |"
        )
    errors, model = sections["errors"]["bfloat16"], result["model"]
    worst = max(error for name, error in errors.items() if name != "plain")
    rows += [
        "",
        f"{model['size']} shapes, {model['layers']} + {model['control_layers']} blocks, {clip} of 480 x 832 pixels, "
        f"{share}, bfloat16, {result['processor']}: `{result['command']}`. Largest error of any form with any of "
        f"these caches on inputs that do not change: {worst:.1e} (plain model {errors['plain']:.1e}).",
    ]
    return "\n".join(rows)
