"""The report page in a real browser, for a sweep with hostile texts, failed jobs and lost artifacts."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from browsing import NEEDS_CHROMIUM, Watched
from conftest import SMOKE
from rich.console import Console

from gradsift.artifacts import Artifact, Store
from gradsift.data.examples import Example, Turn, make_example, write_examples
from gradsift.data.load import EXAMPLES_FILE, LABELS_FILE, Labels
from gradsift.gradients.statistics import STATISTICS_FILE, Statistics
from gradsift.pages import portable, presentable
from gradsift.report import page as page_module
from gradsift.report.__main__ import main
from gradsift.report.browser import CUT, STATUSES, Pool, held, pack, packed_pools, pools
from gradsift.report.figures import FIGURES
from gradsift.report.inline_svg import inline_svg
from gradsift.report.material import Material, Missing, read
from gradsift.report.page import groups_of, write_report
from gradsift.report.table import Table
from gradsift.report.terminal import report_at_end, sweep_finished
from gradsift.run_record import composition
from gradsift.runtime import Display
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores, write_scores
from gradsift.scoring.stage import SCORES_FILE
from gradsift.selection.stage import SELECTION_FILE, write_selection
from gradsift.selection.topk import topk

ROWS = 120
PATH = "data.path=/home/somebody/secret/rows.json"
HOSTILE = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'></div>&amp; \"'"
SPECIAL = [
    (HOSTILE, "</script><script>window.stolen = 3</script>", "<!-- <script> {{ 7 * 7 }} {% raw %}"),
    ("\u202eright to left\u202c", "\u0645\u0631\u062d\u0628\u0627", "\u2066isolated"),
    ("control \x00\x1b[31m characters", "a\x1eb\x1fc", "tab\tand\r\nline\u2028end"),
    ("a megabyte", "", "word " * 200_000 + "END"),
    ("\u00c9COLE", "\u0130stanbul", "\u00fcber \U0001f600"),
    ("", "", ""),
]
WORDS = ("sort", "the", "list", "of", "words", "capital", "name", "a", "colour", "count", "THE", "Of")
LABELS = Labels(["clean" if row % 3 else "wrong_answer" for row in range(ROWS)], ["add", "sort"] * (ROWS // 2))


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    texts = list(SPECIAL)
    while len(texts) < ROWS:
        texts.append(tuple(" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(3)))  # type: ignore[arg-type]
    seen: Counter[str] = Counter()
    history = (Turn("user", "before"), Turn("assistant", "answer"))
    return [
        make_example(2 * row, history if row == 7 else (), *fields, {"row": row}, seen)
        for row, fields in enumerate(texts)
    ]


def scores_of(name: str) -> Scores:
    rng = np.random.default_rng(len(name))
    score = rng.normal(size=ROWS).round(1)  # with ties
    scores = Scores(score, {"drop": score / 2} if name == "gsnr" else {"ifd": score, "length": np.full(ROWS, 16)})
    if name == "superfilter":
        scores.score[10] = np.nan
        scores.mark(np.arange(ROWS) == 10, UNDEFINED, "a single <b>token</b>")
        scores.mark(np.arange(ROWS) % 17 == 11, EXCLUDED, "IFD is at least 1")
    return scores


@dataclass
class Made:
    """The folder of a sweep, with files as the stages write them."""

    folder: Path
    store: Store
    pool: list[Example]

    def load(self) -> Artifact:
        def make_load(part: Path) -> dict[str, Any]:
            write_examples(part / EXAMPLES_FILE, self.pool)
            pq.write_table(pa.table({"quality": LABELS.quality, "family": LABELS.family}), part / LABELS_FILE)
            return {"rows": ROWS}

        return self.store.obtain("load", "mine", {}, [], make_load, version=1)

    def job(self, number: int, scorer: str, alpha: float, **changes: Any) -> Path:
        scores = scores_of(scorer)
        folder = self.folder / f"{number}-{scorer}-{alpha}"
        folder.mkdir(parents=True)
        self.store.records.clear()
        loaded = self.load()
        if scorer == "gsnr":
            self.store.obtain("statistics", "M2", {}, [loaded], _statistics, version=1)
        ids = [example.example_id for example in self.pool]

        def make_scores(part: Path) -> dict[str, Any]:
            write_scores(part / SCORES_FILE, scores, [ids])
            return {"rows": ROWS}

        scored = self.store.obtain("score", scorer, {"scorer": scorer}, [loaded], make_scores, version=1)
        size = int(alpha * ROWS)

        def make_selection(part: Path) -> dict[str, Any]:
            positions = topk(scores, size).positions
            np.save(part / "positions.npy", positions)
            write_selection(part / SELECTION_FILE, positions, scores, loaded.file(EXAMPLES_FILE))
            return {"rows": len(positions), "budget": size, "shortfall": size - len(positions)}

        self.store.obtain("select", f"{scorer}-{alpha}", {"alpha": alpha}, [scored], make_selection, version=1)
        pws = {"n": 10, "win": 5 + number % 3, "tie": 2, "lose": 3, "invalid": 0, "pws": 1.2 + number / 100}
        pws |= {"pws_low": 1.1, "pws_high": 1.4}
        run = {
            "status": "finished",
            "variant": f"{scorer}{alpha}",
            "overrides": [f"scorer={scorer}", f"alpha={alpha}", PATH],
            "scorer": scorer,
            "alpha": alpha,
            "seed": 0,
            "data_seed": 0,
            "dataset": "mine",
            "proxy": "nano",
            "members": 2,
            "snapshots": [1, 2],
            "target": "nano",
            "judge": "verifier",
            "benchmark_sets": ["vicuna"],
            "seconds": 60.0 + number,
            "data": {"rows": ROWS},
            "stages": self.store.records_as_dicts(),
            "pws": pws["pws"],
            "pooled": pws,
            "benchmarks": {"vicuna": pws},
            "selection": {"rows": size} | composition(LABELS, topk(scores, size).positions.tolist()),
            "files": {},
        } | changes
        (folder / "run.json").write_text(json.dumps(run))
        values = {"artifacts": str(self.store.root), "selector": {"name": "topk"}, "data": {"path": "/home/x/y.json"}}
        (folder / "config.yaml").write_text(yaml.safe_dump({"schemas": {}, "values": values}))
        return folder

    def failed(self, number: int, error: str) -> None:
        folder = self.folder / f"{number}-cherry-0.1"
        folder.mkdir()
        content = {"status": "failed", "overrides": ["scorer=cherry", PATH], "stages": [], "pws": None, "error": error}
        (folder / "run.json").write_text(json.dumps(content))


def _statistics(part: Path) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    columns = {field.name: rng.gamma(2, size=ROWS) for field in fields(Statistics)}
    pq.write_table(pa.table(columns), part / STATISTICS_FILE)
    return {"rows": ROWS}


def made(folder: Path) -> Made:
    return Made(folder / "sweep", Store(folder / "store", say=lambda line: None), examples())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A sweep of two methods at two budgets, a stopped run and a failed one, and its report."""
    jobs = made(tmp_path_factory.mktemp("page"))
    for number, (scorer, alpha) in enumerate([(s, a) for s in ("gsnr", "superfilter") for a in (0.1, 0.25)]):
        jobs.job(number, scorer, alpha)
    stopped = {"status": "stopped", "pws": None, "pooled": None, "benchmarks": None}
    jobs.job(4, "random", 0.1, **stopped)
    jobs.failed(5, f"no file /home/somebody/secret/model.bin {HOSTILE}")
    write_report(jobs.folder, formats=["svg"])
    return jobs


@pytest.fixture
def opened(sweep: Made, browser: Any) -> Any:
    """The page with its examples unpacked. At the end, checks that it logged no message and made no request."""
    watched = Watched(browser, viewport={"width": 1280, "height": 900})
    watched.page.goto((sweep.folder / "report.html").as_uri())
    watched.page.wait_for_selector(".example", state="attached")
    yield watched.page
    watched.close_clean("file:", "data:", "blob:")
    assert [url for url in watched.requests if url.startswith("file:")] == [watched.requests[0]]


def shown_text(example: Example) -> str:
    before = "\n".join(f"{turn.role}: {turn.content}" for turn in example.history)
    texts = (example.instruction, example.input, example.output, before)
    return "\n".join(presentable(text[:CUT]) for text in texts)


def ranks_by_hand(scores: Scores) -> list[int]:
    """Return the ranks in a slow way: one plus the number of scored examples that come before the example."""
    ranks = []
    for row in range(ROWS):
        if scores.status[row] != SCORED:
            ranks.append(0)
            continue
        before = [
            other
            for other in range(ROWS)
            if scores.status[other] == SCORED and (-scores.score[other], other) < (-scores.score[row], row)
        ]
        ranks.append(len(before) + 1)
    return ranks


def first_rows(page: Any, count: int = 8) -> list[str]:
    return [line.strip() for line in page.locator("#list .example .rank").all_inner_texts()[:count]]


def search(page: Any, query: str) -> int:
    page.fill("#query", query)
    return int(page.inner_text("#matches").split(" ")[0].replace(",", ""))


# -------------------------------------------------------------------------------------------- the page


@NEEDS_CHROMIUM
def test_every_figure_is_there_or_says_why_not(sweep: Made, opened: Any) -> None:
    material = read(sweep.folder)
    for entry in FIGURES:
        figure = opened.locator(f'figure[data-name="{entry.name}"]')
        assert figure.count() == 1
        assert entry.title in figure.inner_text()
        try:
            entry(material)
        except Missing as reason:
            assert figure.locator("svg").count() == 0
            assert portable(str(reason)) in figure.inner_text()
        else:
            assert figure.locator("svg[role=img]").get_attribute("aria-label").startswith(entry.title)
            for link in figure.locator(".files a").all():
                assert (sweep.folder / link.get_attribute("href")).is_file()
    for link in opened.locator("#results a").all():
        assert (sweep.folder / link.get_attribute("href")).is_file()
    for place in opened.locator("nav a").all():
        assert opened.locator(place.get_attribute("href")).count() == 1


@NEEDS_CHROMIUM
def test_the_head_and_the_failures_are_told(sweep: Made, opened: Any) -> None:
    head = opened.inner_text("#headline")
    assert "6 runs: 3 methods, 2 budgets, 1 seed" in head
    assert "superfilter at 25 %" in head
    assert "1.230 [1.100, 1.400]" in head
    assert "not distinguishable in 2" in head
    assert "4 of 6" in head
    assert "1 did not, 1 stopped as asked" in head
    assert "1 of 6 runs did not finish" in head
    missing = opened.inner_text("#missing")
    assert f"no file \u2026/model.bin {HOSTILE}" in missing
    assert "4-random-0.1: it was stopped early" in missing
    assert opened.locator("tr.unfinished").count() == 1
    assert opened.locator("td.best").count() == 2


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_screen(sweep: Made, browser: Any, width: int) -> None:
    watched = Watched(browser, viewport={"width": width, "height": 800})
    page = watched.page
    page.goto((sweep.folder / "report.html").as_uri())
    page.wait_for_selector(".example", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plots = "[...document.querySelectorAll('.plot')].map((one) => one.scrollWidth - one.clientWidth)"
    assert set(page.evaluate(plots)) == {0}
    for table in page.locator(".table").all():  # the first column stays in view
        left = "(one) => one.querySelector('tbody th').getBoundingClientRect().left - one.getBoundingClientRect().left"
        before = table.evaluate(left)
        table.evaluate("(one) => one.scrollLeft = 10000")
        assert table.evaluate(left) == pytest.approx(before, abs=1)
    page.locator(".example").first.click()
    assert page.locator("#detail").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    watched.close_clean("file:", "data:", "blob:")


@NEEDS_CHROMIUM
def test_light_and_dark_by_the_system_and_by_hand(sweep: Made, browser: Any) -> None:
    shades = []
    for scheme in ("light", "dark"):
        watched = Watched(browser, color_scheme=scheme)
        watched.page.goto((sweep.folder / "report.html").as_uri())
        for _ in range(2):
            shades.append(watched.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            watched.page.click("#theme")
        watched.close_clean("file:", "data:", "blob:")
    light, other, dark, back = shades
    assert (light, other) == (back, dark)
    assert light != dark


@NEEDS_CHROMIUM
def test_without_a_script_all_but_the_examples_is_shown(sweep: Made, browser: Any) -> None:
    watched = Watched(browser, java_script_enabled=False)
    watched.page.goto((sweep.folder / "report.html").as_uri())
    assert "unpacked by a script" in watched.page.inner_text("#examples")
    assert not watched.page.locator("#query").is_visible()
    assert watched.page.locator("#results table").count() > 0
    watched.close_clean("file:", "data:", "blob:")


def test_only_our_own_script_and_style_are_allowed(sweep: Made) -> None:
    page = (sweep.folder / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")  # type: ignore[index]
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (ours,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert " style=" not in page
    assert not re.search(r"\son\w+=", re.sub(r"(?s)<script.*?</script>", "", page).replace("onerror=&#39;", ""))


def test_no_path_of_the_machine_is_told(sweep: Made) -> None:
    page = (sweep.folder / "report.html").read_text(encoding="utf-8")
    assert str(sweep.folder.parent) not in page
    assert "/home/" not in page
    assert "rows.json" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file /home/me/data/x.json, sorry", "no file \u2026/x.json, sorry"),
        ("data.path=/a/b/c.json", "data.path=\u2026/c.json"),
        ("~/models/llama: bad", "\u2026/llama: bad"),
        (r"C:\Users\me\x.json", "\u2026/x.json"),
        ("artifacts/score/gsnr-1 and 6/2/2 and 1 / 2", "artifacts/score/gsnr-1 and 6/2/2 and 1 / 2"),
        ("https://host.example/v1/chat", "https://host.example/v1/chat"),
    ],
)
def test_absolute_folders_are_left_out_and_nothing_else(text: str, shown: str) -> None:
    assert portable(text) == shown


def test_a_table_is_grouped_where_columns_share_a_heading() -> None:
    groups = groups_of(["place", "0.1: gsnr", "0.1: random", "0.2: gsnr"])
    assert groups == [
        ("alpha 0.1", ["gsnr", "random"]),
        ("alpha 0.2", ["gsnr"]),
    ]
    assert groups_of(["scorer", "alpha", "PWS"]) == []
    assert groups_of(["place", "0.1: gsnr", "0.2: gsnr"]) == []


def test_words_stand_at_the_left_and_figures_at_the_right() -> None:
    rows = [["gsnr", "2", "late_loss", "0.9 [0.8, 1.0]", "-"], ["-", "4", "(no finetuning)", "-", ""]]
    assert Table("t", list("abcde"), rows).text_columns == {0, 2}
    rows.append(["random", "failed", "random", "failed", "-"])
    assert Table("t", list("abcde"), rows).text_columns == {0, 2}


def test_a_figure_follows_the_page_and_brings_nothing_else_along() -> None:
    svg = inline_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10pt" height="5pt">'
        "<script>window.stolen = 1</script><style>*{fill:red}</style>"
        '<a href="https://host.example"><text>out</text></a>'
        '<path id="p" onclick="window.stolen = 2" style="stroke: #1d1e21; fill: none" clip-path="url(#c)"/>'
        '<use xlink:href="#p"/><image href="https://host.example/x.png"/>'
        "<text style=\"font: bold 9px 'DejaVu Sans', sans-serif; text-anchor: middle\">&lt;b&gt; label</text></svg>",
        "scores",
        'a "label"',
    )
    for bad in ("script", "style", "onclick", "host.example", "stolen", "height"):
        assert bad not in svg
    assert '<path id="scores-p" clip-path="url(#scores-c)" stroke="var(--ink)" fill="none"' in svg
    assert '<use href="#scores-p"' in svg
    assert 'font-size="9" font-family="inherit" font-weight="bold" text-anchor="middle">&lt;b&gt; label</text>' in svg
    assert 'aria-label="a &quot;label&quot;"' in svg


# ---------------------------------------------------------------------------------------- the examples


@NEEDS_CHROMIUM
def test_a_search_finds_what_a_loop_finds(sweep: Made, opened: Any) -> None:
    texts = [shown_text(example).lower() for example in sweep.pool]
    plain = ["", "e", "the", "THE list", "of a", "  colour  ", "zzz", "word END"]
    for query in [*plain, "<script>", "\u0645\u0631", "\u00e9cole"]:
        words = query.lower().split()
        assert search(opened, query) == sum(all(word in text for word in words) for text in texts), query
    assert search(opened, "nothing has this") == 0
    assert "No example passes" in opened.inner_text("#list")


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scorer", ["gsnr", "superfilter"])
def test_sorting_and_filters_are_those_of_the_scores(sweep: Made, opened: Any, scorer: str) -> None:
    opened.select_option("#run", label=f"{scorer} at 25 %")
    scores = scores_of(scorer)
    ranks = ranks_by_hand(scores)
    scored = sum(rank > 0 for rank in ranks)
    assert first_rows(opened) == [f"#{rank}" for rank in range(1, 9)]
    best = opened.locator("#list .example .value").all_inner_texts()[:8]
    assert [float(value) for value in best] == sorted(scores.score[scores.status == SCORED], reverse=True)[:8]
    opened.click("text=Worst 20")
    assert first_rows(opened) == [f"#{scored - step}" for step in range(8)]
    assert opened.inner_text("#matches").startswith("20 of")
    opened.click("text=Best 20")
    assert opened.inner_text("#matches").startswith("20 of")
    opened.click("[data-view=all]")
    opened.select_option("#sort", "row")
    assert first_rows(opened) == [f"#{rank}" if rank else "\u2013" for rank in ranks[:8]]
    kept = set(topk(scores, int(0.25 * ROWS)).positions.tolist())
    for value, count in (
        ("kept", len(kept)),
        ("dropped", ROWS - len(kept)),
        ("undefined", int((scores.status == UNDEFINED).sum())),
        ("excluded", int((scores.status == EXCLUDED).sum())),
    ):
        opened.select_option("#kept", value)
        assert search(opened, "") == count
    opened.select_option("#kept", "kept")
    opened.select_option("#label", label="wrong_answer")
    opened.select_option("#family", label="add")
    texts = {row: shown_text(example).lower() for row, example in enumerate(sweep.pool)}
    expected = [row for row in kept if row % 3 == 0 and row % 2 == 0 and "the" in texts[row]]
    assert search(opened, "the") == len(expected)


@NEEDS_CHROMIUM
def test_where_two_methods_disagree_most(sweep: Made, opened: Any) -> None:
    opened.click("[data-view=apart]")
    opened.select_option("#other", label="superfilter")
    ours, theirs = (ranks_by_hand(scores_of(name)) for name in ("gsnr", "superfilter"))
    both = [row for row in range(ROWS) if ours[row] and theirs[row]]
    expected = sorted(both, key=lambda row: (-abs(ours[row] - theirs[row]), row))[:8]
    assert first_rows(opened) == [f"#{ours[row]}" for row in expected]
    beside = opened.locator("#list .example .value").all_inner_texts()[:8]
    assert beside == [f"there #{theirs[row]}" for row in expected]


@NEEDS_CHROMIUM
def test_an_example_says_why_it_was_kept_or_dropped(sweep: Made, opened: Any) -> None:
    def why() -> str:
        return str(opened.inner_text(".why"))

    opened.locator(".example").first.click()
    assert why() == f"Kept: gsnr ranks it 1 of {ROWS}, within the budget of 12 (10 %)."
    opened.click("text=Worst 20")
    assert why() == f"Dropped: gsnr ranks it {ROWS} of {ROWS}, beyond the budget of 12 (10 %)."
    opened.select_option("#run", label="superfilter at 10 %")
    opened.click("[data-view=all]")
    opened.select_option("#kept", "undefined")
    assert why() == "Not kept: superfilter gives it no score that counts (undefined: a single <b>token</b>)."
    assert opened.inner_text("#detail-name") == "Row 20"
    ranks = [ranks_by_hand(scores_of(name))[10] for name in ("gsnr", "superfilter", "random")]
    lines = [line.split("\t") for line in opened.locator("#detail tbody").first.inner_text().split("\n")]
    assert [line[:2] for line in lines] == [
        ["gsnr", f"{ranks[0]} of {ROWS}"],
        ["superfilter", "undefined"],
        ["random", f"{ranks[2]} of {ROWS}"],
    ]
    values = opened.locator("#detail tbody").last.inner_text()
    measured = np.random.default_rng(1).gamma(2, size=ROWS)[10]
    assert f"G_s, mean norm, early\t{float(f'{measured:.4g}'):g}" in values
    assert "ifd" in values


@NEEDS_CHROMIUM
def test_hostile_broken_and_huge_texts_are_shown_as_text(sweep: Made, opened: Any) -> None:
    opened.select_option("#sort", "row")
    opened.locator(".example").first.click()
    for number, example in enumerate(sweep.pool[: len(SPECIAL) + 2]):
        texts = opened.locator("#detail .text").all()
        before = "\n".join(f"{turn.role}: {turn.content}" for turn in example.history)
        fields = [before, example.instruction or "(empty)", example.input, example.output or "(empty)"]
        expected = [presentable(text[:CUT]) for text in fields if text]
        assert [text.evaluate("node => node.textContent") for text in texts] == expected, number
        assert all(text.evaluate("node => getComputedStyle(node).unicodeBidi") == "plaintext" for text in texts)
        assert opened.locator("#detail .text *").count() == 0
        hidden = len(example.output) - CUT
        assert (f"{hidden:,} more characters are cut" in opened.inner_text("#detail")) is (hidden > 0)
        opened.keyboard.press("j")
    assert search(opened, "script onerror") == 1
    assert opened.locator("#list .example *:not(span, mark)").count() == 0
    assert opened.locator("#list mark").count() > 0
    assert opened.evaluate("window.stolen") is None
    assert (sweep.folder / "report.html").stat().st_size < 500_000


@NEEDS_CHROMIUM
def test_keys(sweep: Made, opened: Any) -> None:
    def active() -> str:
        return str(opened.get_attribute("#list", "aria-activedescendant"))

    opened.keyboard.press("/")
    opened.keyboard.type("jk/")  # in the field they are letters
    assert opened.input_value("#query") == "jk/"
    opened.keyboard.press("Escape")
    assert opened.input_value("#query") == ""
    opened.keyboard.press("Enter")
    assert active() == "example-0"
    for key, place in (("j", 1), ("ArrowDown", 2), ("j", 3), ("k", 2), ("ArrowUp", 1), ("End", ROWS - 1), ("Home", 0)):
        opened.keyboard.press(key)
        assert active() == f"example-{place}"
        assert opened.locator(f"#example-{place}[aria-selected=true]").is_visible()
    opened.keyboard.press("j")
    opened.keyboard.press("Enter")
    assert "ranks it 2 of" in opened.inner_text("#detail")
    opened.keyboard.press("j")
    assert "ranks it 3 of" in opened.inner_text("#detail")
    opened.keyboard.press("Escape")
    assert not opened.locator("#detail").is_visible()
    assert opened.evaluate("document.activeElement.id") == "list"


# ------------------------------------------------------------------------------------- the packed data


def unpacked(data: str, column: Sequence[Any], rows: int) -> np.ndarray:
    kind, at = column
    return np.frombuffer(gzip.decompress(base64.b64decode(data)), np.dtype(f"<{kind}"), rows, at)


def test_what_is_packed_is_what_the_runs_wrote(sweep: Made) -> None:
    (pool,) = pools(read(sweep.folder))
    packed = pack(pool)
    about = packed.about
    assert [method["name"] for method in about["methods"]] == ["gsnr", "superfilter", "random"]
    for method in about["methods"]:
        scores = scores_of(method["name"])
        np.testing.assert_array_equal(unpacked(packed.data, method["score"], ROWS), scores.score.astype(np.float32))
        assert unpacked(packed.data, method["rank"], ROWS).tolist() == ranks_by_hand(scores)
        status = unpacked(packed.data, method["status"], ROWS)
        assert [STATUSES[code] for code in status] == scores.status.tolist()
        reason = unpacked(packed.data, method["reason"], ROWS)
        assert [method["reasons"][code] for code in reason] == scores.reason.tolist()
    for selection in about["selections"]:
        scorer = about["methods"][selection["method"]]["name"]
        place = unpacked(packed.data, selection["place"], ROWS)
        positions = topk(scores_of(scorer), selection["budget"]).positions
        assert np.argsort(place)[ROWS - len(positions) :].tolist() == positions.tolist()
    rows = unpacked(packed.data, about["row_index"], ROWS)
    assert rows.tolist() == [example.row_index for example in sweep.pool]
    texts = gzip.decompress(base64.b64decode(packed.data))[about["texts"] :].decode().split("\x1e")
    assert [text.replace("\x1f", "\n") for text in texts] == [shown_text(example) for example in sweep.pool]


def test_of_a_large_pool_the_selected_and_a_share_of_the_others_are_held(sweep: Made) -> None:
    (pool,) = pools(read(sweep.folder))
    selected = {row for one in pool.selections for row in np.flatnonzero(one["place"]).tolist()}
    most = len(selected) + 20
    rows = held(pool, most)
    assert selected <= set(rows.tolist())
    assert len(rows) == len(set(rows.tolist())) == most
    assert held(pool, ROWS).tolist() == list(range(ROWS))
    best = {int(np.flatnonzero(one["place"] == 1)[0]) for one in pool.selections}
    assert len(held(pool, 10)) == 10 and best <= set(held(pool, 10).tolist())
    about = pack(pool, most).about
    assert (about["rows"], about["total"]) == (most, ROWS)
    assert about["methods"][0]["scored"] == ROWS  # ranks are among all


def test_pools_of_any_sizes_are_held_in_full_while_there_is_room(sweep: Made) -> None:
    (large,) = pools(read(sweep.folder))
    small = replace(large, examples=large.examples[:6], quality=None, family=None, methods=[], selections=[])

    def rows(most: int) -> list[int]:
        return [packed.about["rows"] for packed in packed_pools([large, small], most)]

    assert rows(ROWS + 6) == [ROWS, 6]
    assert rows((ROWS + 6) // 2) == [ROWS // 2, 3]
    assert packed_pools([], 10) == []


def test_rankings_of_one_name_are_told_apart(tmp_path: Path) -> None:
    jobs = made(tmp_path)
    jobs.job(0, "gsnr", 0.1)
    jobs.job(1, "gsnr", 0.25, seed=1)
    (pool,) = pools(read(jobs.folder))
    assert [method["name"] for method in pool.methods] == ["gsnr"]  # one and the same scores
    run = json.loads((jobs.folder / "1-gsnr-0.25" / "run.json").read_text())
    other = next(stage for stage in run["stages"] if stage["name"] == "score")
    moved = Path(other["artifact"]).with_name("gsnr-again")
    shutil.copytree(other["artifact"], moved)
    manifest = json.loads((moved / "manifest.json").read_text()) | {"fingerprint": "other"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    other |= {"artifact": str(moved), "fingerprint": "other"}
    (jobs.folder / "1-gsnr-0.25" / "run.json").write_text(json.dumps(run))
    (pool,) = pools(read(jobs.folder))
    assert [method["name"] for method in pool.methods] == ["gsnr", "gsnr, seed 1"]
    assert [selection["name"] for selection in pool.selections] == ["gsnr at 10 %", "gsnr, seed 1 at 25 %"]


def test_a_pool_without_labels_or_texts_to_sort_by_is_packed(sweep: Made) -> None:
    (pool,) = pools(read(sweep.folder))
    bare = Pool("bare", pool.examples, None, None, [pool.methods[0] | {"parts": []}], pool.selections[:1])
    about = pack(bare).about
    assert (about["labels"], about["families"], about["methods"][0]["parts"]) == ([], [], [])


# -------------------------------------------------------------------------------------- when it is written


FEW = [entry for entry in FIGURES if entry.name in ("pws", "eps", "score_distributions", "labels", "cost")]


def draw(entries: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gradsift.report.figures", "gradsift.report.page"):
        monkeypatch.setattr(f"{module}.FIGURES", entries)


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have only five figures, for tests that are not about figures."""
    draw(FEW, monkeypatch)


@pytest.mark.usefixtures("few_figures")
def test_the_command_writes_it_elsewhere_and_refuses_in_one_line(
    sweep: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sweep.folder / "0-gsnr-0.1"
    assert main([str(run), "--to", str(tmp_path / "there"), "--format", "svg"]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'there' / 'report.html'}\n"
    page = (tmp_path / "there" / "report.html").read_text(encoding="utf-8")
    assert "One run: gsnr at 10 %" in page
    assert not list(tmp_path.glob("there/**/*.png"))
    assert not (run / "report.html").exists()
    for arguments, words in (([str(tmp_path / "nowhere")], "nowhere"), ([str(run), "--format", "pdf"], "'pdf'")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error


@pytest.mark.usefixtures("few_figures")
def test_without_the_store_the_report_says_what_is_gone(tmp_path: Path) -> None:
    jobs = made(tmp_path)
    jobs.job(0, "gsnr", 0.1)
    shutil.rmtree(jobs.store.root)
    page = write_report(jobs.folder).read_text(encoding="utf-8")
    assert "are not in the store any more" in page
    assert "No run got as far as a selection" in page
    assert "1.200" in page


@pytest.mark.usefixtures("few_figures")
def test_a_sweep_ends_with_its_report_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = made(tmp_path)
    job = jobs.job(0, "gsnr", 0.1)
    assert sweep_finished(jobs.folder) is True
    assert f"report: {jobs.folder / 'report.html'}" in capsys.readouterr().out
    names = {path.stem for path in jobs.folder.glob("figures/*.svg")}
    assert "pws" in names
    assert not list(jobs.folder.glob("figures/*.png"))  # which W&B alone has a use for
    page = (jobs.folder / "report.html").read_text(encoding="utf-8")
    assert '<a href="work.csv">' in page and (jobs.folder / "work.csv").is_file()
    assert {"pws.csv", "pws.md"} <= {path.name for path in jobs.folder.glob("tables/*")}
    (jobs.folder / "report.html").unlink()
    config = yaml.safe_load((job / "config.yaml").read_text())
    config["values"]["report"] = False
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    assert sweep_finished(jobs.folder) is True
    assert not (jobs.folder / "report.html").exists()


def test_a_report_that_fails_is_one_line(tmp_path: Path) -> None:
    jobs = made(tmp_path)
    job = jobs.job(0, "gsnr", 0.1)
    (job / "run.json").write_text("{")
    with Console(record=True, width=400) as console:
        assert report_at_end(jobs.folder, Display(console)) is None
    (line,) = console.export_text().splitlines()
    assert line.startswith("report: not written (")
    assert "run.json" in line


def test_a_figure_with_a_defect_is_told_and_the_page_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Material) -> Any:
        raise ZeroDivisionError("by <nothing>")

    jobs = made(tmp_path)
    jobs.job(0, "gsnr", 0.1)
    draw([replace(one, draw=wraps(one.draw)(broken)) if one.name == "eps" else one for one in FEW], monkeypatch)
    assert main([str(jobs.folder), "--format", "svg"]) == 2
    told = "is written, but for the figure eps, which failed with ZeroDivisionError: by <nothing>"
    assert told in capsys.readouterr().err
    page = (jobs.folder / "report.html").read_text(encoding="utf-8")
    assert "Not drawn: failed with ZeroDivisionError: by &lt;nothing&gt;." in page
    assert page.count("<svg") > 3 and 'id="repeat"' in page
    with Console(record=True, width=400) as console:
        report_at_end(jobs.folder, Display(console))
    line = console.export_text().splitlines()[0]  # a second one if it took long
    assert line == f"report: {jobs.folder / 'report.html'} {told}"


@pytest.mark.usefixtures("few_figures")
def test_a_run_ends_with_its_report(gradsift: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for option in SMOKE if option != "report=false"]
    assert gradsift(*options, "scorer=random", "stop_after=selection") == 0
    (folder,) = gradsift.folder.glob("outputs/*/*")
    assert f"report: {folder.relative_to(gradsift.folder) / 'report.html'}" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This run ended early: it was stopped after selection." in page
    assert gradsift(*options, "scorer=random", "stop_after=selection", "report=false") == 0
    assert len(list(gradsift.folder.glob("outputs/*/*/report.html"))) == 1


def test_a_report_that_fails_leaves_the_run_as_it_is(
    gradsift: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a defect\nof two lines")

    monkeypatch.setattr(page_module, "write_report", broken)
    options = [option for option in SMOKE if option != "report=false"]
    assert gradsift(*options, "scorer=random", "stop_after=selection") == 0
    assert "report: not written (ZeroDivisionError: a defect);" in capsys.readouterr().out
    assert [run["status"] for run in gradsift.runs()] == ["stopped"]


@pytest.mark.usefixtures("few_figures")
def test_a_run_that_fails_on_the_way_still_ends_with_its_report(
    gradsift: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"say {letter}", "output": letter} for letter in "abcd"]  # IFD needs two tokens
    (gradsift.folder / "rows.json").write_text(json.dumps(rows))
    options = ("data=json", "data.path=rows.json", "proxy=tiny_bytes", "tracker=none", "compute.threads=1")
    assert gradsift(*options, "scorer=superfilter", "alpha=0.5", "stop_after=selection") == 2
    told = capsys.readouterr()
    (folder,) = gradsift.folder.glob("outputs/*/*")
    assert "report: " in told.out
    assert told.err.startswith("error: no example has a score")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This run did not finish (failed): no example has a score" in page
    assert gradsift(*options, "scorer=superfilter", "alpha=0.1", "stop_after=selection") == 2  # before any work
