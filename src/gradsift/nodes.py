"""Several machines in one piece of work (`compute.num_nodes`): the same command on each, one shared store.

The first machine makes every artifact. The others walk the same line of stages: they take part in the trainings and
collections that machines share (`gradsift.training.ranks`), and wait for everything that the first one writes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig
from gradsift.errors import ConfigError

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


def store_of(compute: ComputeConfig, store: Store) -> Store:
    """The store as this machine may use it."""
    return store if node_of(compute) == 0 else FollowingStore(store.root, store.say, store.done, store.at_work)


class FollowingStore(Store):
    """The store of a machine that is not the first: it writes nothing there."""

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
        """The artifact once the first machine has made it; takes part where machines share the work."""
        fingerprint, path = self.place(stage, slug, config, parents, version)
        started = time.perf_counter()
        took_part = stage not in SHARED
        while (found := self._whole(stage, path, fingerprint)) is None:
            if took_part:
                time.sleep(_LOOK_EVERY)
                continue
            with self.at_work(f"{stage} {slug}"), tempfile.TemporaryDirectory(prefix="gradsift-node-") as scratch:
                folder = Path(scratch) / path.name
                folder.mkdir()
                make(folder)
            took_part = True
        self._record(found, reused=True, seconds=time.perf_counter() - started)
        return found
