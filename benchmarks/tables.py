"""Put the tables of `benchmarks/results/*.json` into README.md, between their markers.

python benchmarks/tables.py           # rewrites README.md
python benchmarks/tables.py --check   # exits 1 if README.md is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

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


TABLES = {"steps": steps_table}


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in TABLES.items():
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        found = re.search(pattern, text, re.DOTALL)
        assert found, f"README.md has no markers for {name}"
        text = text[: found.start()] + found[1] + table(result) + found[2] + text[found.end() :]
    if "--check" in sys.argv:
        sys.exit(text != readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    main()
