"""Every figure of the report, one function each: `draw(material)` gives a matplotlib `Figure` or raises `Missing`.

In a notebook:

    from gradsift.report.figures import selection
    from gradsift.report.material import read
    selection.overlap(read(Path("multirun/DATE/TIME")))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, get_args

from matplotlib.figure import Figure

from gradsift.report.figures import audit, convergence, cost, ensemble, judge, pws, scores, selection, sensitivity
from gradsift.report.figures.style import Format, bytes_of
from gradsift.report.material import Material, attempt

__all__ = ["FIGURES", "Entry", "write_figures"]


class Entry(NamedTuple):
    """A figure of the report."""

    name: str  # of its files
    title: str
    caption: str  # one sentence: how to read it
    draw: Callable[[Material], Figure]  # raises Missing


FIGURES = (
    Entry(
        "pws",
        "PWS of every method",
        "Dots are PWS with their intervals; right of the dashed line a selection did better than all rows.",
        pws.pws,
    ),
    Entry(
        "members_and_snapshots",
        "Sensitivity to M and the snapshots",
        "One cell for each ensemble size and pair of snapshots; brighter is better. The shades run from the least "
        "to the most, however near these are: read the numbers.",
        sensitivity.members_and_snapshots,
    ),
    Entry(
        "ensemble_size",
        "Members that a ranking needs",
        "G-SNR by the first members alone against all of them; where the lines near 1, more members change little.",
        sensitivity.ensemble_size,
    ),
    Entry(
        "eps",
        "Sensitivity to eps",
        "The same gradient statistics scored with other values of eps; where the lines fall, eps and not the "
        "ensemble decides the ranking.",
        sensitivity.eps,
    ),
    Entry(
        "seeds",
        "Stability across seeds",
        "Each mark compares two seeds of one method on the same data; a method whose marks lie near chance "
        "selects by luck (random draws by scorer.seed, so seed moves it nowhere).",
        sensitivity.seeds,
    ),
    Entry(
        "convergence",
        "Convergence",
        "Training loss of the target on each method's selection, smoothed; at equal tokens the lower line "
        "learns faster, though noisy rows cannot be learned. At most eight are drawn.",
        convergence.convergence,
    ),
    Entry(
        "score_distributions",
        "Score distributions",
        "All scored rows in grey, the selected ones in colour; the axis is linear around zero and "
        "logarithmic far from it. At most eight are drawn.",
        scores.score_distributions,
    ),
    Entry(
        "early_late_norms",
        "Early against late gradient norms",
        "A row below the dashed diagonal lost gradient norm between the snapshots, which the score takes for learning.",
        scores.early_late_norms,
    ),
    Entry(
        "score_length",
        "Score against response length",
        "Median response along each ranking, best rows left; a line that rises or falls from the left edge "
        "selects by length. At most eight are drawn.",
        scores.score_length,
    ),
    Entry(
        "overlap",
        "Overlap of the selections",
        "Share of rows that two methods have in common (Jaccard, 1 is the same selection).",
        selection.overlap,
    ),
    Entry(
        "labels",
        "Quality of the selected rows",
        "Share of each known quality; a useful method keeps more clean rows than the pool in the first bar.",
        selection.labels,
    ),
    Entry(
        "variance_and_loss",
        "Variance of the norms and loss",
        "Left, each row's variance over members against its late loss; right, each selection's mean variance "
        "against the held-out loss of the target tuned on it.",
        scores.variance_and_loss,
    ),
    Entry(
        "trajectories_pca",
        "Ways of the members (PCA)",
        "All members start in the ringed point; ways that part are different members, ways that run together "
        "are a collapsing ensemble.",
        ensemble.trajectories_pca,
    ),
    Entry(
        "trajectories_tsne",
        "Ways of the members (t-SNE)",
        "The same points as the paper draws them: neighbours are kept, and distances between groups mean nothing.",
        ensemble.trajectories_tsne,
    ),
    Entry(
        "collapse",
        "Collapse of the ensemble",
        "An ensemble is collapsed where the members' distance or the spread of their norms falls below the "
        "dashed bounds.",
        ensemble.collapse,
    ),
    Entry(
        "member_loss",
        "Training of the members",
        "Smoothed training loss of each member; a line that does not fall is a proxy that does not learn, "
        "and its scores rank noise.",
        ensemble.training_loss,
    ),
    Entry(
        "judge_outcomes",
        "Wins, ties and losses",
        "Items on which the tuned target beat, tied with or lost to the one tuned on all rows, over both "
        "orders and all seeds.",
        judge.outcomes,
    ),
    Entry(
        "position_bias",
        "Position bias of the judge",
        "Items whose winner changed with the order in which the answers were shown; long bars mean that the "
        "judge prefers a place.",
        judge.position_bias,
    ),
    Entry(
        "length_bias",
        "Length bias of the judge",
        "How often the longer answer won where the lengths differ; an interval that misses the middle line "
        "is a preference.",
        judge.length_bias,
    ),
    Entry(
        "audit_spoilt",
        "Noise audit: spoilt rows selected",
        "Share of corrupted rows in the selection; below the band a method avoids them, within it does no "
        "better than chance. At most eight are drawn.",
        audit.spoilt,
    ),
    Entry(
        "audit_auroc",
        "Noise audit: what the scores tell apart",
        "AUROC of clean rows over each kind of corruption; 1 puts all clean rows first, 0.5 cannot tell, "
        "below that prefers the corrupted.",
        audit.auroc,
    ),
    Entry(
        "cost",
        "Cost",
        "What each stage took in these runs, and what was found in the store and not done again.",
        cost.cost,
    ),
)


def write_figures(material: Material, folder: Path, formats: Iterable[Format] = ("png", "svg")) -> dict[str, str]:
    """Write each figure as `<name>.<format>`, and remove those of an earlier report.

    Returns:
        The reasons of those that could not be drawn, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for entry in FIGURES:
        for form in get_args(Format):
            (folder / f"{entry.name}.{form}").unlink(missing_ok=True)
        reason = attempt(lambda: _write(entry.draw(material), folder / entry.name, formats))  # noqa: B023 - made at once
        if reason is not None:
            reasons[entry.name] = reason
    return reasons


def _write(figure: Figure, path: Path, formats: Iterable[Format]) -> None:
    for form, content in [(form, bytes_of(figure, form)) for form in formats]:
        path.with_suffix(f".{form}").write_bytes(content)
