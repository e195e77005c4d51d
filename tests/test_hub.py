"""Laws of `data=hub`, against a stand-in of the hub on this machine.

The libraries read the hub's address when they are imported, so the loading runs in a process of its own: one for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import made_once
from hub_stand_in import COMMIT, printed_by_client, serving
from test_load import runtime

from gradsift.composition import compose_config
from gradsift.config import HubDataConfig, SourceConfig
from gradsift.data import hub
from gradsift.data.examples import SourceRow
from gradsift.data.hub import load_hub
from gradsift.data.load import load, require_dataset, row_source
from gradsift.errors import ConfigError, DataError

LOAD = """
import json, sys
from gradsift.data.hub import load_hub
from gradsift.errors import DataError
for line in sys.stdin:
    asked = json.loads(line)
    try:
        answer = [row.content for row in load_hub(*asked)]
    except DataError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""
EARLY = """
import json, sys
sys.modules["gradsift.pipeline"] = None  # so a run that gets past the check fails where it would import torch
sys.stderr = sys.stdout
from gradsift import cli
from gradsift.data.hub import require_dataset
from gradsift.errors import DataError
for line in sys.stdin:
    given = json.loads(line)
    sys.argv = ["run.py", "data=hub", *given]
    try:
        require_dataset(*given) if len(given) == 2 else cli.main()
    except DataError as error:
        print(error)
    except SystemExit:
        pass
    assert "torch" not in sys.modules and "datasets" not in sys.modules
"""
CARD = """---
configs:
- config_name: rivers
  data_files: rivers/*.jsonl
- config_name: hills
  data_files:
  - split: train
    path: hills/train.jsonl
  - split: test
    path: hills/test.jsonl
---
"""
RIVERS = [{"instruction": "Name a river.", "output": f"River {number}."} for number in range(4)]
HILLS = [{"instruction": "Name a hill.", "output": "The Brocken."}]
ASKED = {
    "one subset": ("owner/one", None, "train", None),
    "a revision": ("owner/one", COMMIT, "train", None),
    "another revision": ("owner/one", "v9", "train", None),
    "several subsets": ("owner/several", None, "train", None),
    "rivers": ("owner/several", None, "train", "rivers"),
    "hills": ("owner/several", None, "test", "hills"),
    "no such subset": ("owner/several", None, "train", "lakes"),
    "no such split": ("owner/several", None, "dev", "hills"),
    "gated": ("owner/gated", None, "train", None),
    "missing": ("owner/missing", None, "train", None),
    "script": ("owner/script", None, "train", None),
    "the first rows": ("owner/several", None, "train", "rivers", 3),
    "more than there are": ("owner/several", None, "test", "hills", 9),
    "streamed without a subset": ("owner/several", None, "train", None, 3),
    "a source": ("owner/several", None, "train", None, None, "data.sources.a"),
    "a split of a source": ("owner/several", None, "dev", "hills", None, "data.sources.a"),
    "a missing source": ("owner/missing", "v9", "train", None, None, "data.sources.a"),
}


def written(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Rows or the error's message for each of `ASKED`."""

    def make(folder: Path) -> None:
        root = folder / "hub"
        written(root / "owner/one/data.jsonl", RIVERS)
        written(root / "owner/gated/data.jsonl", RIVERS)
        (root / "owner/gated/.gated").touch()
        written(root / "owner/several/rivers/0.jsonl", RIVERS[:2])
        written(root / "owner/several/rivers/1.jsonl", RIVERS[2:])
        written(root / "owner/several/hills/train.jsonl", RIVERS)
        written(root / "owner/several/hills/test.jsonl", HILLS)
        (root / "owner/several/README.md").write_text(CARD)
        (root / "owner/script").mkdir()
        (root / "owner/script/script.py").write_text("raise SystemExit")
        with serving(root) as address:
            (folder / "answers").write_text(printed_by_client(LOAD, address, folder, ASKED.values()))

    lines = (made_once(tmp_path_factory, "hub", make) / "answers").read_text().splitlines()
    return dict(zip(ASKED, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    ("asked", "rows"),
    {
        "one subset": RIVERS,
        "a revision": RIVERS,
        "rivers": RIVERS,
        "hills": HILLS,
        "the first rows": RIVERS[:3],
        "more than there are": HILLS,
    }.items(),
)
def test_the_rows_of_a_dataset_or_of_a_subset(asked: str, rows: list[object], answers: dict[str, object]) -> None:
    assert answers[asked] == rows


@pytest.mark.parametrize(
    ("asked", "words"),
    {
        "several subsets": "several subsets; give data.subset=NAME, one of: rivers, hills",
        "streamed without a subset": "several subsets; give data.subset=NAME, one of: rivers, hills",
        "no such subset": "no subset 'lakes'; give data.subset=NAME, one of: rivers, hills",
        "no such split": "data.split=dev",
        "another revision": "at data.revision=v9 is no dataset",
        "a source": "data.sources.a.id=owner/several: it has several subsets; give data.sources.a.subset=NAME, one",
        "a split of a source": "correct it, or give its rows with data.sources.a.path=FILE",
        "a missing source": "data.sources.a.id=owner/missing at data.sources.a.revision=v9 is no dataset",
        "gated": "is gated: accept its terms",
        "missing": "is no dataset of the hub",
        "script": "made by a script, which is not run; give data.revision=refs/convert/parquet",
    }.items(),
)
def test_what_cannot_be_loaded_has_a_remedy(asked: str, words: str, answers: dict[str, object]) -> None:
    assert isinstance(answers[asked], str)
    assert words in str(answers[asked])


def test_a_dataset_that_is_not_here_while_the_hub_cannot_be_reached() -> None:
    with pytest.raises(DataError, match=r"not in the local cache and the hub cannot be reached.*data=json"):
        load_hub("owner/elsewhere", None, "train")


def test_streaming_reads_as_many_rows_as_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def first_rows(*arguments: Any) -> Iterator[SourceRow]:
        asked.append(arguments)
        return (SourceRow(row, {"instruction": str(row), "output": "x"}) for row in range(arguments[4]))

    monkeypatch.setattr("gradsift.data.hub.load_hub", first_rows)
    options = {"id": "owner/one", "streaming": True, "limit": 3}
    artifact = load(runtime(tmp_path), HubDataConfig(**options, holdout=2))
    assert asked == [("owner/one", None, "train", None, 5, "data")]
    assert (artifact.info["rows"], artifact.info["heldout"]) == (3, 2)
    assert load(runtime(tmp_path), HubDataConfig(**options)).fingerprint != artifact.fingerprint


def test_a_dataset_that_cannot_be_read_is_refused_before_the_slow_imports(tmp_path: Path) -> None:
    written(tmp_path / "hub/owner/one/data.jsonl", RIVERS)
    written(tmp_path / "hub/owner/gated/data.jsonl", RIVERS)
    (tmp_path / "hub/owner/gated/.gated").touch()
    options = ["proxy=tiny_bytes", "target=smollm2", "stop_after=selection", "tracker=none", "report=false"]
    asked = [  # options of a run or (id, revision), and what is printed
        (["data.id=owner/missing", *options], "error: data.id=owner/missing is no dataset of the hub"),
        (["data.id=owner/missing", "data.scores=none.csv", *options], "error: data.scores=none.csv is no file"),
        (["data.id=owner/one", *options], "gradsift.pipeline"),
        (["owner/gated", None], "data.id=owner/gated is gated: accept its terms"),
        (["owner/two--one", None], "data.id=owner/two--one is no name of a hub dataset; give it as OWNER/NAME"),
        (["owner/one", "v9"], "data.id=owner/one at data.revision=v9 is no dataset"),
    ]
    with serving(tmp_path / "hub") as address:
        lines = printed_by_client(EARLY, address, tmp_path, [given for given, _ in asked]).splitlines()
    for line, (_, expected) in zip(lines, asked, strict=True):
        assert expected in line


REQUIRE = """
import json, sys
from pathlib import Path
from gradsift.data.hub import require_dataset
from gradsift.errors import DataError
for line in sys.stdin:
    id, cached = json.loads(line)
    Path("cache", cached).mkdir(parents=True, exist_ok=True)
    try:
        print(require_dataset(id, None))
    except DataError as error:
        print(error)
"""


def test_without_a_network_only_a_dataset_that_may_be_cached_is_accepted(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        pass  # the server has stopped
    asked = {  # dataset and the folder of the cache that is made before: accepted or not
        ("owner/one", ""): False,
        ("owner/one", "hub/datasets--owner--one"): True,
        ("owner/two", ""): False,
        ("owner/two", "datasets/owner___two_in_another_case"): True,
        ("other/one", ""): False,
    }
    lines = printed_by_client(REQUIRE, address, tmp_path, asked).splitlines()
    for (id, _), is_accepted, line in zip(asked, asked.values(), lines, strict=True):
        refusal = f"data.id={id} is not in the local cache and the hub cannot be reached"
        assert line == "None" if is_accepted else line.startswith(refusal)


def test_offline_a_dataset_that_is_nowhere_or_a_folder_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE=1: see conftest."""
    with pytest.raises(DataError, match=r"data\.id=elsewhere is not in the local cache and the hub cannot be"):
        hub.require_dataset("elsewhere", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for refuse in (lambda: hub.require_dataset("elsewhere", None), lambda: load_hub("elsewhere", None, "train")):
        with pytest.raises(DataError, match=r"data\.id=elsewhere is a file or folder here; take data=json"):
            refuse()
    source = row_source(SourceConfig(id="elsewhere"), tmp_path, "data.sources.a")
    with pytest.raises(
        DataError, match=r"data\.sources\.a\.id=elsewhere is a .*; give its rows with data\.sources\.a\.path="
    ):
        source.read()


def test_a_page_instead_of_an_answer_is_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """As from a network that wants a login first."""
    with serving(tmp_path, page="<html>Log in.</html>") as address:
        printed = printed_by_client(REQUIRE, address, tmp_path, [("owner/one", "")])
    assert printed.startswith("data.id=owner/one is not in the local cache and the hub cannot be reached")


def test_rows_that_are_in_the_store_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset may be gone from the hub by now."""
    monkeypatch.setattr("gradsift.data.hub.load_hub", lambda *given: iter([SourceRow(0, RIVERS[0])]))
    monkeypatch.setattr("gradsift.data.hub.require_dataset", lambda *given: pytest.fail("asked the hub"))
    made, config = runtime(tmp_path), HubDataConfig(id="owner/one")
    with pytest.raises(pytest.fail.Exception):
        require_dataset(made.store, config)
    load(made, config)
    require_dataset(made.store, config)


@pytest.mark.parametrize("id", ["a/b/c", "https://hub/owner/one", "owner/on e", ""])
def test_what_is_no_name_of_a_dataset_is_refused_before_the_run(id: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a hub dataset; give it as OWNER/NAME"):
        HubDataConfig(id=id)


def test_streaming_needs_a_limit() -> None:
    with pytest.raises(ConfigError, match=r"data\.streaming=true needs .*data\.limit=10000"):
        HubDataConfig(id="owner/one", streaming=True)


def test_a_dataset_is_named_after_its_id_and_subset() -> None:
    assert HubDataConfig(id="owner/several", subset="hills").name == "owner_several-hills"
    assert HubDataConfig(id="owner/one", name="mine").name == "mine"
    options = ("scorer=random", "stop_after=selection", "proxy=smollm2")
    assert compose_config(["data=hub", "data.id=owner/one", *options]).data.name == "owner_one"
    assert compose_config(["data=alpaca", *options]).data.name == "alpaca"
