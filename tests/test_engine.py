"""Laws of the gradient engine: fast layers equal peft's, the fast head equals the model's, memory changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_finetuning import exact_steps, optimization, train, weights_of
from test_norms import (
    VOCABULARY,
    adapted_model,
    assert_norms_close,
    batch_norms,
    loop_norms,
    ragged_examples,
    tiny_model,
)
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.activations import NewGELUActivation

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.callback import COLUMNS, GradientNormCallback
from gradsift.gradients.per_sample import attached
from gradsift.gradients.probes import NormProbe
from gradsift.proxy.collection import collect_norms
from gradsift.training import head as head_module
from gradsift.training import lora, modules
from gradsift.training.adapted import AdaptedLinear
from gradsift.training.device import TokenBudget, is_out_of_memory
from gradsift.training.head import OutputHead, ResponseLosses, token_losses
from gradsift.training.numerics import prepare

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

# ----------------------------------------------------------------------------------------- the layer


def gradients(adapted: Any, examples: list[Encoded]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)  # the dropout masks
    ResponseLosses(adapted)(collate(examples, 0)).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in lora.trainable_parameters(adapted).items()}


def exact_gradients(exact: Any, examples: list[Encoded]) -> dict[str, torch.Tensor]:
    """Return the same as `gradients`, from all logits of an `exact_copy`."""
    torch.manual_seed(7)
    batch = collate(examples, 0)
    logits = exact(**batch.model_inputs()).logits.flatten(0, 1)[batch.places]
    nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    rows = batch.places // batch.input_ids.shape[1]
    sum((nll[rows == row].sum() / count for row, count in enumerate(batch.counts))).div(len(examples)).backward()
    return {name: parameter.grad.clone() for name, parameter in lora.trainable_parameters(exact).items()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", [["all-linear"], ["c_attn", "q_proj"]])
@pytest.mark.parametrize("norms", [True, False])
def test_an_adapted_layer_computes_what_pefts_does(architecture: str, targets: list[str], norms: bool) -> None:
    fast, slow = adapted_model(architecture, targets), exact_copy(adapted_model(architecture, targets))
    assert all(isinstance(layer, AdaptedLinear) for _, layer in lora.lora_layers(fast))
    ids = torch.randint(VOCABULARY, (3, 11))
    assert_close_by_norm(fast(input_ids=ids).logits, slow(input_ids=ids).logits, k=32)
    expected = exact_gradients(slow, ragged_examples())
    if norms:
        with attached(fast, NormProbe()):
            computed = gradients(fast, ragged_examples())
    else:
        computed = gradients(fast, ragged_examples())
    assert computed.keys() == expected.keys()
    for name, gradient in expected.items():
        # a normalisation layer that meets an almost constant vector multiplies what was rounded before it
        assert_close_by_norm(computed[name], gradient, k=2048)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_dropout_drops_what_pefts_does(architecture: str) -> None:
    fast, slow = (lora.add_adapter(tiny_model(architecture), LoraConfig(rank=3, dropout=0.4), seed=1) for _ in range(2))
    for adapted in (fast, slow):
        torch.manual_seed(2)
        for name, parameter in lora.trainable_parameters(adapted).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    expected = exact_gradients(exact_copy(slow), ragged_examples())
    computed = gradients(fast, ragged_examples())
    without = gradients(fast.eval(), ragged_examples())
    for name, gradient in expected.items():
        assert_close_by_norm(computed[name], gradient, k=2048)
    assert any((without[name] - gradient).abs().max() > 1e-3 for name, gradient in expected.items())


def test_a_layer_whose_adapter_is_off_or_merged_is_pefts() -> None:
    adapted, ids = adapted_model("gpt2", ["c_attn"]), torch.arange(9)[None]
    with_adapter = exact_copy(adapted)(input_ids=ids).logits
    with adapted.disable_adapter():
        assert_close_by_norm(adapted(input_ids=ids).logits, exact_copy(tiny_model("gpt2"))(input_ids=ids).logits, k=32)
    adapted.merge_adapter()
    assert_close_by_norm(adapted(input_ids=ids).logits, with_adapter, k=32)


def test_examples_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(GradsiftError, match=r"lora\.targets"):
        NormProbe().of("layer", torch.zeros(4, 5))


def test_layers_that_see_other_examples_or_are_passed_twice_are_refused() -> None:
    probe = NormProbe()
    probe.of("first", torch.zeros(1, 4, 5))
    with pytest.raises(GradsiftError, match="3 examples where another layer saw 1"):
        probe.of("second", torch.zeros(3, 4, 5))
    with pytest.raises(GradsiftError, match="passed twice"):
        probe.of("first", torch.zeros(1, 4, 5))
    probe.forget()
    probe.of("first", torch.zeros(3, 4, 5))  # a new pass


def test_layers_that_are_not_plain_have_no_norms() -> None:
    adapted = adapted_model("gpt2", ["c_attn"])
    for _, layer in lora.lora_layers(adapted):
        layer.__class__ = peft.tuners.lora.Linear
        layer.get_base_layer().register_forward_hook(lambda *values: None)  # may change what the layer computes
    with (
        pytest.raises(GradsiftError, match="plain LoRA on frozen linear layers"),
        attached(adapted, NormProbe()),
    ):
        pass


def test_a_pass_that_did_not_end_leaves_no_norm_behind() -> None:
    adapted, examples = adapted_model("gpt2", ["c_attn"]), ragged_examples(4)
    with attached(adapted, NormProbe()) as norms:
        ResponseLosses(adapted)(collate(examples[:3], 0))  # forward only, of another size
        norms.forget()
        ResponseLosses(adapted)(collate(examples, 0)).sum().backward()
        assert norms.take()[0].shape == (4,)


# ------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_heads_losses_and_their_gradient_are_those_of_all_logits(
    architecture: str, tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, tied)
    monkeypatch.setattr(head_module, "_CHUNK_LOGITS", chunk * VOCABULARY)
    head = OutputHead.of(model)
    assert head is not None
    targets = torch.randint(VOCABULARY, (12,))
    hidden = torch.randn(12, 16, requires_grad=True)
    weights = torch.rand(12)
    computed = head.token_losses(hidden, targets)
    (gradient,) = torch.autograd.grad((computed * weights).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ head.weight.double().t(), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert_close_by_norm(computed, expected, k=32, dim=())
    assert_close_by_norm(gradient, expected_gradient, k=32, dim=-1)


def test_a_head_in_bfloat16_predicts_no_word_of_its_padding() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    head = OutputHead.of(model)
    assert head is not None
    assert len(head.weight) == 64 > VOCABULARY
    hidden = (torch.randn(9, 16) - 3).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(VOCABULARY, (9,))
    computed = head.token_losses(hidden, targets)
    computed.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    weight = head.weight[:VOCABULARY].double()
    expected = torch.nn.functional.cross_entropy(exact @ weight.t(), targets, reduction="none")
    expected.sum().backward()
    assert_close_by_norm(computed, expected, k=4, dim=(), dtype=torch.bfloat16)
    assert_close_by_norm(hidden.grad, exact.grad, k=8, dim=-1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bfloat16_head_rounds_what_logits_differ_by_and_not_what_they_are(bias: bool) -> None:
    """Likely words have logits of about 40, where bfloat16 has steps of .25."""
    torch.manual_seed(0)
    embedding = torch.nn.Linear(32, 61, bias=bias).requires_grad_(False)
    embedding.weight.mul_(0.5)
    embedding.weight[:, 0] += 5
    embedding = embedding.to(torch.bfloat16)
    head = OutputHead(torch.nn.Identity(), embedding)
    hidden = torch.randn(50, 32)
    hidden[:, 0] = 8
    hidden = hidden.to(torch.bfloat16).requires_grad_()
    targets = torch.randint(61, (50,))
    computed = head.token_losses(hidden, targets)
    computed.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    logits = embedding.double()(exact)
    assert 35 < logits.min() < logits.max() < 50
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    rounded = torch.nn.functional.cross_entropy(logits.to(torch.bfloat16).double(), targets, reduction="none")
    assert (computed - expected).norm() < 0.1 * (rounded - expected).norm()
    assert_close_by_norm(computed, expected, k=1, dtype=torch.bfloat16)
    assert_close_by_norm(hidden.grad, exact.grad, k=8)


def test_a_head_may_be_used_without_and_then_with_gradients() -> None:
    model, targets = tiny_model("gpt2"), torch.tensor([1, 2])
    head = OutputHead.of(model)
    assert head is not None
    with torch.inference_mode():
        first = head.token_losses(torch.ones(2, 16), targets)
    hidden = torch.ones(2, 16, requires_grad=True)
    second = head.token_losses(hidden, targets)
    second.sum().backward()
    torch.testing.assert_close(first.clone(), second.detach())
    assert hidden.grad is not None


def capped_model() -> Any:
    """Gemma 2 caps its logits, so its head cannot be applied separately."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=VOCABULARY, **shape, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0
    )
    model = Gemma2ForCausalLM(config).requires_grad_(False).eval()
    adapted = lora.add_adapter(model, LoraConfig(rank=2), seed=1)
    for name, parameter in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted.eval()


def test_a_model_that_changes_its_logits_is_trained_on_them_all() -> None:
    adapted, examples = capped_model(), ragged_examples()
    assert OutputHead.of(adapted) is None
    assert_norms_close(batch_norms(adapted, examples, 3), loop_norms(adapted, examples))


def test_a_head_that_is_adapted_itself_is_not_passed_by() -> None:
    adapted = lora.add_adapter(tiny_model("llama", tied=False), LoraConfig(rank=2, targets=["lm_head"]), seed=1)
    assert OutputHead.of(adapted) is None
    examples = ragged_examples(5)
    norms = batch_norms(adapted.eval(), examples, 5)
    assert_close_by_norm(norms[:, 1:], loop_norms(adapted, examples)[:, 1:], k=2048, dim=())


def test_token_losses_need_no_head() -> None:
    model, ids = tiny_model("gpt2"), torch.randint(VOCABULARY, (2, 6))
    places, targets = torch.tensor([0, 4, 8]), torch.tensor([3, 1, 60])
    logits = exact_copy(model)(input_ids=ids).logits.flatten(0, 1)[places]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        for head in (OutputHead.of(model), None):
            assert_close_by_norm(token_losses(model, head, {"input_ids": ids}, places, targets), expected, 32, dim=())


def test_gelu_in_one_kernel_is_the_same_function() -> None:
    model, ids = tiny_model("gpt2"), torch.randint(VOCABULARY, (2, 6))
    before = exact_copy(model)(input_ids=ids).logits
    prepare(model, ComputeConfig(device="cpu"))
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert_close_by_norm(model(input_ids=ids).logits, before, k=32)


# ----------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_most_bfloat16_norms_are_float32s_to_bfloat16s_digits(architecture: str) -> None:
    examples = ragged_examples(9)
    exact = loop_norms(adapted_model(architecture, ["all-linear"]), examples)
    half = adapted_model(architecture, ["all-linear"])
    half.get_base_model().to(torch.bfloat16)
    for parameter in lora.trainable_parameters(half).values():
        parameter.data = parameter.data.float()
    rough = batch_norms(half, examples, 9)
    # at the median: the norm of a row can be ill-conditioned, so that rounding the weights alone moves it by half
    assert 1e-5 < np.median(np.abs(rough / exact - 1)) < 0.03


# -------------------------------------------------------------------------------------------- memory


def failing_above(tokens: int, error: Exception) -> type[ResponseLosses]:
    """Return a `ResponseLosses` that fails with `error` for batches of more than `tokens`."""

    class Small(ResponseLosses):
        def __call__(self, batch: Any) -> torch.Tensor:
            losses = super().__call__(batch)
            if batch.input_ids.numel() > tokens:
                losses.sum().backward()  # fails in the middle: gradients and norms were already written
                raise error
            return losses

    return Small


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"),
    MemoryError(),
]


def test_a_real_failure_to_allocate_is_known_for_what_it_is() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_budget_says_so_and_changes_no_result(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, plan, said = ragged_examples(9), [[4, 0, 7, 1], [8, 2, 3, 5, 6]], []
    adapted, expected = adapted_model("gpt2", ["all-linear"]), np.empty((9, 3))
    steps = exact_steps(adapted, encoded, plan, optimization())
    for rows, exact in zip(plan, steps, strict=False):
        expected[rows] = loop_norms(exact, [encoded[row] for row in rows])
    trained = weights_of(next(steps))
    monkeypatch.setattr(modules, "ResponseLosses", failing_above(30, error))
    norms = GradientNormCallback()
    train(adapted, encoded, plan, callbacks=[norms], say=said.append)
    assert_norms_close(np.stack([norms.records.columns(encoded)[name] for name in COLUMNS], 1), expected)
    for name, value in weights_of(adapted).items():
        assert_close_by_norm(value, trained[name], k=1024)
    assert said
    assert "memory ran out with" in said[0]
    assert "the batch is repeated with" in said[0]


def test_dropout_is_the_same_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's masks do not depend on the batch, so those of a step that was repeated in smaller ones are the same."""
    adapters, budgets = [], []
    for losses in (ResponseLosses, failing_above(30, OUT_OF_MEMORY[0])):
        monkeypatch.setattr(modules, "ResponseLosses", losses)
        adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=3, dropout=0.4), seed=1)
        _, module = train(adapted, ragged_examples(8), [list(range(8))], say=lambda line: None)
        budgets.append(module.budget.tokens)
        adapters.append(weights_of(adapted))
    assert budgets[0] == 4096 and budgets[1] <= 30
    for name, value in adapters[0].items():
        assert_close_by_norm(adapters[1][name], value.double(), k=2048)


def test_out_of_memory_in_a_collection_pass_changes_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, adapted, said = ragged_examples(9), adapted_model("llama", ["all-linear"]), []
    monkeypatch.setattr(modules, "ResponseLosses", failing_above(30, OUT_OF_MEMORY[0]))
    budget = TokenBudget(1000, said.append)
    computed = collect_norms(adapted, encoded, budget, 0, ComputeConfig(device="cpu"))
    assert_norms_close(np.stack([computed[name] for name in COLUMNS], 1), loop_norms(adapted, encoded))
    assert said
    assert budget.tokens <= 30


def test_a_single_example_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "ResponseLosses", failing_above(2, OUT_OF_MEMORY[0]))
    with pytest.raises(GradsiftError, match=r"single example of 1\d tokens; lower max_length"):
        train(adapted_model("gpt2", ["c_attn"]), ragged_examples(4), [[0, 1, 2, 3]], say=lambda line: None)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "ResponseLosses", failing_above(2, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(adapted_model("gpt2", ["c_attn"]), ragged_examples(4), [[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("asked", "hidden", "expected"), [(None, 768, 512), (None, 16, 24576), (None, 4096, 256), (77, 768, 77)]
)
def test_a_budget_suits_the_model_where_none_is_asked_for(asked: int | None, hidden: int, expected: int) -> None:
    model: Callable[..., Any] = type("Model", (torch.nn.Linear,), {})
    layer = model(2, 2)
    layer.config = type("Config", (), {"hidden_size": hidden})()
    assert TokenBudget.of(layer, asked, print).tokens == expected
