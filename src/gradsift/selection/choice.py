"""What a selector returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.diagnostics import Diagnostic


@dataclass(frozen=True)
class Choice:
    """The chosen positions of the pool, best first, and what the selector noticed on the way.

    Fewer than the budget is a shortfall, which the select stage reports; a selector that knows why adds
    a diagnostic that says so.
    """

    positions: np.ndarray  # (k,) int64, no position twice, only examples that are `scored`
    diagnostics: Sequence[Diagnostic] = ()
