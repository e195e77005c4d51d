"""The device, and the token budget: the largest number of tokens that pass through a model at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from gradsift.config import ComputeConfig
from gradsift.cost import passed
from gradsift.data.batching import by_length, spread_out
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.journal import Journal
from gradsift.runtime import Advance, weighed
from gradsift.training.checkpointing import is_checkpointed
from gradsift.training.memory import fitting_tokens

T = TypeVar("T")
_GPU_TOKENS = 16384  # largest budget on a GPU: with more tokens at once it is no faster
# Parts of torch's messages where memory runs out without an `OutOfMemoryError`: on a CPU under Linux, on a CPU under
# other systems, and in cuBLAS.
_SIGNS = ("allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")
_halved: dict[Any, int] = {}  # halved budgets by `kind`: later stages and jobs of this process start with them
_CPU_ACTIVATION = 393_216  # numbers in a (tokens, hidden size) activation that still fit a CPU core's cache


class TokenBudget:
    """The largest number of tokens, padding included, that pass through a model at once.

    It is halved whenever memory runs out. The number changes results by rounding only.
    """

    def __init__(self, tokens: int, say: Callable[[str], None] = print, kind: Any = None) -> None:
        """
        Args:
            kind: identifies budgets for the same model and memory. After a halving, `of` starts later budgets of the
                same kind with the halved number. With None, a halving has no effect on later budgets.
        """
        self.tokens = tokens
        self.say = say
        self._kind = kind

    @classmethod
    def of(cls, model: Any, tokens: int | None, say: Callable[[str], None]) -> TokenBudget:
        """Return a budget of `tokens` or, if this is None, of a number that suits the model and its device."""
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
        """Return `work(tokens)`, called again with half the tokens each time that memory runs out.

        Args:
            work: must leave no partial result behind when memory runs out.
            lengths: numbers of tokens of the examples that `work` passes through the model; their sum is counted as
                forward tokens (`gradsift.cost`).

        Raises:
            GradsiftError: memory does not hold a single example.
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
            self._halve(lengths)  # not in the handler, where the exception holds the failed pass's tensors

    def passes(
        self,
        examples: Sequence[Encoded],
        work: Callable[[list[Encoded]], T],
        journal: Journal | None = None,
        advance: Advance = lambda done: None,
    ) -> Iterator[list[T]]:
        """Divide the examples into groups of similar length, and yield what the method `group` returns for each group.

        Args:
            advance: called with the number of examples just done, estimated from their tokens.
        """
        advance_by_tokens = weighed(advance, len(examples), sum(len(example.input_ids) for example in examples))
        for group in spread_out(by_length(examples, self.tokens)):
            yield self.group(group, work, journal)
            advance_by_tokens(sum(len(example.input_ids) for example in group))

    def group(
        self, examples: Sequence[Encoded], work: Callable[[list[Encoded]], T], journal: Journal | None = None
    ) -> list[T]:
        """Return the results of `work`: one for all examples or, if memory runs out, one for each smaller batch.

        Args:
            journal: keeps the results, so that an interrupted pass continues after its last group.
        """

        def batch_by_batch(tokens: int) -> list[T]:
            return [work(batch) for batch in by_length(examples, tokens)]

        lengths = [len(example.input_ids) for example in examples]
        rows = [example.row for example in examples]
        return (journal or Journal()).once(rows, lambda: self.run(batch_by_batch, lengths))

    def _halve(self, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        used = min(self.tokens, longest * len(lengths))
        if used <= longest:
            raise GradsiftError(
                f"memory ran out with a single example of {longest:,} tokens; lower max_length, or take a smaller "
                "model or compute.precision=bfloat16"
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


def numbers_at_once(device: torch.device, on_cpu: int) -> int:
    """Return how many numbers a temporary tensor may hold.

    On a CPU it is `on_cpu`. On a GPU it is the number of float32 values that fill a 128th of the GPU's memory.
    Callers choose `on_cpu` so that the tensor fits into a cache. Results do not depend on the number.
    """
    if device.type != "cuda":
        return on_cpu
    return int(torch.cuda.get_device_properties(device).total_memory) // 128 // 4


def tokens_factor(model: Any) -> int:
    """Return the multiplier of a CPU's token budget: the model's attribute `tokens_factor`, or 1 if it has none.

    Models with packed weights have the attribute (`gradsift.cpu`): each pass reads all weights once, so more tokens per
    pass save time.
    """
    return int(getattr(model, "tokens_factor", 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is a failed allocation, by its class or, if torch has none for it, by its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return any(sign in message for sign in _SIGNS)


@contextmanager
def without_host_reads() -> Iterator[None]:
    """Turn off checks by transformers that read token ids or masks, because reading makes the host wait for the GPU.

    In a forward pass transformers checks whether a row holds several examples, whether there is padding without a mask,
    and whether the mask hides any token. Here each row holds one example, padding is on the right or has a mask, and
    every mask is applied, so the answers are known.
    """
    lookups = _lookups()
    try:
        for owner, name, _, answer in lookups:
            setattr(owner, name, answer)
        yield
    finally:
        for owner, name, plain, _ in lookups:
            setattr(owner, name, plain)


@functools.cache
def _lookups() -> list[tuple[Any, str, Any, Any]]:
    """Return (owner, name, function, replacement) for each of the checks that this transformers version has."""
    from transformers import PreTrainedModel, masking_utils

    answers = [
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (masking_utils, "fast_all", lambda mask: False),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda model, input_ids, attention_mask: None),
    ]
    return [(owner, name, vars(owner)[name], answer) for owner, name, answer in answers if name in vars(owner)]


def device_of(compute: ComputeConfig) -> torch.device:
    """Return the device that `compute.device` asks for.

    Raises:
        GradsiftError: there is no such device, or there are fewer than `compute.devices`.
    """
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise GradsiftError("compute.device=cuda, but torch finds no CUDA device; take compute.device=auto")
    if compute.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if compute.devices > torch.cuda.device_count():
        raise GradsiftError(
            f"compute.devices={compute.devices}, but torch finds {torch.cuda.device_count()} CUDA devices here; give "
            "as many, or compute.device=cpu"
        )
    return torch.device("cuda")


def has_bfloat16() -> bool:
    """Return whether the GPU has bfloat16 products in hardware, not only emulated."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
