"""The tables of caches: their bytes and what these cost, attentions with numbers of their own."""

from __future__ import annotations

from statistics import median

from front_report import mask_size


def cache_bytes_table(result: dict) -> str:
    """Bytes against fidelity: medians over the clips of a mask size."""
    from cache_bytes import points

    clips = list(next(iter(result["ways"].values())))
    by_size = {size: points(result, size) for size in sorted({mask_size(clip) for clip in clips}, key=int)}
    rows = ["| cache | bytes | to the exact cache | " + " | ".join(f"masks of {size} %" for size in by_size) + " |"]
    rows += ["| --- |" + " --- |" * (2 + len(by_size))]
    over_all = points(result)
    for way, point in over_all.items():
        exact = "-" if way == "as computed" else f"{point['to_exact_cache_db']:.1f} dB"
        places = " | ".join(f"{found[way]['to_uncached_db']:.1f} dB" for found in by_size.values())
        rows.append(f"| {way.replace('+', ', ')} | {point['share']:.2f} | {exact} | {places} |")
    rows += ["", f"{len(clips)} held-out clips of the reference model, {result['steps']} steps: `{result['command']}`."]
    return "\n".join(rows)


def rounding_table(result: dict) -> str:
    """Errors of rounded caches alone: medians over the clips."""
    rows = ["| cache | first step | middle step | last step |", "| --- | --- | --- | --- |"]
    clips = list(result["rounding"].values())
    for name in clips[0]:
        values = (median(steps) for steps in zip(*(clip[name] for clip in clips), strict=True))
        called = "as computed" if name == "same" else name
        rows.append(f"| {called} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
    rows += ["", f"{len(clips)} held-out clips of the reference model, 8 steps: `{result['command']}`."]
    return "\n".join(rows)


def layer_shares_table(result: dict) -> str:
    """As many tokens for each attention against numbers of their own, by plan and clip."""
    rows = ["| plan | clip | as many each | numbers of their own | tokens of each attention |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    for plan, clips in result["cells"].items():
        for clip, found in clips.items():
            same, own = found["same"], found["measured"]
            counts = ", ".join(map(str, own["cached"]))
            rows.append(f"| {plan} | {clip} | {same['db']:.1f} dB | {own['db']:.1f} dB | {counts}; {same['cached']} |")
    rows += [
        "",
        f"PSNR inside the mask to the uncached result, {result['steps']} steps, `context_extrapolation=0`, "
        f"`cached_by=attention`, `cached_ratio={result['ratio']:g}`, the calibration that is shipped: "
        f"`{result['command']}`.",
    ]
    return "\n".join(rows)
