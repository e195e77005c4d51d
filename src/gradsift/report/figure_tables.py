"""The numbers behind the figures that compare runs, by the figures' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradsift.report.figures import audit, convergence, cost, judge, selection, sensitivity
from gradsift.report.figures.groups import largest_ensemble, standing_for
from gradsift.report.material import Material
from gradsift.report.text_table import TextTable

Records = Sequence[Mapping[str, Any]]


def _convergence(material: Material) -> Records:
    return [
        {"method": method, "step": step, "tokens": float(seen), "smoothed_loss": float(level)}
        for method, (tokens, loss) in convergence.curves(material).items()
        for step, (seen, level) in enumerate(zip(tokens, loss, strict=True), start=1)
    ]


def _overlap(material: Material) -> Records:
    alpha, names, values = selection.overlaps(material)
    return [
        {"alpha": alpha, "method": one, "other": other, "jaccard": float(values[i, j])}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i < j
    ]


def _labels(material: Material) -> Records:
    alpha, rows = selection.label_shares(material)
    return [{"method": name, "alpha": alpha, **shares} for name, shares in rows.items()]


def _settings(material: Material) -> Records:
    scorer, measure, values = sensitivity.settings_grid(material)
    return [
        {"scorer": scorer, "measure": measure, "members": m, "snapshots": ", ".join(map(str, s)), "value": value}
        for (m, s), value in sorted(values.items())
    ]


def _size(material: Material) -> Records:
    run = largest_ensemble(material)
    sizes, correlation, overlap = sensitivity.size_curves(material, run)
    return [
        {"run": run.name, "members": m, "rank_correlation": float(c), "overlap": o}
        for m, c, o in zip(sizes, correlation, overlap.tolist(), strict=True)
    ]


def _eps(material: Material) -> Records:
    run = standing_for(material, "statistics")
    curves = sensitivity.eps_curves(material.statistics(run), sensitivity.own_eps(run), run.alpha)
    return [
        {"run": run.name, "eps": float(eps), "rank_correlation": float(c), "overlap": float(o)}
        for eps, c, o in zip(sensitivity.EPS, *curves, strict=True)
    ]


def _seeds(material: Material) -> Records:
    alpha, found = sensitivity.seed_agreement(material)
    return [
        {"method": method, "alpha": alpha, "pair": pair, "rank_correlation": c, "overlap": o}
        for method, lists in found.items()
        for pair, (c, o) in enumerate(zip(*lists, strict=True), start=1)
    ]


def _judge(material: Material) -> Records:
    groups = judge.judged(material)
    longer = judge.longer_shares(groups)
    return [
        {"method and alpha": name}
        | {key: judge.total(runs, "pooled", key) for key in ("n", "win", "tie", "lose", "invalid")}
        | {key: judge.total(runs, "position_bias", key) for key in ("to_first", "to_second")}
        | dict(zip(("longer_won", "items_of_unequal_length"), longer.get(name, (None, 0)), strict=True))
        for name, runs in groups.items()
    ]


def _audit(material: Material) -> Records:
    return [
        {"method": method, "alpha": alpha, "spoilt_share": float(share)}
        for method, audits in audit.audits(material).items()
        for alpha, share in zip(*audit.spoilt_shares(audits), strict=True)
    ]


def _cost(material: Material) -> Records:
    return [{"stage": stage, **asdict(its)} for stage, its in cost.costs(material).items()]


def _table(title: str, records: Callable[[Material], Records]) -> Callable[[Material], TextTable]:
    def make(material: Material) -> TextTable:
        found = records(material)
        header = list(dict.fromkeys(key for record in found for key in record))
        rows = [[_text(record.get(key)) for key in header] for record in found]
        return TextTable(title, header, rows, records=found)

    return make


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


FIGURE_TABLES = {
    "convergence": _table("Training loss of the target on each selection", _convergence),
    "overlap": _table("Overlap of the selections (Jaccard)", _overlap),
    "labels": _table("Share of each quality", _labels),
    "members_and_snapshots": _table("Sensitivity to M and the snapshots", _settings),
    "ensemble_size": _table("Agreement of the first members with all", _size),
    "eps": _table("Agreement of the score under other values of eps", _eps),
    "seeds": _table("Agreement of two seeds", _seeds),
    "judge_outcomes": _table("Outcomes and biases of the judge, summed over seeds", _judge),
    "audit_spoilt": _table("Spoilt share of the selections", _audit),
    "cost": _table("Cost by stage; seconds, tokens, GB", _cost),
}
