"""`python tests/rule_coverage.py [NAME ...]`: what the rules cover of the tiny transformers in `tests/zoo`.

Captures them and lists every operator that meets tokens, in how many models, with
its rule; operators without a rule; operators that are computed whole, and why; and rules that the oracle (`oracle`)
finds wrong. Exits with 1 if a rule is missing or wrong.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from hetcache_compile.capture.capture import capture
from hetcache_compile.passes.analysis.analyse import analyse
from hetcache_compile.passes.analysis.inputs import TokenInputs
from hetcache_compile.passes.ir.axis import Parts, Piece, Tokens
from hetcache_compile.passes.ir.refusal import GridMismatchError, UnsupportedGraphError
from hetcache_compile.passes.rules.table import RULES
from hetcache_compile.passes.testing.oracle import wrong_rules
from hetcache_compile.passes.testing.samples import ACCEPTED

NO_RULE = "no rule for this operator"


@dataclass
class Coverage:
    """What was met: models by operator, operators without a rule, and reasons for computing one whole."""

    met: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    missing: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    whole: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, module: GraphModule, grid: tuple[int, int, int], token_inputs: TokenInputs | None) -> None:
        """Count the operators of one captured model."""
        try:
            analysis = analyse(module, grid, token_inputs)
        except UnsupportedGraphError as error:
            for refusal in error.reasons:
                if refusal.reason == NO_RULE:
                    self.missing[refusal.op].add(name)
            return
        except GridMismatchError:
            return
        self.whole.update(f"{refusal.op}: {refusal.reason}" for refusal in analysis.whole.values())
        for node in analysis.module.graph.nodes:
            states = (analysis.states[operand] for operand in node.all_input_nodes)
            if node.op == "call_function" and any(isinstance(state, Tokens | Parts | Piece) for state in states):
                self.met[str(node.target)].add(name)

    def __str__(self) -> str:
        rules = {str(op): rule.__name__ for op, rule in RULES.items()}
        lines = ["operators that meet tokens, in how many models, and the rule:"]
        by_count = sorted(self.met.items(), key=lambda item: (-len(item[1]), item[0]))
        lines += [f"  {len(names):4} {op:50} {rules.get(op, '-')}" for op, names in by_count]
        lines.append(f"computed whole: {sum(self.whole.values())}")
        lines += [f"  {count:4} {reason}" for reason, count in self.whole.most_common()]
        lines.append(f"without a rule: {len(self.missing)}")
        lines += [f"  {op}: {', '.join(sorted(names))}" for op, names in sorted(self.missing.items())]
        return "\n".join(lines)


def zoo_coverage(entries: Iterable[Any]) -> Coverage:
    """The coverage of the entries that can be captured."""
    coverage = Coverage()
    for entry in entries:
        try:
            program = capture(entry.build(), (), entry.inputs())
        except UnsupportedGraphError:
            continue
        coverage.add(entry.name, program.module, entry.grid, entry.token_inputs)
    return coverage


def main(names: list[str]) -> int:
    """Print the report; the exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from zoo import ENTRIES

    chosen = [e for e in ENTRIES if not names or any(name.lower() in e.name.lower() for name in names)]
    coverage, wrong = zoo_coverage(chosen), wrong_rules(ACCEPTED)
    print(coverage)
    print(f"wrong, says the oracle: {len(wrong)}")
    print("".join(f"  {line}\n" for line in wrong), end="")
    return 1 if coverage.missing or wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
