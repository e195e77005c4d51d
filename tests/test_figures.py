"""The figures draw the artifacts' values, which these tests compute from the files in another way."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from exactness import assert_close_by_norm
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from gradsift.errors import DataError
from gradsift.report.figures import (
    FIGURES,
    cost,
    outcomes,
    scores,
    selection,
    sensitivity,
    training,
    write_figures,
    write_tables,
)
from gradsift.report.figures.groups import among, largest_ensemble
from gradsift.report.figures.style import (
    FAINT,
    INK,
    PAPER,
    RULE,
    add_legend,
    bytes_of,
    column,
    looks_of,
    panels,
    styled,
)
from gradsift.report.headline import headline
from gradsift.report.material import Material, Missing, Run, read
from gradsift.report.paper_tables import TABLES
from gradsift.scoring.scores import UNDEFINED, Scores
from gradsift.scoring.stage import scores_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def material(report_sweep: Path) -> Material:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(report_sweep.parent)
        return read(report_sweep)


def run_of(material: Material, name: str) -> Run:
    return next(run for run in material.runs if run.name == name)


def stage_of(run: Run, stage: str, place: int = 0) -> Path:
    """Return the folder of an artifact as `run.json` names it, without use of `Material`."""
    stages = [entry for entry in run.record["stages"] if entry["name"] == stage]
    return Path(stages[place]["artifact"])


def table(run: Run, stage: str, file: str) -> dict[str, np.ndarray]:
    columns = pq.read_table(stage_of(run, stage) / file)
    return {name: columns[name].to_numpy(zero_copy_only=False) for name in columns.column_names}


def kept(run: Run) -> list[str]:
    """Return the ids of the selected examples from the run's selection.jsonl."""
    lines = (run.folder / "selection.jsonl").read_text().splitlines()
    return [json.loads(line)["gradsift"]["example_id"] for line in lines]


def lines_of(axes: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): (np.array(line.get_xdata()), np.array(line.get_ydata())) for line in axes.lines}


# ------------------------------------------------------------------------------------- all figures


def test_every_figure_is_drawn_alike_each_time(material: Material) -> None:
    names = [entry.name for entry in FIGURES]
    assert len(set(names)) == len(names)
    for entry in FIGURES:
        assert entry.title and entry.caption.endswith(".")
        try:
            svg = bytes_of(entry(material), "svg")
        except Missing as reason:  # so few items may all have answers of one length
            assert str(reason) == "no decided item has answers of different lengths"
            continue
        assert svg == bytes_of(entry(material), "svg"), entry.name
        assert b"<svg" in svg and len(svg) < 250_000, (entry.name, len(svg))


def test_files_are_written_and_reasons_told(material: Material, tmp_path: Path) -> None:
    lone = Material(material.folder, [run_of(material, "2-random-0.1")], False)
    reasons = write_figures(lone, tmp_path, ["svg"])
    assert reasons["eps"] == "2-random-0.1: there is no stage statistics (scorer=random does not need it)"
    assert reasons["overlap"] == "only one method selected at alpha=0.1"
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert drawn == {entry.name for entry in FIGURES} - set(reasons)
    assert {"convergence", "judge_outcomes", "cost"} <= drawn


def test_a_page_can_give_the_neutral_colours_its_own(material: Material) -> None:
    """Text and axes have only the four neutral colours, which a dark page replaces."""
    assert len({INK, FAINT, RULE, PAPER}) == 4
    svg = bytes_of(training.convergence(material), "svg").decode()
    assert "#000000" not in svg and "#ffffff" not in svg
    assert INK in svg and FAINT in svg and RULE in svg


def test_a_report_needs_no_torch(report_sweep: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gradsift.report.figures import FIGURES; "
        "from gradsift.report.material import read; m = read(Path('sweep')); "
        "[f(m) for f in FIGURES if f.name in ('eps', 'collapse', 'judge_outcomes', 'trajectories_pca')]; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=report_sweep.parent)


# ------------------------------------------------------------------------------- figures by figure


def test_pws_shows_the_means_of_run_json(material: Material) -> None:
    (axes,) = outcomes.pws(material).axes
    drawn = {bar.get_label(): bar.lines[0].get_xdata() for bar in axes.containers}
    both = [run_of(material, name).record["pws"] for name in ("0-gsnr-0.1", "3-gsnr-0.1")]
    names = [label.get_text() for label in axes.get_yticklabels()]
    gsnr = next(i for i, name in enumerate(names) if name.startswith("gsnr") and "members=3" not in name)
    assert len(names) == len(drawn["alpha 0.1"])
    assert drawn["alpha 0.1"][gsnr] == pytest.approx(np.mean(both))


def test_convergence_is_the_curve_of_the_finetune(material: Material) -> None:
    by_step, by_token = training.convergence(material).axes
    run = run_of(material, "2-random-0.1")
    entries = [json.loads(line) for line in (stage_of(run, "finetune") / "curve.jsonl").read_text().splitlines()]
    steps, losses = lines_of(by_step)[run.method]
    assert steps.tolist() == [1, 2, 3, 4]
    assert losses == pytest.approx([entry["loss"] for entry in entries])  # too few steps to be smoothed
    tokens, _ = lines_of(by_token)[run.method]
    assert tokens.tolist() == np.cumsum([entry["tokens"] for entry in entries]).tolist()
    ends = [x[-1] for x, _ in lines_of(by_token).values()]
    assert by_token.get_xlim() == (0, min(ends))
    assert training.ALL in lines_of(by_step)


def test_smoothing_is_a_mean_over_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=100)
    slow = [values[max(0, i - 5) : i + 6].mean() for i in range(100)]
    assert training.smooth(values, 0.1) == pytest.approx(slow)


def test_overlap_is_that_of_the_selected_ids(material: Material) -> None:
    one, other = (set(kept(run_of(material, name))) for name in ("0-gsnr-0.1", "2-random-0.1"))
    methods = {run_of(material, name).method for name in ("0-gsnr-0.1", "2-random-0.1")}
    (record,) = [r for r in selection.overlaps(material) if {r["method"], r["other"]} == methods]
    assert record["alpha"] == 0.1 and record["jaccard"] == pytest.approx(len(one & other) / len(one | other))
    texts = [text.get_text() for text in selection.overlap(material).axes[0].texts]
    assert texts.count(f"{record['jaccard']:.2f}") >= 2 and texts.count("1.00") >= 4  # symmetric, 1 on the diagonal


def test_labels_are_shares_of_the_selected_rows(material: Material) -> None:
    run = run_of(material, "2-random-0.1")
    quality = table(run, "load", "labels.parquet")["quality"]
    chosen = np.load(stage_of(run, "select") / "positions.npy")
    rows = {record.pop("method"): record for record in map(dict, selection.label_shares(material))}
    assert rows[run.method].pop("alpha") == 0.1
    expected = {name: count / len(chosen) for name, count in Counter(quality[chosen]).items()}
    assert {name: share for name, share in rows[run.method].items() if share} == pytest.approx(expected)
    (axes,) = selection.labels(material).axes
    ends = {bar.get_y(): bar.get_x() + bar.get_width() for bar in axes.patches}
    assert list(ends.values()) == pytest.approx([1.0] * len(rows))


def test_norms_are_those_of_the_statistics_with_the_selection_marked(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    (axes,) = scores.early_late_norms(material).axes
    values = table(run, "statistics", "statistics.parquet")
    drawn = lines_of(axes)
    assert drawn["all rows"][0] == pytest.approx(values["G_s"]) and drawn["all rows"][1] == pytest.approx(values["G_t"])
    chosen = sorted(np.load(stage_of(run, "select") / "positions.npy").tolist())
    assert drawn["selected"][1] == pytest.approx(values["G_t"][chosen])
    rose = float((values["G_t"] > values["G_s"]).mean())
    assert f"{rose:.0%}" in axes.get_title(loc="left")


def test_histograms_count_every_scored_and_every_selected_row(material: Material) -> None:
    figure = scores.score_distributions(material)
    for panel in figure.axes:
        if panel.get_visible():
            counts = [sum(patch.get_height() for patch in container) for container in panel.containers]
            assert counts == [120, 12]


def test_scores_of_no_row_are_missed_and_their_axes_are_named(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    scored = material.scores(run)
    lone = Material(material.folder, [run], False)
    none = Scores(np.full_like(scored.score, np.nan), {})
    none.mark(np.isnan(none.score), UNDEFINED, "none")
    lone._cache[scores_of, run.one("score").path] = none
    with pytest.raises(Missing, match="no run has a scored row"):
        scores.score_distributions(lone)
    drawn = scores.score_distributions(material)
    labels = [panel.get_xlabel() for panel in drawn.axes if panel.get_visible()]
    assert (labels[-1], drawn.get_supylabel()) == ("score", "rows")


def test_a_correlation_that_is_not_defined_is_a_gap_and_a_negative_one_is_seen() -> None:
    rising, flat = np.arange(4.0), np.ones(4)
    run = Run(Path("x"), {"scorer": "gsnr", "alpha": 0.5}, {}, "gsnr", [])
    scored = {number: Scores(score) for number, score in enumerate((rising, flat, -rising))}
    records = sensitivity.agreement(run, "number", scored, Scores(rising))
    expected = {"run": "x", "data_seed": None, "seed": None, "number": 1, "rank_correlation": None, "overlap": 0.0}
    assert records[1] == expected
    values = column(records, "rank_correlation")
    assert values[[0, 2]] == pytest.approx([1, -1]) and np.isnan(values[1])
    assert sensitivity.limits(values)[0] < -1 and sensitivity.limits(np.array([np.nan]))[0] == -0.02


def test_a_defect_in_one_figure_or_table_costs_no_other(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Material) -> Figure:
        raise KeyError("a name\nin two lines")

    entries = [replace(entry, draw=wraps(entry.draw)(broken)) if entry.name == "cost" else entry for entry in FIGURES]
    monkeypatch.setattr("gradsift.report.figures.FIGURES", [one for one in entries if one.name in ("cost", "overlap")])
    (tmp_path / "cost.png").write_text("of an earlier report")
    assert write_figures(material, tmp_path, ["svg"]) == {"cost": r"failed with KeyError: 'a name\nin two lines'"}
    assert [path.name for path in tmp_path.iterdir()] == ["overlap.svg"]
    monkeypatch.setitem(TABLES, "pws", broken)
    _, reasons = write_tables(material, tmp_path / "tables")
    assert reasons["pws"] == r"failed with KeyError: 'a name\nin two lines'"
    assert (tmp_path / "tables" / "overlap.csv").is_file() and not (tmp_path / "tables" / "pws.csv").exists()


def test_of_many_methods_every_scorer_keeps_one() -> None:
    scorers = {"gsnr M=2": "gsnr", "gsnr M=3": "gsnr", "gsnr M=4": "gsnr", "random": "random", "late_loss": "late_loss"}
    assert among(scorers, 3) == {"gsnr M=2", "random", "late_loss"}
    assert among(scorers, 4) == {"gsnr M=2", "gsnr M=3", "random", "late_loss"}
    assert among(scorers, 9) == set(scorers)


def test_a_long_legend_takes_nothing_from_what_is_drawn() -> None:
    heights = []
    for count in (2, 12):
        with styled():
            figure, (axes,) = panels(width=5, height=3)
            for number in range(count):
                axes.plot([0, 1], [0, number], label=f"a method with so long a name that it fills a line {number}")
            add_legend(figure)
            bytes_of(figure, "svg")
            heights.append(axes.get_position().height * figure.get_figheight())
    assert heights[1] > 0.9 * heights[0]


def test_no_two_of_many_methods_look_alike() -> None:
    names = [str(number) for number in range(24)]
    looks = looks_of(names)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(names)


def test_members_are_left_out_of_the_largest_ensemble(material: Material) -> None:
    runs = [run_of(material, "4-members"), run_of(material, "0-gsnr-0.1")]
    assert largest_ensemble(Material(material.folder, runs, True)) is runs[1]


def test_bins_hold_scores_of_any_scale() -> None:
    spread = np.array([-1e6, -1.0, 0.0, 1.0, 2.0, 3.0, 1e9])
    for values in (spread, np.ones(5), np.linspace(0, 1, 50), -np.abs(spread)):
        edges, _ = scores._bins(values)
        assert np.histogram(values, edges)[0].sum() == len(values)
        assert (np.diff(edges) > 0).all()


def test_lengths_are_medians_along_the_ranking(material: Material) -> None:
    run = run_of(material, "2-random-0.1")
    (axes,) = scores.score_length(material).axes
    score, examples = table(run, "score", "scores.parquet")["score"], table(run, "load", "examples.parquet")["output"]
    order = sorted(range(120), key=lambda i: -score[i])
    expected = [float(np.median([len(examples[i]) for i in order[k : k + 6]])) for k in range(0, 120, 6)]
    assert lines_of(axes)[run.method][1] == pytest.approx(expected)


def test_variance_is_held_against_loss_row_by_row_and_run_by_run(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    values = table(run, "statistics", "statistics.parquet")
    left, _ = scores.variance_and_loss(material).axes
    assert left.get_title(loc="left") == (
        f"rank correlation {spearmanr(values['loss_t'], values['V_t']).statistic:+.2f}"
    )
    points = scores.selections_by_variance(material, values["V_t"], run)
    chosen = np.load(stage_of(run, "select") / "positions.npy")
    expected = (run.method, values["V_t"][chosen].mean(), run.record["heldout_loss"]["model"])
    assert points[0][0] == expected[0] and points[0][1:] == pytest.approx(expected[1:])
    assert len(points) == 5  # all but the failed one


def test_eps_curves_are_the_score_under_other_eps(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    values = table(run, "statistics", "statistics.parquet")

    def slow(eps: float) -> np.ndarray:
        return (values["G_s"] - values["G_t"]) / (values["G_s"] + eps) / (values["V_t"] + eps)

    figure = sensitivity.eps(material)
    drawn = lines_of(figure.axes[0])
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(sensitivity.EPS)]
    assert len(curves) == 4  # two seeds
    grid, correlation = drawn["rank correlation of the scores"]
    assert grid[0] == pytest.approx(1e-12) and grid[-1] == pytest.approx(100)
    own, far = slow(1e-8), slow(100.0)
    assert correlation[-1] == pytest.approx(spearmanr(own, far).statistic)
    sets = [set(np.argsort(-score, kind="stable")[:12].tolist()) for score in (own, far)]
    assert drawn["overlap of the top 10%"][1][-1] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert correlation[np.abs(grid - 1e-8).argmin()] == pytest.approx(1)


def test_fewer_members_are_scored_from_their_norms(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    records = sensitivity.size_curves(material)
    assert [record["seed"] for record in records] == [0, 0, 1, 1]
    fewer, all_of_them = records[:2]
    assert (fewer["run"], fewer["members"], all_of_them["members"], all_of_them["overlap"]) == (run.name, 2, 3, 1)
    assert all_of_them["rank_correlation"] == pytest.approx(1)
    two = run_of(material, "4-members")  # the same run with M = 2
    pair = [table(one, "score", "scores.parquet")["score"] for one in (two, run)]
    assert fewer["rank_correlation"] == pytest.approx(spearmanr(*pair).statistic)


def test_the_grid_holds_pws_by_members_and_snapshots(material: Material) -> None:
    records = sensitivity.settings_grid(material)
    assert {(record["scorer"], record["measure"]) for record in records} == {("gsnr", "PWS")}
    grid = {(record["members"], record["snapshots"]): record["value"] for record in records}
    three = [run_of(material, name).record["pws"] for name in ("0-gsnr-0.1", "3-gsnr-0.1")]
    assert grid == {
        (3, "1, 2"): pytest.approx(np.mean(three)),
        (2, "1, 2"): pytest.approx(run_of(material, "4-members").record["pws"]),
    }


def test_without_pws_the_grid_holds_the_overlap_with_the_largest_setting(material: Material) -> None:
    runs = []
    for name in ("0-gsnr-0.1", "4-members"):
        run = run_of(material, name)
        record = {key: value for key, value in run.record.items() if key not in ("pws", "heldout_loss")}
        runs.append(replace(run, record=record))
    records = sensitivity.settings_grid(Material(material.folder, runs, True))
    one, other = (set(kept(run)) for run in runs)
    assert {record["measure"] for record in records} == {"overlap with M=3, [1, 2]"}
    values = {record["members"]: record["value"] for record in records}
    assert values == {2: pytest.approx(len(one & other) / len(one | other)), 3: 1}


def test_two_seeds_on_the_same_data_are_compared(material: Material) -> None:
    pair = [run_of(material, name) for name in ("0-gsnr-0.1", "3-gsnr-0.1")]
    (record,) = sensitivity.seed_agreement(material)  # the other methods have one seed
    scores_ = [table(run, "score", "scores.parquet")["score"] for run in pair]
    sets = [set(kept(run)) for run in pair]
    assert record["method"] == pair[0].method
    assert record["rank_correlation"] == pytest.approx(spearmanr(*scores_).statistic)
    assert record["overlap"] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))


# ---------------------------------------------------------------------------------------- ensemble


def test_ways_are_drawn_from_where_they_begin_to_the_adapters_end(material: Material) -> None:
    ways = material.trajectories(run_of(material, "0-gsnr-0.1"))
    assert [steps.tolist() for steps, _ in ways] == [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 3
    points = np.concatenate([points for _, points in ways])
    flat, shares = training.principal(points)
    from sklearn.decomposition import PCA

    reference = PCA(2).fit(points.astype(float))
    assert np.abs(flat) == pytest.approx(np.abs(reference.transform(points.astype(float))), abs=1e-6)
    assert shares == pytest.approx(reference.explained_variance_ratio_)
    (axes,) = training.trajectories_pca(material).axes
    clouds = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert np.concatenate([np.asarray(c.get_offsets()) for c in clouds]) == pytest.approx(flat)
    (axes,) = training.trajectories_tsne(material).axes
    assert sum(len(c.get_offsets()) for c in axes.collections) == 27


def test_the_members_distance_is_about_that_of_their_updates(material: Material) -> None:
    """The projection to 64 dimensions changes distances by about a tenth; the diagnostics have the exact distance."""
    run = run_of(material, "0-gsnr-0.1")
    steps, spread = training.spread_over_steps(material.trajectories(run))
    assert np.isnan(spread[0]) and steps[-1] == 8
    exact = run.record["diagnostics"]["adapter_spread"]["values"]["relative_distance"]
    assert spread[-1] == pytest.approx(exact, rel=0.2)


def test_collapse_counts_every_row(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    values = table(run, "statistics", "statistics.parquet")
    _, axes = training.collapse(Material(material.folder, [run], False)).axes
    assert sum(patch.get_height() for patch in axes.patches) == (values["G_t"] > 0).sum()
    median = f"median {np.median(np.sqrt(values['V_t']) / values['G_t']):.3f}"
    assert median in lines_of(axes)
    distances, spreads = training.collapse(material).axes
    assert len(distances.lines) == 2 + 2  # two seeds and two bounds
    assert f"seed 0: {median}" in lines_of(spreads)


def test_members_losses_are_their_curves(material: Material) -> None:
    run = run_of(material, "0-gsnr-0.1")
    files = [stage_of(run, "member", place) / "curve.jsonl" for place in (0, 1)]
    losses = [json.loads(line)["loss"] for file in files for line in file.read_text().splitlines()]
    (axes,) = training.member_loss(material).axes
    other = run_of(material, "3-gsnr-0.1")
    drawn = [(line.get_label(), line.get_ydata()) for line in axes.lines]
    assert [label for label, _ in drawn] == ["seed 0"] * 3 + ["seed 1"] * 3
    assert drawn[0][1] == pytest.approx(losses)
    file = stage_of(other, "member", 0) / "curve.jsonl"
    assert drawn[3][1][0] == pytest.approx(json.loads(file.read_text().splitlines()[0])["loss"])
    (axes,) = training.member_loss(Material(material.folder, [run], False)).axes
    assert lines_of(axes)["member 0"][1] == pytest.approx(losses)


def test_runs_that_differ_in_the_data_seed_alone_are_seeds_of_one_cell(material: Material) -> None:
    first, other = (run_of(material, name) for name in ("0-gsnr-0.1", "3-gsnr-0.1"))
    other = replace(other, record={**other.record, "seed": 0, "data_seed": 1})
    both = Material(material.folder, [first, other], True)
    _, spreads = training.collapse(both).axes
    names = [name.split(":")[0] for name in lines_of(spreads) if "median" in name]
    assert names == ["seed 0", "seed 0, data 1"]
    (axes,) = training.member_loss(both).axes
    assert [line.get_label() for line in axes.lines] == ["seed 0"] * 3 + ["seed 0, data 1"] * 3
    assert axes.get_title(loc="left") == f"{first.method}, 2 seeds"
    records = sensitivity.size_curves(both)
    assert [(record["seed"], record["data_seed"]) for record in records] == [(0, 0)] * 2 + [(0, 1)] * 2
    assert len({record["run"] for record in sensitivity.eps_curves(both)}) == 2
    (axes,) = outcomes.pws(both).axes
    (dots,) = axes.containers
    assert dots.lines[0].get_xdata() == pytest.approx([np.mean([run.record["pws"] for run in (first, other)])])
    assert list(outcomes.judged(both)) == [f"{first.method}, 0.1"]


# ------------------------------------------------------------------------- judge, audit and cost


def test_outcomes_are_those_of_the_judgments(material: Material) -> None:
    run = run_of(material, "2-random-0.1")
    lines = (stage_of(run, "judge") / "judgments.jsonl").read_text().splitlines()
    signs: dict[str, float] = {}
    for reply in map(json.loads, lines):
        margin = np.sign(reply["score_model"] - reply["score_reference"])
        signs[reply["item_id"]] = signs.get(reply["item_id"], 0.0) + margin
    expected = Counter(np.sign(list(signs.values())).tolist())
    (axes,) = outcomes.judge_outcomes(material).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    place = names.index(f"{run.method}, 0.1")
    widths = {bars.get_label(): bars[place].get_width() for bars in axes.containers}
    assert widths["win"] == pytest.approx(expected[1.0] / 26) and widths["tie"] == pytest.approx(expected[0.0] / 26)
    assert widths["lose"] == pytest.approx(expected[-1.0] / 26)


def test_biases_are_summed_over_seeds(material: Material) -> None:
    pair = [run_of(material, name) for name in ("0-gsnr-0.1", "3-gsnr-0.1")]
    assert outcomes.longer_shares({"gsnr": pair}) == {}  # a verifier prefers no length
    counts = [{"items": 10, "longer_wins": 6}, {"items": 30, "longer_wins": 12}]
    of_a_judge = [
        replace(run, record={**run.record, "length_bias": count}) for run, count in zip(pair, counts, strict=True)
    ]
    assert outcomes.longer_shares({"gsnr": of_a_judge}) == {"gsnr": (18 / 40, 40)}
    flips = [run.record["position_bias"]["to_second"] for run in pair]
    assert outcomes.total(pair, "position_bias", "to_second") == sum(flips)


def test_a_judge_that_prefers_a_place_is_shown_to(material: Material) -> None:
    run = run_of(material, "2-random-0.1")
    bias = {"items": 20, "flips": 8, "to_first": 2, "to_second": 6, "flip_share": 0.4, "first_share": 0.4}
    biased = replace(run, record={**run.record, "position_bias": bias})
    (axes,) = outcomes.position_bias(Material(material.folder, [biased], True)).axes
    widths = {bars.get_label(): bars[0].get_width() for bars in axes.containers}
    assert widths == {"flips to the first place": -0.1, "flips to the second place": pytest.approx(0.3)}


def test_the_audit_is_drawn_as_audit_json_has_it(material: Material) -> None:
    run = run_of(material, "2-random-0.1")
    written = json.loads((run.folder / "audit.json").read_text())
    (axes,) = selection.audit_spoilt(material).axes
    alphas, shares = lines_of(axes)[run.method]
    assert alphas.tolist() == [0.1, 0.2]
    assert shares == pytest.approx([cell["spoilt"] for cell in written["selections"]])
    (axes,) = selection.audit_auroc(material).axes
    texts = [text.get_text() for text in axes.texts]
    assert all(f"{kind['auroc']:.2f}" in texts for kind in written["kinds"].values())


def test_costs_add_up_to_the_runs_stages(material: Material) -> None:
    costs = cost.costs(material)
    stages = [stage for run in material.runs for stage in run.record["stages"]]
    for name, its in costs.items():
        mine = [stage for stage in stages if stage["name"] == name]
        assert its["made"] + its["reused"] == len(mine)
        assert its["seconds"] == pytest.approx(sum(stage["seconds"] for stage in mine if not stage["reused"]))
    assert costs["member"]["made"] == 2 * 3 * 2 and costs["member"]["reused"] > 0  # seeds, members, epochs
    assert costs["member"]["saved"] > 0 and costs["finetune"]["tokens"] > 0


# -------------------------------------------------------------------------- what is not there


def test_gaps_name_the_jobs_that_failed_and_why(material: Material) -> None:
    assert material.gaps == []  # the table of runs that did not finish has it
    assert run_of(material, "5-failed").outcome.startswith("it failed: alpha=0.001 ")


def test_gaps_name_a_lost_audit(material: Material, tmp_path: Path) -> None:
    run = run_of(material, "0-gsnr-0.1")
    run = replace(run, folder=tmp_path / run.name, record={**run.record, "audit": {}})
    (gap,) = Material(tmp_path, [run], True).gaps
    assert gap == "0-gsnr-0.1: audit.json is not in the run's folder any more"


def test_a_store_that_moved_is_found_where_it_is_said_to_be(
    report_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(report_sweep, tmp_path / "sweep")
    for file in (tmp_path / "sweep").glob("*/*.*"):  # as on another machine: no path of this one holds
        if file.name in ("run.json", "config.yaml"):
            file.write_text(file.read_text().replace(str(report_sweep.parent), "/elsewhere"))
    lost = read(tmp_path / "sweep")
    run = run_of(lost, "0-gsnr-0.1")
    assert not run.artifacts
    assert any(gap.startswith("0-gsnr-0.1: load/") and gap.endswith("not in the store any more") for gap in lost.gaps)
    with pytest.raises(Missing, match=r"0-gsnr-0.1: the artifact score/gsnr-.* is not in the store any more"):
        lost.scores(run)
    assert outcomes.pws(lost)  # run.json is enough for it
    moved = read(tmp_path / "sweep", report_sweep.parent / "store")
    assert moved.scores(run_of(moved, "0-gsnr-0.1")).score.shape == (120,)


def test_a_run_that_stopped_early_shows_what_it_has(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [one for one in FIGURES if one.name in ("early_late_norms", "convergence", "judge_outcomes")]
    monkeypatch.setattr("gradsift.report.figures.FIGURES", few)
    run = run_of(material, "0-gsnr-0.1")
    names = [stage["name"] for stage in run.record["stages"]]
    absent = ("pws", "pooled", "benchmarks", "accuracy", "metrics", "heldout_loss", "position_bias", "length_bias")
    record = {key: value for key, value in run.record.items() if key not in absent}
    record |= {"status": "stopped", "stages": run.record["stages"][: names.index("finetune")]}
    one = replace(run, record=record, config={**run.config, "stop_after": "selection"})
    reasons = write_figures(Material(material.folder, [one], False), tmp_path / "figures", ["svg"])
    assert (tmp_path / "figures" / "early_late_norms.svg").is_file()
    assert reasons["convergence"] == "0-gsnr-0.1: there is no stage finetune (it was stopped after selection)"
    assert reasons["judge_outcomes"] == "no run has judgments"


def test_a_plan_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "planned", "scorer": "gsnr", "stages": []}))
    with pytest.raises(DataError, match="holds a plan and no results; run the same command without plan=true"):
        read(tmp_path)


def test_a_job_that_was_killed_is_told_and_a_folder_without_runs_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither run\.json nor folders of jobs"):
        read(tmp_path)
    hydra = tmp_path / "3-gsnr-0.1" / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "overrides.yaml").write_text("- scorer=gsnr\n- alpha=0.05\n")
    killed = read(tmp_path)
    assert killed.is_sweep
    assert killed.runs[0].outcome == "it is unfinished: it was killed or is still at work"
    assert killed.runs[0].alpha == 0.05 and killed.runs[0].method == "gsnr"
    reasons = write_figures(killed, tmp_path / "figures", ["svg"])
    assert set(reasons) == {entry.name for entry in FIGURES}
    lone = read(hydra.parent)
    assert not lone.is_sweep and [run.outcome for run in lone.runs] == [killed.runs[0].outcome]
    (hydra / "overrides.yaml").write_text("- scorer=gsnr\n- alpha=much\n")
    assert headline(read(hydra.parent)).title == "One run: gsnr"


# ------------------------------------------------------------------------------------ full size


def test_a_cloud_of_52_000_rows_stays_small() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.lognormal(size=(2, 52_000))
    marked = rng.random(52_000) < 0.15
    with styled():
        figure, (axes,) = panels()
        scores.cloud(axes, x, y, np.flatnonzero(marked))
    counts = axes.collections[0].get_array()
    assert counts.sum() == 52_000
    drawn = lines_of(axes).popitem()[1][0]
    assert len(set(drawn.tolist())) == scores.MOST_POINTS and set(drawn.tolist()) <= set(x[marked].tolist())
    assert len(bytes_of(figure, "svg")) < 1_000_000


@pytest.mark.numerics
def test_the_projection_is_the_one_that_its_docstring_says(material: Material) -> None:
    """The expected point is computed from the adapter's file in float64, by layer, vector and coordinate."""
    from gradsift.proxy.trajectory import DIMENSIONS
    from gradsift.runtime import derive_seed

    run = run_of(material, "0-gsnr-0.1")
    folder = stage_of(run, "member", 1)
    weights = load_file(folder / "adapter_model.safetensors")
    point = np.zeros(DIMENSIONS)
    for name, a in weights.items():
        if "lora_A" in name:
            b = weights[name.replace("lora_A", "lora_B")]
            signs = np.random.default_rng(derive_seed("trajectory", name.split(".lora_A")[0]))
            left, right = (signs.choice(np.array([-1, 1], np.int8), (DIMENSIONS, n)) for n in (len(b), a.shape[1]))
            point += [u @ (b.astype(float) @ a) @ v for u, v in zip(left.astype(float), right, strict=True)]
    last = load_file(folder / "trajectory.safetensors")["points"][-1]
    assert_close_by_norm(last, point / DIMENSIONS**0.5, k=64)


def test_the_numbers_behind_the_figures_are_written(material: Material, tmp_path: Path) -> None:
    _, reasons = write_tables(material, tmp_path)
    assert set(reasons) <= {"ablations"}
    written = {path.stem for path in tmp_path.glob("*.csv")}
    with_records = {entry.name for entry in FIGURES if entry.records is not None}
    assert len(with_records) == 10 and written == {*TABLES, *with_records} - set(reasons)
    rows = list(csv.DictReader((tmp_path / "cost.csv").read_text().splitlines()))
    assert {row["stage"]: int(row["made"]) for row in rows}["member"] == 12
