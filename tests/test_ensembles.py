"""Laws of the ensembles: what members share and how they differ, exact norms under masks, no repeated work."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMOKE, made_once
from safetensors.numpy import load_file
from test_finetuning import proxy_config, runtime
from test_norms import assert_norms_close, loop_norms, ragged_examples, tiny_model
from torch import nn

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig, ProxyConfig
from gradsift.data.tokens import ENCODING, Encoded
from gradsift.errors import ConfigError
from gradsift.gradients.callback import COLUMNS
from gradsift.gradients.statistics import compute_statistics, read_norms
from gradsift.journal import Journal
from gradsift.proxy.collection import collect_norms, ensemble_norms
from gradsift.proxy.ensemble import epoch_plan, member_settings, train_adapters, train_members
from gradsift.proxy.epochs import Ensemble, Epoch, ProxyInputs, train_epoch
from gradsift.runtime import Runtime
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

CPU = ComputeConfig(device="cpu")
Norms = dict[int, list[list[Artifact]]]  # {epoch: [member][shard]}
MODES = {"lora_seeds": 0.0, "bootstrap": 0.0, "mc_dropout": 0.3}  # with a lora.dropout that suits them
NEW = ["bootstrap", "mc_dropout"]


def config(mode: str, **changes: Any) -> ProxyConfig:
    return proxy_config(ensemble=mode, lora=LoraConfig(rank=2, dropout=MODES[mode]), **changes)


def parents(run: Runtime) -> tuple[Artifact, Artifact]:
    made = [run.store.obtain(stage, "x", {}, [], lambda folder: {}, version=1) for stage in ("backbone", "load")]
    return made[0], made[1]


def inputs(encoded: list[Encoded]) -> ProxyInputs:
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0})()
    return ProxyInputs(Backbone(tiny_model("gpt2"), tokenizer), encoded, TokenBudget(4096))


def given(run: Runtime, settings: ProxyConfig, encoded: list[Encoded] | None = None) -> Ensemble:
    """Return what an ensemble of ten examples, or of `encoded`, is made from."""
    return Ensemble(run, settings, *parents(run), lambda: inputs(encoded or ragged_examples(10)))


def trained(
    store: Path, settings: ProxyConfig, encoded: list[Encoded] | None = None
) -> tuple[list[list[Artifact]], Runtime]:
    """Return the adapters as [adapter][epoch - 1]."""
    run = runtime(store)
    return train_adapters(given(run, settings, encoded)), run


def ensemble(store: Path, settings: ProxyConfig, encoded: list[Encoded] | None = None) -> tuple[Norms, Runtime]:
    """Return the norms after each epoch."""
    adapters, run = trained(store, settings, encoded)
    made_from = given(run, settings, encoded)
    return {epoch: ensemble_norms(made_from, adapters, epoch) for epoch in settings.snapshots}, run


def made(run: Runtime) -> Counter[str]:
    return Counter(record.name for record in run.store.records if not record.reused)


def norms_of(members: list[list[Artifact]]) -> np.ndarray:
    """Return the members' norm_B, (M, N)."""
    return np.stack([read_norms(shards)["norm_B"] for shards in members])


def flat(computed: Norms, members: int | None = None) -> list[Artifact]:
    """Return the tables of the first `members` members, or of all."""
    return [shard for of_epoch in computed.values() for shards in of_epoch[:members] for shard in shards]


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Norms, Runtime]]:
    """Returns the norms of five members of a mode, trained once a session. Tests must not write to the run's store."""

    def of_mode(mode: str) -> tuple[Norms, Runtime]:
        settings = config(mode, members=5)
        root = made_once(tmp_path_factory, f"five-{mode}", lambda folder: ensemble(folder / "store", settings))
        return ensemble(root / "store", settings)

    return of_mode


def copied(run: Runtime, folder: Path, *without: str) -> Path:
    """Copy the store of a run, but for the stages `without`."""
    return shutil.copytree(run.store.root, folder / "copy", ignore=shutil.ignore_patterns(*without))


# ------------------------------------------------------------------------------------------ every kind


@pytest.mark.parametrize("mode", MODES)
def test_members_differ_and_fewer_of_them_are_the_first_of_more(mode: str, five: Any) -> None:
    all_five, run = five(mode)
    assert not made(run)
    assert len(list(run.store.root.glob("member/*/manifest.json"))) == (2 if mode == "mc_dropout" else 10)
    assert len(list(run.store.root.glob("norms/*/manifest.json"))) == 10
    for epoch in (1, 2):
        norms = norms_of(all_five[epoch])
        assert norms.shape == (5, 10)
        assert (norms.var(0) > 1e-8).all()
    for scope in ("all", "scaled"):
        computed = compute_statistics(all_five[1], all_five[2], scope, 11)
        assert np.isnan(computed.V_t[10])  # the pool's last example was not encoded
        assert (computed.V_t[:10] > 0).all()
        assert (computed.G_s[:10] > 0).all()
    three, again = ensemble(run.store.root, config(mode, members=3))
    assert not made(again)
    assert [a.path for a in flat(three)] == [a.path for a in flat(all_five, 3)]


@pytest.mark.parametrize("mode", NEW)
def test_equal_commands_give_equal_bytes_and_other_seeds_do_not(mode: str, five: Any, tmp_path: Path) -> None:
    first, again = five(mode)[0], ensemble(tmp_path / "b", config(mode, members=2))[0]
    for left, right in zip(flat(first, 2), flat(again), strict=True):
        assert left.fingerprint == right.fingerprint
        assert left.file("gradient_norms.parquet").read_bytes() == right.file("gradient_norms.parquet").read_bytes()
    other = given(runtime(tmp_path / "c", seed=1), config(mode, members=2))
    computed = ensemble_norms(other, train_adapters(other), 2)
    assert not np.allclose(norms_of(again[2]), norms_of(computed), rtol=1e-3)


@pytest.mark.parametrize("mode", NEW)
def test_an_interrupted_ensemble_goes_on_where_it_stopped(
    mode: str, five: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, calls = config(mode, members=2), 0

    def stops(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return collect_norms(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("gradsift.proxy.collection.collect_norms", stops)
        with pytest.raises(KeyboardInterrupt):
            ensemble(tmp_path / "stopped", settings)
    computed, run = ensemble(tmp_path / "stopped", settings)
    assert made(run) == {"norms": 1}  # the fourth of them
    for left, right in zip(flat(computed), flat(five(mode)[0], 2), strict=True):
        assert left.file("gradient_norms.parquet").read_bytes() == right.file("gradient_norms.parquet").read_bytes()


@pytest.mark.parametrize("mode", NEW)
def test_the_line_runs_to_a_selection_with_its_diagnostics(gradsift, mode: str) -> None:
    smoke = (*SMOKE, f"proxy.ensemble={mode}", f"proxy.lora.dropout={MODES[mode]}", "stop_after=selection")
    assert gradsift(*smoke) == 0
    (run,) = gradsift.runs()
    assert run["selection"]["rows"] == 12
    verdict = run["diagnostics"]["adapter_spread"]["verdict"]
    assert verdict == ("unknown" if mode == "mc_dropout" else "ok")
    assert run["diagnostics"]["norm_spread"]["values"]["median_variation"] > 1e-4
    scores = pq.read_table(next(iter(gradsift.store.glob("score/gsnr-*/scores.parquet"))))
    assert min(scores["V_t"].to_pylist()) > 0
    assert gradsift(*smoke, "scorer=late_loss") == 0
    assert {s["name"] for s in gradsift.runs()[-1]["stages"] if not s["reused"]} == {"score", "select"}


def test_a_member_whose_adapter_is_damaged_is_trained_again(five: Any, tmp_path: Path) -> None:
    settings, store = config("lora_seeds", members=2), copied(five("lora_seeds")[1], tmp_path)
    adapters, _ = trained(store, settings)
    file = adapters[0][0].file(lora.ADAPTER_FILE)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\1")  # a weight, or some, of an equally large file
    again, run = trained(store, settings)
    assert made(run) == {"member": 1}
    assert again[0][0].file(lora.ADAPTER_FILE).read_bytes() == whole
    assert len(list(store.glob("member/*.damaged-*"))) == 1


# ---------------------------------------------------------------------------------------- lora_seeds


def test_what_the_weights_of_lora_seeds_depend_on(tmp_path: Path) -> None:
    """A member's identity does not depend on the shards of a collection, which is another stage."""
    settings = member_settings(config("lora_seeds", shards=3, shard=1), runtime(tmp_path), member=1, epoch=2)
    assert settings == {
        "member": 1,
        "epoch": 2,
        "seed": 0,
        "lora": {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": ["all-linear"]},
        "template": "alpaca",
        "max_length": 1024,
        "encoding": ENCODING,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "scheduled_epochs": None,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "batch_size": 4,
        "batching": "bucketed",
        "tokens": None,
    }


# ----------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize(
    ("mode", "batches"),
    [("lora_seeds", [[2], [4, 3, 5], [0, 6, 1]]), ("bootstrap", [[3], [0, 4, 6], [2, 6, 1]])],
)
def test_a_seed_gives_the_order_that_it_has_always_given(mode: str, batches: list[list[int]]) -> None:
    """Renaming a random stream would change members without changing their identity."""
    assert epoch_plan(config(mode, batch_size=3), [3, 9, 4, 7, 5, 8, 6], seed=0, member=1, epoch=2) == batches


def test_dropout_is_drawn_anew_in_each_member_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[Epoch] = []

    def noted(inputs: ProxyInputs, epoch: Epoch, *arguments: Any) -> dict[str, Any]:
        epochs.append(epoch)
        return train_epoch(inputs, epoch, *arguments)

    monkeypatch.setattr("gradsift.proxy.ensemble.train_epoch", noted)
    trained(tmp_path, config("lora_seeds", members=2))
    assert len({epoch.dropout_seed for epoch in epochs}) == len(epochs) == 4


def test_masks_are_other_ones_in_each_member_and_epoch(
    five: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[int] = []

    def noted(*arguments: Any, **options: Any) -> dict[str, np.ndarray]:
        masks.append(options["masks"])
        return collect_norms(*arguments, **options)

    monkeypatch.setattr("gradsift.proxy.collection.collect_norms", noted)
    ensemble(copied(five("mc_dropout")[1], tmp_path, "norms"), config("mc_dropout", members=2))
    assert len(set(masks)) == len(masks) == 4


def test_a_bootstrap_member_sees_its_own_resample_in_every_epoch() -> None:
    settings, lengths = config("bootstrap"), [5 + i % 7 for i in range(400)]
    plans = {(m, e): epoch_plan(settings, lengths, 0, m, e) for m in (0, 1) for e in (1, 2)}
    drawn = {key: Counter(position for batch in plan for position in batch) for key, plan in plans.items()}
    assert all(sum(counts.values()) == 400 for counts in drawn.values())
    assert drawn[0, 1] == drawn[0, 2]
    assert plans[0, 1] != plans[0, 2]  # the order is another one
    assert drawn[0, 1] != drawn[1, 1]
    assert 0.58 < len(drawn[0, 1]) / 400 < 0.68  # 1 - 1/e of the rows
    assert max(max(batch) for batch in plans[1, 1]) < 400


def test_bootstrap_members_start_from_one_adapter_and_others_do_not(tmp_path: Path) -> None:
    still = {"members": 2, "learning_rate": 1e-12, "weight_decay": 0.0}
    run = runtime(tmp_path)
    for mode, same in (("bootstrap", True), ("lora_seeds", False)):
        adapters = train_members(given(run, config(mode, **still)), [0, 1], epochs=1)
        first, second = (load_file(chain[0].file(lora.ADAPTER_FILE)) for chain in adapters.values())
        for name in first:
            if "lora_A" in name:
                assert np.allclose(first[name], second[name], atol=1e-9) is same


# ---------------------------------------------------------------------------------------- mc_dropout


class FixedMask(nn.Module):
    """Multiplies by the recorded dropout factors of one example's tokens."""

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors[:, : x.shape[1]]


def dropping_model(architecture: str, dropout: float) -> Any:
    adapted = lora.add_adapter(tiny_model(architecture), LoraConfig(rank=3, dropout=dropout), seed=1)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted


def under_masks(adapted: Any, examples: list[Encoded], seed: int, tokens: int = 4096) -> np.ndarray:
    """Return norm_A, norm_B and loss, (N, 3), of a member of mc_dropout."""
    columns = collect_norms(adapted, examples, TokenBudget(tokens), 0, CPU, masks=seed)
    return np.stack([columns[name] for name in COLUMNS], 1)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_norms_under_dropout_are_those_of_one_example_under_the_same_masks(architecture: str) -> None:
    adapted, examples = dropping_model(architecture, 0.4), ragged_examples()
    factors: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in lora.lora_layers(adapted):

        def note(module: Any, given: Any, dropped: torch.Tensor, name: str = name) -> None:
            # a GELU far below zero gives 0, and no gradient passes there either
            factors[name] = (dropped / given[0]).detach().nan_to_num(1.0).gt(0.5).double() / 0.6

        hooks.append(layer.lora_dropout["default"].register_forward_hook(note))
    computed = under_masks(adapted, examples, seed=5)
    for hook in hooks:
        hook.remove()
    assert any((mask == 0).float().mean().sub(0.4).abs() < 0.1 for mask in factors.values())
    # in the batch the longest examples came first
    places = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    expected = np.empty((len(examples), 3))
    for place, row in enumerate(places):
        for name, layer in lora.lora_layers(adapted):
            layer.lora_dropout["default"] = FixedMask(factors[name][place : place + 1])
        expected[row] = loop_norms(adapted, [examples[row]])[0]
    assert_norms_close(computed, expected)


def test_a_pass_under_masks_leaves_the_mode_and_a_pass_without_them_drops_nothing() -> None:
    adapted, examples = dropping_model("gpt2", 0.4), ragged_examples()
    assert not np.allclose(under_masks(adapted, examples, 1), under_masks(adapted, examples, 2), rtol=1e-2)
    passes = [collect_norms(adapted, examples, TokenBudget(4096), 0, CPU) for _ in "ab"]
    assert all(np.array_equal(passes[0][name], passes[1][name]) for name in COLUMNS)
    assert all(layer.lora_dropout.training for _, layer in lora.lora_layers(adapted))


def test_the_variance_vanishes_with_the_dropout() -> None:
    examples, variances = ragged_examples(), []
    for dropout in (0.2, 0.002, 1e-9):
        adapted = dropping_model("llama", dropout)
        variances.append(np.var([under_masks(adapted, examples, seed)[:, :2] for seed in range(6)], axis=0).mean())
    assert variances[0] > 5 * variances[1] > 0
    assert variances[2] < 1e-12


def test_training_is_member_0_of_lora_seeds_and_is_shared_with_it(five: Any, tmp_path: Path) -> None:
    dropping, store = config("mc_dropout", members=2), copied(five("mc_dropout")[1], tmp_path)
    norms, _ = ensemble(store, dropping)
    adapters, _ = trained(store, dropping)
    assert len(adapters) == 1
    seeds, again = trained(store, proxy_config(members=2, lora=dropping.lora))
    assert made(again) == {"member": 2}  # its member 1 alone
    assert [a.path for a in seeds[0]] == [a.path for a in adapters[0]]
    assert norms[2][1][0].manifest["parents"] == [adapters[0][1].fingerprint]


def test_masks_do_not_depend_on_the_batch() -> None:
    adapted, examples = dropping_model("gpt2", 0.4), ragged_examples(10)
    whole = under_masks(adapted, examples, seed=3).astype(np.float64)
    assert_norms_close(under_masks(adapted, examples, seed=3, tokens=24), whole)
    assert_norms_close(under_masks(adapted, examples[4:6], seed=3), whole[4:6])


def test_a_pass_under_masks_that_was_cut_short_draws_on_as_one_that_was_not(tmp_path: Path) -> None:
    adapted, examples = dropping_model("gpt2", 0.4), ragged_examples(12)
    whole = under_masks(adapted, examples, seed=3, tokens=30)

    def stops(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = {"masks": 3, "journal": Journal(tmp_path)}
        collect_norms(adapted, examples, TokenBudget(30), 0, CPU, stops, **options)
    torch.manual_seed(99)
    options = {"masks": 3, "journal": Journal(tmp_path)}
    computed = collect_norms(adapted, examples, TokenBudget(30), 0, CPU, **options)
    assert np.array_equal(np.stack([computed[name] for name in COLUMNS], 1), whole)


# -------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": "snapshots"}, "choose one of: lora_seeds, bootstrap, mc_dropout"),
        ({"ensemble": "mc_dropout"}, "proxy.lora.dropout=0.0"),
        ({"ensemble": "bootstrap", "collect": "during_training"}, "take proxy.collect=epoch_end"),
        (
            {"ensemble": "mc_dropout", "collect": "during_training", "lora": LoraConfig(dropout=0.1)},
            "take proxy.collect=epoch_end",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        proxy_config(**changes)
