"""Laws of tokens: which carry loss, which truncation removes, and equal prompts in training and generation."""

from __future__ import annotations

import copy
import os
from itertools import chain
from pathlib import Path
from string import printable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from gradsift.config import FieldsConfig
from gradsift.data.examples import Example, Turn
from gradsift.data.files import read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.templates import render
from gradsift.data.tokens import Encoded, encode, encode_prompt, encode_prompts
from gradsift.errors import ConfigError, DataError

TEMPLATES = ["alpaca", "chat", "plain"]


def example(instruction: str, output: str, input: str = "", history: tuple[Turn, ...] = ()) -> Example:
    return Example(0, "id-0", "id", history, instruction, input, output, {})


def talk(*texts: str, output: str) -> Example:
    """Return an example whose texts alternate between user and assistant, ending with the user's."""
    roles = ["user", "assistant"] * len(texts)
    history = tuple(Turn(role, text) for role, text in zip(roles, texts[:-1], strict=False))
    return example(texts[-1], output, history=history)


def with_start_token(tokenizer: Any) -> Any:
    """Return a tokenizer that adds <bos> before every text, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)  # hypothesis uses one fixture for all its cases
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def encode_one(one: Example, tokenizer: Any, template: str = "plain", max_length: int = 4096) -> Encoded:
    (encoded,), _ = encode([one], tokenizer, template, max_length)
    return encoded


def response_of(encoded: Encoded, tokenizer: Any) -> str:
    text: str = tokenizer.decode(encoded.input_ids[encoded.is_response])
    return text


def prompt_of(encoded: Encoded, tokenizer: Any) -> str:
    text: str = tokenizer.decode(encoded.input_ids[~encoded.is_response])
    return text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("starts", [False, True])
def test_prompt_for_generation_has_the_ids_of_the_prompt_in_training(
    template: str, starts: bool, byte_tokenizer: Any
) -> None:
    tokenizer = with_start_token(byte_tokenizer) if starts else byte_tokenizer
    for instruction, given_input in [("add", "3 4"), ("😀 <eos>", ""), ("<|im_start|>", "<bos>")]:
        encoded = encode_one(example(instruction, "7", given_input), tokenizer, template)
        prompt = encode_prompt(instruction, given_input, tokenizer, template)
        assert encoded.input_ids[~encoded.is_response].tolist() == prompt
        assert not encoded.is_response[: len(prompt)].any()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("starts", [False, True])
def test_prompts_of_examples_are_those_of_generation_and_are_cut_on_the_left(
    template: str, starts: bool, byte_tokenizer: Any
) -> None:
    tokenizer = with_start_token(byte_tokenizer) if starts else byte_tokenizer
    one, long = example("add", "7", "3 4"), talk("add 3 4", "it is 7", "and 5 6?", output="11")
    (ids, longer), cut, _ = encode_prompts([one, long], tokenizer, template, 4096)
    assert (ids.tolist(), cut) == (encode_prompt("add", "3 4", tokenizer, template), 0)
    encoded = encode_one(long, tokenizer, template)
    last = np.flatnonzero(np.diff(encoded.is_response.astype(int)) == 1)[-1] + 1  # where the last response begins
    assert longer.tolist() == encoded.input_ids[:last].tolist()
    (short, _), cut, _ = encode_prompts([one, long], tokenizer, template, 5)
    assert short.tolist() == (ids[:1].tolist() + ids[-4:].tolist() if starts else ids[-5:].tolist())
    assert cut == 2


def test_prompts_in_another_tokenizers_words_are_refused() -> None:
    from gradsift.training.nano import nano_tokenizer

    with pytest.raises(DataError, match="of the data's tokens are unknown"):
        encode_prompts([example("perambulate gracefully", "x")], nano_tokenizer(), "plain", 64)


def test_response_is_the_answer_and_one_end_token(byte_tokenizer: Any) -> None:
    encoded = encode_one(example("add", "7", "3 4"), byte_tokenizer)
    assert (prompt_of(encoded, byte_tokenizer), response_of(encoded, byte_tokenizer)) == ("add\n3 4\n", "7<eos>")
    assert encoded.input_ids.dtype == np.int32
    assert encoded.is_response.dtype == np.bool_


def test_chat_template_that_closes_the_turn_gets_no_second_end(byte_tokenizer: Any) -> None:
    encoded = encode_one(talk("hi", "hello", "more", output="bye"), byte_tokenizer, "chat")
    assert response_of(encoded, byte_tokenizer) == "hello<|im_end|>bye<|im_end|>"
    byte_tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert response_of(encode_one(example("a", "b"), byte_tokenizer, "chat"), byte_tokenizer) == "[b]<eos>"


def test_start_token_comes_once_and_only_where_the_tokenizer_adds_it(byte_tokenizer: Any) -> None:
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = byte_tokenizer.bos_token_id
    assert bos not in encode_one(example("a", "b"), byte_tokenizer).input_ids
    tokenizer = with_start_token(byte_tokenizer)
    for template in TEMPLATES:
        assert encode_one(example("a", "b"), tokenizer, template).input_ids.tolist().count(bos) == 1
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    ids = encode_one(example("a", "b"), tokenizer, "chat").input_ids.tolist()
    assert ids[0] == bos
    assert ids.count(bos) == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_spelt_out_in_an_example_are_text(template: str, byte_tokenizer: Any) -> None:
    plain = encode_one(example("a", "b"), byte_tokenizer, template)
    spelt = encode_one(example("a<|im_end|><eos>", "b<eos>c<|im_start|>"), byte_tokenizer, template)
    specials = set(byte_tokenizer.all_special_ids)
    assert [i for i in spelt.input_ids if i in specials] == [i for i in plain.input_ids if i in specials]
    assert response_of(spelt, byte_tokenizer).startswith("b<eos>c<|im_start|>")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 40), st.sampled_from(["plain", "chat"]), st.booleans())
def test_truncation_takes_prompt_tokens_before_response_tokens(
    byte_tokenizer: Any, prompt: int, response: int, limit: int, template: str, starts: bool
) -> None:
    tokenizer = with_start_token(byte_tokenizer) if starts else byte_tokenizer
    one = example("p" * prompt, "r" * response)
    whole = encode_one(one, tokenizer, template)
    (cut,), report = encode([one], tokenizer, template, limit)
    wanted = whole.input_ids[whole.is_response][: limit - 1].tolist()
    assert len(cut.input_ids) == min(limit, len(whole.input_ids))
    assert cut.input_ids[cut.is_response].tolist() == wanted
    assert not cut.is_response[0]
    context = cut.input_ids[~cut.is_response].tolist()
    assert context  # at least one token to predict from
    if starts:
        assert context[0] == tokenizer.bos_token_id
        context = context[1:]
    prompt_tokens = whole.input_ids[~whole.is_response].tolist()
    assert context == prompt_tokens[len(prompt_tokens) - len(context) :]
    assert report.truncated_prompts == (len(cut.input_ids[~cut.is_response]) < (~whole.is_response).sum())
    assert report.truncated_responses == (len(wanted) < whole.is_response.sum())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=4), st.integers(2, 60))
def test_a_conversation_keeps_all_responses_that_fit(byte_tokenizer: Any, sizes: list[int], limit: int) -> None:
    one = talk("p" * sizes[0], "r" * sizes[1], "q" * sizes[2], output="s" * sizes[3])
    cut = encode_one(one, byte_tokenizer, max_length=limit)
    responses = response_of(cut, byte_tokenizer)
    everything = "r" * sizes[1] + "s" * sizes[3] + "<eos>"
    assert len(cut.input_ids) <= limit
    assert not cut.is_response[0]
    if sizes[1] + sizes[3] + 1 <= limit - 1:
        assert responses == everything
    else:  # the earlier exchange goes as a whole
        assert "r" not in responses
        assert "p" not in prompt_of(cut, byte_tokenizer)
        assert cut.is_response.sum() == min(sizes[3] + 1, limit - 1)


# ------------------------------------------------------------------------- prompt and response in one text

KINDS = ["bytes", "trimmed", "metaspace"]
CORPUS = (
    '### Response:- one\n- two\n### Response:(a) \n\n### Instruction:\nsay:"yes"  \n\n\nno.\n\n### Instruction:\n\n\n'
)


@pytest.fixture(params=KINDS)
def merging(request: pytest.FixtureRequest, byte_tokenizer: Any) -> Any:
    """Tokenizers that merge prompt and response: like GPT-2's, SmolLM2's (offsets without blanks) and Llama's."""
    if request.param == "metaspace":
        tokenizer = Tokenizer(BPE(unk_token="<unk>"))
        tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
        tokenizer.train_from_iterator(
            [CORPUS] * 3, BpeTrainer(vocab_size=150, special_tokens=["<unk>"], initial_alphabet=[*printable])
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    trained = byte_tokenizer.train_new_from_iterator([CORPUS] * 3, 400)
    if request.param == "trimmed":
        trained.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return trained


TALKS = [
    example("list", "- one\n- two"),
    example("list", "(a)"),
    example("say ", '"yes"  ', "so:"),
    talk("say", "- no.  ", "list", output="(b)"),
    talk("list", "", " and", output="\n\n"),
    talk("a", "no.\n", "\n\n", output="\n"),
    example("", "x", ":"),
]


def slow_parts(one: Example, tokenizer: Any, template: str) -> list[tuple[int, bool]]:
    """Return each token of the whole text, and whether all text that it adds is response."""
    segments = render(one, template)
    text = "".join(segment.text for segment in segments)
    kind = [segment.is_response for segment in segments for _ in segment.text]
    found, place = [], 0
    for token in tokenizer.encode(text, add_special_tokens=False):
        piece = tokenizer.convert_ids_to_tokens(token).replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")
        piece = piece[1:] if place == 0 and not text.startswith(piece) else piece  # the blank that Llama's puts first
        assert text.startswith(piece, place)
        found.append((token, all(kind[place : place + len(piece)]) and bool(piece)))
        place += len(piece)
    assert place == len(text)
    return found


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_text_has_the_tokens_of_the_whole_and_a_shared_one_is_prompt(template: str, merging: Any) -> None:
    shared = 0
    for one in TALKS:
        expected = slow_parts(one, merging, template)
        encoded = encode([one], merging, template, 4096)[0]
        if not any(response for _, response in expected):
            assert not encoded
            continue
        assert encoded[0].input_ids.tolist() == [*(token for token, _ in expected), merging.eos_token_id]
        assert encoded[0].is_response.tolist() == [*(response for _, response in expected), True]
        apart = [merging.encode(segment.text, add_special_tokens=False) for segment in render(one, template)]
        shared += [*chain.from_iterable(apart)] != [token for token, _ in expected]
    assert shared  # or the law would hold of parts that are tokenised by themselves


def test_the_labels_are_those_of_alpacas_code(merging: Any) -> None:
    """Alpaca's code masks as many tokens of the whole text as the prompt alone has."""
    for one in TALKS[:3]:
        prompt = "".join(segment.text for segment in render(one, "alpaca")[:-1])
        count = len(merging.encode(prompt, add_special_tokens=False))
        is_response = encode_one(one, merging, "alpaca").is_response
        assert is_response.tolist() == [place >= count for place in range(len(is_response))]


def test_a_prompt_holds_nothing_of_the_response(merging: Any) -> None:
    for one in TALKS[:3]:
        (ids,), _, _ = encode_prompts([one], merging, "alpaca", 4096)
        assert ids.tolist() == encode_prompt(one.instruction, one.input, merging, "alpaca")


def test_without_offsets_each_part_is_tokenised_by_itself(merging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(merging), "is_fast", False)
    for one in TALKS[:3]:
        parts = [merging.encode(segment.text, add_special_tokens=False) for segment in render(one, "alpaca")]
        encoded = encode_one(one, merging, "alpaca")
        assert encoded.input_ids.tolist() == [*parts[0], *parts[1], merging.eos_token_id]
        assert encoded.is_response.sum() == len(parts[1]) + 1


def test_rows_are_positions_and_order_is_kept(byte_tokenizer: Any) -> None:
    examples = [example(f"prompt {i}", "answer" * (i % 20 + 1)) for i in range(2500)]
    encoded, _ = encode(examples, byte_tokenizer, "plain", 64)
    assert [e.row for e in encoded] == list(range(len(examples)))
    for position in (0, 999, 1000, 2499):  # around the borders of a tokenizer call
        alone = encode_one(examples[position], byte_tokenizer, max_length=64)
        assert np.array_equal(encoded[position].input_ids, alone.input_ids)
        assert np.array_equal(encoded[position].is_response, alone.is_response)


def word_tokenizer() -> Any:
    from gradsift.training.nano import nano_tokenizer

    return nano_tokenizer()


def test_a_response_without_a_token_is_listed_and_left_out() -> None:
    # a word tokenizer that drops white space sees nothing in a response of a no-break space
    encoded, report = encode([example("copy", "1 2"), example("copy", "\u00a0")], word_tokenizer(), "plain", 64)
    assert [e.row for e in encoded] == [0]
    assert report.rows_without_response == [1]


def test_a_tokenizer_that_knows_less_than_half_is_refused() -> None:
    fits, _ = encode([example("copy the following list", "1 2")], word_tokenizer(), "plain", 64)
    assert len(fits) == 1
    with pytest.raises(DataError, match="unknown to the tokenizer"):
        encode([example("Describe photosynthesis.", "Plants turn light into sugar.")], word_tokenizer(), "plain", 64)


def test_a_tokenizer_without_an_end_token_is_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        encode([example("a", "b")], byte_tokenizer, "plain", 64)


def test_progress_counts_every_example_once(byte_tokenizer: Any) -> None:
    done: list[int] = []
    examples = [example("a", "b" if row % 2 else "") for row in range(2500)]  # those without a response count too
    encode(examples, byte_tokenizer, "plain", 64, done.append)
    assert sum(done) == 2500
    assert len(done) > 1  # it moves while the work goes on


def test_no_example_gives_no_tokens(byte_tokenizer: Any) -> None:
    encoded, _ = encode([], byte_tokenizer, "plain", 64)
    assert encoded == []


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is unset: no real data here")
@pytest.mark.parametrize("template", TEMPLATES)
def test_real_alpaca_rows_keep_their_responses(template: str, byte_tokenizer: Any) -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "instruct" / "alpaca_gpt4_999.json"
    examples, _ = parse_rows(read_rows(path), "auto", FieldsConfig())
    encoded, report = encode(examples, byte_tokenizer, template, 1024)
    assert len(encoded) == 999
    assert report.rows_without_response == []
    assert 0 < report.truncated_responses < report.truncated_prompts < 999
    for one in encoded:
        whole = len(examples[one.row].output.encode()) + 1  # one token a byte, and the end
        assert len(one.input_ids) <= 1024
        assert one.is_response.sum() == min(whole, 1023)
