"""The gradient walk of G2IS (arXiv 2502.11062): examples that agree with each other and with the target.

Let g_i be the gradient of example i. The core knowledge consists of principal components of the target gradients. Each
component K gets a share of the budget in proportion to the variance that it explains (largest-remainder rounding). The
component takes its examples one at a time:

    first    the anchor: the unused example j with the largest <g_j, K>
    then     among the neighbours of the last example taken, the unused example j with the largest <g_j, g_last> that
             satisfies
             (i)  <g_j, g_i> >= 0 for every example i that this component has taken
             (ii) |cos(sum + g_j, K)| >= keep |cos(sum, K)|, where sum is the sum of the gradients g_i
    or else  if no neighbour passes (i) and (ii), the unused example j with the largest <g_j, K> that passes them

A component stops when it has taken its share or no unused example passes (i) and (ii).

The paper does not mention the following choices. (i) and the sum consider only the examples that the present component
has taken. An example whose gradient is zero is never selected. The neighbours of an example are the `neighbours` other
examples whose gradients have the largest inner products with its gradient, whether they are used or not. All target
gradients count alike, whatever their task (see `gradsift.selection.core_knowledge`).

If `neighbours` is None, each step reads only the gradients of the unused examples that have passed (i) so far in this
component. Otherwise each step reads the gradients of all candidates, which takes longer.

Shape letters: n candidates, D features, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features, products, squared_lengths
from gradsift.runtime import Advance, Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.budget import proportional_shares
from gradsift.selection.choice import Choice, best_by_direction, shortfall
from gradsift.selection.core_knowledge import CoreKnowledge, core_knowledge

_ROUNDING = 1e-9  # tolerance of (ii)
_MOST_CONFLICTS = 0.5  # largest share of conflicting pairs of target gradients without a warning


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
    """Select examples with one walk per component, beginning with the component that explains the most variance.

    Args:
        explained: least share of the target gradients' variance that the components explain together.
        keep: the factor in (ii): the share of |cos(sum, K)| that must remain when an example is added to the sum.
        fill: what happens if the walks stop before the budget is reached. `strict` selects fewer examples. `topup` adds
            the unused examples with the highest scores.
        graph: whether to walk from neighbour to neighbour. If False, each component takes the unused examples with the
            largest <g, K>, as in the paper's ablation.
        neighbours: number of neighbours of an example; if None, all other examples are its neighbours.

    Raises:
        GradsiftError: all gradients of the target set, or all gradients of the scored examples, are zero.
    """
    core = core_knowledge(target_gradients, explained)
    directed, undirected = best_by_direction(scores, gradients)
    # in row order, because each step reads these rows from disk, and of equal values the first is taken
    pool = np.sort(directed)
    if not len(pool):
        raise GradsiftError("every gradient of the pool is zero; look at the proxy's training and at its examples")
    towards = products(gradients, pool, core.directions)
    walk = Walk(gradients, pool, towards, squared_lengths(gradients, pool), np.ones(len(pool), dtype=bool))
    shares = proportional_shares(min(size, len(pool)), core.variances)
    with task("gradient walk", int(shares.sum())) as advance:
        rows = []
        for index, share in enumerate(shares.tolist()):
            if graph:
                rows.append(walk.component(index, share, keep, neighbours, advance))
            else:
                rows.append(walk.nearest(index, share, advance))
    picked = pool[[place for taken in rows for place in taken]]
    diagnostics = [_core_diagnostic(core, explained), _walk_diagnostic(walk, rows, shares)]
    if fill == "topup":
        rest = directed[~np.isin(directed, picked)][: size - len(picked)]
        message = f"{len(rest):,} of {size:,} examples were added by score where the walks had stopped"
        values = {"topped_up": len(rest) / size}
        check = "what the same budget gives with selector=topk"
        diagnostics.append(Diagnostic.judged("topped_up", len(rest) > 0, values, message, check))
        picked = np.concatenate([picked, rest])
    reason = "all others have a gradient of zero; lower alpha"
    if len(picked) < len(pool):
        reason = (
            "no further example agrees with those selected and with the core knowledge; take selector.fill=topup to "
            "fill the rest by score, or lower selector.keep or alpha"
        )
    diagnostics += shortfall(len(picked), size, len(directed) + len(undirected), reason)
    return Choice(picked, diagnostics)


@dataclass
class Walk:
    """The state that the walks share: the candidates' gradients, and which candidates are unused."""

    gradients: Features
    pool: np.ndarray  # (n,) positions, ascending
    towards: np.ndarray  # (n, C) <g, K>
    squares: np.ndarray  # (n,) |g|^2
    unused: np.ndarray  # (n,) bool

    def nearest(self, index: int, share: int, advance: Advance) -> list[int]:
        """Take, without a walk, the unused examples with the largest <g, K> for the component `index`, at most `share`.

        Returns:
            The indices in `pool` of the examples taken, in descending order of <g, K>.
        """
        taken = _largest(np.where(self.unused, self.towards[:, index], -np.inf), min(share, int(self.unused.sum())))
        self.unused[taken] = False
        advance(len(taken))
        return taken

    def component(self, index: int, share: int, keep: float, neighbours: int | None, advance: Advance) -> list[int]:
        """Take at most `share` examples in a walk for the component `index`.

        Returns:
            The indices in `pool` of the examples, in the order in which they were taken.
        """
        towards = self.towards[:, index]
        free = self.unused.copy()  # unused, and not ruled out by (i)
        with_sum = np.zeros(len(towards))  # <sum, g> where `free`; the sum itself is never computed
        square = toward = 0.0  # |sum|^2 and <sum, K>
        taken: list[int] = []
        place = _first_largest(towards, self.unused) if share else None
        while place is not None:
            taken.append(place)
            self.unused[place] = free[place] = False
            advance(1)
            if len(taken) == share:
                break
            looked_at = np.flatnonzero(free) if neighbours is None else np.arange(len(self.pool))
            near = np.full(len(self.pool), -np.inf)  # inner products with the last example
            last = self.gradients.vectors[self.pool[[place]]]
            near[looked_at] = products(self.gradients, self.pool[looked_at], last)[:, 0]
            # |sum + g|^2 = |sum|^2 + 2 <sum, g> + |g|^2, before `with_sum` takes in g
            square += 2 * with_sum[place] + self.squares[place]
            toward += towards[place]
            with_sum[free] += near[free]
            # compare with the last example alone: all `free` examples agree with the examples taken before it
            free &= near >= 0  # (i)
            near[place] = -np.inf
            passing = np.zeros(len(free), dtype=bool)  # (ii)
            # the length of sum + g_j for each candidate j, without forming any of these sums
            length = np.sqrt(square + 2 * with_sum[free] + self.squares[free])
            passing[free] = np.abs(toward + towards[free]) / length >= keep * abs(toward) / np.sqrt(square) - _ROUNDING
            within = passing
            if neighbours is not None:
                within = np.zeros(len(free), dtype=bool)
                within[_largest(near, neighbours)] = True
                within &= passing
            place = _first_largest(near, within)
            if place is None:
                place = _first_largest(towards, passing)
        return taken


def _first_largest(values: np.ndarray, where: np.ndarray) -> int | None:
    """Return the index of the largest value where `where` is True, the first if several are equal.

    Returns None if `where` is True nowhere.
    """
    return int(np.argmax(np.where(where, values, -np.inf))) if where.any() else None


def _largest(values: np.ndarray, count: int) -> list[int]:
    """Return the indices of the `count` largest values, largest first; of equal values, the lower index comes first."""
    largest: list[int] = np.argsort(-values, kind="stable")[:count].tolist()
    return largest


def _core_diagnostic(core: CoreKnowledge, explained: float) -> Diagnostic:
    """Return the diagnostic of the components; it warns if most pairs of target gradients conflict."""
    count, shown = len(core.directions), float(core.variances.sum())
    values = {"conflicting_pairs": core.conflicts, "components": count, "explained": shown}
    message = (
        f"{count} component(s) explain {shown:.0%} of the target gradients' variance (selector.explained={explained})"
    )
    if core.conflicts is None:
        return Diagnostic("core_knowledge", "unknown", values, f"{message}; one target gradient shows no conflict")
    message += f"; {core.conflicts:.0%} of the pairs of target gradients conflict"
    bad = core.conflicts > _MOST_CONFLICTS
    return Diagnostic.judged("core_knowledge", bad, values, message, "whether the target set's tasks belong together")


def _walk_diagnostic(walk: Walk, rows: list[list[int]], shares: np.ndarray) -> Diagnostic:
    """Return the diagnostic of the walks; it warns if a walk stopped early or points away from its component."""
    counts = [len(taken) for taken in rows]
    early = int(sum(count < share for count, share in zip(counts, shares, strict=True)))
    # (ii) compares absolute values, so a small cosine of the sum with K may change its sign
    away = int(sum(walk.towards[taken, index].sum() < 0 for index, taken in enumerate(rows)))
    listed = "/".join(f"{count} of {share}" for count, share in zip(counts[:8], shares[:8], strict=True))
    message = f"the components took {listed}{'/...' if len(counts) > 8 else ''} examples"
    if away:
        message += f"; the examples of {away} point away from their component"
    values: dict[str, float | None] = {"stopped_early": early, "turned_away": away, "selected": sum(counts)}
    check = "the target set, selector.keep, or selector.graph=false"
    return Diagnostic.judged("gradient_walk", early > 0 or away > 0, values, message, check)
