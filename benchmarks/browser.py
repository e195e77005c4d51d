"""Measure how long the report's data browser takes to answer at full size, in a real browser.

    python -m benchmarks.browser [--rows 52002] [--methods 6] [--rounds 5]

A page with made-up examples of Alpaca's lengths is opened in headless chromium, and every query is typed into the
page's search field. The time is from the input event to the end of the next frame, when the answer is on the screen.
Prints the median and the largest time over the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.data.examples import Example
from gradsift.report.browser import STATUSES, Pool, pack
from gradsift.report.material import Material, Run
from gradsift.report.page import render
from gradsift.report.paper_tables import TABLES
from gradsift.scoring.scores import EXCLUDED

QUERIES = ("e", "the", "capital", "of the", "zq", "zqxw no such word", "\u00fc", "ba be bi")
CHOICES = (("sort", "row"), ("sort", "part-0"), ("sort", "apart"), ("kept", "kept"), ("label", "1"), ("run", "3"))
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
_TIMED = """async (text) => {
  const field = document.getElementById("query");
  const begin = performance.now();
  field.value = text;
  field.dispatchEvent(new Event("input"));
  const handled = performance.now();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return [handled - begin, performance.now() - begin, document.getElementById("matches").textContent];
}"""
_CHOSEN = """async ([id, value]) => {
  const field = document.getElementById(id);
  const begin = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("change"));
  return performance.now() - begin;
}"""


def made_up(rows: int, methods: int, seed: int = 0) -> Pool:
    """Return a pool of random words: prompts of about 60 characters, a third with an input, responses of about 270."""
    rng = np.random.default_rng(seed)
    letters = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])
    words = np.array(["".join(rng.choice(letters, rng.integers(1, 4))) for _ in range(5000)] + ["the", "of", "capital"])
    words[::97] = np.char.add(words[::97], "\u00fc")  # a text of wide characters is searched more slowly

    def text(mean: int) -> str:
        return " ".join(rng.choice(words, max(1, int(rng.exponential(mean)))))

    examples = []
    for row in range(rows):
        prompt, more, answer = text(11), text(12) if row % 3 == 0 else "", text(50)
        examples.append(Example(row, f"{row:016x}-0", f"{row:016x}", (), prompt, more, answer, {}))
    quality = rng.choice(["clean", "wrong_answer", "truncated"], rows, p=[0.7, 0.2, 0.1]).tolist()
    pool = Pool("made up", examples, quality, None)
    for number in range(methods):
        pool.methods.append(_method(f"method_{number}", rng, rows))
        for alpha in (0.05, 0.1):
            pool.selections.append(_selection(pool, number, alpha))
    return pool


def _method(name: str, rng: np.random.Generator, rows: int) -> dict[str, Any]:
    score = rng.normal(size=rows).astype(np.float32)
    excluded = rng.random(rows) < 0.05
    ordered = np.flatnonzero(~excluded)[np.argsort(-score[~excluded], kind="stable")]
    rank = np.zeros(rows, np.uint32)
    rank[ordered] = np.arange(1, len(ordered) + 1)
    return {
        "name": name,
        "scored": len(ordered),
        "reasons": ["", "made up"],
        "score": score,
        "rank": rank,
        "status": (excluded * STATUSES.index(EXCLUDED)).astype(np.uint8),
        "reason": excluded.astype(np.uint16),
        "parts": [[part, rng.gamma(2, size=rows).astype(np.float32)] for part in ("G_s", "G_t", "V_t", "loss_t")],
    }


def _selection(pool: Pool, method: int, alpha: float) -> dict[str, Any]:
    size = int(alpha * len(pool.examples))
    share = f"{100 * alpha:g} %"
    rank = pool.methods[method]["rank"]
    place = np.where(rank <= size, rank, 0).astype(np.uint32)
    about = {"budget": size, "size": size, "selector": "topk", "everything": False, "place": place}
    return {"name": f"{pool.methods[method]['name']} at {share}", "method": method, "share": share, **about}


def page_of(pool: Pool, path: Path) -> float:
    """Write a page about the pool; return the seconds that packing and writing took."""
    record = {"status": "stopped", "scorer": "method_0", "alpha": 0.1, "stages": [], "overrides": []}
    material = Material(path.parent, [Run(path.parent, record, {}, "method_0", [])], False)
    begin = time.perf_counter()
    tables = [(name, None, "made up") for name in TABLES]
    values = {"figures": [], "tables": tables, "work_file": None, "pools": [pack(pool)]}
    values |= {"judged": [], "no_pairs": ["nothing was judged"]}
    path.write_text(render(material, values), encoding="utf-8")
    return time.perf_counter() - begin


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Return how many milliseconds it takes to open the page, and to run each query, sort and filter."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        begin = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector(".example", state="attached", timeout=60_000)
        times_of: dict[str, Any] = {"open": round(1000 * (time.perf_counter() - begin))}
        queries: dict[str, list[list[Any]]] = {query: [] for query in QUERIES}
        for _ in range(rounds):
            page.evaluate("location.reload()")  # the page forgets the hits of earlier queries
            page.wait_for_selector(".example", state="attached", timeout=60_000)
            page.wait_for_timeout(300)
            for query in QUERIES:
                queries[query].append(page.evaluate(_TIMED, query))
        times_of["queries"] = {
            query: {
                "script": _spread([timed[0] for timed in times]),
                "shown": _spread([timed[1] for timed in times]),
                "matches": times[0][2],
            }
            for query, times in queries.items()
        }
        page.evaluate(_TIMED, "")
        times_of["choices"] = {" ".join(one): round(page.evaluate(_CHOSEN, list(one)), 1) for one in CHOICES}
        browser.close()
    return times_of


def _spread(times: list[float]) -> list[float]:
    return [round(statistics.median(times), 1), round(max(times), 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=52_002)
    parser.add_argument("--methods", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        seconds = page_of(made_up(options.rows, options.methods), path)
        about = {"rows": options.rows, "seconds to write": round(seconds, 1), "megabytes": path.stat().st_size / 1e6}
        print(json.dumps(about | measure(path, options.rounds), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
