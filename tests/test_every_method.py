"""Every method, and every scorer with every selector that fits, in the smallest embedded world.

Slow (three minutes where nothing else runs): 151 selections, and every score a second time in other batches.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMOKE
from scipy.stats import spearmanr
from transformers import GPT2Model, LlamaModel

from gradsift.composition import conf_folder
from gradsift.config import SCORES_BY_TASK
from gradsift.scoring.scores import SCORED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TOWARDS = ("target_set=verifiable", "target_set.limit=2", "features.dimensions=32", "features.warmup.epochs=2")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def require_whole(run: dict[str, Any], folder: Path) -> None:
    """The budget's worth of different rows with a score, or a shortfall that says its reason."""
    assert run["status"] == "stopped"
    made, (scored,) = run["selection"], {s["artifact"] for s in run["stages"] if s["name"] == "score"}
    table = pq.read_table(Path(scored) / "scores.parquet", columns=["example_id", "status"]).to_pydict()
    status = dict(zip(table["example_id"], table["status"], strict=True))
    lines = [json.loads(line)["gradsift"] for line in (folder / "selection.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(1, made["rows"] + 1))
    assert len({line["example_id"] for line in lines}) == len(lines)
    assert {status[line["example_id"]] for line in lines} == {SCORED}
    assert made["rows"] + made["shortfall"] == made["budget"]
    if made["shortfall"]:
        said = run["diagnostics"]["shortfall"]
        assert said["verdict"] == "warning"
        assert said["values"]["missing"] == made["shortfall"]


def require_all_whole(gradsift: Any) -> list[dict[str, Any]]:
    folders = sorted(file.parent for file in gradsift.folder.glob("multirun/*/*/*/run.json"))
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    for run, folder in zip(runs, folders, strict=True):
        require_whole(run, folder)
    return runs


def test_every_method_selects(gradsift) -> None:
    """A method brings the target set that it needs."""
    methods = choices("method")
    smallest = (*SMOKE, *TOWARDS[1:], "stop_after=selection")
    assert gradsift("-m", *smallest, f"method={','.join(methods)}") == 0
    runs = require_all_whole(gradsift)
    assert len(runs) == len(methods)
    (everything,) = [run["selection"]["rows"] for run in runs if run["scorer"] == "full"]
    assert everything == 120


def test_every_scorer_goes_with_every_selector_that_fits(gradsift) -> None:
    """Taking turns needs a score a task."""
    scorers = choices("scorer")
    selectors = [name for name in choices("selector") if name != "round_robin"]
    smallest = ("-m", *SMOKE, *TOWARDS, "stop_after=selection")
    assert gradsift(*smallest, f"scorer={','.join(scorers)}", f"selector={','.join(selectors)}") == 0
    assert gradsift(*smallest, f"scorer={','.join(SCORES_BY_TASK)}", "selector=round_robin") == 0
    runs = require_all_whole(gradsift)
    assert len(runs) == len(scorers) * len(selectors) + len(SCORES_BY_TASK)


def test_batches_and_padding_change_no_scorers_ranking(gradsift, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is trained, passed and embedded: with 64 tokens at once in place of thousands.

    GrADS scales its factors by rank, and rounding decides between rows that nearly tie, on each processor in its own
    way. Scaled by `minmax`, they are continuous in what the batches may change.
    """
    scorers = choices("scorer")
    smallest = (*SMOKE, *TOWARDS, "stop_after=scores")
    others = f"scorer={','.join(name for name in scorers if name != 'grads')}"
    assert gradsift("-m", *smallest, others) == gradsift(*smallest, "scorer=grads", "scorer.scale=minmax") == 0
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(gradsift.folder / "other"))
    shutil.copytree(gradsift.store / "backbone", gradsift.folder / "other/backbone")  # whose batches are their own
    monkeypatch.setattr("gradsift.scoring.superfilter._BATCH_TOKENS", {"cpu": 64})  # these are theirs alone
    smallest += ("compute.tokens=64",)
    shapes = noted_shapes(monkeypatch)
    assert gradsift("-m", *smallest, others) == gradsift(*smallest, "scorer=grads", "scorer.scale=minmax") == 0
    assert gradsift(*SMOKE, "compute.tokens=64", "scorer=random", "benchmark.general=[verifiable_terse]") == 0
    assert {name for name, _ in shapes} == {"GPT2Model", "LlamaModel"}
    assert not [shape for _, shape in shapes if shape[0] > 1 and shape.numel() > 64]  # one long row passes alone
    for scorer in scorers:
        one, other = (_scores(gradsift.folder / store, scorer) for store in ("store", "other"))
        assert one["status"].to_pylist() == other["status"].to_pylist()
        found, again = (table["score"].to_numpy() for table in (one, other))
        known = np.array(one["status"].to_pylist()) == SCORED
        spread = float(np.ptp(found[known]))
        np.testing.assert_allclose(again[known], found[known], rtol=1e-2, atol=1e-4 * spread, err_msg=scorer)
        if spread:
            assert spearmanr(found[known], again[known]).statistic > 0.9999, scorer


def noted_shapes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, torch.Size]]:
    """Return the model and the shape of its token ids in every pass from here on."""
    shapes: set[tuple[str, torch.Size]] = set()
    for kind in (GPT2Model, LlamaModel):

        def forward(self: Any, input_ids: Any = None, *given: Any, _plain: Any = kind.forward, **options: Any) -> Any:
            shapes.add((type(self).__name__, input_ids.shape))
            return _plain(self, input_ids, *given, **options)

        monkeypatch.setattr(kind, "forward", forward)
    return shapes


def _scores(store: Path, scorer: str) -> Any:
    (path,) = store.glob(f"score/{scorer}-*/scores.parquet")
    return pq.read_table(path)
