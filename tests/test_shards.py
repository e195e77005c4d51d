"""Laws of sharded collection: the shards together have each row once, and errors name what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMOKE
from exactness import assert_close_by_norm
from test_ensembles import config, copied, ensemble, five, flat, made, trained  # noqa: F401
from test_finetuning import proxy_config
from test_norms import assert_norms_close, loop_norms, ragged_examples, tiny_model

from gradsift.artifacts import Artifact
from gradsift.data.batching import shard_of
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.callback import COLUMNS
from gradsift.gradients.statistics import NORMS_FILE, compute_statistics, read_norms
from gradsift.training import lora

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("shards", [1, 2, 3, 10, 13])
def test_shards_part_the_rows_by_like_work_and_keep_their_order(shards: int) -> None:
    encoded = ragged_examples(10)
    parts = [shard_of(encoded, shard, shards) for shard in range(shards)]
    assert sorted(example.row for part in parts for example in part) == list(range(10))
    for shard, part in enumerate(parts):
        assert [example.row for example in part] == sorted(example.row for example in part)
        assert len(part) == len(range(shard, 10, shards))
    tokens = [sum(len(example.input_ids) for example in part) for part in parts]
    longest = max(len(example.input_ids) for example in encoded)
    assert max(tokens) - min(tokens) <= longest
    assert shards > 1 or parts[0] == encoded


@pytest.mark.parametrize("mode", ["lora_seeds", "bootstrap"])
def test_statistics_of_shards_are_those_of_the_whole(mode: str, five: Any, tmp_path: Path) -> None:  # noqa: F811
    store = copied(five(mode)[1], tmp_path)
    whole, _ = ensemble(store, config(mode, members=2))
    parts, again = ensemble(store, config(mode, members=2, shards=3))
    assert made(again) == {"norms": 12}  # the members are there
    adapted, late = lora.add_adapter(tiny_model("gpt2"), config(mode).lora, seed=0).eval(), []
    for member, chain in enumerate(trained(store, config(mode, members=2))[0]):
        for epoch in (1, 2):
            lora.load_adapter(adapted, chain[epoch - 1].path)
            exact = loop_norms(adapted, ragged_examples(10))
            one, three = read_norms(whole[epoch][member]), read_norms(parts[epoch][member])
            assert one["row"].tolist() == three["row"].tolist() == list(range(10))
            assert list(one) == list(three) == ["row", *COLUMNS, "n_tokens"]
            expected = [example.is_response.sum() for example in ragged_examples(10)]
            assert one["n_tokens"].tolist() == three["n_tokens"].tolist() == expected
            assert list(read_norms(parts[epoch][member], ("loss",))) == ["row", "loss"]
            for table in (one, three):
                assert_norms_close(np.stack([table[name] for name in COLUMNS], 1), exact)
        late.append(np.hypot(exact[:, 0], exact[:, 1]))
    for norms in (parts, whole):
        computed = compute_statistics(norms[1], norms[2], "all", 11).G_t
        assert_close_by_norm(computed[:10], np.mean(late, 0), k=2048, dim=(), dtype=torch.float32)
        assert np.isnan(computed[10])


def test_more_shards_than_rows_leave_some_empty_and_nothing_lost(tmp_path: Path) -> None:
    norms, _ = ensemble(tmp_path, config("lora_seeds", members=1, shards=4, warmup_steps=0), ragged_examples(3))
    assert [shard.info["rows"] for shard in norms[1][0]] == [1, 1, 1, 0]
    assert read_norms(norms[1][0])["row"].tolist() == [0, 1, 2]


@pytest.fixture
def shards(five: Any, tmp_path: Path) -> list[Artifact]:  # noqa: F811
    store = copied(five("lora_seeds")[1], tmp_path)
    return flat(ensemble(store, config("lora_seeds", members=1, shards=3))[0])[:3]


def altered(shard: Artifact, folder: Path, rows: Any) -> Artifact:
    """Return the shard with its table changed by `rows`."""
    folder.mkdir()
    pq.write_table(rows(pq.read_table(shard.file(NORMS_FILE))), folder / NORMS_FILE)
    return replace(shard, path=folder)


def test_missing_shards_missing_rows_and_rows_that_are_there_twice_are_refused(
    shards: list[Artifact], tmp_path: Path
) -> None:
    with pytest.raises(GradsiftError, match=r"m0-e1-s0of3-\S+ \(4 of 4 rows\), m0-e1-s2of3-.* have 7 rows.* 10 rows"):
        read_norms([shards[0], shards[2]])
    short = altered(shards[1], tmp_path / "short", lambda table: table.slice(1))
    with pytest.raises(GradsiftError, match=r"short \(2 of 3 rows\).* have 9 rows"):
        read_norms([shards[0], short, shards[2]])
    row = int(read_norms(shards)["row"][-1])

    def repeated(table: pa.Table) -> pa.Table:
        return table.set_column(0, "row", pa.array([row] * len(table)))

    with pytest.raises(GradsiftError, match=rf"have 10 rows.* twice: \[{row}\]"):
        read_norms([shards[0], altered(shards[1], tmp_path / "twice", repeated), shards[2]])
    with pytest.raises(GradsiftError, match=r"have 14 rows.* twice: \[\d+, \d+, \d+, \d+\]"):
        read_norms([*shards, shards[0]])


def test_shards_of_different_tables_do_not_merge(shards: list[Artifact], five: Any) -> None:  # noqa: F811
    (whole,) = flat(five("lora_seeds")[0])[:1]
    with pytest.raises(GradsiftError, match=r"have 20 rows, but must have each of the 10 rows once"):
        read_norms([*shards, whole])


def test_jobs_of_one_shard_each_leave_a_whole_that_the_next_run_merges(after_smoke, capsys) -> None:
    smoke = (*SMOKE, "proxy.shards=2")
    assert after_smoke(*smoke, "proxy.shard=1", "stop_after=statistics") == 0
    first = after_smoke.runs()[-1]
    assert (first["status"], first["shards"]) == ("stopped", {"collected": 1, "of": 2, "missing": [0]})
    assert [stage["name"] for stage in first["stages"]].count("member") == 4
    assert [stage["name"] for stage in first["stages"]].count("norms") == 4
    assert "still missing: 0;" in capsys.readouterr().out

    assert after_smoke(*smoke, "scorer=gsnr", "stop_after=scores") == 0  # makes the missing shard itself
    run = after_smoke.runs()[-1]
    made_now = [stage["name"] for stage in run["stages"] if not stage["reused"]]
    assert made_now == ["norms"] * 4 + ["statistics", "score"]

    assert after_smoke(*smoke, "proxy.shard=0", "stop_after=statistics") == 0
    assert after_smoke.runs()[-1]["shards"]["missing"] == []
    assert "none is missing" in capsys.readouterr().out

    assert after_smoke(*SMOKE, "stop_after=scores") == 0  # in one piece
    scores = [pq.read_table(path) for path in sorted(after_smoke.store.glob("score/gsnr-*/scores.parquet"))]
    assert len(scores) == 2
    one, two = ({name: scores[i][name].to_numpy() for name in ("G_s", "G_t", "V_t")} for i in range(2))
    bound = 2 * 2048 * np.finfo(np.float32).eps  # each is within half of it of the exact norms: see above
    for name in ("G_s", "G_t"):
        assert (np.abs(one[name] - two[name]) <= bound * one[name]).all()
    assert (np.abs(np.sqrt(one["V_t"]) - np.sqrt(two["V_t"])) <= bound * one["G_t"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 0}, "proxy.shards=0"),
        ({"shards": 2, "shard": 2}, "proxy.shard=2 is none of proxy.shards=2"),
        ({"shard": -1}, "proxy.shard=-1 is none"),
        ({"shards": 2, "collect": "during_training"}, "take proxy.collect=epoch_end"),
    ],
)
def test_shards_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        proxy_config(**changes)


def test_a_shard_ends_the_run_and_says_so(gradsift, capsys) -> None:
    assert gradsift(*SMOKE, "proxy.shards=2", "proxy.shard=0") == 2
    assert "add stop_after=statistics" in capsys.readouterr().err
