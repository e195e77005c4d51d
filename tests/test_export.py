"""alpaca_eval's files out and in: what its own code makes of ours, and a PWS of two files from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd
import pytest
import yaml
from conftest import SMOKE
from endpoint import Endpoint

from gradsift.errors import DataError
from gradsift.evaluation import compare as compare_module
from gradsift.evaluation import export as export_module
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.export import export, slug
from gradsift.evaluation.generation import ModelOutput, model_outputs, write_model_outputs
from gradsift.evaluation.human.pairs import PairFiles
from gradsift.evaluation.judgments import Judgment, read_judgments
from gradsift.evaluation.pws import outcomes_of, summarise
from gradsift.evaluation.records import describe, read_records

ITEMS = [Item("set", str(n), f"question {n}", "with this" if n == 2 else "", None) for n in range(6)]
OURS = model_outputs(ITEMS, [f"ours {n}" for n in range(6)], "ours-m")
THEIRS = model_outputs(ITEMS, [f"theirs {n}" for n in range(6)], "theirs/m")
# scores of model and reference in both orders: win, lose, tie, a flip, a lone order, invalid
SCORES = [((9, 8), (9, 7)), ((1, 2), (5, 7)), ((5, 5), (8, 8)), ((9, 8), (8, 9)), ((9, 1), None), (None, None)]


def judgments(judge: str = "openai/m", scores: Any = SCORES) -> list[Judgment]:
    return [
        Judgment("set", str(n), order, "h", judge, f"raw {n}", *(pair or (None, None)), pair is not None, None)
        for n, both in enumerate(scores)
        for order, pair in zip(("forward", "reverse"), both, strict=True)
    ]


@pytest.fixture
def files(tmp_path: Path) -> PairFiles:
    found = PairFiles(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "judgments.jsonl")
    write_model_outputs(found.model, OURS)
    write_model_outputs(found.reference, THEIRS)
    write_judgments(found, judgments())
    return found


def write_judgments(files: PairFiles, rows: list[Judgment]) -> None:
    assert files.judgments is not None
    files.judgments.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))


def pooled(rows: list[Judgment]) -> dict[str, Any]:
    return dict(summarise(outcomes_of(rows, "signs"), 0.95)["pooled"])


# --------------------------------------------------------------------------------------------- export


def test_alpaca_evals_own_figures_of_our_export_are_ours(files: PairFiles, tmp_path: Path) -> None:
    from alpaca_eval.metrics import get_winrate

    export(files, tmp_path / "to")
    path = tmp_path / "to" / "ours-m" / "openai_m" / "annotations.json"
    ours = pooled(judgments())
    assert [ours[kind] for kind in ("win", "tie", "lose", "invalid")] == [1, 2, 1, 2]
    for read in (json.loads(path.read_text()), pd.read_json(path)):
        theirs = get_winrate(read)
        assert [theirs[name] for name in ("n_wins", "n_draws", "n_wins_base")] == [1, 2, 1]
        assert theirs["win_rate"] == pytest.approx(50 * ours["pws"])


def test_an_export_without_draws_or_invalid_items_is_read_too(files: PairFiles, tmp_path: Path) -> None:
    """pandas makes whole numbers of its preferences, a type that does not take a 1.5."""
    from alpaca_eval.metrics import get_winrate

    decided = [((9, 8), (9, 7))] * 4 + [((1, 2), (5, 7))] * 2
    write_judgments(files, judgments(scores=decided))
    export(files, tmp_path / "to")
    theirs = get_winrate(pd.read_json(tmp_path / "to" / "ours-m" / "openai_m" / "annotations.json"))
    assert (theirs["n_wins"], theirs["n_wins_base"]) == (4, 2)
    assert theirs["win_rate"] == pytest.approx(50 * pooled(judgments(scores=decided))["pws"])


def test_the_exported_annotations_have_the_same_pws_among_our_records(files: PairFiles, tmp_path: Path) -> None:
    export(files, tmp_path / "to")
    records = read_records(tmp_path / "to" / "ours-m" / "openai_m" / "annotations.json")
    assert records.model == "ours-m"
    found, ours = describe(records, 0.95)["one_order"], pooled(judgments())
    assert {name: found[name] for name in ("win", "tie", "lose", "invalid", "pws")} == {
        name: ours[name] for name in ("win", "tie", "lose", "invalid", "pws")
    }


def test_a_row_of_the_annotations_by_hand(files: PairFiles, tmp_path: Path) -> None:
    export(files, tmp_path / "to")
    row = json.loads((tmp_path / "to" / "ours-m" / "openai_m" / "annotations.json").read_text())[2]
    assert row["instruction"] == "question 2\n\nwith this"
    assert (row["output_1"], row["generator_1"]) == ("theirs 2", "theirs/m")
    assert (row["output_2"], row["generator_2"]) == ("ours 2", "ours-m")
    assert (row["dataset"], row["item_id"], row["annotator"], row["preference"]) == ("set", "2", "openai/m", 1.5)


def test_exported_answers_run_through_alpaca_eval_itself(
    files: PairFiles, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alpaca_eval.main import evaluate

    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.address)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    endpoint.usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}

    def behave(text: str, attempt: int) -> Any:
        rank = 1 if text.index("ours ") < text.index("theirs ") else 2
        return 200, f"[{{'model': 'model_1', 'rank': {rank}}}]", {}

    endpoint.behave = behave
    export(files, tmp_path / "to")
    leaderboard, _ = evaluate(
        model_outputs=tmp_path / "to" / "ours-m" / "model_outputs.json",
        reference_outputs=tmp_path / "to" / "theirs_m" / "model_outputs.json",
        annotators_config="alpaca_eval_gpt4",
        output_path=None,
        precomputed_leaderboard=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
        is_return_instead_of_print=True,
        caching_path=None,
    )
    assert leaderboard.loc["ours-m", ["n_wins", "n_total"]].tolist() == [6, 6]
    assert any("with this" in body["messages"][-1]["content"] for body in endpoint.bodies)


def test_what_cannot_be_exported_is_refused(files: PairFiles, tmp_path: Path) -> None:
    export(files, tmp_path / "to")
    export(files, tmp_path / "to")  # the same again is no change
    write_judgments(files, judgments(scores=SCORES[::-1]))
    with pytest.raises(DataError, match=r"annotations.*\.json exists with different content.*--to"):
        export(files, tmp_path / "to")
    write_judgments(files, [*judgments(), *judgments("other/m")])
    with pytest.raises(DataError, match="judgments of one judge, but has those of openai/m, other/m"):
        export(files, tmp_path / "new")
    write_judgments(files, [Judgment("set", "77", "forward", "h", "j", "", 1, 2, True, None)])
    with pytest.raises(DataError, match="item set/77 has judgments but no answers"):
        export(files, tmp_path / "new")
    write_model_outputs(files.reference, OURS)
    with pytest.raises(DataError, match="would share the folder ours-m"):
        export(files, tmp_path / "new")
    write_model_outputs(files.reference, [{**row, "generator": "ours/m"} for row in OURS])
    write_model_outputs(files.model, [{**row, "generator": "ours m"} for row in OURS])
    with pytest.raises(DataError, match=r"'ours m' .* and 'ours/m' .* would share the folder ours_m"):
        export(files, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_is_one_part_of_a_path() -> None:
    assert [slug(name) for name in ("../../etc/x", "a b/c", "..", "gpt-4.1")] == [
        "etc_x",
        "a_b_c",
        "unnamed",
        "gpt-4.1",
    ]


def test_a_run_that_alpaca_evals_annotator_judged_is_exported(
    after_smoke: Any, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.behave = lambda text, attempt: (
        200,
        f"[{{'model': 'model_1', 'rank': {1 + crc32(text.encode()) % 2}}}]",
        {},
    )
    options = ("judge=alpaca_eval", "judge.annotators=alpaca_eval_gpt4", f"judge.base_url={endpoint.address}")
    assert after_smoke(*SMOKE, "scorer=random", *options) == 0
    (run,) = after_smoke.folder.glob("outputs/*/*")
    assert after_smoke.runs()[0]["judging"]["cost"]["calls"] == len(endpoint.bodies) > 0
    capsys.readouterr()
    assert export_module.main([str(run), "--to", "published"]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 3 and all(path.is_file() for path in printed)
    verdicts = json.loads(next(path for path in printed if path.name == "annotations.json").read_text())
    counts = after_smoke.runs()[0]["pooled"]
    assert [sum(row["preference"] == p for row in verdicts) for p in (2, 1.5, 1)] == [
        counts[kind] for kind in ("win", "tie", "lose")
    ]
    assert export_module.main([str(after_smoke.folder), "--to", "published"]) == 2
    assert "cannot be read as the record of a run" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- compare


@pytest.fixture
def compared(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """The command on two files; what it printed, or its error where it fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(tmp_path / "store"))

    def run(model: list[Any], reference: list[Any], *options: str, judge: str = "openai") -> Any:
        (tmp_path / "a.json").write_text(json.dumps(model))
        (tmp_path / "b.json").write_text(json.dumps(reference))
        chosen = (f"judge={judge}", f"judge.base_url={endpoint.address}") if judge else ()
        status = compare_module.main(["a.json", "b.json", *chosen, *options])
        captured = capsys.readouterr()
        return json.loads(captured.out) if status == 0 else captured.err

    return run


def plain(rows: list[ModelOutput]) -> list[dict[str, str]]:
    """As alpaca_eval's own files are: no ids, no input, no reference answer."""
    return [{key: row[key] for key in ("instruction", "output", "generator", "dataset")} for row in rows]  # type: ignore[literal-required]


@pytest.mark.parametrize("judge", ["openai", "alpaca_eval"])
def test_two_files_have_a_pws_from_any_judge(compared: Any, endpoint: Endpoint, tmp_path: Path, judge: str) -> None:
    def behave(text: str, attempt: int) -> Any:
        ours_first = text.index("ours ") < text.index("theirs ")
        if judge == "openai":
            return 200, "9 8" if ours_first else "8 9", {}
        return 200, f"[{{'model': 'model_1', 'rank': {1 if ours_first else 2}}}]", {}

    endpoint.behave = behave
    options = ("judge.annotators=alpaca_eval_gpt4",) if judge == "alpaca_eval" else ()
    found = compared(plain(OURS), plain(THEIRS), *options, "--to", "to", judge=judge)
    assert (found["model"], found["reference"], found["pooled"]["win"], found["pooled"]["pws"]) == (
        "ours-m",
        "theirs/m",
        6,
        2.0,
    )
    assert found["cost"]["calls"] == len(endpoint.bodies) == 12
    assert len(read_judgments(Path(found["files"]["judgments"]))) == 12
    assert len(list((tmp_path / "to").rglob("*.json"))) == 3
    assert compared(plain(OURS), plain(THEIRS), "--to", "to", *options, "judge.retries=0", judge=judge) == found
    assert len(endpoint.bodies) == 12


def test_a_stopped_comparison_goes_on_where_it_was(compared: Any, endpoint: Endpoint) -> None:
    assert "judge.max_calls=5 is reached" in compared(OURS, THEIRS, "judge.max_calls=5")
    assert len(endpoint.bodies) == 5
    assert compared(OURS, THEIRS)["cost"]["calls"] == len(endpoint.bodies) == 12


def test_a_dry_run_says_the_plan_and_sends_nothing(compared: Any, endpoint: Endpoint) -> None:
    found = compared(OURS, THEIRS, "judge.dry_run=true", "judge.price_input=1", "judge.price_output=2")
    assert "12 requests to send" in found["dry_run"] and "USD" in found["dry_run"]
    assert not endpoint.bodies


def test_reference_answers_are_compared_by_their_sets_own_rule(compared: Any) -> None:
    items = [Item("gsm8k", str(n), f"question {n}", "", "12") for n in range(2)]
    ours = model_outputs(items, ["It is #### 12.0", "#### 12"], "ours")
    theirs = model_outputs(items, ["It is 13", "so 12"], "theirs")
    assert compared(ours, theirs, judge="")["pooled"]["win"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("data=alpaca",), "'data=alpaca' is not an option here"),
        (("judge.modle=x",), "modle"),
        (("judge.retries=-1",), "judge.retries=-1"),
    ],
)
def test_wrong_options_are_refused(compared: Any, options: tuple[str, ...], words: str) -> None:
    said = compared(OURS, THEIRS, *options)
    assert words in said and said.count("\n") == 1


def test_answers_to_other_questions_are_refused_by_row(compared: Any, endpoint: Endpoint) -> None:
    other = plain(THEIRS)
    other[3]["instruction"] = "something else"
    assert "set/4 (different instruction)" in compared(plain(OURS), other)
    assert "set/6 (only in the model's answers)" in compared(plain(OURS), plain(THEIRS)[:5])
    assert "a.json, row 2: output is missing" in compared([*plain(OURS)[:1], {"instruction": "x"}], plain(THEIRS))
    assert not endpoint.bodies


def test_a_moved_annotator_is_the_same_judge_and_a_changed_one_is_not(
    compared: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.behave = lambda text, attempt: (200, "A", {})
    prompt = "<|im_start|>user\n{instruction}\nA: {output_1}\nB: {output_2}\n<|im_end|>"
    entry = {
        "prompt_template": prompt,
        "completions_kwargs": {"model_name": "m", "max_tokens": 5, "price_per_token": 1e-6},
        "completion_parser_kwargs": {"outputs_to_match": {1: "^A", 2: "^B"}},
    }
    asked = []
    for folder, changed in (("one", {}), ("two", {}), ("two", {"prompt_template": f"{prompt[:-10]} Which?<|im_end|>"})):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "configs.yaml").write_text(yaml.safe_dump({"mine": {**entry, **changed}}))
        found = compared(OURS, THEIRS, f"judge.annotators={folder}", judge="alpaca_eval")
        assert found["pooled"]["tie"] == 6  # always the first place
        assert found["position_bias"]["to_first"] == 6
        assert found["cost"]["usd"] > 0  # by the price in the annotator's file
        asked.append(len(endpoint.bodies))
    assert asked == [12, 12, 24]
    assert len(list((tmp_path / "store" / "judge").glob("*/manifest.json"))) == 2


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")
def test_the_published_outputs_are_read(compared: Any, endpoint: Endpoint) -> None:
    folder = Path(os.environ["GRADSIFT_DATA"]) / "alpaca_eval"
    ours, theirs = (json.loads((folder / name).read_text()) for name in ("alpaca-7b.json", "text_davinci_003.json"))
    found = compared(ours, theirs, "judge.dry_run=true", judge="alpaca_eval")
    equal = sum(a["output"] == b["output"] for a, b in zip(ours, theirs, strict=True))
    assert f"{2 * (805 - equal):,} requests to send" in found["dry_run"]
