"""The scripts of experiments/: results by hand, against brute force, and runs in the smallest embedded world."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import SMOKE

from experiments import (
    audit_table,
    cleaned_rows,
    contrast_variants,
    delayed_credit,
    heldout_losses,
    heldout_variance,
    norm_tables,
    precision,
    real_pool,
    walk_optimum,
)
from experiments.composed import line_of
from experiments.heldout_variance import over_members
from experiments.walk_optimum import best_set, compared
from gradsift.features.vectors import Features, unit_rows
from gradsift.gradients.statistics import read_statistics
from gradsift.proxy.member_tables import read_answer_losses
from gradsift.scoring.gsnr import gsnr
from gradsift.scoring.scores import read_scores
from gradsift.scoring.stage import SCORES_FILE, score
from gradsift.selection.core_knowledge import core_knowledge


def test_a_rows_variance_is_over_the_members_that_left_it_out() -> None:
    values = np.array([[1.0, 5.0, 2.0], [3.0, 6.0, 9.0], [8.0, 7.0, 4.0]])
    left_out = np.array([[True, True, True], [True, False, False], [False, False, True]])
    mean, variance = over_members(values, left_out)
    np.testing.assert_array_equal(mean, [2, np.nan, 3])  # a single member has no variance
    np.testing.assert_array_equal(variance, [1, np.nan, 1])


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, conflict = rng.normal(size=9), np.triu(rng.random((9, 9)) < 0.3, 1)
    agreeing = [
        chosen
        for size in range(10)
        for chosen in itertools.combinations(range(9), size)
        if not conflict[np.ix_(chosen, chosen)].any()
    ]
    for least, most in ((0, 9), (3, 3)):
        best = max((chosen for chosen in agreeing if least <= len(chosen) <= most), key=lambda c: values[list(c)].sum())
        assert best_set(values, conflict | conflict.T, least, most).tolist() == list(best)


def test_the_walk_is_never_above_the_optimum_and_reaches_it_where_nothing_conflicts() -> None:
    target = Features(np.array([[1, 0]], dtype=np.float32))
    angles = np.radians([0, 60, -40, 20, -70])  # the walk goes from 0 to 20, then to 60, which conflicts with -40
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    took, most, walk, best = compared(vectors, core_knowledge(target, 0.5), share=3, keep=0.0)
    assert (took, most) == (3, 3)
    assert walk == pytest.approx(np.cos(np.radians([0, 20, 60])).mean())
    assert best == pytest.approx(np.cos(np.radians([0, 20, 40])).mean())
    alike = unit_rows(np.random.default_rng(0).random((6, 2)) + np.array([9, 0]))
    took, most, walk, best = compared(alike, core_knowledge(target, 0.5), share=6, keep=0.0)
    assert (took, most, walk) == (6, 6, pytest.approx(best))


@pytest.fixture
def output_of(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script with options in this process, and returns what it prints."""

    def run(script: ModuleType, *options: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script", *options])
        script.main()
        return str(capsys.readouterr().out)

    return run


def test_the_scripts_for_bootstrap_members_run_in_the_smallest_world(gradsift, output_of) -> None:
    options = ("proxy.members=4", "proxy.ensemble=bootstrap", *SMOKE)  # the second script reuses the members
    assert "| members that left the row out | " in output_of(heldout_variance, *options)
    assert "| held out | " in output_of(contrast_variants, *options)


def test_delayed_credit_runs_in_the_smallest_world(gradsift, output_of) -> None:
    assert "| progress in the best epoch | " in output_of(delayed_credit, *SMOKE)


def test_the_walk_and_its_optimum_run_in_the_smallest_world(after_smoke, output_of) -> None:
    options = ("--rows=20", "--draws=2", "features.dimensions=32", "target_set.limit=3")
    assert "| 1 | 2 | " in output_of(walk_optimum, *options, *SMOKE)


def test_the_parts_of_g_snr_and_their_agreement_by_hand() -> None:
    early, late = np.array([[2.0, 4.0], [4.0, 4.0]]), np.array([[1.0, 5.0], [3.0, 5.0]])
    parts = precision.parts_of(early, late, eps=0.5)
    np.testing.assert_allclose(parts["G-SNR"], [(3 - 2) / 3.5 / 1.5, (4 - 5) / 4.5 / 0.5])
    np.testing.assert_array_equal(parts["V_t"], [1, 0])
    scores = np.arange(20.0)
    assert precision.agreement(scores, scores**3) == pytest.approx((1.0, 1.0))
    assert precision.agreement(scores, -scores) == pytest.approx((-1.0, 0.0))


def test_precision_compares_norms_in_float32_with_norms_in_bfloat16(after_smoke, output_of) -> None:
    printed = output_of(precision, *SMOKE, "scorer=gsnr", "--draws", "20")
    assert "120 rows, 2 members: the relative error of a norm is 0." in printed
    correlation = float(printed.split("| G-SNR | ")[1].split()[0])
    assert 0.9 < correlation < 1  # without the rounding of bfloat16 it would be 1


def test_scores_of_a_norm_table_are_those_of_the_store(after_smoke, tmp_path, output_of) -> None:
    file, overrides = tmp_path / "norms.npz", ["scorer=gsnr", *SMOKE]
    output_of(norm_tables, "write", str(file), *overrides)
    assert "| gsnr, eps 1e-08 | 2 | " in output_of(norm_tables, "read", str(file))
    line = line_of(overrides)
    with np.load(file, allow_pickle=False) as stored:
        scores = dict(norm_tables.scores_of(dict(stored), members=2))
    statistics = read_statistics(line.statistics)
    np.testing.assert_allclose(scores["gsnr, eps 0.01"], gsnr(statistics, eps=0.01).score, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores["late norm, lowest first"], -statistics.G_t, rtol=1e-6)
    quality = np.array(["clean", "wrong_answer", "clean", "clean", "wrong_answer"] * 4)
    best_spoilt = norm_tables.row_of("spoilt first", 2, (quality != "clean") * 1.0, quality)
    assert best_spoilt == "| spoilt first | 2 | 1.000 / 1.000 / 1.000 | 0.000 | 0.000 |"


def test_the_audits_of_a_sweep_are_averaged_over_its_seeds(tmp_path: Path, output_of) -> None:
    for number, (members, seed, spoilt) in enumerate([("3", 0, 0.1), ("5", 0, 0.2), ("3", 1, 0.3)]):
        run = tmp_path / f"{number}-gsnr-0.1"
        run.mkdir()
        overrides = [f"data.seed={seed}", f"proxy.members={members}"]
        (run / "run.json").write_text(json.dumps({"scorer": "gsnr", "overrides": overrides}))
        selections = [{"alpha": alpha, "spoilt": spoilt + alpha, "families": 10.0 + seed} for alpha in (0.05, 0.1)]
        kinds = {"truncated": {"rows": 9, "auroc": 0.5 + spoilt}}
        audit = {"selections": selections, "auroc_spoilt": 0.5 + seed / 10, "kinds": kinds}
        (run / "audit.json").write_text(json.dumps(audit))
    assert output_of(audit_table, str(tmp_path), "proxy.members").splitlines() == [
        "| scorer | proxy.members | runs | spoilt at 5% / 10% | families | AUROC | truncated |",
        "|---|---|---|---|---|---|---|",
        "| gsnr | 3 | 2 | 0.250 / 0.300 | 10.5 | 0.550 | 0.70 |",
        "| gsnr | 5 | 1 | 0.250 / 0.300 | 10.0 | 0.500 | 0.70 |",
    ]
    with pytest.raises(SystemExit, match="no run with an audit"):
        output_of(audit_table, str(tmp_path / "none"))


def test_the_first_variants_are_the_scorer_contrast_itself(after_smoke) -> None:
    overrides = ["scorer=contrast", "scorer.neighbours=50", *SMOKE]
    line = line_of(overrides)
    shipped = read_scores(score(line.runtime, line.scorer, line.loaded, line.sources, line.diagnose).file(SCORES_FILE))
    losses = read_answer_losses(line.answer_losses, line.rows)
    scores = dict(contrast_variants.variants(losses, line.pool, np.zeros(line.rows)))
    np.testing.assert_allclose(scores["contrast (ships)"], shipped.score, rtol=1e-6)
    np.testing.assert_allclose(scores["contrast, not saturated"], shipped.parts["bound"], rtol=1e-6)


def test_the_pool_of_real_rows_has_every_bad_row_once_and_as_before_cleaning(tmp_path: Path) -> None:
    rows = [{"instruction": f"Question {i}", "input": "", "output": f"Answer {i}"} for i in range(20)]
    labels = ["output_edited", "removed_or_rewritten", "input_edited", "output_edited"]
    originals = [rows[3], {**rows[3], "output": "N/A"}, rows[4], {**rows[5], "output": " "}]
    changes = [{"label": label, "original": row} for label, row in zip(labels, originals, strict=True)]
    (tmp_path / "alpaca_5000.json").write_text(json.dumps(rows))
    (tmp_path / "alpaca_cleaning_diff.jsonl").write_text("".join(json.dumps(change) + "\n" for change in changes))
    pool = real_pool.pool(tmp_path, 19)  # all rows except row 3, which the cleaners edited
    bad = sorted((row["output"], row["cleaning"]) for row in pool if row["cleaning"])
    assert bad == [("Answer 3", "output_edited"), ("N/A", "removed_or_rewritten")]
    plain = sorted(row["output"] for row in pool if not row["cleaning"])
    assert plain == sorted(row["output"] for row in rows if row is not rows[3])


def test_a_row_is_scored_by_its_best_epoch_in_units_of_the_mean_progress_of_this_epoch() -> None:
    losses = np.array([[4.0, 4.0, 4.0], [2.0, 4.0, 4.0], [2.0, 3.5, 4.0]])  # learnt at once, later, never
    np.testing.assert_allclose(delayed_credit.best_epoch(losses), [2 / (2 / 3), 0.5 / (0.5 / 3), 0])


def test_untouched_rows_share_no_prompt_with_the_other_pool(tmp_path: Path) -> None:
    rows = [{"instruction": f"Question {i}", "input": "", "output": "Yes"} for i in range(20)]
    (tmp_path / "alpaca_5000.json").write_text(json.dumps(rows[:8]))
    with gzip.open(tmp_path / "alpaca_cleaned_51k.json.gz", "wt") as stream:
        json.dump([{**row, "output": "No"} for row in rows], stream)
    bad = {"label": "output_edited", "original": {**rows[9], "output": "N/A"}}
    (tmp_path / "alpaca_cleaning_diff.jsonl").write_text(json.dumps(bad) + "\n")
    drawn = real_pool.untouched(tmp_path, 11)
    assert sorted(row["instruction"] for row in drawn) == sorted(row["instruction"] for row in (rows[8], *rows[10:]))


def test_a_row_of_the_table_of_cleaned_rows_by_hand() -> None:
    scores = np.array([6.0, 5.0, 4.0, 3.0, 2.0, np.nan])
    cleaned = np.array([True, False, False, True, False, True])
    words = np.array([1, 2, 3, 4, 5, 6])
    line = cleaned_rows.row_of("random", scores, cleaned, ~cleaned & (words < 5), words)
    # of the six pairs of an other row (2nd, 3rd) and a cleaned row, the cleaned row is above in two, as the 1st; two of
    # the three cleaned rows are in the lower half
    assert line == "| random | 0.667 | 0.67 [0.09, 0.99] | 1.000 | 1 | -1.00 |"


def test_held_out_losses_of_finetuned_targets_are_compared_row_by_row(
    after_smoke, smoke_store: Path, tmp_path: Path, output_of
) -> None:
    finished = {
        json.loads(file.read_text())["scorer"]: file for file in smoke_store.parent.glob("multirun/*/*/*/run.json")
    }
    records = {scorer: json.loads(finished[scorer].read_text()) for scorer in ("random", "gsnr")}
    for scorer, record in records.items():
        (tmp_path / scorer).mkdir()
        (tmp_path / scorer / "run.json").write_text(json.dumps(record))
    stored = [record["heldout_loss"]["model"] for record in records.values()]
    rows = line_of(records["gsnr"]["overrides"]).loaded.info["heldout"]
    lines = output_of(heldout_losses, "random", "gsnr").splitlines()
    assert f"{rows} rows" in lines
    assert f"| random | {stored[0]:.3f} | - |" in lines
    assert lines[-1].startswith(f"| gsnr | {stored[1]:.3f} | {stored[1] - stored[0]:+.3f} [")
    pool = line_of(records["gsnr"]["overrides"]).pool[:5]
    others = [{"instruction": row.instruction, "input": row.input, "output": row.output} for row in pool]
    others += [{"instruction": "New", "output": "word"}, {"instruction": "New ", "output": "other"}]
    (tmp_path / "others.json").write_text(json.dumps(others))
    assert "1 rows" in output_of(heldout_losses, "random", "gsnr", "--rows", "others.json").splitlines()
    (tmp_path / "gsnr" / "run.json").write_text(json.dumps(records["gsnr"] | {"stages": []}))
    with pytest.raises(SystemExit, match=r"gsnr has not made .*the defaults or the data have changed since"):
        output_of(heldout_losses, "random", "gsnr")


def test_rows_of_the_training_data_are_not_held_out_rows() -> None:
    rows = [{"instruction": name, "input": "", "output": "x"} for name in ("a", "b ", "c", "b", "d", "e")]
    seen = heldout_losses.unseen_rows(rows[:1], [], 9)
    assert [example.instruction for example in heldout_losses.unseen_rows(rows, seen, 3)] == ["b ", "c", "d"]
