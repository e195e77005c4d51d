"""The embedded world's validity law: a target's accuracy must reflect the quality of its training data.

Slow (about two minutes): three data seeds, four finetunes each, after one pretraining.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from gradsift.artifacts import Store
from gradsift.config import load_config, register_schemas
from gradsift.data.load import labels_of
from gradsift.data.verifiable import SPOILT
from gradsift.evaluation.stages.metrics import metrics_of
from gradsift.line import Line
from gradsift.runtime import Display, Runtime
from gradsift.user_conf import conf_folder


def accuracy(line: Line, rows: np.ndarray) -> float:
    """Return the share of right answers after a finetune on these rows."""
    measured = metrics_of(line.metrics(line.answers(line.finetune(rows))))
    assert measured is not None
    return float(measured["pooled"]["accuracy"])


@pytest.mark.slow
def test_all_clean_beats_random_clean_beats_random_beats_spoilt(tmp_path: Path) -> None:
    register_schemas()
    found = {}
    for seed in (0, 1, 2):
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
            "random": rng.choice(len(quality), tenth, replace=False),
            "spoilt": rng.choice(spoilt, tenth, replace=False),
        }
        found[seed] = {name: accuracy(line, rows) for name, rows in selections.items()}
    print(found)
    for accuracies in found.values():
        assert list(accuracies) == sorted(accuracies, key=lambda name: -accuracies[name]), found
        assert len(set(accuracies.values())) == 4, found
