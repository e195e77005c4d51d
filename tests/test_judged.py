"""The sample of judged answers on the report page."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from browsing import NEEDS_CHROMIUM, Watched

from gradsift.artifacts import Artifact, Store
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import OUTPUTS_FILE, model_outputs, write_model_outputs
from gradsift.evaluation.judgments import ORDERS, Judgment
from gradsift.report.judged import CUT, judged_pairs
from gradsift.report.material import BROKEN, Material, Run, read
from gradsift.report.page import render
from gradsift.report.paper_tables import TABLES

HOSTILE = "</div><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
OUTCOMES = "w" * 40 + "l" * 4 + "t" * 2 + "i"
SCORES = {"w": (8, 7), "l": (3, 9), "t": (5, 5), "i": (None, None)}
ITEMS = [Item("set", str(n), f"question {n}", "", None) for n in range(len(OUTCOMES))]


def answers(store: Store, who: str) -> Artifact:
    def make(folder: Path) -> dict[str, Any]:
        texts = [f"{who} {n}" for n in range(len(ITEMS))]
        texts[40] = HOSTILE + "\ud800" + "x" * 10_000
        write_model_outputs(folder / OUTPUTS_FILE, model_outputs(ITEMS, texts, who))
        return {"rows": len(ITEMS)}

    return store.obtain("generate", who, {"of": who}, [], make, version=1)


def judgments() -> list[Judgment]:
    made = []
    for item, letter in zip(ITEMS, OUTCOMES, strict=True):
        for order in ORDERS:
            ours, theirs = SCORES[letter]
            valid, reason = ours is not None, None if ours is not None else "no two scores"
            text = f"{HOSTILE} {item.item_id} {order}"
            made.append(Judgment("set", item.item_id, order, "h", "m", text, ours, theirs, valid, reason))
    return made


@pytest.fixture
def judged(tmp_path: Path) -> Material:
    """Two runs of one method and one run of another method, all with the same judgments."""
    store = Store(tmp_path / "store", say=lambda text: None)
    parents = [answers(store, "ours"), answers(store, "theirs")]

    def make(folder: Path) -> dict[str, Any]:
        lines = [json.dumps(dataclasses.asdict(each)) for each in judgments()]
        (folder / "judgments.jsonl").write_text("\n".join(lines) + "\n")
        return {"rows": len(lines), "combine": "signs"}

    store.obtain("judge", "m", {}, parents, make, version=1)
    stages = store.records_as_dicts()
    runs = []
    for number, scorer in enumerate(("gsnr", "gsnr", "random")):
        record = {"status": "finished", "scorer": scorer, "alpha": 0.1, "seed": number, "stages": stages, "pws": 1.2}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "run.json").write_text(json.dumps({**record, "overrides": []}))
        runs.append(Run(tmp_path / str(number), record, {}, scorer, []))
    return Material(tmp_path, runs, True)


def test_methods_and_outcomes_are_sampled_equally_and_texts_are_cut(judged: Material) -> None:
    pairs, reasons = judged_pairs(judged, 24)
    assert reasons == []
    counts = Counter((pair.method, pair.outcome) for pair in pairs)
    one = {"win": 5, "lose": 4, "tie": 2, "invalid": 1}
    assert counts == {(f"{method} at 10 %", kind): n for method in ("gsnr", "random") for kind, n in one.items()}
    assert [pair.outcome for pair in pairs[:4]] == ["win", "lose", "tie", "invalid"]
    wins = [pair.question for pair in pairs[:12] if pair.outcome == "win"]
    assert wins[0] == "question 0" and int(wins[-1].split()[1]) > 20  # spread over the items
    lost = next(pair for pair in pairs if pair.question == "question 40")
    assert lost.model.startswith(HOSTILE + "\ufffd") and lost.model.endswith(" more characters)")
    assert len(lost.model) < CUT + 40
    first, second = pairs[0].words
    assert (first.order, first.scores, first.text) == ("model first", "8 : 7", f"{HOSTILE} 0 forward")
    assert second.order == "model second" and second.text.endswith("reverse")
    invalid = next(pair for pair in pairs if pair.outcome == "invalid")
    assert invalid.words[0].scores == "invalid" and invalid.words[0].text.startswith("no two scores: ")
    assert len(judged_pairs(judged, 120)[0]) == 2 * len(ITEMS)


def without(run: Run, stage: str) -> Run:
    """Return the run as if its artifacts of a stage had never been recorded."""
    stages = [each for each in run.record["stages"] if each["name"] != stage]
    return dataclasses.replace(run, record={**run.record, "stages": stages})


def test_without_judgments_or_answers_it_says_why(judged: Material) -> None:
    for stage, words in (("judge", "no run has judgments"), ("generate", "0: the judged answers are not in the store")):
        pairs, (reason,) = judged_pairs(Material(judged.folder, [without(judged.runs[0], stage)], True))
        assert pairs == [] and reason.startswith(words)


def test_a_run_whose_answers_are_lost_hides_no_other(judged: Material) -> None:
    first, second, random = judged.runs
    pairs, (reason,) = judged_pairs(Material(judged.folder, [without(first, "generate"), random], True), 24)
    assert reason == "0: the judged answers are not in the store any more"
    assert [pair.method for pair in pairs] == ["random at 10 %"] * 12
    pairs, (reason,) = judged_pairs(Material(judged.folder, [without(first, "generate"), second], True), 24)
    assert reason.startswith("0: ") and {pair.method for pair in pairs} == {"gsnr at 10 %"}  # another seed stands in


def test_a_broken_file_of_judgments_hides_no_other_run_and_is_named(judged: Material, tmp_path: Path) -> None:
    store = Store(tmp_path / "other", say=lambda text: None)
    store.records.clear()
    parents = [answers(store, "ours"), answers(store, "theirs")]

    def make(folder: Path) -> dict[str, Any]:
        (folder / "judgments.jsonl").write_text("{}\n")
        return {"rows": 1, "combine": "signs"}

    store.obtain("judge", "m", {}, parents, make, version=1)
    first, _, random = judged.runs
    broken = dataclasses.replace(first, record={**first.record, "stages": store.records_as_dicts()})
    pairs, (reason,) = judged_pairs(Material(judged.folder, [broken, random], True))
    assert reason.startswith(BROKEN) and "line 1 is not a judgment" in reason
    assert {pair.method for pair in pairs} == {"random at 10 %"}


@NEEDS_CHROMIUM
def test_the_page_shows_them_as_text_and_filters_them(judged: Material, browser: Any, tmp_path: Path) -> None:
    tables = [(name, None, "none") for name in TABLES]
    values = {"figures": [], "tables": tables, "work_file": None, "pools": []}
    page_file = tmp_path / "report.html"
    values["judged"], values["no_pairs"] = judged_pairs(judged, 24)[0], ["a run: lost <b>answers</b>"]
    page_file.write_text(render(read(judged.folder), values), encoding="utf-8")
    watched = Watched(browser, viewport={"width": 390, "height": 800})
    page = watched.page
    page.goto(page_file.as_uri())
    assert page.evaluate("window.stolen") is None and HOSTILE in page.inner_text("#pairs")
    assert page.inner_text("#pair-matches") == "24 of 24 pairs"
    assert "Not shown: a run: lost <b>answers</b>." in page.inner_text("#judge")
    page.select_option("#pair-outcome", "lose")
    assert page.inner_text("#pair-matches") == "8 of 24 pairs"
    page.select_option("#pair-method", "random at 10 %")
    page.fill("#pair-query", "QUESTION 40")
    assert page.inner_text("#pair-matches") == "1 of 24 pairs"
    assert page.locator(".pair:visible").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    watched.close_clean("file:", "data:")
