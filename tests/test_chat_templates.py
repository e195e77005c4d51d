"""Laws of chat templates: which tokens are response, and that no text becomes a control token.

The templates of the families are those of the installed trl; without it, those tests are skipped.
"""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from gradsift.config import FieldsConfig
from gradsift.data.chat_templates import DATE, Segment, chat_segments
from gradsift.data.examples import Example, Turn
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import encode, encode_prompt, encode_prompts, template_identity
from gradsift.data.turns import Unusable
from gradsift.errors import ConfigError

FAMILIES = (
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "gemma", "gemma3", "gemma4"),
    *("glm4moe", "gptoss", "idefics3", "lfm2", "lfm2_2_5", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next"),
    *("muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "phi3"),
    *("phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    *("qwen3_instruct_2507", "qwen3_vl", "smolvlm", "cohere2_training", "cohere_training"),
    *("deepseek_r1_distill_training", "deepseekv3_training", "diffusion_gemma_training", "gemma3_training"),
    *("gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "gemma_training", "glm4moe_training", "gptoss_training"),
    *("idefics3_training", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_training", "lfm2_v2_training", "llama3_training"),
    *("llava_next_training", "muse_glimmer_training", "nemotron_3_5_lightning_training", "nemotron_3_nano_training"),
    *("nemotron_3_super_training", "nemotron_3_ultra_training", "phi3_5_training", "phi3_training"),
    *("qwen2_5_training", "qwen2_5_vl_training", "qwen3_5_nothink_training", "qwen3_5_think_training"),
    *("qwen3_6_training", "qwen3_8_training", "qwen3_instruct_2507_training", "qwen3_training", "qwen3_vl_training"),
    "smolvlm_training",
)
OPENS_A_THINK_BLOCK = ("deepseek_r1_distill", "deepseekv3")  # the generation prompt does, whole conversations do not
LAST_BEFORE = dict.fromkeys(OPENS_A_THINK_BLOCK, "\n</think>\n\n")  # closes that block before the last answer
NO_SYSTEM = ("gemma", "gemma_training")
BEFORE = {  # what the model generates before the text
    "glm4moe": "\n",
    "gptoss": "<|channel|>final<|message|>",
    "idefics3": " ",
    "llava_next": " ",
    "muse_glimmer": " to=user<|message|>",
    "smolvlm": " ",
}
ENDS = {
    **dict.fromkeys(OPENS_A_THINK_BLOCK, "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|end|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
LAST_ENDS = {"gptoss": "<|return|>", "gptoss_training": "<|return|>", "glm4moe": ""}
NO_END = ("diffusion_gemma_training",)  # its marks leave out the end of the turn
TURNS = [Turn("user", "What is 2 + 2?"), Turn("assistant", "It is four.")]
MORE = [*TURNS, Turn("user", "And 3 + 3?"), Turn("assistant", "Six.")]
TURN = {"role": "user", "content": "hi"}
BARS = "|\uff5c"  # DeepSeek writes the full-width one
CONTROL = re.compile(rf"<[{BARS}][^<>{BARS}\s]+[{BARS}]?>|<turn\|?>|<(?:start|end)_of_\w+>|</s>|<bos>")


def base(family: str) -> str:
    return (
        re.sub("_training$|_v[2-9]$", "", family) if family.startswith("gemma4") else family.removesuffix("_training")
    )


def template_text(family: str) -> str:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja"
    if not path.is_file():
        pytest.skip(f"the installed trl has no {path.name}")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def tokenizer_of(byte_tokenizer: Any) -> Any:
    def make(template: str) -> Any:
        """One token a byte; the template's control tokens are special, think blocks are ordinary added tokens."""
        byte_tokenizer.add_special_tokens({"additional_special_tokens": sorted({*CONTROL.findall(template), "<bos>"})})
        byte_tokenizer.bos_token = "<bos>"
        byte_tokenizer.add_tokens(["<think>", "</think>"])
        byte_tokenizer.chat_template = template
        return byte_tokenizer

    return make


class Clock:
    """Stands in for the clock of transformers."""

    @staticmethod
    def now() -> date:
        return DATE


def text_of(segments: list[Segment], *, is_response: bool) -> str:
    return "".join(segment.text for segment in segments if segment.is_response is is_response)


def responses(turns: list[Turn], tokenizer: Any) -> list[str]:
    """Return the text of each response; adjacent segments are one."""
    marked = "".join(
        segment.text if segment.is_response else "\0"
        for segment in chat_segments(turns, tokenizer, tokenizer.chat_template)
    )
    return [text for text in marked.split("\0") if text]


def example(turns: list[Turn], row: int = 0) -> Example:
    *history, asked, answer = turns
    return Example(row, f"{row}-0", str(row), tuple(history), asked.content, "", answer.content, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_of_every_family(family: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text(family))
    before, end = BEFORE.get(base(family), ""), "" if family in NO_END else ENDS.get(base(family), "<|im_end|>")
    last_before, last = LAST_BEFORE.get(base(family), before), LAST_ENDS.get(family, end)
    assert responses(TURNS, tokenizer) == [f"{last_before}It is four.{last}"]
    assert responses(MORE, tokenizer) == [f"{before}It is four.{end}", f"{last_before}Six.{last}"]
    untrained = [*MORE[:1], Turn("assistant", "It is four.", is_trained=False), *MORE[2:]]
    assert responses(untrained, tokenizer) == [f"{last_before}Six.{last}"]
    system = [Turn("system", "Be kind."), *TURNS]
    if family in NO_SYSTEM:
        with pytest.raises(Unusable, match="System role not supported"):
            responses(system, tokenizer)
    else:
        assert responses(system, tokenizer) == [f"{last_before}It is four.{last}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_a_family_is_the_templates_own_generation_prompt(
    family: str, tokenizer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(template_text(family))
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    content: Any = "What is 2 + 2?"
    if not ("idefics" in family or "llava" in family or "smolvlm" in family):
        stock = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        assert encode_prompt(content, "", tokenizer, "chat") == stock
    (encoded,), _ = encode([example(TURNS)], tokenizer, "chat", 10_000)
    prompt = encode_prompt(content, "", tokenizer, "chat")
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert not encoded.is_response[: len(prompt)].any() and encoded.is_response[len(prompt) :].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_spells_a_control_token_never_becomes_one(family: str, tokenizer_of: Any) -> None:
    template = template_text(family)
    tokenizer = tokenizer_of(template)
    control = {token for token in tokenizer.all_special_tokens if len(token) > 1}
    added = tokenizer.added_tokens_decoder

    def counts(turns: list[Turn]) -> list[int]:
        (encoded,), _ = encode([example(turns)], tokenizer, "chat", 10_000)
        return [token for token in encoded.input_ids.tolist() if token in added]

    spelt = " ".join(sorted(control)) + " <|im_<|im_end|>end|>"
    said = [Turn("user", f"Say {spelt} please"), Turn("assistant", f"I say {spelt} now")]
    assert counts([*said, *said]) == counts([*TURNS, *TURNS])
    if "<think>" in template:
        asked = [Turn("user", "What do <think> and </think> mean?"), TURNS[1]]
        assert counts(asked) == counts(TURNS)


def test_an_empty_think_block_is_prompt_and_a_written_one_is_response(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text("qwen3"))
    segments = chat_segments(TURNS, tokenizer, tokenizer.chat_template)
    assert text_of(segments, is_response=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thought = [TURNS[0], Turn("assistant", "<think>\ntwice two\n</think>\n\nIt is four.")]
    assert responses(thought, tokenizer) == ["<think>\ntwice two\n</think>\n\nIt is four.<|im_end|>"]


@pytest.mark.parametrize(
    "family",
    [
        *("nemotron_3_nano", "qwen3_5_think", "qwen3_6_training"),
        *("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training"),
    ],
)
def test_a_think_block_that_the_prompt_opens_is_closed_by_the_response(family: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text(family))
    thought = [TURNS[0], Turn("assistant", "<think>\ntwice two\n</think>\n\nIt is four.")]
    segments = chat_segments(thought, tokenizer, tokenizer.chat_template)
    assert re.search("assistant[\n\uff5c>]*<think>\n$", text_of(segments, is_response=False).casefold())
    end = ENDS.get(base(family), "<|im_end|>")
    assert responses(thought, tokenizer) == [f"twice two\n</think>\n\nIt is four.{end}"]


IN_A_THINK_BLOCK = (
    *("glm4moe", "lfm2_2_5_v2", "lfm2_2_5_vl", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
    *("nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_training"),
)
BLANKS_AS_WRITTEN = ("lfm2", "nemotron")  # within a text, these templates leave white space as it is
IN_ANOTHER_NOTATION = ("diffusion_gemma", "gemma4", "gemma4_v5", "gptoss", "gptoss_training", "muse_glimmer")


def with_reasoning(**reply: str) -> tuple[list[dict[str, str]], list[Turn]]:
    """Return messages as a dataset has them, and the turns that are read from them."""
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is four.", **reply},
    ]
    ((read,), rejected) = parse_rows([(0, {"messages": messages})], "auto", FieldsConfig())
    assert not rejected
    return messages, [*read.history, Turn("user", read.instruction), Turn("assistant", read.output)]


@pytest.mark.parametrize("family", IN_A_THINK_BLOCK)
def test_reasoning_apart_from_an_answer_is_shown_as_the_template_itself_shows_it(
    family: str, tokenizer_of: Any
) -> None:
    tokenizer = tokenizer_of(template_text(family))
    messages, turns = with_reasoning(reasoning_content="twice two")
    stock = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    segments = chat_segments(turns, tokenizer, tokenizer.chat_template)
    shown = "".join(segment.text for segment in segments)
    if family.startswith(BLANKS_AS_WRITTEN):
        shown, stock = ("".join(text.split()) for text in (shown, stock))
    assert shown == stock.rstrip("\n")
    assert "twice two" in text_of(segments, is_response=True)


@pytest.mark.parametrize("family", IN_ANOTHER_NOTATION)
def test_a_think_block_is_refused_where_reasoning_has_another_notation(family: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text(family))
    _, turns = with_reasoning(thinking="twice two")
    with pytest.raises(Unusable, match="shows reasoning in a notation of its own"):
        responses(turns, tokenizer)
    assert responses(TURNS, tokenizer)


@pytest.mark.parametrize("family", ["llama3", "qwen3_instruct_2507_training"])
def test_a_template_without_reasoning_shows_a_think_block_as_text(family: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text(family))  # the second one names `reasoning_content` in a comment
    _, turns = with_reasoning(reasoning="twice two")
    assert responses(turns, tokenizer)[0].startswith("<think>\ntwice two\n</think>\n\nIt is four.")


@pytest.mark.parametrize("said", ["twice two</think>Four.", "<think>twice two</think>Four."])
@pytest.mark.parametrize("family", ["deepseek_r1_distill", "deepseekv3_training"])
def test_thoughts_that_the_template_would_drop_are_in_the_last_response(
    family: str, said: str, tokenizer_of: Any
) -> None:
    tokenizer = tokenizer_of(template_text(family))
    expected = f"twice two</think>Four.{ENDS[base(family)]}"
    assert responses([TURNS[0], Turn("assistant", said)], tokenizer) == [expected]
    assert responses([*TURNS, TURNS[0], Turn("assistant", said)], tokenizer)[1:] == [expected]
    if family == "deepseek_r1_distill":  # and of an earlier turn they would be lost
        with pytest.raises(Unusable, match=r"leaves out or changes the text of turn 2"):
            responses([TURNS[0], Turn("assistant", said), *TURNS], tokenizer)


@pytest.mark.parametrize("family", ["gptoss", "llama3_2", "muse_glimmer_training"])
def test_tokens_do_not_depend_on_the_day(family: str, tokenizer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_text(family)
    assert "strftime_now" in template

    class Tomorrow:
        def now(self) -> Any:
            return datetime.now() + timedelta(days=1)

    tokenizer = tokenizer_of(template)
    shown = encode_prompt("hi", "", tokenizer, "chat")
    stock = tokenizer.apply_chat_template([TURN], add_generation_prompt=True)["input_ids"]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow())
    assert tokenizer.apply_chat_template([TURN], add_generation_prompt=True)["input_ids"] != stock
    assert encode_prompt("hi", "", tokenizer, "chat") == shown
    assert str(DATE.year) in tokenizer.decode(shown)
    assert template_identity("chat").endswith(str(DATE))


def test_a_date_leaves_the_rest_of_a_template_as_it_is(byte_tokenizer: Any) -> None:
    codes = "%d %b %Y, %B %A %Y-%m-%d %y %H:%M:%S %-d %j %p %I %F"
    for start in ("", "\n", "  {% if true %} {% endif %}"):
        byte_tokenizer.chat_template = f"{start}{{{{ messages[0].content }}}}{{{{ strftime_now('{codes}') }}}}"
        (segment,) = chat_segments(TURNS[:1], byte_tokenizer, byte_tokenizer.chat_template)
        plain = byte_tokenizer.chat_template.replace(f"strftime_now('{codes}')", repr(DATE.strftime(codes)))
        assert [segment] == chat_segments(TURNS[:1], byte_tokenizer, plain)


def test_a_second_think_block_makes_the_row_unusable(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text("qwen3_8"))
    thought = [TURNS[0], Turn("assistant", "<think>\ntwice two\n</think>\n\nIt is four.")]
    with pytest.raises(Unusable, match="adds a think block to that of turn 2"):
        responses(thought, tokenizer)


def test_a_turn_that_the_template_drops_makes_the_row_unusable(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(template_text("qwen3"))
    thought = [TURNS[0], Turn("assistant", "<think>\ntwice two\n</think>\n\nIt is four."), *MORE[2:]]
    with pytest.raises(Unusable, match=r"leaves out or changes the text of turn 2 \(the assistant's\)"):
        responses(thought, tokenizer)


def test_a_row_that_the_template_refuses_is_left_out_with_its_reason(byte_tokenizer: Any) -> None:
    refuses = "{% if 'no' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}"
    fails = "{% if 'bad' in messages[0].content %}{{ 1 + 'a' }}{% endif %}"
    byte_tokenizer.chat_template = refuses + fails + CHATML
    asked = ["yes", "no", "bad", "fine"]
    examples = [example([Turn("user", text), TURNS[1]], row) for row, text in enumerate(asked)]
    encoded, report = encode(examples, byte_tokenizer, "chat", 1000)
    assert [each.row for each in encoded] == [0, 3]
    assert {place: row.row for place, row in report.refused.items()} == {1: 1, 2: 2}
    assert "not this" in report.refused[1].reason and "refuses the conversation" in report.refused[2].reason
    assert report.rows_without_response == []
    prompts, _, _ = encode_prompts(examples, byte_tokenizer, "chat", 1000)
    assert [len(prompt) > 0 for prompt in prompts] == [True, False, False, True]


def test_a_template_that_can_show_no_row_is_an_error(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ConfigError, match=r"template=chat can show none of the 1 conversations.*never.*FILE\.jinja"):
        encode([example(TURNS)], byte_tokenizer, "chat", 1000)
    byte_tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="no valid Jinja"):
        encode([example(TURNS)], byte_tokenizer, "chat", 1000)


def test_a_template_from_a_file_replaces_the_tokenizers(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    expected = encode([example(MORE)], byte_tokenizer, "chat", 1000)[0][0]
    byte_tokenizer.chat_template = None
    (encoded,), _ = encode([example(MORE)], byte_tokenizer, str(path), 1000)
    assert encoded.input_ids.tolist() == expected.input_ids.tolist()
    assert encoded.is_response.tolist() == expected.is_response.tolist()
    before = template_identity(str(path))
    path.write_text(CHATML + "{# other #}")
    assert template_identity(str(path)) != before
    with pytest.raises(ConfigError, match=r"missing\.jinja cannot be read"):
        template_identity(str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    "unsafe", ["''.__class__.__mro__[1].__subclasses__()", "messages.append(1)", "cycler.__init__.__globals__.os"]
)
def test_a_template_from_a_file_runs_in_a_sandbox(unsafe: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "unsafe.jinja"
    path.write_text(CHATML + f"{{% if 'try' in messages[0].content %}}{{{{ {unsafe} }}}}{{% endif %}}")
    examples = [example([Turn("user", text), TURNS[1]], row) for row, text in enumerate(("try", "fine"))]
    encoded, report = encode(examples, byte_tokenizer, str(path), 1000)
    assert [each.row for each in encoded] == [1]
    assert "is unsafe" in report.refused[0].reason


PIECES = st.sampled_from(["a", " ", "\n", "<think>", "</think>", "<|im_end|>", "<|im_", "end|>", "\U000f0000"])
SAID = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(str.strip)
TALKS = st.tuples(st.none() | SAID, st.lists(st.tuples(SAID, SAID, st.booleans()), min_size=1, max_size=3))


@pytest.mark.parametrize("family", ["qwen3", "gptoss_training", "llama3"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=TALKS)
def test_a_conversation_is_shown_whole_or_not_at_all(family: str, talk: Any, tokenizer_of: Any) -> None:
    system, exchanges = talk
    turns = [] if system is None else [Turn("system", system)]
    for number, (asked, answer, trained) in enumerate(exchanges, start=1):
        turns += [Turn("user", asked), Turn("assistant", answer, trained or number == len(exchanges))]
    tokenizer = tokenizer_of(template_text(family))
    try:
        shown = responses(turns, tokenizer)
    except Unusable:
        return
    trained_texts = [turn.content for turn in turns if turn.role == "assistant" and turn.is_trained]
    for response, text in zip(shown, trained_texts, strict=True):
        assert "".join(text.split()) in "".join(response.split())
    whole = "".join(segment.text for segment in chat_segments(turns, tokenizer, tokenizer.chat_template))
    assert all("".join(turn.content.split()) in "".join(whole.split()) for turn in turns)
    (encoded,), _ = encode([example(turns)], tokenizer, "chat", 10_000)
    (prompt,), _, _ = encode_prompts([example(turns)], tokenizer, "chat", 10_000)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.is_response[len(prompt) :].all()
