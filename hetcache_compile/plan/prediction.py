"""How a plan says that outputs are predicted and corrected."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """How outputs are predicted and corrected.

    Attributes:
        order: one less than how many computed outputs are kept.
        fitted: whether weights come from a calibration; else they are Lagrange's, over the timesteps.
        corrects: whether a step that computes corrects predictions before it.
    """

    order: int = 0
    fitted: bool = False
    corrects: bool = False
