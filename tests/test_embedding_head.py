"""Laws of the gradients of embedding and head: they equal autograd's for single examples and separate tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE
from exactness import assert_close_by_norm, exact_copy
from test_engine import capped_model
from test_ensembles import given
from test_finetuning import proxy_config, runtime
from test_norms import adapted_model, ragged_examples, tiny_model

from gradsift.artifacts import Artifact
from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients import embedding_head
from gradsift.gradients.embedding_head import (
    COLUMNS,
    UseOfEmbedding,
    collect_statistics,
    embedding_gradients,
    embedding_statistics,
    read_embedding_gradients,
)
from gradsift.journal import Journal
from gradsift.proxy.ensemble import train_members
from gradsift.training import lora
from gradsift.training.device import TokenBudget

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

CASES = [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)]


def computed(adapted: Any, examples: list[Encoded], tokens: int = 4096) -> np.ndarray:
    return collect_statistics(adapted, examples, TokenBudget(tokens), 0)


def whole_gradients(adapted: Any, examples: list[Encoded]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the statistics in float64: each example alone, with two tensors for the two uses, and V x D gradients."""
    exact = exact_copy(adapted)
    causal = exact.get_base_model()
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    kept = embedding.weight.detach(), head.weight.detach()
    gradients = []
    for example in examples:
        embedding.weight = torch.nn.Parameter(kept[0].clone())
        head.weight = torch.nn.Parameter(kept[1].clone())
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        logits = exact(input_ids=ids).logits[0, :-1]
        predicted = torch.tensor(example.is_response[1:])
        torch.nn.functional.cross_entropy(logits[predicted], ids[0, 1:][predicted]).backward()
        gradients.append((embedding.weight.grad, head.weight.grad))
    return gradients


def of_all_entries(gradient: torch.Tensor) -> list[float]:
    return [f(gradient).item() for f in (torch.max, torch.min, torch.mean)] + [gradient.std(correction=0).item()]


def expected(adapted: Any, examples: list[Encoded]) -> np.ndarray:
    pairs = whole_gradients(adapted, examples)
    return np.array([of_all_entries(first) + of_all_entries(second) for first, second in pairs])


def agree(computed: np.ndarray, exact: np.ndarray) -> None:
    """The largest and the smallest entry of a gradient relative to both together, and so its mean and its deviation.

    In the mean nearly everything cancels, so that it is known to roundings of the deviation. A normalisation layer
    that meets an almost constant embedding multiplies what was rounded in the embedding's gradient.
    """
    assert (exact[:, [0, 3, 4, 7]] > 1e-4).all()  # or the comparison would be of noise
    for use, k in ((slice(0, 4), 16384), (slice(4, 8), 512)):
        pairs = (values[:, use].reshape(-1, 2) for values in (computed, exact))
        assert_close_by_norm(*pairs, k, dim=-1, dtype=torch.float32)


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_statistics_are_those_of_autograds_matrices(architecture: str, tied: bool) -> None:
    adapted, examples = adapted_model(architecture, ["all-linear"], tied), ragged_examples(9)
    assert len(COLUMNS) == 8
    agree(computed(adapted, examples), expected(adapted, examples))


def test_a_pass_that_was_cut_short_takes_what_its_journal_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples(9)

    def taken() -> np.ndarray:
        return collect_statistics(adapted, examples, TokenBudget(30), 0, journal=Journal(tmp_path))

    whole, plain, left = computed(adapted, examples, 30), UseOfEmbedding.statistics, [2]

    def counted(uses: UseOfEmbedding, *given: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(uses, *given)

    monkeypatch.setattr(UseOfEmbedding, "statistics", counted)
    with pytest.raises(KeyboardInterrupt):
        taken()
    left[0] = 100
    np.testing.assert_allclose(taken(), whole, rtol=1e-6, atol=1e-12)
    batches = 100 - left[0]
    left[0] = 100
    computed(adapted, examples, 30)
    assert batches == 100 - left[0] - 1


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("chunk", [16, 7 * 16, 10**6])
def test_neither_batches_nor_chunks_of_the_vocabulary_change_anything(
    tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples(9)
    whole = expected(adapted, examples)
    monkeypatch.setattr(embedding_head, "_CHUNK", chunk)
    agree(computed(adapted, examples, tokens), whole)
    order = [4, 0, 8, 2, 1, 7, 3, 6, 5]
    agree(computed(adapted, [examples[i] for i in order], tokens), whole[order])


@pytest.mark.parametrize(("vocabulary", "rows_of_zeros"), [(31, True), (30, False)])
def test_the_zeros_of_absent_tokens_count_where_there_are_any(vocabulary: int, rows_of_zeros: bool) -> None:
    batch = collate([Encoded(0, 10, np.arange(30, dtype=np.int32), np.arange(30) > 3)], 0)
    backprops = torch.rand(1, 30, 4) + 0.5
    smallest = embedding_statistics(batch, backprops, vocabulary)[0, 1].item()
    largest = embedding_statistics(batch, -backprops, vocabulary)[0, 0].item()
    assert smallest == -largest == (0 if rows_of_zeros else backprops.min().item())


def test_the_embeddings_statistics_by_hand() -> None:
    """Tokens 5, 7, 5 of a vocabulary of 8, and padding: row 5 is the sum of two places, six rows are zero."""
    examples = [
        Encoded(0, 10, np.array([5, 7, 5], dtype=np.int32), np.array([False, True, True])),
        Encoded(1, 11, np.array([1, 2], dtype=np.int32), np.array([False, True])),
    ]
    backprops = torch.tensor([[[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], [[-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]])
    batch = collate(examples, 5)  # the pad id is a real token too
    values = embedding_statistics(batch, backprops, 8)
    squares = 4.0**2 + 1.0**2 + 0.5**2
    mean = 3.5 / 16
    assert values[0].tolist() == pytest.approx([4.0, -1.0, mean, (squares / 16 - mean**2) ** 0.5])
    assert values[1].tolist() == pytest.approx([0.0, -1.0, -2 / 16, (2 / 16 - (2 / 16) ** 2) ** 0.5])


def test_of_a_tied_tensor_both_uses_are_counted() -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"], tied=True), ragged_examples(3)
    causal = adapted.get_base_model()
    assert causal.get_input_embeddings().weight is causal.get_output_embeddings().weight
    pairs, exact = whole_gradients(adapted, examples), exact_copy(adapted)
    weight = exact.get_base_model().get_input_embeddings().weight.requires_grad_()
    for example, (first, second) in zip(examples, pairs, strict=True):
        ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
        predicted = torch.tensor(example.is_response[1:])
        logits = exact(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[predicted], ids[0, 1:][predicted])
        (both,) = torch.autograd.grad(loss, weight)
        assert_close_by_norm(both, first + second, k=4096)  # both in float64


def test_the_heads_mean_is_zero_and_so_is_autograds_but_for_rounding() -> None:
    adapted, examples = adapted_model("llama", ["all-linear"], tied=False), ragged_examples(5)
    assert (computed(adapted, examples)[:, 6] == 0).all()
    assert np.abs(expected(adapted, examples)[:, 6]).max() < 1e-15


def test_bfloat16_statistics_are_float32s_to_bfloat16s_digits() -> None:
    examples, half = ragged_examples(9), adapted_model("llama", ["all-linear"])
    exact = computed(adapted_model("llama", ["all-linear"]), examples)
    half.get_base_model().to(torch.bfloat16)
    for parameter in lora.trainable_parameters(half).values():
        parameter.data = parameter.data.float()
    rough = computed(half, examples)
    spread = np.median(np.abs(rough[:, [3, 7]] / exact[:, [3, 7]] - 1))
    assert 1e-5 < spread < 0.03


def test_dropout_is_off_and_nothing_is_left_behind() -> None:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=2, dropout=0.5), seed=1)
    for parameter in lora.trainable_parameters(adapted).values():
        parameter.data.normal_(std=0.3)
    examples = ragged_examples(5)
    assert np.array_equal(computed(adapted, examples), computed(adapted, examples))
    assert all(layer.lora_dropout.training for _, layer in lora.lora_layers(adapted))
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert not adapted.get_base_model().get_input_embeddings()._forward_hooks


def test_memory_that_runs_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, examples, said = adapted_model("gpt2", ["c_attn"]), ragged_examples(9), []
    statistics = UseOfEmbedding.statistics

    def small(self: Any, batch: Any) -> Any:
        if batch.input_ids.numel() > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return statistics(self, batch)

    monkeypatch.setattr(UseOfEmbedding, "statistics", small)
    again = collect_statistics(adapted, examples, TokenBudget(1000, said.append), 0)
    agree(again, expected(adapted, examples))
    assert said


def test_a_model_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(GradsiftError, match="Gemma2ForCausalLM scales or caps"):
        computed(capped_model(), ragged_examples(2))


def test_a_gradient_that_is_no_number_names_its_row() -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples(3)
    lengths = [len(example.input_ids) for example in examples]
    longest = int(np.argmax(lengths))
    assert sorted(lengths)[-2] < max(lengths)
    adapted.get_base_model().transformer.wpe.weight.data[max(lengths) - 1 :] = torch.nan
    examples[longest].is_response[-1] = True
    with pytest.raises(GradsiftError, match=f"gradient of row {10 + longest} is not finite"):
        computed(adapted, examples, tokens=1)  # padding would meet the NaN too


# -------------------------------------------------------------------------------------------- stage


def test_the_stage_reads_one_members_first_epoch_and_is_done_once(tmp_path: Path) -> None:
    run, config, encoded = runtime(tmp_path), proxy_config(members=1), ragged_examples(8)

    def stage(count: int = 9) -> Artifact:
        made_from = given(run, config, encoded)
        ((member,),) = train_members(made_from, [0], 1).values()
        return embedding_gradients(made_from, member, count)

    made = stage()
    values = read_embedding_gradients(made)
    assert values.head_std.shape == (9,)
    assert np.isnan(values.head_std[8])  # an example that was not encoded
    adapted = lora.add_adapter(tiny_model("gpt2"), config.lora, seed=5)
    member = next(record for record in run.store.records if record.name == "member")
    lora.load_adapter(adapted, Path(member.artifact))
    agree(np.stack([getattr(values, name)[:8] for name in COLUMNS], 1), expected(adapted.eval(), encoded))
    assert stage().path == made.path
    assert [record.name for record in run.store.records].count("embedding_gradients") == 1
    assert [record.name for record in run.store.records].count("member") == 1


def test_a_scorer_that_asks_for_them_trains_one_epoch_of_one_member(gradsift, monkeypatch: pytest.MonkeyPatch) -> None:
    (gradsift.folder / "head_scores.py").write_text(
        "from gradsift.scoring.scores import Scores\n"
        "def smallest(embedding_gradients):\n"
        "    return Scores(-embedding_gradients.head_std)\n"
    )
    monkeypatch.syspath_prepend(str(gradsift.folder))
    own = (*SMOKE, "~scorer", "+scorer={_target_: head_scores.smallest, name: smallest}", "stop_after=selection")
    assert gradsift(*own) == 0
    made = [(s["name"], s["optimizer_steps"]) for s in gradsift.runs()[-1]["stages"] if not s["reused"]]
    assert [name for name, _ in made] == ["load", "member", "embedding_gradients", "score", "select"]
    assert sum(steps for _, steps in made) == 4  # 120 rows in batches of 32, once
    assert gradsift(*own[:-3], "scorer=late_loss", "proxy.members=1", "stop_after=scores") == 0
    again = [s["name"] for s in gradsift.runs()[-1]["stages"] if not s["reused"]]
    assert again.count("member") == 1  # the second epoch; the first is reused
