"""Laws of the Python API: it does what the command line does, in the same store, and leaves the caller as it was."""

from __future__ import annotations

import copy
import doctest
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import gradsift as api
from gradsift.sources import code_hash

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Add 1 to {n}.", "output": "" if n == 7 else str(n + 1), "source": {"page": n}} for n in range(24)
]
SMALL: dict[str, Any] = {"proxy": "tiny_bytes", "compute__threads": 1, "progress": False}
FACTOR = 2.0


def by_length(examples: Any, *, sign: float = 1.0) -> api.Scores:
    """Score each example by the length of its answer; a scorer as a user would write it."""
    return api.Scores(np.array([FACTOR * sign * len(example.output) for example in examples]))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(tmp_path / "store"))
    return tmp_path / "store"


def made(selection: api.Selection) -> list[str]:
    return [stage["name"] for stage in selection.stages if not stage["reused"]]


def test_importing_gradsift_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'hydra', 'datasets', 'transformers'} & set(sys.modules)"
    code = f"import sys, gradsift; assert not {heavy}, {heavy}; gradsift.select; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_is_there() -> None:
    assert set(api.__all__) <= set(dir(api))
    assert all(getattr(api, name) is not None for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'selekt'"):
        _ = api.selekt


def test_rows_from_anywhere_make_one_selection_and_the_command_line_makes_the_same(gradsift, capfd) -> None:
    first = api.select(ROWS, alpha=0.2, proxy__members=2, **{**SMALL, "progress": True})
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "  statistics M2-s1-t2-" in captured.err
    assert {"load", "statistics", "score", "select"} <= set(made(first))
    file = gradsift.folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for rows in (ROWS, datasets.Dataset.from_list(ROWS), file):
        again = api.select(rows, alpha=0.2, proxy__members=2, **SMALL)
        assert made(again) == []  # nothing is trained or computed twice
        assert again.kept.to_list() == first.kept.to_list()
    assert capfd.readouterr() == ("", "")

    options = ("proxy=tiny_bytes", "proxy.members=2", "compute.threads=1", "alpha=0.2", "tracker=none", "report=false")
    assert gradsift("data=json", f"data.path={file}", *options, "stop_after=selection") == 0
    (run,) = gradsift.runs()
    assert all(stage["reused"] for stage in run["stages"])
    (file,) = gradsift.folder.glob("outputs/*/*/selection.jsonl")
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.pop("gradsift")["row_index"] for row in written] == first.indices.tolist()
    assert written == first.kept.to_list()


def test_a_selection_tells_of_every_row(store: Path) -> None:
    selection = api.select(datasets.Dataset.from_list(ROWS), by_length, 0.25, **SMALL)
    assert repr(selection) == "Selection(5 of 23 rows, 1 rejected, 0 warnings)"
    assert selection.kept.to_list() == [ROWS[index] for index in selection.indices]
    assert selection.rejected["row_index"] == [7]
    assert json.loads(selection.rejected[0]["content"]) == ROWS[7]
    scores = selection.scores
    assert scores["row_index"] == [n for n in range(24) if n != 7]
    chosen = [row["row_index"] for row in scores if row["selected"]]
    assert chosen == sorted(selection.indices)
    assert scores["score"] == [FACTOR * len(ROWS[n]["output"]) for n in scores["row_index"]]
    assert set(scores["status"]) == {"scored"}
    assert "selection_response_tokens" not in selection.diagnostics  # the ensemble was not asked for
    assert selection.warnings == []


def test_a_function_is_scored_again_when_it_may_compute_something_else(store: Path, monkeypatch) -> None:
    assert made(api.select(ROWS, by_length, **SMALL)) == ["load", "score", "select"]
    assert made(api.select(ROWS, by_length, **SMALL)) == []
    assert "score" in made(api.select(ROWS, by_length, scorer__sign=-1.0, **SMALL))
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert "score" in made(api.select(ROWS, by_length, **SMALL))


def test_the_hash_of_a_function_follows_what_it_reads() -> None:
    def scaled(factor: Any) -> Any:
        def scorer(examples: Any) -> list[Any]:
            return [factor * float(example) for example in examples if example in {"a", "b", "c"}]

        return scorer

    assert code_hash(scaled(1)) == code_hash(scaled(1)) != code_hash(scaled(2))
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("def inner(x):\n    return x + 1\ndef outer(examples):\n    return inner(examples)\n", names)  # noqa: S102
    before = code_hash(names["outer"])
    exec("def inner(x):\n    return x + 2\n", names)  # noqa: S102
    assert code_hash(names["outer"]) != before
    with pytest.raises(api.ConfigError, match="reads 'factor' of the enclosing function, a object, whose content"):
        code_hash(scaled(object()))
    with pytest.raises(api.ConfigError, match="reads the global name 'Own', a type"):
        exec("class Own: pass\ndef outer(examples):\n    return Own()\n", names)  # noqa: S102
        code_hash(names["outer"])
    for harmless in (np, np.sqrt, np.mean, math.log, len, np.ndarray, torch.tensor, torch.nn.functional.relu, Path):
        code_hash(scaled(harmless))
    with pytest.raises(api.ConfigError, match="whose content cannot be hashed"):
        code_hash(scaled(np.random.default_rng(0).normal))


def test_the_hash_of_a_function_is_that_of_every_process() -> None:
    code = (
        "from gradsift.sources import code_hash\n"
        "def f(examples, *, words=frozenset({'x', 'y', 'z'})):\n    return [e in {'a', 'b', 'c'} for e in examples]\n"
        "print(code_hash(f))"
    )
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    shown = {
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout
        for env in environments
    }
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradfilter"}, "did you mean gradfiltering?"),
        ({"method": None}, "method=None is neither a recipe"),
        ({"method": lambda examples: None}, "no function with a name"),
        ({"method": by_length, "scorer__sgn": 1}, "scorer.sgn is no constant of scorer=by_length; it has sign"),
        ({"alpha": 1.5}, "alpha=1.5 is out of range"),
        ({"proxy__membrs": 3}, "did you mean proxy.members?"),
        ({"proxy": "/a/folder"}, "proxy=/a/folder does not exist; the choices are: gemma3_1b"),
        ({"judge": "local", "judge__model": "gpt2"}, "judge.model is a group of options and takes no value; give one"),
        ({"proxy": "gpt3"}, "proxy=gpt3 does not exist; did you mean gpt2?"),
        ({"method": by_length, "scorer__name": "x"}, "scorer.name is no constant of scorer=by_length; it has sign"),
        ({"scorer__eps": object()}, "scorer__eps=<object"),
        ({"stop_after": "load"}, "stop_after is no option of select"),
        ({"hydra__run__dir": "x"}, "hydra__run__dir is no option of select"),
        ({"rows": []}, "rows is empty"),
        ({"rows": ["a"]}, "row 0 is a str"),
        ({"rows": [{"instruction": "a", "output": "b", "extra": object()}]}, "row 0: column 'extra' holds a object"),
        ({"rows": datasets.DatasetDict()}, "one split of a DatasetDict"),
        ({"rows": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_error(options: dict[str, Any], message: str, store: Path) -> None:
    with pytest.raises(api.GradsiftError) as raised:
        api.select(**{"rows": ROWS, **SMALL, **options})
    assert message in str(raised.value)
    assert raised.value.__cause__ is None or raised.value.__suppress_context__ or "hydra" not in repr(raised.value)


def test_a_program_with_its_own_hydra_and_threads_keeps_them(store: Path) -> None:
    (store.parent / "theirs").mkdir()
    (store.parent / "theirs" / "config.yaml").write_text("value: 1\n")
    torch.set_num_threads(2)
    with initialize_config_dir(str(store.parent / "theirs"), version_base="1.3"):
        outer, repo = GlobalHydra.instance().hydra, copy.deepcopy(ConfigStore.instance().repo)
        api.select(ROWS, "random", **SMALL)
        assert GlobalHydra.instance().hydra is outer
        assert ConfigStore.instance().repo.keys() == repo.keys()
        assert compose("config", overrides=["value=2"]).value == 2
    assert torch.get_num_threads() == 2


def test_texts_reach_the_config_as_they_are() -> None:
    from gradsift.api import _config

    texts = {
        "instruction": "plain",
        "input": "a b",
        "output": "it's",
        "messages": "true",
        "conversations": "10",
        "prompt": "a\\b\\",
        "completion": "x=1,y",
        "system": "[a]",
    }
    fields_given = {f"data__fields__{name}": text for name, text in texts.items()}
    config = _config(Path("x"), [], {"proxy": "tiny_bytes", **fields_given})
    fields = config.data.fields  # type: ignore[attr-defined]
    assert {name: getattr(fields, name) for name in texts} == texts
    shares: Any = {"a:1,b": 2.0, " x": 1.0, "C++": 3.0, "(y) [z]": 4.0, "{k=v}\\": 5.0}
    config = _config(Path("x"), ["selector=quotas"], {"proxy": "tiny_bytes", "selector__shares": shares})
    assert config.selector.shares == shares  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------- formula


def test_gsnr_is_equation_5_example_by_example() -> None:
    rng = np.random.default_rng(0)
    early, late, eps = rng.random((4, 7)), rng.random((4, 7)), 0.01
    expected = []
    for i in range(7):
        mean_s, mean_t = sum(early[:, i]) / 4, sum(late[:, i]) / 4
        variance = sum((norm - mean_t) ** 2 for norm in late[:, i]) / 4
        expected.append((mean_s - mean_t) / (mean_s + eps) * 1 / (variance + eps))
    np.testing.assert_allclose(api.gsnr(early, late, eps), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("early", "late", "eps", "message"),
    [
        ([[1.0]], [[1.0]], 1e-8, r"early has the shape \(1, 1\); .* M >= 2 members"),
        ([[1.0], [1.0]], [[1.0, 2.0], [1.0, 2.0]], 1e-8, r"late has the shape \(2, 2\)"),
        ([[1.0], [np.nan]], [[1.0], [1.0]], 1e-8, r"early\[1, 0\] is nan; a norm is finite"),
        ([[1.0], [1.0]], [[1.0], [-1.0]], 1e-8, r"late\[1, 0\] is -1.0"),
        ([[1.0], [1.0]], [[1.0], [1.0]], 0.0, "eps=0.0 is out of range"),
    ],
)
def test_gsnr_refuses_what_is_no_norm(early: Any, late: Any, eps: float, message: str) -> None:
    with pytest.raises(api.GradsiftError, match=message):
        api.gsnr(early, late, eps)


def test_the_examples_in_the_docstrings_run(store: Path) -> None:
    import gradsift.api

    assert doctest.testmod(gradsift.api, optionflags=doctest.ELLIPSIS).failed == 0
