"""Laws of the training loop: a resumed training equals an uninterrupted one, and losses and norms equal slow loops."""

from __future__ import annotations

import dataclasses
import io
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import peft
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from rich.console import Console
from test_norms import VOCABULARY, adapted_model, assert_norms_close, loop_norms, ragged_examples, tiny_model
from transformers import AutoModelForCausalLM, get_scheduler

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, FieldsConfig, LoraConfig, ModelConfig, NanoConfig, ProxyConfig, TargetConfig
from gradsift.data.batching import collate, epoch_batches
from gradsift.data.examples import Example
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.callback import COLUMNS, GradientNormCallback, NormRecords
from gradsift.gradients.probes import NormProbe
from gradsift.gradients.statistics import read_norms
from gradsift.proxy.collection import collect_norms
from gradsift.proxy.ensemble import member_settings, train_members_epoch
from gradsift.proxy.epochs import ProxyInputs
from gradsift.runtime import Display, Runtime, derive_seed
from gradsift.training import lora, modules
from gradsift.training.backbones import Backbone, backbone, load_backbone
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import fit
from gradsift.training.head import ResponseLosses
from gradsift.training.modules import Optimization, ProxyMember
from gradsift.training.target import batch_plan, load_tuned, train_target

CPU = ComputeConfig(device="cpu")


pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


def optimization(**changes: Any) -> Optimization:
    values = {"learning_rate": 1e-2, "weight_decay": 0.01, "schedule": "constant", "warmup_steps": 0, "total_steps": 9}
    return Optimization(**(values | changes))


def runtime(store: Path, seed: int = 0) -> Runtime:
    return Runtime(Store(store, say=lambda line: None), CPU, Display(Console(file=io.StringIO())), seed)


def train(adapted: Any, encoded: Sequence[Encoded], plan: Sequence[Sequence[int]], **options: Any) -> tuple[int, Any]:
    budget = TokenBudget(options.pop("tokens", 4096), options.pop("say", print))
    module = ProxyMember(adapted, options.pop("optimization", optimization()), budget, 0, options.pop("first_step", 0))
    shared = {"compute": CPU}
    return fit(module, encoded, plan, **(shared | options)), module


def weights_of(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lora.trainable_parameters(adapted).items()}


def multi_turn_examples() -> list[Encoded]:
    """Return examples of alternating prompts and responses; one has its first response after a single token."""
    masks = ["0011", "00110001101", "0100111", "01", "000000000001"]
    rng = np.random.default_rng(11)
    return [
        Encoded(
            row, 10 + row, rng.integers(0, VOCABULARY, len(mask)).astype(np.int32), np.array([m == "1" for m in mask])
        )
        for row, mask in enumerate(masks)
    ]


# ------------------------------------------------------------------------------------------ losses


def slow_token_losses(exact: Any, example: Encoded) -> torch.Tensor:
    """Return token losses (n,) float64: each response token is predicted from the tokens before it only."""
    losses = []
    for position in range(1, len(example.input_ids)):
        if example.is_response[position]:
            before = torch.tensor(example.input_ids[:position], dtype=torch.long)[None]
            logits = exact(input_ids=before).logits[0, -1]
            losses.append(-torch.log_softmax(logits, -1)[int(example.input_ids[position])])
    return torch.stack(losses)


def slow_losses(model: Any, examples: Sequence[Encoded]) -> np.ndarray:
    """Return losses (N,) float64, each the mean over the example's response tokens."""
    exact = exact_copy(model)
    with torch.no_grad():
        return np.array([float(slow_token_losses(exact, example).mean()) for example in examples])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_response_losses_equal_the_token_by_token_loop(architecture: str) -> None:
    model, examples = adapted_model(architecture, ["all-linear"]), multi_turn_examples()
    with torch.no_grad():
        losses = ResponseLosses(model)(collate(examples, 0))
    assert losses.dtype == torch.float32
    assert_close_by_norm(losses, slow_losses(model, examples), k=128, dim=())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_loss_does_not_depend_on_the_batch_it_is_in(architecture: str) -> None:
    model, examples = adapted_model(architecture, ["all-linear"]), multi_turn_examples()
    alone = slow_losses(model, examples)
    with torch.no_grad():
        for order in ([0, 1, 2, 3, 4], [4, 0], [3, 1], [2, 4, 1], [2]):
            for side in ("right", "left"):
                batch = collate([examples[i] for i in order], 5, padding_side=side)
                assert_close_by_norm(ResponseLosses(model)(batch), alone[order], k=128, dim=())


# --------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ("linear", 1, [0, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 3, [0, 1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ("cosine", 1, [0, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
    ],
)
def test_the_learning_rate_factor_by_hand(schedule: str, warmup: int, expected: list[float]) -> None:
    rate = optimization(schedule=schedule, warmup_steps=warmup, total_steps=5)
    assert [rate.factor(step) for step in range(6)] == pytest.approx(expected)
    assert rate.factor(50) == pytest.approx(expected[-1])  # beyond the end the rate neither turns negative nor rises


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_schedules_are_those_of_transformers(schedule: str, warmup: int) -> None:
    rate = optimization(schedule=schedule, warmup_steps=warmup, total_steps=20)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, 20)
    for step in range(20):
        assert rate.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.optimizer.step()
        theirs.step()


class Rates(L.Callback):
    """Records the learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(lambda stepped, *given: self.seen.append(stepped.param_groups[0]["lr"]))


@pytest.mark.parametrize("tokens", [4096, 1])
def test_training_follows_the_factor_by_optimiser_step_from_its_first_step(tokens: int) -> None:
    rate, rates = optimization(schedule="linear", warmup_steps=2, total_steps=6), Rates()
    plan = [[0, 1]] * 4
    steps, _ = train(
        adapted_model("gpt2", ["c_attn"]),
        ragged_examples(2),
        plan,
        optimization=rate,
        first_step=1,
        callbacks=[rates],
        tokens=tokens,
    )
    assert steps == 4
    assert rates.seen == pytest.approx([1e-2 * rate.factor(step) for step in (1, 2, 3, 4)])


def test_a_step_by_token_is_one_step_on_the_mean_over_its_tokens() -> None:
    """Batches of one example, clipped, against one float64 mean over all tokens of the step."""
    encoded, limit = ragged_examples(6), 0.5
    adapted, twin = (adapted_model("gpt2", ["all-linear"]) for _ in range(2))
    rate = optimization(loss="token", max_grad_norm=limit, weight_decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        gradients: list[dict[str, torch.Tensor]] = []
        patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: gradients.append(gradients_of(adapted)))
        train(adapted, encoded, [list(range(6))], optimization=rate, tokens=1)
    twin = exact_copy(twin)
    tokens = torch.cat([slow_token_losses(twin, example) for example in encoded])
    tokens.mean().backward()
    expected = torch.cat([gradient.flatten() for gradient in gradients_of(twin).values()])
    assert expected.norm() > 2 * limit
    computed = torch.cat([gradient.flatten() for gradient in gradients[0].values()])
    assert_close_by_norm(computed, expected * (limit / expected.norm()), 100)


def gradients_of(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in lora.trainable_parameters(adapted).items() if p.grad is not None}


# -------------------------------------------------------------------------------------- continuing


def proxy_config(**changes: Any) -> ProxyConfig:
    values = {
        "name": "tiny",
        "model": ModelConfig(path="tiny"),
        "lora": LoraConfig(rank=2),
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "batch_size": 4,
    }
    return ProxyConfig(**(values | changes))


def member_epoch(
    folder: Path,
    model: Any,
    config: ProxyConfig,
    encoded: Sequence[Encoded],
    epoch: int,
    previous: Path | None,
    advance: Callable[[int], None] = lambda done: None,
    compute: ComputeConfig = CPU,
) -> dict[str, Any]:
    """Train member 1 for one epoch in `folder`, from the state in `previous`."""
    folder.mkdir(exist_ok=True)
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0})()
    before = Artifact("member", previous, "fingerprint", {}) if previous else None
    own = replace(runtime(folder.parent / "store"), compute=compute)
    inputs = ProxyInputs(Backbone(model, tokenizer), encoded, TokenBudget(4096))
    unit = (member_settings(config, own, 1, epoch), before, folder)
    return train_members_epoch(own, config, inputs, [unit], advance)[0]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("collect", ["epoch_end", "during_training"])
def test_an_epoch_continued_from_disk_equals_training_without_a_stop(
    schedule: str, collect: str, tmp_path: Path
) -> None:
    config, encoded = proxy_config(schedule=schedule, collect=collect), ragged_examples(10)
    first = member_epoch(tmp_path / "1", tiny_model("gpt2"), config, encoded, 1, None)
    second = member_epoch(tmp_path / "2", tiny_model("gpt2"), config, encoded, 2, tmp_path / "1")
    assert first["optimizer_steps"] == second["optimizer_steps"] == 3

    lengths = [len(example.input_ids) for example in encoded]
    plans = [epoch_batches(lengths, 4, config.batching, derive_seed(0, "order", 1, epoch)) for epoch in (1, 2)]
    whole = lora.add_adapter(tiny_model("gpt2"), config.lora, derive_seed(0, "lora", 1))
    rate = optimization(schedule=schedule, warmup_steps=2, total_steps=6)
    train(whole, encoded, plans[0] + plans[1], optimization=rate)
    lora.save_adapter(whole, tmp_path / "whole")
    stopped, unstopped, early = ((tmp_path / name / lora.ADAPTER_FILE).read_bytes() for name in ("2", "whole", "1"))
    assert stopped == unstopped
    assert stopped != early


def test_an_epoch_is_the_same_in_one_process_and_after_a_restart(tmp_path: Path) -> None:
    config, encoded, kept = proxy_config(), ragged_examples(10), tiny_model("gpt2")  # GPT-2's own dropout is 0.1
    member_epoch(tmp_path / "1", kept, config, encoded, 1, None)
    member_epoch(tmp_path / "same", kept, config, encoded, 2, tmp_path / "1")
    member_epoch(tmp_path / "restart", tiny_model("gpt2"), config, encoded, 2, tmp_path / "1")
    same, restart = ((tmp_path / name / lora.ADAPTER_FILE).read_bytes() for name in ("same", "restart"))
    assert same == restart


def test_members_differ_and_leave_the_backbone_as_it_was(tmp_path: Path) -> None:
    model, encoded = tiny_model("gpt2"), ragged_examples(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    info = member_epoch(tmp_path / "1", model, proxy_config(collect="during_training"), encoded, 1, None)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = read_norms([Artifact("member", tmp_path / "1", "", {"info": info})])
    assert norms["row"].tolist() == list(range(6))
    assert norms["n_tokens"].tolist() == [int(example.is_response.sum()) for example in encoded]


def exact_steps(adapted: Any, encoded: Sequence[Encoded], plan: Sequence[Sequence[int]], rate: Optimization) -> Any:
    """Yield a float64 copy before each step and after the last, trained on whole steps with torch's AdamW."""
    exact = exact_copy(adapted)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(exact).values(), weight_decay=rate.weight_decay)
    for step, rows in enumerate(plan):
        yield exact
        optimizer.param_groups[0]["lr"] = rate.learning_rate * rate.factor(step)
        optimizer.zero_grad()
        batch = collate([encoded[row] for row in rows], 0)
        logits = exact(**batch.model_inputs()).logits.flatten(0, 1)[batch.places]
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        examples = batch.places // batch.input_ids.shape[1]
        means = torch.stack([losses[examples == place].mean() for place in range(len(rows))])
        (losses if rate.loss == "token" else means).mean().backward()
        if rate.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(lora.trainable_parameters(exact).values(), rate.max_grad_norm)
        optimizer.step()
    yield exact


def test_a_snapshot_of_untrained_weights_is_refused(tmp_path: Path) -> None:
    config = proxy_config(warmup_steps=1, batch_size=6)
    with pytest.raises(GradsiftError, match=r"proxy\.warmup_steps=1 starts at a learning rate of 0, and epoch 1"):
        member_epoch(tmp_path / "1", tiny_model("gpt2"), config, ragged_examples(6), 1, None)


@pytest.mark.parametrize("tokens", [1, 30, 4096])
def test_a_step_in_several_batches_equals_the_step_in_one(tokens: int) -> None:
    """Compare each matrix by its norm: Adam divides by a gradient's size, which amplifies rounding."""
    encoded, plan = ragged_examples(16), [list(range(8)), list(range(8, 16))]
    adapted = adapted_model("gpt2", ["all-linear"])
    before = weights_of(adapted)
    *_, exact = exact_steps(adapted, encoded, plan, optimization())
    expected = weights_of(exact)
    assert train(adapted, encoded, plan, tokens=tokens)[0] == 2
    for name, value in weights_of(adapted).items():
        assert not torch.equal(value, before[name])
        assert_close_by_norm(value, expected[name], k=1024)


@pytest.mark.parametrize("loss", ["example", "token"])
def test_a_training_curve_tells_each_steps_loss_and_tokens(loss: str) -> None:
    encoded, adapted = ragged_examples(5), adapted_model("gpt2", ["c_attn"])
    means = slow_losses(adapted, encoded[:2])
    counts = np.array([example.is_response.sum() for example in encoded[:2]])
    assert counts[0] != counts[1]
    first = (means * counts).sum() / counts.sum() if loss == "token" else means.mean()
    _, module = train(adapted, encoded, [[0, 1], [2, 3, 4]], optimization=optimization(loss=loss))
    lengths = [len(example.input_ids) for example in encoded]
    assert [entry["tokens"] for entry in module.curve] == [sum(lengths[:2]), sum(lengths[2:])]
    assert module.curve[0]["loss"] == pytest.approx(first, rel=1e-5)


# ------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_norms_during_training_are_those_of_each_steps_weights(architecture: str) -> None:
    encoded = ragged_examples(9)
    plan = [[4, 0, 7], [1, 8], [2, 3, 5, 6]]
    rate = optimization(schedule="linear", warmup_steps=1, total_steps=4)
    adapted = adapted_model(architecture, ["all-linear"])
    norms = GradientNormCallback()
    train(adapted, encoded, plan, optimization=rate, callbacks=[norms])

    expected = np.empty((9, 3))
    steps = exact_steps(adapted_model(architecture, ["all-linear"]), encoded, plan, rate)
    for rows, exact in zip(plan, steps, strict=False):
        expected[rows] = loop_norms(exact, [encoded[row] for row in rows])
    computed = np.stack([norms.records.columns(encoded)[name] for name in COLUMNS], 1)
    assert_norms_close(computed, expected)
    final = loop_norms(next(steps), encoded)
    assert np.abs(final / expected - 1).max() > 0.01  # or the weights hardly moved, and nothing was tested


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 13, 30, 61, 4096])
def test_norms_of_a_collection_pass_are_those_of_the_loop(architecture: str, tokens: int) -> None:
    encoded, adapted = ragged_examples(9), adapted_model(architecture, ["all-linear"])
    computed = collected(adapted, encoded, tokens)
    assert computed.dtype == np.float32
    assert_norms_close(computed, loop_norms(adapted, encoded))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_norms_of_a_loaded_model_are_those_of_plain_transformers_and_peft(architecture: str, backbones: Path) -> None:
    """The reference uses no part of the engine: not its layers, attention, head, GELU or losses."""
    run, config = runtime(backbones), ModelConfig(kind="nano", nano=NanoConfig(architecture=architecture, steps=20))
    made, encoded = backbone(run, config), ragged_examples(9)
    adapted = lora.add_adapter(load_backbone(made, config, CPU).model, LoraConfig(rank=3), seed=1)
    plain = AutoModelForCausalLM.from_pretrained(made.path).requires_grad_(False).eval()
    names = {name.rsplit(".", 1)[-1] for name, _ in lora.lora_layers(adapted)}
    theirs = peft.LoraConfig(r=3, lora_alpha=16, target_modules=list(names), fan_in_fan_out=architecture == "gpt2")
    twin = peft.get_peft_model(plain, theirs).eval()
    weights = lora.trainable_parameters(twin)
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(adapted).items():
        parameter.data.normal_(std=0.1)
        weights.pop(name).data.copy_(parameter)
    assert not weights
    assert_norms_close(collected(adapted, encoded, tokens=30), loop_norms(twin, encoded))


def collected(adapted: Any, encoded: Sequence[Encoded], tokens: int = 4096) -> np.ndarray:
    computed = collect_norms(adapted, encoded, TokenBudget(tokens), 0, CPU)
    return np.stack([computed[name] for name in COLUMNS], 1)


def test_what_is_collected_stands_in_the_examples_order_whatever_the_batches() -> None:
    encoded = [
        dataclasses.replace(example, row=row) for example, row in zip(ragged_examples(4), (7, 2, 9, 4), strict=True)
    ]
    batches = [([9], [90.0]), ([4, 7], [40.0, 70.0]), ([2], [20.0])]
    records = NormRecords()
    for rows, values in batches:
        column = torch.tensor(values)
        records.add(torch.tensor(rows), 0, column, column + 1, column + 2)
    columns = records.columns(encoded)
    assert [columns[name].tolist() for name in COLUMNS] == [
        [70, 20, 90, 40],
        [71, 21, 91, 41],
        [72, 22, 92, 42],
    ]
    records.add(torch.tensor([2]), 0, *torch.zeros(3, 1))
    with pytest.raises(GradsiftError, match="5 gradient norms for 4 examples"):
        records.columns(encoded)


def test_a_norm_that_is_not_finite_is_named_by_its_row_of_the_source() -> None:
    records = NormRecords()
    records.add(torch.tensor([1, 0]), 0, torch.tensor([torch.inf, 1.0]), torch.ones(2), torch.ones(2))
    with pytest.raises(GradsiftError, match="gradient norm of row 11 is not finite"):
        records.columns(ragged_examples(2))


@pytest.mark.parametrize("training", [True, False])
def test_a_collection_pass_leaves_mode_and_gradients_as_they_were(training: bool) -> None:
    adapted = adapted_model("gpt2", ["c_attn"]).train(training)
    modes = [module.training for module in adapted.modules()]
    collected(adapted, ragged_examples(3))
    assert [module.training for module in adapted.modules()] == modes
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert all(layer.probe is None for _, layer in lora.lora_layers(adapted))


def test_a_collection_pass_leaves_the_frozen_backbone_in_evaluation_mode() -> None:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=2, dropout=0.5), seed=0)
    modes = {name: module.training for name, module in adapted.named_modules()}
    assert set(modes.values()) == {True, False}  # the adapter trains, the backbone does not
    collected(adapted, ragged_examples(3))
    assert {name: module.training for name, module in adapted.named_modules()} == modes


def test_dropout_is_off_in_a_collection_pass() -> None:
    plain, dropped = (
        lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=2, dropout=dropout), seed=0) for dropout in (0.0, 0.5)
    )
    encoded = ragged_examples(3)
    np.testing.assert_array_equal(collected(dropped, encoded), collected(plain.eval(), encoded))


def test_a_norm_that_is_not_finite_names_the_row_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, adapted = ragged_examples(3), adapted_model("gpt2", ["c_attn"])
    norms = GradientNormCallback()
    take = NormProbe.take

    def poisoned_take(probe: NormProbe, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        norm_a, norm_b = take(probe, scale)
        return norm_a, norm_b * torch.tensor([1.0, float("nan"), float("inf")])

    monkeypatch.setattr(NormProbe, "take", poisoned_take)
    # of one length, so that they keep their order
    encoded = [
        Encoded(example.row, example.row_index, example.input_ids[:3], np.array([False, True, True]))
        for example in encoded
    ]
    with pytest.raises(GradsiftError, match="the gradient norm of row 11, 10 is not finite"):
        train(adapted, encoded, [[2, 1, 0]], callbacks=[norms])


@pytest.mark.parametrize("plan", [[[0, 1], [2]], [[0, 1], [2, 3], [3]]])
def test_an_example_without_exactly_one_norm_is_an_error(plan: list[list[int]]) -> None:
    encoded, adapted = ragged_examples(4), adapted_model("gpt2", ["c_attn"])
    norms = GradientNormCallback()
    train(adapted, encoded, plan, callbacks=[norms])
    with pytest.raises(GradsiftError, match="exactly one"):
        norms.records.columns(encoded)


@pytest.mark.parametrize("collect", ["epoch_end", "during_training"])
def test_bfloat16_runs_on_the_cpu_and_its_norms_are_finite_float32(collect: str) -> None:
    encoded = ragged_examples(6)
    adapted = lora.add_adapter(tiny_model("llama").to(torch.bfloat16), LoraConfig(rank=2), seed=1)
    norms = GradientNormCallback()
    compute = ComputeConfig(device="cpu", precision="bfloat16")
    train(adapted, encoded, [[0, 1, 2], [3, 4, 5]], callbacks=[norms], compute=compute)
    assert {value.dtype for value in weights_of(adapted).values()} == {torch.float32}
    table = norms.records.columns(encoded)
    computed = np.stack([table[name] for name in COLUMNS], 1)
    if collect == "epoch_end":
        computed = collected(adapted, encoded)
    assert computed.dtype == np.float32
    assert np.isfinite(computed).all()
    assert (computed[:, 1:] > 0).all()
    if collect == "epoch_end":  # and they are norms, to roundings of bfloat16
        exact = loop_norms(adapted.float().eval(), encoded)
        assert_close_by_norm(computed[:, 1], exact[:, 1], k=16, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------- stops


def poisoned(row: int, value: float) -> Any:
    """Return a `ResponseLosses` with `value` for one row."""

    class Poisoned(ResponseLosses):
        def __call__(self, batch: Any) -> torch.Tensor:
            return torch.where(batch.rows == row, torch.tensor(value), super().__call__(batch))

    return Poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("batches", "at_most"), [(3, 3), (40, 16)])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_its_row(
    value: float, batches: int, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, rates = ragged_examples(4), Rates()
    monkeypatch.setattr(modules, "ResponseLosses", poisoned(2, value))
    with pytest.raises(GradsiftError, match="the training loss of row 12 is not finite; lower the learning rate"):
        train(adapted_model("gpt2", ["c_attn"]), encoded, [[0, 1], [2], *[[1, 3]] * (batches - 2)], callbacks=[rates])
    assert len(rates.seen) <= at_most


def test_a_learning_rate_that_blows_up_stops_the_training() -> None:
    with pytest.raises(GradsiftError, match="not finite"):
        train(
            adapted_model("gpt2", ["c_attn"]),
            ragged_examples(4),
            [[0, 1], [2, 3]] * 3,
            optimization=optimization(learning_rate=1e30),
        )


def test_weights_that_the_last_step_broke_are_no_result() -> None:
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if len(module.curve) == 2:
                next(iter(lora.trainable_parameters(module.model).values())).data[0, 0] = torch.nan

    with pytest.raises(GradsiftError, match="weights are not finite after the last step"):
        train(adapted_model("gpt2", ["c_attn"]), ragged_examples(4), [[0, 1], [2, 3]], callbacks=[Breaks()])


def test_a_loss_that_is_not_finite_names_the_row_of_the_source(
    tmp_path: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tiny, loaded = nano_target(backbones)
    chosen = nano_examples(range(100, 104))
    monkeypatch.setattr(modules, "ResponseLosses", poisoned(2, float("nan")))
    with pytest.raises(GradsiftError, match="row 102 is not finite"):
        train_target(run, target_config(steps=2), load_backbone(loaded, tiny, CPU), chosen, tmp_path)


class CtrlC(L.Callback):
    """Raises what Ctrl-C raises, during a training."""

    def __init__(self, real_signal: bool) -> None:
        self._real_signal = real_signal

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self._real_signal:
            signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt


@pytest.fixture
def python_handler() -> Iterator[None]:
    """Install Python's own handler of Ctrl-C, which a shell's background jobs lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handler")
@pytest.mark.parametrize("real_signal", [True, False])
def test_ctrl_c_surfaces_and_the_next_one_works_again(real_signal: bool) -> None:
    encoded, adapted = ragged_examples(2), adapted_model("gpt2", ["c_attn"])
    norms = GradientNormCallback()
    with pytest.raises(KeyboardInterrupt):
        train(adapted, encoded, [[0], [1]], callbacks=[norms, CtrlC(real_signal)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(layer.probe is None for _, layer in lora.lora_layers(adapted))


def test_ctrl_c_leaves_the_callers_own_handler_in_place() -> None:
    def own(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, own)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(adapted_model("gpt2", ["c_attn"]), ragged_examples(2), [[0], [1]], callbacks=[CtrlC(True)])
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------ target


def target_config(**changes: Any) -> TargetConfig:
    values = {
        "name": "tiny",
        "model": ModelConfig(kind="nano", nano=NanoConfig(architecture="llama", steps=20)),
        "template": "plain",
        "max_length": 64,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }
    return TargetConfig(**(values | changes))


def nano_target(backbones: Path) -> tuple[Runtime, ModelConfig, Artifact]:
    run, config = runtime(backbones), target_config(steps=1).model
    return run, config, backbone(run, config)


def nano_examples(row_indices: Sequence[int] = range(5)) -> list[Example]:
    words = ["ba", "fi", "ku", "la", "ne", "po", "ra"]
    rows = [
        (i, {"instruction": "copy the following list", "input": " ".join(words[k:]), "output": " ".join(words[k:])})
        for k, i in enumerate(row_indices)
    ]
    return parse_rows(rows, "alpaca", FieldsConfig())[0]


def test_a_plan_of_epochs_holds_every_example_once_an_epoch() -> None:
    lengths = [3, 9, 4, 4, 7, 5, 6, 3, 8, 5]
    plan = batch_plan(lengths, target_config(epochs=3, batch_size=4), seed=0)
    assert len(plan) == 9
    epochs = [plan[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(chain.from_iterable(epoch)) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert plan != batch_plan(lengths, target_config(epochs=3, batch_size=4), seed=1)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_plan_of_steps_holds_exactly_these(steps: int) -> None:
    lengths = [3, 9, 4, 4, 7, 5, 6, 3, 8, 5]
    plan = batch_plan(lengths, target_config(steps=steps, batch_size=4), seed=0)
    assert len(plan) == steps
    endless = batch_plan(lengths, target_config(epochs=9, batch_size=4), seed=0)
    assert plan == endless[:steps]  # passes follow each other; the last one is cut


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_a_tuned_target_comes_back_from_disk_as_it_was(tmp_path: Path, backbones: Path) -> None:
    run, model, made = nano_target(backbones)
    config = target_config(steps=3)
    trained = load_backbone(made, model, CPU)
    untouched = logits_of(trained.model)
    info = train_target(run, config, trained, nano_examples(), tmp_path)
    assert (info["optimizer_steps"], info["rows"]) == (3, 5)
    tuned = Artifact("finetune", tmp_path, "fingerprint", {})
    restored = logits_of(load_tuned(run, config, made, tuned).model)
    torch.testing.assert_close(restored, logits_of(trained.model.eval()), rtol=0, atol=0)
    assert (restored - untouched).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(load_tuned(run, config, made, None).model), untouched, rtol=0, atol=0)


def test_a_selection_without_a_response_token_is_refused(tmp_path: Path, backbones: Path) -> None:
    run, model, made = nano_target(backbones)
    silent = [replace(example, output=" ") for example in nano_examples()]
    with pytest.raises(GradsiftError, match="no selected example has a response token"):
        train_target(run, target_config(steps=2), load_backbone(made, model, CPU), silent, tmp_path)
