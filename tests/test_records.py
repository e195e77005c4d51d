"""Judge records of other origin: the published figures come out, bias is seen, broken files are refused by row."""

from __future__ import annotations

import json
import os
import runpy
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsift.errors import DataError
from gradsift.evaluation.bias import length_bias, length_controlled, position_bias
from gradsift.evaluation.judgments import Judgment
from gradsift.evaluation.pws import agreement, outcomes_of
from gradsift.evaluation.records import compare_labels, describe, main, paired_test, read_all, read_records

NEEDS_DATA = pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")


def data(*names: str) -> list[str]:
    return [str(Path(os.environ["GRADSIFT_DATA"], name)) for name in names]


def reviews(folder: Path, *pairs: tuple[Any, Any], name: str = "a.json") -> str:
    """Rows of (scores, scores_reverse), the latter as shown; answers of 3 and 5 characters."""
    rows = [{"Answer1": "abc", "Answer2": "abcde", "scores": s, "scores_reverse": r} for s, r in pairs]
    (folder / name).write_text(json.dumps({"Meta_Info": {"dataset_name": "set"}, "data": rows}))
    return str(folder / name)


def annotations(folder: Path, *preferences: float | None, swapped: bool = False, name: str = "b.json") -> str:
    generators = ("model", "reference") if swapped else ("reference", "model")
    rows = [
        {
            "instruction": f"question {number}",
            "output_1": "abc" if swapped else "abcde",
            "output_2": "abcde" if swapped else "abc",
            "generator_1": generators[0],
            "generator_2": generators[1],
            "preference": preference,
        }
        for number, preference in enumerate(preferences)
    ]
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(list(arguments)) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# ------------------------------------------------------------------------------------- published files


@NEEDS_DATA
def test_the_published_reviews_give_the_published_counts_and_their_position_bias(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("vicuna", "koala", "wizardlm", "sinstruct", "lima")
    result = printed(capsys, *data(*(f"judge/cherry5_vs_alpaca_{name}_gpt3.5.json" for name in names)))
    cells = {name: [result["benchmarks"][name][kind] for kind in ("win", "tie", "lose")] for name in names}
    assert cells == {
        "vicuna": [16, 58, 6],
        "koala": [32, 110, 38],
        "wizardlm": [50, 135, 33],
        "sinstruct": [40, 172, 40],
        "lima": [60, 210, 30],
    }
    assert round(result["pooled"]["pws"], 10) == 1.0495145631
    assert (result["position_bias"]["flips"], result["position_bias"]["to_second"]) == (672, 639)


@NEEDS_DATA
def test_the_published_annotations_give_the_published_win_rate(capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = data("alpaca_eval/alpaca-7b_annotations_alpaca_eval_gpt4.json")
    found = printed(capsys, file)["one_order"]
    assert (round(found["win_rate"], 6), round(found["standard_error"], 6)) == (26.459627, 1.535711)


def test_the_command_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = reviews(tmp_path, ([9, 8], [8, 9]))
    monkeypatch.setattr(sys, "argv", ["records", file])
    monkeypatch.delitem(sys.modules, "gradsift.evaluation.records")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("gradsift.evaluation.records", run_name="__main__")
    assert end.value.code == 0 and json.loads(capsys.readouterr().out)["pooled"]["win"] == 1


# ------------------------------------------------------------------------------------------ small files


def test_reviews_by_hand(tmp_path: Path) -> None:
    file = reviews(
        tmp_path, ("[9, 8]", "[7, 9]"), ([8, 8], [8, 8]), ([8, 9], [8, 9]), ([-1, -1], [8, 9]), ([0, 3], [3, 0])
    )
    records = read_records(Path(file))
    result = describe(records, 0.9)
    # a win (shown second, the model has 9), a tie, a flip to the second place, an invalid item, a loss
    assert [result["pooled"][kind] for kind in ("win", "tie", "lose", "invalid")] == [1, 2, 1, 1]
    assert result["position_bias"] == {
        "items": 4,
        "flips": 1,
        "flip_share": 0.25,
        "to_first": 0,
        "to_second": 1,
        "first_share": 2 / 6,
    }
    assert records.lengths["set", "1"] == (3, 5)
    assert result["length_bias"]["longer_share"] == 0.5


def queries(folder: Path, *pairs: tuple[Any, Any], **changed: Any) -> Path:
    """Rows of (eval_QUERY0, eval_QUERY1), both [model, reference]."""
    path = folder / "koala_test" / "ours" / "rd_0_vs_chat.jsonl"
    path.parent.mkdir(parents=True)
    names = {"assistant1_QUERY0": "ours", "assistant2_QUERY0": "chat"}
    names |= {"assistant1_QUERY1": "chat", "assistant2_QUERY1": "ours"}
    rows = [
        {"question_id": f"koala_{n}", **names, "eval_QUERY0": a, "eval_QUERY1": b} for n, (a, b) in enumerate(pairs)
    ]
    rows[-1] |= changed
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_query_reviews_hold_the_models_score_first_in_both_orders(tmp_path: Path) -> None:
    file = queries(tmp_path, ([9.0, 8.0], [9, 7]), ([4, 8], [4, 7]), ([8, 9], [9, 8]), ([-1, -1], [9, 8]))
    records = read_records(file)
    assert records.model == "ours"
    result = describe(records, 0.95)
    cell = result["benchmarks"]["koala_test"]
    assert [cell[kind] for kind in ("win", "tie", "lose", "invalid")] == [1, 1, 1, 1]
    assert result["position_bias"]["to_second"] == 1  # the reference in the first query, the model in the second
    assert result["orders"] == ["forward", "reverse"] and "one_order" not in result


def test_blank_lines_do_not_change_the_items_of_reviews_without_ids(tmp_path: Path) -> None:
    file = queries(tmp_path, ([9, 8], [9, 7]), ([4, 8], [4, 7]))
    rows = [{k: v for k, v in json.loads(line).items() if k != "question_id"} for line in file.read_text().splitlines()]
    file.write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    assert [judgment.item_id for judgment in read_records(file).judgments] == ["1", "1", "2", "2"]


def test_two_query_reviews_of_other_assistants_in_between_are_refused(tmp_path: Path) -> None:
    file = queries(tmp_path, ([9, 8], [9, 7]), ([9, 8], [9, 7]), assistant2_QUERY1="theirs")
    with pytest.raises(DataError, match=r"line 2: the assistants are not \('ours', 'chat'\)"):
        read_records(file)


def test_annotations_of_both_orders_are_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward = annotations(tmp_path, 1, 2, 1, 1.5, 0, None)
    reverse = annotations(tmp_path, 2, 1, 1, 1.5, 1, 1, swapped=True, name="swapped.json")
    result = printed(capsys, forward, reverse)
    # the reference twice; the model twice; a flip to the first place; draws; a draw and a win; one order lacking
    assert [result["pooled"][kind] for kind in ("win", "tie", "lose", "invalid")] == [2, 2, 1, 1]
    assert result["position_bias"]["to_first"] == 1
    assert "one_order" not in result


def test_files_without_a_models_name_do_not_change_whose_wins_are_counted(tmp_path: Path) -> None:
    files = [
        reviews(tmp_path, ([9, 8], [8, 9])),
        annotations(tmp_path, 2, 2),
        annotations(tmp_path, 1, 1, swapped=True, name="swapped.json"),
    ]
    for order in (files, [files[1], files[0], files[2]]):
        records = read_all([Path(file) for file in order])
        assert describe(records, 0.95)["pooled"]["win"] == 3
        assert "invalid" not in outcomes_of(records.judgments, records.combine).values()


def test_annotations_of_one_order_have_a_win_rate_and_no_pws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([annotations(tmp_path, 1, 2, 2, 1.5, 0, None)]) == 0
    out, err = capsys.readouterr()
    assert "note: all judgments have one order (reverse); PWS needs both" in err
    result = json.loads(out)
    assert result["pooled"]["pws"] is None and result["orders"] == ["reverse"]
    found = result["one_order"]
    assert [found[kind] for kind in ("n", "win", "tie", "lose", "invalid")] == [5, 2, 2, 1, 1]
    assert found["win_rate"] == pytest.approx(60)
    assert found["standard_error"] == pytest.approx(100 * np.std([0, 1, 1, 0.5, 0.5], ddof=1) / np.sqrt(5))


def test_grades_of_one_order_count_by_their_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a point ahead is a win, as three points are; only a preference says how sure it was."""
    lines = [
        Judgment("set", str(number), "forward", "h", "openai/m", "", model, reference, True, None)
        for number, (model, reference) in enumerate(((8, 7.5), (7, 7), (9, 8.5), (9, 8.5)))
    ]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(vars(line)) + "\n" for line in lines))
    assert printed(capsys, str(tmp_path / "j.jsonl"))["one_order"]["win_rate"] == 87.5


def test_our_own_judgments_are_read_and_log_probabilities_are_summed(tmp_path: Path) -> None:
    lines = [
        Judgment("set", "1", order, "h", "local:m", "", model, reference, True, None)
        for order, model, reference in (("forward", -0.2, -2.0), ("reverse", -1.9, -0.3))
    ]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(vars(line)) + "\n" for line in lines))
    records = read_records(tmp_path / "j.jsonl")
    assert records.combine == "sum"
    assert describe(records, 0.9)["pooled"]["win"] == 1
    grades = Path(reviews(tmp_path, ([9, 8], [8, 9])))
    with pytest.raises(DataError, match="score them separately"):
        read_all([tmp_path / "j.jsonl", grades])


ONE = json.dumps(vars(Judgment("b", "1", "forward", "h", "j", "r", 2, 1, True, None))) + "\n"


@pytest.mark.parametrize(
    ("records", "labels", "message"),
    [
        (b"", b"", "judgments.jsonl is empty"),
        (b" \n", b"", "judgments.jsonl is empty"),
        (ONE.encode(), b'{"item_id": "2", "label": "win"}', "no item has both"),
        (ONE.encode(), b'{"item_id": "\xff", "label": "win"}', "line 1"),
        (
            ONE.encode(),
            b'{"item_id": 1, "label": "win"}\n{"item_id": 1, "label": "tie"}',
            "line 2: a second, different label",
        ),
    ],
)
def test_records_without_a_judgment_and_labels_in_another_encoding_are_named(
    records: bytes, labels: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judgments.jsonl").write_bytes(records)
    (tmp_path / "labels.jsonl").write_bytes(labels)
    assert main([str(tmp_path / "judgments.jsonl"), "--labels", str(tmp_path / "labels.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_labels_and_a_second_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "second").mkdir()
    win, lose = ([9, 8], [8, 9]), ([8, 9], [9, 8])
    first = reviews(tmp_path, win, win, win, lose)
    second = reviews(tmp_path / "second", win, lose, lose, lose)
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"item_id": str(i), "label": x}) + "\n" for i, x in ((1, "win"), (4, "win"))))
    result = printed(capsys, first, "--labels", str(labels), "--against", second)
    assert result["agreement"] == {"items": 2, "accuracy": 0.5, "kappa": 0.0, "unlabelled": 2, "invalid": 0}
    assert result["paired_test"]["difference"] == 1.0  # two of four items by 2
    assert result["against"]["pooled"]["pws"] == 0.5


# -------------------------------------------------------------------------------------------- functions


def judgment(item: str, order: str, model: float | None, reference: float | None) -> Judgment:
    return Judgment("set", item, order, "", "j", "", model, reference, model is not None, None)  # type: ignore[arg-type]


def test_a_judge_that_always_prefers_one_place_flips_every_item() -> None:
    for first, second, side in ((9, 8, "to_first"), (8, 9, "to_second")):
        found = position_bias(
            [j for n in "ab" for j in (judgment(n, "forward", first, second), judgment(n, "reverse", second, first))]
        )
        assert (found["flips"], found[side], found["first_share"]) == (2, 2, 1.0 if side == "to_first" else 0.0)


def test_items_without_both_orders_show_no_place() -> None:
    found = position_bias(
        [judgment("a", "forward", 9, 8), judgment("b", "forward", 9, 8), judgment("b", "reverse", None, None)]
    )
    assert (found["items"], found["flip_share"], found["first_share"]) == (0, None, None)


def test_length_bias_by_hand() -> None:
    outcomes = {"a": (9, 8), "b": (9, 8), "c": (8, 9), "d": (8, 8)}
    judgments = [judgment(n, order, *scores) for n, scores in outcomes.items() for order in ("forward", "reverse")]
    lengths = {("set", "a"): (9, 3), ("set", "b"): (3, 9), ("set", "c"): (2, 8), ("set", "d"): (1, 2)}
    found = length_bias(outcomes_of(judgments, "signs"), lengths)
    assert (found["items"], found["longer_wins"]) == (3, 2)
    assert (found["mean_model"], found["mean_reference"]) == (15 / 4, 22 / 4)
    assert length_bias(outcomes_of(judgments, "signs"), {})["longer_share"] is None


def test_length_control_by_hand() -> None:
    items = [("s", str(n)) for n in range(40)]
    kinds = ["win"] * 20 + ["lose"] * 12 + ["tie"] * 8
    outcomes = dict(zip(items, kinds, strict=True))
    equal = length_controlled(outcomes, dict.fromkeys(items, (5, 5)))  # type: ignore[arg-type]
    assert equal["pws"] == pytest.approx(1 + 8 / 40, abs=1e-4)  # the plain PWS
    assert equal["slope"] == pytest.approx(0)
    assert length_controlled({}, {}) == {"items": 0, "pws": None, "slope": None}


def test_a_model_that_wins_by_length_alone_is_at_parity_with_length_controlled() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(loc=30, scale=40, size=4000)  # in characters: the model's answers are longer
    wins = rng.uniform(size=4000) < 1 / (1 + np.exp(-1.5 * np.tanh(gaps / gaps.std())))
    outcomes = {("s", str(n)): "win" if won else "lose" for n, won in enumerate(wins)}
    lengths = {("s", str(n)): (200 + round(gap), 200) for n, gap in enumerate(gaps)}
    controlled = length_controlled(outcomes, lengths)  # type: ignore[arg-type]
    assert 2 * wins.mean() > 1.2
    assert controlled["pws"] == pytest.approx(1, abs=0.08)
    assert controlled["slope"] == pytest.approx(1.5, abs=0.2)


@pytest.mark.parametrize("kind", ["win", "lose"])
def test_length_control_of_one_outcome_alone_stays_finite(kind: str) -> None:
    outcomes = {("s", str(n)): kind for n in range(10)}
    lengths = {("s", str(n)): (n, 5) for n in range(10)}
    assert length_controlled(outcomes, lengths)["pws"] == pytest.approx(2 if kind == "win" else 0, abs=1e-2)  # type: ignore[arg-type]


def test_kappa_by_hand() -> None:
    ours = {("s", str(n)): kind for n, kind in enumerate(["win", "win", "lose", "tie", "invalid"])}
    people = {("s", str(n)): kind for n, kind in enumerate(["win", "lose", "lose", "tie", "win"])}
    found = agreement(ours, people)  # type: ignore[arg-type]
    # chance: wins 2/4 x 1/4, losses 1/4 x 2/4, ties 1/4 x 1/4
    assert (found["accuracy"], found["kappa"]) == (0.75, pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16)))
    with pytest.raises(DataError, match="no item has both"):
        compare_labels(ours, {})  # type: ignore[arg-type]
    assert agreement(ours, {}) == {"items": 0, "accuracy": None, "kappa": None}  # type: ignore[arg-type]


def test_the_paired_test_equals_the_enumeration_of_all_sign_flips() -> None:
    first = ["win", "win", "tie", "win", "lose", "win"]
    second = ["lose", "tie", "tie", "win", "win", "lose"]
    a, b = ({("s", str(n)): kind for n, kind in enumerate(found)} for found in (first, second))
    values = {"win": 1, "tie": 0, "lose": -1}
    differences = np.array([values[x] - values[y] for x, y in zip(first, second, strict=True)])
    flips = [abs(np.mean(differences * signs)) for signs in product((1, -1), repeat=6)]
    exact = np.mean(np.array(flips) >= abs(differences.mean()) - 1e-12)
    test = paired_test(a, b, 0.95)  # type: ignore[arg-type]
    assert test["difference"] == pytest.approx(differences.mean())
    assert test["p_value"] == pytest.approx(exact)
    assert test["low"] < test["difference"] < test["high"]
    assert paired_test(a, a, 0.95)["p_value"] == 1  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- mistakes


HUGE = "9" * 400  # beyond all floats


def test_a_judgment_whose_reply_quotes_the_key_of_a_review_is_still_a_judgment(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JUDGMENT.replace("null", "2").replace('"r"', json.dumps('an "eval_QUERY0"')))
    (judgment,) = read_records(tmp_path / "a.jsonl").judgments
    assert (judgment.reply, judgment.score_model) == ('an "eval_QUERY0"', 2)


JUDGMENT = (
    '{"benchmark": "b", "item_id": "1", "order": "forward", "prompt_hash": "h", "judge": "j", "reply": "r", '
    '"score_model": null, "score_reference": 1, "valid": true, "reason": ""}'
)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "[1, 2]", "of no known kind"),
        (
            "a.json",
            '{"data": [{"scores": [1, 2]}]}',
            r"a.json, row 1: `scores_reverse` is missing, so .* one order",
        ),
        ("a.json", '{"data": [{}]}', r"a.json, row 1: `scores` is missing"),
        ("a.jsonl", '{"eval_QUERY0": [1, 2]}', r"line 1: `eval_QUERY1` is missing, so the row holds only one order"),
        ("a.jsonl", '{"eval_QUERY0": [1, 2], "eval_QUERY1": [1, 2]}\n{', r"a.jsonl, line 2 is not JSON"),
        ("a.json", '{"data": [{"scores": "[1]", "scores_reverse": "[1, 2]"}]}', r"row 1: '\[1\]' is not a pair"),
        ("a.json", '[{"preference": 1}, {"preference": 7}]', r"row 2: preference=7 is neither"),
        ("a.json", '[{"generator_2": "m", "preference": 1}, {"generator_2": "n", "preference": 1}]', r"row 2: neither"),
        ("a.json", '[{"preference": 1}, {}]', r"row 2: `preference` is missing"),
        ("a.jsonl", '{"x": 1}\n{"y": 2}\n', "line 1 is not a judgment"),
        ("a.json", f'{{"data": [{{"scores": [{HUGE}, 1], "scores_reverse": [1, 2]}}]}}', "row 1: .* is not a pair"),
        ("a.json", f'[{{"preference": {HUGE}}}]', r"row 1: preference=9+ is neither"),
        ("a.jsonl", JUDGMENT.replace("null", HUGE) + "\n\n", "line 1 is not a judgment"),
    ],
)
def test_broken_files_are_refused_by_row(
    name: str, content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name)
    assert main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = reviews(tmp_path, ([9, 8], [8, 9]))
    assert main([file, file]) == 2
    assert "two judgments in the order forward" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    assert main([file, "--confidence", "1"]) == 2
