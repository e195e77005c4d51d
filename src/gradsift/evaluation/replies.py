"""Replies of chat endpoints and their cost, in one SQLite file that all runs and processes share.

A reply is stored under a hash of everything that it depends on. It is stored before it is parsed, so a killed process
loses no reply that it had received. Costs are counted per scope, a name for the requests of one stage. A request is
entered as pending before it is sent. The entry reserves the cost of the request, so that several processes together
stay below a cap, and it stops other processes from sending the same request.

Each process holds a file lock until it ends. If the lock of the process that entered a pending request is free, this
process has died, and the endpoint may have charged for the request. So the request then counts as sent, at its
estimated cost.
"""

from __future__ import annotations

import json
import operator
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from gradsift import outside_json
from gradsift.errors import GradsiftError

CUT = "length"  # the `finish_reason` of a reply that reached the limit of its tokens
REPLIES_FILE = "judge_cache.sqlite"  # in the store, for all runs
_PATIENCE = 60.0  # seconds to wait while another process writes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
    scope TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS sent_by_scope ON sent (scope);
CREATE TABLE IF NOT EXISTS pending (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL,
    scope TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
"""


@dataclass(frozen=True)
class Completion:
    """A reply: its text, why it ended ("stop", CUT, ...) and, if requested, the log-probabilities of its tokens."""

    text: str
    finish: str | None = None
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Usage:
    """The tokens and the number of requests that an endpoint may charge for."""

    prompt_tokens: int
    completion_tokens: int
    calls: int = 1
    estimated_calls: int = 0  # calls whose tokens are estimates, because the endpoint reported none

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Terms:
    """Prices in USD per million tokens (None: unknown), and caps on the spending per scope (None: no cap)."""

    price_input: float | None = None
    price_output: float | None = None
    max_usd: float | None = None  # needs both prices
    max_calls: int | None = None
    dry_run: bool = False

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the price of the tokens in USD; None if a price per token is unknown."""
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6

    def exceeded(self, total: Usage) -> str | None:
        """Return the cap that spending `total` would exceed, as in "judge.max_usd=5"; None if there is no such cap."""
        if self.max_calls is not None and total.calls > self.max_calls:
            return f"judge.max_calls={self.max_calls}"
        usd = self.usd(total.prompt_tokens, total.completion_tokens)
        if self.max_usd is not None and usd is not None and usd > self.max_usd:
            return f"judge.max_usd={self.max_usd:g}"
        return None


class CapReached(Exception):
    """The next request might exceed a cap; the message is the cap, as in "judge.max_usd=5"."""


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode, with retries: if another process is writing, SQLite fails at once, whatever its timeout."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Replies:
    """The file of replies, which threads and processes may share.

    The file must be on a local file system, because SQLite's WAL mode needs one.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        """Open or create the file at `path`; `say` prints a message for each stored reply that cannot be read.

        Raises:
            GradsiftError: the file cannot be written, or is not an SQLite database.
        """
        self.path = path
        self._say = say
        self._mutex = threading.RLock()
        self._owner = secrets.token_hex(8)
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            _use_wal(self._connection)
            self._connection.executescript(_SCHEMA)
            alive = self._lock_of(self._owner)
            alive.acquire()
        weakref.finalize(self, _release, alive)

    def find(self, key: str) -> Completion | None:
        """Return the reply stored under `key`; None if there is none, or if it cannot be read."""
        with self._mutex, self._named_errors():
            # as bytes: for text that is not UTF-8 sqlite3 raises the same error as for a damaged file
            query = "SELECT CAST(reply AS BLOB) FROM replies WHERE key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        with suppress(ValueError, TypeError):
            completion = Completion(**outside_json.loads(row[0]))
            texts = isinstance(completion.text, str) and isinstance(completion.finish, str | None)
            if texts and isinstance(completion.logprobs, list | None):
                return completion
        self._say(f"  a reply in {self.path.name} cannot be read; it is requested again")
        return None

    def claim(self, key: str, scope: str, estimate: Usage, terms: Terms) -> Literal["send", "wait", "stored"]:
        """Reserve the estimated largest cost of a request before it is sent.

        Returns:
            What the caller must do:

            - "send": the cost is reserved. Send the request, then call `keep` or `release`.
            - "stored": the reply is stored already. Read it with `find`.
            - "wait": call `claim` again later. Either the same request is pending, or the cost exceeds a cap together
              with the costs reserved for other requests, which may cost less in the end.

        Raises:
            CapReached: the cost exceeds a cap, and no other request of the scope is pending.
        """
        with self._writing():
            self._charge_dead_owners()
            if self.find(key) is not None:
                return "stored"
            if self._connection.execute("SELECT 1 FROM pending WHERE key = ?", (key,)).fetchone():
                return "wait"
            spent, pending = (self._sum(table, scope) for table in ("sent", "pending"))
            cap = terms.exceeded(spent + pending + estimate)
            if cap is None:
                row = (key, self._owner, scope, estimate.prompt_tokens, estimate.completion_tokens)
                self._connection.execute("INSERT INTO pending VALUES (?, ?, ?, ?, ?)", row)
                return "send"
            if not pending.calls:
                raise CapReached(cap)
            return "wait"

    def keep(self, key: str, completion: Completion, scope: str, usage: Usage) -> None:
        """Store a reply and what it cost, in one transaction."""
        # ASCII escapes: a reply may hold half a surrogate pair, which SQLite cannot store
        reply = json.dumps(asdict(completion))
        with self._writing(durable=True):
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))
            self._unreserve(key)
            self._charge(scope, usage)

    def release(self, key: str, scope: str, usage: Usage | None) -> None:
        """End the reservation of a failed request, for which the endpoint may charge `usage` (None: nothing)."""
        with self._writing():
            if self._unreserve(key) and usage is not None:
                self._charge(scope, usage)

    def spent(self, scope: str) -> Usage:
        """Return what the requests of a scope have cost so far, over all processes."""
        with self._writing():
            self._charge_dead_owners()
            return self._sum("sent", scope)

    def _unreserve(self, key: str) -> bool:
        deleted = self._connection.execute("DELETE FROM pending WHERE key = ? AND owner = ?", (key, self._owner))
        return deleted.rowcount > 0

    def _charge(self, scope: str, usage: Usage) -> None:
        row = (scope, usage.prompt_tokens, usage.completion_tokens, usage.estimated_calls)
        self._connection.execute("INSERT INTO sent VALUES (?, ?, ?, ?)", row)

    def _sum(self, table: str, scope: str) -> Usage:
        estimated = "SUM(estimated)" if table == "sent" else "COUNT(*)"
        query = f"SELECT SUM(prompt_tokens), SUM(completion_tokens), COUNT(*), {estimated} FROM {table}"  # noqa: S608
        row = self._connection.execute(f"{query} WHERE scope = ?", (scope,)).fetchone()
        return Usage(*(int(value or 0) for value in row))

    def _charge_dead_owners(self) -> None:
        for (owner,) in self._connection.execute("SELECT DISTINCT owner FROM pending").fetchall():
            if owner == self._owner:
                continue
            lock = self._lock_of(owner)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            columns = "scope, prompt_tokens, completion_tokens"
            self._connection.execute(f"INSERT INTO sent SELECT {columns}, 1 FROM pending WHERE owner = ?", (owner,))  # noqa: S608
            self._connection.execute("DELETE FROM pending WHERE owner = ?", (owner,))
            _release(lock)

    def _lock_of(self, owner: str) -> FileLock:
        path = self.path.with_name(f".{self.path.name}.{owner}.lock")
        return FileLock(path, thread_local=False, fallback_to_soft=False)

    @contextmanager
    def _writing(self, durable: bool = False) -> Iterator[None]:
        """Run the block in a write transaction. If `durable`, the transaction survives a power cut (it is flushed)."""
        with self._mutex, self._named_errors(), self._connection:
            self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            raise GradsiftError(
                f"the judge's replies cannot be stored in {self.path} ({error}); free disk space, or move the file "
                "away if it is damaged (its replies are then paid for again), and give the same command again"
            ) from error


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
