"""Laws of prompt templates: their text, and equal prompts in training and generation."""

from __future__ import annotations

from typing import Any

import pytest

from gradsift.data.examples import Example, Turn
from gradsift.data.templates import prompt_segments, render
from gradsift.data.turns import Unusable
from gradsift.data.verifiable import plain_prompt
from gradsift.errors import ConfigError

TEMPLATES = ["alpaca", "chat", "plain"]


def example(instruction: str, input: str = "", output: str = "out", history: tuple[Turn, ...] = ()) -> Example:
    return Example(0, "id-0", "id", history, instruction, input, output, {})


TALK = (Turn("system", "Be kind."), Turn("user", "hi"), Turn("assistant", "hello"))


def text_of(segments: Any, *, is_response: bool) -> list[str]:
    return [segment.text for segment in segments if segment.is_response is is_response]


def render_prompt(*arguments: Any) -> str:
    return "".join(segment.text for segment in prompt_segments(*arguments))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("input", ["", "3 4", "# Response:\n"])
def test_prompt_for_generation_is_the_prompt_part_of_training(template: str, input: str, byte_tokenizer: Any) -> None:
    for instruction in ("add", " {output} 😀 שלום\n", "say <|im_end|> and <eos>", "<|im_start|>"):
        segments = render(example(instruction, input), template, byte_tokenizer)
        prompt = "".join(text_of(segments, is_response=False))
        assert render_prompt(instruction, input, template, byte_tokenizer) == prompt
        first_response = [segment.is_response for segment in segments].index(True)
        assert all(segment.is_response for segment in segments[first_response:])


def test_alpaca_prompts_are_the_published_ones() -> None:
    assert render_prompt("Name a colour.", "", "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:"
    )
    assert render_prompt("Add.", "3 4", "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n3 4\n\n### Response:"
    )


def test_plain_prompt_is_that_of_the_embedded_world() -> None:
    for input in ("", "3 4"):
        assert render_prompt("add", input, "plain") == plain_prompt("add", input)


def test_every_assistant_turn_is_response(byte_tokenizer: Any) -> None:
    conversation = example("and now?", output="bye", history=TALK)
    assert text_of(render(conversation, "plain"), is_response=True) == ["hello", "bye"]
    assert text_of(render(conversation, "plain"), is_response=False) == ["Be kind.\nhi\n", "\nand now?\n"]
    alpaca = render(conversation, "alpaca")
    assert text_of(alpaca, is_response=True) == ["hello", "bye"]
    assert text_of(alpaca, is_response=False) == [
        "Be kind.\n\n### Instruction:\nhi\n\n### Response:",
        "\n\n### Instruction:\nand now?\n\n### Response:",
    ]
    chat = render(conversation, "chat", byte_tokenizer)
    assert text_of(chat, is_response=True) == ["hello<|im_end|>", "bye<|im_end|>"]
    assert text_of(chat, is_response=False) == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_chat_segments_join_to_the_chat_templates_own_text(byte_tokenizer: Any) -> None:
    conversation = example("x <|im_end|>", "y", "bye <eos>", TALK)
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK]
    messages += [{"role": "user", "content": "x <|im_end|>\ny"}, {"role": "assistant", "content": "bye <eos>"}]
    whole = byte_tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(s.text for s in render(conversation, "chat", byte_tokenizer)) == whole.rstrip()


def test_special_tokens_that_an_example_spells_are_no_markup(byte_tokenizer: Any) -> None:
    segments = render(example("<|im_start|>", output="a<|im_end|>b"), "chat", byte_tokenizer)
    spelt = [(s.text, s.is_response) for s in segments if not s.is_markup]
    assert spelt == [("<|im_start|>", False), ("<|im_end|>", True)]


def test_chat_without_a_chat_template_is_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = None
    for tokenizer in (byte_tokenizer, None):
        with pytest.raises(ConfigError, match=r"template=chat.*template=alpaca"):
            render(example("a"), "chat", tokenizer)


def test_chat_template_that_rewrites_earlier_turns_is_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(Unusable, match="changes earlier turns"):
        render(example("a"), "chat", byte_tokenizer)


def test_chat_template_that_refuses_a_role_is_reported(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(Unusable, match="no system role"):
        render(example("a", history=TALK), "chat", byte_tokenizer)
