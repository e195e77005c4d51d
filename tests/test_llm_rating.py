"""Laws of ratings by a judge: the score of each style, rows without one, and caps and dry runs of a whole run."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SMOKE
from endpoint import Answer, Endpoint
from hydra import compose, initialize_config_dir

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import FieldsConfig, load_config
from gradsift.data.examples import Example
from gradsift.data.formats import parse_rows
from gradsift.errors import ConfigError
from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.judges.openai import OpenaiJudge
from gradsift.evaluation.judges.rating import SCALES
from gradsift.evaluation.replies import Replies
from gradsift.scoring.llm_rating import llm_rating
from gradsift.scoring.scores import SCORED, UNDEFINED

Rater = Callable[..., OpenaiJudge]


def examples(*answers: str) -> list[Example]:
    rows = [{"instruction": f"task {n}", "input": "", "output": answer} for n, answer in enumerate(answers)]
    return parse_rows(enumerate(rows), "alpaca", FieldsConfig())[0]


def no_bar(description: str, total: int) -> Any:
    return nullcontext(lambda done: None)


@pytest.fixture
def rater(endpoint: Endpoint, tmp_path: Path) -> Rater:
    def make(**options: Any) -> OpenaiJudge:
        replies = Replies(tmp_path / "replies.sqlite")
        return OpenaiJudge(ChatClient(model="m", base_url=endpoint.address, replies=replies, retries=0, **options))

    return make


def grades(text: str, attempt: int) -> Answer:
    """Answer as the endpoint: complexity follows from a task's number, quality is the response itself."""
    number = int(re.findall(r"task (\d+)", text)[0])
    if SCALES["complexity"].task in text:
        return 200, f"{number % 6 + 1}", {}
    response = re.findall(r"=+ response =+\n(.*)\n=+ end", text)[0]
    return 200, f"Grade: {response}", {}


def test_the_score_of_each_style_is_what_its_paper_says(endpoint: Endpoint, rater: Rater) -> None:
    endpoint.behave = grades
    pool = examples("1", "4.5", "3", "2")
    scores = llm_rating(pool, rater(), no_bar, style="alpagasus")
    assert scores.score.tolist() == [1, 4.5, 3, 2]
    assert list(scores.parts) == ["accuracy"] and len(endpoint.bodies) == 4
    scores = llm_rating(pool, rater(), no_bar, style="deita")
    assert scores.parts["complexity"].tolist() == [1, 2, 3, 4]
    assert scores.parts["quality"].tolist() == [1, 4.5, 3, 2]
    assert scores.score.tolist() == [1, 9, 9, 8]  # complexity x quality
    assert set(scores.status) == {SCORED}
    complexity = [b["messages"][1]["content"] for b in endpoint.bodies if SCALES["complexity"].task in str(b)]
    assert len(complexity) == 4 and not any("response =" in text for text in complexity)


def test_an_example_without_a_valid_grade_has_no_score_and_the_reason(endpoint: Endpoint, rater: Rater) -> None:
    def behave(text: str, attempt: int) -> Answer:
        return (400, "filtered", {"code": "content_filter"}) if "task 1" in text else grades(text, attempt)

    endpoint.behave = behave
    scores = llm_rating(examples("3", "3", "9", "no idea", "2"), rater(), no_bar, style="alpagasus")
    assert scores.status.tolist() == [SCORED, UNDEFINED, UNDEFINED, UNDEFINED, SCORED]
    assert scores.reason[1] == "no grade for accuracy: the endpoint refuses it, HTTP 400 (content_filter)"
    assert scores.reason[2] == scores.reason[3]
    assert (
        scores.reason[2] == "no grade for accuracy: no grade of its scale on the first line of the reply (asked twice)"
    )
    assert np.isnan(scores.score[1:4]).all()
    (diagnostic,) = scores.diagnostics
    assert (diagnostic.name, diagnostic.verdict) == ("unrated_share", "warning")
    assert diagnostic.values["unrated_share"] == 0.6
    assert diagnostic.values["calls"] == 2 + 2 * 2


def test_ratings_depend_neither_on_the_order_nor_on_concurrency(endpoint: Endpoint, rater: Rater) -> None:
    endpoint.behave = grades
    pool = examples(*"3521414253")
    one = llm_rating(pool, rater(concurrency=1), no_bar, style="deita").score
    order = np.random.default_rng(0).permutation(len(pool))
    endpoint.bodies.clear()
    other = llm_rating([pool[n] for n in order], rater(concurrency=5), no_bar, style="deita").score
    assert other.tolist() == one[order].tolist()
    assert endpoint.bodies == []  # and are paid for once
    assert not np.isnan(one).any()


# --------------------------------------------------------------------------------------- a whole run

RATE = (*SMOKE, "scorer=llm_rating", "stop_after=selection")


@pytest.mark.parametrize("style", ["alpagasus", "deita"])
def test_the_verifier_as_a_rater_selects_no_spoilt_row(gradsift, style: str) -> None:
    assert gradsift(*RATE, f"scorer.style={style}", "alpha=0.2") == 0
    (run,) = gradsift.runs()
    assert run["selection"]["spoilt_share"] == 0 < run["selection"]["spoilt_share_pool"]
    assert {stage["name"] for stage in run["stages"]} == {"load", "score", "select"}
    (table,) = gradsift.store.glob("score/llm_rating-*/scores.parquet")
    columns = pq.read_table(table)
    parts = ["accuracy"] if style == "alpagasus" else ["complexity", "quality"]
    product = np.prod([columns[part].to_numpy() for part in parts], axis=0)  # the score table holds the grades
    assert columns["score"].to_numpy().tolist() == product.tolist()


def at(endpoint: Endpoint, *options: str) -> tuple[str, ...]:
    return ("judge=openai", f"judge.base_url={endpoint.address}", "judge.model=m", *options)


def test_a_dry_run_shows_the_ratings_a_cap_ends_the_run_and_each_rating_is_then_sent_once(
    gradsift, endpoint: Endpoint, capsys
) -> None:
    endpoint.behave = lambda text, attempt: (200, "3", {})
    assert gradsift(*RATE, *at(endpoint, "judge.dry_run=true")) == 0
    (run,) = gradsift.runs()
    assert run["status"] == "stopped" and "requests to send, 0 replies found" in run["dry_run"]
    assert "nothing was sent" in capsys.readouterr().out
    assert endpoint.bodies == []
    assert gradsift(*RATE, *at(endpoint, "judge.max_calls=20")) == 2
    assert "judge.max_calls=20 is reached" in capsys.readouterr().err
    assert len(endpoint.bodies) == 20
    assert gradsift(*RATE, *at(endpoint, "judge.max_calls=200")) == 0
    prompts = len(endpoint.bodies)
    assert prompts == len({body["messages"][1]["content"] for body in endpoint.bodies})
    assert 20 < prompts <= 120  # equal examples are asked about once
    cost = gradsift.runs()[-1]["diagnostics"]["unrated_share"]["values"]
    assert (cost["calls"], cost["usd"]) == (prompts, None)
    # options that change no rating, and one that does
    assert gradsift(*RATE, *at(endpoint, "judge.price_input=1", "judge.price_output=1", "judge.retries=1")) == 0
    assert all(stage["reused"] for stage in gradsift.runs()[-1]["stages"])
    assert len(endpoint.bodies) == prompts
    assert gradsift(*RATE, *at(endpoint, "judge.model=n")) == 0
    assert not all(stage["reused"] for stage in gradsift.runs()[-1]["stages"])
    assert len(endpoint.bodies) == 2 * prompts


def test_pairs_are_judged_within_the_cap_and_the_cost_is_in_the_run(after_smoke, endpoint: Endpoint, capsys) -> None:
    endpoint.behave = lambda text, attempt: (200, "8 7\nFine.", {})
    endpoint.usage = {"prompt_tokens": 100, "completion_tokens": 10}
    run = (*SMOKE, "scorer=random", *at(endpoint, "judge.price_input=1", "judge.price_output=10"))
    assert after_smoke(*run, "judge.dry_run=true") == 0
    (dry,) = after_smoke.runs()
    assert (dry["status"], dry["pws"]) == ("stopped", None)
    assert dry["accuracy"]["model"] is not None  # as far as the answers
    prompts = int(dry["dry_run"].split()[0])
    assert endpoint.bodies == [] and 0 < prompts <= 52
    assert after_smoke(*run, "judge.max_calls=10") == 2
    assert "judge.max_calls=10 is reached" in capsys.readouterr().err
    assert after_smoke(*run) == 0
    finished = after_smoke.runs()[-1]
    assert len(endpoint.bodies) == prompts
    assert finished["pooled"]["n"] == 26 and finished["pooled"]["invalid"] == 0
    assert finished["judging"] == {
        "invalid": 0,
        "cost": {
            "calls": prompts,
            "prompt_tokens": 100 * prompts,
            "completion_tokens": 10 * prompts,
            "estimated_calls": 0,
            "usd": pytest.approx(prompts * 200e-6),
        },
    }
    assert after_smoke(*run, "judge.dry_run=true") == 0  # judged before: there is nothing to plan
    assert after_smoke.runs()[-1]["status"] == "finished"


# -------------------------------------------------------------------------------------------- config


def composed(*overrides: str) -> Any:
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return load_config(compose("config", overrides=list(overrides)))


FOREIGN = ("data=json", "data.path=x.json", "proxy=tiny_bytes", "scorer=llm_rating", "stop_after=selection")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*FOREIGN], "judge=verifier knows the right answers of data=verifiable only; choose judge=openai"),
        ([*FOREIGN, "judge=local", "judge.model.kind=tiny_bytes"], "random weights and cannot judge"),
        (["scorer=llm_rating", "judge=alpaca_eval"], "judge=alpaca_eval compares two answers"),
        (["scorer=llm_rating", "scorer.style=mine"], "choose one of: alpagasus, deita"),
        (["judge=openai", "judge.max_usd=1"], "judge.max_usd=1 needs judge.price_input and judge.price_output"),
        (["judge=openai", "judge.price_input=1"], "give both judge.price_input and judge.price_output"),
        (["judge=openai", "judge.max_calls=0"], "judge.max_calls=0 is out of range"),
        (["judge=openai", "judge.give_up=0"], "judge.give_up=0 is out of range"),
        (["judge=openai", "judge.parse=loose"], "choose one of: strict, tolerant, legacy"),
        (["judge=openai", "judge.price_input=-1", "judge.price_output=1"], "judge.price_input=-1.0 is out of range"),
    ],
)
def test_what_cannot_be_rated_or_paid_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert message in str(caught.value)


def test_a_judge_that_can_rate_is_taken() -> None:
    for judge in ("local", "openai"):
        assert composed(*FOREIGN, f"judge={judge}").judge.name == judge
    assert composed(*[o for o in FOREIGN if "selection" not in o], "stop_after=load").scorer_name == "llm_rating"


def test_a_rater_without_a_key_is_refused_before_anything_is_computed(gradsift, capsys, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert gradsift(*RATE, "judge=openai") == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert {stage["name"] for stage in gradsift.runs()[0]["stages"]} == {"load"}
