"""Laws of judges with different interfaces, played by a local server: what is sent, and how replies are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import Answer, Endpoint

from gradsift.artifacts import Artifact, Store
from gradsift.composition import compose_config
from gradsift.config import BenchmarkConfig, ComputeConfig, OpenaiJudgeConfig, dump_config, restore_config
from gradsift.diagnostics import read_diagnostics
from gradsift.errors import ConfigError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.generation import OUTPUTS_FILE, model_outputs, write_model_outputs
from gradsift.evaluation.judges import JudgeError, JudgeRequest, Reply, Unreadable
from gradsift.evaluation.judges.openai import OpenaiJudge
from gradsift.evaluation.judges.parsing import after_thinking, parse_scores
from gradsift.evaluation.replies import Replies
from gradsift.evaluation.stages.judging import judge, judge_settings, pws, pws_of
from gradsift.runtime import Display, Runtime

SECRET = "sk-azure-0123456789"


def requests(count: int) -> list[JudgeRequest]:
    return [JudgeRequest(str(n), "set", "forward", "Say it.", "", f"good {n}", "bad", None) for n in range(count)]


@pytest.fixture
def judged(endpoint: Endpoint, tmp_path: Path) -> Callable[..., list[Reply[Any]]]:
    """Return the replies of a judge with these options; all that a test asks share one store of replies."""

    def ask(count: int = 1, parse: Any = "tolerant", **options: Any) -> list[Reply[Any]]:
        defaults = {"model": "m", "base_url": endpoint.address, "retries": 0, "concurrency": 1}
        chat = ChatClient(replies=Replies(tmp_path / "replies.sqlite"), **{**defaults, **options})
        return [reply for _, reply in OpenaiJudge(chat, parse=parse).judge(requests(count))]

    return ask


@pytest.fixture
def judge_stage(endpoint: Endpoint, tmp_path: Path) -> Callable[..., Artifact]:
    """Run the stages `judge` and `pws` on some items; return the artifact of `pws`."""
    runtime = Runtime(Store(tmp_path / "store", say=lambda text: None), ComputeConfig(), Display(), seed=0)

    def run(count: int, protocol: str = "openai", **options: Any) -> Artifact:
        items = [Item("set", str(n), f"question {n}", "", None) for n in range(count)]

        def answers(who: str) -> Artifact:
            def make(folder: Path) -> dict[str, Any]:
                rows = model_outputs(items, [f"{who} {n}" for n in range(count)], who)
                write_model_outputs(folder / OUTPUTS_FILE, rows)
                return {"rows": count}

            return runtime.store.obtain("generate", who, {"of": who, "count": count}, [], make, version=1)

        given = [f"judge.{name}={value}" for name, value in {"base_url": endpoint.address, **options}.items()]
        config = compose_config([f"judge={protocol}", *given]).judge
        both = answers("ours"), answers("theirs")
        judged = judge(runtime, config, BenchmarkConfig(sets=["verifiable"]), *both)
        return pws(runtime, config, judged, *both)

    return run


# ------------------------------------------------------------------------------------- what is sent


def picky(needed: Callable[[dict[str, Any]], bool], endpoint: Endpoint) -> Callable[[str, int], Answer]:
    def behave(text: str, attempt: int) -> Answer:
        return (200, "8 7", {}) if needed(endpoint.bodies[-1]) else (400, "unsupported parameter", {})

    return behave


@pytest.mark.parametrize(
    ("needed", "options"),
    [
        (lambda body: "max_tokens" not in body and body["max_completion_tokens"] == 256, {}),
        (lambda body: "temperature" not in body, {"temperature": None}),
        (lambda body: all(m["role"] != "system" for m in body["messages"]), {"system_role": False}),
        (lambda body: body.get("reasoning_effort") == "low", {"extra_body": {"reasoning_effort": "low"}}),
        (lambda body: "temperature" not in body, {"extra_body": {"temperature": None}}),
    ],
)
def test_an_endpoint_that_wants_other_parameters_gets_them(
    endpoint: Endpoint, judged: Any, needed: Any, options: dict[str, Any]
) -> None:
    endpoint.behave = picky(needed, endpoint)
    with pytest.raises(JudgeError, match=r"every prompt is refused.*judge\.token_parameter, judge\.temperature=null"):
        judged()
    options = options or {"token_parameter": "max_completion_tokens"}
    assert judged(**options)[0].value == (8, 7)


def test_a_system_text_without_a_role_stands_in_front_of_the_users(endpoint: Endpoint, judged: Any) -> None:
    judged()
    judged(system_role=False)
    with_role, without = (body["messages"] for body in endpoint.bodies)
    assert [message["role"] for message in without] == ["user"]
    assert without[0]["content"] == "\n\n".join(message["content"] for message in with_role)


def test_headers_and_query_are_sent_and_values_from_the_environment_stay_out_of_all_texts(
    endpoint: Endpoint, judged: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AZURE_KEY", SECRET)
    endpoint.behave = lambda text, attempt: (200, f"8 7\nYour key is {SECRET}", {})
    options = {
        "extra_headers": {"api-key": "env:AZURE_KEY", "X-Team": "a"},
        "extra_query": {"api-version": "2024-10-21"},
    }
    (reply,) = judged(**options)
    assert reply.text == "8 7\nYour key is ***"
    assert endpoint.headers[-1]["api-key"] == SECRET and endpoint.headers[-1]["X-Team"] == "a"
    assert endpoint.paths[-1].endswith("/chat/completions?api-version=2024-10-21")
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    monkeypatch.delenv("AZURE_KEY")
    with pytest.raises(ConfigError, match=r"judge\.extra_headers\.api-key is the environment variable AZURE_KEY"):
        judged(**options)


@pytest.mark.parametrize(
    "other",
    [
        {"token_parameter": "max_completion_tokens"},
        {"temperature": None},
        {"system_role": False},
        {"extra_body": {"reasoning_effort": "low"}},
        {"extra_headers": {"X-Team": "a"}},
        {"extra_query": {"api-version": "1"}},
    ],
)
def test_a_reply_to_another_request_is_not_taken_for_this_one(endpoint: Endpoint, judged: Any, other: Any) -> None:
    for options in ({}, other, {}, other):
        judged(**options)
    assert len(endpoint.bodies) == 2


def test_the_options_come_from_the_command_line_and_secrets_are_named_not_given(monkeypatch: Any) -> None:
    monkeypatch.setenv("AZURE_KEY", SECRET)
    given = [
        "judge=openai",
        "judge.temperature=null",
        "judge.token_parameter=max_completion_tokens",
        "judge.extra_body={reasoning_effort: low, top_p: null}",
        "judge.extra_headers={api-key: env:AZURE_KEY}",
        "judge.extra_query={api-version: 2024-10-21}",
    ]
    config = compose_config(given)
    assert isinstance(config.judge, OpenaiJudgeConfig)
    assert config.judge.extra_body == {"reasoning_effort": "low", "top_p": None}
    assert config.judge.extra_query == {"api-version": "2024-10-21"}
    dumped = dump_config(config)
    assert SECRET not in json.dumps(dumped) and restore_config(dumped) == config
    for value in (SECRET, "${oc.env:AZURE_KEY}"):
        with pytest.raises(ConfigError, match=r"extra_headers\.api-key=env:NAME") as error:
            compose_config([*given, f"judge.extra_headers={{api-key: '{value}'}}"])
        assert SECRET not in str(error.value)
    for name in ("messages", "model", "max_tokens", "stream"):
        with pytest.raises(ConfigError, match=f"judge.extra_body holds {name}"):
            compose_config(["judge=openai", f"judge.extra_body={{{name}: 1}}"])


# -------------------------------------------------------------------------------------- how it is read


@pytest.mark.parametrize(
    ("text", "value", "parse"),
    [
        ("<think>\nAnswer 1: 2, answer 2: 3?\n</think>\n\n8 7\nBecause.", (8, 7), "tolerant"),
        ("<think>\nAnswer 1: 2, answer 2: 3?\n</think>\n\n8 7\nBecause.", (8, 7), "strict"),
        ("<thinking>9 9</thinking>8 7", (8, 7), "legacy"),
        ("Hm, 9 9 or so.\n</think>\n8 7", (8, 7), "tolerant"),  # the template holds the opening tag
        ("8 7\nThe first answer writes </think> in its text.", (8, 7), "tolerant"),
        ("<think>x</think>[[B]]", (0, 1), "tolerant"),
        ("Here are my grades.\n\nScores: 8 7", (8, 7), "tolerant"),
        ('```json\n{"answer_1": 8, "answer_2": 7}\n```', (8, 7), "tolerant"),
        ("I compared both.\n[[A]]", (1, 0), "tolerant"),
        ('<think>x</think>\n```json\n{"answer_1": 8, "answer_2": 7}\n```', (8, 7), "tolerant"),
    ],
)
def test_scores_are_found_behind_thinking_introductions_and_fences(
    endpoint: Endpoint, judged: Any, text: str, value: Any, parse: str
) -> None:
    endpoint.behave = lambda prompt, attempt: (200, text, {})
    assert judged(parse=parse) == [Reply(text, value)]


def test_thinking_that_does_not_end_holds_no_scores(endpoint: Endpoint, judged: Any) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "<think>\n8 7\nor rather", {"finish": "length"})
    (reply,) = judged()
    assert reply.value is None
    assert reply.reason == "the reply ends while thinking, before any score, cut at judge.max_tokens=256 (asked twice)"
    endpoint.behave = lambda prompt, attempt: (200, "Hm.\n8 7\nOr rather", {"finish": "length"})  # without the tag
    (reply,) = judged(model="n")
    assert reply.value is None and "cut at judge.max_tokens=256" in str(reply.reason)
    with pytest.raises(Unreadable):
        after_thinking("<think>")
    assert after_thinking("8 7") == "8 7"


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()


def test_a_content_of_parts_is_the_text_of_its_text_parts(endpoint: Endpoint, judged: Any) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "1 1"}]}, {"type": "text", "text": "8 "}]
    body = completion([*parts, {"type": "text", "text": "7"}])
    endpoint.behave = lambda prompt, attempt: (200, body, {})
    assert judged() == [Reply("8 7", (8, 7))]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("第一个回答更好。", "no two scores"),
        ("I cannot help with that.", "no two scores"),
        ('{"answer_1": 8, "answer_1": 2, "answer_2": 7}', "'answer_1' stands twice"),
        ('{"answer_1": NaN, "answer_2": 7}', "NaN and no number"),
        (f'{{"answer_1": 1{"0" * 400}, "answer_2": 7}}', "no number from 0 to 10"),
        ("[8, 7]", "the scores are a list"),
        ("NaN NaN", "no two scores"),
    ],
)
def test_a_reply_without_certain_scores_is_invalid_with_its_reason(
    endpoint: Endpoint, judged: Any, text: str, reason: str
) -> None:
    endpoint.behave = lambda prompt, attempt: (200, text, {})
    (reply,) = judged()
    assert reply.value is None and reply.text == text and reason in str(reply.reason)


# --------------------------------------------------------------------------- unreadable replies in a row


def test_unreadable_replies_in_a_row_end_the_asking_with_the_first_of_them(endpoint: Endpoint, judged: Any) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "Beide sind gut.", {})
    message = (
        r"gave up after 10 unreadable replies in a row \(judge\.give_up_unreadable=10\); the first one: "
        r"'Beide sind gut\.' \(no two scores.*judge\.parse.*give_up_unreadable=null.*same command again"
    )
    with pytest.raises(JudgeError, match=message):
        judged(30)
    paid = len(endpoint.bodies)
    assert 10 <= paid <= 12
    with pytest.raises(JudgeError, match="gave up after"):  # the same command pays for nothing
        judged(30)
    assert len(endpoint.bodies) == paid
    assert [reply.value for reply in judged(30, give_up_unreadable=None)] == [None] * 30


def test_one_readable_reply_among_them_begins_the_count_anew(endpoint: Endpoint, judged: Any) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "8 7" if "3\n" in prompt else "Hm.", {})
    assert [reply.value for reply in judged(8, give_up_unreadable=10)].count((8, 7)) == 1


def test_other_options_read_the_replies_that_are_kept(endpoint: Endpoint, judged: Any) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "Scores: 8 7", {})
    with pytest.raises(JudgeError, match="gave up after"):
        judged(10, parse="strict")
    paid = len(endpoint.bodies)
    assert [reply.value for reply in judged(10)] == [(8, 7)] * 10
    assert len(endpoint.bodies) <= paid + 5


def test_a_stage_without_a_readable_reply_ends_in_an_error_with_the_first_of_them(
    endpoint: Endpoint, judge_stage: Callable[..., Artifact]
) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "Beide sind gut.", {})
    with pytest.raises(JudgeError, match=r"none of its 4 replies can be read.*: 'Beide sind gut\.'.*parse"):
        judge_stage(2)


def test_the_share_of_invalid_judgments_is_a_diagnostic(
    endpoint: Endpoint, judge_stage: Callable[..., Artifact]
) -> None:
    endpoint.behave = lambda prompt, attempt: (200, "Hm." if "ours 1" in prompt else "8 7", {})
    found = read_diagnostics(judge_stage(4).path)["invalid_judgments"]
    assert found["verdict"] == "warning"
    assert found["values"] == {"invalid_share": 0.25, "invalid": 2, "judgments": 8}
    assert "25.0% of the judgments are invalid, most of them because no two scores" in found["message"]
    endpoint.behave = lambda prompt, attempt: (200, "8 7", {})
    assert read_diagnostics(judge_stage(3, model="n").path)["invalid_judgments"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("protocol", "asks_for", "forward", "reverse", "outcome"),
    [
        ("openai", "the two grades", "8 7", "7 8", "win"),
        ("pairwise", "[[C]]", "A is right.\n[[A]]", "[[B]]", "win"),
        ("pairwise", "[[C]]", "[[C]]", "[[A]]", "lose"),
        ("five_point", "[[A>>B]]", "My own: 3.\n\n[[B>>A]]", "[[A>B]]", "lose"),
        ("five_point", "[[A>>B]]", "[[A>>B]]", "[[A>B]]", "tie"),
        (
            "json",
            '"answer_1"',
            '{"reason": "no", "answer_1": 8, "answer_2": 7}',
            '{"score_1": 6, "score_2": 7}',
            "win",
        ),
    ],
)
def test_each_protocol_asks_in_its_words_and_reads_its_replies(
    endpoint: Endpoint, judge_stage: Any, protocol: str, asks_for: str, forward: str, reverse: str, outcome: str
) -> None:
    endpoint.behave = lambda text, attempt: (200, forward if text.index("ours") < text.index("theirs") else reverse, {})
    assert pws_of(judge_stage(1, protocol))["pooled"][outcome] == 1
    assert all(asks_for in body["messages"][-1]["content"] for body in endpoint.bodies)


@pytest.mark.parametrize(("parse", "text"), [("verdict", "8 7"), ("json", "8 7"), ("json", "[[A]]")])
def test_a_protocols_parser_reads_no_other_form(parse: Any, text: str) -> None:
    assert parse_scores(text, parse) is None


def test_the_wording_of_a_protocol_is_in_the_settings() -> None:
    configs = [OpenaiJudgeConfig(name="mine", task=task) for task in (None, "Grade.", "Grade!")]
    settings = [json.dumps(judge_settings(config, "w"), sort_keys=True) for config in configs]
    assert len(set(settings)) == 3


COMPARE = """
import sys
import httpx2
from gradsift.evaluation.compare import main

post, heavy = httpx2.AsyncClient.post, set()

async def seen(client, *given, **named):
    heavy.update({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(",")))
    return await post(client, *given, **named)

httpx2.AsyncClient.post = seen
status = main(sys.argv[2:])
print("loaded before a request:", sorted(heavy), file=sys.stderr)
sys.exit(status)
"""
HEAVY = (
    "numpy,torch,transformers,lightning,peft,datasets,pyarrow,pandas,scipy,sklearn,matplotlib,openai,alpaca_eval,nltk"
)


def test_compare_asks_an_endpoint_before_it_loads_anything_heavy_and_warns_of_invalid_judgments(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.behave = lambda text, attempt: (200, "Hm." if "question 1" in text else "8 7", {})
    items = [Item("set", str(n), f"question {n}", "", None) for n in range(4)]
    for who in ("a", "b"):
        write_model_outputs(tmp_path / f"{who}.json", model_outputs(items, [f"{who} {n}" for n in range(4)], who))
    options = ["judge=openai", f"judge.base_url={endpoint.address}", f"artifacts={tmp_path / 'store'}"]
    command = [sys.executable, "-c", COMPARE, HEAVY, str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert "warning: invalid_judgments: 25.0% of the judgments are invalid" in done.stderr.replace("\n", " ")
    assert done.stderr.splitlines()[-1] == "loaded before a request: []"
    result = json.loads(done.stdout)
    assert result["pooled"]["invalid"] == 1 and result["diagnostics"]["invalid_judgments"]["verdict"] == "warning"


@pytest.mark.parametrize("value", ["'${oc.env:AZURE_KEY}'", SECRET])
def test_a_secret_that_is_refused_stands_in_no_file_of_the_run(
    value: str, gradsift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AZURE_KEY", SECRET)
    assert gradsift("judge=openai", f"judge.extra_headers={{api-key: {value}}}") == 2
    assert "env:NAME" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
