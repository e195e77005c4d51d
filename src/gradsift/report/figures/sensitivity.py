"""Figures of the sensitivity to settings that the paper leaves open: number of members M, snapshots, eps and seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.config import GsnrConfig
from gradsift.gradients.statistics import compute_statistics
from gradsift.report.audit_tables import jaccard
from gradsift.report.figures import groups, style
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing, Run
from gradsift.report.run_tables import grouped, mean
from gradsift.scoring.gsnr import gsnr
from gradsift.scoring.scores import Scores
from gradsift.selection.choice import best_first

Setting = tuple[int, tuple[int, ...]]  # M, snapshots
EPS = np.logspace(-12, 2, 57)


def settings_grid(material: Material) -> Records:
    """Return a value for each setting (number of members, pair of snapshots) of one scorer at the middle alpha.

    The scorer is G-SNR if its settings vary, or else the first scorer whose settings vary. The value is the mean PWS of
    the setting's runs if all runs have a PWS, or else their mean held-out loss if all runs have one. Otherwise the
    value is the mean overlap (Jaccard index) of the setting's selections with those of a reference: the setting with
    the most members and, if several have as many, the latest snapshots.
    """
    runs = [run for run in material.runs if run.has("select") and run.has("statistics")]
    by_scorer = grouped(runs, lambda run: str(run.record["scorer"]))
    varied = {name: runs for name, runs in by_scorer.items() if len({_setting_of(run) for run in runs}) > 1}
    if not varied:
        raise Missing(
            "proxy.members and proxy.snapshots do not vary; sweep them with experiment=gradfiltering_sensitivity"
        )
    scorer = "gsnr" if "gsnr" in varied else next(iter(varied))
    alpha = groups.middle_alpha(varied[scorer])
    cells = grouped((run for run in varied[scorer] if run.alpha == alpha), _setting_of)
    measure = "PWS"
    values = {setting: mean([run.record.get("pws") for run in runs]) for setting, runs in cells.items()}
    if None in values.values():
        measure = "held-out loss"
        values = {setting: mean(list(map(groups.heldout_loss, runs))) for setting, runs in cells.items()}
    if None in values.values():
        largest = max(cells)
        measure, values = f"overlap with M={largest[0]}, {list(largest[1])}", {}
        others = {(run.data, run.record["seed"]): run for run in cells[largest]}
        for setting, runs in cells.items():
            pairs = [(run, other) for run in runs if (other := others.get((run.data, run.record["seed"])))]
            if pairs:
                values[setting] = float(np.mean([groups.overlap_of(material, *pair) for pair in pairs]))
    return [
        {"scorer": scorer, "measure": measure, "members": m, "snapshots": ", ".join(map(str, s)), "value": value}
        for (m, s), value in sorted(values.items())
    ]


def _setting_of(run: Run) -> Setting:
    return int(run.record["members"]), tuple(run.record["snapshots"])


@report_figure("sensitivity", "Sensitivity to M and the snapshots", settings_grid)
def members_and_snapshots(material: Material) -> Figure:
    """Each cell shows the result with one number of members and one pair of snapshots; brighter cells are better. The
    shades always run from the lowest to the highest value, even if these values are almost equal, so compare the
    numbers."""
    records = settings_grid(material)
    members = sorted({record["members"] for record in records})
    snapshots = sorted({record["snapshots"] for record in records}, key=lambda text: [int(s) for s in text.split(", ")])
    grid = np.full((len(members), len(snapshots)), np.nan)
    for record in records:
        grid[members.index(record["members"]), snapshots.index(record["snapshots"])] = record["value"]
    span = np.nanmax(grid) - np.nanmin(grid)
    shades = (grid - np.nanmin(grid)) / (span if span > 0 else 1.0)
    if records[0]["measure"] == "held-out loss":
        shades = 1 - shades  # brighter is better
    figure, (axes,) = style.panels(width=2.2 + 0.95 * len(snapshots), height=1.4 + 0.5 * len(members))
    texts = [[f"{value:.3f}" for value in line] for line in grid]
    style.cells(axes, shades, texts, rows=[str(m) for m in members], columns=snapshots)
    axes.set(xlabel="snapshots (epochs s, t)", ylabel="members M")
    axes.set_title(f"{records[0]['measure']}, {records[0]['scorer']}")
    return figure


def size_curves(material: Material) -> Records:
    """For each seed, compare G-SNR from the first m members, m = 2 ... M, with G-SNR from all M (see `agreement`)."""
    records: list[Mapping[str, Any]] = []
    for run in groups.over_seeds_of(material, groups.largest_ensemble(material)):
        early, late = (material.norms(run, epoch) for epoch in run.record["snapshots"])
        if len(early) < 3:
            raise Missing(f"{run.name}: {len(early)} members are too few to leave some out")
        scope, count = run.config["proxy"]["norm_scope"], len(material.statistics(run).G_s)
        scores = {
            m: gsnr(compute_statistics(early[:m], late[:m], scope, count), eps=own_eps(run))
            for m in range(2, len(early) + 1)
        }
        records += agreement(run, "members", scores, scores[len(early)])
    return records


@report_figure("sensitivity", "Members that a ranking needs", size_curves)
def ensemble_size(material: Material) -> Figure:
    """Agreement of G-SNR from only the first members with G-SNR from all members. Each seed has its own lines. Where
    the lines are near 1, more members would hardly change the ranking and the selection."""
    records = size_curves(material)
    figure, axes = _draw_agreement(groups.largest_ensemble(material), records, "members", marks="os")
    sizes = sorted({record["members"] for record in records})
    axes.set(xlabel=f"members, of {sizes[-1]}", ylabel="agreement with all members", xticks=sizes)
    return figure


def eps_curves(material: Material) -> Records:
    """For each seed, compare G-SNR at each eps in `EPS` with G-SNR at the run's own eps (see `agreement`)."""
    records: list[Mapping[str, Any]] = []
    for run in groups.over_seeds_of(material, groups.representative(material, "statistics")):
        values = material.statistics(run)
        scores = {float(value): gsnr(values, eps=float(value)) for value in EPS}
        records += agreement(run, "eps", scores, gsnr(values, eps=own_eps(run)))
    return records


@report_figure("sensitivity", "Sensitivity to eps", eps_curves)
def eps(material: Material) -> Figure:
    """Agreement of G-SNR at other values of eps with G-SNR at this run's eps, from the same gradient statistics. Each
    seed has its own lines. Where the lines fall, eps rather than the ensemble decides the ranking."""
    run = groups.representative(material, "statistics")
    figure, axes = _draw_agreement(run, eps_curves(material), "eps")
    axes.axvline(own_eps(run), color=style.INK, linewidth=1, label=f"this run: {own_eps(run):g}")
    middles = [float(np.nanmedian(material.statistics(each).V_t)) for each in groups.over_seeds_of(material, run)]
    label = f"median $V_t$: {' to '.join(dict.fromkeys(f'{value:.2g}' for value in (min(middles), max(middles))))}"
    for middle in middles:
        axes.axvline(middle, color=style.FAINT, **style.DOTTED, label=label)
        label = "_"  # left out of the legend
    axes.set(xscale="log", xlabel="eps", ylabel=f"agreement with eps = {own_eps(run):g}")
    return figure


def own_eps(run: Run) -> float:
    """Return the run's eps, or the default of G-SNR if the run's scorer has no eps."""
    return float((run.config.get("scorer") or {}).get("eps", GsnrConfig.eps))


def agreement(run: Run, name: str, scores: Mapping[Any, Scores], base: Scores) -> Records:
    """Compare each of `scores` with `base`: Spearman's correlation, and the Jaccard index of the top rows of both.

    The top rows are the share `run.alpha` of the rows with the best scores. An undefined correlation is None.

    `name` is the setting that varies; the keys of `scores` are its values.
    """
    size = int(run.alpha * len(base.score))
    top = best_first(base)[:size].tolist()
    return [
        {
            "run": run.name,
            "seed": run.record.get("seed"),
            "data_seed": run.record.get("data_seed"),
            name: value,
            "rank_correlation": groups.spearman(each.score, base.score),
            "overlap": jaccard(top, best_first(each)[:size].tolist()),
        }
        for value, each in scores.items()
    ]


def _draw_agreement(run: Run, records: Records, name: str, marks: Sequence[str] = ("", "")) -> tuple[Figure, Axes]:
    figure, (axes,) = style.panels(width=5.2, height=3.3)
    seeds = grouped(records, itemgetter("run")).values()
    labels = "rank correlation of the scores", f"overlap of the top {run.alpha:.0%}"
    for own in seeds:
        for place, (key, label) in enumerate(zip(("rank_correlation", "overlap"), labels, strict=True)):
            look: Style = {"color": style.COLOURS[place], "alpha": 1 if len(seeds) == 1 else 0.7, "label": label}
            axes.plot(style.column(own, name), style.column(own, key), marks[place] + ("-", "--")[place], **look)
        labels = "_", "_"  # matplotlib leaves this label out of the legend, which has one entry for all seeds
    axes.set_ylim(limits(style.column(records, "rank_correlation")))
    axes.set_title(f"{run.label}, {len(seeds)} seeds" if len(seeds) > 1 else groups.named(run))
    return figure, axes


def limits(correlation: np.ndarray) -> tuple[float, float]:
    """Return the limits of an axis that shows rank correlations, which may be negative, and overlaps (0 to 1)."""
    return float(np.fmin.reduce(correlation, initial=0.0)) - 0.02, 1.03


def seed_agreement(material: Material) -> Records:
    """Compare every pair of runs of a method that have the middle alpha and differ only in the seed.

    Returns for each pair Spearman's correlation of the scores and the Jaccard index of the selections.
    """
    runs = groups.reached(material, "select")
    alpha = groups.middle_alpha(runs)
    records: list[dict[str, Any]] = []
    for method, own in groups.by_method(runs, alpha).items():
        pairs = [
            (one, other)
            for one, other in itertools.combinations(own, 2)
            if one.data == other.data and one.record["seed"] != other.record["seed"]
        ]
        for number, (one, other) in enumerate(pairs, start=1):
            correlation = groups.spearman(material.scores(one).score, material.scores(other).score)
            values = {"rank_correlation": correlation, "overlap": groups.overlap_of(material, one, other)}
            records.append({"method": method, "alpha": alpha, "pair": number, **values})
    if not records:
        raise Missing("no two runs of a method differ in the seed alone on the same data; sweep seed=0,1,2")
    return records


@report_figure("sensitivity", "Stability across seeds", seed_agreement)
def seeds(material: Material) -> Figure:
    """Each mark compares two runs of a method that differ only in the seed. If a method's overlap is near that of two
    random selections (dotted line), its selection depends mostly on the seed. Random selection depends on scorer.seed
    and not on seed, so its two selections are equal."""
    records = seed_agreement(material)
    names, alpha = list(grouped(records, itemgetter("method"))), records[0]["alpha"]
    places = np.array([names.index(record["method"]) for record in records])
    figure, (axes,) = style.panels(width=5.6, height=1.2 + 0.36 * len(names))
    overlap = f"overlap of the selections, alpha {alpha:g}"
    labels = {"rank_correlation": "rank correlation of the scores", "overlap": overlap}
    for number, (key, label) in enumerate(labels.items()):
        options: Style = {"ms": 6, "color": style.COLOURS[number], "label": label, "alpha": 0.8}
        axes.plot(style.column(records, key), places + (-0.13, 0.13)[number], style.MARKERS[number], **options)
    chance = alpha / (2 - alpha)
    axes.axvline(chance, color=style.FAINT, **style.DOTTED, label=f"chance overlap {chance:.2f}")
    style.name_rows(axes, names)
    axes.set(xlim=(min(-0.05, axes.get_xlim()[0]), 1.03), xlabel="agreement between two seeds")
    return figure
