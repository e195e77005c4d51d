"""The paper's tables and the headline, for runs made by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsift.diagnostics import Diagnostic, write_diagnostics
from gradsift.evaluation.intervals import mean_interval, p_value
from gradsift.report.figures import write_tables
from gradsift.report.headline import ONE_SEED, headline
from gradsift.report.material import Material, Missing, Run
from gradsift.report.paper_tables import ablation_table, cells_of, count, is_distinguishable, pws_table
from gradsift.report.run_tables import method_name, results_table
from gradsift.report.table import Table


def run(scorer: str, pws: float | None, alpha: float = 0.1, half: float = 0.1, **changes: Any) -> Run:
    """Return a finished run with one benchmark; the interval of its PWS has the width 2 * `half`."""
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


def judged(scorer: str, letters: str, alpha: float = 0.1, **changes: Any) -> Run:
    """Return a finished run whose items have the outcomes `letters` (w, t, l or i)."""
    pws = (letters.count("w") - letters.count("l")) / (len(letters) - letters.count("i")) + 1
    return run(scorer, pws, alpha, outcomes={"vicuna": {"items": "hash", "outcomes": letters}}, **changes)


def test_seeds_share_a_cell_with_an_interval_over_seeds_and_items() -> None:
    letters = ("wwwwwttlli", "wwwwttttll")
    pair = [judged("gsnr", each, seed=seed, variant="one") for seed, each in enumerate(letters)]
    (row,) = cells_of(sweep(*pair)).values()
    assert (row["pws"], row["runs"]) == (pytest.approx((1 + 3 / 9 + 1.2) / 2), 2)
    # the item that is invalid with one seed is left out with both
    outcomes = np.array([[1] * 5 + [0] * 2 + [-1] * 2, [1] * 4 + [0] * 4 + [-1]])
    low, high = mean_interval(outcomes)
    assert (row["pws_low"], row["pws_high"]) == (low + 1, high + 1)
    assert row["p_value"] == p_value(outcomes)


def test_data_seeds_are_seeds_of_one_cell() -> None:
    runs = [
        judged(scorer, letters, data_seed=data_seed, overrides=[f"data.seed={data_seed}"])
        for scorer, both in {"gsnr": ("wwwwwttlll", "wwwwttttll"), "random": ("wtttttttll", "wwttttttll")}.items()
        for data_seed, letters in enumerate(both)
    ]
    material = sweep(*runs)
    assert {method: row["runs"] for (_, (_, method)), row in cells_of(material).items()} == {"gsnr": 2, "random": 2}
    table = pws_table(material)
    assert table.header[1:] == ["0.1: gsnr", "0.1: random"] and table.rows[0][1].startswith("1.200 [")
    assert count(cells_of(material)).cells == 1
    head = headline(material)
    assert head.title == "4 runs: 2 methods, 1 budget, 2 seeds" and ONE_SEED not in head.verdicts[0]
    results = results_table([run.record for run in runs])
    assert [row[0] for row in results.rows] == ["gsnr", "random"] and "means of 2 seeds" in results.title


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 3)])
def test_cells_with_other_seeds_are_not_paired(seeds: tuple[int, ...]) -> None:
    """After a failed job a cell has fewer seeds than the others, and the report must still be written."""
    ours = [judged("gsnr", "w" * 40, seed=seed, variant="one") for seed in (0, 1, 2)]
    theirs = [judged("random", "l" * 40, seed=seed, variant="two") for seed in seeds]
    won = count(cells_of(sweep(*ours, *theirs)))
    assert (won.cells, won.higher, won.better) == (1, 1, 0)
    headline(sweep(*ours, *theirs))
    complete = [judged("random", "l" * 40, seed=seed, variant="two") for seed in (0, 1, 2)]
    assert count(cells_of(sweep(*ours, *complete))).better == 1


def test_seeds_without_outcomes_or_with_other_items_have_no_interval() -> None:
    plain = [run("gsnr", pws, seed=seed, variant="one") for seed, pws in enumerate((1.0, 1.2))]
    others = [judged("gsnr", "wwl", variant="one"), judged("gsnr", "wwl", seed=1, variant="one")]
    others[1].record["outcomes"]["vicuna"]["items"] = "other"
    for pair in (plain, others):
        (row,) = cells_of(sweep(*pair)).values()
        assert row["pws"] is not None and row["pws_low"] is row["pws_high"] is row["p_value"] is None


def test_ties_are_both_best_and_the_full_data_run_is_in_no_cell() -> None:
    table = pws_table(sweep(run("gsnr", 1.0), run("random", 1.0), run("full", 1.0)))
    assert table.best == {(0, 1), (0, 2)} and len(table.header) == 3


def test_pooled_figures_are_no_cell_of_their_own() -> None:
    base = run("gsnr", 1.0).record["pooled"]
    two = run("gsnr", 1.0, benchmarks={"vicuna": base, "wizardlm": base | {"pws": 1.5}})
    assert [place[2] for place, _ in cells_of(sweep(two))] == ["vicuna", "wizardlm"]


def test_cells_are_counted_by_paired_tests_and_ties_are_ties() -> None:
    def cell(alpha: float, ours: str, random: str, superfilter: str) -> list[Run]:
        values = {"gsnr": ours, "random": random, "superfilter": superfilter, "gsnr_raw_drop": "w" * 40}
        return [judged(scorer, letters, alpha) for scorer, letters in values.items()]

    won = count(
        cells_of(
            sweep(
                *cell(0.05, "w" * 40, "l" * 40, "t" * 40),  # better than both
                *cell(0.1, "t" * 40, "t" * 40, "l" * 40),  # equal to the best
                *cell(0.15, "w" * 21 + "l" * 19, "w" * 20 + "l" * 20, "l" * 40),  # higher, but by one item
                *cell(0.2, "l" * 40, "t" * 40, "l" * 40),  # worse than one of the two
                run("random", 1.0, 0.3),  # without the method
            )
        )
    )
    assert (won.cells, won.higher, won.tied, won.better, won.worse) == (4, 2, 1, 1, 1)
    assert won.baselines == ("random", "superfilter")  # neither an ablation nor the full-data run is a baseline
    assert "better in 1, worse in 1 and not distinguishable in 2" in str(won)


def test_cells_without_outcomes_of_the_items_are_not_distinguishable() -> None:
    won = count(cells_of(sweep(run("gsnr", 1.9), run("random", 0.1))))
    assert (won.cells, won.higher, won.better) == (1, 1, 0)


def test_the_best_of_24_equal_cells_is_rarely_called_better_than_the_full_data() -> None:
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(60):
        drawn = ["".join(rng.choice(list("wtl"), size=80, p=[0.3, 0.4, 0.3])) for _ in range(24)]
        cells = cells_of(sweep(*(judged(f"s{number}", letters) for number, letters in enumerate(drawn))))
        claims += any(is_distinguishable(cells).values())
    assert claims <= 6


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


def test_latex_keeps_special_characters_apart_from_its_own() -> None:
    header = ["a", "0.1: x_y", "0.1: z", "0.2: z"]
    rows = [["[1] & 50 %", "1 [0.9, 1.1]", "2", r"\x{~^"]]
    text = Table("PWS_1 #1", header, rows, frozenset({(0, 2)}), "$5 < 6").latex()
    assert r"\caption{PWS\_1 \#1}" in text and r"\$5 \textless{} 6" in text
    assert r" & \multicolumn{2}{c}{alpha 0.1} & \multicolumn{1}{c}{alpha 0.2} \\" in text
    assert r"a & x\_y & z & z \\" in text
    row = next(line for line in text.splitlines() if line.startswith("{[}1"))
    assert row == (
        r"{[}1{]} \& 50 \% & 1 {[}0.9, 1.1{]} & \textbf{2} & \textbackslash{}x\{\textasciitilde{}\textasciicircum{} \\"
    )
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_a_methods_name_is_short_and_holds_all_that_tells_it_apart() -> None:
    settings = "proxy.members=2 proxy.snapshots=[1,3] scorer.eps=0.1"
    assert method_name("gsnr", settings) == "gsnr M=2 [1,3] scorer.eps=0.1"
    assert method_name("random", None) == "random"


def test_the_headline_claims_no_difference_that_is_not_there_and_says_what_is_invalid() -> None:
    even = headline(sweep(judged("gsnr", "w" * 11 + "l" * 9), judged("random", "w" * 9 + "l" * 11)))
    assert "not distinguishable from the model tuned on all rows" in even.verdicts[0]
    clear = headline(sweep(judged("gsnr", "w" * 30), judged("random", "l" * 30)))
    assert "above the model tuned on all rows" in clear.verdicts[0]
    assert not any("no valid judgment" in verdict for verdict in clear.verdicts)
    cell = {"pws": 1.0, "pws_low": 0.5, "pws_high": 1.5, "win": 4, "tie": 0, "lose": 4, "invalid": 2, "n": 10}
    one = headline(Material(Path("run"), [run("gsnr", 1.0, pooled=cell, benchmarks={"vicuna": cell})], False))
    assert "20% of its 10 items have no valid judgment" in one.verdicts[0]
    some = headline(sweep(run("gsnr", 1.2), run("random", 1.0, pooled=cell, benchmarks={"vicuna": cell})))
    assert "Of the 20 items in all cells 2 (10.0%) have no valid judgment." in some.verdicts


def test_the_headline_names_the_limits_of_one_seed_and_the_baselines() -> None:
    by_benchmark = {"model": {"vicuna": 0.5}, "reference": {"vicuna": 0.75}, "untuned": {"vicuna": 0.25}}
    accuracy = {"model": 0.5, "by_benchmark": by_benchmark}
    seeds = [judged("gsnr", "w" * 30, seed=seed, accuracy=accuracy) for seed in (0, 1)]
    one, two = headline(sweep(seeds[0])), headline(sweep(*seeds))
    assert ONE_SEED in one.verdicts[0] and ONE_SEED not in two.verdicts[0]
    assert ("its accuracy", "0.500", "full data 0.750, no finetuning 0.250") in two.tiles
    # without reference answers there is no accuracy
    losses = {"model": 1.5, "reference": 1.25, "untuned": 2.0}
    seeds = [judged("gsnr", "w" * 30, seed=seed, heldout_loss=losses) for seed in (0, 1)]
    tile = ("held-out loss", "1.500", "full data 1.250, no finetuning 2.000")
    assert ("its " + tile[0], *tile[1:]) in headline(sweep(*seeds)).tiles
    assert tile in headline(Material(Path("run"), seeds[:1], False)).tiles
    seeds[1].record["heldout_loss"].pop("untuned")
    assert ("its held-out loss", "1.500", "full data 1.250") in headline(sweep(*seeds)).tiles


def test_the_headline_has_the_length_controlled_pws_beside_the_plain_one() -> None:
    one = judged("gsnr", "w" * 30, length_controlled={"pws": 1.25, "benchmarks": {"vicuna": {"pws": 1.25}}})
    tile = ("length-controlled PWS", "1.250", "at answers of equal length")
    assert tile in headline(sweep(one)).tiles
    assert tile in headline(Material(Path("run"), [one], False)).tiles


def test_methods_below_random_rows_are_one_warning(tmp_path: Path) -> None:
    found = [
        Diagnostic(f"against_random (gsnr, {alpha})", "warning", {"pws": 0.75, "pws_random": 1.0, "p_value": p}, "m")
        for alpha, p in ((0.1, 0.01), (0.2, None))
    ]
    write_diagnostics(tmp_path, found)
    (note,) = headline(Material(tmp_path, [judged("gsnr", "l" * 30)], True)).notes
    assert note.kind == "warning" and "gsnr, 0.1 (0.750, random 1.000); gsnr, 0.2 (0.750" in note.text
    assert "tell 1 of these 2 from random rows" in note.text
