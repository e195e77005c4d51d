"""Selection by quotas: the highest scores in each group of rows.

A column of the data names each row's group, for example the data set that the row comes from.

Shape letters: N examples of the pool, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradsift.data.examples import Example
from gradsift.diagnostics import Diagnostic
from gradsift.errors import ConfigError
from gradsift.scoring.scores import Scores
from gradsift.selection.budget import capped_shares, proportional_shares
from gradsift.selection.choice import Choice, best_first, rank_within, shortfall


def quotas(
    scores: Scores, size: int, examples: Sequence[Example], *, column: str, shares: Mapping[Any, float] | None
) -> Choice:
    """Select the rows with the highest scores in each group; each group has a given share of the selection.

    If a group has fewer scored rows than its share, all its scored rows are selected. The other groups get the
    remainder in proportion to their shares, and a diagnostic warns of the lack.

    Args:
        column: column of the data that names a row's group. If a value is not a string, its JSON text is the group's
            name.
        shares: weight of each group by name, at least 0. If None, a group's weight is its number of rows in the pool.

    Raises:
        ConfigError: no row has the column, or the names in `shares` are not the names of the groups.
    """
    names, groups, weights = groups_of(examples, column, shares)
    ranked = best_first(scores)
    sizes = np.bincount(groups[ranked], minlength=len(names))
    taken = capped_shares(size, weights, sizes)
    wanted = proportional_shares(size, weights)
    positions = ranked[rank_within(groups[ranked], sizes) < taken[groups[ranked]]]
    reason = "selector.shares gives the other rows no share; give their groups a weight above 0"
    return Choice(
        positions,
        [
            _diagnostic(names, wanted, taken, "selector.shares" if shares else f"the rows without a score of {column}"),
            *shortfall(len(positions), size, len(ranked), reason),
        ],
    )


def groups_of(
    examples: Sequence[Example], column: str, shares: Mapping[Any, float] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names of the G groups, the index of each example's group (N,), and the weights of the groups (G,).

    The weights are those of `shares` or, if `shares` is None, the numbers of examples in the groups.
    """
    if not any(column in example.original for example in examples):
        raise ConfigError(
            f"selector.column={column} is no column of the data; it has {', '.join(examples[0].original)[:500]}"
        )
    # np.unique sorts the names, so that ties between remainders do not depend on the order of the rows
    names, groups = np.unique([_name(example.original.get(column)) for example in examples], return_inverse=True)
    weights = _weights(names.tolist(), shares) if shares else np.bincount(groups).astype(float)
    return names.tolist(), groups, weights


def _name(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _weights(names: Sequence[str], shares: Mapping[Any, float]) -> np.ndarray:
    shares = {_name(name): share for name, share in shares.items()}  # names in YAML may be numbers
    for name in shares:
        if name not in names:
            raise ConfigError(f"selector.shares names {name!r}, but the groups are: {', '.join(names)[:500]}")
    if missing := [name for name in names if name not in shares]:
        raise ConfigError(
            f"selector.shares does not name {', '.join(missing)[:500]}; give every group a weight, 0 to leave it out"
        )
    return np.array([shares[name] for name in names], dtype=float)


def _diagnostic(names: Sequence[str], wanted: np.ndarray, taken: np.ndarray, remedy: str) -> Diagnostic:
    lacking = {name: int(n) for name, n in zip(names, wanted - taken, strict=True) if n > 0}
    values: dict[str, float | None] = {"lacking": sum(lacking.values())}
    values |= {f"rows of {name}": int(count) for name, count in zip(names[:100], taken, strict=False)}
    rows = ", ".join(f"{count:,} of {name}" for name, count in zip(names[:10], taken.tolist(), strict=False))
    more = f", and {len(names) - 10} more groups" if len(names) > 10 else ""
    short = "".join(f"; {name} lacks {count:,} rows with a score" for name, count in list(lacking.items())[:10])
    return Diagnostic.judged("quotas", bool(lacking), values, f"selected {rows}{more}{short}", remedy)
