"""The paper's tables: a cell is a run's PWS, the best of a row is bold, and the counts of cells are checked by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from gradsift.report.figures import write_tables
from gradsift.report.material import Material, Missing, Run
from gradsift.report.paper_tables import ablation_table, cells_of, count, pws_table
from gradsift.report.run_tables import method_name
from gradsift.report.table import Table


def run(scorer: str, pws: float | None, alpha: float = 0.1, half: float = 0.1, **changes: Any) -> Run:
    """Return a finished run with one benchmark, whose interval has the width 2 `half`."""
    low, high = (None, None) if pws is None else (pws - half, pws + half)
    cell = {"pws": pws, "pws_low": low, "pws_high": high, "win": 3, "tie": 4, "lose": 3, "invalid": 0, "n": 10}
    record = {
        "status": "finished",
        "scorer": scorer,
        "alpha": alpha,
        "variant": f"{scorer}-{alpha}",
        "seed": 0,
        "data_seed": 0,
        "dataset": "alpaca",
        "proxy": "gpt2",
        "members": 5,
        "snapshots": [1, 2],
        "target": "llama",
        "judge": "openai",
        "settings": "",
        "pws": pws,
        "pooled": cell,
        "benchmarks": {"vicuna": cell},
        "stages": [],
    } | changes
    return Run(Path(scorer), record, {}, scorer, [])


def sweep(*runs: Run) -> Material:
    return Material(Path("sweep"), runs, True)


def test_rows_are_places_and_columns_alphas_and_methods() -> None:
    other = run("gsnr", 0.9, alpha=0.05, dataset="alpaca_gpt4")
    table = pws_table(sweep(run("gsnr", 1.2), run("random", 1.0), run("gsnr", 1.1, alpha=0.05), other))
    assert table.header == ["dataset / target / benchmark", "0.05: gsnr", "0.1: gsnr", "0.1: random"]
    assert table.rows == [
        ["alpaca / llama / vicuna", "1.100 [1.000, 1.200]", "1.200 [1.100, 1.300]", "1.000 [0.900, 1.100]"],
        ["alpaca_gpt4 / llama / vicuna", "0.900 [0.800, 1.000]", "-", "-"],
    ]
    assert table.best == {(0, 2)}  # a lone method at its alpha is not the best of anything


def test_seeds_share_a_cell_with_their_mean_least_and_most() -> None:
    pair = [run("gsnr", pws, seed=seed, variant="one") for seed, pws in enumerate((1.0, 1.2))]
    (row,) = cells_of(sweep(*pair)).values()
    assert (row["pws"], row["pws_low"], row["pws_high"], row["runs"]) == (pytest.approx(1.1), 1.0, 1.2, 2)


def test_ties_are_both_best_and_the_full_data_run_is_in_no_cell() -> None:
    table = pws_table(sweep(run("gsnr", 1.0), run("random", 1.0), run("full", 1.0)))
    assert table.best == {(0, 1), (0, 2)} and len(table.header) == 3


def test_pooled_figures_are_no_cell_of_their_own() -> None:
    base = run("gsnr", 1.0).record["pooled"]
    two = run("gsnr", 1.0, benchmarks={"vicuna": base, "wizardlm": base | {"pws": 1.5}})
    assert [place[2] for place, _ in cells_of(sweep(two))] == ["vicuna", "wizardlm"]


def test_cells_won_and_lost_beyond_the_interval_are_counted() -> None:
    def cell(alpha: float, ours: float, random: float, superfilter: float) -> list[Run]:
        values = {"gsnr": ours, "random": random, "superfilter": superfilter, "gsnr_raw_drop": 2.0, "full": 1.0}
        return [run(scorer, pws, alpha) for scorer, pws in values.items()]

    won = count(
        cells_of(
            sweep(
                *cell(0.05, 1.3, 1.0, 1.1),  # won, and 1.2 > 1.1: beyond
                *cell(0.1, 1.0, 1.0, 0.9),  # matched
                *cell(0.15, 0.95, 1.0, 0.9),  # lost, within
                *cell(0.2, 0.8, 1.0, 0.7),  # lost, and 0.9 < 1.0: beyond
                run("random", 1.0, 0.3),  # nothing of ours beside it
            )
        )
    )
    assert (won.cells, won.matches_or_beats, won.beyond, won.lost_beyond) == (4, 2, 1, 1)
    assert won.baselines == ("random", "superfilter")  # neither an ablation nor the full-data run is a baseline
    assert str(won) == (
        "gsnr matches or beats random, superfilter in 2 of 4 cells (1 of them beyond its interval; of the 2 lost, 1 "
        "beyond it)"
    )


def test_ablations_stand_beside_the_score_with_their_difference() -> None:
    cells = sweep(
        run("gsnr", 1.2), run("gsnr_raw_drop", 1.0), run("gsnr_variance_normalized", 1.25), run("random", 1.0)
    )
    table = ablation_table(cells)
    assert table.header[1:] == ["gsnr", "gsnr_raw_drop", "gsnr_variance_normalized"]
    assert table.rows == [["alpaca / llama / vicuna, 0.1", "1.200", "1.000 (-0.200)", "1.250 (+0.050)"]]
    assert [record["delta"] for record in table.records] == pytest.approx([0.0, -0.2, 0.05])


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no run got as far as a PWS"):
        cells_of(sweep(run("gsnr", None)))
    with pytest.raises(Missing, match="no cell has both gsnr and a baseline"):
        count(cells_of(sweep(run("gsnr", 1.0))))
    _, reasons = write_tables(sweep(run("gsnr", 1.0), run("random", 1.1)), tmp_path)
    assert reasons["ablations"].startswith("no cell has gsnr beside one of its ablations")
    _, csv_row, _ = csv.reader((tmp_path / "pws.csv").read_text().splitlines())
    assert csv_row[:7] == ["alpaca", "llama", "vicuna", "0.1", "gsnr", "1.0", "0.9"]
    assert "**1.100 [1.000, 1.200]**" in (tmp_path / "pws.md").read_text()


def test_markdown_keeps_a_bar_in_a_cell_apart_from_the_tables_own() -> None:
    table = Table("title", ["a", "b"], [["x|y", "1"]], frozenset({(0, 1)}), "note")
    assert table.markdown() == "**title**\n\n| a | b |\n| --- | ---: |\n| x\\|y | **1** |\n\nnote"


def test_a_methods_name_is_short_and_holds_all_that_tells_it_apart() -> None:
    settings = "proxy.members=2 proxy.snapshots=[1,3] scorer.eps=0.1"
    assert method_name("gsnr", settings) == "gsnr M=2 [1,3] scorer.eps=0.1"
    assert method_name("random", None) == "random"
