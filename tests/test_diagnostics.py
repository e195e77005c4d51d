"""Each diagnostic warns of the failure that it is named after and not otherwise; expected values by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMOKE

from gradsift.config import FieldsConfig
from gradsift.data.examples import Example, Turn, write_examples
from gradsift.data.formats import parse_rows
from gradsift.diagnostics import DIAGNOSTICS_FILE, Diagnostic, read_diagnostics, write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.gradients.ensemble_checks import (
    BFLOAT16_ERROR,
    adapter_spread,
    drop_sign,
    drop_size,
    eps_share,
    loss_between_snapshots,
    loss_from_start,
    norm_precision,
    norm_spread,
    update_products,
)
from gradsift.gradients.statistics import Statistics
from gradsift.report.notes import against_random
from gradsift.report.terminal import sweep_finished
from gradsift.scoring.gsnr import gsnr, gsnr_normalized_drop, gsnr_raw_drop, gsnr_variance_normalized
from gradsift.selection.checks import against_pool, diagnose_selection, lengths, selected_drop_sign

NAN = float("nan")


def ensemble(**changes: Any) -> Statistics:
    """Two healthy examples, and one without a response token."""
    columns = {
        "G_s": [4.0, 2.0, NAN],
        "G_t": [2.0, 1.0, NAN],
        "V_s": [1.0, 1.0, NAN],
        "V_t": [1.0, 0.01, NAN],
        "loss_s": [3.0, 1.0, NAN],
        "loss_t": [2.0, 1.0, NAN],
    }
    return Statistics(**{name: np.array(values) for name, values in (columns | changes).items()})


NO_ROW = Statistics(*(np.array([NAN, NAN]) for _ in range(6)))


def adapter(a: list[list[float]], b: list[list[float]]) -> dict[str, np.ndarray]:
    return {"layer.lora_A.weight": np.array(a, np.float32), "layer.lora_B.weight": np.array(b, np.float32)}


def is_unknown(diagnostic: Diagnostic) -> bool:
    """Return whether there is neither a verdict nor a value."""
    return diagnostic.verdict == "unknown" and list(diagnostic.values.values()) == [None]


# ---------------------------------------------------------------------------------------- collapse


def test_the_products_of_the_updates_equal_those_of_the_multiplied_matrices() -> None:
    rng = np.random.default_rng(0)
    members = []
    for _ in range(3):
        shapes = {"x": ((2, 5), (4, 2)), "y": ((2, 3), (7, 2))}
        members.append(
            {
                f"{layer}.lora_{factor}.weight": rng.normal(size=shape).astype(np.float32)
                for layer, both in shapes.items()
                for factor, shape in zip("AB", both, strict=True)
            }
        )
    updates = [
        np.concatenate([(m[f"{n}.lora_B.weight"].astype(float) @ m[f"{n}.lora_A.weight"]).ravel() for n in "xy"])
        for m in members
    ]
    np.testing.assert_allclose(update_products(members), np.stack(updates) @ np.stack(updates).T, rtol=1e-10)


def test_members_with_unrelated_updates_are_spread() -> None:
    one, other = adapter([[1.0, 0.0]], [[3.0]]), adapter([[0.0, 1.0]], [[3.0]])
    diagnostic = adapter_spread([one, other])
    assert diagnostic.verdict == "ok"
    assert diagnostic.values["relative_distance"] == pytest.approx(math.sqrt(2))


def test_members_with_one_update_are_collapsed_whatever_their_factors() -> None:
    """A and B differ by a rotation and their products are equal, so the spread of a single factor would be wrong."""
    one = adapter([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0]])
    other = adapter([[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0]])
    diagnostic = adapter_spread([one, other])
    assert diagnostic.verdict == "warning"
    assert diagnostic.values["relative_distance"] == 0
    assert "V_t" in diagnostic.message


def test_adapters_that_never_left_zero_are_a_warning_without_a_number() -> None:
    diagnostic = adapter_spread([adapter([[1.0]], [[0.0]]), adapter([[2.0]], [[0.0]])])
    assert (diagnostic.name, diagnostic.verdict, diagnostic.values) == (
        "adapter_spread",
        "warning",
        {"relative_distance": None},
    )
    assert "proxy.learning_rate" in diagnostic.message


def test_the_norms_variation_by_hand() -> None:
    diagnostic = norm_spread(ensemble(), members=5)  # sqrt(1) / 2 and sqrt(.01) / 1
    assert (diagnostic.verdict, diagnostic.values["median_variation"]) == ("ok", pytest.approx((0.5 + 0.1) / 2))
    diagnostic = norm_spread(ensemble(V_t=[1e-4, 1e-6, NAN]), members=5)
    assert (diagnostic.verdict, diagnostic.values["median_variation"]) == (
        "warning",
        pytest.approx((0.005 + 0.001) / 2),
    )
    assert "V_t" in diagnostic.message


def test_one_member_has_no_spread() -> None:
    assert is_unknown(norm_spread(ensemble(V_t=[0.0, 0.0, NAN]), members=1))
    assert is_unknown(adapter_spread([adapter([[1.0]], [[1.0]])]))


# ---------------------------------------------------------------------------------------- learning


def test_a_loss_that_falls_between_the_snapshots_by_hand() -> None:
    diagnostic = loss_between_snapshots(ensemble())
    assert (diagnostic.verdict, dict(diagnostic.values)) == ("ok", {"relative_fall": 0.25, "first": 2.0, "last": 1.5})
    assert "2.000 nats a token at the early snapshot and 1.500 at the late one (-25%)" in diagnostic.message


@pytest.mark.parametrize("late", [[3.0, 1.0, NAN], [3.0, 0.9999, NAN], [4.0, 1.0, NAN]])
def test_a_loss_that_stands_or_rises_is_a_warning(late: list[float]) -> None:
    diagnostic = loss_between_snapshots(ensemble(loss_t=late))
    assert diagnostic.verdict == "warning"
    assert "proxy.learning_rate" in diagnostic.message


def test_the_fall_from_the_first_batches_by_hand() -> None:
    longer = [10.0, 8.0, *[7.0] * 17, 4.0, 2.0]  # 21 batches and 20: tenths of two
    shorter = [6.0, 4.0, *[0.0] * 16, 1.0, 1.0]
    diagnostic = loss_from_start([longer, shorter, longer, shorter, longer, shorter])
    assert diagnostic.verdict == "ok"
    assert diagnostic.values == {"relative_fall": pytest.approx(5 / 7), "first": 7.0, "last": 2.0}
    diagnostic = loss_from_start([[2.0, 9.0, 2.0]] * 10)  # what happens in between is no learning
    assert (diagnostic.verdict, diagnostic.values["relative_fall"]) == ("warning", 0)
    assert "proxy.learning_rate" in diagnostic.message


def test_a_few_noisy_batches_are_no_evidence() -> None:
    assert is_unknown(loss_from_start([[2.0, 3.0]] * 9))
    assert is_unknown(loss_from_start([[]]))
    assert is_unknown(loss_from_start([[0.0, 0.0]] * 10))


# ----------------------------------------------------------------------------------- drops and eps


def test_the_sign_of_the_drops_by_hand() -> None:
    diagnostic = drop_sign(ensemble())
    assert (diagnostic.verdict, diagnostic.values["negative_share"], diagnostic.values["mean_drop"]) == ("ok", 0.0, 1.5)
    diagnostic = drop_sign(
        ensemble(G_t=[2.0, 3.0, NAN])
    )  # drops of 2 and -1: half of the rows, and the mean above zero
    assert (diagnostic.verdict, diagnostic.values["negative_share"], diagnostic.values["mean_drop"]) == ("ok", 0.5, 0.5)
    diagnostic = drop_sign(ensemble(G_t=[5.0, 3.0, NAN]))
    assert (diagnostic.verdict, diagnostic.values["negative_share"], diagnostic.values["mean_drop"]) == (
        "warning",
        1.0,
        -1.0,
    )
    assert "steps before the first snapshot" in diagnostic.message


def test_a_mean_that_rises_is_a_warning_though_most_norms_fall() -> None:
    rising = ensemble(G_s=[1.0, 1.0, 1.0], G_t=[0.9, 0.9, 9.0])
    assert drop_sign(rising).verdict == "warning"
    assert drop_sign(rising).values["negative_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_drop_of_a_roundings_size_has_no_sign(sign: int) -> None:
    """The last digits of a norm depend on the processor, so no verdict may depend on them."""
    early = np.array([4.0, 2.0, NAN])
    assert is_unknown(drop_sign(ensemble(G_s=early, G_t=early * (1 + sign * 1e-6))))
    fallen = np.where([True, False, False], 3.9, early * (1 + sign * 1e-6))
    diagnostic = drop_sign(ensemble(G_s=early, G_t=fallen))
    assert (diagnostic.verdict, diagnostic.values["negative_share"]) == ("ok", 0.0)
    assert drop_size(ensemble(G_s=early, G_t=early * (1 + sign * 1e-6))).verdict == "warning"


def test_norms_that_do_not_change_are_a_warning() -> None:
    assert drop_size(ensemble()).values == {"median_change": 0.5}
    assert drop_size(ensemble()).verdict == "ok"
    diagnostic = drop_size(ensemble(G_t=[4.0004, 2.0002, NAN]))
    assert (diagnostic.verdict, diagnostic.values["median_change"]) == ("warning", pytest.approx(1e-4))
    assert "proxy.snapshots" in diagnostic.message


def test_the_share_where_eps_dominates_by_hand() -> None:
    values = {"G_s": np.array([4.0, 2.0, NAN, 1.0, 1.0]), "V_t": np.array([1.0, 0.01, NAN, 0.5, 0.02])}
    diagnostic = eps_share(0.02, values)
    assert (diagnostic.verdict, dict(diagnostic.values)) == ("warning", {"V_t": 0.5, "G_s": 0.0})
    assert next(iter(diagnostic.values)) == "V_t"  # the worst is the one that is shown
    assert "scorer.eps" in diagnostic.message
    assert eps_share(1e-8, values).verdict == "ok"


@pytest.mark.parametrize(
    ("scorer", "denominators"),
    [(gsnr, {"G_s", "V_t"}), (gsnr_normalized_drop, {"G_s"}), (gsnr_variance_normalized, {"V_t"})],
)
def test_a_scorer_judges_its_own_eps_where_it_adds_it(scorer: Any, denominators: set[str]) -> None:
    (diagnostic,) = scorer(ensemble(), eps=0.5).diagnostics
    assert set(diagnostic.values) == denominators
    assert diagnostic.verdict == ("warning" if "V_t" in denominators else "ok")
    assert "eps=0.5" in diagnostic.message


def test_a_score_without_eps_has_no_share_of_it() -> None:
    assert gsnr_raw_drop(ensemble(), eps=0.5).diagnostics == []


def test_without_any_defined_row_nothing_is_judged() -> None:
    for judge in (loss_between_snapshots, drop_sign, drop_size):
        assert is_unknown(judge(NO_ROW))
    assert is_unknown(norm_spread(NO_ROW, members=5))
    assert is_unknown(eps_share(1e-8, {"V_t": NO_ROW.V_t}))
    assert is_unknown(norm_spread(replace(ensemble(), G_t=np.zeros(3)), members=5))
    assert is_unknown(drop_size(replace(ensemble(), G_s=np.zeros(3))))


ONE, OTHER = adapter([[1.0, 0.0]], [[3.0]]), adapter([[0.0, 1.0]], [[3.0]])


@pytest.mark.parametrize(
    ("judge", "known", "unknown"),
    [
        (adapter_spread, ([ONE, OTHER],), [([ONE],)]),
        (norm_spread, (ensemble(), 2), [(ensemble(), 1), (NO_ROW, 2)]),
        (norm_precision, (0.1, ensemble()), [(0.1, NO_ROW)]),
        (loss_between_snapshots, (ensemble(),), [(NO_ROW,)]),
        (loss_from_start, ([[2.0, 1.0]] * 10,), [([[2.0, 1.0]],), ([[0.0, 0.0]] * 10,)]),
        (drop_sign, (ensemble(),), [(NO_ROW,)]),
        (drop_size, (ensemble(),), [(NO_ROW,)]),
        (eps_share, (0.1, {"V_t": ensemble().V_t}), [(0.1, {"V_t": NO_ROW.V_t})]),
    ],
)
def test_what_cannot_be_judged_has_the_name_and_the_value_of_what_can(judge: Any, known: Any, unknown: Any) -> None:
    diagnostic = judge(*known)
    assert diagnostic.name == judge.__name__
    assert diagnostic.verdict != "unknown"
    for arguments in unknown:
        lacking = judge(*arguments)
        assert (lacking.name, lacking.verdict) == (diagnostic.name, "unknown")
        assert dict(lacking.values) == {next(iter(diagnostic.values)): None}


def test_what_cannot_be_said_of_the_selections_drops_is_still_named() -> None:
    known, lacking = (selected_drop_sign(np.full(3, drop), np.arange(2)) for drop in (1.0, NAN))
    assert (known.name, known.verdict) == ("selection_drop_sign", "ok")
    assert (lacking.name, lacking.verdict) == ("selection_drop_sign", "unknown")
    assert dict(lacking.values) == {next(iter(known.values)): None}


def test_the_verdict_of_float32_norms_is_that_of_any_others() -> None:
    exact = norm_precision(0.0, ensemble())
    assert (exact.name, exact.verdict, dict(exact.values)) == ("norm_precision", "ok", {"error_over_spread": 0.0})


# --------------------------------------------------------------------------------------- selection


def examples(*outputs: str) -> list[Example]:
    rows = [(index, {"instruction": "write", "output": output}) for index, output in enumerate(outputs)]
    return parse_rows(rows, "alpaca", FieldsConfig())[0]


def test_a_selection_of_the_easy_rows_is_a_warning_by_hand() -> None:
    losses = np.array([0.1] * 100 + [2.1] * 100 + [NAN])
    diagnostic = against_pool("late_loss", losses, np.arange(50))
    assert diagnostic.verdict == "warning"
    assert diagnostic.values == pytest.approx({"ratio": 0.1 / 1.1, "selection": 0.1, "pool": 1.1})
    assert "scorer=full" in diagnostic.message
    diagnostic = against_pool("late_loss", losses, np.arange(0, 201, 4))  # the last of them has no loss
    assert (diagnostic.verdict, diagnostic.values["ratio"]) == ("ok", pytest.approx(1.0))


def test_an_easier_selection_within_chance_is_none() -> None:
    """One row of ten below half the pool's mean is well within chance."""
    diagnostic = against_pool("late_loss", np.array([0.1] + [1.0] * 5 + [2.0] * 4), np.array([0]))
    assert diagnostic.values["ratio"] < 0.1
    assert diagnostic.verdict == "ok"


def test_the_chance_is_that_of_a_draw_without_replacement() -> None:
    """A draw of eight rows of ten hardly ever misses both hard ones."""
    values = np.array([1.0] * 8 + [100.0] * 2)
    assert against_pool("late_loss", values, np.arange(8)).verdict == "warning"


@pytest.mark.parametrize(("value", "verdict"), [(0.49, "warning"), (0.51, "ok")])
def test_half_of_the_pool_is_the_limit(value: float, verdict: str) -> None:
    values = np.full(10_000, 1.0)
    values[:100] = value * 9900 / (10_000 - value * 100)  # so that the ratio is `value`
    diagnostic = against_pool("late_loss", values, np.arange(100))
    assert (diagnostic.values["ratio"], diagnostic.verdict) == (pytest.approx(value), verdict)


def test_a_harder_selection_is_no_warning() -> None:
    values = np.array([1.0] * 90 + [50.0] * 10)
    assert against_pool("response_tokens", values, np.arange(90, 100)).verdict == "ok"


@pytest.mark.parametrize(
    ("values", "positions"), [([1.0, 2.0], []), ([1.0, NAN], [1]), ([NAN, NAN], [0]), ([0.0, 0.0], [0])]
)
def test_what_has_no_ratio_has_no_verdict(values: list[float], positions: list[int]) -> None:
    assert is_unknown(against_pool("late_loss", np.array(values), np.array(positions, dtype=int)))


def test_the_sign_of_the_selected_drops_by_hand() -> None:
    drop = np.array([3.0, -1.0, NAN, 2.0, -4.0])
    diagnostic = selected_drop_sign(drop, np.array([0, 3]))
    assert (diagnostic.verdict, diagnostic.values) == ("ok", {"negative_share": 0.0, "mean_drop": 2.5})
    diagnostic = selected_drop_sign(drop, np.array([0, 1, 2]))
    assert (diagnostic.verdict, diagnostic.values) == ("warning", {"negative_share": 0.5, "mean_drop": 1.0})
    assert "steps before the first snapshot" in diagnostic.message
    few = selected_drop_sign(np.array([0.1] * 19 + [-9.0]), np.arange(20))  # one of twenty, but it outweighs them
    assert (few.verdict, few.values["negative_share"]) == ("warning", 0.05)
    tenth, more = np.array([-1.0] + [1.0] * 9), np.array([-1.0, -1.0] + [1.0] * 12)
    assert [selected_drop_sign(each, np.arange(len(each))).verdict for each in (tenth, more)] == ["ok", "warning"]
    assert is_unknown(selected_drop_sign(drop, np.array([2])))
    assert is_unknown(selected_drop_sign(drop, np.array([], dtype=int)))


def written(folder: Path, pool: list[Example]) -> Path:
    write_examples(folder / "examples.parquet", pool)
    return folder / "examples.parquet"


def test_every_assistant_turn_counts_as_response(tmp_path: Path) -> None:
    (example,) = examples("12345")
    history = (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "hello"))
    measured = lengths(written(tmp_path, [replace(example, history=history, input="in")]))
    assert measured["response_characters"].tolist() == [10]
    assert measured["prompt_characters"].tolist() == [len("be kind" + "hi" + "write" + "in")]
    assert measured["response_to_prompt"].tolist() == [10 / 16]


def test_short_answers_are_a_warning_for_every_scorer(tmp_path: Path) -> None:
    pool = written(tmp_path, examples(*["no"] * 100, *["a long and patient answer"] * 100))
    by_name = {d.name: d for d in diagnose_selection(np.arange(20), pool, {}, None)}
    assert {name: d.verdict for name, d in by_name.items()} == {
        "selection_response_characters": "warning",
        "selection_prompt_characters": "ok",
        "selection_response_to_prompt": "warning",
    }
    by_name = {d.name: d for d in diagnose_selection(np.arange(0, 200, 10), pool, {}, None)}
    assert {d.verdict for d in by_name.values()} == {"ok"}


def test_what_the_ensemble_knows_is_compared_too(tmp_path: Path) -> None:
    pool = written(tmp_path, examples(*["yes"] * 4))
    measures = {"late_loss": np.ones(4), "response_tokens": np.full(4, 7.0)}
    names = [d.name for d in diagnose_selection(np.array([1]), pool, measures, np.ones(4))]
    assert names == [
        "selection_drop_sign",
        "selection_late_loss",
        "selection_response_tokens",
        "selection_prompt_characters",
        "selection_response_to_prompt",
    ]


# ------------------------------------------------------------------------------------------ limits


def with_share(share: float, fault: float, otherwise: float) -> np.ndarray:
    """Return 1,000 values."""
    return np.where(np.arange(1000) < 1000 * share, fault, otherwise)


def selected_of_pool(ratio: float) -> Diagnostic:
    """Return 100 of 1,000 rows whose mean is this share of the pool's mean."""
    return against_pool("late_loss", with_share(0.1, ratio, (1 - 0.1 * ratio) / 0.9), np.arange(100))


HEALTHY_AND_NOT: dict[str, tuple[Callable[[float], Diagnostic], float, float]] = {
    # what was seen in ensembles that work, and in those that do not (see the limits' comments); neither is the limit
    "adapter_spread": (lambda d: adapter_spread([adapter([[1, 0]], [[1]]), adapter([[1, d]], [[1]])]), 1.1, 0.1),
    "norm_spread": (lambda v: norm_spread(ensemble(G_t=[1.0, 1.0, NAN], V_t=[v * v, v * v, NAN]), 5), 0.02, 0.005),
    "fall between": (
        lambda f: loss_between_snapshots(ensemble(loss_s=[1.0, 1.0, NAN], loss_t=[1 - f, 1 - f, NAN])),
        0.01,
        1e-4,
    ),
    "fall from start": (lambda f: loss_from_start([[1.0, 1 - f]] * 10), 0.05, 0.002),
    "drop_sign": (
        lambda s: drop_sign(ensemble(G_s=np.ones(1000), G_t=np.ones(1000) - with_share(s, -0.01, 1.0))),
        0.45,
        0.6,
    ),
    "drop_size": (lambda c: drop_size(ensemble(G_s=[1.0, 1.0, NAN], G_t=[1 - c, 1 + c, NAN])), 0.05, 0.001),
    "eps_share": (lambda s: eps_share(1e-8, {"V_t": with_share(s, 0.0, 1.0)}), 0.005, 0.05),
    "norm_precision": (lambda s: norm_precision(s, ensemble(G_t=[1.0, 1.0, NAN], V_t=[1.0, 1.0, NAN])), 0.05, 0.13),
    "selected drops": (lambda s: selected_drop_sign(with_share(s, -0.01, 1.0), np.arange(1000)), 0.05, 0.2),
    "selected losses": (selected_of_pool, 0.6, 0.44),
}


@pytest.mark.parametrize("name", HEALTHY_AND_NOT)
def test_a_limit_lies_between_what_works_and_what_does_not(name: str) -> None:
    diagnose, healthy, failing = HEALTHY_AND_NOT[name]
    assert diagnose(healthy).verdict == "ok"
    assert diagnose(failing).verdict == "warning"


# ---------------------------------------------------------------------------------- against random


def run(scorer: str, pws: float | None, **changes: Any) -> dict[str, Any]:
    values = {
        "status": "finished",
        "scorer": scorer,
        "alpha": 0.1,
        "dataset": "alpaca",
        "target": "llama",
        "seed": 0,
        "data_seed": 0,
        "pws": pws,
        "pooled": {"pws": pws},
        "overrides": [],
        "stages": [],
    }
    return values | changes


def test_a_subset_worse_than_random_is_a_warning_by_hand() -> None:
    runs = [run("gsnr", 0.75), run("gsnr", 1.0, seed=1), run("random", 1.25), run("random", 0.75, seed=1)]
    (diagnostic,) = against_random(runs)
    assert diagnostic.verdict == "warning"
    assert diagnostic.values == {
        "difference": -0.125,
        "pws": 0.875,
        "pws_random": 1.0,
        "pairs": 2,
        "pairs_lower": 1,
        "p_value": None,  # the records hold no outcomes
    }
    assert diagnostic.message.startswith("gsnr, 0.1: PWS 0.875 against 1.000 for random rows, lower in 1 of 2 pairs")
    assert "scorer=full" in diagnostic.message
    (diagnostic,) = against_random([run("late_loss", 1.0), run("random", 1.0)])
    assert diagnostic.verdict == "ok"


def test_the_comparison_with_random_rows_is_a_paired_test_over_the_seeds() -> None:
    def judged(scorer: str, letters: str, seed: int) -> dict[str, Any]:
        outcomes = {"set": {"items": "x", "outcomes": letters}}
        pws = 1 + (letters.count("w") - letters.count("l")) / len(letters)
        return run(scorer, pws, seed=seed, benchmarks={"set": {"pws": pws}}, outcomes=outcomes)

    def compared_with(ours: str, theirs: str) -> tuple[float, str]:
        runs = [judged(*each, seed) for seed in (0, 1) for each in (("gsnr", ours), ("random", theirs))]
        (diagnostic,) = against_random(runs)
        assert diagnostic.verdict == "warning"
        return diagnostic.values["p_value"], diagnostic.message

    p_value, message = compared_with("l" * 30, "w" * 30)
    assert p_value < 1e-6 and "a paired test tells them apart" in message
    p_value, message = compared_with("w" * 14 + "l" * 16, "w" * 15 + "l" * 15)
    assert p_value > 0.05 and "a paired test does not tell them apart" in message


@pytest.mark.parametrize(
    "change",
    [{"alpha": 0.05}, {"seed": 1}, {"data_seed": 1}, {"dataset": "x"}, {"target": "x"}, {"overrides": ["x=1"]}],
)
def test_random_selection_of_another_setting_is_no_baseline(change: dict[str, Any]) -> None:
    assert against_random([run("gsnr", 0.5), run("random", 1.0, **change)]) == []


def test_where_there_is_no_figure_nothing_is_compared() -> None:
    assert against_random([run("gsnr", 0.5)]) == []
    assert against_random([run("gsnr", None), run("random", 1.0)]) == []
    assert against_random([run("gsnr", 0.5), run("random", None)]) == []
    assert against_random([run("full", 0.5), run("random", 1.0)]) == []  # the reference is no subset


def test_the_scorers_own_constants_are_compared_with_one_random_selection() -> None:
    runs = [run("gsnr", pws, overrides=["method=gradfiltering", f"scorer.eps={pws}"]) for pws in (0.5, 1.5)]
    diagnostics = against_random([*runs, run("random", 1.0, overrides=["method=random"])])
    assert [d.verdict for d in diagnostics] == ["warning", "ok"]
    assert len({d.name for d in diagnostics}) == 2


def test_a_sweep_ends_with_the_comparison_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for scorer, pws in (("gsnr", 0.75), ("late_loss", 1.25), ("random", 1.0)):
        (tmp_path / scorer).mkdir()
        (tmp_path / scorer / "run.json").write_text(json.dumps(run(scorer, pws)))
    assert sweep_finished(tmp_path)
    out = capsys.readouterr().out
    assert "warning: gsnr, 0.1: PWS 0.750 against 1.000 for random rows" in out
    assert "late_loss, 0.1: PWS" not in out  # what entry nothing stands in the report
    kept = read_diagnostics(tmp_path)
    assert [entry["verdict"] for entry in kept.values()] == ["warning", "ok"]


# ---------------------------------------------------------------------------------------- the file


def test_diagnostics_survive_the_disk_and_hold_no_nan(tmp_path: Path) -> None:
    write_diagnostics(tmp_path, [norm_spread(ensemble(), 1), drop_sign(ensemble())])
    content = read_diagnostics(tmp_path)
    assert content["norm_spread"] == {
        "verdict": "unknown",
        "values": {"median_variation": None},
        "message": "one member has no variance",
    }
    assert content["drop_sign"]["verdict"] == "ok"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_diagnostics(tmp_path, [Diagnostic("x", "ok", {"x": NAN}, "")])
    with pytest.raises(GradsiftError, match="two diagnostics are named x, z;"):
        write_diagnostics(tmp_path, [Diagnostic(name, "ok", {}, "") for name in "xyxzz"])


# ------------------------------------------------------------------------------------ the whole line


ENSEMBLE = {"adapter_spread", "loss_from_start"}
STATISTICS = {"norm_spread", "loss_between_snapshots", "drop_sign", "drop_size", "norm_precision"}
CHARACTERS = {"selection_prompt_characters", "selection_response_to_prompt"}
TOKENS = CHARACTERS | {"selection_late_loss", "selection_response_tokens"}


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def stored(gradsift: Any, stage: str) -> Mapping[str, Any]:
    (path,) = gradsift.store.glob(f"{stage}/*/{DIAGNOSTICS_FILE}")
    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse_constant)
    return content


@pytest.mark.parametrize(
    ("scorer", "of_scores", "of_selection"),
    [
        ("gsnr", ENSEMBLE | STATISTICS | {"eps_share"}, TOKENS | {"selection_drop_sign"}),
        ("late_loss", ENSEMBLE, TOKENS),
        ("random", set(), CHARACTERS | {"selection_response_characters"}),
        ("full", set(), CHARACTERS | {"selection_response_characters"}),
    ],
)
def test_a_run_stores_prints_and_logs_what_its_scorer_lets_it_say(
    after_smoke, capsys, scorer: str, of_scores: set[str], of_selection: set[str]
) -> None:
    gradsift = after_smoke
    for stage in ("score", "select"):  # made again, from the ensemble of the smoke run
        shutil.rmtree(gradsift.store / stage)
    assert gradsift(*SMOKE, f"scorer={scorer}", "stop_after=selection") == 0
    (run,) = gradsift.runs()
    assert set(stored(gradsift, "score")) == of_scores
    assert set(stored(gradsift, "select")) == of_selection
    assert run["diagnostics"] == stored(gradsift, "score") | stored(gradsift, "select")
    verdicts = [entry["verdict"] for entry in run["diagnostics"].values()]
    assert run["warnings"] == verdicts.count("warning")
    out = capsys.readouterr().out
    warned = [name for name, entry in run["diagnostics"].items() if entry["verdict"] == "warning"]
    assert f"{len(warned)} warning" in out if warned else "warning" not in out
    assert all(name in out.split("warning", 1)[1] for name in warned)
    (metrics,) = gradsift.folder.glob("outputs/*/*/metrics.jsonl")
    summary = json.loads(metrics.read_text().splitlines()[-1])
    assert summary["warnings"] == run["warnings"]
    ratio = run["diagnostics"]["selection_prompt_characters"]["values"]["ratio"]
    assert summary["diagnostics/selection_prompt_characters/values/ratio"] == ratio
    if scorer == "gsnr":
        assert run["diagnostics"]["norm_precision"]["values"]["error_over_spread"] == 0  # in float32
        assert gradsift(*SMOKE, f"scorer={scorer}", "stop_after=selection") == 0
        assert gradsift.runs()[-1]["diagnostics"] == run["diagnostics"]  # also where all work is reused


def warned_in(gradsift: Any) -> set[str]:
    """Return the names of the newest run's warnings."""
    entries = gradsift.runs()[-1]["diagnostics"]
    return {name for name, diagnostic in entries.items() if diagnostic["verdict"] == "warning"}


@pytest.mark.numerics
def test_a_learning_rate_of_nearly_nothing_is_seen(gradsift, capsys) -> None:
    """The norms change in their last digits at most, because nothing was learned."""
    assert gradsift(*SMOKE, "proxy.learning_rate=1e-12", "stop_after=scores") == 0
    assert warned_in(gradsift) == {"loss_between_snapshots", "drop_size"}
    assert gradsift.runs()[-1]["diagnostics"]["drop_sign"]["verdict"] == "unknown"
    assert "proxy.learning_rate" in capsys.readouterr().out


def test_a_collapsed_ensemble_whose_norms_rise_is_seen_and_so_is_an_eps_above_them(gradsift) -> None:
    """The members are dropout masks that drop nothing; in the few steps of the smoke run B grows from zero."""
    collapsed = ("proxy.ensemble=mc_dropout", "proxy.lora.dropout=1e-6")
    assert gradsift(*SMOKE, *collapsed, "stop_after=selection") == 0
    assert warned_in(gradsift) == {"norm_spread", "drop_sign", "eps_share", "selection_drop_sign"}
    normalised = (*collapsed, "scorer=gsnr_normalized_drop", "stop_after=scores")
    assert gradsift(*SMOKE, *normalised) == 0
    assert warned_in(gradsift) == {"norm_spread", "drop_sign"}  # V_t has no part in this score
    assert gradsift(*SMOKE, *normalised, "scorer.eps=1e3") == 0
    assert warned_in(gradsift) == {"norm_spread", "drop_sign", "eps_share"}


def test_a_selection_of_the_short_answers_is_seen(gradsift) -> None:
    for prefer, warned in (("short", {"selection_response_characters"}), ("long", set())):
        short = ("data.size=1000", "scorer=length", "scorer.unit=characters", f"scorer.prefer={prefer}")
        assert gradsift(*SMOKE, *short, "stop_after=selection") == 0
        assert warned_in(gradsift) & {"selection_response_characters"} == warned


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("error", "spread", "verdict"),
    [(0.0, 1e-6, "ok"), (0.004, 0.5, "ok"), (0.004, 0.02, "warning"), (0.004, 0.0, "unknown")],
)
def test_bfloat16_norms_are_trusted_only_where_the_members_differ_by_more(
    error: float, spread: float, verdict: str
) -> None:
    diagnostic = norm_precision(error, ensemble(G_t=[2.0, 4.0, NAN], V_t=[(2 * spread) ** 2, (4 * spread) ** 2, NAN]))
    assert diagnostic.verdict == verdict
    if verdict == "warning":
        assert "compute.precision=float32" in diagnostic.message
        assert diagnostic.values["error_over_spread"] == pytest.approx(error / spread)


@pytest.mark.slow
def test_the_error_of_a_norm_is_that_of_the_members_precision(gradsift) -> None:
    """In float32 it is 0, which the test of a stored run checks."""
    assert gradsift(*SMOKE, "compute.precision=bfloat16", "stop_after=scores") == 0
    ratio = stored(gradsift, "score")["norm_precision"]["values"]["error_over_spread"]
    spread = stored(gradsift, "score")["norm_spread"]["values"]["median_variation"]
    assert ratio == pytest.approx(BFLOAT16_ERROR["float32"] / spread)  # the smoke run's proxy is known
