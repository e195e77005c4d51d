"""Laws of the store: artifacts are complete or absent, found by their fingerprint, and never stale."""

from __future__ import annotations

import calendar
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradsift import artifacts, manifests
from gradsift.artifacts import Artifact, Store, fingerprint_of
from gradsift.disk import guarded
from gradsift.errors import GradsiftError
from gradsift.manifests import MANIFEST, UNFINISHED, write_manifest


def build(
    root: Path, config: dict, parents: list[Artifact] | None = None, text: str = "x", **options
) -> tuple[Store, Artifact]:
    store = Store(root, say=lambda line: None)

    def make(folder: Path) -> dict:
        (folder / "result.txt").write_text(text)
        return {"rows": 1, "optimizer_steps": 3}

    return store, store.obtain(
        "stage", "slug", config, parents or [], make, version=options.pop("version", 1), **options
    )


def test_finished_work_is_reused_and_counted(tmp_path: Path) -> None:
    store, first = build(tmp_path, {"a": 1})
    again, second = build(tmp_path, {"a": 1}, text="never written")
    assert second.path == first.path
    assert second.file("result.txt").read_text() == "x"
    assert [(r.reused, r.optimizer_steps) for r in store.records] == [(False, 3)]
    assert [(r.reused, r.optimizer_steps) for r in again.records] == [(True, 0)]


def test_another_config_parent_or_version_is_another_artifact(tmp_path: Path) -> None:
    _, base = build(tmp_path, {"a": 1})
    _, parent = build(tmp_path, {"a": 2})
    others = [
        build(tmp_path, {"a": 1, "b": None})[1],
        build(tmp_path, {"a": 1}, [parent])[1],
        build(tmp_path, {"a": 1}, version=2)[1],
        parent,
    ]
    assert len({artifact.fingerprint for artifact in [base, *others]}) == 5


def test_the_order_of_options_is_not_part_of_the_fingerprint() -> None:
    assert fingerprint_of("s", 1, {"a": 1, "b": 2}, []) == fingerprint_of("s", 1, {"b": 2, "a": 1}, [])


def test_a_store_reports_the_unit_that_is_being_made(tmp_path: Path) -> None:
    told: list[str] = []

    def at_work(label: str) -> contextlib.AbstractContextManager[None]:
        told.append(label)
        return contextlib.nullcontext()

    store = Store(tmp_path, at_work=at_work)
    for _ in range(2):
        store.obtain("stage", "slug", {}, [], lambda folder: {}, version=1)
    assert told == ["stage slug"]


def test_a_manifest_has_config_parents_counts_files_and_versions(tmp_path: Path) -> None:
    _, parent = build(tmp_path, {"a": 1})
    _, artifact = build(tmp_path, {"a": 2}, [parent])
    written = json.loads(artifact.file(MANIFEST).read_text())
    assert written.keys() - artifact.manifest.keys() == {"checksum"}
    assert {name: value for name, value in written.items() if name != "checksum"} == artifact.manifest
    made_with = {"checksum", "seconds", "peak_resident_gb", "finished", "git_sha", "code", "packages"}
    assert written == {name: written[name] for name in made_with} | {
        "stage": "stage",
        "fingerprint": artifact.fingerprint,
        "version": 1,
        "config": {"a": 2},
        "size": 1,
        "models": [],
        "numerics": {},
        "parents": [parent.fingerprint],
        "info": {"rows": 1, "optimizer_steps": 3},
        "files": {"result.txt": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    }
    assert time.time() - calendar.timegm(time.strptime(written["finished"], "%Y-%m-%dT%H:%M:%SZ")) < 60


def test_the_size_of_work_is_its_own_or_the_largest_of_its_parents(tmp_path: Path) -> None:
    parents = [build(tmp_path, {"a": size}, size=size)[1] for size in (5, 7)]
    assert [parent.size for parent in parents] == [5, 7]
    assert build(tmp_path, {}, parents)[1].size == 7
    assert build(tmp_path, {"b": 1}, parents, size=6)[1].size == 6
    unsized = Store(tmp_path).obtain("stage", "unsized", {}, [], lambda folder: {}, version=1)
    child = Store(tmp_path).obtain("stage", "child", {}, [unsized], lambda folder: {}, version=1)
    assert (unsized.size, child.size) == (None, None)


def test_the_next_version_of_the_code_finds_the_artifacts_of_this_one() -> None:
    """Changing the hashed names or their order would invalidate every artifact without a reason."""
    assert (MANIFEST, UNFINISHED) == ("manifest.json", "unfinished")
    numerics = {"precision": "float32", "kernels": "off"}
    parent = Artifact("backbone", Path("x"), "0123456789ab", {"info": {"content": "c0"}}, numerics=numerics)
    assert parent.identity == "0123456789ab:c0:kernels=off:precision=float32"
    assert fingerprint_of("member", 5, {"seed": 0}, [parent]) == "f2ee9024e332"


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "manifest", "manifest is a folder", "file", "link"])
def test_a_damaged_artifact_is_set_aside_and_made_again(tmp_path: Path, damage: str) -> None:
    _, artifact = build(tmp_path, {})
    file = artifact.file("result.txt")
    if damage == "gone":
        file.unlink()
    elif damage == "manifest":
        artifact.file(MANIFEST).write_text("{")
    elif damage == "manifest is a folder":
        artifact.file(MANIFEST).unlink()
        artifact.file(MANIFEST).mkdir()
    elif damage in ("file", "link"):  # where the folder was; a link may lead to a disk that is not there now
        artifact.path.rename(tmp_path / "elsewhere")
        artifact.path.touch() if damage == "file" else artifact.path.symlink_to(tmp_path / "nowhere")
    else:
        file.write_text("" if damage == "cut" else "y")
    store, again = build(tmp_path, {}, text="new")
    assert again.file("result.txt").read_text() == "new"
    assert not store.records[0].reused
    assert len(list(tmp_path.glob("stage/*.damaged-*"))) == 1


@pytest.mark.parametrize("moment", ["after the files are read", "while the files are read"])
def test_what_another_process_made_again_is_not_set_aside(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find a damaged artifact, and one of them has repaired it before the other gets the lock."""
    _, artifact = build(tmp_path, {})
    artifact.file("result.txt").write_text("y")
    name = "read_manifest" if moment.startswith("after") else "describe"
    module = artifacts if moment.startswith("after") else manifests
    plain = getattr(module, name)

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, plain)
        if moment.startswith("after"):
            seen = plain(*arguments, **options)
            build(tmp_path, {}, text="new")
            return seen
        artifact.path.rename(tmp_path / "aside")
        return plain(*arguments, **options)

    monkeypatch.setattr(module, name, meanwhile)
    store, again = build(tmp_path, {}, text="new")
    assert again.file("result.txt").read_text() == "new"
    assert store.records[0].reused == moment.startswith("after")
    assert len(list(tmp_path.glob("stage/*.damaged-*"))) == moment.startswith("after")


ENTRIES = {  # of a manifest that matches its checksum, and do not fit the request or the folder
    "another fingerprint": {"fingerprint": "0123456789ab"},
    "another stage": {"stage": "other"},
    "no files": {"files": {}},
    "a file described by nothing": {"files": {"result.txt": None}},
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_manifest_that_does_not_fit_the_request_counts_as_damage(tmp_path: Path, entry: str) -> None:
    _, artifact = build(tmp_path, {})
    write_manifest(artifact.path, json.loads(artifact.file(MANIFEST).read_text()) | ENTRIES[entry])
    heard: list[str] = []
    again = Store(tmp_path, heard.append).obtain("stage", "slug", {}, [], lambda folder: {"rows": 2}, version=1)
    assert again.info == {"rows": 2}
    assert len(heard) == 1
    assert "is damaged (manifest.json" in heard[0] or "is damaged (result.txt" in heard[0]


@pytest.mark.parametrize("key", ["info", "seconds", "config", "files", "parents", "finished", "checksum"])
def test_a_changed_manifest_counts_as_damage(tmp_path: Path, key: str) -> None:
    """Only one entry is changed, as by a flipped bit. A missing checksum is a change too."""
    _, artifact = build(tmp_path, {"a": 1})
    text = artifact.file(MANIFEST).read_text()
    manifest = json.loads(text)
    changed = {
        "info": {"rows": 9, "optimizer_steps": 3},
        "files": manifest["files"] | {"more": {}},
        "checksum": None,
    }.get(key, ["x"])
    artifact.file(MANIFEST).write_text(json.dumps(manifest | {key: changed}))
    heard: list[str] = []
    store = Store(tmp_path, heard.append)
    assert store.obtain("stage", "slug", {"a": 1}, [], lambda folder: {}, version=1).info == {}
    assert "manifest.json does not fit its checksum" in heard[0] and len(heard) == 1


def test_an_unreadable_note_of_the_versions_does_not_stop_the_work(tmp_path: Path) -> None:
    """Neither does an unreadable lock file."""
    heard: list[str] = []

    def make(folder: Path) -> dict:
        (folder / UNFINISHED / "point").write_bytes(b"")
        if len(heard) < 1:
            heard.append("began")
            raise ValueError("interrupted")
        return {}

    store = Store(tmp_path, heard.append)
    with pytest.raises(ValueError, match="interrupted"):
        store.obtain("stage", "slug", {}, [], make, version=1)
    for file in [*tmp_path.glob("stage/*.part/unfinished/made_by.json"), *tmp_path.glob("stage/.*.lock")]:
        file.write_bytes(b"\xff\xfe\x00")
    assert store.obtain("stage", "slug", {}, [], make, version=1).info == {}
    assert "other code or packages" in heard[2]


def test_failed_work_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict:
        (folder / "half.txt").write_text("half")
        raise ValueError("stop")

    store = Store(tmp_path)
    with pytest.raises(ValueError, match="stop"):
        store.obtain("stage", "slug", {}, [], fail, version=1)
    assert [path.name for path in tmp_path.glob("stage/slug*") if not path.name.endswith(".part")] == []
    _, artifact = build(tmp_path, {})
    assert not artifact.file("half.txt").exists()  # the leftover was cleared


def test_a_kill_between_manifest_and_rename_costs_no_kept_work(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> dict:
        made.append(1)
        (folder / "replies.txt").write_text("paid for")
        return {}

    artifact = Store(tmp_path).obtain("stage", "slug", {}, [], make, version=1)
    artifact.path.rename(artifact.path.with_name(artifact.path.name + ".part"))  # as if the rename had not come
    for _ in range(2):
        store = Store(tmp_path, say=lambda line: None)
        again = store.obtain("stage", "slug", {}, [], make, version=1)
        assert MANIFEST not in again.manifest["files"]
    assert len(made) == 2  # the last call found the artifact


def _count_runs(root: str, log: str) -> None:
    def make(folder: Path) -> dict:
        with Path(log).open("a") as stream:
            stream.write("ran\n")
        time.sleep(0.3)
        return {}

    Store(Path(root)).obtain("stage", "slug", {}, [], make, version=1)


def test_processes_share_one_unit_of_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "store"), str(tmp_path / "log"))
    processes = [context.Process(target=_count_runs, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "ran\n"


def _work_and_hang(root: str) -> None:
    def make(folder: Path) -> dict:
        (folder / "half.txt").write_text("half")
        time.sleep(60)
        return {}

    Store(Path(root)).obtain("stage", "slug", {}, [], make, version=1)


def test_kill_9_leaves_neither_a_lock_nor_a_half_artifact(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_work_and_hang, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("stage/*.part/half.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    _, artifact = build(tmp_path, {})
    assert time.monotonic() - started < 10
    assert sorted(path.name for path in artifact.path.iterdir()) == [MANIFEST, "result.txt"]


def test_a_store_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(GradsiftError, match=r"stage stage \(slug-.*\) could not store its work in .*artifacts=DIR"):
        build(blocked, {})


def test_a_full_disk_names_the_stage(tmp_path: Path) -> None:
    def make(folder: Path) -> dict:
        raise OSError(28, "No space left on device")

    with pytest.raises(GradsiftError, match="No space left on device"):
        Store(tmp_path).obtain("stage", "slug", {}, [], make, version=1)


def test_an_os_error_outside_the_store_passes_unchanged(tmp_path: Path) -> None:
    def make(folder: Path) -> dict:
        return {"text": Path("no such file").read_text()}

    with pytest.raises(FileNotFoundError):
        Store(tmp_path).obtain("stage", "slug", {}, [], make, version=1)


def test_work_continues_from_unfinished_which_the_artifact_does_not_contain(tmp_path: Path) -> None:
    said: list[str] = []

    def make(folder: Path) -> dict:
        kept, half = folder / UNFINISHED / "steps", folder / "half.txt"
        assert not half.exists()  # all else is begun anew
        half.write_text("half")
        done = int(kept.read_text()) if kept.exists() else 0
        kept.write_text(str(done + 2))
        if done < 4:
            raise ValueError("interrupted")
        half.unlink()
        return {"optimizer_steps": done + 2, "resumed_steps": done}

    for _ in range(2):
        with pytest.raises(ValueError, match="interrupted"):
            Store(tmp_path, said.append).obtain("stage", "slug", {}, [], make, version=1)
    store = Store(tmp_path, said.append)
    artifact = store.obtain("stage", "slug", {}, [], make, version=1)
    assert [path.name for path in artifact.path.iterdir()] == [MANIFEST]
    assert store.records[0].optimizer_steps == 2  # those of this process
    assert artifact.info["optimizer_steps"] == 6
    assert len(said) == 2
    assert "continuing the work of an interrupted run" in said[0]


def test_another_config_never_continues_from_this_ones_state(tmp_path: Path) -> None:
    def make(folder: Path) -> dict:
        resumed = list((folder / UNFINISHED).glob("point"))
        (folder / UNFINISHED / "point").write_text("")
        if not resumed:
            raise ValueError("interrupted")
        return {}

    for config in ({"a": 1}, {"a": 2}):
        with pytest.raises(ValueError, match="interrupted"):
            Store(tmp_path).obtain("stage", "slug", config, [], make, version=1)
    with pytest.raises(ValueError, match="interrupted"):
        Store(tmp_path).obtain("stage", "slug", {"a": 1}, [], make, version=2)
    Store(tmp_path).obtain("stage", "slug", {"a": 1}, [], make, version=1)


def test_continuing_with_other_code_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def make(folder: Path) -> dict:
        resumed = (folder / UNFINISHED / "point").exists()
        (folder / UNFINISHED / "point").write_text("")
        if not resumed:
            raise ValueError("interrupted")
        return {}

    with pytest.raises(ValueError, match="interrupted"):
        Store(tmp_path, said.append).obtain("stage", "slug", {}, [], make, version=1)
    monkeypatch.setattr(artifacts, "package_versions", lambda: {"torch": "9.9"})
    Store(tmp_path, said.append).obtain("stage", "slug", {}, [], make, version=1)
    assert "other code or packages" in said[-1]


def test_a_unit_that_two_processes_make_at_once_is_not_kept_by_the_first(tmp_path: Path) -> None:
    """Happens if locks work on one machine only, or somebody deletes them."""
    lock = []

    def make(folder: Path) -> dict:
        lock.extend(tmp_path.glob("stage/.*.lock"))
        lock[0].unlink()
        _, theirs = build(tmp_path, {}, text="theirs")
        assert theirs.file("result.txt").read_text() == "theirs"
        folder.mkdir()
        (folder / "result.txt").write_text("ours")
        return {}

    with pytest.raises(GradsiftError, match=r"slug-.* was taken over by process \d+ on .*locks.*do not hold"):
        Store(tmp_path).obtain("stage", "slug", {}, [], make, version=1)
    _, kept = build(tmp_path, {})
    assert kept.file("result.txt").read_text() == "theirs"


def test_a_store_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file systems here have locks, so the system call is replaced."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(GradsiftError, match=r"stage stage .*no locks between processes.*docs/sweeps\.md"):
        build(tmp_path, {})
    assert list(tmp_path.glob("stage/slug*")) == []


def test_wrong_clocks_change_nothing(tmp_path: Path) -> None:
    _, made = build(tmp_path, {})
    manifest = json.loads(made.file(MANIFEST).read_text()) | {"finished": "2999-01-01T00:00:00Z"}
    write_manifest(made.path, manifest)
    far = 32_000_000_000  # seconds: after the year 2900
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(path, (far, far))
    store, again = build(tmp_path, {}, text="never written")
    assert store.records[0].reused
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(path, (0, 0))
    assert build(tmp_path, {}, text="never written")[0].records[0].reused
    left = again.path.rename(again.path.with_name(again.path.name + ".part"))  # work of a process that died
    os.utime(left, (far, far))
    (tmp_path / "stage" / f".{again.path.name}.lock").write_text("a holder that is no more")
    store, anew = build(tmp_path, {}, text="anew")
    assert anew.file("result.txt").read_text() == "anew"


@pytest.mark.parametrize(("change", "said"), [({"code": "other"}, "commit a1b2"), ({"packages": {}}, "torch None")])
def test_reuse_of_work_of_other_code_is_reported(tmp_path: Path, change: dict, said: str) -> None:
    _, made = build(tmp_path, {})
    heard: list[str] = []
    Store(tmp_path, heard.append).obtain("stage", "slug", {}, [], lambda folder: {}, version=1)
    assert heard == []
    manifest = json.loads(made.file(MANIFEST).read_text()) | {"git_sha": "a1b2"} | change
    write_manifest(made.path, manifest)
    store = Store(tmp_path, heard.append)
    for _ in range(2):
        store.obtain("stage", "slug", {}, [], lambda folder: {}, version=1)
    assert len(heard) == 1
    assert "reusing work of other code" in heard[0]
    assert said in heard[0]
    assert said in " ".join(store.other_code)


def test_edited_code_is_other_code_at_any_commit(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "src" / "gradsift"
    shutil.copytree(source, tmp_path / "gradsift", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from gradsift.versions import code_hash, git_sha; print(git_sha(), code_hash())"]

    def described() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = described()
    assert first.startswith("None ")
    with (tmp_path / "gradsift" / "scoring" / "gsnr.py").open("a") as stream:
        stream.write("\n# changed\n")
    assert described() != first


def test_between_stages_only_errors_that_name_the_store_are_its_own(tmp_path: Path) -> None:
    gone = r"the run could not store.*was its disk unmounted"
    with pytest.raises(GradsiftError, match=gone), guarded(tmp_path, "the run", nameless=False):
        (tmp_path / "stage" / "scores.parquet").read_bytes()
    with pytest.raises(PermissionError), guarded(tmp_path, "the run", nameless=False):
        raise PermissionError(errno.EACCES, "a socket's")


@pytest.mark.parametrize(("number", "name"), [(errno.EACCES, "artifacts/x"), (errno.ENOENT, "artifacts/x")])
def test_a_store_is_known_by_relative_and_absolute_names(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for store, named in ((Path("artifacts"), tmp_path / name), (tmp_path / "artifacts", Path(name))):
        with pytest.raises(GradsiftError, match="the run could not store"), guarded(store, "the run"):
            raise OSError(number, "no", str(named))
        with pytest.raises(OSError, match="raw"), guarded(store, "the run"):  # of a file beside the store
            raise OSError(number, "no", str(named.parent.with_name("artifacts_raw") / "x"))
