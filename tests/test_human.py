"""Human evaluation: blinding, safety against hostile texts and foreign pages, and no vote is lost."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from browsing import NEEDS_CHROMIUM, Watched
from conftest import SMOKE
from starlette.testclient import TestClient

from gradsift.errors import DataError
from gradsift.evaluation.human.__main__ import main
from gradsift.evaluation.human.pairs import PairFiles, files_of_run, read_pairs
from gradsift.evaluation.human.server import Pages, listen
from gradsift.evaluation.human.votes import Vote, Votes, describe, fleiss_kappa, majority
from gradsift.evaluation.judgments import Judgment
from gradsift.pages import presentable

MODEL, REFERENCE = "secret-model", "secret-reference"
HOSTILE = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'></div>&amp; \"'"


def outputs(folder: Path, count: int = 6, **texts: str) -> PairFiles:
    """Write two files with the answers "good N" and "bad N".

    `texts` replaces the answers (`good`, `bad`) or the `instruction` of the first item.
    """
    rows: dict[str, list[dict[str, str]]] = {"good": [], "bad": []}
    for kind, found in rows.items():
        for number in range(1, count + 1):
            row = {"instruction": f"question {number}", "output": f"{kind} {number}", "dataset": "set"}
            row |= {"item_id": str(number), "generator": MODEL if kind == "good" else REFERENCE}
            found.append(row)
        found[0]["output"] = texts.get(kind, found[0]["output"])
        found[0]["instruction"] = texts.get("instruction", found[0]["instruction"])
        (folder / f"{kind}.json").write_text(json.dumps(found))
    return PairFiles(folder / "good.json", folder / "bad.json")


def arguments(files: PairFiles, *more: str) -> list[str]:
    named = {"model": files.model, "reference": files.reference, "database": files.model.parent / "votes.sqlite"}
    return [*(part for name, path in named.items() for part in (f"--{name}", str(path))), "--plain", *more]


@contextmanager
def joined(client: httpx.Client, root: str, name: str | None) -> Iterator[httpx.Client]:
    """Open a client, and join as a rater if a name is given."""
    with client:
        if name is not None:
            assert client.post(f"{root}/raters", data={"name": name}).status_code == 200
        yield client


class Direct:
    """The pages in this process, without a socket."""

    origin = "http://127.0.0.1:8765"

    def __init__(
        self,
        files: PairFiles,
        *,
        items: int | None = None,
        invited: tuple[str, ...] = (),
        unblind: bool = False,
        plain: bool = True,
    ) -> None:
        pairs = read_pairs(files)
        self.votes = Votes.create(files.model.parent / "votes.sqlite", pairs, items, seed=0)
        pages = Pages(self.votes, pairs, invited=invited, unblind=unblind, plain=plain)
        self.app, self.root, self.url = pages.app(), pages.root, f"{self.origin}{pages.root}/"

    def client(self, name: str | None = None) -> Any:
        return joined(TestClient(self.app, base_url=self.origin), self.root, name)


class Served:
    """The command in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "gradsift.evaluation.human", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in range(3)]
        self.url = self.lines[1].removeprefix("open ").strip()
        self.origin, self.root = self.url[: self.url.index("/", 8)], self.url[self.url.index("/", 8) : -1]

    def client(self, name: str | None = None) -> Any:
        client = httpx.Client(base_url=self.origin, follow_redirects=True, trust_env=False, timeout=30)
        return joined(client, self.root, name)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(*arguments: str) -> Served:
        running.append(Served(*arguments))
        return running[-1]

    yield start
    for served in running:
        served.kill()


def texts_of(page: str) -> list[str]:
    """Return the texts of a page as a browser shows them: instruction, input if there is one, both answers."""
    return [html.unescape(text) for text in re.findall(r'<div class="text"[^>]*>(.*?)</div>', page, re.DOTALL)]


def vote_all(client: httpx.Client, page: httpx.Response, choose: Callable[[str, str], str]) -> httpx.Response:
    """Vote on all remaining pairs; `choose` gets the two answers and returns a choice."""
    while not page.url.path.endswith("/done"):
        _, first, second = texts_of(page.text)
        page = client.post(page.url.path, data={"choice": choose(first, second)})
        assert page.status_code == 200
    return page


def for_model(first: str, second: str) -> str:
    return "first" if first.startswith("good") else "second"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--results"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --------------------------------------------------------------------------------- votes by plain forms


def test_votes_by_plain_forms_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = outputs(tmp_path)
    served = Direct(files, items=5)
    plan = {"1": "model", "2": "model", "3": "tie", "4": "model", "5": "reference", "6": "reference"}

    def choose(first: str, second: str) -> str:
        wanted = plan[first.split()[1]]
        model = for_model(first, second)
        return {"model": model, "tie": "tie", "reference": "second" if model == "first" else "first"}[wanted]

    with served.client("Ann") as client:
        done = vote_all(client, client.get(f"{served.root}/r/1"), choose)
        assert "Finish" in done.text
        assert 'id="win"' not in done.text  # counts before Finish would reveal which answers are the model's
        counts = client.post(f"{served.root}/r/1/done").text
    drawn = [key[1] for key in served.votes.keys.values()]
    expected = [[plan[item] for item in drawn].count(kind) for kind in ("model", "tie", "reference")]
    assert [int(n) for n in re.findall(r'<td id="\w+">(\d)</td>', counts)] == expected
    assert MODEL not in counts
    found = printed(capsys, *arguments(files))
    assert (found["model"], found["reference"], found["items"]) == (MODEL, REFERENCE, 5)
    assert [found["raters"]["Ann"][kind] for kind in ("win", "tie", "lose")] == expected
    assert found["raters"]["Ann"]["pws"] == pytest.approx(1 + (expected[0] - expected[2]) / 5)
    assert found["majority"]["pooled"]["win"] == expected[0]
    assert found["agreement"]["fleiss"]["kappa"] is None
    assert found["judge"] is None


def test_a_vote_can_be_changed_until_the_rater_finishes(tmp_path: Path) -> None:
    served = Direct(outputs(tmp_path, 3), unblind=True)
    votes = served.votes
    with served.client("Ann") as client:
        page = client.post(f"{served.root}/r/1/1", data={"choice": "tie"})
        assert page.url.path.endswith("/r/1/2")
        assert client.post(f"{served.root}/r/1/done").url.path.endswith("/r/1/2")  # two votes are missing
        page = client.post(f"{served.root}/r/1/1", data={"choice": "second"})
        assert page.url.path.endswith("/r/1/2")  # the next pair without a vote
        (rater,) = votes.raters()
        assert [vote.choice for vote in votes.of(rater)] == ["second", None, None]
        assert 'class="chosen"' in client.get(f"{served.root}/r/1/1").text
        vote_all(client, page, for_model)
        before = votes.all()
        assert MODEL not in client.get(f"{served.root}/r/1/done").text
        counts = client.post(f"{served.root}/r/1/done")
        assert MODEL in counts.text  # --unblind
        shown = re.findall(r"</td><td>(\w+)</td>\n<td>(\w+)</td><td>(\w+)</td>", counts.text)
        places = {True: "first", False: "second"}
        assert shown == [(places[vote.model_first], vote.choice, vote.outcome) for vote in before]
        for choice in ("first", "second", "tie"):
            assert client.post(f"{served.root}/r/1/1", data={"choice": choice}).url.path.endswith("/done")
    assert votes.all() == before


def test_kill_9_loses_no_vote_and_the_address_and_the_options_stay(
    tmp_path: Path, serve: Callable[..., Served]
) -> None:
    options = arguments(outputs(tmp_path), "--items", "4", "--raters", "Ann,Bob", "--unblind")
    first = serve(*options)
    with first.client("Ann") as client:
        page = client.get(f"{first.root}/r/1")
        for _ in range(3):
            page = client.post(page.url.path, data={"choice": "first"})
        first.kill()
    second = serve(*options)
    assert second.root == first.root
    with second.client("Ann") as client:
        assert client.post(f"{second.root}/raters", data={"name": "Eve"}).status_code == 400
        page = client.get(f"{second.root}/r/1")
        assert page.url.path.endswith("/r/1/4") and "Pair 4 of 4, 3 rated" in page.text
        vote_all(client, page, for_model)
        assert MODEL in client.post(f"{second.root}/r/1/done").text


def test_raters_and_processes_at_once_keep_every_vote(
    tmp_path: Path, serve: Callable[..., Served], capsys: pytest.CaptureFixture[str]
) -> None:
    files = outputs(tmp_path, 8)
    servers = [serve(*arguments(files)), serve(*arguments(files))]  # two commands, one file

    def rate(served: Served, name: str, choose: Callable[[str, str], str]) -> None:
        with served.client() as client:
            page = client.post(f"{served.root}/raters", data={"name": name})
            vote_all(client, page, choose)

    choices = {"Ann": for_model, "Bob": for_model, "Cem": lambda first, second: "tie"}
    threads = [
        threading.Thread(target=rate, args=(servers[index % 2], name, choose))
        for index, (name, choose) in enumerate(choices.items())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = printed(capsys, *arguments(files))
    assert {name: (cell["win"], cell["tie"]) for name, cell in found["raters"].items()} == {
        "Ann": (8, 0),
        "Bob": (8, 0),
        "Cem": (0, 8),
    }
    assert found["majority"]["pooled"]["win"] == 8
    kappas = {tuple(sorted(pair["raters"])): pair["accuracy"] for pair in found["agreement"]["pairwise"]}
    assert kappas == {("Ann", "Bob"): 1.0, ("Ann", "Cem"): 0.0, ("Bob", "Cem"): 0.0}
    only = printed(capsys, *arguments(files, "--raters", "Ann,Cem"))
    assert list(only["raters"]) == [name for name in found["raters"] if name != "Bob"]
    assert only["majority"]["pooled"]["split"] == 8


def test_a_vote_that_cannot_be_stored_is_reported(tmp_path: Path) -> None:
    served = Direct(outputs(tmp_path))
    place, vote = f"{served.root}/r/1/1", {"choice": "tie"}
    with served.client("Ann") as client, closing(sqlite3.connect(tmp_path / "votes.sqlite")) as connection:
        connection.execute("ALTER TABLE shown RENAME TO elsewhere")
        answer = client.post(place, data=vote)
        assert (answer.status_code, "Your click was not stored" in answer.text) == (503, True)
        connection.execute("ALTER TABLE elsewhere RENAME TO shown")
        assert client.post(place, data=vote).url.path.endswith("/r/1/2")


# --------------------------------------------------------------------------------------------- blinding


def test_a_page_does_not_reveal_which_answer_is_the_models(tmp_path: Path) -> None:
    """Two raters who see one pair in opposite orders get the same page except for the two texts."""
    served = Direct(outputs(tmp_path))
    votes = served.votes
    with served.client("Ann") as client:
        names = iter(f"rater {number}" for number in range(50))
        while True:  # until a rater sees the first pair in the other order
            client.post(f"{served.root}/raters", data={"name": next(names)})
            raters = votes.raters()
            if votes.of(raters[-1])[0].model_first != votes.of(raters[0])[0].model_first:
                break
        pages = [client.get(f"{served.root}/r/{rater.number}/1") for rater in (raters[0], raters[-1])]
    _, first, second = texts_of(pages[0].text)
    assert texts_of(pages[1].text)[1:] == [second, first]
    neutral = []
    for page, rater in zip(pages, (raters[0], raters[-1]), strict=True):
        text = page.text.replace(f"/r/{rater.number}/", "/r/N/").replace(rater.name, "NAME")
        headers = {name: value for name, value in page.headers.items() if name not in ("date", "content-length")}
        neutral.append((text.replace(first, "ANSWER").replace(second, "ANSWER"), headers))
        assert not re.search("secret|good.json|bad.json|win|lose|reference|model", page.text)
    assert neutral[0] == neutral[1]
    assert set(re.findall(r'name="choice" value="(\w+)"', pages[0].text)) == {"first", "tie", "bad", "second"}


@pytest.mark.parametrize("count", [6, 7])
def test_half_of_the_items_show_the_model_first_by_seed_and_name(tmp_path: Path, count: int) -> None:
    pairs = read_pairs(outputs(tmp_path, count))

    def sides(name: str, seed: int, file: str) -> list[bool]:
        votes = Votes.create(tmp_path / file, pairs, None, seed)
        return [vote.model_first for vote in votes.of(votes.join(name))]

    found = [sides("Ann", 0, "a"), sides("Bob", 0, "a"), sides("Ann", 1, "b"), sides("Cem", 0, "a")]
    assert all(sum(one) in (count // 2, count - count // 2) for one in found)
    assert len({tuple(one) for one in found}) > 1
    assert sides("Ann", 0, "c") == found[0]
    keys = [list(Votes(tmp_path / file).keys.values()) for file in ("a", "b", "c")]
    assert keys[0] == keys[2] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(pairs.items)


# ------------------------------------------------------------------------------------- hostile answers


def test_hostile_broken_and_huge_texts_are_shown_as_text(tmp_path: Path) -> None:
    huge = "word " * 250_000 + "END"
    strange = "\u202eright to left\u202c \x00\x1b[31m \ud800 \ud83d\ude00\r\nline"
    files = outputs(tmp_path, 1, good=HOSTILE + strange, bad=huge, instruction="{{ 7 * 7 }} {% raw %} </textarea>")
    served = Direct(files)
    with served.client("<b>Ann</b>") as client:
        page = client.get(f"{served.root}/r/1/1")
        shown = set(texts_of(page.text))
        assert "{{ 7 * 7 }} {% raw %} </textarea>" in shown
        assert f"{HOSTILE}\u202eright to left\u202c \ufffd\ufffd[31m \ufffd \U0001f600\nline" in shown
        assert "<script>window" not in page.text
        assert "<b>Ann" not in page.text
        assert huge in shown


def test_the_files_that_a_page_refers_to_are_served(tmp_path: Path) -> None:
    served = Direct(outputs(tmp_path))
    with served.client() as client:
        files = re.findall(r'<(?:link|script)[^>]* (?:href|src)="([^"]+)"', client.get(served.url).text)
        kinds = [client.get(file).headers["content-type"].split(";")[0] for file in files]
    assert kinds == ["image/svg+xml", "text/css", "text/javascript"]


def test_markdown_is_rendered_without_the_html_links_and_images_of_an_answer(tmp_path: Path) -> None:
    text = "# Title\n\n- **bold** `a<b`\n\n```py\nx = '<i>'\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    hostile = f"{HOSTILE}\n\n[x](javascript:alert(1)) ![y](http://evil.example/z.png) <http://evil.example> <b>no</b>"
    files = outputs(tmp_path, 1, good=text + hostile, bad="plain <u>text</u>")
    served = Direct(files, plain=False)
    with served.client("Ann") as client:
        page = client.get(f"{served.root}/r/1/1").text
    for part in ("<h1>Title</h1>", "<strong>bold</strong>", "a&lt;b", "<td>1</td>", "plain &lt;u&gt;text"):
        assert part in page
    shown = "".join(re.findall(r'<div class="markdown"[^>]*>(.*?)</div>', page, re.DOTALL))
    assert not re.search(r"<(script|img|a|b|u|i|iframe|svg|style)\b|<[^>]*(\bon\w+=|javascript:)", shown)


def test_a_text_that_is_too_long_to_render_is_shown_as_text(tmp_path: Path) -> None:
    long = "**bold** <u>" * 10_000
    served = Direct(outputs(tmp_path, 1, good=long, bad="**bold**"), plain=False)
    with served.client("Ann") as client:
        page = client.get(f"{served.root}/r/1/1").text
    assert texts_of(page) == [long]
    assert page.count("<strong>bold</strong>") == 1 and "<u>" not in page


def test_both_bad_is_a_tie_that_is_counted_and_a_comment_is_stored_with_the_vote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = outputs(tmp_path, 2)
    served = Direct(files)
    with served.client("Ann") as client:
        vote = {"choice": "bad", "comment": "<b>Neither</b> \u00e4\x00 " + "x" * 2000}
        assert client.post(f"{served.root}/r/1/1", data=vote).status_code == 200
        page = client.get(f"{served.root}/r/1/1").text
        assert "&lt;b&gt;Neither" in page and "<b>Neither" not in page
        assert re.search(r'<button id="bad"[^>]*class="chosen"', page)
        client.post(f"{served.root}/r/1/2", data={"choice": "tie"})
    votes = served.votes
    first, second = votes.of(votes.raters()[0])
    assert (first.choice, first.bad, first.outcome, len(first.comment)) == ("tie", True, "tie", 1000)
    assert (second.bad, second.comment) == (False, "")
    found = printed(capsys, *arguments(files))
    assert (found["raters"]["Ann"]["tie"], found["raters"]["Ann"]["both_bad"]) == (2, 1)
    assert [(one["rater"], one["comment"][:14]) for one in found["comments"]] == [("Ann", "<b>Neither</b>")]


def test_split_votes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = outputs(tmp_path, 2)
    votes = Votes.create(tmp_path / "votes.sqlite", read_pairs(files), None, 0)
    for name, choice in (("Ann", "first"), ("Bob", "tie")):
        rater = votes.join(name)
        for item in (1, 2):
            votes.vote(rater, item, choice if item == 1 else "tie")  # type: ignore[arg-type]
    assert main([*arguments(files), "--results"]) == 0
    assert "note: 1 of 2 pairs have no outcome that more than half of their raters chose" in capsys.readouterr().err


def test_presentable_replaces_only_control_characters_and_lone_surrogates() -> None:
    assert presentable("a\tb\nc\rd\r\ne ü 漢 \U0001f600") == "a\tb\nc\nd\ne ü 漢 \U0001f600"
    assert presentable("\x00\x0b\ud800x") == "\ufffd\ufffd\ufffdx"


# ---------------------------------------------------------------------------------------- access


def test_only_this_machine_under_its_own_name_with_the_key_and_its_own_forms(tmp_path: Path) -> None:
    served = Direct(outputs(tmp_path))
    port = served.origin.rsplit(":", 1)[1]
    place = f"{served.root}/r/1/1"
    vote = {"choice": "first"}
    with served.client("Ann") as client:
        client.follow_redirects = False
        assert client.get(served.url, headers={"host": f"localhost:{port}"}).status_code == 200
        refused = [
            (client.get(served.url, headers={"host": f"rebound.example:{port}"}), 400),
            (client.get("/"), 404),
            (client.get("/r/1/1"), 404),
            (client.get(f"{served.root[:-1]}/r/1/1"), 404),
            (client.get(f"{served.root}/../votes.sqlite"), 404),
            (client.get(f"{served.root}/static/..%2Fserver.py"), 404),
            (client.get(f"{served.root}/static/"), 404),
            *((client.get(f"{served.root}/{place}/pair.html"), 404) for place in ("static", "pages")),
            (client.get(f"{served.root}/r/2/1"), 404),
            (client.get(f"{served.root}/r/1/7"), 404),
            (client.get(f"{served.root}/r/1/{10**30}"), 404),
            (client.get(f"{served.root}/r/{10**30}/1"), 404),
            (client.put(place, data=vote), 405),
            (client.post(place, data=vote, headers={"origin": "http://evil.example"}), 403),
            (client.post(place, data=vote, headers={"origin": "http://127.0.0.1:1"}), 403),  # another local server
            (client.post(place, data=vote, headers={"origin": "null"}), 403),
            (client.post(place, data=vote, headers={"sec-fetch-site": "cross-site"}), 403),
            (client.post(place, data=vote, headers={"sec-fetch-site": "same-site"}), 403),
            (client.post(place, data={"choice": "model"}), 400),
            (client.post(place), 400),
            (client.post(place, content=b"choice=first&x=" + b"x" * 100_000), 413),
            (client.post(f"{served.root}/raters", data={"name": " "}), 400),
            (client.post(f"{served.root}/raters", data={"name": "x" * 61}), 400),
            (client.post(f"{served.root}/raters", data={"name": "a\u202eb"}), 400),
        ]
        assert [response.status_code for response, _ in refused] == [status for _, status in refused]
        for response, _ in refused:
            assert response.headers["content-security-policy"].startswith("default-src 'none'")
            assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
            assert response.headers["cache-control"] == "no-store"
            assert served.root not in response.text or response.request.url.path.startswith(served.root)
        assert {vote.choice for vote in served.votes.all()} == {None}
        own = {"origin": served.origin, "sec-fetch-site": "same-origin"}
        assert client.post(place, data=vote, headers=own).status_code == 303
    with listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    assert (tmp_path / "votes.sqlite").stat().st_mode & 0o077 == 0


def test_a_name_in_other_case_and_spacing_is_the_same_rater(tmp_path: Path) -> None:
    votes = Direct(outputs(tmp_path)).votes
    assert votes.join("Ann Lee") == votes.join("  ann   LEE ")


def test_only_invited_raters_where_names_are_given(tmp_path: Path) -> None:
    served = Direct(outputs(tmp_path), invited=("Ann", "Bob Ray"))
    with served.client("Bob Ray") as client:
        assert '<input id="name"' not in client.get(served.url).text
        assert client.post(f"{served.root}/raters", data={"name": "Eve"}).status_code == 400
    assert [rater.name for rater in served.votes.raters()] == ["Ann", "Bob Ray"]


# -------------------------------------------------------------------------------------------- the counts


def test_fleiss_kappa_of_the_textbook_table() -> None:
    """Ten subjects, fourteen raters, five categories: P = .378, Pe = .213, kappa = .210."""
    table = """0 0 0 0 14 / 0 2 6 4 2 / 0 0 3 5 6 / 0 3 9 2 0 / 2 2 8 1 1
        / 7 7 0 0 0 / 3 2 6 3 0 / 2 5 3 2 2 / 6 5 2 1 0 / 0 2 2 3 7"""
    counts = np.array([[int(n) for n in row.split()] for row in table.split("/")])
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None


def test_fleiss_kappa_equals_the_count_of_agreeing_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=(11, 4))  # items x raters
    counts = np.array([[(row == kind).sum() for kind in range(3)] for row in labels])
    agreeing = [a == b for row in labels for a, b in combinations(row, 2)]
    chance = sum((labels == kind).mean() ** 2 for kind in range(3))
    assert fleiss_kappa(counts) == pytest.approx((np.mean(agreeing) - chance) / (1 - chance))


def cast(rater: str, *outcomes: str, first: bool = True) -> list[Vote]:
    """Return votes with these outcomes on items 1, 2 ...; "" is no vote. `first`: the model's answer is shown first."""
    choices = {"win": "first" if first else "second", "lose": "second" if first else "first", "tie": "tie", "": None}
    return [
        Vote(rater, item, ("set", str(item)), first, choices[outcome])  # type: ignore[arg-type]
        for item, outcome in enumerate(outcomes, start=1)
    ]


def test_majority_agreement_and_judge_by_hand() -> None:
    votes = [
        *cast("Ann", "win", "win", "tie", "lose", "win"),
        *cast("Bob", "win", "tie", "tie", "lose", "", first=False),
        *cast("Cem", "lose", "lose", "tie", "win", ""),
    ]
    judged: dict[tuple[str, str], Any] = {
        ("set", str(n)): kind for n, kind in enumerate(["win", "win", "tie", "win"], 1)
    }
    judged["set", "5"] = "invalid"
    judged["set", "99"] = "lose"  # not voted on
    found = describe(votes, judged, 0.9)
    # majorities: win, none (three outcomes), tie, lose, and win by a single vote
    kinds = ("n", "win", "tie", "lose", "split")
    assert [found["majority"]["pooled"][kind] for kind in kinds] == [5, 2, 1, 1, 1]
    assert found["majority"]["pooled"]["pws"] == 1.25
    assert found["majority"]["benchmarks"]["set"]["win"] == 2
    assert [found["raters"]["Bob"][kind] for kind in kinds[:4]] == [4, 1, 2, 1]
    ann_bob = found["agreement"]["pairwise"][0]
    # equal on three of four items; by chance: wins 2/4 x 1/4, ties 1/4 x 2/4, losses 1/4 x 1/4
    assert (ann_bob["items"], ann_bob["accuracy"]) == (4, 0.75)
    assert ann_bob["kappa"] == pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))
    # agreeing pairs of raters: 1, 0, 3, 1 of 3; shares of win, tie, lose: 4, 4, 4 of 12
    assert found["agreement"]["fleiss"] == {"raters": 3, "items": 4, "kappa": pytest.approx((5 / 12 - 1 / 3) / (2 / 3))}
    # both the judge and the majority have an outcome on items 1, 3 and 4, and the same one on two of them
    assert (found["judge"]["majority"]["items"], found["judge"]["majority"]["accuracy"]) == (3, pytest.approx(2 / 3))
    assert found["judge"]["raters"]["Ann"]["items"] == 4
    assert [found["judge"]["pooled"][kind] for kind in ("n", "win", "tie", "lose", "invalid")] == [5, 3, 1, 0, 1]


def test_without_votes_all_figures_are_none() -> None:
    found = describe([], None, 0.9)
    assert found["majority"]["pooled"]["pws"] is None
    assert found["agreement"] == {"pairwise": [], "fleiss": {"raters": 0, "items": 0, "kappa": None}}
    assert majority([{("s", "1"): "win"}, {("s", "1"): "lose"}]) == {("s", "1"): "invalid"}
    apart = describe([*cast("Ann", "win"), *cast("Bob", "", "tie")], None, 0.9)
    assert apart["agreement"]["pairwise"][0]["kappa"] is None
    assert apart["agreement"]["fleiss"] == {"raters": 2, "items": 0, "kappa": None}


def test_agreement_with_a_file_of_judgments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = outputs(tmp_path, 4)
    votes = Votes.create(tmp_path / "votes.sqlite", read_pairs(files), None, 0)
    rater = votes.join("Ann")
    for vote in votes.of(rater):
        votes.vote(rater, vote.item, "first" if vote.model_first else "second")
    lines = [
        Judgment("set", str(item), order, "h", "judge", "", scores[0], scores[1], True, None)  # type: ignore[arg-type]
        for item, scores in enumerate([(9.0, 5.0), (9.0, 5.0), (5.0, 9.0), (5.0, 5.0)], start=1)
        for order in ("forward", "reverse")
    ]
    (tmp_path / "judgments.jsonl").write_text("".join(json.dumps(vars(line)) + "\n" for line in lines))
    found = printed(capsys, *arguments(files, "--judgments", str(tmp_path / "judgments.jsonl")))
    assert found["judge"]["majority"] == {"items": 4, "accuracy": 0.5, "kappa": 0.0}
    assert found["raters"]["Ann"]["win"] == 4


def test_a_run_names_its_answers_and_its_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gradsift.artifacts import Store
    from gradsift.config import BenchmarkConfig, ComputeConfig, VerifierJudgeConfig
    from gradsift.evaluation.generation import OUTPUTS_FILE
    from gradsift.evaluation.stages.judging import judge
    from gradsift.runtime import Display, Runtime

    runtime = Runtime(Store(tmp_path / "store", say=lambda text: None), ComputeConfig(), Display(), seed=0)
    files = outputs(tmp_path, 4)

    def answers(path: Path) -> Any:
        rows = [row | {"reference": f"good {row['item_id']}"} for row in json.loads(path.read_text())]

        def make(folder: Path) -> dict[str, Any]:
            (folder / OUTPUTS_FILE).write_text(json.dumps(rows))
            return {"rows": len(rows)}

        return runtime.store.obtain("generate", path.stem, {"of": path.stem}, [], make, version=1)

    reference, model = answers(files.reference), answers(files.model)  # the order in run.json must not matter
    run = tmp_path / "run"
    run.mkdir()

    def note() -> None:
        (run / "run.json").write_text(json.dumps({"stages": runtime.store.records_as_dicts()}))

    note()
    assert "has no answers of two models" in refused(capsys, str(run))
    benchmark = BenchmarkConfig(sets=["verifiable"])
    judge(runtime, VerifierJudgeConfig(name="verifier"), benchmark, model, reference)
    note()
    pairs = read_pairs(files_of_run(run))
    assert (pairs.model, pairs.reference) == (MODEL, REFERENCE)
    votes = Votes.create(run / "human_eval.sqlite", pairs, 3, 0)
    rater = votes.join("Ann")
    for vote in votes.of(rater):
        votes.vote(rater, vote.item, "first" if vote.model_first else "second")
    found = printed(capsys, str(run))
    assert found["raters"]["Ann"]["win"] == 3
    assert found["judge"]["majority"] == {"items": 3, "accuracy": 1.0, "kappa": None}
    shutil.rmtree(model.path)
    shutil.rmtree(reference.path)
    assert printed(capsys, str(run)) == found  # votes can be counted without the answers
    assert "model_outputs.json cannot be read" in refused(capsys, str(run), "--port", "0")


def test_a_run_that_ended_before_its_judge_has_the_answers_of_two_models(
    after_smoke: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The questions about forgetting are answered by two models too: before and after the finetune."""
    options = ("scorer=random", "benchmark.general=[verifiable_terse]", "benchmark.limit=5")
    judge = ("judge=openai", "judge.model=m", "judge.base_url=http://127.0.0.1:9/v1", "judge.dry_run=true")
    assert after_smoke(*SMOKE, *options, *judge) == 0
    (run,) = after_smoke.folder.glob("outputs/*/*")
    files = files_of_run(run)
    assert files.judgments is None
    pairs = read_pairs(files)
    assert len(pairs.items) == 5 and {key[0] for key in pairs.items} == {"verifiable"}
    both = files.model, files.reference
    model, reference = (json.loads((file.parent / "manifest.json").read_text()) for file in both)
    stages = json.loads((run / "run.json").read_text())["stages"]
    selected, everything = (stage["fingerprint"] for stage in stages if stage["name"] == "finetune")
    assert selected in model["parents"] and everything in reference["parents"]
    (run / "run.json").write_text(json.dumps({"stages": [s for s in stages if s["fingerprint"] != everything]}))
    capsys.readouterr()
    assert "has no answers of two models" in refused(capsys, str(run))


# ---------------------------------------------------------------------------------------------- mistakes


def test_bad_input_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = outputs(tmp_path)
    assert "give the folder of a run" in refused(capsys, str(tmp_path / "nowhere"))
    for content in ('{"stages": [{"name": "judge"}]}', '{"stages": {"judge": 1}}', "[1]", '{"stages": null}'):
        (tmp_path / "run.json").write_text(content)
        assert "give the folder of a run" in refused(capsys, str(tmp_path))
    assert "either the folder of a run, or two files" in refused(capsys, "--model", str(files.model))
    assert "nobody has voted" in refused(capsys, *arguments(files, "--results"))
    assert "--items 7: there are 6 pairs" in refused(capsys, *arguments(files, "--items", "7", "--port", "0"))
    assert not (tmp_path / "votes.sqlite").exists()
    assert "must have 1 to 60 printable characters" in refused(
        capsys, *arguments(files, "--raters", "Ann,,Bob", "--port", "0")
    )
    with listen(0) as listener:
        port = str(listener.getsockname()[1])
        message = refused(capsys, *arguments(files, "--port", port))
        assert f"--port {port}: " in message and "Address already in use" in message
    assert "--port 70000" in refused(capsys, *arguments(files, "--port", "70000"))
    assert "created with 6" in refused(capsys, *arguments(files, "--items", "5", "--port", "0"))
    assert "created with 0" in refused(capsys, *arguments(files, "--seed", "1", "--port", "0"))
    assert "is more than 4,294,967,295" in refused(capsys, *arguments(files, "--seed", "4294967296", "--port", "0"))
    assert "nobody called Eve" in refused(capsys, *arguments(files, "--results", "--raters", "Eve"))


def test_outputs_that_do_not_match_are_refused_with_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = outputs(tmp_path)
    rows = json.loads(files.reference.read_text())
    rows[2]["instruction"] = "another"
    files.reference.write_text(json.dumps(rows[:5]))
    error = refused(capsys, *arguments(files))
    assert "set/3 (different instruction)" in error
    assert "set/6 (only in the model's answers)" in error


@pytest.mark.parametrize("part", ["generator", "item_id", "dataset"])
def test_names_that_sqlite_cannot_store_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    files = outputs(tmp_path)
    for file in (files.model, files.reference):
        file.write_text(json.dumps([row | {part: f"{row[part]}\ud800"} for row in json.loads(file.read_text())]))
    assert "contains a lone surrogate" in refused(capsys, *arguments(files, "--port", "0"))
    assert not (tmp_path / "votes.sqlite").exists()


def test_a_file_of_other_votes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = outputs(tmp_path)
    Votes.create(tmp_path / "votes.sqlite", read_pairs(files), None, 0).close()
    outputs(tmp_path, bad="another answer")
    for more in ((), ("--results",)):
        assert "votes on other answers (secret-model against" in refused(
            capsys, *arguments(files, *more, "--port", "0")
        )
    (tmp_path / "text.sqlite").write_text("these are no votes, but they fill more than one hundred bytes " * 4)
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE about (name, value)")
    before = (tmp_path / "other.sqlite").read_bytes()
    for name, words in (
        ("text.sqlite", "cannot be opened as a file of votes"),
        ("other.sqlite", "is not a file of votes"),
    ):
        options = [*arguments(files)[:4], "--database", str(tmp_path / name), "--port", "0"]
        assert words in refused(capsys, *options)
    assert (tmp_path / "other.sqlite").read_bytes() == before
    half = read_pairs(outputs(tmp_path, 2))
    with pytest.raises(DataError, match="cannot be written as a file of votes"):
        Votes.create(tmp_path / "nowhere" / "votes.sqlite", half, None, 0)


def test_the_page_names_its_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "gradsift.evaluation.human.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = refused(capsys, *arguments(outputs(tmp_path)))
    assert "the package uvicorn" in error
    assert "'.[human]'" in error


def test_ctrl_c_ends_quietly(tmp_path: Path, serve: Callable[..., Served]) -> None:
    served = serve(*arguments(outputs(tmp_path)))
    with served.client("Ann"):
        served.process.send_signal(signal.SIGINT)
        out, _ = served.process.communicate(timeout=20)
    assert served.process.returncode == 0
    assert "--results" in out


# ------------------------------------------------------------------------------------------ real browser


def begin(watched: Watched, served: Served, name: str) -> None:
    watched.page.goto(served.url)
    watched.page.get_by_label("Your name").fill(name)
    watched.page.get_by_role("button", name="Begin or continue").click()


@NEEDS_CHROMIUM
def test_keys_and_clicks_in_a_browser(tmp_path: Path, serve: Callable[..., Served], browser: Any) -> None:
    served = serve(*arguments(outputs(tmp_path, 5, good=HOSTILE)))
    votes = Votes(tmp_path / "votes.sqlite")
    watched = Watched(browser)
    page = watched.page
    begin(watched, served, "Ann 1t2")  # keys in the field for the name are not votes
    watched.is_at(1)
    for item, key in enumerate(["1", "ArrowRight", "t"], start=1):
        watched.is_at(item)
        page.keyboard.press(key)
    watched.is_at(4)
    page.keyboard.press("Control+1")
    page.keyboard.press("b")
    watched.is_at(3)
    page.keyboard.press("ArrowLeft")  # another vote in place of the tie
    watched.is_at(4)
    page.reload()
    watched.is_at(4)
    page.go_back()  # keys must work after the browser's own navigation too
    page.go_forward()
    watched.is_at(4)
    page.get_by_role("button", name="Tie").click()
    watched.is_at(5)
    page.keyboard.press("0")
    watched.is_at("done")
    (rater,) = votes.raters()
    assert [vote.choice for vote in votes.of(rater)] == ["first", "second", "first", "tie", "tie"]
    for item in range(1, 6):  # the hostile answer is on one of them
        page.goto(f"{served.url}r/1/{item}")
        assert page.evaluate("window.stolen") is None
        assert page.locator(".text *").count() == 0
    page.goto(f"{served.url}r/1/done")
    page.get_by_role("button", name="Finish").click()
    won = sum(vote.outcome == "win" for vote in votes.of(rater))
    assert page.locator("#win").inner_text() == str(won)
    watched.close_clean(served.origin + "/")


@NEEDS_CHROMIUM
def test_without_a_script_on_a_telephone(tmp_path: Path, serve: Callable[..., Served], browser: Any) -> None:
    long_word = "x" * 2000
    served = serve(*arguments(outputs(tmp_path, 2, good=long_word, bad="\u0645\u0631\u062d\u0628\u0627 " * 50)))
    watched = Watched(browser, java_script_enabled=False, viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = watched.page
    begin(watched, served, "Bob")
    for item in (1, 2):
        watched.is_at(item)
        boxes = [page.locator(f"#{name}").bounding_box() for name in ("first", "tie", "second")]
        # the three buttons are visible, side by side and tall enough to tap; no answer is wider than the screen
        assert all(
            box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640 for box in boxes
        )
        assert all(box["height"] >= 44 for box in boxes)
        assert all(left["x"] + left["width"] <= right["x"] for left, right in pairwise(boxes))
        assert all(box["width"] <= 360 for box in [text.bounding_box() for text in page.locator(".text").all()])
        page.get_by_role("button", name="Second is better").click()
    watched.is_at("done")
    page.get_by_role("button", name="Finish").click()
    assert page.locator("h1").inner_text() == "Your votes"
    watched.close_clean(served.origin + "/")


@NEEDS_CHROMIUM
def test_a_foreign_page_cannot_vote(tmp_path: Path, serve: Callable[..., Served], browser: Any) -> None:
    """A page of another local server, which knows the secret address, posts a form."""
    served, other = serve(*arguments(outputs(tmp_path))), tmp_path / "other"
    other.mkdir()
    foreign = serve(*arguments(outputs(other)))
    with served.client("Ann"):
        pass
    page = browser.new_page()
    page.goto(foreign.origin + "/nothing-here")
    target = f"{served.url}r/1/1"
    answer = page.evaluate(
        "url => fetch(url, {method: 'POST', body: new URLSearchParams({choice: 'first'})}).catch(error => 'refused')",
        target,
    )
    assert answer == "refused"
    page.close()
    votes = Votes(tmp_path / "votes.sqlite")
    assert {vote.choice for vote in votes.of(votes.raters()[0])} == {None}
