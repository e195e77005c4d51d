"""Several machines in one piece of work (`compute.num_nodes`): the same command on each, one shared store.

The first machine makes every artifact. The others walk the same line of stages: they take part in the trainings and
collections that machines share (`gradsift.training.ranks`), and wait for everything that the first one writes; no
longer than it is at work on the run.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig
from gradsift.errors import ConfigError, GradsiftError

SHARED = ("member", "norms", "warmup", "finetune")  # stages that `on_all_ranks` makes
_LOOK_EVERY = 0.5  # seconds
_NUMBERS = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID")


def node_of(compute: ComputeConfig) -> int:
    """This machine's number, from 0: what the launcher set.

    Raises:
        ConfigError: `compute.num_nodes` is more than 1, and nobody says which of them this is.
    """
    if compute.num_nodes == 1:
        return 0
    found = next((os.environ[name] for name in _NUMBERS if name in os.environ), "")
    if not found.isdigit() or int(found) >= compute.num_nodes:
        raise ConfigError(
            f"compute.num_nodes={compute.num_nodes}, but {' or '.join(_NUMBERS)} does not say which one this is "
            f"(found {found!r}); start one process on each machine with srun, or set NODE_RANK to 0, 1, ..."
        )
    if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT", "").isdigit():
        raise ConfigError(
            f"compute.num_nodes={compute.num_nodes} needs MASTER_ADDR (of the first machine) and MASTER_PORT (one that "
            "is free there) in the environment of all of them"
        )
    return int(found)


@contextmanager
def store_of(compute: ComputeConfig, store: Store, job: int | None) -> Iterator[Store]:
    """The store as this machine may use it, for one run.

    Args:
        job: number of the run in its sweep, the same on all machines.
    """
    if compute.num_nodes == 1:
        yield store
        return
    is_first = node_of(compute) == 0
    found, ended = meeting(is_first), f"ended/{job}"
    if not is_first:
        yield FollowingStore(
            store.root, store.say, store.done, store.at_work, has_ended=functools.partial(_has_ended, found, ended)
        )
        return
    try:
        yield store
    finally:
        found.set(ended, "1")


@functools.cache
def meeting(is_first: bool) -> Any:
    """Where the machines tell each other their addresses; the first one keeps it for as long as it lives.

    Raises:
        GradsiftError: the first machine does not answer.
    """
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=is_first, wait_for_workers=False
        )
    except RuntimeError as error:
        raise GradsiftError(
            f"the machines cannot meet at {address}:{port} ({str(error).splitlines()[0]}); MASTER_ADDR has to be the "
            "first machine and MASTER_PORT free there"
        ) from error


def _has_ended(found: Any, key: str) -> bool:
    """Whether the first machine's run has ended, or its process."""
    try:
        return bool(found.check([key]))
    except RuntimeError:  # of a connection that is cut
        return True


@dataclass
class FollowingStore(Store):
    """The store of a machine that is not the first: it makes nothing there, but sets aside what is damaged, as any."""

    has_ended: Callable[[], bool] = lambda: False  # whether the first machine's run has

    def obtain(
        self,
        stage: str,
        slug: str,
        config: Mapping[str, Any],
        parents: Sequence[Artifact],
        make: Callable[[Path], Mapping[str, Any]],
        *,
        version: int,
        **options: Any,
    ) -> Artifact:
        """The artifact once the first machine has made it; takes part where machines share the work.

        Raises:
            GradsiftError: the first machine's run ended without it.
        """
        fingerprint, path = self.place(stage, slug, config, parents, version)
        started = time.perf_counter()
        takes_part, is_last_look = stage in SHARED, False
        while (found := self._whole(stage, path, fingerprint)) is None:
            if takes_part:
                with self.at_work(f"{stage} {slug}"), tempfile.TemporaryDirectory(prefix="gradsift-node-") as scratch:
                    folder = Path(scratch) / path.name
                    folder.mkdir()
                    make(folder)
                takes_part = False
            elif is_last_look:
                raise GradsiftError(
                    f"the first machine's run ended before it made {path.name}; what it said tells why, and the same "
                    "command on all machines goes on from there"
                )
            else:
                time.sleep(_LOOK_EVERY)
                is_last_look = self.has_ended()
        self._record(found, reused=True, seconds=time.perf_counter() - started)
        return found
