"""The embedded world's validity law: a target's accuracy must reflect the quality of its training data.

Slow (about three minutes): three data seeds, five finetunes each, after one pretraining.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from gradsift.artifacts import Store
from gradsift.composition import conf_folder, register_schemas
from gradsift.config import load_config
from gradsift.data.load import labels_of
from gradsift.data.verifiable import SPOILT
from gradsift.evaluation.stages.metrics import metrics_of
from gradsift.line import Line
from gradsift.runtime import Display, Runtime


def accuracy(line: Line, rows: np.ndarray | None) -> float:
    """Return the share of right answers after a finetune on these rows, or without one if it is None."""
    measured = metrics_of(line.metrics(line.answers(None if rows is None else line.finetune(rows))))
    assert measured is not None
    return float(measured["pooled"]["accuracy"])


@pytest.mark.slow
def test_no_finetuning_below_all_rows_below_clean_rows(tmp_path: Path) -> None:
    """On seeds kept for this law: all rows help a little, a clean tenth helps more, all clean rows help most."""
    register_schemas()
    found = {}
    for seed in (10, 11, 12):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = load_config(compose("config", overrides=[f"data.seed={seed}"]))
        line = Line(config, Runtime(Store(tmp_path), config.compute, Display(), config.seed))
        labels = labels_of(line.loaded)
        assert labels is not None
        quality = np.array(labels.quality)
        rng = np.random.default_rng(seed)
        tenth = len(quality) // 10
        clean, spoilt = np.flatnonzero(quality == "clean"), np.flatnonzero(np.isin(quality, SPOILT))
        selections = {
            "all clean": clean,
            "random clean": rng.choice(clean, tenth, replace=False),
            "all": np.arange(len(quality)),
            "none": None,
            "spoilt": rng.choice(spoilt, tenth, replace=False),
        }
        found[seed] = {name: accuracy(line, rows) for name, rows in selections.items()}
        found[seed]["random"] = accuracy(line, rng.choice(len(quality), tenth, replace=False))
    print(found)
    for accuracies in found.values():
        assert accuracies["random clean"] > accuracies["random"] > accuracies.pop("spoilt"), found
        accuracies.pop("random")
        assert list(accuracies) == sorted(accuracies, key=lambda name: -accuracies[name]), found
        assert len(set(accuracies.values())) == 4, found
