"""Laws of the target set: complete, by task, separate from the data; bad rows and files are refused by name."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE

from gradsift.artifacts import Artifact, Store
from gradsift.config import (
    ComputeConfig,
    FieldsConfig,
    FilesTargetSetConfig,
    JsonDataConfig,
    TargetSetConfig,
    VerifiableDataConfig,
    VerifiableTargetSetConfig,
)
from gradsift.data.load import benchmark_rows, load, pool_of
from gradsift.data.target_set import OVERLAP_FILE, find_overlap, load_target_set, overlap, target_set_of
from gradsift.errors import ConfigError, DataError
from gradsift.runtime import Display, Runtime

ROWS = [{"instruction": f"say {i}", "output": f"{i}", "skill": "ab"[i % 2]} for i in range(6)]


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(Store(tmp_path / "store"), ComputeConfig(), Display(), seed=0)


def written(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def data(runtime: Runtime, folder: Path, rows: list[dict[str, str]]) -> Artifact:
    return load(runtime, JsonDataConfig(name="json", path=written(folder / "data.json", rows)))


def read(runtime: Runtime, config: TargetSetConfig, loaded: Any = None) -> dict[str, list[str]]:
    found = target_set_of(load_target_set(runtime, config, loaded))
    by_task: dict[str, list[str]] = {}
    for task, example in zip(found.tasks, found.examples, strict=True):
        by_task.setdefault(task, []).append(example.output)
    return by_task


def test_one_file_is_one_task_named_after_it(runtime: Runtime, tmp_path: Path) -> None:
    config = FilesTargetSetConfig(name="json", path=written(tmp_path / "sums.json", ROWS))
    assert read(runtime, config) == {"sums": ["0", "1", "2", "3", "4", "5"]}


def test_a_column_can_name_the_tasks_and_the_limit_is_of_each(runtime: Runtime, tmp_path: Path) -> None:
    path = written(tmp_path / "sums.json", ROWS)
    assert read(runtime, FilesTargetSetConfig(name="json", path=path, task="skill")) == {
        "a": ["0", "2", "4"],
        "b": ["1", "3", "5"],
    }
    limited = read(runtime, FilesTargetSetConfig(name="json", path=path, task="skill", limit=2))
    assert {task: len(rows) for task, rows in limited.items()} == {"a": 2, "b": 2}


def test_a_folder_holds_a_file_for_each_task_and_the_key_of_its_rows_is_named(runtime: Runtime, tmp_path: Path) -> None:
    for task in ("dates", "sums"):
        written(tmp_path / f"{task}.json", {"canary": "x", "examples": [{"input": f"which {task}?", "target": task}]})
    urls = {task: f"https://example.org/{task}.json" for task in ("dates", "sums")}
    fields = FieldsConfig(instruction="input", input="", output="target")
    config = FilesTargetSetConfig(
        name="bbh", path=str(tmp_path), urls=urls, rows="examples", format="alpaca", fields=fields
    )
    assert read(runtime, config) == {"dates": ["dates"], "sums": ["sums"]}
    (example, _) = target_set_of(load_target_set(runtime, config, None)).examples  # type: ignore[arg-type]
    assert (example.instruction, example.input) == ("which dates?", "")


def test_ids_of_all_target_rows_differ(runtime: Runtime, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "skill": skill} for skill in ("x", "y", "y")]
    config = FilesTargetSetConfig(name="json", path=written(tmp_path / "t.json", rows), task="skill")
    found = target_set_of(load_target_set(runtime, config, None))  # type: ignore[arg-type]
    assert len({example.example_id for example in found.examples}) == 3


def test_the_embedded_worlds_targets_are_right_and_asked_nowhere_else(runtime: Runtime) -> None:
    loaded = load(runtime, VerifiableDataConfig(name="verifiable", size=300, benchmark_items=60))
    config = VerifiableTargetSetConfig(name="verifiable", tasks=["add", "first"], limit=15)
    found = target_set_of(load_target_set(runtime, config, loaded))
    assert found.tasks == ["add"] * 15 + ["first"] * 15
    prompts = {(example.instruction, example.input) for example in found.examples}
    assert len(prompts) == 30
    assert not prompts & {(example.instruction, example.input) for example in pool_of(loaded)}
    assert not prompts & {(item["instruction"], item["input"]) for item in benchmark_rows(loaded)}
    from gradsift.data.verifiable import task_of

    for task, example in zip(found.tasks, found.examples, strict=True):
        assert task_of(example.instruction, example.input).question[0] == task
        assert example.output == task_of(example.instruction, example.input).answer


def test_rows_that_stand_in_the_data_too_are_listed(
    runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = data(runtime, tmp_path, [*ROWS, {"instruction": "other", "output": "x"}])
    targets = [ROWS[1], {"instruction": "say 2", "output": "another"}, {"instruction": "new", "output": "y"}]
    config = FilesTargetSetConfig(name="json", path=written(tmp_path / "t.json", targets))
    found = find_overlap(runtime, load_target_set(runtime, config, loaded), loaded)
    lines = [json.loads(line) for line in found.file(OVERLAP_FILE).read_text().splitlines()]
    assert [(line["target_row"], line["row"], line["shared"]) for line in lines] == [
        (0, 1, "prompt and response"),
        (1, 2, "prompt"),
    ]
    assert (
        "2 of 3 target rows have the same or a similar prompt as a row of the data (row 1, 2; all in"
        in capsys.readouterr().out
    )


LONG = "Find the number of apples that {} bought in three days"


def test_a_prompt_in_other_capitals_or_with_an_added_word_is_similar(runtime: Runtime, tmp_path: Path) -> None:
    prompts = [LONG.format("Anna"), LONG.format("Anna").upper() + "!", LONG.format("Bert"), "say it twice"]
    loaded = data(runtime, tmp_path, [{"instruction": prompt, "output": "x"} for prompt in prompts])
    target = [{"instruction": LONG.format("Anna"), "output": "y"}, {"instruction": "say it", "output": "z"}]
    config = FilesTargetSetConfig(name="json", path=written(tmp_path / "t.json", target))
    found = find_overlap(runtime, load_target_set(runtime, config, loaded), loaded)
    lines = [json.loads(line) for line in found.file(OVERLAP_FILE).read_text().splitlines()]
    assert [(line["target_row"], line["row"], line["shared"]) for line in lines] == [
        (0, 0, "prompt"),
        (0, 1, "similar prompt"),  # 9 of 10 triples; another name changes three of them
    ]
    assert found.info["overlapping"] == 1


@pytest.mark.parametrize("alike", [0.4, 0.8])
def test_overlap_is_that_of_every_pair_compared(alike: float) -> None:
    from gradsift.data.dedup import jaccard, shingles_of
    from gradsift.data.examples import make_example

    rng = random.Random(0)
    texts = [" ".join(rng.choices(["one", "Two"], k=rng.randint(1, 7))) for _ in range(120)]
    examples = [make_example(n, (), text, "", "x", {}, Counter()) for n, text in enumerate(texts)]
    targets, pool = examples[:30], examples[30:]
    pairs = [
        (place, example.row_index)
        for place, target in enumerate(targets)
        for example in pool
        if jaccard(*(shingles_of([one.instruction.lower()]) for one in (target, example))) >= alike
    ]
    assert [(place, example.row_index) for place, example, _ in overlap(targets, pool, alike)] == pairs
    assert len(pairs) > 30


def test_target_rows_that_the_benchmark_asks_are_warned_of(
    gradsift: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gradsift(*SMOKE, "scorer=random", "stop_after=load") == 0
    (file,) = gradsift.store.glob("load/*/benchmark.json")
    items = json.loads(file.read_text())[:2]
    rows = [{"instruction": item["instruction"], "input": item["input"], "output": "x"} for item in items]
    path = written(tmp_path / "t.json", [*rows, {"instruction": "say copy", "output": "x"}])
    towards = ("scorer=sbert", "target_set=json", f"target_set.path={path}", "plan=true")
    assert gradsift(*SMOKE, *towards) == 0
    assert "2 of 3 target rows are questions of the benchmark too" in capsys.readouterr().out
    assert gradsift(*SMOKE, *towards, "stop_after=selection") == 0  # which asks no question
    assert "questions of the benchmark" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ mistakes


def test_no_target_set_says_how_to_give_one(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"target_set=json target_set.path=FILE"):
        read(runtime, TargetSetConfig(name="none"))


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "holds no row"),
        ([{"q": "a", "a": "b"}], {}, r"target_set.format=auto .* target_set.fields.output=NAME"),
        ([*ROWS, {"instruction": "a", "output": ""}], {}, r"t.json, row 6: .*correct or delete the row"),
        (
            ROWS,
            {"task": "kind"},
            r"row 0: column 'kind' holds None instead of the name of a task; check target_set.task",
        ),
    ],
)
def test_a_file_that_cannot_serve_is_refused(
    rows: Any, options: dict[str, Any], words: str, runtime: Runtime, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        read(runtime, FilesTargetSetConfig(name="json", path=written(tmp_path / "t.json", rows), **options))


def test_a_missing_file_is_named_with_its_option(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"target_set.path=.*nowhere.json does not exist"):
        read(runtime, FilesTargetSetConfig(name="json", path=str(tmp_path / "nowhere.json")))
    with pytest.raises(ConfigError, match=r"is a folder; name one file in it"):
        read(runtime, FilesTargetSetConfig(name="json", path=str(tmp_path)))
    urls = {task: f"https://example.org/{task}/test.json" for task in "ab"}
    with pytest.raises(ConfigError, match=r"two of target_set.urls end in the same file name"):
        read(runtime, FilesTargetSetConfig(name="json", path=str(tmp_path), urls=urls))
    with pytest.raises(ConfigError, match=r"target_set.path is empty"):
        FilesTargetSetConfig(name="json")


def test_an_unknown_family_is_refused(runtime: Runtime) -> None:
    loaded = load(runtime, VerifiableDataConfig(name="verifiable", size=100, benchmark_items=20))
    with pytest.raises(ConfigError, match="family='sing' is not in this world"):
        read(runtime, VerifiableTargetSetConfig(name="verifiable", tasks=["sing"]), loaded)


def test_the_command_line_refuses_the_embedded_targets_for_other_data(
    gradsift: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "d.json", ROWS)
    options = ("data=json", f"data.path={path}", "proxy=smollm2", "target_set=verifiable", "stop_after=scores")
    assert gradsift(*options, "tracker=none") == 2
    assert "target_set=verifiable (choose target_set=json" in capsys.readouterr().err


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA names no folder with public data")
def test_the_shipped_sets_fit_the_published_files(runtime: Runtime) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from gradsift.composition import conf_folder, register_schemas
    from gradsift.config import load_config

    benchmarks = Path(os.environ["GRADSIFT_DATA"]) / "benchmarks"
    register_schemas()
    counts = {}
    for name, path in (("gsm8k", benchmarks / "gsm8k" / "train.jsonl"), ("bbh", benchmarks / "bbh")):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            composed = compose("config", [f"target_set={name}", f"target_set.path={path}"])
        counts[name] = {task: len(rows) for task, rows in read(runtime, load_config(composed).target_set).items()}
    assert counts["gsm8k"] == {"gsm8k": 200}
    assert list(counts["bbh"].values()) == [20] * 6
