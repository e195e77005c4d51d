"""The chat client against a real server on loopback that misbehaves: what is kept, what is paid, what it ends in."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from endpoint import NOW, Answer, Endpoint

from gradsift.config import OpenaiJudgeConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.evaluation import chat as chat_module
from gradsift.evaluation.chat import ChatClient, estimated_tokens
from gradsift.evaluation.endpoint import retry_after
from gradsift.evaluation.judges import DryRun, JudgeError
from gradsift.evaluation.replies import CapReached, Completion, Replies, Terms, Usage

Client = Callable[..., ChatClient]
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def client(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of the endpoint; all that a test makes share one store of replies."""
    monkeypatch.setattr(chat_module, "_FIRST_DELAY", 0.001)

    def make(said: list[str] | None = None, terms: dict[str, Any] | None = None, **options: Any) -> ChatClient:
        defaults = {"model": "m", "base_url": endpoint.address, "api_key_env": "JUDGE_KEY", "retries": 2}
        replies = Replies(tmp_path / "replies.sqlite")
        say = [].append if said is None else said.append
        return ChatClient(replies=replies, terms=Terms(**(terms or {})), say=say, **{**defaults, **options})

    return make


def prompts(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


MANY = [f"question {n}" for n in range(30)]


def number(position: int, reply: Completion) -> int | None:
    return int(reply.text) if reply.text.isdecimal() else None


def asked(client: ChatClient, texts: list[str], scope: str = "s", into: dict[int, Any] | None = None) -> dict[int, Any]:
    """What was read by position, or the reason; kept in `into` however the asking ends."""
    got: dict[int, Any] = {} if into is None else into
    for position, answer in client.ask(prompts(*texts), number, scope=scope, unread="no number"):
        assert position not in got
        got[position] = answer.reason if answer.value is None else answer.value
    return got


def sent(endpoint: Endpoint) -> list[str]:
    return [body["messages"][-1]["content"] for body in endpoint.bodies]


# ------------------------------------------------------------------------------------- paid for once


def test_a_reply_is_paid_for_once_over_prompts_and_clients(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, str(len(text)), {})
    texts = ["a", "bb", "a", "ccc", "a"]
    assert asked(client(), texts) == {0: 1, 1: 2, 2: 1, 3: 3, 4: 1}
    assert sorted(sent(endpoint)) == ["a", "bb", "ccc"]  # equal prompts are asked once
    assert asked(client(), [*texts, "dddd"])[5] == 4
    assert sorted(sent(endpoint)) == ["a", "bb", "ccc", "dddd"]
    assert client().spent("s")["calls"] == 4


@pytest.mark.parametrize("other", [{"model": "n"}, {"temperature": 1.0}, {"max_tokens": 9}, {"base_url": "other"}])
def test_another_model_parameter_or_endpoint_is_asked_anew(endpoint: Endpoint, client: Client, other: Any) -> None:
    endpoint.behave = lambda text, attempt: (200, "1", {})
    asked(client(), ["a"])
    if "base_url" in other:
        other = {"base_url": endpoint.address.replace("127.0.0.1", "localhost")}
    asked(client(**other), ["a"])
    assert len(endpoint.bodies) == 2


def test_both_replies_to_a_prompt_that_cannot_be_read_are_kept(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "hm", {})
    for _ in range(2):
        assert asked(client(), ["a"]) == {0: "no number (asked twice)"}
    assert len(endpoint.bodies) == 2


def test_requests_run_side_by_side_up_to_the_limit(endpoint: Endpoint, client: Client) -> None:
    def slow(text: str, attempt: int) -> Answer:
        time.sleep(0.2)
        return 200, "5", {}

    endpoint.behave = slow
    assert len(asked(client(concurrency=3), MANY[:9])) == 9
    assert endpoint.most == 3


RUN = """
import sys, time
from pathlib import Path
from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.replies import Replies, Terms

store, address, count, reading, word, concurrency, max_calls = sys.argv[1:]
client = ChatClient(
    model="m",
    replies=Replies(Path(store)),
    base_url=address,
    concurrency=int(concurrency),
    terms=Terms(max_calls=int(max_calls)),
)
prompts = [[{"role": "user", "content": f"{word} {n}"}] for n in range(int(count))]
def read(position, reply):
    time.sleep(float(reading))
    return reply.text
for position, answer in client.ask(prompts, read, scope="s", unread="?"):
    print(position, flush=True)
"""


def start(
    endpoint: Endpoint,
    store: Path,
    count: int,
    reading: float = 0,
    word: str = "question",
    concurrency: int = 4,
    max_calls: int = 1000,
) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = map(str, (store, endpoint.address, count, reading, word, concurrency, max_calls))
    return subprocess.Popen([sys.executable, "-c", RUN, *options], env=env, stdout=subprocess.PIPE, text=True)


def stored(path: Path, table: str = "replies") -> int:
    """Return the number of rows of a table, 0 before it exists."""
    with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(path, timeout=30) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])  # noqa: S608
    return 0


def test_kill_9_loses_no_reply_that_was_received(endpoint: Endpoint, client: Client, tmp_path: Path) -> None:
    """Reading takes forever in the killed process, so it dies before it has read the reply that it received."""
    endpoint.behave = lambda text, attempt: (200, "7", {})
    process = start(endpoint, tmp_path / "replies.sqlite", 30, reading=3600, concurrency=1)
    deadline = time.monotonic() + 30
    while not stored(tmp_path / "replies.sqlite"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(endpoint.bodies) == 1
    assert asked(client(), MANY) == dict.fromkeys(range(30), 7)
    assert len(endpoint.bodies) == 30 and len(set(sent(endpoint))) == 30
    assert client().spent("s")["calls"] == 30


def test_a_file_that_another_process_is_creating_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "replies.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # SQLite then refuses the switch to WAL at once
    release = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    release.start()
    Replies(tmp_path / "replies.sqlite")
    release.join()
    other.close()


def test_two_processes_share_what_they_pay_for(endpoint: Endpoint, tmp_path: Path) -> None:
    def slow(text: str, attempt: int) -> Answer:
        time.sleep(0.02)
        return 200, "7", {}

    endpoint.behave = slow
    both = [start(endpoint, tmp_path / "replies.sqlite", 40) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert sorted(map(int, out.split())) == list(range(40))
    assert len(endpoint.bodies) == 40


def test_a_store_that_is_none_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(GradsiftError, match=r"replies\.sqlite.*move the file away"):
        Replies(path)


def test_a_reply_that_utf_8_cannot_hold_is_kept(tmp_path: Path) -> None:
    replies = Replies(tmp_path / "replies.sqlite")
    replies.keep("a" * 64, Completion("\ud800 \u2028 '", "stop"), "s", Usage(1, 2))
    assert Replies(tmp_path / "replies.sqlite").find("a" * 64) == Completion("\ud800 \u2028 '", "stop")


UNREADABLE = {
    "empty": "",
    "cut": '{"text": "8',
    "no object": "[1]",
    "no text": '{"finish": "stop"}',
    "a number": '{"text": 8}',
    "another field": '{"text": "8 7", "more": 1}',
    "logprobs of another kind": '{"text": "8 7", "logprobs": "x"}',
    "deep": "[" * 100_000,
    "bytes": b"\xff\xfe{",
    "a flipped bit": b'{"text": "8 \xb7"}',
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_kept_reply_that_cannot_be_read_is_asked_for_again(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    replies = Replies(tmp_path / "replies.sqlite", said.append)
    replies.keep("a" * 64, Completion("8 7"), "s", Usage(1, 2))
    with replies._connection as connection:
        connection.execute("UPDATE replies SET reply = CAST(? AS TEXT)", (UNREADABLE[kind],))
    assert replies.find("a" * 64) is None
    assert said == ["  a reply in replies.sqlite cannot be read; it is requested again"]
    replies.keep("a" * 64, Completion("9 1"), "s", Usage(1, 2))
    assert replies.find("a" * 64) == Completion("9 1")
    assert len(said) == 1


# ----------------------------------------------------------------------------------- what goes wrong

STORM = {"retry-after-ms": "20"}


@pytest.mark.parametrize(
    "first",
    [
        (408, "slow", NOW),
        (409, "conflict", NOW),
        (429, "slow down", STORM),
        (429, "slow down", {}),
        (500, "oops", {}),
        (503, "busy", NOW),
        (502, b"<html>bad gateway</html>", {"Content-Type": "text/html"}),
        (200, b'{"choices": [{"mess', {}),
        (200, "7", {"lacking": "9"}),
        (200, b"", {}),
        (200, b"[]", {}),
        (200, b'{"choices": [{"message": {"content": [1]}}]}', {}),
    ],
)
def test_what_passes_is_tried_again(endpoint: Endpoint, client: Client, first: Any) -> None:
    endpoint.behave = lambda text, attempt: first if attempt == 1 else (200, "7", {})
    assert asked(client(), ["a", "b"]) == {0: 7, 1: 7}
    assert len(endpoint.bodies) == 4


@pytest.mark.parametrize(
    "lasting", [(500, "down", NOW), (200, b'{"choices": [{"mess', {}), (200, "7", {"lacking": "9"})]
)
def test_one_request_that_fails_for_good_ends_in_an_error_once_all_others_are_in(
    endpoint: Endpoint, client: Client, lasting: Any
) -> None:
    endpoint.behave = lambda text, attempt: lasting if text == "question 3" else (200, "7", {})
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=r"openai/m: 1 of 30 requests failed for good, with judge\.retries=2.*again"):
        asked(client(), MANY, into=got)
    assert set(got) == set(range(30)) - {3}
    assert len(endpoint.bodies) == 29 + 3
    endpoint.behave = lambda text, attempt: (200, "8", {})
    assert asked(client(), MANY) == {n: 8 if n == 3 else 7 for n in range(30)}
    assert len(endpoint.bodies) == 29 + 3 + 1


def test_an_endpoint_that_goes_down_is_given_up_and_gone_on_with_later(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "7", {}) if len(endpoint.bodies) <= 10 else (500, "down", NOW)
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=r"gave up after 4 requests in a row.*judge\.give_up=4.*down.*again"):
        asked(client(give_up=4, concurrency=2, retries=0), MANY, into=got)
    assert len(got) == 10 and len(endpoint.bodies) <= 10 + 4 + 2
    endpoint.behave = lambda text, attempt: (200, "7", {})
    assert len(asked(client(), MANY)) == 30


def test_a_prompt_that_the_endpoint_refuses_is_without_a_reply_and_the_others_go_on(
    endpoint: Endpoint, client: Client
) -> None:
    refusals = {"question 3": (400, "filtered", {"code": "content_filter"}), "question 29": (413, "long", {})}
    endpoint.behave = lambda text, attempt: refusals.get(text, (200, "7", {}))
    got = asked(client(), MANY)
    assert got.pop(3) == "the endpoint refuses it, HTTP 400 (content_filter)"
    assert got.pop(29) == "the endpoint refuses it, HTTP 413 (t)"
    assert set(got.values()) == {7} and len(got) == 28
    assert len(endpoint.bodies) == 30  # a refusal is not tried again
    assert client().spent("s")["calls"] == 28  # and costs nothing


def test_refusals_with_replies_between_them_are_no_reason_to_give_up(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (400, "filtered", {}) if text.endswith(("3", "7")) else (200, "7", {})
    got = asked(client(give_up=2, concurrency=1), MANY)
    assert len(got) == 30 and list(got.values()).count(7) == 24


def test_a_wrong_option_that_every_prompt_is_refused_for_leaves_no_prompt_without_a_reply(
    endpoint: Endpoint, client: Client
) -> None:
    endpoint.behave = lambda text, attempt: (400, "max_tokens is not supported", {})
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=r"gave up after 5 requests.*max_tokens is not supported.*judge\.max_tokens"):
        asked(client(give_up=5), MANY, into=got)
    assert got == {}


def test_fewer_prompts_than_give_up_that_are_all_refused_are_no_answers_either(
    endpoint: Endpoint, client: Client
) -> None:
    endpoint.behave = lambda text, attempt: (400, "max_tokens is not supported", {})
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=r"every prompt is refused.*max_tokens is not supported.*judge\.max_tokens"):
        asked(client(give_up=5), MANY[:3], into=got)
    assert got == {}
    endpoint.behave = lambda text, attempt: (200, "7", {}) if text == MANY[0] else (400, "filtered", {})
    assert asked(client(give_up=5), MANY[:1]) == {0: 7}
    # the endpoint has replied in this scope, so these two are refused for what they say
    assert len(asked(client(give_up=5), MANY[1:3])) == 2


def test_a_refused_prompt_beside_a_stored_reply_of_another_scope_is_invalid(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "1", {}) if text == "a" else (400, "no", {})
    assert asked(client(), ["a"], scope="first") == {0: 1}
    got = asked(client(), ["a", "b"], scope="second")  # nothing is spent here, but not every prompt is refused
    assert got[0] == 1 and got[1].startswith("the endpoint refuses it, HTTP 400")
    assert client().spent("second")["calls"] == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, f"Incorrect API key: {KEY}", {}), "environment variable JUDGE_KEY"),
        ((403, "no access", {}), "environment variable JUDGE_KEY"),
        ((404, "no such model", {}), r"judge\.model=m and judge\.base_url"),
        ((402, "pay first", {}), "no credit left"),
        ((429, "quota", {"code": "insufficient_quota"}), "no credit left"),
        ((418, "teapot", {}), r"judge\.base_url"),
        ((302, b"", {"Location": "/login"}), r"HTTP 302.*judge\.base_url"),
        ((404, b"<html>nothing here</html>", {"Content-Type": "text/html"}), r"judge\.base_url"),
        ((200, b"<html>log in</html>", {"Content-Type": "text/html"}), r"text/html.*judge\.base_url.*login"),
        ((200, b"\n<!DOCTYPE html>", {}), r"judge\.base_url.*login"),
        ((200, b"data: {}", {"Content-Type": "text/event-stream"}), r"text/event-stream.*judge\.base_url"),
        ((200, b'{"choices": [], "choices": []}', {}), "'choices' stands twice"),
        ((429, "later", {"Retry-After": "3600"}), r"asks to wait 3,\d00 s, longer than judge\.max_wait=2"),
    ],
)
def test_what_no_retry_can_mend_ends_at_once(
    endpoint: Endpoint, client: Client, answer: Answer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint.behave = lambda text, attempt: answer if text == "question 9" else (200, "7", {})
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=words) as error:
        asked(client(concurrency=1, max_wait=2.0), MANY, into=got)
    assert set(got) == set(range(9)) and len(endpoint.bodies) == 10
    assert KEY not in str(error.value)
    assert error.value.__cause__ is None


def test_retry_after_is_heeded_by_every_thread(endpoint: Endpoint, client: Client) -> None:
    arrivals: list[float] = []

    def storm(text: str, attempt: int) -> Answer:
        arrivals.append(time.monotonic())
        return (429, "slow down", {"retry-after-ms": "300"}) if len(arrivals) == 1 else (200, "7", {})

    endpoint.behave = storm
    assert len(asked(client(concurrency=1), MANY[:3])) == 3
    assert arrivals[1] - arrivals[0] >= 0.3


def test_a_429_storm_without_end_is_given_up_with_a_count(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (429, "slow down", NOW)
    with pytest.raises(JudgeError, match=r"gave up after 3 requests in a row.*slow down"):
        asked(client(give_up=3, retries=1), MANY)
    assert client().spent("s")["calls"] == 0


def test_a_wait_is_read_in_seconds_milliseconds_and_as_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "0.5", "retry-after-ms": "20"}) == 0.02
    moment = datetime.now(UTC) + timedelta(seconds=90)
    assert retry_after({"retry-after": format_datetime(moment, usegmt=True)}) == pytest.approx(90, abs=2)
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for odd in ("", "soon", "nan", "-3", "inf"):
        assert retry_after({"retry-after": odd}) is None


def test_an_endpoint_that_hangs_or_drips_or_is_down_is_an_error(endpoint: Endpoint, client: Client) -> None:
    def hang(text: str, attempt: int) -> Answer:
        time.sleep(0.6)
        return 200, "1", {}

    endpoint.behave = hang
    with pytest.raises(JudgeError, match=r"timed out; raise judge\.timeout=0\.1 seconds"):
        asked(client(timeout=0.1, retries=0), ["a"])
    assert client().spent("s")["calls"] == 1  # it may be charged for
    for drip in ("blanks", "slow_headers"):  # never silent for long, 5 s in total
        endpoint.behave = lambda text, attempt, drip=drip: (200, "1", {drip: "100"})  # type: ignore[misc]
        started = time.monotonic()
        with pytest.raises(JudgeError, match=r"timed out; raise judge\.timeout=0\.3 seconds"):
            asked(client(timeout=0.3, retries=0), [drip])
        assert time.monotonic() - started < 3
    with pytest.raises(JudgeError, match=r"network and judge\.base_url"):
        asked(client(base_url="http://127.0.0.1:9/v1", retries=0), ["c"], scope="down")
    assert client().spent("down")["calls"] == 0


def test_the_key_is_in_no_reply_no_log_and_no_store(
    endpoint: Endpoint, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    endpoint.behave = lambda text, attempt: (200, f"Your key is {KEY}", {})
    ours = client()
    ((_, answer),) = ours.ask(prompts("a"), lambda position, reply: reply.text, scope="s", unread="?")
    assert answer.text == "Your key is ***"
    assert endpoint.keys == {f"Bearer {KEY}"}
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()
    logged = [record for record in caplog.records if record.name.startswith("gradsift")]
    assert KEY not in repr(ours) + str(logged)


@pytest.mark.parametrize("before", [10, 190])  # within what an error quotes, and where the quotation is cut
def test_no_part_of_the_key_is_in_an_error_that_quotes_a_page(
    endpoint: Endpoint, client: Client, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    key = "sk-'quoted\\0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    endpoint.behave = lambda text, attempt: (200, f"<{'x' * before}{key}".encode(), {"Content-Type": "text/html"})
    with pytest.raises(JudgeError, match="text/html") as error:
        asked(client(), ["a"])
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("key", ["1", "none"])
def test_what_stands_in_place_of_a_key_is_not_taken_out_of_replies(
    endpoint: Endpoint, client: Client, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    endpoint.behave = lambda text, attempt: (200, "10 1\nnone better", {})
    ((_, answer),) = client().ask(prompts("a"), lambda position, reply: reply.text, scope="s", unread="?")
    assert answer.text == "10 1\nnone better"


def test_a_missing_key_names_the_variable_and_loopback_needs_none(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base_url in (None, "https://example.invalid/v1"):
        with pytest.raises(ConfigError, match=r"JUDGE_KEY.*judge\.api_key_env"):
            client(base_url=base_url)
        client(base_url=base_url, terms={"dry_run": True})  # which sends nothing
    client()
    monkeypatch.setenv("JUDGE_KEY", "schl\u00fcssel")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds characters"):
        client()


BAD_ADDRESSES = ("localhost:8000/v1", "ftp://host/v1", "http://", "http://[::1", "http://host:port/v1", "http://a b/v1")


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_an_address_that_nothing_can_be_sent_to_is_refused_before_anything_is_computed(address: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url=.*http://127\.0\.0\.1:8000/v1"):
        OpenaiJudgeConfig(name="openai", base_url=address)


def test_the_environments_address_is_held_to_the_same_rules(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"OPENAI_BASE_URL holds a user name.*JUDGE_KEY") as error:
        client(base_url=None)
    assert "secret" not in str(error.value)  # it would have stood in the judgments' manifest


def test_a_query_in_the_address_is_refused_with_the_option_that_takes_it() -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url holds .* a query.*judge\.extra_query=\{NAME: VALUE\}"):
        OpenaiJudgeConfig(name="openai", base_url="https://host/v1?api-version=1")


def test_a_slash_behind_the_address_pays_nothing_anew(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "1", {})
    asked(client(), ["a"])
    asked(client(base_url=endpoint.address + "/"), ["a"])
    assert len(endpoint.bodies) == 1


# ------------------------------------------------------------------------------------- what is spent

PRICES = {"price_input": 1e4, "price_output": 1e5}  # 0.01 USD a prompt token, 0.1 a reply token


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "7", {})
    asked(client(), MANY[:4])
    said: list[str] = []
    with pytest.raises(DryRun):
        asked(client(said, {**PRICES, "dry_run": True}, max_tokens=256), [*MANY, *MANY])
    tokens = sum(map(estimated_tokens, prompts(*MANY[4:])))
    (plan,) = said
    assert "26 requests to send, 4 replies found in the cache" in plan and f"about {tokens} prompt tokens" in plan
    assert "estimate" in plan and f"at most {26 * 256:,} reply tokens" in plan
    assert f"{(tokens * PRICES['price_input'] + 26 * 256 * PRICES['price_output']) / 1e6:.4g} USD" in plan
    assert len(endpoint.bodies) == 4
    with pytest.raises(DryRun, match="price unknown"):
        asked(client(said, {"dry_run": True}), MANY)
    assert estimated_tokens(prompts("x" * 400)[0]) == 104


def test_the_plan_is_said_before_the_first_request_and_only_where_there_is_one(
    endpoint: Endpoint, client: Client
) -> None:
    said: list[str] = []
    endpoint.behave = lambda text, attempt: (200, str(len(said)), {})
    assert asked(client(said), ["a", "b"]) == {0: 1, 1: 1}
    asked(client(said), ["a", "b"])
    assert len(said) == 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_cap_on_requests_is_exact_stops_cleanly_and_goes_on_when_raised(
    endpoint: Endpoint, client: Client, concurrency: int
) -> None:
    endpoint.behave = lambda text, attempt: (200, "7", {})
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError) as error:
        asked(client(terms={"max_calls": 10}, concurrency=concurrency), MANY, into=got)
    assert re.search(
        r"cap judge\.max_calls=10 is reached: this stage has sent 10 requests; 20 prompts are left \(.*\); raise "
        r"judge\.max_calls; .*give the same command again",
        str(error.value),
    )
    assert len(got) == len(endpoint.bodies) == 10
    again: dict[int, Any] = {}
    with pytest.raises(JudgeError, match="has sent 10 requests"):  # the cap is the stage's, not the process's
        asked(client(terms={"max_calls": 10}), MANY, into=again)
    assert again == got and len(endpoint.bodies) == 10
    assert len(asked(client(terms={"max_calls": 30}), MANY)) == 30
    assert len(endpoint.bodies) == 30
    assert len(asked(client(terms={"max_calls": 1}), MANY, scope="other stage")) == 30  # what is cached is free
    assert client().spent("other stage")["calls"] == 0


def test_two_processes_under_one_cap_do_not_pass_it_together(endpoint: Endpoint, tmp_path: Path) -> None:
    def slow(text: str, attempt: int) -> Answer:
        time.sleep(0.1)  # all four threads of both have room under the cap if they look at what is paid alone
        return 200, "7", {}

    endpoint.behave = slow
    store = tmp_path / "replies.sqlite"
    # different questions in each, so that they share no reply
    both = [start(endpoint, store, 20, word=word, max_calls=5) for word in ("first", "second")]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 1  # the cap
    assert len(endpoint.bodies) == 5
    assert Replies(store).spent("s").calls == 5


def test_what_a_killed_process_had_under_way_counts_as_sent(endpoint: Endpoint, client: Client, tmp_path: Path) -> None:
    release = threading.Event()

    def hang(text: str, attempt: int) -> Answer:
        release.wait(30)
        return 200, "7", {}

    endpoint.behave = hang
    process = start(endpoint, tmp_path / "replies.sqlite", 30)
    deadline = time.monotonic() + 30
    while len(endpoint.bodies) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    replies = Replies(tmp_path / "replies.sqlite")
    assert replies.spent("s").calls == 0 and stored(tmp_path / "replies.sqlite", "pending") == 4
    process.send_signal(signal.SIGKILL)
    process.communicate()
    release.set()
    assert replies.spent("s").calls == replies.spent("s").estimated_calls == 4
    assert stored(tmp_path / "replies.sqlite", "pending") == 0
    with pytest.raises(JudgeError, match="has sent 6 requests"):
        asked(client(terms={"max_calls": 6}), MANY)
    assert len(endpoint.bodies) == 6


def test_a_pending_request_is_not_sent_twice_and_keeps_its_place_under_the_cap(tmp_path: Path) -> None:
    """The second process waits, because the first may cost less than its estimate."""
    first, second = (Replies(tmp_path / "replies.sqlite") for _ in range(2))
    terms, estimate = Terms(price_input=1e6, price_output=1e6, max_usd=10), Usage(4, 4, estimated_calls=1)
    assert first.claim("a", "s", estimate, terms) == "send"
    assert second.claim("a", "s", estimate, Terms()) == "wait"  # the same request
    assert second.claim("b", "s", estimate, terms) == "wait"  # 16 USD, if none costs less
    first.keep("a", Completion("7"), "s", Usage(1, 1))
    assert second.claim("a", "s", estimate, terms) == "stored"
    assert second.claim("b", "s", estimate, terms) == "send"
    second.release("b", "s", estimate)
    second.release("b", "s", estimate)  # charged once
    assert first.spent("s") == second.spent("s") == Usage(5, 5, calls=2, estimated_calls=1)
    with pytest.raises(CapReached, match=r"judge\.max_usd=10"):
        first.claim("c", "s", Usage(1, 0), terms)


def test_a_file_of_an_earlier_version_is_read(endpoint: Endpoint, client: Client, tmp_path: Path) -> None:
    endpoint.behave = lambda text, attempt: (200, "7", {})
    with sqlite3.connect(tmp_path / "replies.sqlite") as connection:
        connection.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        key = "5bb5ff40ad13e8e0d4b2ce2a68e2f9ec"
        connection.execute(
            "INSERT INTO replies VALUES (?, ?)", (key, '{"text": "8", "finish": "stop", "logprobs": null}')
        )
    assert Replies(tmp_path / "replies.sqlite").find(key) == Completion("8", "stop")
    assert asked(client(), ["a"]) == {0: 7}


def test_a_store_that_was_deleted_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "store" / "replies.sqlite"
    first = Replies(path)
    first.keep("a" * 64, Completion("7"), "s", Usage(1, 1))
    assert Replies(path).find("a" * 64) == Completion("7")
    shutil.rmtree(path.parent)
    again = Replies(path)
    assert again.find("a" * 64) is None
    again.keep("b" * 64, Completion("8"), "s", Usage(1, 1))
    assert Replies(path).find("b" * 64) == Completion("8")


def test_a_cap_on_money_holds_for_reported_tokens_and_is_never_passed(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "7", {})
    endpoint.usage = {"prompt_tokens": 10, "completion_tokens": 5}  # 0.6 USD
    terms = {**PRICES, "max_usd": 5.0}
    got: dict[int, Any] = {}
    with pytest.raises(JudgeError, match=r"judge\.max_usd=5 is reached: .*requests for 3\.6 USD; 24 prompts .*USD\)"):
        # a request is set aside at 0.07 and 16 x 0.1 USD: it must fit before it is sent
        asked(client(terms=terms, max_tokens=16), MANY, into=got)
    assert len(got) == 6
    spent = client(terms=terms).spent("s")
    assert spent == {"prompt_tokens": 60, "completion_tokens": 30, "calls": 6, "estimated_calls": 0, "usd": 3.6}


def test_tokens_that_are_not_reported_are_estimated_and_labelled(endpoint: Endpoint, client: Client) -> None:
    endpoint.behave = lambda text, attempt: (200, "12345678", {})
    asked(client(), ["x" * 400])
    assert client().spent("s") == {
        "calls": 1,
        "prompt_tokens": 104,
        "completion_tokens": 2,
        "estimated_calls": 1,
        "usd": None,
    }


def test_usage_that_makes_no_sense_is_estimated_too(endpoint: Endpoint, client: Client) -> None:
    body = {"choices": [{"message": {"content": "7"}}]}
    for n, usage in enumerate([None, [], {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": "9"}]):
        reply = json.dumps({**body, "usage": usage}).encode()
        endpoint.behave = lambda text, attempt, reply=reply: (200, reply, {})  # type: ignore[misc]
        assert asked(client(), [f"prompt {n}"]) == {0: 7}
    assert client().spent("s")["estimated_calls"] == 4


def test_a_refusal_in_its_own_field_is_the_text(endpoint: Endpoint, client: Client) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I can't help with that."}
    reply = json.dumps({"choices": [{"message": message}]}).encode()
    endpoint.behave = lambda text, attempt: (200, reply, {})
    ((_, answer),) = client().ask(prompts("a"), number, scope="s", unread="no number")
    assert (answer.text, answer.reason) == ("I can't help with that.", "no number (asked twice)")


def test_an_error_outside_of_the_requests_is_raised_in_the_callers_thread(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "ftp://127.0.0.1")
    with pytest.raises(ValueError, match="proxy"):
        asked(client(), ["a"])
    with pytest.raises(ZeroDivisionError):
        monkeypatch.delenv("HTTPS_PROXY")
        list(client().ask(prompts("a"), lambda position, reply: 1 / 0, scope="s", unread="?"))


def test_leaving_early_stops_the_sending(endpoint: Endpoint, client: Client) -> None:
    def slow(text: str, attempt: int) -> Answer:
        time.sleep(0.1)
        return 200, "7", {}

    endpoint.behave = slow
    answers = client().ask(prompts(*MANY), number, scope="s", unread="?")
    assert len(list(itertools.islice(answers, 2))) == 2
    answers.close()  # type: ignore[attr-defined]
    time.sleep(0.3)
    assert len(endpoint.bodies) < 30
