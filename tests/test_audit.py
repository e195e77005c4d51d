"""The noise audit: its figures against cases by hand and slow definitions, and full runs by the command line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMOKE
from rich.console import Console
from sklearn.metrics import roc_auc_score

from gradsift.config import CORRUPTIONS
from gradsift.data.load import Labels
from gradsift.errors import ConfigError
from gradsift.features.prompt_clusters import cluster
from gradsift.report.audit_tables import (
    FAILED,
    SweepAudit,
    audit_tables,
    jaccard,
    mean_of,
    sweep_audit,
    write_audit,
)
from gradsift.report.table import Table
from gradsift.scoring.scores import EXCLUDED, Scores
from gradsift.selection.audit import audit, auroc, kept_twice, spread_of_random

AUDIT = ("experiment=[smoke,audit]", "compute.threads=1")

# ------------------------------------------------------------------------------------------ figures


def by_pairs(clean: np.ndarray, other: np.ndarray) -> float:
    pairs = list(itertools.product(clean, other))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_auroc_by_hand() -> None:
    assert auroc(np.array([3.0, 2.0]), np.array([1.0, 0.0])) == 1.0
    assert auroc(np.array([0.0]), np.array([1.0, 2.0])) == 0.0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0])) == 0.5
    assert auroc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert auroc(np.array([-np.inf, 1.0]), np.array([-np.inf])) == 0.75
    assert auroc(np.array([]), np.array([1.0])) is None
    assert auroc(np.array([1.0]), np.array([])) is None


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_loop_over_pairs_and_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean, other = rng.integers(0, 12, 17).astype(float), rng.integers(-3, 9, 23).astype(float)  # with ties
    assert auroc(clean, other) == pytest.approx(by_pairs(clean, other), abs=1e-12)
    truth = [1] * len(clean) + [0] * len(other)
    assert auroc(clean, other) == pytest.approx(roc_auc_score(truth, [*clean, *other]), abs=1e-12)


@pytest.mark.parametrize(("rows", "spoilt", "chosen"), [(6, 2, 3), (7, 3, 1), (5, 5, 2), (4, 1, 4), (1, 1, 1)])
def test_the_spread_of_a_random_draw_is_that_over_all_draws(rows: int, spoilt: int, chosen: int) -> None:
    shares = [sum(row < spoilt for row in draw) / chosen for draw in itertools.combinations(range(rows), chosen)]
    assert spread_of_random(spoilt / rows, rows, chosen) == pytest.approx(statistics.pstdev(shares), abs=1e-12)


def test_copies_count_as_kept_twice_only_beside_their_own_original() -> None:
    origin = [None, None, None, 0, 1]
    assert kept_twice([0, 3], origin) == 1.0
    assert kept_twice([1, 3], origin) == 0.0
    assert kept_twice([0, 3, 4], origin) == 0.5
    assert kept_twice([0, 1], origin) is None
    assert kept_twice([0, 1], None) is None


def test_overlap_is_common_by_all() -> None:
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([1], [2]) == 0.0
    assert jaccard([2, 1], [1, 2]) == 1.0


def test_an_audit_by_hand() -> None:
    """Scores of eight rows: clean 5, 4, 1; spoilt 3, 2 and none; copies 5 (of row 0) and 0."""
    quality = ["clean", "clean", "clean", "truncated", "garbled", "exact_duplicate", "near_duplicate", "truncated"]
    labels = Labels(quality, None, None, [None] * 5 + [0, 1, None])
    scores = Scores(np.array([5.0, 4.0, 1.0, 3.0, 2.0, 5.0, 0.0, np.nan]))
    scores.mark(np.isnan(scores.score), EXCLUDED, "for the test")
    families = ["a", "a", "b", "b", "a", "a", "b", "b"]
    figures = audit(scores, labels, families, {0.5: np.array([0, 5, 1, 3]), 0.25: np.array([5, 0])})
    assert (figures["rows"], figures["spoilt"], figures["duplicates"]) == (8, 3 / 8, 2 / 8)
    assert figures["families_pool"] == pytest.approx(2)
    assert figures["auroc_spoilt"] == pytest.approx((2 + 2 + 3) / 9)  # 5 and 4 pass all, 1 only the one without a score
    assert figures["kinds"] == {
        "truncated": {"rows": 2, "auroc": pytest.approx(5 / 6)},
        "garbled": {"rows": 1, "auroc": pytest.approx(2 / 3)},
        "exact_duplicate": {"rows": 1, "auroc": pytest.approx(0.5 / 3)},
        "near_duplicate": {"rows": 1, "auroc": 1.0},
    }
    quarter, half = figures["selections"]
    assert (quarter["alpha"], quarter["rows"], quarter["spoilt"], quarter["kept_twice"]) == (0.25, 2, 0.0, 1.0)
    assert quarter["families"] == pytest.approx(1)
    assert (half["spoilt"], half["duplicates"], half["positions"]) == (0.25, 0.25, [0, 1, 3, 5])
    assert half["families"] == pytest.approx(3**-0.75 * 4)  # shares 3/4 and 1/4
    assert half["qualities"]["clean"] == 0.5
    assert figures["groups"] == {} == half["groups"]
    json.dumps(figures, allow_nan=False)


def test_delayed_rows_are_compared_with_clean_rows_of_the_other_families() -> None:
    quality = ["clean"] * 5 + ["wrong_answer"]
    labels = Labels(quality, ["chained", "chained", "named", "sort", "copy", "chained"])
    scores = Scores(np.array([4.0, 1.0, 5.0, 3.0, 2.0, 9.0]))
    figures = audit(scores, labels, labels.family or [], {0.5: np.array([5, 2, 0])})
    assert figures["groups"]["delayed"] == {"rows": 2, "share": 2 / 6, "auroc": 0.5}  # 4 beats both, 1 neither
    assert figures["groups"]["defining"] == {"rows": 1, "share": 1 / 6, "auroc": 1.0}
    assert figures["selections"][0]["groups"] == {"delayed": 1 / 3, "defining": 1 / 3}  # the spoilt one does not count


# ----------------------------------------------------------------------------------------- clusters


def test_clusters_part_what_shares_no_word_and_repeat_themselves() -> None:
    topics = ("red green blue paint {}", "boil the rice and soup {}", "sum two long numbers {}")
    texts = [topics[i % 3].format("abcdefgh"[i // 3 % 8]) for i in range(90)]
    labels = cluster(texts, 3)
    assert len({tuple(labels[i::3]) for i in range(3)}) == 3
    assert all(len(set(labels[i::3])) == 1 for i in range(3))
    assert (cluster(texts, 3) == labels).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a b", "a b", "c"], "audit.clusters=3, but only 2 prompts differ"), (["?", "!", "-"], "hold no words")],
)
def test_prompts_that_cannot_be_clustered_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(texts, 3)


# ------------------------------------------------------------------------------------------- tables


def test_means_of_audits_leave_out_what_one_of_them_has_not() -> None:
    one = {"name": "x", "spoilt": 0.2, "kinds": {"a": 1.0, "b": 0.5}, "cells": [{"twice": None}, {"twice": 1.0}]}
    two = {"name": "x", "spoilt": 0.4, "kinds": {"a": 0.0}, "cells": [{"twice": 0.5}, {"twice": 0.0}]}
    mean = mean_of([one, two])
    assert mean == {
        "name": "x",
        "spoilt": pytest.approx(0.3),
        "kinds": {"a": 0.5},
        "cells": [{"twice": None}, {"twice": 0.5}],
    }


def test_methods_are_told_apart_by_whatever_was_swept(tmp_path: Path) -> None:
    """One scorer with different ensembles gets a row for each, and their selections are compared."""
    swept = {
        "proxy.members=3": [0, 1, 2],
        "proxy.snapshots=[1,3]": [2, 3, 4],
        "proxy=gpt2": [5, 6, 7],
        "features.warmup.seed=1": [0, 1, 2],
    }
    jobs = []
    for number, (override, positions) in enumerate(swept.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        selections = [{"alpha": 0.1, "positions": positions}]
        (folder / "audit.json").write_text(json.dumps({"data": "d", "selections": selections}))
        overrides = ["experiment=x", "scorer=gsnr", override]
        jobs.append((folder / "run.json", {"status": "stopped", "scorer": "gsnr", "overrides": overrides, "audit": {}}))
    (dataset,) = sweep_audit(jobs).datasets
    names = ["gsnr M=3", "gsnr [1,3]", "gsnr proxy=gpt2", "gsnr features.warmup.seed=1"]
    assert list(dataset["methods"]) == names
    assert list(dataset["overlap"]["0.1"][names[0]].values()) == [1.0, 1 / 5, 0.0, 1.0]


def audited(folder: Path, number: int, overrides: list[str], **figures: Any) -> tuple[Path, dict[str, Any]]:
    """Write a job with an audit and return its record; without `spoilt`, a job that failed."""
    run = {"status": "stopped", "scorer": overrides[0].partition("=")[2], "overrides": overrides}
    if "spoilt" not in figures:
        return folder / "run.json", run | {"status": FAILED, "error": "it broke"}
    own = folder / str(number)
    own.mkdir()
    cells = [
        {"alpha": alpha, "spoilt": share, "spoilt_random_sd": 0.1, "families": 4.0, "kept_twice": None}
        | {"qualities": {}, "groups": {}, "positions": [number], "rows": figures.get("rows", 9)}
        for alpha, share in zip((0.05, 0.1), figures["spoilt"], strict=True)
    ]
    pool = {"rows": 90, "spoilt": figures.get("base", 0.3), "duplicates": 0.0, "families_pool": 6.0}
    whole = {"data": figures.get("data", "d"), "families": "labels", "auroc_spoilt": None, "kinds": {}, "groups": {}}
    (own / "audit.json").write_text(json.dumps(whole | pool | {"selections": cells}))
    return own / "run.json", run | {"audit": {}}


def column(audit: SweepAudit | None, name: str, table: int = 0) -> dict[str, str]:
    assert audit is not None
    shown = audit_tables(audit, brief=True)[table]
    return {row[0]: row[list(shown.header).index(name)] for row in shown.rows}


def test_the_verdict_is_what_lies_outside_of_chance(tmp_path: Path) -> None:
    shares = {"good": [0.09, 0.05], "bad": [0.51, 0.52], "mixed": [0.0, 0.51], "same": [0.11, 0.49], "late": [0.2, 0.0]}
    jobs = [audited(tmp_path, n, [f"scorer={name}"], spoilt=spoilt) for n, (name, spoilt) in enumerate(shares.items())]
    audit = sweep_audit(jobs)
    assert column(audit, "against chance") == {
        "(all rows)": "",
        "good": "cleaner",
        "bad": "dirtier",
        "mixed": "cleaner at 5 %; dirtier at 10 %",
        "same": "no different",
        "late": "cleaner at 10 %",
    }
    assert audit is not None
    assert audit_tables(audit, brief=True)[0].note == (
        "Cleaner than a random draw at every alpha: good (4.0) (families kept at 10 %, of 6.0). Dirtier than a "
        "random draw at some alpha: mixed, bad."
    )


def test_a_head_too_small_to_tell_anything_is_said_to_be(tmp_path: Path) -> None:
    audit = sweep_audit([audited(tmp_path, 0, ["scorer=spotless"], spoilt=[0.0, 0.0], base=0.2)])
    assert column(audit, "against chance")["spotless"] == "too few rows"
    assert audit is not None
    assert "At 5 %, 10 % too few rows are selected to tell" in audit_tables(audit, brief=True)[0].note
    assert "every alpha: none." in audit_tables(audit, brief=True)[0].note


def test_a_shortfall_is_told_beside_the_shares(tmp_path: Path) -> None:
    jobs = [audited(tmp_path, n, [f"scorer={n}"], spoilt=[0.3, 0.3], rows=rows) for n, rows in enumerate((9, 4))]
    audit = sweep_audit(jobs)
    assert audit is not None
    note = audit_tables(audit, brief=True)[0].note
    assert "Fewer rows than others selected: 1 (4 of 9 at 5 %), 1 (4 of 9 at 10 %)." in note


def test_no_header_is_cut_on_a_narrow_terminal() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=40)
    console.print(Table("t", ["method", "mismatched answer", "contradictory"], [["a" * 20, "1", "2"]]))
    assert "…" not in shown.getvalue()


@pytest.mark.parametrize(("data", "verdict"), [("abcd", "cleaner"), ("aaaa", "no different")])
def test_means_over_other_corruption_vary_less_than_one_draw_and_those_over_one_do_not(
    data: str, verdict: str, tmp_path: Path
) -> None:
    jobs = [
        audited(tmp_path, n, ["scorer=x", f"seed={n}"], spoilt=[0.15, 0.15], data=name) for n, name in enumerate(data)
    ]
    assert column(sweep_audit(jobs), "against chance")["x"] == verdict


def test_each_value_of_a_data_option_has_its_own_tables(tmp_path: Path) -> None:
    jobs = []
    for rows, share in ((200, 0.05), (400, 0.25)):
        for scorer in ("a", "b"):
            overrides = [f"scorer={scorer}", f"data.limit={rows}", "data.seed=0", "data.path=x"]
            jobs.append(audited(tmp_path, len(jobs), overrides, spoilt=[share, share], data=str(rows)))
    jobs.append(audited(tmp_path, 9, ["scorer=c", "data.limit=400", "data.seed=0", "data.path=x"]))
    audit = sweep_audit(jobs)
    assert audit is not None
    first, second = (table for table in audit_tables(audit, brief=True) if "against chance" in table.header)
    assert first.title.endswith("; data.limit=200") and second.title.endswith("; data.limit=400")
    assert [row[:2] for row in first.rows] == [["(all rows)", "0.30"], ["a", "0.05"], ["b", "0.05"]]
    assert [row[:2] for row in second.rows] == [["(all rows)", "0.30"], ["a", "0.25"], ["b", "0.25"], ["c", FAILED]]


def test_a_method_that_failed_on_one_dataset_is_named_with_it_and_in_no_mean(tmp_path: Path) -> None:
    jobs = [
        audited(tmp_path, 0, ["scorer=a", "data.seed=0"], spoilt=[0.1, 0.1], data="0"),
        audited(tmp_path, 1, ["scorer=a", "data.seed=1"], spoilt=[0.2, 0.2], data="1"),
        audited(tmp_path, 2, ["scorer=b", "data.seed=0"], spoilt=[0.0, 0.0], data="0"),
        audited(tmp_path, 3, ["scorer=b", "data.seed=1"]),
        audited(tmp_path, 4, ["scorer=c", "data.seed=0"]),
        audited(tmp_path, 5, ["scorer=c", "data.seed=1"]),
    ]
    audit = sweep_audit(jobs)
    spoilt = column(audit, "spoilt at 5 %")
    assert spoilt == {"(all rows)": "0.30", "a": "0.15", "b": "failed on 1 of 2 datasets", "c": FAILED}
    assert audit is not None
    write_audit(tmp_path, audit)
    text = (tmp_path / "audit.md").read_text()
    assert "failed: b data.seed=1: it broke" in text
    assert "failed: c data.seed=0: it broke" in text and "failed: c data.seed=1: it broke" in text
    rows = [row for row in csv.DictReader((tmp_path / "audit.csv").open()) if row["status"] == FAILED]
    assert [(row["method"], row["seeds"]) for row in rows] == [
        ("b", "data.seed=1"),
        ("c", "data.seed=0"),
        ("c", "data.seed=1"),
    ]


def test_a_run_whose_audit_is_lost_is_named_and_hides_no_other(tmp_path: Path) -> None:
    jobs = [audited(tmp_path, number, [f"scorer={name}"], spoilt=[0.1, 0.1]) for number, name in enumerate("ab")]
    (jobs[1][0].parent / "audit.json").unlink()
    audit = sweep_audit(jobs)
    assert audit is not None and column(audit, "spoilt at 5 %")["a"] == "0.10"
    (lost,) = audit.failed
    assert (lost["method"], lost["error"]) == ("b", "audit.json is not in the run's folder any more")


def test_a_sweep_without_an_audit_has_none(tmp_path: Path) -> None:
    assert sweep_audit([(tmp_path / "run.json", {"status": "finished", "overrides": []})]) is None
    assert audit_tables(SweepAudit([], []), brief=True) == []


def test_one_scorer_with_two_proxies_is_two_methods(tmp_path: Path) -> None:
    jobs = []
    for number, (proxy, spoilt) in enumerate((("a", 0.1), ("b", 0.3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        selection = {"alpha": 0.1, "spoilt": spoilt, "positions": [number]}
        (folder / "audit.json").write_text(json.dumps({"data": "d", "selections": [selection]}), encoding="utf-8")
        run = {"status": "stopped", "scorer": "gsnr", "audit": {}, "overrides": ["alpha=0.1", f"proxy={proxy}"]}
        jobs.append((folder / "run.json", run))
    compared = sweep_audit(jobs)
    assert compared is not None
    (dataset,) = compared.datasets
    spoilt_shares = {name: figures["selections"][0]["spoilt"] for name, figures in dataset["methods"].items()}
    assert spoilt_shares == {"gsnr proxy=a": 0.1, "gsnr proxy=b": 0.3}


# ------------------------------------------------------------------------------------- command line


def sweep_of(gradsift: Any) -> Path:
    (folder,) = gradsift.folder.glob("multirun/*/*")
    return folder


def test_an_audit_of_the_world_compares_every_scorer_without_asking_for_a_sweep(gradsift, capsys) -> None:
    sweep = (*AUDIT, "data.delayed=0.2", "data.corruption.seed=0,1")
    assert gradsift(*sweep, "scorer=random_clean,random") == 0
    out = capsys.readouterr().out
    assert "spoilt share" in out and "delayed credit" in out and "means of 2 datasets" in out
    folder = sweep_of(gradsift)
    content = json.loads((folder / "audit.json").read_text())
    assert [set(dataset["methods"]) for dataset in content["datasets"]] == [{"random_clean", "random"}] * 2
    assert content["datasets"][0]["data"] != content["datasets"][1]["data"]
    assert content["datasets"][0]["overlap"]["0.1"]["random"]["random"] == 1.0
    rows = list(csv.DictReader((folder / "audit.csv").open()))
    assert len(rows) == 2 * 2 * 3  # datasets, methods, alphas
    assert {row["status"] for row in rows} == {"ok"}
    text = (folder / "audit.md").read_text()
    assert text.count("\n| random |") == 3 + 3  # kept, kinds, delayed credit; an overlap at each alpha
    own = next(run for run in gradsift.runs() if run.get("scorer") == "random")
    assert own["data"]["corrupted"] == dict.fromkeys(CORRUPTIONS, 6)  # 0.3 of 120 rows, six kinds
    assert own["data"]["rows"] == 132
    assert [cell["rows"] for cell in own["audit"]["selections"]] == [6, 13, 19]
    assert "positions" not in own["audit"]["selections"][0]
    whole = json.loads(Path(own["files"]["audit"]).read_text())
    assert len(whole["selections"][0]["positions"]) == 6


def test_a_selection_from_corrupted_data_says_which_rows_are_not_the_users(gradsift) -> None:
    rows = [{"instruction": f"Say {n} times", "output": f"It is {n} times two"} for n in range(40)]
    file = gradsift.folder / "rows.json"
    file.write_text(json.dumps(rows))
    options = ("data=json", f"data.path={file}", "proxy=tiny_bytes", "proxy.members=2", "audit.clusters=5")
    assert gradsift("experiment=audit", *options, "scorer=random,superfilter", "alpha=1", "compute.threads=1") == 0
    (selection,) = gradsift.folder.glob("multirun/*/*/*random*/selection.jsonl")
    selected = [json.loads(line) for line in selection.read_text().splitlines()]
    assert len(selected) == 44
    marked = [row["gradsift"] for row in selected if "corruption" in row["gradsift"]]
    assert len(marked) == 12
    assert sorted(own["row_index"] for own in marked if own["corruption"].endswith("duplicate")) == [40, 41, 42, 43]
    for row in selected:  # the user's own columns, whatever was scored in their place
        own = row.pop("gradsift")
        assert row in rows and (own["row_index"] >= 40 or row == rows[own["row_index"]])
    methods = json.loads((sweep_of(gradsift) / "audit.json").read_text())["datasets"][0]["methods"]
    assert set(methods) == {"random", "superfilter"}
    assert methods["random"]["families"] == "clusters"
    assert methods["random"]["selections"][0]["families"] >= 1


def test_families_that_come_late_are_benchmarks_of_their_own(gradsift) -> None:
    delayed = ("data.delayed=0.2", "data.benchmark_items=40", "stop_after=generate")
    assert gradsift(*SMOKE, "scorer=random", *delayed) == 0
    (run,) = gradsift.runs()
    assert set(run["accuracy"]["benchmarks"]) == {"verifiable", "verifiable_named", "verifiable_chained"}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["data.limit=10"], "too few for 6 kinds"), (["audit.alphas=[0.001]"], "selects no example")],
)
def test_an_audit_of_too_few_rows_is_refused_before_any_training(gradsift, capsys, options, message) -> None:
    assert gradsift(*AUDIT, "scorer=late_loss", *options) == 2
    assert message in capsys.readouterr().err
    (run,) = gradsift.runs()
    assert run["status"] == FAILED
    assert {stage["name"] for stage in run["stages"]} <= {"load"}


def test_too_many_clusters_are_refused_before_any_training(gradsift, capsys) -> None:
    file = gradsift.folder / "rows.json"
    rows = [{"instruction": "Say it", "input": str(n % 4), "output": f"It is {n}"} for n in range(40)]
    file.write_text(json.dumps(rows))
    options = ("data=json", f"data.path={file}", "proxy=tiny_bytes", "scorer=late_loss", "audit.clusters=9")
    assert gradsift("experiment=audit", *options, "data.corruption.kinds=[garbled]") == 2
    assert "audit.clusters=9, but only 4 prompts differ" in capsys.readouterr().err
    assert {stage["name"] for stage in gradsift.runs()[0]["stages"]} == {"load"}
