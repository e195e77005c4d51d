"""The tables and summaries show exactly what `run.json` has; the expected values were computed by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradsift.artifacts import StageRecord, Store
from gradsift.config import TrackerConfig
from gradsift.data.load import Labels
from gradsift.report.notes import remarks, remarks_of_all, warnings_of
from gradsift.report.run_tables import (
    TITLE,
    UNTUNED,
    flat_rows,
    over_seeds,
    results_table,
    untuned_rows,
    with_settings,
)
from gradsift.report.table import write_records
from gradsift.report.terminal import RunView, one_line, summary, sweep_finished
from gradsift.run_folder import RUN_FILE
from gradsift.run_record import RunRecord, composition
from gradsift.runtime import Display
from gradsift.tracking import Tracker


def cell(win: int, tie: int, lose: int, invalid: int = 0) -> dict[str, Any]:
    """Return the PWS entry of a benchmark; its PWS is null without a valid pair."""
    valid = win + tie + lose
    pws = (win - lose) / valid + 1 if valid else None
    low, high = (pws - 0.25, pws + 0.25) if pws is not None else (None, None)
    return {"win": win, "tie": tie, "lose": lose, "invalid": invalid, "pws": pws, "pws_low": low, "pws_high": high}


def run(benchmarks: dict[str, dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Return the `run.json` of a finished run."""
    benchmarks = benchmarks if benchmarks is not None else {"vicuna": cell(6, 2, 2)}
    counts = [sum(c[name] for c in benchmarks.values()) for name in ("win", "tie", "lose", "invalid")]
    pooled = cell(*counts)
    values = {
        "status": "finished",
        "scorer": "gsnr",
        "alpha": 0.1,
        "variant": "a",
        "seed": 0,
        "data_seed": 0,
        "dataset": "alpaca",
        "proxy": "gpt2",
        "members": 5,
        "snapshots": [1, 2],
        "target": "llama",
        "judge": "verifier",
        "benchmark_sets": list(benchmarks),
        "selection": {"rows": 200, "spoilt_share": 0.125, "families": 12.34},
        "pws": pooled["pws"],
        "pooled": pooled,
        "benchmarks": benchmarks,
        "accuracy": {"model": 0.5, "reference": 0.75, "untuned": 0.0625},
        "heldout_loss": {"model": 1.5, "reference": 1.25, "untuned": 3.0},
        "files": {},
        "overrides": ["alpha=0.1"],
    }
    return values | changes


def full() -> dict[str, Any]:
    changes = {"pws": 1.0, "selection": {"rows": 2000}, "scorer": "full", "alpha": 0.05}
    return {name: value for name, value in (run() | changes).items() if name not in ("pooled", "benchmarks")}


def cells(*runs: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table as shown, by heading."""
    table = results_table(runs)
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def text_of(table: Any, width: int = 160) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------- rows


def test_a_row_by_hand() -> None:
    assert flat_rows(run()) == [
        {
            "variant": "a",
            "dataset": "alpaca",
            "proxy": "gpt2",
            "members": 5,
            "snapshots": "1,2",
            "target": "llama",
            "judge": "verifier",
            "scorer": "gsnr",
            "alpha": 0.1,
            "settings": None,
            "benchmark": "vicuna",
            "data_seed": 0,
            "seed": 0,
            "rows": 200,
            "pws": 1.4,
            "pws_low": 1.15,
            "pws_high": 1.65,
            "p_value": None,
            "outcomes": None,
            "pws_length_controlled": None,
            "confidence": 0.95,
            "win": 6,
            "tie": 2,
            "lose": 2,
            "invalid": 0,
            "accuracy": 0.5,
            "heldout_loss": 1.5,
            "spoilt_share": 0.125,
            "families": 12.34,
            "status": "finished",
        }
    ]


def test_several_benchmarks_have_a_row_each_and_a_pooled_one() -> None:
    rows = flat_rows(run({"vicuna": cell(6, 2, 2), "koala": cell(0, 5, 5, invalid=3)}))
    assert [row["benchmark"] for row in rows] == ["vicuna", "koala", "pooled"]
    assert [[row[name] for name in ("win", "tie", "lose", "invalid")] for row in rows] == [
        [6, 2, 2, 0],
        [0, 5, 5, 3],
        [6, 7, 7, 3],
    ]
    assert [row["pws"] for row in rows] == [1.4, 0.5, 0.95]


def test_the_length_controlled_pws_stands_beside_the_plain_one() -> None:
    controlled = {"pws": 0.9, "benchmarks": {"vicuna": {"pws": 0.8}, "koala": {"pws": None}}}
    two = run({"vicuna": cell(6, 2, 2), "koala": cell(0, 5, 5)}, length_controlled=controlled)
    assert [row["pws_length_controlled"] for row in flat_rows(two)] == [0.8, None, 0.9]
    earlier = run(length_controlled={"pws": 0.9})  # without the benchmarks
    assert flat_rows(earlier)[0]["pws_length_controlled"] == 0.9
    assert [row["PWS, length-controlled"] for row in cells(two)[:3]] == ["0.800", "-", "0.900"]
    assert "PWS, length-controlled" not in results_table([run()]).header  # a verifier has none


def test_the_table_says_what_its_intervals_are() -> None:
    letters = {"vicuna": {"items": "x", "outcomes": "wwwwwwttll"}}
    one, other = (run(seed=seed, outcomes=letters, confidence=0.9) for seed in (0, 1))
    assert "PWS with 90 % intervals over items alone" in results_table([one]).title
    assert "means of 2 seeds; PWS with 90 % intervals over items and seeds" in results_table([one, other]).title
    wide, narrow = (over_seeds(flat_rows(each | {"confidence": c}) * 2)[0] for each, c in ((one, 0.95), (one, 0.5)))
    assert wide["pws_low"] < narrow["pws_low"] < narrow["pws_high"] < wide["pws_high"]
    assert "interval" not in results_table([run({"vicuna": cell(0, 0, 0, invalid=3)})]).title


def test_without_a_valid_pair_there_is_no_pws_not_even_a_pooled_one() -> None:
    rows = flat_rows(run({"vicuna": cell(6, 2, 2), "koala": cell(0, 0, 0, invalid=10)}))
    assert [row["pws"] for row in rows] == [1.4, None, 1.4]
    (row,) = flat_rows(run({"vicuna": cell(0, 0, 0, invalid=10)}))
    assert row["pws"] is row["pws_low"] is None
    (shown,) = cells(run({"vicuna": cell(0, 0, 0, invalid=10)}, accuracy={}, heldout_loss={}))
    assert "PWS" not in shown
    assert shown["win/tie/lose"] == "0/0/0 (10 invalid)"


def test_the_full_data_model_is_itself_and_has_no_alpha() -> None:
    (row,) = flat_rows(full())
    assert (row["pws"], row["alpha"], row["rows"], row["win"], row["benchmark"]) == (1.0, "all", 2000, None, "vicuna")
    shown = cells(full(), run({"vicuna": cell(3, 4, 3)}))
    assert [row["PWS"] for row in shown] == ["1 (itself)", "1.000 [0.750, 1.250]", "-"]
    assert [row["win/tie/lose"] for row in shown] == ["-", "3/4/3", "-"]


def test_a_run_that_did_not_finish_has_a_row_without_figures() -> None:
    stopped = {k: v for k, v in run().items() if k not in ("pooled", "benchmarks", "accuracy", "heldout_loss")}
    (row,) = flat_rows(stopped | {"status": "stopped", "pws": None})
    assert (row["status"], row["pws"], row["accuracy"], row["rows"]) == ("stopped", None, None, 200)
    assert row["benchmark"] == "vicuna"


def test_what_the_target_could_do_before_stands_once_beside_a_comparison() -> None:
    (row,) = untuned_rows([run(), run(scorer="random")])
    assert (row["scorer"], row["accuracy"], row["heldout_loss"]) == (UNTUNED, 0.0625, 3.0)
    assert (row["dataset"], row["target"]) == ("alpaca", "llama")
    assert row["pws"] is row["alpha"] is row["rows"] is row["benchmark"] is None
    nothing = run(accuracy={"model": 0.5}, heldout_loss={"model": 1.5, "untuned": None})
    assert untuned_rows([nothing]) == []
    assert [row["accuracy"] for row in untuned_rows([nothing, run()])] == [0.0625]
    assert [row["heldout_loss"] for row in untuned_rows([run(accuracy={}, heldout_loss={"untuned": 3.0})])] == [3.0]
    assert len(untuned_rows([run(), run(target="other"), run(dataset="other")])) == 3


# ------------------------------------------------------------------------------------------- seeds


def test_runs_that_differ_by_a_seed_share_a_line_with_their_mean() -> None:
    one, other = run(), run({"vicuna": cell(2, 6, 2, invalid=1)}, seed=1, accuracy={"model": 0.25})
    (row,) = over_seeds([*flat_rows(one), *flat_rows(other)])
    assert row["runs"] == 2
    assert row["pws"] == pytest.approx(1.2)
    assert row["pws_low"] is row["pws_high"] is None  # the runs do not have the outcomes of their items
    assert [row[name] for name in ("win", "tie", "lose", "invalid")] == [8, 8, 4, 1]
    assert (row["accuracy"], row["rows"], row["heldout_loss"]) == (0.375, 200, 1.5)
    (shown, untuned) = cells(one, other)
    assert shown["PWS"] == "1.200"
    assert untuned["scorer"] == UNTUNED


def test_runs_that_differ_by_a_setting_keep_a_line_each() -> None:
    changes = {"alpha": 0.2, "scorer": "random", "members": 3, "snapshots": [1, 3], "target": "x", "dataset": "y"}
    changed = [run(**{name: value}) for name, value in changes.items()]
    rows = over_seeds(flat_rows(run()) + [row for one in changed for row in flat_rows(one)])
    assert [row["runs"] for row in rows] == [1] * 7


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    lacking = run({"vicuna": cell(0, 0, 0, invalid=10)}, seed=1, accuracy={})
    (row,) = over_seeds([*flat_rows(run()), *flat_rows(lacking)])
    assert row["pws"] is row["accuracy"] is None
    assert row["invalid"] == 10


def test_the_model_tuned_on_all_rows_is_shown_once_in_a_sweep_over_alpha() -> None:
    def full(alpha: float, seed: int, **changes: Any) -> dict[str, Any]:
        return run(seed=seed) | {"scorer": "full", "variant": f"v{alpha}", "alpha": alpha, **changes}

    # the second seed failed at the first alpha, and the sweep was interrupted before it came to a third seed there
    runs = [full(0.05, 0), full(0.05, 1, status="failed", accuracy={}), *(full(0.1, seed) for seed in range(3))]
    another = full(0.1, 0, target="another")
    rows = over_seeds([row for one in (*runs, another) for row in flat_rows(one)])
    shown = [(row["alpha"], row["target"], row["runs"]) for row in rows]
    assert shown == [("all", runs[0]["target"], 3), ("all", "another", 1)]
    assert rows[0]["accuracy"] is not None  # the failed run gave way to the finished one


def test_runs_of_one_seed_that_differ_elsewhere_are_not_averaged() -> None:
    shared = ["alpha=0.1", "judge.confidence=0.9"]
    one = run(overrides=[*shared, "seed=0"])
    other = run({"vicuna": cell(1, 1, 8)}, overrides=[*shared, "proxy.collect=during_training"], variant="b")
    assert [row["runs"] for row in over_seeds([*flat_rows(one), *flat_rows(other)])] == [1, 1]
    shown = [row for row in cells(one, other) if row["scorer"] != UNTUNED]
    assert [row["settings"] for row in shown] == ["-", "proxy.collect=during_training"]


# ------------------------------------------------------------------------------------------- table


def test_the_table_shows_every_run_and_leaves_out_empty_columns() -> None:
    runs = [run(), full(), run(scorer="random")]
    text = text_of(results_table(runs))
    title = f"{TITLE}, benchmark vicuna; PWS with 95 % intervals over items alone"
    assert text.splitlines()[0].rstrip() == title
    shown = cells(*runs)
    assert [row["scorer"] for row in shown] == ["gsnr", "full", "random", UNTUNED]
    assert [row["alpha"] for row in shown] == ["0.1", "all", "0.1", "-"]
    assert shown[0] == {
        "scorer": "gsnr",
        "alpha": "0.1",
        "rows": "200",
        "PWS": "1.400 [1.150, 1.650]",
        "win/tie/lose": "6/2/2",
        "accuracy": "0.500",
        "held-out": "1.500",
        "spoilt": "0.12",
        "families": "12.3",
    }
    (bare,) = cells(run(selection={"rows": 5}, accuracy={}, heldout_loss={}))
    assert set(bare) == {"scorer", "alpha", "rows", "PWS", "win/tie/lose"}


def test_a_setting_that_varies_has_a_column() -> None:
    shown = cells(run({"vicuna": cell(6, 2, 2), "koala": cell(1, 1, 1)}), run(members=3))
    assert [row["benchmark"] for row in shown] == ["vicuna", "koala", "pooled", "vicuna", "-"]
    assert [row["members"] for row in shown] == ["5", "5", "5", "3", "-"]
    assert "target" not in shown[0]


def test_the_csv_holds_every_row_of_every_run_unaveraged(tmp_path: Path) -> None:
    runs = [run({"vicuna": cell(6, 2, 2), "koala": cell(0, 0, 0, 1)}), run(seed=1), full()]
    write_records(tmp_path / "results.csv", results_table(runs).records)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    runs = with_settings(runs)
    expected = [row for one in runs for row in flat_rows(one)] + untuned_rows(runs)
    assert rows == [{k: "" if v is None else str(v) for k, v in row.items() if k != "outcomes"} for row in expected]
    assert len(rows) == 3 + 1 + 1 + 2  # seeds 0 and 1 have an untuned row each
    assert [row["pws"] for row in rows[:3]] == ["1.4", "", "1.4"]


# ----------------------------------------------------------------------------------------- remarks


def test_a_run_without_surprises_has_no_remarks() -> None:
    assert remarks(run(data={"rejected": 0}, scores={"rows": 9, "statuses": {"scored": 9}})) == []
    assert remarks({"status": "stopped"}) == []
    assert remarks(run(selection={"shortfall": 0}, judge="local", status="stopped")) == []  # unfinished judgments


@pytest.mark.parametrize(("scored", "why"), [(7, "no more rows have a score"), (8, "the selector stopped early")])
def test_a_shortfall_is_laid_to_the_scores_or_to_the_selector(scored: int, why: str) -> None:
    lines = remarks(run(scores={"statuses": {"scored": scored}}, selection={"shortfall": 3, "rows": 7}))
    assert lines == [f"the selection is 3 rows short of its budget: {why}"]


def test_remarks_by_hand() -> None:
    selection = {"shortfall": 1500}
    lines = remarks(
        run(
            data={"rejected": 1234},
            scores={"reasons": {"one token": 7, "IFD is at least 1": 2000}},
            selection=selection,
            judge="local",
        )
    )
    assert [line.split(" ", 1)[0] for line in lines[:3]] == ["1,234", "7", "2,000"]
    assert lines[1].endswith(": one token")
    assert "1,500 rows short" in lines[3]
    assert "checks that the pipeline runs" in lines[4]
    assert len(lines) == 5


@pytest.mark.parametrize(("scorer", "remarked"), [("gsnr", True), ("superfilter", True), ("random", False)])
def test_scores_of_random_weights_are_called_plumbing(scorer: str, remarked: bool) -> None:
    lines = remarks(run(proxy="tiny_bytes", scorer=scorer, scores={"rows": 9}, status="stopped"))
    assert any("checks that the pipeline runs" in line for line in lines) is remarked
    assert remarks(run(proxy="tiny_bytes", scorer=scorer, status="failed")) == []  # before there was a score


@pytest.mark.parametrize(
    ("judge", "word"), [("local", "checks that the pipeline runs"), ("verifier", "upper bound"), ("openai", None)]
)
def test_what_a_raters_scores_are_worth_is_said(judge: str, word: str | None) -> None:
    lines = remarks(run(scorer="llm_rating", judge=judge, scores={"rows": 9}, status="stopped"))
    assert len(lines) == (word is not None) and (word is None or word in lines[0])
    assert remarks(run(scorer="gsnr", judge=judge, scores={"rows": 9}, status="stopped")) == []


def test_a_dry_run_is_remarked() -> None:
    (line,) = remarks(run(dry_run="5 requests to send", status="stopped", judge="openai"))
    assert "nothing was sent" in line


# ------------------------------------------------------------------------------------- composition


def test_the_composition_of_a_selection_by_hand() -> None:
    labels = Labels(
        quality=["clean", "wrong_answer", "clean", "truncated", "exact_duplicate", "clean", "contradictory", "clean"],
        family=["add", "add", "sort", "sort", "copy", "copy", "max", "max"],
    )
    parts = composition(labels, [0, 1, 3, 4])
    assert parts["labels"] == {
        "clean": 0.25,
        "contradictory": 0.0,
        "exact_duplicate": 0.25,
        "truncated": 0.25,
        "wrong_answer": 0.25,
    }
    assert parts["spoilt_share"] == 0.5  # a duplicate is not spoilt
    assert parts["spoilt_share_pool"] == 3 / 8
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))  # add twice, sort, copy
    assert parts["families"] == pytest.approx(math.exp(entropy))
    assert parts["families_pool"] == pytest.approx(4)


# ---------------------------------------------------------------------------------------- run.json


def untracked(folder: Path) -> Tracker:
    return Tracker(TrackerConfig(name="none"), folder, None, {})


def refuse_constant(text: str) -> None:
    raise AssertionError(f"run.json holds {text}, which is no JSON")


def test_run_json_is_plain_json(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", say=lambda line: None)
    store.obtain("load", "x", {}, [], lambda folder: {"rows": 1, "optimizer_steps": 4}, version=1)
    record = RunRecord(tmp_path, untracked(tmp_path), store, {"scorer": "gsnr", "alpha": 0.1})
    record.values["accuracy"] = {"model": None}
    record.finish("stopped", "not an error")
    written = json.loads((tmp_path / RUN_FILE).read_text(), parse_constant=refuse_constant)
    assert (written["status"], written["scorer"], written["pws"]) == ("stopped", "gsnr", None)
    (stage,) = written["stages"]
    assert (stage["name"], stage["reused"], stage["optimizer_steps"]) == ("load", False, 4)
    assert (written["work"]["made"], written["work"]["optimizer_steps"]) == (1, 4)
    assert "error" not in written
    assert written["memory"]["process_peak_resident_gb"] > 0.01
    record.is_reference()
    record.finish("failed", "it broke")
    written = json.loads((tmp_path / RUN_FILE).read_text())
    assert (written["pws"], written["pws_by_definition"], written["error"]) == (1.0, True, "it broke")
    record.finish("interrupted", "")
    assert json.loads((tmp_path / RUN_FILE).read_text())["error"] == "interrupted"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_never_written(value: float, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, untracked(tmp_path), Store(tmp_path), {})
    record.values["heldout_loss"] = {"model": value}
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.finish("finished")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- terminal


def test_a_sweeps_table_holds_the_finished_runs_in_order_and_names_the_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    failed = {"status": "failed", "overrides": ["data.path=a b.json"], "stages": [], "pws": None, "error": "no file"}
    jobs = {"0-gsnr-0.1": run(), "1-x": failed, "2-random-0.1": run(scorer="random"), "10-full-0.1": full()}
    jobs["3-late"] = run(scorer="late_loss", status="stopped")
    for name, content in jobs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN_FILE).write_text(json.dumps(content))
    assert sweep_finished(tmp_path) is False
    out = capsys.readouterr().out
    assert "failed: 1-x ('data.path=a b.json'): no file" in out
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as stream:
        scorers = [row["scorer"] for row in csv.DictReader(stream)]
    assert scorers == ["gsnr", "random", "full", UNTUNED]
    (tmp_path / "1-x" / RUN_FILE).unlink()
    assert sweep_finished(tmp_path) is True


def test_a_sweep_without_a_finished_run_has_no_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "0-x").mkdir()
    (tmp_path / "0-x" / RUN_FILE).write_text(json.dumps(run(status="stopped")))
    assert sweep_finished(tmp_path) is True
    assert not (tmp_path / "results.csv").exists()
    assert "PWS" not in capsys.readouterr().out


WORK = {"made": 7, "reused": 1, "optimizer_steps": 1200, "forward_tokens": 34567, "saved_steps": 60, "saved_tokens": 9}
MEMORY = {"process_peak_resident_gb": 1.26, "process_peak_cuda_gb": 2.0}
DIAGNOSTICS = {
    "norm_spread": {"verdict": "ok", "values": {}, "message": "they differ"},
    "drop_sign": {"verdict": "warning", "values": {}, "message": "the [norm] rose; check " + "x" * 300},
    "loss_from_start": {"verdict": "unknown", "values": {}, "message": "too few"},
    "selection_drop_sign": {"verdict": "warning", "values": {}, "message": "it rose there too"},
}


def whole_run(**changes: Any) -> dict[str, Any]:
    """Return a finished run with everything that a summary shows."""
    files = {"rejected rows": "store/rejected.jsonl", "selection": "there/selection.jsonl", "adapter": "store/adapter"}
    values = {"files": files, "data": {"rows": 2000, "rejected": 3}, "seconds": 754.0, "work": WORK, "memory": MEMORY}
    selection = {"rows": 200, "spoilt_share": 0.125, "spoilt_share_pool": 0.5, "families": 12.34, "families_pool": 13.0}
    return run(**values, selection=selection, diagnostics=DIAGNOSTICS) | changes


def shown(content: dict[str, Any], folder: Path, *, terminal: bool, width: int, report: Path | None = None) -> str:
    """Return what a run prints at its end, on a terminal or in a log."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, no_color=True, highlight=False)
    (folder / RUN_FILE).write_text(json.dumps(content))
    RunView(display=Display(console)).finished(folder, report)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) if terminal else stream.getvalue()


def test_the_summary_of_a_run_by_hand() -> None:
    assert list(
        summary(whole_run(benchmarks={"vicuna": cell(6, 2, 2), "koala": cell(1, 0, 1)}, pooled=cell(7, 2, 3)))
    ) == [
        ("selected", "200 of 2,000 rows by gsnr, 12% of them spoilt (all rows 50%), 12.3 families (all rows 13.0)"),
        ("PWS", "1.333 [1.083, 1.583] against the model tuned on all rows, win/tie/lose 7/2/3"),
        ("", "1.000 [0.750, 1.250] koala, win/tie/lose 1/0/1"),
        ("", "1.400 [1.150, 1.650] vicuna, win/tie/lose 6/2/2"),
        ("accuracy", "0.500 (all rows 0.750, no finetuning 0.062)"),
        ("held-out", "1.500 nats a token (all rows 1.250, no finetuning 3.000)"),
        (
            "work",
            "13 min, 7 units made with 1,200 steps and 34,567 tokens, 1 unit reused that had taken 60 steps and 9 "
            "tokens",
        ),
        ("memory", "at most 1.3 GB resident, 2.0 GB on the GPU"),
        ("2 warnings", "the [norm] rose; check " + "x" * 214 + "... [drop_sign]"),
        ("", "and selection_drop_sign"),
        ("note", "3 rows of the data were rejected; the reasons are in rejected.jsonl"),
    ]


def test_a_summary_holds_nothing_that_the_run_has_not() -> None:
    assert list(summary({"status": "stopped", "scorer": "gsnr"})) == []
    assert list(summary(full() | {"pws_by_definition": True}))[:2] == [
        ("selected", "2,000 rows"),
        ("PWS", "1 by definition: this is the model tuned on all rows"),
    ]
    (judged,) = [text for name, text in summary(run({"vicuna": cell(0, 0, 0, invalid=3)})) if name == "PWS"]
    assert judged == "no valid pair against the model tuned on all rows, win/tie/lose 0/0/0 (3 invalid)"


def test_a_sweeps_run_is_one_line() -> None:
    assert one_line(whole_run()) == (
        "PWS 1.400 [1.150, 1.650], 200 of 2,000 rows by gsnr, 7 units made in 13 min, 1 reused, "
        "2 warnings (drop_sign, selection_drop_sign)"
    )
    assert one_line({"status": "stopped", "selection": {"rows": 3}, "scorer": "random"}) == "stopped, 3 rows by random"


def test_warnings_and_remarks_of_several_runs() -> None:
    assert list(warnings_of(DIAGNOSTICS)) == ["drop_sign", "selection_drop_sign"]
    assert warnings_of(None) == {}
    lines = remarks_of_all([run(data={"rejected": 1}), run(data={"rejected": 2}), run(data={"rejected": 1})])
    assert [line[-8:] for line in lines] == ["(2 runs)", "ed.jsonl"]


@pytest.mark.parametrize("width", [80, 100])
def test_a_run_ends_in_no_more_than_a_screen(width: int, tmp_path: Path) -> None:
    folder = tmp_path / ("a folder with a name that is longer than the screen is wide" * 2)
    folder.mkdir()
    text = shown(whole_run(), folder, terminal=True, width=width, report=Path("there/report.html"))
    lines = text.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines if ": " not in line[:15])  # paths are never broken
    assert [line.split(": ")[0] for line in lines[-5:]] == ["report", "run", "selection", "rejected rows", "adapter"]
    assert f"run: {folder / RUN_FILE}" in lines
    wrapped = lines.index(next(line for line in lines if line.startswith("selected")))
    assert lines[wrapped + 1].startswith(" " * 12)  # a figure stays beside its name


def test_in_a_log_the_summary_has_no_control_characters_and_unbroken_lines(tmp_path: Path) -> None:
    text = shown(whole_run(), tmp_path, terminal=False, width=80)
    assert all(character.isprintable() for character in text if character != "\n")
    assert "12.3 families (all rows 13.0)\n" in text
    assert "report:" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def view(number: int | None = None, **options: Any) -> tuple[RunView, io.StringIO]:
    stream = io.StringIO()
    return RunView(number, Display(Console(file=stream, width=160)), **options), stream


def test_the_heading_of_a_sweeps_run_shows_its_overrides_as_they_are() -> None:
    for total, of in ((None, "of the sweep"), (1200, "of 1,200")):
        run_view, stream = view(1, total=total)
        run_view.starting(["target.lora.targets=[c_attn]"])
        assert stream.getvalue() == f"run 1 {of}: target.lora.targets=[c_attn]\n"


def test_a_sweep_tells_only_of_units_that_took_long() -> None:
    units = [
        StageRecord("score", "store/score/gsnr-1", "1", reused, s, 0, 0, 0, 0)
        for reused, s in ((False, 9.9), (False, 10.0), (True, 99.0))
    ]
    for number, expected in ((None, 2), (3, 1)):
        run_view, stream = view(number)
        for unit in units:
            run_view.stage_done(unit)
        assert stream.getvalue().count("gsnr-1") == expected


def test_a_table_that_is_too_wide_loses_whole_columns_and_says_which() -> None:
    console = Console(file=io.StringIO(), width=80)
    table, left_out = results_table([run()]).fitted(console)
    assert left_out == ["held-out", "spoilt", "families"]
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "1.400 [1.150, 1.650]" in text
    assert results_table([run()]).fitted(Console(file=io.StringIO(), width=132))[1] == []


def test_a_sweep_ends_with_its_warnings_and_notes_once_and_the_report_first(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("0-a", "1-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN_FILE).write_text(json.dumps(whole_run()))
    assert sweep_finished(tmp_path) is True
    lines = capsys.readouterr().out.splitlines()
    assert "warnings of the runs: drop_sign in 2 of 2, selection_drop_sign in 2 of 2" in lines
    assert sum("rose; check" in line for line in lines) == 1
    assert "note: 3 rows of the data were rejected; the reasons are in rejected.jsonl (2 runs)" in lines
    assert lines[-2:] == [f"table: {tmp_path / 'results.csv'}", f"runs: {tmp_path}"]


def test_the_table_shows_settings_as_they_are() -> None:
    other = run(overrides=["target.lora.targets=[c_attn]"], variant="b")
    assert "target.lora.targets=[c_attn]" in text_of(results_table([run(), other]), 200)
