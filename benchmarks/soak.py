"""Does a sweep that is killed again and again write the same bytes as an undisturbed sweep?

    python -m benchmarks.soak [--kills 20] [--seed 0] [--folder soak] [--fork]

A small sweep over the embedded world (two methods, both settings of `proxy.collect`, dropout, finetuning, answers,
judging) runs once undisturbed. Then rounds follow, each with an empty store. In a round the same command is started
again and again, and each process is killed with SIGKILL: at a random moment, or shortly after a chosen stage has saved
its progress, so that some epochs are interrupted several times. A round ends when a process finishes without being
killed. Then all files of both stores are compared byte for byte. There are two exceptions: of the manifests, which also
contain times, only the counts are compared, and of the judge's cache only the replies. New rounds start until `--kills`
is reached. The judge is an endpoint in this process, which takes four requests at a time and replies after random
delays, so that the order of replies differs between rounds.

The undisturbed sweep saves its progress at the usual intervals, the killed ones after every step
(`compute.save_every=0`).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from gradsift.artifacts import MADE_BY
from gradsift.journal import JOURNAL_FILE
from gradsift.manifests import MANIFEST, UNFINISHED

REPOSITORY = Path(__file__).parents[1]
SWEEP = (
    *("-m", "experiment=smoke", "tracker=none", "compute.threads=1", "compute.tokens=256"),
    *("method=gradfiltering,less", "proxy.collect=epoch_end,during_training"),
    *("proxy.members=2", "proxy.batch_size=4", "proxy.lora.dropout=0.1", "features.warmup.share=0.3"),
    *("target.steps=20", "target.lora.dropout=0.1", "benchmark.batch_size=4"),
)
# The stages after whose saved progress a process is killed; None: at any moment. A stage that is listed twice in a row
# is interrupted twice in one epoch.
MOMENTS = (
    *(None, "member", "member", None, "norms", "finetune", "finetune", None),
    *("generate", "member", "member", "judge", "finetune", None, "warmup", "warmup", "judge", None),
)
JUDGE = ("judge=openai", "judge.model=soak", "judge.concurrency=4")  # `soak` adds its address
PROCESS = ("resumed_steps", "forward_tokens", "seconds", "cost")  # entries that depend on what the last process did
REPLIES_FILE = "judge_cache.sqlite"
SLOWEST = 0.1  # seconds that the judge takes for a reply at most
LONGEST = 2.0  # seconds from the first sign of work to a kill at any moment
PATIENCE = 600.0  # seconds for one process


class Running(Protocol):
    """A process that carries out the sweep."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Path, Path], Running]  # arguments, folder to run in, store


@dataclass
class Hit:
    """The progress of a process at the time it was killed."""

    seconds: float  # since the process began
    at: dict[str, int]  # unfinished artifacts, with the steps or results that were saved

    def __str__(self) -> str:
        where = ", ".join(f"{name} with {done} saved" for name, done in sorted(self.at.items())) or "between two stages"
        return f"after {self.seconds:5.1f} s: {where}"


@dataclass
class Outcome:
    """The kills and the result of all comparisons."""

    hits: list[Hit] = field(default_factory=list)
    files: int = 0  # number of compared files, over all rounds
    differing: list[str] = field(default_factory=list)

    def twice_in_one_epoch(self) -> list[str]:
        """Return the names of trainings (an epoch or a finetuning) that were killed at two or more different points."""
        points = {(name, done) for hit in self.hits for name, done in hit.at.items() if done}
        trained = Counter(name for name, _ in points if name.split("/")[0] in ("member", "warmup", "finetune"))
        return sorted(name for name, times in trained.items() if times > 1)


def run_py(arguments: Sequence[str], folder: Path, store: Path) -> subprocess.Popen[bytes]:
    """Start `run.py` in a new process, as a user would."""
    environment = {**os.environ, "GRADSIFT_ARTIFACTS": str(store), "PYTHONPATH": str(REPOSITORY / "src")}
    with (folder / "output.txt").open("ab") as output:
        command = [sys.executable, str(REPOSITORY / "run.py"), *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603


class Forked:
    """A process that runs `run.py`, forked from a server that has the imports, so that it starts faster."""

    def __init__(self, arguments: Sequence[str], folder: Path, store: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama")]
        context.set_forkserver_preload(["gradsift.line", "gradsift.cli", "lightning", "openai", "peft", *models])
        self._process = context.Process(target=_as_run_py, args=(list(arguments), folder, store))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return int(self._process.exitcode or 0)


def _as_run_py(arguments: list[str], folder: Path, store: Path) -> None:
    os.chdir(folder)
    os.environ["GRADSIFT_ARTIFACTS"] = str(store)
    with (folder / "output.txt").open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["run.py", *arguments]
    from gradsift.cli import main

    main()


def soak(
    folder: Path,
    kills: int,
    seed: int,
    sweep: Sequence[str] = SWEEP,
    moments: Sequence[str | None] = MOMENTS,
    start: Start = run_py,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run the sweep undisturbed, then in rounds with `kills` kills in total; compare the stores after each round.

    If the sweep ends before the next moment of `moments`, this moment is skipped.
    """
    with judging(folder) as address:
        return _soak(folder, kills, seed, (*sweep, *JUDGE, f"judge.base_url={address}"), moments, start, say)


@contextmanager
def judging(folder: Path) -> Iterator[str]:
    """Serve a chat endpoint on this machine and yield its address.

    The address is the same for all runs of a folder, because their artifacts contain it.
    """
    noted, chance = folder / "port.txt", random.Random()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
            grades = [1 + byte % 10 for byte in hashlib.sha256(asked.encode()).digest()[:2]]
            time.sleep(chance.uniform(0, SLOWEST))
            message = {"role": "assistant", "content": f"{grades[0]} {grades[1]}\nAs I see it."}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            usage = {"prompt_tokens": len(asked), "completion_tokens": 9, "total_tokens": len(asked) + 9}
            reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "soak", "choices": choices}
            content = json.dumps(reply | {"usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # the process that sent the request was killed
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    port = int(noted.read_text()) if noted.exists() else 0
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        (_fresh(folder) / noted.name).write_text(str(server.server_address[1]))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def _soak(
    folder: Path,
    kills: int,
    seed: int,
    sweep: Sequence[str],
    moments: Sequence[str | None],
    start: Start,
    say: Callable[[str], None],
) -> Outcome:
    chance, outcome = random.Random(seed), Outcome()
    store, whole = folder / "store", folder / "whole"  # every store is made at one path, which adapters contain
    say(f"run.py {' '.join(sweep)}")
    if not whole.exists():
        started = time.monotonic()
        _finish(start(sweep, _fresh(folder / "runs"), store), folder)
        store.rename(whole)
        say(f"undisturbed: {time.monotonic() - started:.1f} s")
    to_come = itertools.cycle(moments)
    while len(outcome.hits) < kills:
        number = len(list(folder.glob("killed-*"))) + 1
        process = start((*sweep, "compute.save_every=0"), folder / "runs", store)
        while len(outcome.hits) < kills and (hit := kill(process, store, next(to_come), chance)):
            outcome.hits.append(hit)
            say(f"kill {len(outcome.hits):3d} {hit}")
            process = start((*sweep, "compute.save_every=0"), folder / "runs", store)
        _finish(process, folder)
        compared, differing = compare(whole, store)
        outcome.files += compared
        outcome.differing += [f"round {number}: {name}" for name in differing]
        say(f"round {number}: {compared} files compared, {len(differing)} differ")
        store.rename(folder / f"killed-{number}")
    return outcome


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kill(process: Running, store: Path, moment: str | None, chance: random.Random) -> Hit | None:
    """Kill the process at the given moment; return None if the process ended before."""
    began = time.monotonic()
    points, parts = _points(store), _parts(store)
    while not (_parts(store) - parts if moment is None else _moved(points, _points(store), moment)):
        if process.poll() is not None:
            return None
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"no sign of {moment or 'work'} within {PATIENCE:.0f} s")
        time.sleep(0.01)
    time.sleep(chance.uniform(0, LONGEST if moment is None else 0.1))
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return Hit(time.monotonic() - began, dict.fromkeys((name for name, _ in _parts(store)), 0) | _points(store))


def _parts(store: Path) -> set[tuple[str, int]]:
    """Return the unfinished artifacts, each with the time when a process last started to work on it."""
    found = set()
    for part in store.glob("*/*.part"):
        with suppress(FileNotFoundError):  # finished meanwhile
            found.add((f"{part.parent.name}/{_plain(part)}", (part / UNFINISHED / MADE_BY).stat().st_mtime_ns))
    return found


def _plain(path: Path) -> str:
    return path.name.removesuffix(".part")


def _points(store: Path) -> dict[str, int]:
    """Return how much each unfinished artifact has saved (steps or journal lines), and the number of judge replies."""
    from gradsift.training.finetuning import steps_saved

    found = {}
    for part in store.glob("*/*.part"):
        journal = part / UNFINISHED / JOURNAL_FILE
        try:
            found[f"{part.parent.name}/{_plain(part)}"] = steps_saved(part) or journal.read_bytes().count(b"\n")
        except (FileNotFoundError, RuntimeError):  # the artifact was finished meanwhile, or has saved nothing yet
            continue
    if (replies := store / REPLIES_FILE).is_file():
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(replies)) as saved:  # it is being made
            (found["judge/replies"],) = saved.execute("SELECT count(*) FROM replies").fetchone()
    return found


def _moved(before: dict[str, int], now: dict[str, int], stage: str) -> bool:
    return any(done > before.get(name, 0) for name, done in now.items() if name.split("/")[0] == stage)


def _finish(process: Running, folder: Path) -> None:
    if code := process.wait():
        raise RuntimeError(f"the sweep ended with exit code {code}; see {folder / 'runs' / 'output.txt'}")


def compare(whole: Path, killed: Path) -> tuple[int, list[str]]:
    """Return the number of compared files, and the names of files that differ or are in one store only."""
    ours, theirs = _contents(killed), _contents(whole)
    return len(theirs), sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _contents(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in store.rglob("*"):
        if not path.is_file() or path.name.startswith((".", f"{REPLIES_FILE}-")):  # locks, SQLite's log
            continue
        name = str(path.relative_to(store))
        if path.name == REPLIES_FILE:
            with closing(sqlite3.connect(path)) as replies:
                found[name] = dict(replies.execute("SELECT key, reply FROM replies"))
            continue
        if path.name == MANIFEST:
            info = json.loads(path.read_text(encoding="utf-8"))["info"]
            found[name] = {key: value for key, value in info.items() if key not in PROCESS}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path("soak"), help="of runs and stores; an undisturbed one there is taken"
    )
    parser.add_argument("--fork", action="store_true", help="fork the processes from one that has the imports")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if (folder / "store").exists():
        sys.exit(f"error: {options.folder} is of a soak that did not end; remove it, or give another with --folder")
    outcome = soak(folder, options.kills, options.seed, start=Forked if options.fork else run_py)
    print(f"{len(outcome.hits)} kills; killed at two or more points of one training: {outcome.twice_in_one_epoch()}")
    if outcome.differing:
        sys.exit("error: these differ from the undisturbed run's: " + ", ".join(outcome.differing))
    print(f"all {outcome.files} files are those of the undisturbed run, byte for byte")


if __name__ == "__main__":
    main()
