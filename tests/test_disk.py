"""Laws of a disk that fails during a run: the error names the unit, nothing is damaged, the same command continues."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMOKE

from gradsift.artifacts import Store
from gradsift.errors import GradsiftError
from gradsift.features.vectors import open_features
from gradsift.manifests import MANIFEST

Mount = Callable[..., Path]


def _call(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a file system at `tmp_path/disk`; skipped without the right to mount."""
    point = tmp_path / "disk"
    point.mkdir()

    def mounted(*options: str) -> Path:
        try:
            _call("mount", *options, point)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("file systems cannot be mounted here")
        return point

    yield mounted
    mounts = Path("/proc/mounts")  # `ismount` does not see a bind mount of the same disk
    while mounts.exists() and str(point) in mounts.read_text():
        _call("umount", "-l", point)


def build(root: Path, during: Callable[[Path], object] = lambda folder: None) -> Store:
    """Make one unit of work in the store, and call a function while it is made."""
    store = Store(root, say=lambda line: None)

    def make(folder: Path) -> dict[str, int]:
        (folder / "before.txt").write_text("before")
        during(folder)
        (folder / "after.txt").write_text("after")
        return {"rows": 1}

    store.obtain("stage", "slug", {}, [], make, version=1)
    return store


def test_a_full_disk_stops_the_run_and_the_command_continues(gradsift, capsys, mount: Mount) -> None:
    disk = mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    shutil.copytree(gradsift.store, disk / "store")
    taken = shutil.disk_usage(disk).used
    _call("mount", "-o", f"remount,size={taken + 200_000}", disk)
    command = (*SMOKE, "stop_after=selection", f"artifacts={disk / 'store'}")
    assert gradsift(*command) == 2
    err = capsys.readouterr().err
    assert "error: stage " in err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    whole = {path.parent for path in (disk / "store").glob("*/*/" + MANIFEST) if not path.parent.name.endswith(".part")}
    before = {path: path.stat().st_mtime_ns for path in whole}
    _call("mount", "-o", "remount,size=64m", disk)
    assert gradsift(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in whole} == before
    assert not list((disk / "store").glob("*/*.damaged-*"))
    assert gradsift(*command[:-1]) == 0  # in a store that never was full
    ours, theirs = (sorted(store.glob("select/*/selection.jsonl")) for store in (disk / "store", gradsift.store))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_a_mapped_array_allocates_its_space_first(mount: Mount) -> None:
    """A mapped page without space on the disk would kill the process without a message."""
    disk = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    with pytest.raises(OSError, match="No space left"):
        open_features(disk, 1000, 1000)
    fitting = open_features(disk, 100, 100)
    fitting[:] = 1.0
    fitting.flush()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be allocated first")
@pytest.mark.parametrize("left", [0, 4_128])
def test_a_mapped_array_that_does_not_fit_gives_its_space_back(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 keeps the part that it could allocate. `left`: size of the array of an interrupted run."""

    def allocate_a_part(descriptor: int, offset: int, size: int) -> None:
        os.ftruncate(descriptor, 100_000)
        raise OSError(errno.ENOSPC, "No space left on device")

    if left:
        open_features(tmp_path, 10, 100)[:] = 1.0
    monkeypatch.setattr(os, "posix_fallocate", allocate_a_part)
    with pytest.raises(OSError, match=r"No space left on device for 4\.0 GB of vectors: .*features\.npy"):
        open_features(tmp_path, 10_000, 100_000)
    (file,) = tmp_path.rglob("features.npy")
    assert file.stat().st_size == left


@pytest.mark.parametrize("moment", ["within", "between"])
def test_after_a_vanished_mount_nothing_begins_anew_below_it(tmp_path: Path, mount: Mount, moment: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    root = mount("--bind", str(there))

    def vanish(_: object) -> None:
        _call("umount", "-l", root)

    if moment == "within":
        with pytest.raises(GradsiftError, match=r"stage stage \(slug-.*was its disk unmounted"):
            build(root, vanish)
    else:
        store = build(root)
        vanish(None)
        with pytest.raises(GradsiftError, match=r"is not the folder that it was.*unmounted"):
            store.obtain("stage", "other", {"a": 1}, [], lambda folder: {}, version=1)
    assert list(root.iterdir()) == []
    mount("--bind", str(there))
    store = build(root)
    assert store.records[0].reused is (moment == "between")
    (artifact,) = root.glob("stage/slug-*[0-9a-f]")
    assert (artifact / "after.txt").read_text() == "after"


def test_a_disk_that_turns_read_only_is_named(tmp_path: Path, mount: Mount) -> None:
    there = tmp_path / "there"
    there.mkdir()
    root = mount("--bind", str(there))
    store = build(root)
    _call("mount", "-o", "remount,ro,bind", root)
    with pytest.raises(GradsiftError, match=r"stage stage \(other-.*Read-only file system.*artifacts=DIR"):
        store.obtain("stage", "other", {"a": 1}, [], lambda folder: {}, version=1)
    assert build(root).records[0].reused  # what is finished is read all the same
    _call("mount", "-o", "remount,rw,bind", root)
    store.obtain("stage", "other", {"a": 1}, [], lambda folder: {}, version=1)


@pytest.mark.skipif(sys.platform != "linux", reason="chattr is Linux's")
def test_a_permission_that_is_revoked_mid_unit_is_named(tmp_path: Path) -> None:
    """Uses a flag that holds for root too."""
    sealed: list[Path] = []

    def seal(folder: Path) -> None:
        try:
            _call("chattr", "+i", folder)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this file system knows no flag that stops root")
        sealed.append(folder)

    try:
        with pytest.raises(GradsiftError, match=r"stage stage \(slug-.*Operation not permitted.*artifacts=DIR"):
            build(tmp_path, seal)
        with pytest.raises(GradsiftError, match="Operation not permitted"):
            build(tmp_path)
    finally:
        for folder in sealed:
            _call("chattr", "-i", folder)
    assert not build(tmp_path).records[0].reused
