"""Laws of the score stage: a scorer gets its inputs, mistakes are refused before work, no NaN is stored."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, FieldsConfig, GsnrConfig, RandomScorerConfig, TrackerConfig
from gradsift.data.examples import Example, write_examples
from gradsift.data.formats import parse_rows
from gradsift.data.load import EXAMPLES_FILE
from gradsift.diagnostics import Diagnostic, read_diagnostics
from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import Features, unit_rows
from gradsift.run_record import RunRecord
from gradsift.runtime import Display, Runtime
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.scoring.stage import SCORES_FILE, score, scores_of
from gradsift.selection.checks import COVERED_WITHIN, coverage
from gradsift.selection.choice import Choice
from gradsift.selection.stage import positions_of, select
from gradsift.selection.topk import topk
from gradsift.sources import Method, Source, method
from gradsift.tracking import Tracker

TOPK = Method("topk", "gradsift.selection.topk.topk", topk, (), {})
ROWS = [(10 + 3 * i, {"instruction": f"say {i}", "output": "x" * (i + 1)}) for i in range(6)]


def pool() -> list[Example]:
    return parse_rows(ROWS, "alpaca", FieldsConfig())[0]


# ------------------------------------------------------------------ scorers as a user may write them


def by_length(examples: Any, *, sign: int = 1) -> Scores:
    return Scores(np.array([sign * len(example.output) for example in examples], dtype=float))


def by_length_backwards(examples: Any, *, sign: int = 1) -> Scores:
    return by_length(examples, sign=-sign)


def bare_numbers(examples: Any) -> list[int]:
    return [len(example.output) for example in examples]


def no_numbers(count: int) -> list[str]:
    return ["high"] * count


def needs_a_constant(count: int, *, constant: float) -> Scores:
    return Scores(np.full(count, constant))


def asks_for_the_impossible(count: int, labels: Any) -> Scores:
    return Scores(np.zeros(count))


def with_a_hole(count: int, *, hole: str) -> Scores:
    value = float(hole)
    return Scores(np.array([0.0, value, 1.0, 2.0, value, 3.0]))


def one_too_few(count: int) -> Scores:
    return Scores(np.zeros(count - 1))


def of_all_statuses(count: int) -> Scores:
    scores = Scores(np.array([0.5, np.nan, 1.5, 0.1, np.inf, 0.2]), {"part": np.arange(6.0)})
    scores.mark(np.isnan(scores.score), UNDEFINED, "no token")
    scores.mark(scores.score > 1, EXCLUDED, "too large")
    return scores


def of_no_score(count: int) -> Scores:
    scores = Scores(np.full(count, np.nan))
    scores.mark(np.isnan(scores.score), UNDEFINED, "no token")
    return scores


NO_FUNCTION = 3.14


@pytest.fixture(autouse=True)
def users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this file's scorers importable as the module `my_scores`."""
    module = ModuleType("my_scores")
    module.__dict__.update({name: value for name, value in globals().items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "my_scores", module)


class Bench:
    """A store with loaded data; `asked` records which sources were read, in order."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store", say=lambda line: None)
        self.runtime = Runtime(self.store, ComputeConfig(), Display(Console(file=io.StringIO())), seed=0)
        self.loaded = self.artifact("load")
        self.parent = self.artifact("statistics")
        self.asked: list[str] = []

    def artifact(self, stage: str, **config: Any) -> Artifact:
        def make(folder: Path) -> dict[str, Any]:
            write_examples(folder / EXAMPLES_FILE, pool())
            return {"rows": 6}

        return self.store.obtain(stage, "x", config, [], make, version=1)

    def sources(self) -> dict[str, Source]:
        values = {"count": (6, []), "examples": (pool(), []), "statistics": ("the statistics", [self.parent])}

        def source(name: str, value: Any, artifacts: list[Artifact]) -> Source:
            return Source(lambda: artifacts, lambda: (self.asked.append(name), value)[1])

        return {name: source(name, *entry) for name, entry in values.items()}

    def __call__(self, function: str, **options: Any) -> Artifact:
        name = options.pop("name", "mine")
        return self.score({"_target_": f"my_scores.{function}", "name": name, **options})

    def score(self, config: Any) -> Artifact:
        sources = self.sources()
        return score(self.runtime, method("scorer", config, tuple(sources)), self.loaded, sources, lambda asked: [])

    def unfinished(self) -> bool:
        """Return whether there is no finished score artifact."""
        return not list(self.store.root.glob("score/*/manifest.json"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# -------------------------------------------------------------------------------------- the good way


def test_a_scorer_gets_what_it_asks_for_and_its_scores_stand_in_row_order(bench: Bench) -> None:
    artifact = bench("by_length", sign=-1)
    assert bench.asked == ["examples"]
    assert scores_of(artifact).score.tolist() == [-1, -2, -3, -4, -5, -6]
    table = pq.read_table(artifact.file(SCORES_FILE))
    assert table["example_id"].to_pylist() == [example.example_id for example in pool()]


def test_our_own_configs_are_taken_as_they_are(bench: Bench) -> None:
    config = RandomScorerConfig(_target_="gradsift.scoring.random.random", name="random", seed=4)
    artifact = bench.score(config)
    assert scores_of(artifact).score.tolist() == np.random.default_rng(4).random(6).tolist()


def test_every_status_is_counted_and_kept_with_its_reason(bench: Bench, tmp_path: Path) -> None:
    artifact = bench("of_all_statuses")
    assert artifact.info == {"rows": 6, "scored": 3, "undefined": 1, "excluded": 2}
    scores = scores_of(artifact)
    assert scores.status.tolist() == ["scored", "undefined", "excluded", "scored", "excluded", "scored"]
    assert scores.reason.tolist() == ["", "no token", "too large", "", "too large", ""]
    assert scores.parts["part"].tolist() == [0, 1, 2, 3, 4, 5]
    tracker = Tracker(TrackerConfig(name="none"), tmp_path, None, {})
    record = RunRecord(tmp_path, tracker, bench.store, {})
    record.scored(artifact)
    assert record.values["scores"] == {
        "rows": 6,
        "statuses": {"scored": 3, "undefined": 1, "excluded": 2},
        "reasons": {"no token": 1, "too large": 2},
    }


@pytest.mark.parametrize(("base", "positions"), [("accepted", [0, 5]), ("scored", [0])])
def test_only_what_is_scored_is_selected(base: str, positions: list[int], bench: Bench) -> None:
    scored = bench("of_all_statuses")  # 0.5, -, -, 0.1, -, 0.2
    made = select(bench.runtime, TOPK, scored, bench.loaded, {}, dict, 0.34, base, {})
    assert positions_of(made).tolist() == positions
    assert (made.info["budget"], made.info["shortfall"]) == (len(positions), 0)


def test_too_few_scores_for_the_budget_are_a_shortfall(bench: Bench) -> None:
    made = select(bench.runtime, TOPK, bench("of_all_statuses"), bench.loaded, {}, dict, 0.84, "accepted", {})
    assert {name: made.info[name] for name in ("budget", "rows", "shortfall")} == {
        "budget": 5,
        "rows": 3,
        "shortfall": 2,
    }


@pytest.mark.parametrize("base", ["accepted", "scored"])
def test_a_pool_without_any_score_is_refused(base: str, bench: Bench) -> None:
    with pytest.raises(GradsiftError, match="score"):
        select(bench.runtime, TOPK, bench("of_no_score"), bench.loaded, {}, dict, 0.5, base, {})


def test_scores_are_made_once_and_anew_for_other_constants_or_parents(bench: Bench) -> None:
    first, second = bench("by_length"), bench("by_length")
    assert first.path == second.path
    assert bench.asked == ["examples"]  # the second call read nothing
    assert bench("by_length", sign=-1).fingerprint != first.fingerprint
    bench.loaded = bench.artifact("load", other=True)
    assert bench("by_length").fingerprint != first.fingerprint


def test_options_of_a_source_count_for_the_scorers_that_ask_for_it(bench: Bench) -> None:
    def made(function: str, alpha: float) -> str:
        sources = bench.sources()
        sources["examples"] = Source(list, pool, {"alpha": alpha})
        scorer = method("scorer", {"_target_": f"my_scores.{function}", "name": "mine"}, tuple(sources))
        return score(bench.runtime, scorer, bench.loaded, sources, lambda asked: []).fingerprint

    assert made("by_length", 0.1) != made("by_length", 0.2)
    assert made("by_length", 0.1) == made("by_length", 0.1)
    assert made("of_all_statuses", 0.1) == made("of_all_statuses", 0.2)


def test_a_scorer_may_return_bare_numbers(bench: Bench) -> None:
    assert scores_of(bench("bare_numbers")).score.tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(GradsiftError, match="scorer=mine returned a list; a scorer returns Scores, or one number per"):
        bench("no_numbers")


def test_a_constant_of_a_function_in_memory_may_be_called_name() -> None:
    def scorer(examples: Any, *, name: str) -> None: ...

    config = {"_target_": "notebook.scorer", "name": "mine"}
    found = method("scorer", config, ("examples",), scorer, {"name": "x"})  # type: ignore[arg-type]
    assert (found.name, found.constants) == ("mine", {"name": "x"})


def test_another_function_of_the_same_name_never_meets_a_stale_result(bench: Bench) -> None:
    assert scores_of(bench("by_length")).score.tolist() == [1, 2, 3, 4, 5, 6]
    assert scores_of(bench("by_length_backwards")).score.tolist() == [-1, -2, -3, -4, -5, -6]


# ------------------------------------------------------------------------------------------ mistakes


def test_a_constant_that_the_scorer_does_not_have_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"scorer.eps is no constant of scorer=mine; it has sign"):
        bench("by_length", eps=0.1)
    with pytest.raises(ConfigError, match=r"scorer.sign is no constant of scorer=mine; it has none"):
        bench("of_all_statuses", sign=1)
    gsnr = GsnrConfig(_target_="gradsift.scoring.full.full", name="full")
    with pytest.raises(ConfigError, match=r"scorer.eps is no constant of scorer=full"):
        bench.score(gsnr)
    assert bench.asked == []
    assert bench.unfinished()


def test_an_input_that_nobody_has_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"scorer=mine asks for 'labels'; .* ask for count, examples, statistics"):
        bench("asks_for_the_impossible")
    assert bench.asked == []


@pytest.mark.parametrize(
    "target", ["nowhere", "no.such.module", "my_scores.nothing", "gradsift.scoring.gsnr.gsnrr", "", "."]
)
def test_a_target_that_cannot_be_imported_is_refused(target: str, bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported .*; give package.module.function"):
        bench.score({"_target_": target, "name": "mine"})


@pytest.mark.parametrize(
    "config", [{"name": "mine"}, {"_target_": "my_scores.by_length"}, {"_target_": 1, "name": "x"}]
)
def test_a_scorer_names_its_function_and_itself(config: Mapping[str, Any], bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.(_target_|name) is missing"):
        bench.score(config)


def test_a_target_that_is_no_function_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError):
        bench("NO_FUNCTION")


def test_a_target_in_a_broken_module_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_scores.py").write_text("def mine(count:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError):
        bench.score({"_target_": "broken_scores.mine", "name": "mine"})


def test_a_constant_that_is_missing_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="constant"):
        bench("needs_a_constant")


@pytest.mark.parametrize("hole", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_stops_the_stage_and_names_the_rows_of_the_source(hole: str, bench: Bench) -> None:
    with pytest.raises(GradsiftError, match="2 scores are NaN or infinite, the first at row 13, 22"):
        bench("with_a_hole", hole=hole)
    assert bench.unfinished()


def test_a_score_too_few_or_too_many_is_refused(bench: Bench) -> None:
    with pytest.raises(GradsiftError, match="scorer=mine gave 5 scores for 6 examples"):
        bench("one_too_few")


def test_a_constant_that_is_infinite_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError):
        bench.score(GsnrConfig(_target_="gradsift.scoring.gsnr.gsnr", name="gsnr", eps=float("inf")))


# ------------------------------------------------------------------------------------------ selectors


def longest_first(scores: Scores, size: int, examples: Any, *, sign: int = 1) -> Choice:
    order = sorted(range(len(examples)), key=lambda i: -sign * len(examples[i].output))
    return Choice(np.array(order[:size]), [Diagnostic.unknown("noticed", "value", "something")])


def selects_nothing(scores: Scores, size: int) -> Choice:
    return Choice(np.zeros(0, dtype=np.int64), [Diagnostic.unknown("why", "value", "the well is dry")])


def takes_no_size(scores: Scores) -> Choice:
    return Choice(np.zeros(0, dtype=np.int64))


def selected(bench: Bench, function: str, **options: Any) -> Artifact:
    sources = bench.sources()
    config = {"_target_": f"my_scores.{function}", "name": "mine", **options}
    selector = method("selector", config, tuple(sources))
    return select(bench.runtime, selector, bench("by_length"), bench.loaded, sources, dict, 0.5, "accepted", {})


def test_a_selector_of_the_users_own_gets_scores_budget_and_what_it_asks_for(bench: Bench) -> None:
    made = selected(bench, "longest_first", sign=-1)
    assert positions_of(made).tolist() == [0, 1, 2]
    assert read_diagnostics(made.path)["noticed"]["message"] == "something"
    assert made.fingerprint != selected(bench, "longest_first").fingerprint


def test_coverage_is_reported_if_embeddings_are_used(bench: Bench) -> None:
    features = Features(unit_rows(np.random.default_rng(0).standard_normal((6, 4))))
    scored = bench("by_length")
    bare = select(bench.runtime, TOPK, scored, bench.loaded, {}, dict, 0.5, "accepted", {})
    assert "coverage" not in read_diagnostics(bare.path)
    told = select(bench.runtime, TOPK, scored, bench.loaded, {}, dict, 0.34, "accepted", {}, lambda: features)
    values = read_diagnostics(told.path)["coverage"]["values"]
    assert values == coverage(features, positions_of(told), COVERED_WITHIN).values


def test_a_selection_of_nothing_is_an_error_with_the_selectors_reason(bench: Bench) -> None:
    with pytest.raises(GradsiftError, match=r"selector=mine selected no example .the well is dry."):
        selected(bench, "selects_nothing")


def test_a_selector_must_take_scores_and_size_first(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="selector=mine must take scores and size as its first parameters"):
        selected(bench, "takes_no_size")
