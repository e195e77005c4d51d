"""The store of a run on several ranks: rank 0 decides what is made, and the other ranks follow."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Make, Store
from gradsift.cost import counting, passed
from gradsift.errors import GradsiftError
from gradsift.manifests import read_manifest
from gradsift.training import parallel

_MAKE, _DONE, _ENDED = "make", "done", "ended"  # rank 0's messages


class RunEnded(Exception):
    """Raised on the other ranks when rank 0 stops before the last stage; rank 0 itself reports the reason."""


class SharedStore(Store):
    """A store whose `obtain` is called by all ranks with the same arguments.

    Rank 0 finds or makes the artifact and writes it. A stage with `divided=True` is made by all ranks together; ranks
    other than 0 work in a scratch copy of rank 0's folder. Rank 0 makes any other stage alone, while the other ranks
    wait.
    """

    def _provide(self, wanted: Artifact, make: Make, *, light: bool, exact: bool, divided: bool) -> Artifact:
        """Return the artifact, on every rank.

        Raises:
            RunEnded: rank 0 stopped; raised on the other ranks only.
            GradsiftError: the ranks ask for different artifacts or do not share one store.
        """
        options = {"light": light, "exact": exact, "divided": divided}
        if parallel.size() == 1:  # rank 0, within a stage that it makes by itself
            return super()._provide(wanted, make, **options)
        if parallel.rank():
            return _follow(wanted, make)

        def make_here(folder: Path) -> Mapping[str, Any]:
            if not divided:
                with parallel.alone():
                    return make(folder)
            parallel.broadcast((_MAKE, wanted.fingerprint, str(folder.resolve())))
            parallel.total(0)  # wait until the others have copied the folder
            return _make_on_every_rank(make, folder)

        try:
            artifact = super()._provide(wanted, make_here, **options)
        except Exception:
            if not divided:  # in a divided stage the other ranks wait for no message; the launcher ends them
                parallel.broadcast((_ENDED, wanted.fingerprint, ""))
            raise
        parallel.broadcast((_DONE, wanted.fingerprint, ""))
        return artifact


def _follow(wanted: Artifact, make: Make) -> Artifact:
    """Do what rank 0's messages ask for until rank 0 has the artifact, and return the artifact."""
    while True:
        order, fingerprint, folder = parallel.broadcast(None)
        if order == _ENDED:
            raise RunEnded
        if fingerprint != wanted.fingerprint:
            raise GradsiftError(
                f"rank {parallel.rank()} came to {wanted.stage} {wanted.path.name}, but rank 0 works on {fingerprint}; "
                "all ranks need the same command, code and input files"
            )
        if order == _DONE:
            manifest, damage = read_manifest(wanted.path, stage=wanted.stage, fingerprint=fingerprint)
            if damage is not None:
                raise GradsiftError(
                    f"rank {parallel.rank()} cannot read {wanted.path} ({damage}); all ranks need the same store, give "
                    "it with artifacts=DIR"
                )
            return Artifact(wanted.stage, wanted.path, fingerprint, manifest)
        with tempfile.TemporaryDirectory(prefix="gradsift-rank-") as scratch:
            copy = Path(scratch) / wanted.path.name
            shutil.copytree(folder, copy)
            parallel.total(0)
            _make_on_every_rank(make, copy)


def _make_on_every_rank(make: Make, folder: Path) -> Mapping[str, Any]:
    """Call `make` and return its result; on rank 0, count the forward tokens of all ranks."""
    with counting() as tokens:
        info = make(folder)
    tokens_of_all = parallel.total(tokens())
    if parallel.rank() == 0:
        passed(tokens_of_all)
    return info
