"""Laws of the runtime: progress that fits the output, and a separate seed for each purpose."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rich.console import Console

from gradsift import runtime
from gradsift.data.tokens import Encoded
from gradsift.runtime import Display, derive_seed, peak_memory
from gradsift.training.device import TokenBudget


def display(terminal: bool, width: int = 100) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(Console(file=stream, force_terminal=terminal, width=width, highlight=False)), stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Return a list whose item is the time in seconds, for the test to set."""
    now = [1000.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    yield now


def test_without_a_terminal_progress_is_a_line_every_half_minute(clock: list[float]) -> None:
    shown, stream = display(terminal=False)
    with shown.task("answer [all] questions", 1200) as advance:
        for _ in range(120):  # 10 units a second, 1 s a call
            clock[0] += 1
            advance(10)
    assert stream.getvalue().splitlines() == [
        "  answer [all] questions: 300 of 1,200, about 2 min left",  # 90 s, rounded to even
        "  answer [all] questions: 600 of 1,200, about 1 min left",
        "  answer [all] questions: 900 of 1,200, about 0 min left",
    ]


def test_resumed_work_does_not_count_for_the_remaining_time(clock: list[float]) -> None:
    shown, stream = display(terminal=False)
    with shown.task("norms", 10_000) as advance:
        advance(9_000)  # from the interrupted run
        for _ in range(90):
            clock[0] += 1
            advance(1)
    assert stream.getvalue().splitlines()[1:] == [
        "  norms: 9,060 of 10,000, about 16 min left",
        "  norms: 9,090 of 10,000, about 15 min left",
    ]


def test_the_remaining_time_of_a_pass_considers_the_lengths_of_rows(clock: list[float]) -> None:
    """A tenth of the rows have half of the tokens."""
    lengths = [90] * 40 + [10] * 360
    rows = [Encoded(row, row, np.zeros(length, np.int32), np.ones(length, bool)) for row, length in enumerate(lengths)]
    shown, stream = display(terminal=False)
    ends = clock[0] + sum(lengths)
    left: list[str] = []

    def work(batch: list[Encoded]) -> None:
        clock[0] += sum(len(example.input_ids) for example in batch)  # a second a token
        left.append(f"about {(ends - clock[0]) / 60:.0f} min left")

    told: list[int] = []
    with shown.task("norms", len(rows)) as advance:

        def noted(done: int) -> None:
            told.append(done)
            advance(done)

        list(TokenBudget(90).passes(rows, work, advance=noted))
    lines = stream.getvalue().splitlines()
    assert len(lines) > 10
    assert sum(told) == len(rows)
    # the lines round what is done to a row, so a minute this way or that
    promised, true = ([int(line.split("about ")[1].split()[0]) for line in each] for each in (lines, left))
    assert np.abs(np.array(promised) - np.array(true[: len(promised)])).max() <= 0.1 * true[0]


def test_without_a_terminal_quick_work_shows_nothing(clock: list[float]) -> None:
    shown, stream = display(terminal=False)
    with shown.task("quick", 10) as advance:
        for _ in range(10):
            clock[0] += 2
            advance(1)
    assert stream.getvalue() == ""


def test_without_a_terminal_no_progress_is_no_error(clock: list[float]) -> None:
    shown, _ = display(terminal=False)
    with shown.task("slow", 10) as advance:
        clock[0] += 31
        advance(0)


def test_on_a_terminal_progress_is_a_bar_that_goes_away() -> None:
    shown, stream = display(terminal=True)
    with shown.task("answer questions", 4) as advance:
        advance(3)
    text = stream.getvalue()
    assert "answer questions" in text
    assert "━" in text
    assert "3/4" in text
    assert "eta" in text
    assert text.rstrip().endswith("\x1b[2K")  # the bar's line is erased at the end


def test_a_nested_task_has_a_bar_below_and_both_disappear() -> None:
    shown, stream = display(terminal=True, width=80)
    with shown.task("score [gsnr]", None), shown.task("perplexity", 4) as advance:
        advance(4)
        shown.say("said beside")
    text = stream.getvalue()
    frame = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "score [gsnr]" in frame
    assert "said beside" in frame
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", frame))
    assert text.rstrip().endswith("\x1b[2K")
    with shown.task("the next one", 1):  # and the display is free again
        pass


def test_a_task_passes_errors_on() -> None:
    for terminal in (True, False):
        shown, _ = display(terminal)
        with pytest.raises(ZeroDivisionError), shown.task("broken", 1):
            raise ZeroDivisionError
        with shown.task("the next one", 1) as advance:  # and the display is free again
            advance(1)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_message_has_no_line_breaks_of_its_own(terminal: bool) -> None:
    shown, stream = display(terminal, width=20)
    text = "scores [bold]: /a/path/" + "x" * 60
    shown.say(text)
    assert stream.getvalue() == text + "\n"


def test_a_file_is_wide_enough_for_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert Display().console.width == 132


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.skipif(sys.platform == "win32", reason="this system does not say what a process held")
def test_the_peak_includes_memory_that_was_freed() -> None:
    before = peak_memory()["process_peak_resident_gb"]
    held = np.ones(int((before + 0.2) * 1e9), dtype=np.uint8)  # more than the process ever had, whatever it has now
    during = peak_memory()["process_peak_resident_gb"]
    assert during >= before + 0.2
    assert during < 2 * before + 1  # GB, not another unit
    del held
    assert peak_memory()["process_peak_resident_gb"] >= during


def test_the_gpus_peak_is_reported_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "process_peak_cuda_gb" not in peak_memory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_500_000_000)
    assert peak_memory()["process_peak_cuda_gb"] == 2.5


# ------------------------------------------------------------------------------------------- seeds


def test_a_derived_seed_never_changes() -> None:
    assert derive_seed(0, "lora", 0) == 1604776180
    assert derive_seed(0, "order", 1, 2) == 2791198639


def test_every_purpose_has_its_own_seed() -> None:
    purposes = [
        (seed, purpose, member) for seed in range(3) for purpose in ("lora", "order", "dropout") for member in range(4)
    ]
    purposes += [(0, "order", 1, 1), (0, "order", 11), (0, "order", "1"), ("0", "order", 1), (0, "order1")]
    seeds = {derive_seed(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**32 for seed in seeds)
