"""Replies that were paid for, and what they cost: one SQLite file that runs and processes share.

A reply is found by a hash of everything it depends on. It is committed to the disk before anyone looks
at it, so a process that is killed loses none that it had received. The cost of a request is set aside in
the same file before it is sent: a cap holds over all processes, and over those that were killed.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from gradsift import outside_json
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
CREATE TABLE IF NOT EXISTS under_way (
    id INTEGER PRIMARY KEY, owner INTEGER NOT NULL,
    scope TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
"""
_ADD_TO_SENT = "INSERT INTO sent SELECT scope, prompt_tokens, completion_tokens, 1 FROM under_way WHERE owner = ?"
_CLAIMS = 2**60  # places in the file of locks: below, one for each key; above, one for each process


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
    """What some requests of one scope come to: those that an endpoint may charge for."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    estimated_calls: int  # of them, those whose tokens are estimates


class Ledger:
    """The spending of one scope while nobody else can change it (see `ReplyCache.ledger`)."""

    def __init__(self, connection: sqlite3.Connection, scope: str, owner: int) -> None:
        self._connection = connection
        self._scope = scope
        self._owner = owner

    @property
    def spent(self) -> Spent:
        """What was sent, of all processes."""
        return self._sum("SELECT COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(estimated) FROM sent")

    @property
    def under_way(self) -> Spent:
        """What is set aside, of all processes, at its estimate."""
        return self._sum("SELECT COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), COUNT(*) FROM under_way")

    def set_aside(self, tokens: Tokens) -> int:
        """Add the estimate of a request that is about to be sent to what is under way; returns its number."""
        row = (None, self._owner, self._scope, tokens.prompt, tokens.completion)
        return int(self._connection.execute("INSERT INTO under_way VALUES (?, ?, ?, ?, ?)", row).lastrowid or 0)

    def _sum(self, query: str) -> Spent:
        row = self._connection.execute(f"{query} WHERE scope = ?", (self._scope,)).fetchone()
        return Spent(*(int(value or 0) for value in row))


class _File:
    """The open file of replies and, beside it, that of locks: one of each a process, whoever opens them.

    A process loses its POSIX locks on a file as soon as it closes any descriptor of it.
    """

    def __init__(self, path: Path) -> None:
        self.lock = threading.RLock()
        self.owner = _CLAIMS + secrets.randbits(60)
        self.connection = sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.executescript(_SCHEMA)
        self.locks = path.with_name(f".{path.name}.claims").open("ab")
        self.hold(self.owner)  # as long as this process lives

    def hold(self, place: int) -> bool:
        """Lock one byte of a file that holds none; False where another process has it, on Windows never."""
        if sys.platform == "win32":
            return True
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def free(self, place: int) -> None:
        if sys.platform != "win32":
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, place)

    @classmethod
    def shared(cls, path: Path) -> _File:
        """The file at `path`, opened once as long as anyone in this process uses it."""
        with _opening:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
            status = path.stat()
            key = (os.getpid(), status.st_dev, status.st_ino)  # a file that was deleted and made again is another one
            found = _open.get(key)
            if found is None:
                found = _open[key] = cls(path)
            return found


def _completion(kept: Any) -> Completion | None:
    """What `keep` wrote; None where that cannot be read."""
    try:
        found = Completion(**outside_json.loads(kept))
    except (ValueError, TypeError):
        return None
    texts = isinstance(found.text, str) and isinstance(found.finish, str | None)
    return found if texts and isinstance(found.logprobs, list | None) else None


_open: WeakValueDictionary[tuple[int, int, int], _File] = WeakValueDictionary()
_opening = threading.Lock()


class ReplyCache:
    """The file of replies. Safe to use from several threads and processes.

    Not on a network file system: SQLite's write-ahead log needs shared memory.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        """Open or make the file at `path`.

        Args:
            say: told of a reply that cannot be read.

        Raises:
            GradsiftError: it cannot be written, or is no such file.
        """
        self.path = path
        self._say = say
        with self._named_errors():
            self._file = _File.shared(path)
        self._lock, self._connection = self._file.lock, self._file.connection

    def find(self, key: str) -> Completion | None:
        """The reply kept under `key`; None, and a line said, where it cannot be read."""
        with self._lock, self._named_errors():
            # bytes: of a text that is not UTF-8 sqlite3 makes the error of a file that is damaged as a whole
            query = "SELECT CAST(reply AS BLOB) FROM replies WHERE key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        found = _completion(row[0])
        if found is None:
            self._say(f"  a reply in {self.path.name} cannot be read; it is asked for again")
        return found

    def keep(self, key: str, completion: Completion, scope: str, tokens: Tokens, number: int | None = None) -> None:
        """Commit a reply and its cost to the disk, together, in the place of what was set aside as `number`."""
        # ASCII escapes: a reply may hold half a surrogate pair, which SQLite cannot store
        reply = json.dumps(asdict(completion))
        with self._writing():
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))
            self._settle(scope, tokens, number)

    def settle(self, scope: str, tokens: Tokens | None, number: int) -> None:
        """A request whose reply did not arrive: commit what it may be charged with, None if it cannot be."""
        with self._writing():
            self._settle(scope, tokens, number)

    def _settle(self, scope: str, tokens: Tokens | None, number: int | None) -> None:
        self._connection.execute("DELETE FROM under_way WHERE id = ?", (number,))
        if tokens is not None:
            row = (scope, tokens.prompt, tokens.completion, tokens.estimated)
            self._connection.execute("INSERT INTO sent VALUES (?, ?, ?, ?)", row)

    def spent(self, scope: str) -> Spent:
        """The cost of a scope's requests so far, of all processes."""
        with self.ledger(scope) as ledger:
            return ledger.spent

    @contextmanager
    def ledger(self, scope: str) -> Iterator[Ledger]:
        """What a scope has spent, which no other thread or process changes before the block ends.

        What a process that died had under way may be charged for: it counts as sent. On Windows, where nothing
        tells whether a process has died, so does what a living one has under way, in addition to what it is
        charged with in the end: a cap is then reached too early, never passed.
        """
        with self._writing():
            for (owner,) in self._connection.execute("SELECT DISTINCT owner FROM under_way").fetchall():
                if owner != self._file.owner and self._file.hold(owner):
                    self._file.free(owner)
                    self._connection.execute(_ADD_TO_SENT, (owner,))
                    self._connection.execute("DELETE FROM under_way WHERE owner = ?", (owner,))
            yield Ledger(self._connection, scope, self._file.owner)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, of all threads and processes; committed when the block ends, unless by an error."""
        with self._lock, self._named_errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def claimed(self, key: str, stopped: Callable[[float], bool]) -> Iterator[None]:
        """Keep other processes from asking for the same reply at the same time.

        The kernel drops the claim of a process that died. Threads of one process do not exclude each other. On
        Windows nothing is claimed: two processes may pay for one reply if they ask within the same second.

        Args:
            stopped: sleeps for so many seconds; True if the wait should end, claimed or not.
        """
        place = int(key[:15], 16)
        while not self._file.hold(place):  # another process has it
            if stopped(_POLL):
                break
        try:
            yield
        finally:
            self._file.free(place)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            raise GradsiftError(
                f"the replies of the judge cannot be kept in {self.path} ({error}); free the disk, or move the file "
                "away if it is damaged (its replies are then paid for again), and give the same command again"
            ) from error
