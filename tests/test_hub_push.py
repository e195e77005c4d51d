"""Laws of `export.push_to_hub`, with the hub's own client and a local server in place of the hub.

The client reads the hub's address when it is imported, so a process of its own pushes, and reads what it pushed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli, made_once
from hub_stand_in import TOKEN, printed_by_client, serving

ROWS = [{"instruction": f"Name river {n}.", "output": f"River {n}.", "tag": {"n": n}} for n in range(20)]
PUSH = """
import json, os, sys
from gradsift import cli
from gradsift.errors import GradsiftError
from gradsift.hub_push import require_access

refused = {}
for name, token in {"no token": "", "wrong token": "hf_wrong"}.items():
    os.environ["HF_TOKEN"] = token
    try:
        require_access("owner/small")
    except GradsiftError as error:
        refused[name] = str(error)
os.environ["HF_TOKEN"] = sys.argv[1]
options = ["data=json", "data.path=rows.jsonl", "scorer=random", "alpha=0.2", "stop_after=selection", "tracker=none"]
for run, seed in (("first", 1), ("second", 2)):
    sys.argv = ["run.py", *options, "report=false", f"hydra.run.dir={run}", f"scorer.seed={seed}"]
    sys.argv += ["export.push_to_hub=owner/small"]
    cli.main()
from datasets import load_dataset
rows = load_dataset("owner/small", split="train").to_list()
print(json.dumps({"refused": refused, "rows": rows}))
"""


@pytest.fixture(scope="session")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the hub's repositories in `hub`, two runs and what the pushing process printed."""

    def make(folder: Path) -> None:
        (folder / "hub").mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        with serving(folder / "hub") as address:
            printed = printed_by_client(PUSH, address, folder, (), TOKEN)
        (folder / "printed").write_text(printed)

    return made_once(tmp_path_factory, "pushed", make)


def answers(pushed: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pushed / "printed").read_text().splitlines()[-1])
    return found


def test_the_selection_can_be_loaded_from_the_hub_in_one_line(pushed: Path) -> None:
    selection = [json.loads(line) for line in (pushed / "second" / "selection.jsonl").read_text().splitlines()]
    assert answers(pushed)["rows"] == selection
    own = [{name: value for name, value in row.items() if name != "gradsift"} for row in selection]
    assert own == [ROWS[row["gradsift"]["row_index"]] for row in selection] != []


def test_a_new_dataset_is_private_and_a_second_run_replaces_its_files(pushed: Path) -> None:
    repository = pushed / "hub" / "owner" / "small"
    asked = json.loads(repository.with_suffix(".made").read_text())
    assert asked.get("visibility") == "private" or asked.get("private") is True  # the client's versions differ
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "selection.jsonl"]
    first, second = ((pushed / run / "selection.jsonl").read_bytes() for run in ("first", "second"))
    assert first != second == (repository / "selection.jsonl").read_bytes()


def test_the_card_names_method_share_seed_figures_and_limits(pushed: Path) -> None:
    card = (pushed / "hub" / "owner" / "small" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "selection.jsonl"}]
    wanted = ("4 of 20 rows", "| scorer | random |", "| alpha | 0.2 of the accepted rows |", "| seed | 0 (data: 0) |")
    assert [words for words in wanted if words not in card] == []
    assert "none: the run ended before it" in card
    assert "Nothing here shows that training on these rows is better than training on random rows." in card
    assert str(pushed) not in card


def test_the_token_is_checked_before_the_work_and_written_nowhere(pushed: Path) -> None:
    refused = answers(pushed)["refused"]
    assert "needs a token with write access; put one into the environment variable HF_TOKEN" in refused["no token"]
    assert "the hub refuses the token in HF_TOKEN (status 401)" in refused["wrong token"]
    assert "nothing was started" in refused["wrong token"]
    files = [path for path in pushed.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_what_cannot_be_sent_is_refused_at_once(
    gradsift: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    cases = {
        ("export.push_to_hub=owner/small",): "put one into the environment variable HF_TOKEN",
        ("export.push_to_hub=small",): "export.push_to_hub='small' is no dataset of the hub; give OWNER/NAME",
        ("export.push_to_hub=a/b", "stop_after=scores"): "export writes the selection, but stop_after=scores",
        ("export=[trl,axolotl]", "stop_after=scores"): "export writes the selection, but stop_after=scores",
        ("export=[trl,foo]",): "export=foo does not exist; the choices are: axolotl, llama_factory, trl",
        ("export.merged=true", "stop_after=selection"): "take stop_after=finetune or a later stage",
        ("-m", "seed=1,2", "export.push_to_hub=a/b"): "export.push_to_hub=a/b is the dataset of another job too",
    }
    for options, words in cases.items():
        assert gradsift(*options, "tracker=none") == 2
        assert words in capsys.readouterr().err
    assert not (gradsift.store / "load").exists()
