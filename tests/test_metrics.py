"""Metrics without a judge: values computed by hand; an undefined metric is None and never 0."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE

from gradsift.config import BenchmarkConfig
from gradsift.data.tokens import encode_prompt
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import ModelOutput, generate_answers, model_outputs
from gradsift.evaluation.stages.metrics import check_metrics, evaluate_tasks, figures, until
from gradsift.evaluation.text_metrics import bleu, change, check_wordnet, measure, meteor, read_wordnet, rouge_l


def rows(*pairs: tuple[str, str | None], dataset: str = "set") -> list[ModelOutput]:
    items = [Item(dataset, str(n), "q", "", reference) for n, (_, reference) in enumerate(pairs)]
    return model_outputs(items, [answer for answer, _ in pairs], "model")


def test_rouge_l_is_the_mean_f_measure_of_the_longest_common_subsequence() -> None:
    # the cat sat / the cat on the mat: subsequence of 2; precision 2/3, recall 2/5, F = 1/2
    assert rouge_l(["The cat sat."], ["the cat on the mat"]) == pytest.approx(0.5)
    assert rouge_l(["The cat sat.", ""], ["the cat on the mat", "a word"]) == pytest.approx(0.25)


def test_rouge_l_does_not_count_a_reference_that_it_cannot_read() -> None:
    assert rouge_l(["] )", "yes"], ["] )", "yes"]) == 1
    assert rouge_l(["\u5317\u4eac"], ["\u5317\u4eac"]) is None


def test_bleu_is_the_corpus_score_by_its_definition() -> None:
    # precisions 4/5, 3/4, 2/3, 1/2 of one to four tokens in a row; equal lengths, so no brevity penalty
    expected = 100 * math.exp(sum(math.log(p) for p in (4 / 5, 3 / 4, 2 / 3, 1 / 2)) / 4)
    assert bleu(["a b c d x"], ["a b c d e"]) == pytest.approx(expected)
    # corpus BLEU adds up the counts; it is not the mean of the two scores
    both = 100 * math.exp(sum(math.log(p) for p in (9 / 10, 7 / 8, 5 / 6, 3 / 4)) / 4)
    assert bleu(["a b c d x", "k l m n o"], ["a b c d e", "k l m n o"]) == pytest.approx(both)


def test_bleu_of_short_answers_is_none() -> None:
    assert bleu(["ba du", "no"], ["ba du", "no"]) is None


WORDNET = {  # two synsets, {car, auto} and {cat}, in WordNet's own format
    "lexnames": "00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n",
    "data.noun": (
        "00000000 03 n 02 car 0 auto 0 000 | a vehicle  \n"  # the first field is the offset in the file
        "00000048 03 n 01 cat 0 000 | an animal  \n"
    ),
    "index.noun": ("auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \ncat n 1 0 1 0 00000048  \n"),
    **{f"{kind}.{part}": "" for kind in ("data", "index") for part in ("verb", "adj", "adv")},
    **{f"{part}.exc": "" for part in ("noun", "verb", "adj", "adv")},
}


@pytest.fixture
def wordnet_dir(tmp_path: Path) -> Path:
    for name, text in WORDNET.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_meteor_counts_wordnets_synonyms(wordnet_dir: Path) -> None:
    wordnet = read_wordnet(wordnet_dir)
    # all m = 2 words match in one chunk: 1 - 0.5 (1/2)^3
    assert meteor(["the car"], ["the auto"], wordnet) == pytest.approx(1 - 0.5 / 8)
    # one of two words: precision and recall 1/2, so F = 1/2; one chunk of one match: penalty 0.5
    assert meteor(["the car"], ["the cat"], wordnet) == pytest.approx(0.25)
    assert meteor([""], ["the cat"], wordnet) == 0


def test_wordnet_is_refused_where_files_are_missing(wordnet_dir: Path) -> None:
    assert check_wordnet(None) is None
    assert check_wordnet(str(wordnet_dir)) == wordnet_dir
    (wordnet_dir / "lexnames").unlink()
    with pytest.raises(ConfigError, match=r"benchmark\.wordnet_dir=.* lacks lexnames; give"):
        check_wordnet(str(wordnet_dir))


def test_metrics_are_per_benchmark_and_pooled_over_all_items() -> None:
    answers = [
        *rows(("ba du", "ba du"), ("ba", "du"), dataset="words"),
        *rows(("it is 12.0", "12"), dataset="numbers"),
        *rows(("anything", None), dataset="open"),
    ]
    found = measure(answers, {"words": "exact", "numbers": "number"}.__getitem__)
    assert set(found["benchmarks"]) == {"words", "numbers"}
    assert found["benchmarks"]["words"]["accuracy"] == 0.5
    assert found["benchmarks"]["numbers"] | {"absent": None} == {
        "items": 1,
        "accuracy": 1.0,
        "rouge_l": pytest.approx(2 * (1 / 4) / (1 / 4 + 1)),  # "it is 12 0" against "12"
        "bleu": None,  # three tokens
        "meteor": None,
        "absent": None,
    }
    assert set(found["benchmarks"]["numbers"]["absent"]) == {"bleu", "meteor"}
    assert found["pooled"]["items"] == 3
    assert found["pooled"]["accuracy"] == pytest.approx(2 / 3)
    assert "wordnet_dir" in found["pooled"]["absent"]["meteor"]
    assert "tok:13a" in found["bleu_signature"]


def test_change_has_the_metrics_that_both_have() -> None:
    before: dict[str, Any] = {"items": 5, "accuracy": 0.75, "bleu": None, "loss": 1.0, "absent": {"bleu": "short"}}
    after = {"items": 5, "accuracy": 0.5, "bleu": 3.0, "loss": 1.5}
    assert change(before, after) == {"accuracy": -0.25, "loss": 0.5}


# ------------------------------------------------------------------------------------------- lm-eval


def test_tasks_without_lm_eval_are_refused_with_the_command_that_installs_it() -> None:
    check_metrics(BenchmarkConfig(sets=["verifiable"]))
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    with pytest.raises(ConfigError, match=r"lm_eval_tasks=\['arc_easy'\].*pip install -e '\.\[lm-eval\]'"):
        check_metrics(BenchmarkConfig(sets=["verifiable"], lm_eval_tasks=["arc_easy"]))


def test_lm_evals_report_is_read_without_standard_errors_and_labels() -> None:
    reported = {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 1, "sample_len": 5}
    assert figures(reported) == {"acc,none": 0.5, "acc_norm,none": 1.0}


CHOICES = [("Two plus two is", "four", "seven"), ("Grass is", "loud", "green"), ("A week has", "many days", "seven")]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of lm-eval with local data: which of two answers is more probable."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra and is not installed")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"question": q, "right": right, "wrong": wrong}) for q, right, wrong in CHOICES]
    (folder / "items.jsonl").write_text("\n".join(lines))
    task = {
        "task": "mine",
        "tag": "mine_and_others",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "mine.yaml").write_text(json.dumps(task))
    return folder


def tasks(name: str, folder: Path, limit: int | None, max_new_tokens: int = 8) -> BenchmarkConfig:
    return BenchmarkConfig(
        sets=["verifiable"],
        lm_eval_tasks=[name],
        lm_eval_folder=str(folder),
        limit=limit,
        batch_size=2,
        max_new_tokens=max_new_tokens,
    )


def test_lm_evals_figure_is_that_of_a_loop_over_the_choices(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gradsift.training import nano

    model, tokenizer = nano.bytes_model(seed=0).eval(), nano.bytes_tokenizer()

    def log_p(question: str, answer: str) -> float:
        start, whole = (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in (question, f"{question} {answer}")
        )
        with torch.no_grad():
            log_p = model(whole).logits[0].log_softmax(-1)
        return sum(float(log_p[t - 1, whole[0, t]]) for t in range(start.shape[1], whole.shape[1]))

    right = [log_p(question, right) > log_p(question, wrong) for question, right, wrong in CHOICES]
    check_metrics(tasks("mine", task_folder, None))
    assert 0 < sum(right) < 3
    found = evaluate_tasks(model, tokenizer, tasks("mine", task_folder, None), "plain", None)
    assert found == {"mine": {"acc,none": pytest.approx(sum(right) / 3)}}
    found = evaluate_tasks(model, tokenizer, tasks("mine", task_folder, 1), "plain", None)
    assert found == {"mine": {"acc,none": float(right[0])}}
    monkeypatch.setenv("LOCAL_RANK", "1")  # as on a rank that is not the first of its machine
    assert evaluate_tasks(model, tokenizer, tasks("mine", task_folder, 1), "plain", None) == {}
    monkeypatch.delenv("LOCAL_RANK")
    (task_folder / "items.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot load the data of a task.*benchmark\.lm_eval_folder"):
        evaluate_tasks(model, tokenizer, tasks("mine", task_folder, None), "plain", None)


def test_a_task_that_generates_is_answered_in_the_targets_template(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra and is not installed")
    from gradsift.training import nano

    model, tokenizer = nano.bytes_model(seed=0).eval(), nano.bytes_tokenizer()
    questions = ["Name a bird.", "Count to two.", "Say it in red."]
    prompts = [encode_prompt(question, "", tokenizer, "alpaca") for question in questions]
    expected = [generate_answers(model, tokenizer, [p], max_new_tokens=6, batch_size=1)[0] for p in prompts]
    answers = ["wrong", *expected[1:]]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "written",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "written.yaml").write_text(json.dumps(task))
    found = evaluate_tasks(model, tokenizer, tasks("written", tmp_path, None, max_new_tokens=99), "alpaca", None)
    assert list(found["written"].values()) == [pytest.approx(2 / 3)]


def test_a_task_that_needs_a_missing_package_names_it(task_folder: Path) -> None:
    from gradsift.training import nano

    (task_folder / "utils.py").write_text("import no_such_package\n")
    task = task_folder / "mine.yaml"
    task.write_text(task.read_text().removesuffix("}") + ', "process_results": !function utils.f}')
    config = tasks("mine", task_folder, 1)
    with pytest.raises(ConfigError, match=r"needs the package no_such_package.*pip install -e '\.\[lm-eval\]'"):
        evaluate_tasks(nano.bytes_model(seed=0), nano.bytes_tokenizer(), config, "plain", None)


def test_an_answer_ends_at_the_first_of_a_tasks_ends() -> None:
    assert until("a b\n\nc Q: d", ["Q:", "\n\n", ""]) == "a b"
    assert until("a b", ["Q:"]) == "a b" == until("a b", [])


def test_a_task_of_ones_own_is_done_before_and_after_the_finetune(after_smoke, task_folder: Path) -> None:
    smoke = ("experiment=smoke", "tracker=none", "compute.threads=1", "scorer=random", "stop_after=generate")
    asked = ("benchmark.limit=3", "benchmark.lm_eval_tasks=[mine]", f"benchmark.lm_eval_folder={task_folder}")
    assert after_smoke(*smoke, *asked) == 0
    assert set(after_smoke.runs()[0]["forgetting"]["lm_eval/mine"]["before"]) == {"acc,none"}
    assert after_smoke(*smoke, *asked) == 0
    assert all(stage["reused"] for stage in after_smoke.runs()[1]["stages"])
    (task_folder / "items.jsonl").write_text((task_folder / "items.jsonl").read_text() + "\n")
    assert after_smoke(*smoke, *asked) == 0
    done = [stage["name"] for stage in after_smoke.runs()[2]["stages"] if not stage["reused"]]
    assert done == ["lm_eval", "lm_eval"]


@pytest.mark.slow
def test_two_ranks_with_a_divided_target_report_what_one_process_reports(gradsift, task_folder: Path) -> None:
    rolling = {
        "task": "text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task_folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{right}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    written = {name: rolling[name] for name in ("dataset_path", "dataset_kwargs", "test_split")} | {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (rolling, written):
        (task_folder / f"{task['task']}.yaml").write_text(json.dumps(task))
    smoke = ("experiment=smoke", "tracker=none", "compute.threads=1", "scorer=random", "stop_after=generate")
    asked = ("benchmark.lm_eval_tasks=[mine,text,written]", f"benchmark.lm_eval_folder={task_folder}")
    found = []
    for store, compute in (("one", ()), ("two", ("compute=fsdp", "compute.devices=2", "compute.device=cpu"))):
        assert gradsift(*smoke, *asked, f"artifacts={store}", *compute) == 0
        reported = gradsift.runs()[-1]["forgetting"]
        found.append({task: reported[f"lm_eval/{task}"] for task in ("mine", "text", "written")})
    for task, values in found[0].items():
        for state in ("before", "after"):
            assert found[1][task][state] == pytest.approx(values[state], rel=1e-5)
    losses = [found[0]["text"][state]["bits_per_byte,none"] for state in ("before", "after")]
    assert losses[0] != losses[1]  # the adapter is applied


@pytest.mark.slow  # lm-eval indexes its 14,000 files
def test_a_name_that_is_no_task_of_lm_eval_is_refused(task_folder: Path) -> None:
    for name in ("no_such_task", "mine_and_others"):  # the second is a tag, for which lm-eval reports no figures
        with pytest.raises(ConfigError, match=r"is no task or group of lm-eval.*benchmark\.lm_eval_folder"):
            check_metrics(tasks(name, task_folder, None))


# ------------------------------------------------------------------------------------------- the line


def test_metrics_and_forgetting_are_in_run_json_and_are_not_computed_twice(after_smoke, wordnet_dir: Path) -> None:
    smoke = (*SMOKE, "scorer=random")
    # a limit of 26 keeps all items of the finished run, so its answers are reused
    asked = ("benchmark.general=[verifiable_terse]", f"benchmark.wordnet_dir={wordnet_dir}", "benchmark.limit=26")
    assert after_smoke(*smoke, *asked) == 0
    (run,) = after_smoke.runs()
    for model in ("model", "reference", "untuned"):
        metrics = run["metrics"][model]
        assert metrics["pooled"]["accuracy"] == run["accuracy"][model]
        assert metrics["benchmarks"]["verifiable"]["accuracy"] == run["accuracy"]["by_benchmark"][model]["verifiable"]
        assert metrics["pooled"]["items"] == 26
        assert 0 <= metrics["pooled"]["rouge_l"] <= 1
        assert metrics["pooled"]["meteor"] is not None
    forgotten = run["forgetting"]["verifiable_terse"]
    assert forgotten["before"]["items"] == forgotten["after"]["items"] == 26
    assert forgotten["before"]["loss"] > 0
    assert forgotten["change"]["loss"] == forgotten["after"]["loss"] - forgotten["before"]["loss"] != 0

    assert after_smoke(*smoke, *asked) == 0
    again = after_smoke.runs()[-1]
    assert all(stage["reused"] for stage in again["stages"])
    assert (again["metrics"], again["forgetting"]) == (run["metrics"], run["forgetting"])


def test_benchmarks_without_a_rule_are_compared_word_for_word() -> None:
    config = BenchmarkConfig(sets=["verifiable"], catalog={"mine": {"reference": "a", "match": "number"}})
    assert [config.match_of(name) for name in ("verifiable", "verifiable_named", "mine")] == [
        "exact",
        "exact",
        "number",
    ]
