"""Laws of the random byte-level model: it restores any text, and its seed determines its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import example
from transformers import AutoTokenizer

from gradsift.config import FieldsConfig
from gradsift.data.files import read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import encode, encode_prompt
from gradsift.scoring.superfilter import ifd_spans
from gradsift.training.nano import BYTES_CONTEXT, bytes_model, bytes_tokenizer

TOKENIZER = bytes_tokenizer()
AWKWARD = ["", "é 🟥 👩‍👩‍👧", " a  b .\r\n\t\u00a0", "e\u0301 vs é", "\ufffd\u200b", "say <eos> and <pad>, can't you ?"]


@pytest.fixture(params=["as built", "as AutoTokenizer reads it"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "as built":
        return bytes_tokenizer()
    bytes_model().save_pretrained(tmp_path)  # whose config.json names an architecture
    bytes_tokenizer().save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_is_its_bytes_and_comes_back(text: str, tokenizer: Any) -> None:
    (ids,) = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode())
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer([text], add_special_tokens=False)["input_ids"][0]) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_a_token_and_the_special_ones_stand_beside_them(tokenizer: Any) -> None:
    assert len(tokenizer) == 258
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {256, 257}
    assert tokenizer.bos_token_id is None  # so no token is put before a text
    assert tokenizer.unk_token_id is None
    assert tokenizer.model_max_length == BYTES_CONTEXT == 1024


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_an_encoded_example_is_its_prompt_and_its_response(template: str, tokenizer: Any) -> None:
    one = example("Say <eos> 🟥", "né <pad>", input="x")
    (encoded,), _ = encode([one], tokenizer, template, BYTES_CONTEXT)
    prompt = encode_prompt(one.instruction, one.input, tokenizer, template)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert encoded.is_response.tolist() == [False] * len(prompt) + [True] * (len("né <pad>".encode()) + 1)
    response = encoded.input_ids[encoded.is_response].tolist()
    assert (tokenizer.decode(response[:-1]), response[-1]) == ("né <pad>", tokenizer.eos_token_id)


def test_superfilter_scores_the_bytes_of_the_answer(tokenizer: Any) -> None:
    one = example("Add.", "né 🟥", input="1 2")
    (alone,), (together,) = ifd_spans(tokenizer, [one], BYTES_CONTEXT)
    count = len(one.output.encode())
    assert (alone.scored, together.scored) == (count - 1, count)
    assert together.input_ids[together.is_response].tolist() == alone.input_ids.tolist()


def test_the_model_has_about_a_million_parameters_and_takes_every_id_and_place() -> None:
    model = bytes_model()
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert model.config.n_positions == BYTES_CONTEXT
    assert len(TOKENIZER) <= model.config.vocab_size
    ids = torch.full((1, BYTES_CONTEXT), 257)
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_the_model_is_drawn_by_its_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = bytes_model(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # what the process draws next is not touched
    torch.manual_seed(4)
    same, other = (bytes_model(seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is unset: no real data here")
def test_real_alpaca_rows_come_back() -> None:
    path = Path(os.environ["GRADSIFT_DATA"]) / "instruct" / "alpaca_gpt4_999.json"
    texts = [one.output for one in parse_rows(read_rows(path), "auto", FieldsConfig())[0]]
    ids = TOKENIZER(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert TOKENIZER.batch_decode(ids) == texts
