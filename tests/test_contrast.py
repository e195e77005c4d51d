"""Laws of the contrast with similar prompts: losses of answers in two parts, neighbours, and the score."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMOKE
from exactness import exact_copy
from test_config import composed
from test_gradient_features import line_of, store  # noqa: F401
from test_norms import adapted_model, ragged_examples

from gradsift.data.batching import collate
from gradsift.data.examples import Example, make_example
from gradsift.data.load import Labels
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError
from gradsift.features.prompt_clusters import prompt_vectors
from gradsift.journal import Journal
from gradsift.proxy.member_tables import AnswerLosses, collect_losses, read_answer_losses, with_other_prompts
from gradsift.runtime import derive_seed
from gradsift.scoring.contrast import contrast, contrast_with, nearest_lengths, nearest_prompts, saturated
from gradsift.scoring.random import random, random_clean
from gradsift.scoring.scores import EXCLUDED, NO_RESPONSE, SCORED
from gradsift.training import lora
from gradsift.training.head import ResponseLosses

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

RANKED = {"like_length": 100, "saturation": 0.0, "seed": 0}  # the score is the bound
TASKS = ("sort the numbers {} please", "name the capital of {}", "translate the word {} into French")


def pool(rows: int) -> list[Example]:
    """Rows of three kinds in turn."""
    return [make_example(i, (), TASKS[i % 3].format(f"w{i}"), "", f"answer {i}", {}, Counter()) for i in range(rows)]


def losses(members: int, rows: int, seed: int = 0) -> AnswerLosses:
    return AnswerLosses(*np.random.default_rng(seed).lognormal(size=(3, members, rows)))


# ------------------------------------------------------------------------------------- losses in two parts


def token_by_token(model: torch.nn.Module, ids: np.ndarray, is_response: np.ndarray) -> tuple[float, float]:
    """Return body and end in float64, one token after the other."""
    logits = exact_copy(model)(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0]
    each = [
        -float(torch.log_softmax(logits[place - 1].double(), -1)[int(ids[place])])
        for place in range(1, len(ids))
        if is_response[place]
    ]
    return (sum(each[:-1]) / (len(each) - 1) if len(each) > 1 else each[0]), each[-1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_body_and_end_are_those_of_a_loop_over_tokens(architecture: str, side: str) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"]), ragged_examples()
    batch = collate(examples, 0, side)
    with torch.no_grad():
        body, end = ResponseLosses(adapted).body_and_end(batch)
        mean = ResponseLosses(adapted)(batch)
    expected = np.array([token_by_token(adapted, each.input_ids, each.is_response) for each in examples])
    np.testing.assert_allclose(body, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(end, expected[:, 1], rtol=1e-5)
    counts = batch.counts
    np.testing.assert_allclose(torch.where(counts > 1, (body * (counts - 1) + end) / counts, end), mean, rtol=1e-5)


def test_one_response_token_is_body_and_end() -> None:
    adapted, examples = adapted_model("gpt2", ["all-linear"]), ragged_examples()
    only = examples[0]
    only.is_response[:] = False
    only.is_response[-1] = True
    with torch.no_grad():
        body, end = ResponseLosses(adapted).body_and_end(collate([only, examples[1]], 0))
    assert body[0] == end[0] > 0


def test_the_stage_has_every_members_losses_at_the_late_snapshot(store: Path) -> None:  # noqa: F811
    line = line_of(store, "scorer=contrast", "scorer.neighbours=5")
    found = read_answer_losses(line.answer_losses, 40)
    assert found.body.shape == found.end.shape == found.other.shape == (2, 40)
    texts = line.proxy_inputs.encoded
    for index, (chain, body, end, other) in enumerate(zip(line.adapters, *vars(found).values(), strict=True)):
        model = line.proxy_backbone.model
        adapted = lora.add_adapter(model, line.config.proxy.lora, 3)
        lora.load_adapter(adapted, chain[1].path)
        others = with_other_prompts(texts, derive_seed(line.config.seed, "other prompts", index))
        for example, swapped in list(zip(texts, others, strict=True))[::9]:
            expected = token_by_token(adapted.eval(), example.input_ids, example.is_response)
            np.testing.assert_allclose((body[example.row], end[example.row]), expected, rtol=1e-4)
            expected = token_by_token(adapted, swapped.input_ids, swapped.is_response)
            np.testing.assert_allclose(other[example.row], expected[0], rtol=1e-4)
        adapted.unload()


def test_every_example_gets_the_prompt_of_another_one() -> None:
    examples = [
        Encoded(i, i, np.array([100 + i] * (1 + i % 3) + [200 + i] * 4), np.array([False] * (1 + i % 3) + [True] * 4))
        for i in range(12)
    ]
    swapped = with_other_prompts(examples, seed=1)
    givers = []
    for example, text in zip(examples, swapped, strict=True):
        length = int(text.is_response.argmax())
        assert list(text.input_ids[length:]) == [200 + example.row] * 4
        assert text.is_response[length:].all()
        assert text.row == example.row
        givers.append(int(text.input_ids[0]) - 100)
        assert list(text.input_ids[:length]) == [100 + givers[-1]] * (1 + givers[-1] % 3)
    assert sorted(givers) == list(range(12))
    assert all(giver != row for row, giver in enumerate(givers))
    again = [int(text.input_ids[0]) - 100 for text in with_other_prompts(examples, seed=2)]
    assert again != givers


def test_a_prompt_is_cut_at_its_start_where_the_text_would_be_too_long() -> None:
    prompt = Encoded(0, 0, np.array([1, 2, 3, 4, 5, 6]), np.array([False] * 5 + [True]))
    answer = Encoded(1, 1, np.array([7, 8, 8, 8, 8]), np.array([False] + [True] * 4))
    _, swapped = with_other_prompts([prompt, answer], seed=0)
    assert list(swapped.input_ids) == [4, 5, 8, 8, 8, 8]  # six tokens, as the longest example has


def test_a_start_token_that_all_examples_have_is_not_cut() -> None:
    prompt = Encoded(0, 0, np.array([9, 2, 3, 4, 5, 6]), np.array([False] * 5 + [True]))
    answer = Encoded(1, 1, np.array([9, 8, 8, 8, 8]), np.array([False] + [True] * 4))
    _, swapped = with_other_prompts([prompt, answer], seed=0)
    assert list(swapped.input_ids) == [9, 5, 8, 8, 8, 8]


def test_the_other_prompt_differs_from_the_own_or_there_is_none() -> None:
    examples = [Encoded(i, i, np.array([1, i // 4, 50]), np.array([False, False, True])) for i in range(40)]
    swapped = with_other_prompts(examples, seed=0)
    assert all(text.input_ids[1] != example.input_ids[1] for example, text in zip(examples, swapped, strict=True))
    alike = [Encoded(i, i, np.array([1, 2, 50 + i]), np.array([False, False, True])) for i in range(5)]
    assert with_other_prompts(alike, seed=0) == [None] * 5
    assert with_other_prompts(alike[:1], seed=0) == [None]
    assert with_other_prompts([], seed=0) == []


def test_conversations_with_several_replies_have_no_gain(store: Path) -> None:  # noqa: F811
    line = line_of(store, "scorer=contrast", "scorer.neighbours=5")
    inputs = line.proxy_inputs
    texts = [replace(text, is_response=text.is_response.copy()) for text in inputs.encoded[:12]]
    for text in texts[:3]:
        text.is_response[1], text.is_response[2] = True, False  # a reply before the last one
    adapted = lora.add_adapter(line.proxy_backbone.model, line.config.proxy.lora, 3)
    columns = collect_losses(adapted, inputs._replace(encoded=texts), lambda done: None, Journal(), seed=1)
    adapted.unload()
    assert np.isnan(columns["other"]).tolist() == [True] * 3 + [False] * 9
    assert np.isfinite(columns["body"]).all()
    examples, found = pool(60), losses(2, 60)
    found.other[:, :20] = np.nan
    options = {"neighbours": 7, "end_share": 0.33, "caution": 1.0, **RANKED}
    without, score = (contrast(found, examples, prompt_weight=weight, **options).score for weight in (0.0, 4.0))
    np.testing.assert_array_equal(score[:20], without[:20])
    assert (score[20:] < without[20:]).any()
    found.other[:, 19:] = np.nan
    found.other[:, :19] = found.body[:, :19]  # fewer gains than a mean can be taken of
    np.testing.assert_array_equal(contrast(found, examples, prompt_weight=4.0, **options).score, without)


# ---------------------------------------------------------------------------------------------- the score


def by_hand(
    found: AnswerLosses,
    prompts: list[str],
    lengths: list[int],
    neighbours: int,
    share: float,
    weight: float,
    caution: float,
) -> list[float]:
    """Return the scores from the formula, with one cosine after the other."""
    vectors = prompt_vectors(prompts)
    vectors = np.asarray(vectors.todense() if hasattr(vectors, "todense") else vectors)
    by_length = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    gains = []  # [member][row]
    for body in found.body:
        other = [statistics.fmean(losses) for losses in found.other.T]
        logs = [math.log((o + 1e-3) / (b + 1e-3)) for b, o in zip(body, other, strict=True)]
        gains.append([])
        for i, log in enumerate(logs):
            first = min(max(by_length.index(i) - 50, 0), max(len(prompts) - 101, 0))
            like = [logs[j] for j in by_length[first : first + 101] if j != i]
            gains[-1].append((log - statistics.fmean(like)) / max(0.1, statistics.pstdev(like)))
    scores = []
    for i, vector in enumerate(vectors):
        order = sorted((j for j in range(len(prompts)) if j != i), key=lambda j: -float(vector @ vectors[j]))
        each = []
        for body, end, gain in zip(found.body, found.end, gains, strict=True):
            usual_body, usual_end = statistics.fmean(body), statistics.fmean(end)
            relative = [(b / usual_body, e / usual_end) for b, e in zip(body, end, strict=True)]
            logs = [math.log((1 - share) * b + share * e + 1e-3) for b, e in relative]
            others = [logs[j] for j in order[:neighbours]]
            each.append((statistics.fmean(others) - logs[i]) / max(0.1, statistics.pstdev(others)))
            each[-1] += weight * min(0.0, gain[i] + 1.0)
        scores.append(statistics.fmean(each) - caution * statistics.pstdev(each))
    return scores


@pytest.mark.parametrize(("share", "weight", "caution"), [(0.5, 0.0, 1.0), (0.0, 4.0, 0.0), (1.0, 1.5, 2.0)])
def test_the_score_is_the_formula(share: float, weight: float, caution: float) -> None:
    examples, found = pool(150), losses(3, 150)
    examples = [replace(example, output="x" * (i * 7 % 40)) for i, example in enumerate(examples)]
    examples[7] = replace(
        examples[7], instruction="??!"
    )  # no word: equally far from all others, so any are its neighbours
    options = {"neighbours": 7, "end_share": share, "prompt_weight": weight, "caution": caution, **RANKED}
    scores = contrast(found, examples, **options)
    prompts, lengths = (
        [f(example) for example in examples] for f in (lambda e: e.instruction, lambda e: len(e.output))
    )
    expected = by_hand(found, prompts, lengths, 7, share, weight, caution)
    np.testing.assert_allclose(np.delete(scores.score, 7), np.delete(expected, 7), rtol=1e-9)
    assert np.isfinite(scores.score[7])
    np.testing.assert_array_equal(scores.score, scores.parts["bound"])
    np.testing.assert_allclose(scores.parts["end_loss"], found.end.mean(0))
    np.testing.assert_allclose(scores.parts["other_loss"], found.other.mean(0))


def test_an_answer_that_any_prompt_makes_as_likely_falls_below_the_others() -> None:
    examples, found = pool(300), losses(3, 300)
    found.other[:] = found.body * np.random.default_rng(1).uniform(2, 4, 300)
    alike, helped = np.arange(0, 300, 15), np.arange(1, 300, 15)
    found.other[:, alike] = found.body[:, alike] * 1.01
    options = {"neighbours": 20, "end_share": 0.33, "caution": 1.0, **RANKED}
    without, score = (contrast(found, examples, prompt_weight=weight, **options).score for weight in (0.0, 4.0))
    assert np.median(without[alike]) > np.quantile(without, 0.3)
    assert np.median(score[alike]) < np.quantile(score, 0.1)
    # a prompt that helps more than usual does not raise a score
    found.other[:, helped] *= 10
    usual = contrast(found, examples, prompt_weight=0.0, **options).score
    assert (contrast(found, examples, prompt_weight=4.0, **options).score[helped] <= usual[helped] + 1e-12).all()


def test_gains_are_compared_with_those_of_answers_of_like_length() -> None:
    """A factor on the gains of long answers changes nothing."""
    examples = [replace(example, output="x" * (5 if i < 150 else 500)) for i, example in enumerate(pool(300))]
    found = losses(2, 300)
    options = {"neighbours": 20, "end_share": 0.33, "prompt_weight": 4.0, "caution": 1.0, **RANKED}
    before = contrast(found, examples, **options).score
    found.other[:, 150:] *= 0.2
    after = contrast(found, examples, **options).score
    inner = np.r_[0:100, 200:300]  # all neighbours in length are of the same length
    np.testing.assert_allclose(after[inner], before[inner], atol=0.05)


def test_neighbours_in_length_are_the_next_in_order() -> None:
    found = nearest_lengths([50, 10, 20, 20, 40, 30], 2)
    assert [set(map(int, row)) for row in found] == [{4, 5}, {2, 3}, {1, 3}, {2, 5}, {5, 0}, {3, 4}]
    assert [set(map(int, row)) for row in nearest_lengths([3, 1, 2], 9)] == [{1, 2}, {0, 2}, {0, 1}]


def test_answers_that_no_prompt_makes_likelier_are_compared_by_their_losses_alone() -> None:
    """Without instructions in the data no answer depends on its prompt, and rounding must not decide."""
    examples, found = pool(90), losses(2, 90)
    found.body[:] = found.body[0]
    found.other[:] = found.body * (1 + 1e-4 * np.random.default_rng(2).normal(size=found.body.shape))
    options = {"neighbours": 7, "end_share": 0.33, "caution": 1.0, **RANKED}
    without, score = (contrast(found, examples, prompt_weight=weight, **options).score for weight in (0.0, 4.0))
    np.testing.assert_allclose(score, without, atol=0.1)


def test_the_units_of_bodies_and_ends_do_not_matter() -> None:
    """In one dataset an end costs a tenth of a body's token, in another as much: the selection is the same."""
    examples, in_nats = pool(90), losses(3, 90)
    rescaled = AnswerLosses(in_nats.body * 0.2, in_nats.end * 7.0, in_nats.other * 0.2)
    options = {"neighbours": 7, "end_share": 0.3, "prompt_weight": 0.0, "caution": 1.0, **RANKED}
    before, after = (contrast(each, examples, **options).score for each in (in_nats, rescaled))
    np.testing.assert_allclose(after, before, rtol=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_ends_that_are_learnt_by_heart_count_for_nothing(size: float) -> None:
    in_nats = losses(2, 90)
    in_nats.end[:] *= size
    options = {"neighbours": 7, "prompt_weight": 0.0, "caution": 1.0, **RANKED}
    with_ends = contrast(in_nats, pool(90), end_share=0.3, **options).score
    without = contrast(in_nats, pool(90), end_share=0.0, **options).score
    np.testing.assert_allclose(with_ends, without, atol=0.02)


def test_neighbours_are_prompts_of_the_same_kind_and_never_the_row_itself() -> None:
    prompts = [example.instruction for example in pool(90)]
    nearest = nearest_prompts([*prompts, *prompts[:3]], 20)
    kind = np.arange(93) % 3
    assert (kind[nearest] == kind[:, None]).mean() > 0.95
    assert not (nearest == np.arange(93)[:, None]).any()  # although three rows have a twin
    assert 90 in nearest[0]


def test_prompts_without_a_word_are_near_to_each_other_alone() -> None:
    prompts = [example.instruction for example in pool(90)] + ["??", "...", "!"]
    nearest = nearest_prompts(prompts, 2)
    assert sorted(nearest[90]) == [91, 92]
    assert not (nearest[:90] >= 90).any()


def test_a_kind_of_task_that_is_easy_gains_nothing() -> None:
    """A factor on all losses of one kind moves its late loss, not its contrast."""
    examples, found = pool(300), losses(2, 300)
    easy = np.where(np.arange(300) % 3 == 0, 0.05, 1.0)
    scaled = AnswerLosses(found.body * easy, found.end * easy, found.other * easy)
    options = {"neighbours": 20, "end_share": 0.5, "prompt_weight": 4.0, "caution": 1.0, **RANKED}
    before, after = (contrast(each, examples, **options).score for each in (found, scaled))
    assert np.corrcoef(before, after)[0, 1] > 0.99
    top = np.argsort(-after)[:30] % 3
    assert np.bincount(top, minlength=3).min() >= 5


def test_the_best_fifth_is_drawn_at_random_and_stays_above_the_rest() -> None:
    bound = np.array([np.nan, *np.random.default_rng(5).normal(size=50)])
    drawn = saturated(bound, 0.2, seed=1)
    best = np.argsort(-bound[1:])[:10] + 1
    others = np.setdiff1d(np.arange(1, 51), best)
    np.testing.assert_array_equal(drawn[others], bound[others])
    assert drawn[best].min() >= bound[best].min() > bound[others].max()
    assert np.isnan(drawn[0])
    assert list(np.argsort(-drawn[best])) != list(range(10))
    assert (drawn[best] != saturated(bound, 0.2, seed=2)[best]).all()
    np.testing.assert_array_equal(saturated(bound, 0.0, seed=1), bound)


def test_disagreement_of_the_members_lowers_a_score() -> None:
    values = np.zeros((2, 60))
    values[:, :30] = -1.0
    values[0, 0], values[1, 0] = -3.0, 1.0  # row 0: the same mean as rows 1 to 29, but the members differ
    examples = pool(60)
    found = AnswerLosses(*[np.exp(values)] * 3)
    scores = contrast(found, examples, neighbours=10, end_share=0.5, prompt_weight=4.0, caution=1.0, **RANKED)
    assert scores.score[0] < scores.parts["contrast"][0] - 1
    assert scores.score[3] == pytest.approx(scores.parts["contrast"][3], abs=0.5)


def test_equal_neighbours_give_finite_scores() -> None:
    flat = AnswerLosses(*np.ones((3, 2, 30)))
    flat.body[:, 4] = 2.0
    contrasts = contrast_with(np.log(flat.body), np.array([[j for j in range(30) if j != i] for i in range(30)]))
    assert np.isfinite(contrasts).all()
    assert contrasts[0, 4] == pytest.approx(-math.log(2) / 0.1)


def test_rows_without_a_response_are_undefined_and_nobodys_neighbours() -> None:
    examples, found = pool(40), losses(2, 40)
    found.body[:, [3, 9]] = found.end[:, [3, 9]] = found.other[:, [3, 9]] = np.nan
    options = {"neighbours": 6, "end_share": 0.5, "prompt_weight": 0.0, "caution": 1.0, **RANKED}
    scores = contrast(found, examples, **options)
    assert set(scores.reason[[3, 9]]) == {NO_RESPONSE}
    kept = [i for i in range(40) if i not in (3, 9)]
    alone = contrast(
        AnswerLosses(*(part[:, kept] for part in vars(found).values())), [examples[i] for i in kept], **options
    )
    np.testing.assert_allclose(scores.score[kept], alone.score)


def test_too_few_rows_name_the_option() -> None:
    with pytest.raises(ConfigError, match=r"scorer\.neighbours=50 needs more than 50 examples .* there are 40"):
        contrast(losses(2, 40), pool(40), neighbours=50, end_share=0.5, prompt_weight=4.0, caution=1.0, **RANKED)


@pytest.mark.parametrize(
    "override",
    [
        "scorer.neighbours=1",
        "scorer.end_share=1.5",
        "scorer.caution=-1",
        "scorer.end_share=nan",
        "scorer.prompt_weight=-1",
    ],
)
def test_constants_out_of_range_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        composed("scorer=contrast", override)


def test_a_run_needs_members_but_no_norms(after_smoke) -> None:
    assert after_smoke(*SMOKE, "method=contrast", "scorer.neighbours=20", "stop_after=selection") == 0
    (run,) = after_smoke.runs()
    units = {unit["name"] for unit in run["stages"]}
    assert {"member", "losses"} <= units
    assert "norms" not in units
    assert run["diagnostics"]["adapter_spread"]


def test_what_the_rows_do_not_allow_is_refused_before_anything_is_trained(gradsift, capsys) -> None:
    for options, words in (
        (("scorer=contrast",), "scorer.neighbours=200 needs more than 200 examples"),
        (("selector=quotas", "selector.column=kind"), "selector.column=kind is no column of the data"),
    ):
        neighbours = ("scorer.neighbours=200",) if "scorer=contrast" in options else ()
        assert gradsift(*SMOKE, *options, *neighbours, "stop_after=selection") == 2
        assert words in capsys.readouterr().err
    assert not (gradsift.store / "member").exists()


# ---------------------------------------------------------------------------------------------- random clean


def test_random_clean_rows_are_the_random_rows_that_are_clean() -> None:
    quality = ["clean", "truncated", "exact_duplicate", "clean"] * 5
    scores = random_clean(Labels(quality, None), 20, seed=3)
    assert [status == SCORED for status in scores.status] == [each == "clean" for each in quality]
    assert set(scores.status) == {SCORED, EXCLUDED}
    np.testing.assert_array_equal(scores.score, random(20, seed=3).score)


def test_random_clean_needs_labels() -> None:
    with pytest.raises(ConfigError, match="scorer=random_clean needs rows with known quality"):
        random_clean(None, 3, seed=0)
