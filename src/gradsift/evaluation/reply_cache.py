"""Replies that were paid for, and what they cost: one SQLite file that runs and processes share.

A reply is found by a hash of everything it depends on. It is committed to the disk before anyone looks
at it, so a process that is killed loses none that it had received.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradsift.errors import GradsiftError

if sys.platform != "win32":
    import fcntl

_PATIENCE = 60.0  # seconds to wait while another process writes
_POLL = 0.05  # seconds between looks at a request that another process has under way
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
    scope TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS sent_by_scope ON sent (scope);
"""


@dataclass(frozen=True)
class Completion:
    """One reply of an endpoint; `finish` is its own word for why it ended ("stop", "length" ...).

    `logprobs` are by token `token`, `logprob` and `top_logprobs`, where a request asked for them.
    """

    text: str
    finish: str | None = None
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of requests: of the prompts and of the replies; estimates where the endpoint reports none."""

    prompt: int
    completion: int
    estimated: bool = False


@dataclass(frozen=True)
class Spent:
    """What the requests of one scope came to: those that an endpoint may charge for."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    estimated_calls: int  # of them, those whose tokens are estimates


class ReplyCache:
    """The file of replies. Safe to use from several threads and processes.

    Not on a network file system: SQLite's write-ahead log needs shared memory.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file at `path`.

        Raises:
            GradsiftError: it cannot be written, or is no such file.
        """
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
        self._claims = path.with_name(f".{path.name}.claims").open("ab")

    def find(self, key: str) -> Completion | None:
        """The reply kept under `key`."""
        with self._lock, self._named_errors():
            row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return Completion(**json.loads(row[0])) if row else None

    def keep(self, key: str, completion: Completion, scope: str, tokens: Tokens) -> None:
        """Commit a reply and its cost to the disk, together."""
        # ASCII escapes: a reply may hold half a surrogate pair, which SQLite cannot store
        reply = json.dumps(asdict(completion))
        with self._lock, self._named_errors(), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))
            self._charge(scope, tokens)

    def charge(self, scope: str, tokens: Tokens) -> None:
        """Commit the cost of a request whose reply did not arrive, and that may be charged for all the same."""
        with self._lock, self._named_errors(), self._connection:
            self._charge(scope, tokens)

    def _charge(self, scope: str, tokens: Tokens) -> None:
        row = (scope, tokens.prompt, tokens.completion, tokens.estimated)
        self._connection.execute("INSERT INTO sent VALUES (?, ?, ?, ?)", row)

    def spent(self, scope: str) -> Spent:
        """The cost of a scope's requests so far, of all processes."""
        query = (
            "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
            "COALESCE(SUM(estimated), 0) FROM sent WHERE scope = ?"
        )
        with self._lock, self._named_errors():
            return Spent(*self._connection.execute(query, (scope,)).fetchone())

    @contextmanager
    def claimed(self, key: str, stopped: Callable[[float], bool]) -> Iterator[None]:
        """Keep other processes from asking for the same reply at the same time.

        The kernel drops the claim of a process that died. Threads of one process do not exclude each other.

        Args:
            stopped: sleeps for so many seconds; True if the wait should end, claimed or not.
        """
        if sys.platform == "win32":  # two processes may then pay for one reply if they ask within the same second
            yield
            return
        place = int(key[:15], 16)  # one byte of a file that holds none
        while True:
            try:
                fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except (BlockingIOError, PermissionError):  # another process has it
                if stopped(_POLL):
                    break
        try:
            yield
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, place)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise GradsiftError(
                f"the replies of the judge cannot be kept in {self.path} ({error}); free the disk, or move the file "
                "away if it is damaged (its replies are then paid for again), and give the same command again"
            ) from error
