"""Laws of the whole line, on the smallest embedded world (a toy: two members, four steps)."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMOKE

from gradsift.training.finetuning import ShowProgress
from gradsift.training.modules import TargetFinetuning

REPOSITORY = Path(__file__).parents[1]
SMALLER = (*SMOKE, "data.size=60", "data.benchmark_items=13")


def trained(run: dict[str, Any]) -> int:
    return sum(stage["optimizer_steps"] for stage in run["stages"])


def names(run: dict[str, Any], reused: bool) -> list[str]:
    return [stage["name"] for stage in run["stages"] if stage["reused"] is reused]


def test_a_run_ends_with_a_pws_and_a_second_run_computes_nothing(gradsift, capsys) -> None:
    assert gradsift(*SMOKE) == 0
    out = capsys.readouterr().out
    assert "] against the model tuned on all rows, win/tie/lose" in out
    (first,) = gradsift.runs()
    assert first["status"] == "finished"
    assert 0 <= first["pws"] <= 2
    assert first["pooled"]["win"] + first["pooled"]["tie"] + first["pooled"]["lose"] == 26
    counts = {"optimizer_steps", "forward_tokens", "saved_steps", "saved_tokens"}
    assert set(first["stages"][0]) == {"name", "artifact", "fingerprint", "reused", "seconds"} | counts
    assert names(first, reused=False).count("member") == 4  # two members, two epochs
    assert trained(first) == 4 * 4 + 2 * 4  # 120 rows in batches of 32; four steps a target
    (selection,) = gradsift.folder.glob("outputs/*/*/selection.jsonl")
    rows = [json.loads(line) for line in selection.read_text().splitlines()]
    assert len(rows) == first["selection"]["budget"] == 12
    assert [row["gradsift"]["rank"] for row in rows] == list(range(1, 13))
    assert sum(first["selection"]["labels"].values()) == pytest.approx(1)

    assert gradsift(*SMOKE) == 0
    second = gradsift.runs()[-1]
    assert trained(second) == 0
    assert names(second, reused=False) == []
    assert second["pws"] == first["pws"]


def test_a_sweep_trains_one_ensemble_and_one_reference(gradsift, capsys) -> None:
    assert gradsift("-m", *SMALLER, "target.steps=2", "alpha=0.05,0.1", "scorer=gsnr,random") == 0
    runs = gradsift.runs()
    assert len(runs) == 4
    done = [stage for run in runs for stage in run["stages"] if not stage["reused"]]
    assert [stage["name"] for stage in done].count("member") == 4
    tuned = {stage["artifact"] for run in runs for stage in run["stages"] if stage["name"] == "finetune"}
    assert len([path for path in tuned if "-60rows-" in path]) == 1
    assert len({stage["fingerprint"] for stage in done}) == len(done)  # nothing was made twice
    assert {run["selection"]["rows"] for run in runs} == {3, 6}
    assert "results.csv" in capsys.readouterr().out


def test_members_epochs_and_norms_are_shared_between_ensembles_and_snapshots(gradsift) -> None:
    def made(*options: str) -> list[str]:
        assert gradsift(*SMALLER, "stop_after=scores", *options) == 0
        return names(gradsift.runs()[-1], reused=False)

    first = made("proxy.members=2", "proxy.snapshots=[1,3]")
    assert (first.count("member"), first.count("norms")) == (6, 4)  # no snapshot needs the norms of epoch 2
    third = made("proxy.members=3", "proxy.snapshots=[1,3]")
    assert (third.count("member"), third.count("norms")) == (3, 2)  # the third member alone
    assert made("proxy.members=3", "proxy.snapshots=[2,3]") == ["norms"] * 3 + ["statistics", "score"]
    assert made("proxy.members=2", "proxy.snapshots=[1,2]") == ["statistics", "score"]
    late = made("proxy.members=2", "proxy.snapshots=[3,4]", "scorer=late_loss")
    assert (late.count("member"), late.count("norms")) == (2, 2)  # the fourth epoch alone


LAST_STAGES = {
    "load": "load",
    "statistics": "statistics",
    "scores": "score",
    "selection": "select",
    "finetune": "heldout",
    "generate": "metrics",
}


def test_stop_after_ends_the_line(after_smoke) -> None:
    for stage, last in LAST_STAGES.items():
        assert after_smoke(*SMOKE, f"stop_after={stage}") == 0
        run = after_smoke.runs()[-1]
        assert run["status"] == "stopped"
        assert run["stages"][-1]["name"] == last
        assert run["pws"] is None


def test_nothing_is_computed_that_the_scorer_does_not_ask_for(gradsift) -> None:
    assert gradsift(*SMOKE, "scorer=random", "stop_after=selection") == 0
    assert {stage["name"] for stage in gradsift.runs()[-1]["stages"]} == {"load", "score", "select"}
    assert gradsift(*SMOKE, "scorer=superfilter", "stop_after=selection") == 0
    assert {stage["name"] for stage in gradsift.runs()[-1]["stages"]} == {"load", "backbone", "score", "select"}


def test_full_is_the_reference_and_needs_no_judge(after_smoke, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert after_smoke(*SMOKE, "scorer=full", "alpha=0.05", "judge=openai", "stop_after=judge") == 0
    (run,) = after_smoke.runs()
    assert run["pws"] == 1.0
    assert run["selection"]["rows"] == 120  # alpha is ignored
    assert "judge" not in {stage["name"] for stage in run["stages"]}


def test_an_empty_budget_is_no_error_in_a_run_that_ends_before_the_selection(gradsift) -> None:
    assert gradsift(*SMOKE, "scorer=random", "alpha=0.0001", "stop_after=scores") == 0


def test_a_run_in_a_used_folder_deletes_the_files_of_the_run_before(gradsift) -> None:
    folder = f"hydra.run.dir={gradsift.folder / 'outputs' / 'a' / 'b'}"
    assert gradsift(*SMOKE, folder, "scorer=random", "stop_after=selection") == 0
    assert gradsift(*SMOKE, folder, "scorer=random", "alpha=0") == 2
    (run,) = gradsift.runs()
    assert run["status"] == "failed"
    assert not list(gradsift.folder.glob("outputs/a/b/selection.jsonl"))


def test_no_scorer_can_read_the_quality_labels(gradsift) -> None:
    assert gradsift(*SMOKE, "stop_after=load") == 0
    (loaded,) = gradsift.store.glob("load/verifiable-*")
    examples = pq.read_table(loaded / "examples.parquet")
    text = json.dumps(examples.to_pylist(), default=str)
    assert not {"quality", "family", "label"} & set(examples.column_names)
    for word in ("spoilt", "wrong_answer", "near_duplicate", "contradictory"):
        assert word not in text


@pytest.mark.slow
def test_the_full_size_experiment_runs_both_scorers_on_one_backbone(gradsift, monkeypatch, capsys) -> None:
    file = gradsift.folder / "data" / "instruct" / "alpaca_cleaned_51k.json.gz"
    file.parent.mkdir(parents=True)
    rows = [{"instruction": f"Say {n} times 🟥.", "input": "", "output": f"{n} né " * (n % 7 + 1)} for n in range(40)]
    file.write_bytes(gzip.compress(json.dumps(rows).encode()))
    monkeypatch.setenv("GRADSIFT_DATA", str(gradsift.folder / "data"))
    assert gradsift("-m", "experiment=full_size", "scorer=gsnr,superfilter", "compute.threads=1") == 0
    by_scorer = {run["scorer"]: run for run in gradsift.runs()}
    assert names(by_scorer["gsnr"], reused=False).count("member") == 4  # two members, two epochs
    assert "backbone" in names(by_scorer["superfilter"], reused=True)
    for run in by_scorer.values():
        assert run["status"] == "stopped"
        assert run["selection"]["budget"] == 4
        assert run["memory"]["process_peak_resident_gb"] > 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "proxy=tiny_bytes has random weights" in line]
    assert len(notes) == 1 and notes[0].endswith("(2 runs)")


def test_during_training_collects_every_example_without_a_second_pass(gradsift) -> None:
    assert gradsift(*SMOKE, "proxy.collect=during_training", "stop_after=scores") == 0
    norms = [pq.read_table(path) for path in gradsift.store.glob("member/*/gradient_norms.parquet")]
    assert len(norms) == 4
    for table in norms:
        assert table["row"].to_pylist() == list(range(120))
        assert min(table["norm_B"].to_pylist()) > 0


def test_where_norms_are_taken_changes_no_training(after_smoke) -> None:
    for collect in ("epoch_end", "during_training"):
        assert after_smoke(*SMOKE, f"proxy.collect={collect}", "stop_after=scores") == 0
    adapters = [path.read_bytes() for path in after_smoke.store.glob("member/m1-e2-*/adapter_model.safetensors")]
    assert len(adapters) == 2
    assert adapters[0] == adapters[1]


def test_a_changed_file_never_reuses_an_old_result(gradsift) -> None:
    data = gradsift.folder / "data.json"
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} it is"} for i in range(30)]
    foreign = ("data=json", f"data.path={data}", "tracker=none", "scorer=random", "stop_after=selection", "proxy=gpt2")
    selections = []
    for change in ("first", "second"):
        rows[3]["output"] = change
        data.write_text(json.dumps(rows))
        assert gradsift(*foreign, "alpha=1.0") == 0
        (latest,) = set(gradsift.folder.glob("outputs/*/*/selection.jsonl")) - set(selections)
        selections.append(latest)
        assert f'"output": "{change}"' in latest.read_text()


def test_a_replayed_run_repeats_itself_from_its_own_folder(after_smoke) -> None:
    # what YAML reads as something else unless it is quoted
    texts = ("tracker.group='1e5'", "tracker.project='yes: é'", "target.learning_rate=1e-6")
    assert after_smoke(*SMOKE, "alpha=0.15", "scorer=late_loss", *texts) == 0
    (folder,) = after_smoke.folder.glob("outputs/*/*")
    assert after_smoke("--replay", str(folder)) == 0
    (again,) = set(after_smoke.folder.glob("outputs/*/*")) - {folder}
    assert (again / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()
    dumped = yaml.safe_load((again / "config.yaml").read_text())["values"]
    assert (dumped["tracker"]["group"], dumped["tracker"]["project"]) == ("1e5", "yes: é")
    first, second = after_smoke.runs()
    assert trained(second) == 0
    assert (second["scorer"], second["alpha"], second["pws"]) == ("late_loss", 0.15, first["pws"])


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("a", "b")])
def test_a_replay_without_a_run_folder_is_refused(gradsift, capsys, arguments: tuple[str, ...]) -> None:
    assert gradsift("--replay", *arguments) == 2
    assert "--replay" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"[" * 10_000, b"seed", b"values: 1\nschemas: 2"])
def test_a_replay_of_a_file_that_is_no_config_is_refused(gradsift, capsys, content: bytes) -> None:
    (gradsift.folder / "run").mkdir()
    (gradsift.folder / "run" / "config.yaml").write_bytes(content)
    assert gradsift("--replay", "run") == 2
    assert "give another run, or its options" in capsys.readouterr().err


def test_a_failed_job_does_not_stop_the_others_of_a_sweep(gradsift, capsys) -> None:
    assert gradsift("-m", *SMOKE, "stop_after=selection", "scorer=random", "alpha=0.0001,0.1") == 2
    assert [run["status"] for run in gradsift.runs()] == ["failed", "stopped"]
    captured = capsys.readouterr()
    assert "error: alpha=0.0001 of 120 rows selects no example; give at least 0.008334" in captured.err
    assert "failed: 0-random-0.0001" in captured.out
    assert "Traceback" not in captured.err


def test_an_empty_budget_is_refused_before_any_training(gradsift, capsys) -> None:
    assert gradsift(*SMOKE, "alpha=0.001") == 2
    (run,) = gradsift.runs()
    assert {stage["name"] for stage in run["stages"]} == {"load"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("target.steps=null", "target.epochs=2", "target.warmup_steps=2"),
            "target.warmup_steps=2 warms up over 2 of 2 optimiser steps",
        ),
        (
            ("scorer=less", "target_set=verifiable", "features.warmup.epochs=1"),
            "features.warmup.warmup_ratio=0.03 warms up over 1 of 1 optimiser steps",
        ),
    ],
)
def test_a_warm_up_of_all_steps_is_refused_before_any_training(
    gradsift, capsys, options: tuple[str, ...], message: str
) -> None:
    assert gradsift(*SMOKE, *options) == 2
    assert message in capsys.readouterr().err
    assert {stage["name"] for stage in gradsift.runs()[0]["stages"]} <= {"load", "target_set", "backbone"}


def test_a_defect_is_reported_in_one_line_and_its_trace_is_kept(gradsift, capsys, monkeypatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("gradsift.line.select", broken)
    assert gradsift(*SMOKE, "scorer=random") == 2
    assert "unexpected ZeroDivisionError: broken" in capsys.readouterr().err
    (trace,) = gradsift.folder.glob("outputs/*/*/error.txt")
    assert "Traceback" in trace.read_text()
    assert gradsift.runs()[0]["status"] == "failed"


def test_a_judge_without_a_key_is_refused_before_any_training(gradsift, capsys, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert gradsift(*SMOKE, "judge=openai") == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert {stage["name"] for stage in gradsift.runs()[0]["stages"]} == {"load"}


def test_a_users_benchmark_is_added_on_the_command_line(after_smoke) -> None:
    questions = after_smoke.folder / "questions.json"
    questions.write_text(
        json.dumps([{"question": "copy : ba", "answer": "ba"}, {"question": "add : 1 2", "answer": "3"}])
    )
    entry = f"{{path: {questions}, instruction: question, reference: answer}}"
    own = (f"+benchmark.catalog.mine={entry}", "benchmark.sets=[verifiable,mine]")
    assert after_smoke(*SMOKE, *own) == 0
    (run,) = after_smoke.runs()
    assert set(run["benchmarks"]) == {"verifiable", "mine"}
    assert run["pooled"]["n"] == 26 + 2


def test_a_missing_benchmark_file_is_refused_before_any_training(gradsift, capsys) -> None:
    own = (
        "benchmark.sets=[mine]",
        "+benchmark.catalog.mine={path: nowhere.jsonl}",
        "judge=openai",
        "judge.base_url=http://127.0.0.1:9",
    )
    assert gradsift(*SMOKE, *own) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert {stage["name"] for stage in gradsift.runs()[0]["stages"]} == {"load"}


def test_a_selection_of_nothing_is_refused_with_the_reason(gradsift, capsys, monkeypatch) -> None:
    (gradsift.folder / "no_scores.py").write_text(
        "from gradsift.scoring.scores import UNDEFINED, Scores\n"
        "import numpy as np\n"
        "def none(count):\n"
        "    scores = Scores(np.full(count, np.nan))\n"
        "    scores.mark(np.isnan(scores.score), UNDEFINED, 'no opinion')\n"
        "    return scores\n"
    )
    monkeypatch.syspath_prepend(str(gradsift.folder))
    assert gradsift(*SMOKE, "~scorer", "+scorer={_target_: no_scores.none, name: none}") == 2
    assert "none can be selected (no opinion)" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_differ_in_more_than_a_seed_are_not_averaged(gradsift, capsys) -> None:
    small = ("data.size=60", "data.benchmark_items=13", "target.steps=1")
    assert gradsift("-m", *SMOKE, *small, "scorer.eps=1e-8,1e-1", "seed=0,1") == 0
    table = capsys.readouterr().out.split("PWS against")[1]
    assert "means of 2 seeds" in table
    assert "scorer.eps=1e-08" in table
    assert "scorer.eps=0.1" in table


@pytest.mark.slow
def test_an_edited_users_scorer_is_computed_again(gradsift) -> None:
    """Each run has its own process, because a process imports a module once."""
    scorer = gradsift.folder / "edited.py"
    command = [sys.executable, str(REPOSITORY / "run.py"), *SMOKE, "stop_after=selection"]
    command += ["~scorer", "+scorer={_target_: edited.by_length, name: by_length}"]
    for sign in ("", "-"):
        scorer.write_text(
            "from gradsift.scoring.scores import Scores\nimport numpy as np\n"
            f"def by_length(examples):\n    return Scores(np.array([{sign}len(e.output) for e in examples], float))\n"
        )
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(gradsift.folder)})
    first, second = (names(run, reused=False) for run in gradsift.runs())
    assert "score" in first
    assert "score" in second


def test_a_sweep_given_again_runs_only_its_failed_job(gradsift, monkeypatch) -> None:
    arguments = ("-m", *SMALLER, "scorer=random", "alpha=0.1,0.2", "compute.save_every=0")
    tunes = count()

    class BreaksDown(ShowProgress):
        def on_train_start(self, trainer: Any, module: Any) -> None:  # the reference is tuned by the first job
            self.breaks = isinstance(module, TargetFinetuning) and next(tunes) == 2

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, module, *rest)
            if self.breaks and len(module.curve) == 3:
                raise RuntimeError("the machine had a bad day")

    with monkeypatch.context() as patch:
        patch.setattr("gradsift.training.finetuning.ShowProgress", BreaksDown)
        assert gradsift(*arguments) == 2
    assert [run["status"] for run in gradsift.runs()] == ["finished", "failed"]

    assert gradsift(*arguments) == 0
    finished, failed = gradsift.runs()[2:]
    assert trained(finished) == 0
    assert names(finished, reused=False) == []
    assert sum(stage["seconds"] for stage in finished["stages"]) < 1
    assert trained(failed) == 4 - 2  # two steps of its finetune were saved
    assert names(failed, reused=False)[0] == "finetune"


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("member", "judge"), ("norms", "finetune")])
def test_kill_9_loses_nothing_and_changes_nothing(gradsift, stages: tuple[str, ...], tmp_path: Path) -> None:
    """A command that was killed twice and given again ends with the same bytes as an undisturbed command."""
    command = [sys.executable, str(REPOSITORY / "run.py"), *SMOKE]
    killed, whole = tmp_path / "killed", gradsift.store
    shutil.copytree(whole, killed)
    environment = {**os.environ, "GRADSIFT_ARTIFACTS": str(killed)}
    for stage in stages:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment)
        deadline = time.monotonic() + 120
        while not list(killed.glob(f"{stage}/*.part")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert gradsift(*SMOKE) == 0
    for name in (
        "scores.parquet",
        "selection.jsonl",
        "diagnostics.json",
        "adapter_model.safetensors",
        "judgments.jsonl",
        "pws.json",
    ):
        ours, theirs = ({p.relative_to(s): p.read_bytes() for p in s.rglob(name)} for s in (killed, whole))
        assert ours, name
        assert ours == theirs
