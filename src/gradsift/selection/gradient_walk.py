"""The gradient walk of G2IS (arXiv 2502.11062): examples that agree with each other and with the target.

For each component K of the core knowledge, with a budget in proportion to its variance (largest remainder):

    anchor   the unused example with the largest <g, K>
    then     from the last one, by descending <g_j, g_last>, the first unused j with
             (i)  <g_j, g_i> >= 0 for every i that this component has taken
             (ii) |cos(sum + g_j, K)| >= keep |cos(sum, K)|
    else     of all unused ones that pass (i) and (ii), the one with the largest <g, K>
    else     the component stops.

Our reading, where the paper is silent: (i) and the sum begin anew with each component; an example with a
gradient of zero is never taken; a neighbour is one of the `neighbours` examples with the largest inner
product, used or not; tasks of the target set are not told apart. Of core knowledge see there.

(i) can only rule out more, so what it has ruled out is looked at no more in that component. A step costs
one pass over the gradients that are left.

Shape letters: n candidates, D features, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.runtime import Advance, Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.budget import proportional_shares
from gradsift.selection.candidates import best_by_direction, shortfall
from gradsift.selection.choice import Choice
from gradsift.selection.core_knowledge import CoreKnowledge, core_knowledge
from gradsift.selection.products import products, squared_lengths

_ROUNDING = 1e-9  # by which a cosine may fall short in (ii)
_MOST_CONFLICTS = 0.5  # of pairs of target gradients: beyond it more of them contradict each other than agree
_WHY_STRICT = (
    "no further example agrees with those selected and with the core knowledge; take selector.fill=topup to fill the "
    "rest by score, or lower selector.keep or alpha"
)


def gradient_walk(
    scores: Scores,
    size: int,
    gradients: Features,
    target_gradients: Features,
    task: Task = unseen,
    *,
    explained: float,
    keep: float,
    fill: str,
    graph: bool,
    neighbours: int | None,
) -> Choice:
    """Walk through the pool's gradients once for each component, in the order of their variance.

    Args:
        explained: share of the target gradients' variance that the components explain.
        keep: the share of its cosine with K that the sum must keep with a further example.
        fill: where the walks stop before the budget: `strict` leaves it so, `topup` adds the highest scores.
        graph: False is the paper's ablation without a graph: each component takes the largest <g, K>.
        neighbours: how many of the last example's neighbours are looked at; all when None.

    Raises:
        GradsiftError: all gradients, of the target set or of the examples that are scored, are zero.
    """
    core = core_knowledge(target_gradients, explained)
    directed, undirected = best_by_direction(scores, gradients)
    pool = np.sort(directed)
    if not len(pool):
        raise GradsiftError("every gradient of the pool is zero; look at the proxy's training and at its examples")
    walk = Walk.of(gradients, pool, core)
    shares = proportional_shares(min(size, len(pool)), core.variances)
    with task("gradient walk", int(shares.sum())) as advance:
        rows = [
            walk.component(index, int(share), keep, graph, neighbours, advance) for index, share in enumerate(shares)
        ]
    picked = pool[[place for taken in rows for place in taken]]
    diagnostics = [_of_core(core, explained), _of_walk(walk, rows, shares)]
    if fill == "topup":
        rest = directed[~np.isin(directed, picked)][: size - len(picked)]
        diagnostics.append(_of_topup(len(rest), size))
        picked = np.concatenate([picked, rest])
    why = _WHY_STRICT if len(picked) < len(pool) else "all others have a gradient of zero; lower alpha"
    diagnostics += shortfall(len(picked), size, len(directed) + len(undirected), why)
    return Choice(picked, diagnostics)


@dataclass
class Walk:
    """The candidates' gradients, what has been taken, and counts for the diagnostics."""

    gradients: Features
    pool: np.ndarray  # (n,) positions, ascending
    towards: np.ndarray  # (n, C) <g, K>
    squares: np.ndarray  # (n,) |g|^2
    unused: np.ndarray  # (n,) bool
    by_core: int = 0  # steps that no neighbour could take
    tested: int = 0  # examples to which (i) was applied
    ruled_out: int = 0  # of these, by (i)

    @classmethod
    def of(cls, gradients: Features, pool: np.ndarray, core: CoreKnowledge) -> Walk:
        towards = products(gradients, pool, core.directions)
        return cls(gradients, pool, towards, squared_lengths(gradients, pool), np.ones(len(pool), dtype=bool))

    def component(
        self,
        index: int,
        share: int,
        keep: float,
        graph: bool,
        neighbours: int | None,
        advance: Advance = lambda done: None,
    ) -> list[int]:
        """Places in `pool` that one component takes, at most `share`, in their order."""
        towards = self.towards[:, index]
        if not graph:
            taken = _largest(np.where(self.unused, towards, -np.inf), min(share, int(self.unused.sum())))
            self.unused[taken] = False
            advance(len(taken))
            return taken
        taken = []
        total = _Sum(self, towards)
        place = _first_largest(towards, self.unused) if share else None
        while place is not None:
            taken.append(place)
            self.unused[place] = False
            advance(1)
            if len(taken) == share:
                break
            near = self._agreeing(total, place, neighbours)
            place = self._next(total, near, keep, neighbours)
        return taken

    def _agreeing(self, total: _Sum, place: int, neighbours: int | None) -> np.ndarray:
        """Add the example at `place` to the set; (n,) inner products with it, -inf where they are not needed."""
        total.free[place] = False
        looked_at = total.free if neighbours is None else np.ones(len(self.pool), dtype=bool)
        rows = np.flatnonzero(looked_at)
        near = np.full(len(self.pool), -np.inf)
        near[rows] = products(self.gradients, self.pool[rows], self.gradients.vectors[self.pool[[place]]])[:, 0]
        self.tested += int(total.free.sum())
        conflict = total.free & (near < 0)
        self.ruled_out += int(conflict.sum())
        total.add(place, near)
        total.free &= ~conflict
        near[place] = -np.inf
        return near

    def _next(self, total: _Sum, near: np.ndarray, keep: float, neighbours: int | None) -> int | None:
        """The example that the walk goes to."""
        passing = total.free & total.keeps_direction(keep)
        within = passing.copy()
        if neighbours is not None:
            within[:] = False
            within[_largest(near, neighbours)] = True
            within &= passing
        place = _first_largest(near, within)
        if place is None and (place := _first_largest(total.towards, passing)) is not None:
            self.by_core += 1
        return place


class _Sum:
    """The sum of a component's gradients, through its inner products; never the vector itself."""

    def __init__(self, walk: Walk, towards: np.ndarray) -> None:
        self.towards = towards
        self.squares = walk.squares
        self.free = walk.unused.copy()  # (n,) unused, and ruled out by (i) for none of the set
        self.products = np.zeros(len(towards))  # (n,) <sum, g>, kept only where `free`
        self.square = 0.0  # |sum|^2
        self.toward = 0.0  # <sum, K>

    def add(self, place: int, near: np.ndarray) -> None:
        """Add the gradient at `place`, whose inner products are `near` (n,)."""
        self.square += 2 * self.products[place] + self.squares[place]
        self.toward += self.towards[place]
        self.products[self.free] += near[self.free]

    def keeps_direction(self, keep: float) -> np.ndarray:
        """(n,) bool, meaningful where `free`: test (ii)."""
        now = abs(self.toward) / np.sqrt(self.square)
        after = np.zeros(len(self.towards))
        free = self.free
        squares = self.square + 2 * self.products[free] + self.squares[free]
        after[free] = np.abs(self.toward + self.towards[free]) / np.sqrt(squares)
        passing: np.ndarray = after >= keep * now - _ROUNDING
        return passing


def _first_largest(values: np.ndarray, where: np.ndarray) -> int | None:
    """Place of the largest of `values` (n,) in `where` (n,) bool, ties by row order; None where there is none."""
    return int(np.argmax(np.where(where, values, -np.inf))) if where.any() else None


def _largest(values: np.ndarray, count: int) -> list[int]:
    """Places of the `count` largest, ties by row order."""
    largest: list[int] = np.argsort(-values, kind="stable")[:count].tolist()
    return largest


def _of_core(core: CoreKnowledge, explained: float) -> Diagnostic:
    """Whether the target gradients say one thing."""
    components = len(core.directions)
    values = {
        "conflicting_pairs": core.conflicts,
        "components": components,
        "explained": float(core.variances.sum()),
        "largest_cosine_with_mean": float(core.cosines.max()),
        "smallest_cosine_with_mean": float(core.cosines.min()),
        "target_gradients": core.used,
    }
    seen = (
        f"{components} component{'s' if components > 1 else ''} of {core.used:,} target gradients (selector.explained="
        f"{explained}) with cosines of {core.cosines.min():.2f} to {core.cosines.max():.2f} to their mean"
    )
    if core.conflicts is None:
        return Diagnostic("core_knowledge", "unknown", values, f"{seen}; one target gradient shows no conflict")
    seen += f"; {core.conflicts:.0%} of their pairs conflict"
    bad = core.conflicts > _MOST_CONFLICTS
    return Diagnostic.judged("core_knowledge", bad, values, seen, "whether the target set's tasks belong together")


def _of_walk(walk: Walk, rows: list[list[int]], shares: np.ndarray) -> Diagnostic:
    """How far the walks went."""
    counts = [len(taken) for taken in rows]
    early = int(sum(count < share for count, share in zip(counts, shares, strict=True)))
    # (ii) looks at the size of the cosine alone: from a small one the sum may cross to the other side
    away = int(sum(walk.towards[taken, index].sum() < 0 for index, taken in enumerate(rows)))
    values: dict[str, float | None] = {
        "stopped_early": early,
        "turned_away": away,
        "selected": sum(counts),
        "least_of_a_component": min(counts),
        "most_of_a_component": max(counts),
        "by_core_knowledge": walk.by_core,
        "ruled_out": walk.ruled_out / walk.tested if walk.tested else None,
    }
    listed = "/".join(f"{count} of {share}" for count, share in zip(counts[:8], shares[:8], strict=True))
    seen = (
        f"the components took {listed}{'/...' if len(counts) > 8 else ''} examples, {walk.by_core} past all neighbours"
    )
    if walk.tested:
        seen += f"; {walk.ruled_out / walk.tested:.0%} of those looked at conflicted with the last"
    if away:
        seen += f"; the examples of {away} point away from their component"
    check = "the target set, selector.keep, or selector.graph=false"
    return Diagnostic.judged("gradient_walk", early > 0 or away > 0, values, seen, check)


def _of_topup(count: int, size: int) -> Diagnostic:
    """How much of the selection is not the method's."""
    seen = f"{count:,} of {size:,} examples were added by score where the walks had stopped"
    values = {"topped_up": count / size}
    return Diagnostic.judged("topped_up", count > 0, values, seen, "what the same budget gives with selector=topk")
