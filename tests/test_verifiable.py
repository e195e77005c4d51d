"""Laws of the embedded world: answers can be checked, labels are true, shares are exact, nothing leaks."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.verifiable import (
    DEFINING,
    DELAYED,
    DUPLICATES,
    FAMILIES,
    MARK,
    NUMBERS,
    OPERATIONS,
    SPOILT,
    SYLLABLES,
    VOCABULARY,
    Task,
    World,
    answers_match,
    effective_families,
    further_rows,
    generate,
    plain_prompt,
    pretraining_rows,
    task_of,
)
from gradsift.errors import ConfigError
from gradsift.training.nano import nano_model, nano_tokenizer, pretrain

ARGUMENT_WORDS = {*NUMBERS, *SYLLABLES, MARK}


def rows_of(world: World, *qualities: str) -> list[tuple[dict[str, str], str]]:
    """Return the rows of these qualities, each with its family."""
    pairs = zip(world.rows, world.labels, strict=True)
    return [(row, label.family) for row, label in pairs if label.quality in qualities]


def arguments_of(row: dict[str, str]) -> str:
    """Return a task's arguments, which are in the instruction or in the input."""
    words = (row["instruction"] + " " + row["input"]).split()
    return " ".join(word for word in words if word in ARGUMENT_WORDS)


def right_answer(row: dict[str, str], family: str) -> str:
    assert task_of(row["instruction"], row["input"]).question[0] == family
    return task_of(row["instruction"], row["input"]).answer


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request: pytest.FixtureRequest) -> World:
    return generate(size=1500, benchmark_items=390, seed=request.param)


def test_equal_seeds_give_equal_worlds_and_other_seeds_others() -> None:
    assert generate(size=100, seed=3) == generate(size=100, seed=3)
    assert generate(size=100, seed=3) != generate(size=100, seed=4)
    assert pretraining_rows(50, seed=3) == pretraining_rows(50, seed=3)
    assert pretraining_rows(50, seed=3) != pretraining_rows(50, seed=4)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 300),
    spoilt=st.floats(0, 0.6),
    duplicates=st.floats(0, 0.1),
    benchmark_items=st.integers(0, 50),
    seed=st.integers(0, 5),
)
def test_every_share_is_exact_to_rounding(
    size: int, spoilt: float, duplicates: float, benchmark_items: int, seed: int
) -> None:
    try:
        world = generate(size=size, spoilt=spoilt, duplicates=duplicates, benchmark_items=benchmark_items, seed=seed)
    except ConfigError:
        assert size < 20, "only a world of a few rows may lack clean rows at these shares"
        return
    counts = Counter(label.quality for label in world.labels)
    spoilt_counts = [counts[kind] for kind in SPOILT]
    duplicate_counts = [counts[kind] for kind in DUPLICATES]
    assert len(world.rows) == len(world.labels) == size
    assert len(world.benchmark) == benchmark_items
    assert sum(spoilt_counts) == round(size * spoilt) == sum(label.quality in SPOILT for label in world.labels)
    assert sum(duplicate_counts) == round(size * duplicates)
    assert max(spoilt_counts) - min(spoilt_counts) <= 1
    assert max(duplicate_counts) - min(duplicate_counts) <= 1
    for row, family in rows_of(world, *SPOILT):
        assert not answers_match(row["output"], right_answer(row, family))


def test_labels_name_known_qualities_and_families(world: World) -> None:
    assert {label.quality for label in world.labels} == {"clean", *SPOILT, *DUPLICATES}
    assert {label.family for label in world.labels} == set(FAMILIES)
    assert len(FAMILIES) >= 12


def test_clean_rows_and_duplicates_have_the_right_answer(world: World) -> None:
    for row, family in rows_of(world, "clean", *DUPLICATES):
        assert answers_match(row["output"], right_answer(row, family))


def test_families_are_equally_frequent_among_clean_rows(world: World) -> None:
    counts = Counter(family for _, family in rows_of(world, "clean"))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_benchmark_family_is_checkable(world: World) -> None:
    assert {item["family"] for item in world.benchmark} == set(FAMILIES)
    assert len({item["item_id"] for item in world.benchmark}) == len(world.benchmark)
    for item in world.benchmark:
        assert item["reference"] == right_answer(item, item["family"])


def test_wrong_answers_are_wrong_and_have_the_right_form(world: World) -> None:
    for row, family in rows_of(world, "wrong_answer", "contradictory"):
        right = right_answer(row, family)
        assert not answers_match(row["output"], right)
        assert len(row["output"].split()) == len(right.split())


def test_mismatched_answers_are_wrong_for_their_prompt(world: World) -> None:
    for row, family in rows_of(world, "mismatched_answer"):
        assert not answers_match(row["output"], right_answer(row, family))


def test_truncated_answers_are_shorter_beginnings_of_the_right_one(world: World) -> None:
    for row, family in rows_of(world, "truncated"):
        left, right = row["output"].split(), right_answer(row, family).split()
        assert 0 < len(left) < len(right)
        assert left == right[: len(left)]


def test_contradictory_rows_have_a_clean_twin_with_another_answer(world: World) -> None:
    clean = {(row["instruction"], row["input"]): row["output"] for row, _ in rows_of(world, "clean")}
    twins = [(row["instruction"], row["input"], row["output"]) for row, _ in rows_of(world, "contradictory")]
    for instruction, given_input, output in twins:
        assert not answers_match(output, clean[instruction, given_input])
    assert len({twin[:2] for twin in twins}) == len(twins)


def test_exact_duplicates_equal_a_clean_row_and_near_duplicates_reword_one(world: World) -> None:
    clean = rows_of(world, "clean")
    wordings = {(family, arguments_of(row)): row["instruction"] for row, family in clean}
    for row, family in rows_of(world, "exact_duplicate"):
        assert (row, family) in clean
    for row, family in rows_of(world, "near_duplicate"):
        assert row["instruction"] != wordings[family, arguments_of(row)]


def test_prompts_repeat_only_between_twins_and_exact_duplicates(world: World) -> None:
    repeatable = rows_of(world, "contradictory", "exact_duplicate")
    prompts = {(row["instruction"], row["input"]) for row in world.rows}
    assert len(prompts) == len(world.rows) - len(repeatable)


def test_no_benchmark_prompt_occurs_among_the_rows(world: World) -> None:
    prompts = {(row["instruction"], row["input"]) for row in world.rows}
    asked = [(item["instruction"], item["input"]) for item in world.benchmark]
    assert not prompts & set(asked)
    assert len(set(asked)) == len(asked)
    # Nor the same question in other words.
    questions = {(label.family, arguments_of(row)) for row, label in zip(world.rows, world.labels, strict=True)}
    assert not questions & {(item["family"], arguments_of(item)) for item in world.benchmark}


def test_rows_are_shuffled(world: World) -> None:
    """The first and the last tenth of the rows have every quality: rows are shuffled."""
    tenth = len(world.labels) // 10
    for part in (world.labels[:tenth], world.labels[-tenth:]):
        assert {label.quality for label in part} == {"clean", *SPOILT, *DUPLICATES}


def test_all_text_is_single_spaced_words_of_the_vocabulary(world: World) -> None:
    known = set(VOCABULARY)
    assert len(known) == len(VOCABULARY)
    for row in world.rows + world.benchmark:
        for name in ("instruction", "input", "output", "reference"):
            words = row.get(name, "").split(" ") if row.get(name) else []
            assert known.issuperset(words)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 100_000}, "size=100000"),
        ({"spoilt": 1.0}, "spoilt=1.0"),
        ({"duplicates": 1.5}, "duplicates=1.5"),
        ({"duplicates": 0.4}, "duplicates=0.4"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(**arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- delayed credit


def hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_without_delay_worlds_vocabulary_and_pretraining_text_are_those_of_before() -> None:
    """Hashes were recorded before the option existed: stored datasets and backbones must not change."""
    world = generate(size=1000, spoilt=0.3, duplicates=0.1, benchmark_items=390, seed=7)
    assert hash_of([world.rows, [asdict(label) for label in world.labels], world.benchmark]) == "b5c591d994252b49"
    assert hash_of(pretraining_rows(500, instructed_share=0.01)) == "259c552c0b583573"
    assert hash_of(VOCABULARY) == "5fb7a92092967cd3"


@pytest.fixture(scope="module")
def delayed_world() -> World:
    return generate(delayed=0.2, seed=1)


def test_a_share_of_rows_and_benchmark_is_delayed_and_half_as_much_defines(delayed_world: World) -> None:
    for families in ([label.family for label in delayed_world.labels], [i["family"] for i in delayed_world.benchmark]):
        counts = Counter(families)
        assert set(counts) == {*FAMILIES, DEFINING, DELAYED}
        assert counts[DELAYED] / len(families) == pytest.approx(0.2, abs=0.02)
        assert counts[DEFINING] / len(families) == pytest.approx(0.1, abs=0.02)
    spoilt = Counter(label.family for label in delayed_world.labels if label.quality in SPOILT)
    assert spoilt[DELAYED] / sum(spoilt.values()) == pytest.approx(0.2, abs=0.03)  # no cleaner than the others


@pytest.mark.parametrize(
    ("name", "after"), [("BA", "d c b a"), ("DI", "d b c a"), ("FO", "b c d"), ("KU", "A B C D"), ("LE", "b c d a")]
)
def test_operations_by_hand(name: str, after: str) -> None:
    assert " ".join(OPERATIONS[name](["a", "b", "c", "d"])) == after


def test_chained_answers_follow_from_what_named_rows_show(delayed_world: World) -> None:
    """Applying the named operations one after the other turns a chained row's words into its answer."""
    named = next(row for row, family in rows_of(delayed_world, "clean") if family == DEFINING)
    chained = [row for row, family in rows_of(delayed_world, "clean", *DUPLICATES) if family == DELAYED]
    assert len(chained) > 100
    for row in chained:
        names, words = row["input"].split(f" {MARK} ")
        first, second = names.split()
        assert first != second
        for name in (first, second):
            words = task_of(named["instruction"], f"{name} {MARK} {words}").answer
        assert row["output"] == words


def test_every_name_that_is_chained_is_defined_by_clean_rows(delayed_world: World) -> None:
    clean = rows_of(delayed_world, "clean")
    defined = Counter(row["input"].split()[0] for row, family in clean if family == DEFINING)
    used = {name for row, family in clean if family == DELAYED for name in row["input"].split()[:2]}
    assert used == set(OPERATIONS)
    assert min(defined[name] for name in used) >= 5


def test_delayed_rows_keep_to_the_vocabulary_and_their_labels_are_true(delayed_world: World) -> None:
    known = set(VOCABULARY)
    for row, label in zip(delayed_world.rows, delayed_world.labels, strict=True):
        assert known.issuperset(f"{row['instruction']} {row['input']} {row['output']}".split())
        assert answers_match(row["output"], right_answer(row, label.family)) is (label.quality not in SPOILT)


def test_the_limit_on_tasks_can_be_reached() -> None:
    assert len(generate(size=4000, spoilt=0.0, duplicates=0.0, benchmark_items=800).rows) == 4000


def test_a_family_whose_questions_are_all_taken_is_refused() -> None:
    family = task_of("add the two numbers", "1 2").family
    arguments = [f"{first} {second}" for first in range(20) for second in range(20)]
    taken = {Task(family, each, wording).prompt for each in arguments for wording in family.wordings}
    with pytest.raises(ConfigError, match="family='add' has no 1 questions left"):
        further_rows("add", 1, taken, seed=0)


def test_prompts_of_another_world_are_refused() -> None:
    with pytest.raises(ConfigError, match="write a poem"):
        task_of("write a poem", "")


def test_answers_match_ignores_white_space_only() -> None:
    assert answers_match(" ka  mo\n", "ka mo")
    assert not answers_match("KA mo", "ka mo")
    assert not answers_match("ka mo ti", "ka mo")
    assert not answers_match("", "ka")


def test_effective_families_counts_equal_shares_as_whole_families() -> None:
    assert effective_families([]) == 0.0
    assert effective_families(["sort"] * 9) == pytest.approx(1.0)
    assert effective_families(["sort", "copy", "add"] * 4) == pytest.approx(3.0)
    assert 1.0 < effective_families(["sort", "sort", "sort", "copy"]) < 2.0


def test_pretraining_rows_hold_exact_shares_and_right_answers() -> None:
    rows = pretraining_rows(1000, instructed_share=0.03)
    instructed = [(prompt, response) for prompt, response in rows if not prompt.startswith("#")]
    operators = Counter(prompt.split()[0] for prompt, _ in rows if prompt.startswith("#"))
    assert len(instructed) == 30
    assert sum(count for operator, count in operators.items() if operator[1:] not in FAMILIES) == 100
    assert set(FAMILIES) <= {operator[1:] for operator in operators}
    with pytest.raises(ConfigError, match=r"instructed_share=0\.95"):
        pretraining_rows(10, instructed_share=0.95)


def test_tokenizer_round_trip_loses_nothing_and_knows_every_word(world: World) -> None:
    tokenizer = nano_tokenizer()
    texts = [plain_prompt(row["instruction"], row["input"]) for row in world.rows] + [" ".join(VOCABULARY)]
    for text in texts + [prompt for prompt, _ in pretraining_rows(200)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == text.split()
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts[:-1])
    assert longest < tokenizer.model_max_length // 2, "an example must leave room for its answer"


def test_special_tokens_differ_except_bos_and_eos() -> None:
    tokenizer = nano_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("ka #copy <poem>\n", add_special_tokens=False)["input_ids"].count(tokenizer.unk_token_id) >= 1


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_nano_models_are_small_seeded_and_leave_the_global_seed_alone(architecture: str) -> None:
    before = torch.random.get_rng_state()
    model = nano_model(architecture, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 150_000 <= sum(weight.numel() for weight in model.parameters()) <= 300_000
    twin, other = (nano_model(architecture, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_pretraining_lowers_the_loss_reports_progress_and_repeats_exactly(architecture: str) -> None:
    tokenizer = nano_tokenizer()
    seen: list[float] = []
    model, twin = (nano_model(architecture) for _ in range(2))
    loss = pretrain(model, tokenizer, steps=30, batch_size=16, progress=seen.append)
    pretrain(twin, tokenizer, steps=30, batch_size=16)
    assert len(seen) == 30
    assert loss == pytest.approx(sum(seen[-3:]) / 3)
    assert loss < seen[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
