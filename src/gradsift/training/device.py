"""The device, and the token budget: the largest number of tokens that pass through a model at once.

The budget on a GPU follows from the computed memory of a LoRA training (`tests/test_memory.py` compares this memory
with what autograd keeps). The forward pass keeps the tensors that the backward pass reads. For each frozen block, these
are:

    the residual stream before each normalisation layer
    the queries, keys, values and outputs of attention (a fused kernel keeps no attention scores)
    three tensors of the MLP's intermediate size (GPT-2: one)
    the inputs of the layers that have an adapter

With activation checkpointing only the residual stream before each block is kept. The backward pass recomputes the other
tensors, for one block at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gradsift.config import ComputeConfig
from gradsift.cost import passed
from gradsift.data.batching import by_length, spread_out
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.journal import Journal
from gradsift.runtime import Advance, weighed

T = TypeVar("T")
_GPU_TOKENS = 16384  # largest budget on a GPU: more tokens at once are no faster
# When memory runs out, torch does not always raise an `OutOfMemoryError`. These are parts of the messages of its other
# exceptions: on a CPU under Linux, on a CPU under other systems, and in cuBLAS.
_SIGNS = ("allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")
_halved: dict[Any, int] = {}  # halved budgets by `kind`; later stages and jobs of this process start with them
_CPU_ACTIVATION = 393_216  # numbers in a (tokens, hidden size) activation that still fit a CPU core's cache
_GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types whose kept activations are known, besides gpt2
_STREAM = 4  # bytes of a number in the residual stream, which is float32 (`gradsift.training.residual`)
# The inputs of an adapted layer are kept: the hidden states before attention or before the MLP, or the MLP's inner
# activations. (GPT-2's attention has a c_proj too, but the outputs of attention are kept in any case.)
_READ_IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "c_attn"}
_READ_IN_MLP = {"gate_proj", "up_proj", "c_fc"}
_READ_WIDE = {"down_proj", "c_proj"}
_SHARE = 0.8  # share of a GPU's memory to use; the rest is for chunks of logits and gradients, buffers and fragments
_ROOM = 4096  # tokens at once that keep a GPU busy; if fewer fit, recomputing activations saves more time than it costs


class TokenBudget:
    """The largest number of tokens, padding included, that pass through a model at once.

    The budget is halved whenever memory runs out. Results depend on the budget only by rounding.
    """

    def __init__(self, tokens: int, say: Callable[[str], None] = print, kind: Any = None) -> None:
        self.tokens = tokens
        self.say = say
        self._kind = kind  # key in `_halved`, the same for equal models and memory; None: halved budgets are not kept

    @classmethod
    def of(cls, model: Any, tokens: int | None, say: Callable[[str], None]) -> TokenBudget:
        """Return a budget of `tokens` or, if `tokens` is None, of a number that suits the model and its device."""
        if tokens is not None:
            return cls(tokens, say)
        parameter = next(model.parameters())
        hidden = int(getattr(model.config, "hidden_size", None) or parameter.shape[-1])
        if parameter.device.type != "cuda":
            return cls(max(256, _CPU_ACTIVATION * tokens_factor(model) // hidden), say)
        memory = torch.cuda.get_device_properties(parameter.device).total_memory
        fitting = fitting_tokens(model, memory, checkpointed=is_checkpointed(model))
        kind = (type(model).__name__, hidden, fitting)
        most = _GPU_TOKENS if fitting is None else max(256, min(_GPU_TOKENS, fitting))
        return cls(min(most, _halved.get(kind, most)), say, kind)

    def run(self, work: Callable[[int], T], lengths: Sequence[int]) -> T:
        """Return `work(tokens)`, where `tokens` is the budget; halve the budget and repeat if memory runs out.

        Args:
            work: function whose argument is the largest number of tokens at once. If memory runs out, `work` must not
                leave a partial result.
            lengths: number of tokens of each example that `work` passes through the model; their sum is added to the
                tokens that `gradsift.cost` counts.

        Raises:
            GradsiftError: memory runs out even with a single example at once.
        """
        while True:
            try:
                result = work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                passed(sum(lengths))
                return result
            # after the handler, in which the exception still holds the tensors of the failed pass
            longest = max(lengths)
            used = min(self.tokens, longest * len(lengths))
            if used <= longest:
                raise GradsiftError(
                    f"memory ran out with a single example of {longest:,} tokens; lower max_length, take a smaller "
                    "model, or take compute.precision=bfloat16"
                )
            self.tokens = max(used // 2, longest)
            if self._kind is not None:
                _halved[self._kind] = self.tokens
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(
                f"  memory ran out with {used:,} tokens at once; the batch is repeated with {self.tokens:,} "
                f"(compute.tokens={self.tokens} starts with that)"
            )

    def passes(
        self,
        examples: Sequence[Encoded],
        work: Callable[[list[Encoded]], T],
        journal: Journal | None = None,
        advance: Advance = lambda done: None,
    ) -> Iterator[list[T]]:
        """Divide the examples into groups of similar length, and yield for each group what the method `group` returns.

        Args:
            work: see `group`.
            journal: see `group`.
            advance: called after each group to advance a bar that counts examples; the group's share of the bar is its
                share of all tokens.
        """
        advance_by_tokens = weighed(advance, len(examples), sum(len(example.input_ids) for example in examples))
        for group in spread_out(by_length(examples, self.tokens)):
            yield self.group(group, work, journal)
            advance_by_tokens(sum(len(example.input_ids) for example in group))

    def group(
        self, examples: Sequence[Encoded], work: Callable[[list[Encoded]], T], journal: Journal | None = None
    ) -> list[T]:
        """Pass the examples to `work` in batches that fit the budget, and return what `work` returns for each batch.

        If memory runs out, all batches are repeated with a smaller budget. Results that `journal` keeps from an
        interrupted pass are not computed again.
        """

        def batch_by_batch(tokens: int) -> list[T]:
            return list(map(work, by_length(examples, tokens)))

        lengths = [len(example.input_ids) for example in examples]
        rows = [example.row for example in examples]
        return (journal or Journal()).once(rows, lambda: self.run(batch_by_batch, lengths))


def numbers_at_once(device: torch.device, on_cpu: int) -> int:
    """Return how many elements a temporary tensor may have; results do not depend on this number.

    On a CPU, return `on_cpu`, which the caller chooses to suit the CPU's cache. On a GPU, return the number of float32
    values that fit in a 128th of the GPU's memory.
    """
    if device.type != "cuda":
        return on_cpu
    return int(torch.cuda.get_device_properties(device).total_memory) // 128 // 4


def tokens_factor(model: Any) -> int:
    """Return the factor for a CPU's token budget: above 1 for a model with packed weights (`gradsift.cpu`), else 1."""
    # each pass reads all weights once, so more tokens per pass save time
    return int(getattr(model, "tokens_factor", 1))


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def without_host_reads() -> Iterator[None]:
    """Turn off checks by transformers that read token ids or masks, because reading makes the host wait for the GPU.

    The checks find out whether a row holds several examples, whether there is padding without a mask, and whether the
    mask hides any token. They are not needed in gradsift: each row holds one example, padding is on the right or has a
    mask, and every mask is applied.
    """
    from transformers import PreTrainedModel, masking_utils

    answers: list[tuple[Any, str, Any]] = [
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (masking_utils, "fast_all", lambda mask: False),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda model, input_ids, attention_mask: None),
    ]
    # versions of transformers differ in the checks that they have
    checks = [(owner, name, vars(owner)[name], answer) for owner, name, answer in answers if name in vars(owner)]
    try:
        for owner, name, _, answer in checks:
            setattr(owner, name, answer)
        yield
    finally:
        for owner, name, check, _ in checks:
            setattr(owner, name, check)


def device_of(compute: ComputeConfig) -> torch.device:
    """Return the device that `compute.device` asks for.

    Raises:
        GradsiftError: `compute.device` is cuda, but there is no CUDA device; or there are CUDA devices, but fewer than
            `compute.devices`.
    """
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise GradsiftError("compute.device=cuda, but torch finds no CUDA device here; take compute.device=auto")
    if compute.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if compute.devices > torch.cuda.device_count():
        raise GradsiftError(
            f"compute.devices={compute.devices}, but torch finds {torch.cuda.device_count()} CUDA devices here; give "
            "at most as many, or compute.device=cpu"
        )
    return torch.device("cuda")


def token_bytes(config: Any, number: int, adapted: Collection[str], *, checkpointed: bool) -> int | None:
    """Return how many bytes the forward pass of a training keeps for each token until the backward pass.

    The result is None for a model type that is not known here.

    Args:
        config: transformers' config of the model.
        number: bytes per element of the activations: 2 in bfloat16, 4 in float32.
        adapted: last parts (such as `q_proj`) of the names of the layers with an adapter.
        checkpointed: whether the blocks recompute their activations in the backward pass.
    """
    kind = str(config.model_type)
    if kind not in (*_GATED, "gpt2"):
        return None
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)  # other models may lack these
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys = heads * size, int(getattr(config, "num_key_value_heads", None) or heads) * size
    mlp = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    read = {*adapted}
    inputs = hidden * (bool(read & _READ_IN_ATTENTION) + bool(read & _READ_IN_MLP)) + mlp * bool(read & _READ_WIDE)
    attention, of_mlp = 2 * queries + 2 * keys, mlp if kind == "gpt2" else 3 * mlp
    norms = 2 * hidden + (queries + keys if kind == "qwen3" else 0)  # float32, whatever the products are
    block = _STREAM * norms + number * (inputs + attention + of_mlp)
    layers = int(config.num_hidden_layers)
    return layers * _STREAM * hidden + block if checkpointed else layers * block


def adapted_names(model: Any) -> set[str]:
    """Return the last parts (such as `q_proj`) of the names of the layers that have an adapter."""
    names = (name.split(".lora_")[0] for name, each in model.named_parameters() if each.requires_grad)
    return {name.rsplit(".", 1)[-1] for name in names}


def fitting_tokens(model: Any, memory: int, *, checkpointed: bool) -> int | None:
    """Return how many tokens can pass through the model at once when it is trained on a GPU with `memory` bytes.

    If the model has no adapter yet, all its linear layers are assumed to have one, but the memory of the adapters
    themselves is not counted.

    Returns:
        The number of tokens, negative if not even the weights fit; None for a model type that is not known here.
    """
    adapted = adapted_names(model) or _READ_IN_ATTENTION | _READ_IN_MLP | _READ_WIDE
    each = token_bytes(model.config, next(model.parameters()).element_size(), adapted, checkpointed=checkpointed)
    if each is None:
        return None
    held = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a rank's part
        # a trainable number has a gradient and two moments of Adam
        held += local.numel() * (4 * local.element_size() if parameter.requires_grad else local.element_size())
    return int((_SHARE * memory - held) / each)


def needs_checkpointing(model: Any, device: torch.device) -> bool:
    """Return whether fewer than 4,096 tokens fit on a GPU without activation checkpointing (see `fitting_tokens`).

    The result is False on a CPU, and for a model type that is not known here.
    """
    if device.type != "cuda":
        return False
    tokens = fitting_tokens(model, torch.cuda.get_device_properties(device).total_memory, checkpointed=False)
    return tokens is not None and tokens < _ROOM


def checkpoint_blocks(model: nn.Module) -> None:
    """Make the blocks of a causal language model recompute their activations in the backward pass.

    Gradients, gradient norms and dropout masks stay the same. transformers' own `gradient_checkpointing_enable` cannot
    be used: it has no effect in evaluation mode, and the frozen backbone stays in evaluation mode while adapters train.
    """
    blocks: list[nn.Module] = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            f"compute.checkpointing=true, but transformers does not know the blocks of {type(model).__name__}; "
            "leave it out, or take another model"
        )
    for block in blocks:
        become(block, _Checkpointed)


def is_checkpointed(model: nn.Module) -> bool:
    return any(isinstance(module, _Checkpointed) for module in model.modules())


class _Checkpointed:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return block(*args, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


def become(module: Any, mixin: Any) -> None:
    """Change the class of `module` to a subclass of `mixin` and of its class, so that `mixin.forward` is called."""
    if not isinstance(module, mixin):
        module.__class__ = _with(mixin, module.__class__)


@functools.cache
def _with(mixin: Any, kind: Any) -> type:
    return type(kind.__name__, (mixin, kind), {})  # the same name: `parallel.layers_of` finds layers by it
