"""Laws of the tracker: it always writes its file, keeps offline W&B runs in the run's folder, and writes no secret."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE

from gradsift.artifacts import Artifact, Store
from gradsift.config import TrackerConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.report.terminal import report_at_end
from gradsift.runtime import Display
from gradsift.tracking import METRICS_FILE, Tracker, group_of, log_report, without_folders

KEY = "0123456789abcdef0123456789abcdef01234567"
CURVE = [{"batch": 0, "loss": 2.5, "tokens": 30}, {"batch": 1, "loss": 2.0, "tokens": 12}]
VALUES = {"pws": None, "accuracy": {"model": 0.5}, "by_definition": True, "files": "a text", "list": [1]}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove any login, and undo what a tracker sets in the environment."""
    for name in ("WANDB_DATA_DIR", "WANDB_API_KEY", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect the addresses outside this machine that a test tries to reach; libraries may hide the guard's error."""
    addresses: list[Any] = []
    guarded = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("localhost", "127.0.0.1", "::1"):
            addresses.append(address)
        guarded(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield addresses


def wandb_config(**changes: Any) -> TrackerConfig:
    return TrackerConfig(**({"name": "wandb"} | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def parsed(data: bytes) -> list[Any]:
    """Parse LevelDB's log format: a header, then crc, length and type before each record."""
    from wandb.proto import wandb_internal_pb2

    position, parsed_records = 7, []
    assert len(data) < 2**15  # one block: no record is split
    while position + 7 <= len(data):  # the last record may be half-written
        (length,) = struct.unpack_from("<H", data, position + 4)
        if position + 7 + length > len(data):
            break
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        parsed_records.append(record)
        position += 7 + length
    return parsed_records


def records(folder: Path) -> list[Any]:
    """Return the records of the only offline run below `folder`; W&B's own process may write them after the finish."""
    (path,) = folder.rglob("*.wandb")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        size, written = path.stat().st_size, parsed(path.read_bytes())
        if any(record.HasField("exit") for record in written):
            return written
        time.sleep(0.05)
    return pytest.fail(f"the run was never finished: {size} bytes, {len(written)} records")


# ------------------------------------------------------------------------------------------- files


def test_without_a_tracker_only_the_metrics_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **options: pytest.fail("W&B was started"))
    with Tracker(TrackerConfig(name="none"), tmp_path, "sweep", {"name": "x"}) as tracker:
        tracker.curve("finetune", CURVE)
        tracker.summary(VALUES)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    assert lines(tmp_path) == [
        {"batch": 0, "finetune/loss": 2.5, "finetune/tokens": 30.0},
        {"batch": 1, "finetune/loss": 2.0, "finetune/tokens": 42.0},  # tokens seen so far
        {"pws": None, "accuracy/model": 0.5, "by_definition": True},
    ]
    assert "WANDB_DATA_DIR" not in os.environ


# --------------------------------------------------------------------------------------------- W&B


def test_an_offline_run_is_whole_inside_the_run_folder_and_holds_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: list[Any]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folder = tmp_path / "run"
    folder.mkdir()
    with Tracker(wandb_config(), folder, "my-sweep", {"name": "gsnr-0.1", "alpha": 0.1}) as tracker:
        tracker.curve("finetune", CURVE)
        tracker.summary(VALUES)
    assert wandb.run is None
    assert reached == []
    assert len(lines(folder)) == 3
    assert list((folder / "wandb").glob("offline-run-*"))
    logged = records(folder)
    (run,) = [record.run for record in logged if record.HasField("run")]
    assert (run.display_name, run.run_group, run.project) == ("gsnr-0.1", "my-sweep", "gradsift")
    assert [record.exit.exit_code for record in logged if record.HasField("exit")] == [0]
    assert sum(record.HasField("history") for record in logged) == 2
    summary = {item.key or item.nested_key[0]: item.value_json for r in logged for item in r.summary.update}
    assert summary["accuracy/model"] == "0.5"
    secret = [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert secret == []


def test_an_offline_run_is_finished_after_an_exception(tmp_path: Path, reached: list[Any]) -> None:
    import wandb

    with pytest.raises(ZeroDivisionError), Tracker(wandb_config(), tmp_path, None, {"name": "x"}):
        raise ZeroDivisionError
    assert wandb.run is None
    assert reached == []
    assert [record.exit.exit_code for record in records(tmp_path) if record.HasField("exit")] == [1]


class Started:
    """Replaces `wandb.init` and records the options and the exit code of each run."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.summary: dict[str, Any] = {}

    def __call__(self, **options: Any) -> Started:
        self.options.append(options | {"data": os.environ.get("WANDB_DATA_DIR")})
        return self

    def log(self, line: dict[str, Any]) -> None:
        pass

    def log_artifact(self, sent: Any) -> None:
        pytest.fail("an artifact was logged")

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    stub = Started()
    monkeypatch.setattr("wandb.init", stub)
    return stub


@pytest.mark.parametrize(("group", "expected"), [(None, "the-sweep"), ("mine", "mine")])
def test_the_group_is_the_sweep_unless_one_is_given(
    group: str | None, expected: str, tmp_path: Path, started: Started
) -> None:
    with Tracker(wandb_config(group=group), tmp_path, "the-sweep", {"name": "x"}):
        pass
    assert [options["group"] for options in started.options] == [expected]


def test_the_runs_of_a_sweep_share_its_name_and_are_all_finished(gradsift, started: Started) -> None:
    command = ("-m", *SMOKE, "tracker=wandb", "scorer=random", "stop_after=selection", "alpha=0.0001,0.1")
    assert gradsift(*command) == 2  # the first job selects nothing
    (sweep,) = gradsift.folder.glob("multirun/*/*")
    assert [options["group"] for options in started.options] == [f"{sweep.parent.name}_{sweep.name}"] * 2
    assert [options["mode"] for options in started.options] == ["offline"] * 2
    assert [Path(options["dir"]).name for options in started.options] == ["0-random-0.0001", "1-random-0.1"]
    assert started.exit_codes == [1, 0]


@pytest.mark.parametrize(
    ("folder", "group"),
    [
        ("multirun/2026-11-22/12-30-05", "2026-11-22_12-30-05"),  # the time alone comes again the next day
        ("/home/me/sweeps/alphas", "alphas"),
    ],
)
def test_a_group_is_named_after_the_sweeps_day_and_folder(folder: str, group: str) -> None:
    assert group_of(Path(folder)) == group


def ids_of(started: Started, folder: Path, *abouts: dict[str, Any]) -> list[str]:
    for about in abouts:
        with Tracker(wandb_config(), folder, "sweep", about):
            pass
    return [options["id"] for options in started.options][-len(abouts) :]


def test_every_job_has_an_id_of_its_own_and_keeps_it_when_given_again(tmp_path: Path, started: Started) -> None:
    job, other = {"name": "x", "alpha": 0.1}, {"name": "x", "alpha": 0.2}
    first, second = ids_of(started, tmp_path / "0", job, other)
    (elsewhere,) = ids_of(started, tmp_path / "1", job)
    assert len({first, second, elsewhere}) == 3
    assert ids_of(started, tmp_path / "0", other, job) == [second, first]
    (tmp_path / "0" / "wandb").rename(tmp_path / "moved")
    assert ids_of(started, tmp_path / "0", job) != [first]


def test_of_a_job_that_is_given_again_one_run_is_left_to_send(tmp_path: Path, started: Started) -> None:
    job, other = {"name": "x", "alpha": 0.1}, {"name": "x", "alpha": 0.2}
    first, second = ids_of(started, tmp_path, job, other)
    runs = [tmp_path / "wandb" / f"offline-run-{day}-{run}" for day, run in (("1", first), ("2", second))]
    for run in runs:
        (run / "files").mkdir(parents=True)
    ids_of(started, tmp_path, job)
    assert [run.is_dir() for run in runs] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("joblib") is None, reason="joblib is not installed (an optional extra)")
def test_jobs_of_other_processes_are_offline_runs_of_one_group(gradsift, monkeypatch: pytest.MonkeyPatch) -> None:
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)  # workers that find this checkout
    source = str(Path(__file__).parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "compute.threads=1", "report=false")
    assert gradsift("-m", *SMOKE, *launcher, "tracker=wandb", "stop_after=load", "alpha=0.1,0.2") == 0
    (sweep,) = gradsift.folder.glob("multirun/*/*")
    runs = [record.run for job in sorted(sweep.glob("*/")) for record in records(job) if record.HasField("run")]
    assert [run.run_group for run in runs] == [f"{sweep.parent.name}_{sweep.name}"] * 2
    assert len({run.run_id for run in runs}) == 2


def test_each_run_of_a_sweep_stages_in_its_own_folder(tmp_path: Path, started: Started) -> None:
    for name in ("0", "1"):
        with Tracker(wandb_config(), tmp_path / name, "sweep", {"name": name}):
            pass
    assert [options["data"] for options in started.options] == [str(tmp_path / "0"), str(tmp_path / "1")]


def test_a_start_that_fails_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**options: Any) -> None:
        raise wandb.Error("no such entity\nsecond line")

    monkeypatch.setattr("wandb.init", fail)
    with pytest.raises(GradsiftError, match=r"no such entity.*tracker=none") as caught:
        Tracker(wandb_config(), tmp_path, None, {"name": "x"}).__enter__()
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- files, and no folders


def selection(folder: Path) -> Artifact:
    def make(part: Path) -> dict[str, Any]:
        (part / "selection.jsonl").write_text("a line\n")
        return {"rows": 1}

    return Store(folder, say=lambda line: None).obtain("select", "gsnr topk-0.1", {}, [], make, version=1)


def test_a_stages_file_goes_along_where_that_is_asked_for_and_no_folder_with_it(
    tmp_path: Path, reached: list[Any]
) -> None:
    made = selection(tmp_path / "store")
    about = {"name": "x", "overrides": [f"artifacts={tmp_path / 'store'}", f"data.path={tmp_path}/mine.json"]}
    with Tracker(wandb_config(artifacts=True), tmp_path / "run", "g", about) as tracker:
        tracker.artifact(made, "selection.jsonl")
        tracker.summary(VALUES)
    assert reached == []
    logged = records(tmp_path / "run")
    (sent,) = [record.artifact for record in logged if record.HasField("artifact")]
    assert (sent.type, sent.name) == ("select", f"select-gsnr_topk-0.1-{made.fingerprint}")
    assert json.loads(sent.metadata) == {"rows": 1}
    (entry,) = sent.manifest.contents
    assert entry.path == "selection.jsonl"
    assert base64.b64decode(entry.digest) == hashlib.md5(b"a line\n", usedforsecurity=False).digest()
    assert Path(entry.local_path).is_relative_to(tmp_path / "run")  # what is sent later does not need the store
    (run,) = [record.run for record in logged if record.HasField("run")]
    config = {item.key: item.value_json for item in run.config.update}
    assert json.loads(config["overrides"]) == ["artifacts=store", "data.path=mine.json"]
    told = [record for record in logged if not record.HasField("artifact")]
    assert not any(str(tmp_path) in str(record) for record in told)


def test_without_being_asked_no_file_goes_along(tmp_path: Path, started: Started) -> None:
    with Tracker(wandb_config(), tmp_path / "run", None, {"name": "x"}) as tracker:
        tracker.artifact(selection(tmp_path / "store"), "selection.jsonl")
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_files_for_a_tracker_that_is_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.artifacts=true .* tracker=wandb"):
        TrackerConfig(name="none", artifacts=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.path=/home/me/my data/rows.json", "data.path=rows.json"),
        ("data.path=~/rows.json", "data.path=rows.json"),
        ("data.path=C:\\me\\rows.json", "data.path=rows.json"),
        ("target.model.path='/models/a b/llama'", "target.model.path='llama'"),
        ("judge.base_url=https://host/v1", "judge.base_url=https://host/v1"),
        ("proxy.snapshots=[1,2]", "proxy.snapshots=[1,2]"),
        ("data.path=mine/rows.json", "data.path=mine/rows.json"),
        ("~hydra/launcher", "~hydra/launcher"),
    ],
)
def test_of_an_absolute_path_the_last_name_is_told(override: str, told: str) -> None:
    assert without_folders({"overrides": [override], "alpha": 0.1}) == {"overrides": [told], "alpha": 0.1}


# ------------------------------------------------------------------------------------------ online


def refused_online(folder: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(ConfigError, match=r"tracker.mode=online needs a login: .*tracker.mode=offline"),
        Tracker(wandb_config(mode="online"), folder, None, {"name": "x"}),
    ):
        pytest.fail("it started")
    assert time.monotonic() - began < 2


def test_online_without_a_login_is_refused_at_once(tmp_path: Path, started: Started, reached: list[Any]) -> None:
    refused_online(tmp_path)
    assert started.options == reached == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_online_with_a_login_is_tried(
    login: str, tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Tracker(wandb_config(mode="online"), tmp_path, None, {"name": "x"}):
        pass
    assert [options["mode"] for options in started.options] == ["online"]


def test_a_login_for_another_machine_is_no_login(
    tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    refused_online(tmp_path)


# ---------------------------------------------------------------------------------------- a report


def report(folder: Path, tracker: str) -> None:
    """Write what the tracker reads of a sweep's report: a job's config, a figure and a table."""
    from PIL import Image

    for name in ("0-gsnr-0.1", "figures", "tables"):
        (folder / name).mkdir(parents=True)
    config = f"values: {{tracker: {{name: {tracker}, mode: offline, project: gradsift, entity: null, group: null}}}}\n"
    (folder / "0-gsnr-0.1" / "config.yaml").write_text(config)
    Image.new("RGB", (8, 6), "white").save(folder / "figures" / "pws.png")
    (folder / "tables" / "pws.csv").write_text('method,pws\n"gsnr, late",1.25\nrandom,1.0\n')


def test_a_sweeps_report_is_an_offline_run_in_its_group(tmp_path: Path, reached: list[Any]) -> None:
    import wandb

    report(tmp_path / "12-30", "wandb")
    log_report(tmp_path / "12-30")
    assert wandb.run is None and reached == []
    logged = records(tmp_path)
    (run,) = [record.run for record in logged if record.HasField("run")]
    assert (run.display_name, run.run_group, run.job_type) == ("report-12-30", "12-30", "report")
    (history,) = [record.history for record in logged if record.HasField("history")]
    logged = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in history.item}
    assert logged["figures/pws", "_type"] == "image-file"
    assert logged["tables/pws", "nrows"] == 2
    (table,) = (tmp_path / "12-30").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["gsnr, late", "1.25"], ["random", "1.0"]]


def test_a_report_of_untracked_runs_starts_nothing(tmp_path: Path, started: Started) -> None:
    report(tmp_path / "sweep", "none")
    log_report(tmp_path / "sweep")
    assert started.options == []


def test_a_report_that_cannot_be_logged_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    report(folder, "wandb")
    config = folder / "0-gsnr-0.1" / "config.yaml"
    config.write_text(config.read_text().replace("offline", "online"))  # and nobody is logged in
    killed = folder / "-1-gsnr-0.1" / "config.yaml"
    killed.parent.mkdir()
    killed.write_text("values: {tracker: ")  # cut off; the next job's counts
    asked: list[list[str]] = []

    def written_page(folder: Path, formats: list[str]) -> Path:
        asked.append(formats)
        return folder / "report.html"

    monkeypatch.setattr("gradsift.report.page.write_report", written_page)
    assert report_at_end(folder, Display()) == folder / "report.html"
    assert asked == [["svg", "png"]]
    lost = " ".join(capsys.readouterr().out.split())
    assert lost.startswith("report: not logged to W&B (tracker.mode=online needs a login: ")
