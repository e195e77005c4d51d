"""Greedy answers, compared with a slow definition, and the model_outputs file."""

from __future__ import annotations

import json
import os
import random
import warnings
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import exact_copy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import (
    check_pairs,
    generate_answers,
    model_outputs,
    read_model_outputs,
    read_pair,
    write_model_outputs,
)

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

VOCABULARY = 40
CONTEXT = 48
LEAST_MARGIN = 1e-4  # of the best logit over the second; rounding errors of these logits are below 1e-5


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w2 to w39, whose end token is also its padding token."""
    words = {"<end>": 0, "<unk>": 1} | {f"w{n}": n for n in range(2, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def tiny_model(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        config: Any = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = LlamaForCausalLM(config)
    # with the usual, smaller initialisation a random model repeats its last word
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def ragged_prompts(count: int = 13) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def slow_answer(exact: Any, prompt: list[int], new_tokens: int) -> str:
    """Return the answer by its definition: one prompt, no padding, no cache, the most likely token in float64.

    Fails if the two most likely tokens are so close that rounding could decide between them.
    """
    tokens = list(prompt)[-(CONTEXT - new_tokens) :]
    answer = []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits, words = exact(input_ids=torch.tensor([tokens])).logits[0, -1].topk(2)
        assert logits[0] - logits[1] > LEAST_MARGIN
        token = int(words[0])
        if token == 0:
            break
        answer.append(f"w{token}" if token > 1 else "")
        tokens.append(token)
    return " ".join(word for word in answer if word)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_batch_size_and_padding_do_not_change_greedy_answers(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    prompts = [*ragged_prompts(), list(range(2, VOCABULARY)) * 2]  # the last one exceeds the context
    exact = exact_copy(model.eval())
    expected = [slow_answer(exact, prompt, 10) for prompt in prompts]
    assert len(set(expected)) > 5  # the answers differ between prompts
    for batch_size in (1, 3, 14, 50):
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size)
        assert answers == expected


def test_an_answer_ends_before_the_end_token() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    prompts = ragged_prompts()
    free = generate_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=4)
    last = int(free[0].split()[-1][1:])
    model.generation_config.eos_token_id = [0, last]  # chat models can have several end tokens
    cut = generate_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=4)
    assert cut == [" ".join(takewhile(lambda word: word != f"w{last}", text.split())) for text in free]


def test_answers_are_greedy_and_silent_whatever_options_the_model_was_saved_with(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ragged_prompts()
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    saved = model.generation_config
    saved.temperature, saved.top_p, saved.repetition_penalty, saved.max_length = 0.6, 0.9, 3.0, 20
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4) == expected
    assert capfd.readouterr() == ("", "")
    assert model.generation_config is saved


def test_every_modules_training_mode_is_restored_and_dropout_is_off() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    answers = [generate_answers(model, tokenizer, ragged_prompts(), max_new_tokens=8, batch_size=5) for _ in range(2)]
    assert answers[0] == answers[1]
    assert [module.training for module in model.modules()] == modes


def test_lora_adapters_are_applied() -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer, prompts = tiny_tokenizer(), ragged_prompts()
    bare = generate_answers(tiny_model("llama"), tokenizer, prompts, max_new_tokens=6, batch_size=4)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4) == bare
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    assert adapted != bare
    exact = exact_copy(model.eval())
    assert adapted == [slow_answer(exact, prompt, 6) for prompt in prompts]


def test_progress_counts_answers_and_no_prompt_gives_no_answer() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    done: list[int] = []
    generate_answers(model, tokenizer, ragged_prompts(7), max_new_tokens=2, batch_size=3, progress=done.append)
    assert done == [3, 3, 1]
    assert generate_answers(model, tokenizer, [], max_new_tokens=2, batch_size=3) == []


def test_impossible_lengths_are_refused() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"benchmark\.max_new_tokens=48.*at most 47"):
        generate_answers(model, tokenizer, [[2]], max_new_tokens=CONTEXT, batch_size=1)
    done: list[int] = []
    with pytest.raises(DataError, match="prompt 2 of 2 has no token"):
        generate_answers(model, tokenizer, [[2], []], max_new_tokens=2, batch_size=1, progress=done.append)
    assert not done  # no answer was generated before the error


# ------------------------------------------------------------------------------------- model_outputs

ITEMS = [Item("vicuna", "1", "Say hi \u05d0\ud800", "", None), Item("sums", "1", "Add", "2 3", "5")]


def test_model_outputs_are_read_as_written_and_have_alpaca_evals_keys(tmp_path: Path) -> None:
    rows = model_outputs(ITEMS, ["hi\u2028", "5"], "gradsift-a")
    write_model_outputs(tmp_path / "model_outputs.json", rows)
    assert read_model_outputs(tmp_path / "model_outputs.json") == rows
    assert {"instruction", "output", "generator", "dataset", "datasplit"} <= rows[0].keys()
    assert (rows[1]["item_id"], rows[1]["input"], rows[1]["reference"]) == ("1", "2 3", "5")


def test_pairs_that_do_not_match_are_refused_with_the_differing_rows(tmp_path: Path) -> None:
    rows = model_outputs(ITEMS, ["hi", "5"], "a")
    other = model_outputs([ITEMS[1], Item("vicuna", "1", "Say bye", "", None)], ["5", "bye"], "b")
    with pytest.raises(DataError, match=r"vicuna/1 \(different instruction\)") as error:
        check_pairs(rows, other)
    assert "sums/1" not in str(error.value)
    with pytest.raises(DataError, match=r"sums/1 \(only in the model's answers\)"):
        check_pairs(rows, rows[:1])
    write_model_outputs(tmp_path / "a.json", rows)
    write_model_outputs(tmp_path / "b.json", other)
    with pytest.raises(DataError, match=r"a\.json and .*b\.json.*vicuna/1"):
        read_pair(tmp_path / "a.json", tmp_path / "b.json")
    check_pairs(rows, rows[::-1])  # the order of rows is free


def test_an_id_may_be_a_whole_number(tmp_path: Path) -> None:
    row = {"instruction": "x", "output": "y"}
    (tmp_path / "m.json").write_text(json.dumps([row | {"item_id": 7}, row]))
    assert [row["item_id"] for row in read_model_outputs(tmp_path / "m.json")] == ["7", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"instruction": "x", "outp', "not valid JSON"),
        ("[]", "not a list of answers"),
        ('[{"instruction": "x"}]', "row 1: output is missing"),
        ('[{"instruction": "x", "output": "y", "item_id": true}]', "row 1: item_id"),
        ("[4]", "row 1 is of type int"),
        (
            json.dumps([{"instruction": "x", "output": "y", "item_id": "a"}] * 2),
            "same item",
        ),
    ],
)
def test_a_broken_file_of_answers_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(DataError, match=words) as error:
        read_model_outputs(tmp_path / "m.json")
    assert "m.json" in str(error.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_model_outputs(tmp_path / "none.json")


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")
def test_alpaca_evals_own_files_are_read_as_pairs() -> None:
    folder = Path(os.environ["GRADSIFT_DATA"]) / "alpaca_eval"
    rows, reference_rows = read_pair(folder / "alpaca-7b.json", folder / "text_davinci_003.json")
    assert len(rows) == len(reference_rows) == len(json.loads((folder / "alpaca-7b.json").read_text())) == 805
