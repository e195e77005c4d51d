"""Laws of dataset formats in use: each is read without loss, refused with a remedy, or its rows are rejected.

The texts are invented; the files are written here in the shapes of public formats.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.config import FieldsConfig
from gradsift.data.examples import Example, Rejected, Turn, read_examples, write_examples, write_rejected
from gradsift.data.files import read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import encode
from gradsift.errors import DataError
from gradsift.scoring.scores import Scores
from gradsift.selection.stage import write_selection

ASK, SAY = "Name a river.", "The Oder is one."
USER, REPLY = {"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}
HUMAN, GPT = {"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}
SYSTEM = Turn("system", "Be brief.")
EARLIER = (Turn("user", "Hello?"), Turn("assistant", "Hello!"))
FIRST = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]
CALL = {"id": "1", "type": "function", "function": {"name": "rivers", "arguments": "{}"}}


def parse(*rows: Any, **fields: Any) -> tuple[list[Example], list[Rejected]]:
    return parse_rows(enumerate(rows), "auto", FieldsConfig(**fields))


def read(path: Path, content: str | bytes) -> tuple[list[Example], list[Rejected]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return parse_rows(read_rows(path), "auto", FieldsConfig(), path.name)


def parts(example: Example) -> tuple[Any, ...]:
    return (example.history, example.instruction, example.input, example.output)


# ----------------------------------------------------------------------------------- rows that are read

PLAIN: dict[str, dict[str, Any]] = {
    "instruction and response": {"instruction": ASK, "response": SAY},
    "prompt and response": {"prompt": ASK, "response": SAY},
    "query and response": {"query": ASK, "response": SAY},
    "question and answer": {"question": ASK, "answer": SAY},
    "capitals": {"Instruction": ASK, "Output": SAY},
    "blanks around names": {" instruction": ASK, "OUTPUT ": SAY},
    "capitals of other names": {"Question": ASK, "Response": SAY},
    "chosen and rejected": {"prompt": ASK, "chosen": SAY, "rejected": "No."},
    "chosen as one turn": {"question": ASK, "chosen": REPLY, "rejected": {"role": "assistant", "content": "No."}},
    "chosen as an answer in a list": {"prompt": ASK, "chosen": [REPLY], "rejected": [REPLY]},
    "chosen as a whole conversation": {"prompt": ASK, "chosen": [USER, REPLY], "rejected": [USER]},
    "chosen without a prompt": {"chosen": [USER, REPLY], "rejected": [USER]},
    "chosen as JSON text": {"prompt": ASK, "chosen": json.dumps([USER, REPLY]), "rejected": "[]"},
    "prompt and chosen as lists": {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]},
    "turns, then chosen": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
    "turns that end in chosen": {"messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": [USER]},
    "texts as messages": {"messages": [ASK, SAY]},
    "texts as conversations": {"conversations": [ASK, SAY, "a last word of the user"]},
    "from and value as messages": {"messages": [HUMAN, GPT]},
    "role and content as conversations": {"conversations": [USER, REPLY]},
    "conversation": {"conversation": [USER, REPLY]},
    "turns as JSON text": {"messages": json.dumps([USER, REPLY])},
    "turns stored by columns": {"conversations": {"from": ["human", "gpt"], "value": [ASK, SAY]}},
    "capitals of roles": {"messages": [USER | {"role": "User"}, REPLY | {"role": "ASSISTANT"}]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name "}, "a river."]}, REPLY]},
    "keys without a say": {
        "messages": [USER | {"name": "Ada", "tool_calls": None}, REPLY | {"weight": 1, "refusal": ""}]
    },
    "desired": {"prompt": ASK, "completion": SAY, "label": True},
    "a label of another kind": {"prompt": ASK, "completion": SAY, "label": False, "topic": "rivers"},
    "a label that is a number": {"prompt": ASK, "completion": SAY, "label": 0},
    "empty tools, system and history": {"messages": [USER, REPLY], "tools": "[]", "system": "", "history": []},
    "no earlier exchanges": {"instruction": ASK, "output": SAY, "history": None, "system": None, "tools": []},
    "configured names first": {"instruction": ASK, "output": SAY, "response": "other", "prompt": "other"},
}


@pytest.mark.parametrize("row", PLAIN.values(), ids=PLAIN)
def test_a_prompt_and_its_response(row: dict[str, Any]) -> None:
    ((example,), rejected) = parse(row)
    assert rejected == []
    assert parts(example) == ((), ASK, "", SAY)
    assert example.original == row


LONGER: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "context": ({"instruction": ASK, "context": "A map.", "response": SAY}, ((), ASK, "A map.", SAY)),
    "input before context": (
        {"instruction": ASK, "input": "A map.", "context": "other", "output": SAY},
        ((), ASK, "A map.", SAY),
    ),
    "context where the input is blank": (
        {"instruction": ASK, "input": " ", "context": "A map.", "output": SAY},
        ((), ASK, "A map.", SAY),
    ),
    "system": ({"instruction": ASK, "output": SAY, "system": "Be brief."}, ((SYSTEM,), ASK, "", SAY)),
    "system_prompt": ({"system_prompt": "Be brief.", "question": ASK, "response": SAY}, ((SYSTEM,), ASK, "", SAY)),
    "system beside prompt": ({"system": "Be brief.", "prompt": ASK, "completion": SAY}, ((SYSTEM,), ASK, "", SAY)),
    "system beside turns": ({"system": "Be brief.", "conversations": [HUMAN, GPT]}, ((SYSTEM,), ASK, "", SAY)),
    "system in both places": (
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]},
        ((SYSTEM,), ASK, "", SAY),
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, REPLY]},
        ((SYSTEM,), ASK, "", SAY),
    ),
    "system and history": (
        {
            "instruction": ASK,
            "input": "A map.",
            "output": SAY,
            "system": "Be brief.",
            "history": [["Hello?", "Hello!"]],
        },
        ((SYSTEM, *EARLIER), ASK, "A map.", SAY),
    ),
    "history as JSON text": (
        {"prompt": ASK, "response": SAY, "history": '[["Hello?", "Hello!"]]'},
        (EARLIER, ASK, "", SAY),
    ),
    "history as turns": ({"instruction": ASK, "output": SAY, "history": FIRST}, (EARLIER, ASK, "", SAY)),
    "history and chosen": (
        {"instruction": ASK, "chosen": SAY, "rejected": "No.", "history": [["Hello?", "Hello!"]]},
        (EARLIER, ASK, "", SAY),
    ),
    "system and chosen turns": (
        {"system": "Be brief.", "prompt": [*FIRST, USER], "chosen": [REPLY], "rejected": [REPLY]},
        ((SYSTEM, *EARLIER), ASK, "", SAY),
    ),
    "reasoning": (
        {"messages": [USER, REPLY | {"reasoning_content": "Let me think."}]},
        ((), ASK, "", f"<think>\nLet me think.\n</think>\n\n{SAY}"),
    ),
    "reasoning under two names, before text parts": (
        {
            "conversations": [
                HUMAN,
                GPT | {"value": [{"type": "text", "text": SAY}], "reasoning": "Hm.", "thinking": "Hm."},
            ]
        },
        ((), ASK, "", f"<think>\nHm.\n</think>\n\n{SAY}"),
    ),
    "empty reasoning": ({"messages": [USER, REPLY | {"reasoning_content": "", "thinking": None}]}, ((), ASK, "", SAY)),
    "weight 0": (
        {"messages": [FIRST[0], FIRST[1] | {"weight": 0}, USER, REPLY | {"weight": 1}]},
        ((EARLIER[0], Turn("assistant", "Hello!", is_trained=False)), ASK, "", SAY),
    ),
    "weight 0 at the end": ({"messages": [USER, REPLY, FIRST[0], FIRST[1] | {"weight": 0.0}]}, ((), ASK, "", SAY)),
    "train false": (
        {"messages": [FIRST[0], FIRST[1] | {"train": False}, USER, REPLY | {"train": True}]},
        ((EARLIER[0], Turn("assistant", "Hello!", is_trained=False)), ASK, "", SAY),
    ),
}


@pytest.mark.parametrize(("row", "expected"), LONGER.values(), ids=LONGER)
def test_what_comes_before_the_last_exchange(row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    ((example,), rejected) = parse(row)
    assert rejected == []
    assert parts(example) == expected
    assert example.original == row


# ------------------------------------------------------------------------- rows that are rejected

UNSHOWN: dict[str, tuple[dict[str, Any], str]] = {
    "tool_calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, REPLY]},
        r"turn 2 holds tool calls \('tool_calls'\)",
    ),
    "role tool": ({"messages": [USER, {"role": "tool", "content": "42"}, REPLY]}, "turn 2 has the role 'tool'"),
    "role function_call": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}, GPT]},
        "turn 2 has the role 'function_call'",
    ),
    "role observation": (
        {"conversations": [HUMAN, {"from": "observation", "value": "42"}, GPT]},
        "turn 2 has the role 'observation'",
    ),
    "role function": ({"messages": [USER, {"role": "function", "content": "42"}, REPLY]}, "the role 'function'"),
    "function_call": (
        {"messages": [USER, REPLY | {"function_call": {"name": "f", "arguments": "{}"}}]},
        "turn 2 holds a function call",
    ),
    "tools": ({"messages": [USER, REPLY], "tools": [CALL]}, "column 'tools' holds tools.*delete it to train"),
    "tools as text": ({"conversations": [HUMAN, GPT], "tools": '[{"name": "f"}]'}, "column 'tools' holds tools"),
    "reasoning of a user": (
        {"messages": [USER | {"reasoning": "Let me think."}, REPLY]},
        r"turn 1 holds reasoning \('reasoning'\), but is a user turn",
    ),
    "two kinds of reasoning": (
        {"messages": [USER, REPLY | {"reasoning": "a", "thinking": "b"}]},
        "turn 2 holds different reasoning in 'reasoning' and 'thinking'",
    ),
    "reasoning that is no text": (
        {"messages": [USER, REPLY | {"reasoning_content": ["a"]}]},
        "'reasoning_content' of turn 2 is a list, not text",
    ),
    "reasoning beside a think block": (
        {"messages": [USER, REPLY | {"thinking": "a", "content": "<think>b</think>c"}]},
        "turn 2 holds reasoning in 'thinking' and also a think block",
    ),
    "reasoning that ends its block": (
        {"messages": [USER, REPLY | {"thinking": "a</think>b"}]},
        "turn 2 holds reasoning in 'thinking' and also a think block",
    ),
    "reasoning in a column": (
        {"prompt": ASK, "response": SAY, "reasoning_content": "Let me think."},
        "column 'reasoning_content' holds reasoning",
    ),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]},
        "part 1 of 'content' of turn 1 is of type 'image_url'",
    ),
    "audio part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}, {"type": "input_audio"}]}, REPLY]},
        "part 2 of 'content' of turn 1 is of type 'input_audio'",
    ),
    "part with an image": (
        {"messages": [{"role": "user", "content": [{"text": ASK, "image": "x.png"}]}, REPLY]},
        "part 1 of 'content' of turn 1 holds image",
    ),
    "images": ({"messages": [USER, REPLY], "images": ["x.png"]}, "column 'images' holds images"),
    "undesired": ({"prompt": ASK, "completion": SAY, "label": False}, "column 'label' is false.*undesired"),
    "undesired turns": ({"messages": [USER, REPLY], "kto_tag": False}, "column 'kto_tag' is false.*undesired"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' of turn 2 is null"),
    "no turn trained": ({"messages": [USER, REPLY | {"weight": 0}]}, "all have weight 0"),
    "other weights": ({"messages": [USER, REPLY | {"weight": 0.5}]}, "turn 2 has the weight '0.5'; known: 0"),
    "weight of a user": ({"messages": [USER | {"train": True}, REPLY]}, "a user turn is never trained"),
    "content and value": ({"messages": [{**USER, "from": "human", "value": "other"}, REPLY]}, "and they differ"),
    "two system prompts": (
        {"system": "Be long.", "messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]},
        "column 'system' and the first turn hold different system prompts",
    ),
    "a system that is no text": ({"instruction": ASK, "output": SAY, "system": 7}, r"fields\.system=null ignores it"),
    "a history that is none": (
        {"instruction": ASK, "output": SAY, "history": "old"},
        r"fields\.history=null ignores it",
    ),
    "an exchange that is no pair": ({"instruction": ASK, "output": SAY, "history": [["a"]]}, "not a pair of texts"),
    "Python text of turns": ({"messages": str([USER, REPLY])}, "not a JSON list of turns.*json.dumps"),
    "another prompt": (
        {"prompt": "Name a hill.", "chosen": [USER, REPLY], "rejected": [USER]},
        "the prompt is not among the turns of 'chosen'",
    ),
    "messages that end otherwise": (
        {"messages": [USER, REPLY], "chosen": [USER, REPLY | {"content": "Other."}], "rejected": [USER]},
        "the prompt is not among the turns of 'chosen'",
    ),
    "an input beside chosen turns": (
        {"instruction": ASK, "input": "A map.", "chosen": [USER, REPLY], "rejected": [USER]},
        "field 'input' cannot be combined",
    ),
}


@pytest.mark.parametrize(("row", "reason"), UNSHOWN.values(), ids=UNSHOWN)
def test_what_a_template_cannot_show_rejects_the_row(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"none of its 1 rows can be used: .*{reason}"):
        parse(row)


def test_rows_of_another_shape_in_one_file_are_rejected_with_the_remedy() -> None:
    mixed = [ROW, {"messages": [USER, REPLY]}, {"conversations": [HUMAN, GPT]}, {"note": "x"}, ROW]
    examples, rejected = parse(*mixed)
    assert [example.row_index for example in examples] == [0, 4]
    assert [row.row for row in rejected] == [1, 2, 3]
    for row, column in zip(rejected, ("messages", "conversations"), strict=False):
        assert f"'instruction' is missing: the row has other columns ('{column}')" in row.reason
        assert "data=mixture" in row.reason
    assert rejected[2].reason == "field 'instruction' is missing"


def test_a_rejected_row_is_kept_whole_and_the_others_go_on(tmp_path: Path) -> None:
    row, _ = UNSHOWN["tool_calls"]
    ((example,), rejected) = parse(row, {"messages": [USER, REPLY]})
    assert (example.row_index, rejected[0].row) == (1, 0)
    write_rejected(tmp_path / "rejected.jsonl", rejected)
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["content"] == row


# ------------------------------------------------------------------------------ data that is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two responses": (
        {"instruction": ASK, "response": SAY, "answer": SAY},
        r"response, answer could each be .*; set data\.fields\.output=response or data\.fields\.output=answer",
    ),
    "two prompts": (
        {"prompt": ASK, "question": ASK, "response": SAY},
        r"data\.fields\.instruction=prompt or data\.fields\.instruction=question",
    ),
    "a response beside chosen": (
        {"prompt": ASK, "response": SAY, "chosen": SAY, "rejected": "No."},
        r"data\.fields\.output=response or data\.fields\.output=chosen",
    ),
    "one name in two cases": (
        {"Instruction": ASK, "INSTRUCTION": ASK, "Output": SAY},
        r"data\.fields\.instruction=Instruction or data\.fields\.instruction=INSTRUCTION",
    ),
    "text": (
        {"text": f"### Human: {ASK}### Assistant: {SAY}"},
        "column 'text' does not say where the prompt ends.*split",
    ),
    "chosen text alone": ({"chosen": f"Human: {ASK}", "rejected": "x"}, "column 'chosen' does not say.*split it"),
    "input and output": ({"input": ASK, "output": SAY}, r"whole prompt, set data\.fields\.instruction=input"),
    "an unknown response": (
        {"question": ASK, "reply": SAY},
        r"column of the response with data\.fields\.output=COLUMN, one of: reply",
    ),
    "an unknown prompt": (
        {"riddle": ASK, "answer": SAY},
        r"column of the prompt with data\.fields\.instruction=COLUMN, one of: riddle",
    ),
    "unknown turns": ({"dialogue": [USER, REPLY]}, r"set data\.fields\.messages=dialogue"),
    "turns as rows": (USER, r"the rows are turns: write each conversation as one row"),
}


@pytest.mark.parametrize(("row", "remedy"), REFUSED.values(), ids=REFUSED)
def test_an_unclear_shape_is_refused_with_the_remedy(row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        parse(row)


def test_lists_of_turns_for_rows_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="the rows are lists of turns: write each conversation as one row"):
        parse([USER, REPLY])


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": ASK, "response": SAY, "answer": "other"}, {"output": "response"}),
        ({"prompt": "other", "question": ASK, "response": SAY}, {"instruction": "question"}),
        ({"prompt": ASK, "response": "other", "chosen": SAY, "rejected": "No."}, {"output": "chosen"}),
        ({"input": ASK, "output": SAY}, {"instruction": "input"}),
        ({"question": ASK, "reply": SAY}, {"output": "reply"}),
        ({"riddle": ASK, "answer": SAY}, {"instruction": "riddle"}),
        ({"dialogue": [USER, REPLY]}, {"messages": "dialogue"}),
        ({"instruction": ASK, "output": SAY, "system": 7, "history": "old"}, {"system": None, "history": None}),
        ({"instruction": ASK, "output": SAY, "context": "a remark"}, {"input": None}),
    ],
)
def test_the_remedies_work(row: dict[str, Any], fields: dict[str, Any]) -> None:
    ((example,), rejected) = parse(row, **fields)
    assert rejected == []
    assert parts(example) == ((), ASK, "", SAY)


# --------------------------------------------------------------------------------------------- files

ROW = {"instruction": ASK, "input": "", "output": SAY}
OTHER = {"instruction": "Grüße 日本", "input": "a, b; c", "output": 'say "yes"'}
LINES = [json.dumps(row, ensure_ascii=False) for row in (ROW, OTHER)]


def table(delimiter: str, rows: list[dict[str, str]] | None = None, ending: str = "\n") -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["instruction", "input", "output"], delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(rows or [ROW, OTHER])
    return stream.getvalue()


FILES: dict[str, tuple[str, str | bytes]] = {
    "tabs": ("a.tsv", table("\t")),
    "tabs in .csv": ("a.csv", table("\t")),
    "semicolons": ("a.csv", table(";")),
    "bars": ("a.csv", table("|")),
    "commas in .tsv": ("a.tsv", table(",")),
    "the delimiter named": ("a.csv", "sep=;\n" + table(";")),
    "carriage returns": ("a.csv", table(";").replace("\n", "\r")),
    "UTF-16": ("a.csv", table("\t").encode("utf-16")),
    "blanks in the header": ("a.csv", "instruction, input, output\n" + table(",").partition("\n")[2]),
    "blanks before quotes": (
        "a.csv",
        f'"instruction", "input", "output"\n"{ASK}", "", "{SAY}"\n"Grüße 日本", "a, b; c", "say ""yes"""\n',
    ),
    "joined tables": ("a.csv", "\ufeff" + table(",", [ROW]) + "\ufeff" + table(",", [OTHER])),
    "marks between joined files": ("a.jsonl", "".join(f"\ufeff{line}\n" for line in LINES)),
    "no newline at the join": ("a.jsonl", "".join(LINES)),
    "a mark at the join": ("a.jsonl", "\ufeff".join(LINES)),
    "a blank at the join": ("a.jsonl", " ".join(LINES)),
    "lines in .json": ("a.json", "\ufeff".join(LINES)),
    "UTF-16 lines": ("a.jsonl", "\n".join(LINES).encode("utf-16")),
    "UTF-16 array": ("a.json", b"\xfe\xff" + json.dumps([ROW, OTHER]).encode("utf-16-be")),
    "UTF-32 array": ("a.json", json.dumps([ROW, OTHER]).encode("utf-32")),
    "joined arrays": ("a.json", json.dumps([ROW]) + "\n\ufeff" + json.dumps([OTHER])),
    "indented objects": ("a.json", json.dumps(ROW, indent=1) + json.dumps(OTHER, indent=1)),
    "data beside other keys": ("a.json", json.dumps({"version": "1", "data": [ROW, OTHER], "tags": ["x"]}, indent=1)),
    "data beside other keys on a line": ("a.json", json.dumps({"version": "1", "data": [ROW, OTHER], "by": {}})),
    "data in .jsonl": ("a.jsonl", json.dumps({"data": [ROW, OTHER], "errors": []})),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_files_of_two_rows(name: str, content: str | bytes, tmp_path: Path) -> None:
    examples, rejected = read(tmp_path / name, content)
    assert rejected == []
    expected = [((), row["instruction"], row["input"], row["output"]) for row in (ROW, OTHER)]
    assert [parts(example) for example in examples] == expected
    assert [example.row_index for example in examples] == [0, 1]


def test_rows_that_share_a_line_know_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + "".join(LINES) + "\n" + LINES[0])
    assert [(row.row, row.line) for row in read_rows(tmp_path / "a.jsonl")] == [(0, 2), (1, 2), (2, 3)]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_single_row_with_lists_is_a_row(indent: int | None, tmp_path: Path) -> None:
    row = {"messages": [USER, REPLY], "sources": [{"title": "a"}]}
    ((example,), _) = read(tmp_path / "a.json", json.dumps(row, indent=indent))
    assert example.original == row


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.array([b"a"] * 7 + [b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"instruction": pa.array(["a"] * 8), "output": bad}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet, row 7, column 'output': this string cannot be read .*0xe9.*as UTF-8"
    ):
        list(read_rows(tmp_path / "a.parquet"))


# ------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("template", "expected"),
    [("alpaca", SAY + "<eos>"), ("plain", SAY + "<eos>"), ("chat", SAY + "<|im_end|>")],
)
def test_a_turn_of_weight_0_is_context_and_no_response(template: str, expected: str, byte_tokenizer: Any) -> None:
    def tokens(weight: int) -> tuple[str, str]:
        row = {"messages": [FIRST[0], FIRST[1] | {"weight": weight}, USER, REPLY]}
        ((encoded,), _) = encode(parse(row)[0], byte_tokenizer, template, 4096)
        texts = (encoded.input_ids, encoded.input_ids[encoded.is_response])
        return tuple(byte_tokenizer.decode(ids) for ids in texts)  # type: ignore[return-value]

    (text, trained), (other_text, both) = tokens(0), tokens(1)
    assert text == other_text
    assert "Hello!" in text
    assert trained == expected
    assert both == "Hello!" + ("<|im_end|>" if template == "chat" else "") + expected


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_system_and_history_are_prompt_but_for_the_earlier_answers(template: str, byte_tokenizer: Any) -> None:
    row = {"instruction": ASK, "output": SAY, "system": "Be brief.", "history": [["Hello?", "Hello!"]]}
    ((encoded,), _) = encode(parse(row)[0], byte_tokenizer, template, 4096)
    end = "<|im_end|>" if template == "chat" else ""
    assert byte_tokenizer.decode(encoded.input_ids[encoded.is_response]) == f"Hello!{end}{SAY}{end or '<eos>'}"
    prompt = byte_tokenizer.decode(encoded.input_ids[~encoded.is_response])
    assert all(text in prompt for text in ("Be brief.", "Hello?", ASK))


def test_what_is_not_trained_is_part_of_the_identity_and_of_the_file(tmp_path: Path) -> None:
    rows = [{"messages": [FIRST[0], FIRST[1] | {"weight": weight}, USER, REPLY]} for weight in (0, 1)]
    examples, _ = parse(*rows)
    assert examples[0].content_hash != examples[1].content_hash
    plain, _ = parse({"messages": [*FIRST, USER, REPLY]})
    assert examples[1].content_hash == plain[0].content_hash
    write_examples(tmp_path / "examples.parquet", examples)
    assert read_examples(tmp_path / "examples.parquet") == examples


# -------------------------------------------------------------------------------------- nothing is lost

BASES: list[dict[str, Any]] = [  # usable rows, one of which has the columns of every shape that is rejected
    {"messages": [USER, REPLY]},
    {"conversations": [HUMAN, GPT]},
    {"prompt": ASK, "completion": SAY},
    {"prompt": ASK, "response": SAY},
    {"instruction": ASK, "output": SAY},
    {"prompt": ASK, "chosen": SAY, "rejected": "No."},
    {"instruction": ASK, "chosen": SAY, "rejected": "No."},
    {"messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": [USER]},
]
SHAPES = [*PLAIN.items(), *((name, row) for group in (LONGER, UNSHOWN) for name, (row, _) in group.items())]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COLUMNS = "instruction,Input, output,response,context,prompt,chosen,rejected,messages,system,history,tools,label,note,ä"
NAMES = st.sampled_from(COLUMNS.split(","))
TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "x"]), TEXT)
VALUE = st.one_of(
    TEXT, st.none(), st.integers(), st.booleans(), st.lists(TEXT, max_size=4), st.lists(TURN, max_size=3), TURN,
    st.lists(st.tuples(TEXT, TEXT).map(list), max_size=2),
)  # fmt: skip


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def kept(path: Path, folder: Path) -> dict[int, Any]:
    """Return what is kept of each row: its columns in a selection of all examples, or the content in rejected.jsonl."""
    examples, rejected = parse_rows(read_rows(path), "auto", FieldsConfig())
    write_examples(folder / "examples.parquet", examples)
    write_rejected(folder / "rejected.jsonl", rejected)
    everything = np.arange(len(examples))
    write_selection(folder / "selection.jsonl", everything, Scores(everything * 1.0), folder / "examples.parquet")
    rows = {}
    for line in (folder / "selection.jsonl").read_bytes().decode().split("\n")[:-1]:
        row = json.loads(line)
        rows[row.pop("gradsift")["row_index"]] = row
    for line in (folder / "rejected.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["row"]] = row["content"]
    assert len(rows) == len(examples) + len(rejected)
    return rows


def with_texts(value: Any, texts: Iterator[str], key: str = "") -> Any:
    """Return a row with other texts; names of roles and kinds, and turns as JSON text, stay."""
    if isinstance(value, dict):
        return {name: with_texts(item, texts, name) for name, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, texts, key) for item in value]
    is_structure = key in ("role", "from", "type") or (isinstance(value, str) and value[:1] in ("[", "{"))
    return value if is_structure or not isinstance(value, str) else next(texts)


@pytest.mark.parametrize(("name", "row"), SHAPES, ids=[name for name, _ in SHAPES])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=12))
def test_every_string_of_every_shape_is_in_the_selection_or_among_the_rejected_rows(
    name: str, row: dict[str, Any], texts: list[str], tmp_path: Path
) -> None:
    base = next(base for base in [row, *BASES] if _is_usable(base, row))
    rows = [base, with_texts(row, cycle(texts)), row]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    result = kept(tmp_path / "a.jsonl", tmp_path)
    assert result == dict(enumerate(rows))


def _is_usable(base: dict[str, Any], row: dict[str, Any]) -> bool:
    try:
        examples, _ = parse(base, row)
    except DataError:
        return False
    return examples[0].row_index == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(st.dictionaries(NAMES, VALUE, min_size=1), TEXT), max_size=3),
    kind=st.sampled_from(["joined", "lines", "array"]),
)
def test_every_string_of_a_json_row_is_kept(rows: list[Any], kind: str, tmp_path: Path) -> None:
    rows = [ROW, *rows]  # one that can be used
    between = "\n" if kind == "lines" else ""
    text = json.dumps(rows) if kind == "array" else between.join(json.dumps(row) for row in rows)
    path = tmp_path / ("a.json" if kind == "array" else "a.jsonl")
    path.write_text(text)
    result = kept(path, tmp_path)
    assert sorted(result) == list(range(len(rows)))
    for row, content in enumerate(rows):
        assert list(strings_in(result[row])) == list(strings_in(content))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=3),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
)
def test_every_cell_of_a_table_is_kept(
    cells: list[tuple[str, str, str]], delimiter: str, encoding: str, tmp_path: Path
) -> None:
    rows = [ROW, *(dict(zip(ROW, texts, strict=True)) for texts in cells)]
    (tmp_path / "a.csv").write_bytes(table(delimiter, rows, "\r\n").encode(encoding))
    result = kept(tmp_path / "a.csv", tmp_path)
    assert [result[row] for row in sorted(result)] == rows
