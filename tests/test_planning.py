"""Laws of `plan=true`: it lists what the run then makes, and makes nothing."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOKE
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig

from gradsift.artifacts import Artifact, NotMade, Store
from gradsift.composition import compose_config
from gradsift.cost import duration
from gradsift.errors import ConfigError
from gradsift.execution import _about
from gradsift.forecast import active_parameters, held_weights
from gradsift.manifests import write_manifest
from gradsift.planning import DONE, TO_DO, Planner
from gradsift.report.plans import SHARED, forecast_lines, plan_lines, states, to_do
from gradsift.training.nano import nano_tokenizer

TINY = (*SMOKE, "data.size=60", "data.benchmark_items=13", "target.steps=2")


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Return every file and folder with its size and time of change."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}


def planned(gradsift: Any, *arguments: str) -> list[dict[str, Any]]:
    """Return the `run.json` of each job, and assert that the store is unchanged."""
    before, there = listing(gradsift.store), len(gradsift.runs())
    assert gradsift(*arguments, "plan=true") == 0
    assert listing(gradsift.store) == before
    runs = gradsift.runs()[there:]
    assert {run["status"] for run in runs} == {"planned"}
    assert [run["plan_ends"] for run in runs] == [None] * len(runs)
    return runs


def named(artifact: str) -> tuple[str, str]:
    """Return stage and readable name of a unit whose fingerprint is not known yet."""
    folder = Path(artifact)
    return folder.parent.name, folder.name.rsplit("-", 1)[0]


def agrees(plan: list[dict[str, Any]], run: list[dict[str, Any]]) -> None:
    """Assert that the runs made exactly what the plans list as to do; in a sweep finetunes may coincide."""
    stages = [stage for each in run for stage in each["stages"]]
    made = {stage["fingerprint"]: stage["artifact"] for stage in stages if not stage["reused"]}
    units = to_do(plan)
    certain = {unit["fingerprint"] for unit in units if unit["certain"]}
    assert certain <= set(made)
    rest = Counter(named(artifact) for fingerprint, artifact in made.items() if fingerprint not in certain)
    expected = Counter(named(unit["artifact"]) for unit in units if not unit["certain"])
    assert rest <= expected if len(plan) > 1 else rest == expected
    assert set(rest) == set(expected)
    done = {unit["fingerprint"] for each in plan for unit in each["plan"] if unit["state"] == DONE}
    assert done <= {stage["fingerprint"] for stage in stages if stage["reused"]}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("scorer=superfilter", "stop_after=finetune"), marks=pytest.mark.slow),
        ("method=less", "target_set=verifiable", "stop_after=selection"),
        pytest.param(("method=g2is", "target_set=verifiable", "stop_after=selection"), marks=pytest.mark.slow),
        pytest.param(("method=deita", "embedder=hidden_states", "stop_after=selection"), marks=pytest.mark.slow),
        ("proxy.ensemble=mc_dropout", "proxy.lora.dropout=0.1", "stop_after=statistics"),
        ("audit.enabled=true", "data.corruption.share=0.3", "scorer=random", "stop_after=selection"),
        pytest.param(
            ("benchmark.general=[verifiable_terse]", "benchmark.limit=9", "scorer=random", "stop_after=generate"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_run_makes_what_its_plan_lists_as_to_do(gradsift, arguments: tuple[str, ...]) -> None:
    plan = planned(gradsift, *TINY, *arguments)
    assert to_do(plan)
    assert gradsift(*TINY, *arguments) == 0
    agrees(plan, gradsift.runs()[-1:])
    assert to_do(planned(gradsift, *TINY, *arguments)) == []


def test_the_run_reuses_what_its_plan_lists_as_done(gradsift) -> None:
    assert gradsift(*TINY, "stop_after=scores") == 0
    plan = planned(gradsift, *TINY)
    (units,) = states(plan)
    done = {unit["name"] for unit, state in units if state == DONE}
    assert done == {"load", "backbone", "member", "norms", "statistics", "score"}
    assert {unit["name"] for unit, _ in units if not unit["certain"]} == {
        "finetune", "heldout", "generate", "metrics", "judge", "pws",
    }  # fmt: skip
    assert gradsift(*TINY) == 0
    agrees(plan, gradsift.runs()[-1:])
    assert to_do(planned(gradsift, *TINY)) == []


def test_a_sweeps_plan_counts_each_unit_once(gradsift, capsys) -> None:
    sweep = ("-m", *TINY, "scorer=late_loss,full", "proxy.members=1,2", "stop_after=finetune")
    plan = planned(gradsift, *sweep)
    out = capsys.readouterr().out
    assert "Plan by job" in out
    assert "Plan by stage" in out
    assert len(plan) == 4
    counts = Counter(unit["name"] for unit in to_do(plan))
    assert (counts["member"], counts["score"], counts["finetune"]) == (4, 3, 3)  # full ignores M
    shared = Counter(unit["name"] for units in states(plan) for unit, state in units if state == SHARED)
    assert (shared["member"], shared["finetune"]) == (2, 1)
    assert gradsift(*sweep) == 0
    agrees(plan, gradsift.runs()[-4:])


def test_estimates_come_from_the_nearest_work_and_grow_with_the_examples(gradsift) -> None:
    def members(*arguments: str) -> list[dict[str, Any]]:
        (plan,) = planned(gradsift, *TINY, *arguments, "stop_after=statistics")
        return [unit for unit in plan["plan"] if unit["name"] == "member"]

    assert {unit["seconds"] for unit in members()} == {None}  # nothing like them is in the store
    assert gradsift(*TINY, "stop_after=statistics") == 0
    for file in gradsift.store.glob("member/*/manifest.json"):  # a clock's seconds differ from run to run
        write_manifest(file.parent, json.loads(file.read_text()) | {"seconds": 2.0})
    (new,) = [unit for unit in members("proxy.members=3") if unit["state"] == TO_DO][:1]
    assert new["seconds"] == 2.0
    assert new["peak_gb"] > 0.1
    assert new["bytes"] > 1000
    larger = members("data.size=120")
    assert larger[0]["seconds"] == 4.0
    assert {unit["seconds"] for unit in members("proxy.model.nano.architecture=llama")} == {None}  # another model


def test_an_estimate_uses_only_units_of_the_same_method(tmp_path: Path) -> None:
    for name, seconds, eps in (("gsnr", 4.0, 1), ("gsnr", 8.0, 2), ("slow", 900.0, 2)):
        folder = tmp_path / "score" / f"{name}-{eps}"
        folder.mkdir(parents=True)
        files = {"scores.parquet": {"bytes": 100}, "adapter.safetensors": {"bytes": 7}}
        content = {"config": {"name": name, "eps": eps}, "seconds": seconds, "files": files, "size": 10, "models": []}
        write_manifest(folder, content)
    (tmp_path / "score" / "broken").mkdir()
    (tmp_path / "score" / "broken" / "manifest.json").write_text("{")
    wanted = {"size": 20, "models": [], "config": {"name": "gsnr", "eps": 2}}
    planner = Planner(tmp_path, print)
    estimate = planner.estimate(Artifact("score", tmp_path, "f", wanted))
    assert (estimate["seconds"], estimate["bytes"]) == (16.0, 207)
    none = planner.estimate(Artifact("score", tmp_path, "f", {**wanted, "models": ["gpt2"]}))
    assert none == {"seconds": None, "bytes": None, "peak_gb": None, "calls": 0}


def test_a_plan_counts_the_judges_calls(gradsift, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "never sent")
    judge = ("judge=openai", "judge.model=some", "judge.base_url=http://127.0.0.1:9")
    (plan,) = planned(gradsift, *TINY, *judge, "scorer=llm_rating", "scorer.style=deita")
    calls = {unit["name"]: unit["calls"] for unit in plan["plan"] if unit["calls"]}
    assert calls == {"score": 2 * 60, "judge": 2 * 13}
    assert "judge calls 146" in capsys.readouterr().out
    judge = ("judge=alpaca_eval", "judge.base_url=http://127.0.0.1:9")
    (plan,) = planned(gradsift, *TINY, *judge, "scorer=random")
    assert {unit["name"]: unit["calls"] for unit in plan["plan"] if unit["calls"]} == {"judge": 2 * 13}


def test_a_plan_lists_a_damaged_unit_as_to_do_and_leaves_it(gradsift) -> None:
    arguments = (*TINY, "scorer=random", "stop_after=selection")
    assert gradsift(*arguments) == 0
    (positions,) = gradsift.store.glob("select/*/positions.npy")
    os.truncate(positions, 3)
    plan = planned(gradsift, *arguments)
    assert [unit["name"] for unit in to_do(plan)] == ["select"]


def test_an_artifact_that_is_only_planned_cannot_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", say=lambda line: None)
    made = store.obtain("load", "rows", {}, [], lambda folder: {"rows": 8}, version=1)
    planner = Planner(tmp_path / "store", lambda line: None)

    def refuse(folder: Path) -> dict[str, Any]:
        raise AssertionError("a plan made something")

    unit = planner.obtain("member", "m0", {"epoch": 1}, [made], refuse, version=1)
    assert unit.planned
    assert unit.size == 8
    with pytest.raises(NotMade, match=r"member/m0-.* is not made yet"):
        _ = unit.info
    with pytest.raises(NotMade, match=r"no norms\.parquet to read"):
        unit.file("norms.parquet")
    below = planner.obtain("finetune", "tiny", {}, [unit], refuse, version=1, size=4, exact=False)
    child = planner.obtain("heldout", "tiny", {}, [below], refuse, version=1, size=2)
    certain = {each["name"]: each["certain"] for each in planner.units.values()}
    assert certain == {"member": True, "finetune": False, "heldout": False}
    assert (below.size, child.size) == (4, 2)


MACHINE = {"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "plans"),
    [(MACHINE, 0), (TORCHRUN, 0), ({**MACHINE, "NODE_RANK": "0"}, 1), ({**TORCHRUN, "RANK": "0"}, 1)],
)
def test_the_first_rank_plans_alone(environment: dict[str, str], plans: int, gradsift, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = listing(gradsift.store)
    several = ("compute=ddp", "compute.devices=1", "compute.num_nodes=2")
    assert gradsift(*TINY, "stop_after=statistics", "scorer=late_loss", *several, "plan=true") == 0
    assert listing(gradsift.store) == before
    assert len(gradsift.runs()) == plans


def test_a_plan_refuses_what_the_run_would_refuse(gradsift, capsys) -> None:
    before = listing(gradsift.store)
    assert gradsift(*TINY, "alpha=0.001", "plan=true") == 2
    assert "selects no example" in capsys.readouterr().err
    assert listing(gradsift.store) == before


def test_a_store_that_cannot_be_read_ends_a_plan_in_one_line(gradsift, capsys) -> None:
    (gradsift.folder / "file").touch()
    assert gradsift(*TINY, "plan=true", "artifacts=file") == 2
    error = capsys.readouterr().err
    assert "the plan could not" in error and "artifacts=DIR" in error
    assert "defect" not in error


def test_a_plan_of_one_shard_is_what_its_job_makes(gradsift) -> None:
    shard = (*TINY, "proxy.shards=2", "proxy.shard=1", "stop_after=statistics")
    plan = planned(gradsift, *shard)
    assert Counter(unit["name"] for unit in to_do(plan))["norms"] == 4
    assert gradsift(*shard) == 0
    agrees(plan, gradsift.runs()[-1:])


def test_totals_mark_unknown_estimates() -> None:
    unit = {"name": "a", "artifact": "s/a-1", "fingerprint": "1", "state": TO_DO, "certain": True, "calls": 0}
    known = unit | {"fingerprint": "2", "seconds": 3.0, "bytes": 10**9, "peak_gb": 1.25}
    unknown = unit | {"seconds": None, "bytes": None, "peak_gb": None}
    run = {"plan": [known, unknown], "plan_ends": None, "free_bytes": 10**6}
    lines = "\n".join(plan_lines([run, run]))
    assert "0 units done, 2 to do" in lines
    assert "time 3.0 s + ?, disk 1.0 GB + ?, peak memory 1.2 GB, judge calls none" in lines
    assert "no work like 1 of the units" in lines
    assert "only 1.0 MB are free on the disk" in lines


@pytest.mark.parametrize(("seconds", "text"), [(2.04, "2.0 s"), (50, "50 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("compute", ["default", "fsdp"])
def test_a_plan_with_a_large_target_tells_memory_and_hours_by_arithmetic(
    gradsift, tmp_path: Path, capsys, compute: str
) -> None:
    """Uses only the config of LLaMA-2-7B, whose parameters and those of an adapter of rank 8 are published."""
    folder = tmp_path / "llama2"
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # whose defaults are LLaMA-2-7B's
    nano_tokenizer().save_pretrained(folder)
    target = ["target=llama2_7b", f"target.model.path={folder}", "target.lora.rank=8"]
    options = [f"compute={compute}", "compute.device=cpu", "data.size=60", "data.benchmark_items=13"]
    (run,) = planned(
        gradsift,
        *SMOKE,
        "target.steps=null",
        *target,
        *options,
        "target.lora.targets=[q_proj,v_proj]",
    )
    told = run["forecast"]
    assert told["parameters"] == told["active"] == 6_738_415_616
    assert told["adapter"] == 16 * 4_194_304
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    rest = 2 * 32000 * 4096 + 4096
    assert told["weights"] == 2 * (32 * layer + rest if compute == "default" else 16 * layer + 2 * layer + rest)
    assert told["per_token"] == 32 * (8 * 4096 + 2 * (5 * 4096 + 3 * 11008))
    assert told["per_token_checkpointed"] == 32 * 4 * 4096 + told["per_token"] // 32
    assert told["rows"] == [6, 60]
    assert [hours * 3600 * 1e14 for hours in told["hours"]] == pytest.approx(
        [4 * told["parameters"] * tokens for tokens in told["tokens"]]
    )
    assert 10 * told["tokens"][0] == pytest.approx(told["tokens"][1], rel=1e-3)
    text = " ".join(capsys.readouterr().out.split())
    assert "llama2_7b: 6.7 billion parameters, bfloat16" in text
    assert "with 4,096 tokens at once" in text
    assert "at an assumed 1e14 operations" in text


def test_a_token_passes_through_the_chosen_experts_alone() -> None:
    """A model that has only the chosen experts has as many weights, except for the rows of its router."""
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    many, few = (AutoModelForCausalLM.from_config(MixtralConfig(**shape, num_local_experts=n)) for n in (8, 2))
    assert active_parameters(many) == few.num_parameters() + 2 * (8 - 2) * 16
    assert active_parameters(few) == few.num_parameters() < many.num_parameters()
    plain = {"target": "t", "precision": "bfloat16", "ranks": 1, "weights": 1, "adapter": 1, "per_token": None}
    plain |= {"per_token_checkpointed": None, "rows": [1], "tokens": [1], "hours": [1.0]}
    lines = forecast_lines(plain | {"parameters": 46_702_792_704, "active": 12_879_425_536})
    assert lines[0].startswith("t: 46.7 billion parameters (12.9 per token), bfloat16")


def test_70_billion_weights_in_nf4_leave_half_of_an_80_gb_card() -> None:
    """LLaMA-2-70B from its published shape; embeddings and head are bfloat16."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=8))
    assert model.num_parameters() == 68_976_648_192
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    expected = 80 * layer * 9 // 16 + 2 * (2 * 32000 * 8192 + 161 * 8192)
    assert held_weights(model, 2, "nf4", parts=1) == expected < 40e9
    assert held_weights(model, 2, "none", parts=1) > 80e9


def test_the_layers_of_a_model_that_does_not_name_them_are_needed_to_divide_it_alone() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=64))
    model._no_split_modules = None
    weights, linear = model.num_parameters(), 12 * 16 * 16
    assert held_weights(model, 2, "none", parts=1) == 2 * weights
    assert held_weights(model, 2, "int8", parts=1) == 2 * weights - linear
    with pytest.raises(ConfigError, match=r"compute\.strategy=fsdp cannot tell the layers"):
        held_weights(model, 2, "none", parts=2)


def test_a_plan_with_a_small_target_has_no_forecast(gradsift) -> None:
    (run,) = planned(gradsift, *TINY)
    assert run["forecast"] is None


def test_runs_that_differ_in_seeds_alone_share_a_variant() -> None:
    seeds: dict[tuple[str, float], set[tuple[int, int]]] = {}
    for seed, data_seed, alpha in itertools.product((0, 1), (0, 1), (0.1, 0.2)):
        about = _about(compose_config([*TINY, f"seed={seed}", f"data.seed={data_seed}", f"alpha={alpha}"]), [])
        seeds.setdefault((about["variant"], about["alpha"]), set()).add((about["seed"], about["data_seed"]))
    every = {(seed, data) for seed in (0, 1) for data in (0, 1)}
    assert list(seeds.values()) == [every, every]
    assert len({variant for variant, _ in seeds}) == 2
