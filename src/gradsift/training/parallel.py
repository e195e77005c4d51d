"""The ranks of a run: the number of this process, its share of the work, and how results are gathered.

All ranks go through the same sequence of stages (`gradsift.launch`). A stage that divides its work gives each rank a
share of the examples; every other stage is made by rank 0 alone (`gradsift.training.shared_store`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import distributed

from gradsift.config import ComputeConfig
from gradsift.cost import counting, passed
from gradsift.data.batching import by_length, shard_of, spread_out
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.journal import Journal
from gradsift.launch import is_launched
from gradsift.runtime import Advance, weighed
from gradsift.training.device import TokenBudget, device_of, is_out_of_memory

S = TypeVar("S")
T = TypeVar("T")

_alone = False  # whether this process, rank 0, now makes a stage without the other ranks


def join(compute: ComputeConfig) -> None:
    """Join the process group of all ranks, once, if the run has several ranks.

    Lightning chooses the backend (nccl or gloo) and the device.
    """
    if is_launched() and compute.ranks > 1 and not distributed.is_initialized():
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy

        for package in ("fabric", "pytorch"):  # each logs several lines about the group
            logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
        strategy = DDPStrategy(timeout=timedelta(hours=12))  # ranks may wait long for the slowest share of a pass
        accelerator = "gpu" if device_of(compute).type == "cuda" else "cpu"
        Fabric(
            accelerator=accelerator, devices=compute.devices, num_nodes=compute.num_nodes, strategy=strategy
        ).launch()


def rank() -> int:
    """Return the number of this process among the processes that share the current work; 0 if it works alone."""
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def size() -> int:
    """Return how many processes share the current work; 1 if this process works alone."""
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself: in this context `size()` is 1 and nothing is divided or gathered."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(examples: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return this rank's part of the examples: every example is in exactly one rank's part."""
    return examples if size() == 1 else shard_of(examples, rank(), size())


def gather(columns: Mapping[str, torch.Tensor], total: int) -> dict[str, torch.Tensor]:
    """Return the columns of all ranks, concatenated in the order of the ranks, on every rank.

    Args:
        columns: (n,) each, for the examples of `share`, in any order.
        total: number of examples of all ranks together.
    """
    if size() == 1:
        return dict(columns)
    counts = [len(range(number, total, size())) for number in range(size())]
    mine = torch.stack([column.double() for column in columns.values()])  # float64 holds row numbers exactly
    padded = torch.nn.functional.pad(mine, (0, max(counts) - mine.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    joined = torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
    return {name: values.to(column.dtype) for (name, column), values in zip(columns.items(), joined, strict=True)}


def run(budget: TokenBudget, work: Callable[[int], T], lengths: Sequence[int]) -> T:
    """Return `work(tokens)`; with one rank, `budget.run` repeats it with fewer tokens if memory runs out.

    Several ranks have to make the same passes, so none of them can repeat its work with fewer tokens.

    Raises:
        GradsiftError: memory ran out on one of several ranks.
    """
    if size() == 1:
        return budget.run(work, lengths)
    try:
        result = work(budget.tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise GradsiftError(
            f"rank {rank()}: memory ran out with {budget.tokens:,} tokens at once, and ranks that share a step cannot "
            "repeat it with fewer; give fewer with compute.tokens"
        ) from error
    passed(sum(lengths))
    return result


def rounds(batches: Sequence[S]) -> Iterator[Sequence[S]]:
    """Yield the batches in order, in rounds of one batch per rank; the last round may have fewer batches."""
    for start in range(0, len(batches), size()):
        yield batches[start : start + size()]


def together(batches: Sequence[S], work: Callable[[S], list[T]]) -> list[T]:
    """Return the results of `work` for all batches of a round, on every rank; each rank does one of the batches.

    A rank without a batch also computes the last batch, without counting its tokens, because in a divided model
    (`gradsift.training.divided`) every pass needs all ranks.

    Args:
        work: its results are pickled for the other ranks, so tensors in them must be on the CPU.
    """
    if size() == 1:
        return list(chain.from_iterable(map(work, batches)))
    if rank() < len(batches):
        mine = work(batches[rank()])
    else:
        with counting():
            mine = work(batches[-1])
    results: list[Any] = [None] * size()
    distributed.all_gather_object(results, mine, group=_control())
    return list(chain.from_iterable(results[: len(batches)]))


def passes(
    budget: TokenBudget,
    examples: Sequence[Encoded],
    work: Callable[[list[Encoded]], T],
    journal: Journal,
    advance: Advance,
    *,
    in_step: bool,
) -> Iterator[list[T]]:
    """Yield what `budget.passes` yields, with the work divided over the ranks.

    Each rank calls `work` on its part of the groups, and the results are gathered, so that every rank yields all of
    them.

    Args:
        work: see `together`.
        in_step: whether the ranks must make the same passes, because they share a divided model.
    """
    if size() == 1:
        yield from budget.passes(examples, work, journal, advance)
        return

    def results_of(group: list[Encoded]) -> list[T]:
        if not in_step:
            return budget.group(group, work)
        return [run(budget, lambda tokens: work(group), [len(example.input_ids) for example in group])]

    # an earlier pass may have halved the budget of one rank, and all ranks must form the same groups
    budget.tokens = smallest(budget.tokens)
    advance_by_tokens = weighed(advance, len(examples), sum(len(example.input_ids) for example in examples))
    for groups in rounds(spread_out(by_length(examples, budget.tokens))):
        encoded = list(chain.from_iterable(groups))
        yield journal.once([each.row for each in encoded], functools.partial(together, groups, results_of))
        advance_by_tokens(sum(len(each.input_ids) for each in encoded))


def largest(count: int, device: torch.device) -> int:
    """Return the largest of the ranks' counts."""
    counts = torch.tensor(count, device=device)
    distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
    return int(counts)


def smallest(count: int) -> int:
    """Return the smallest of the ranks' counts."""
    counts = torch.tensor(count)
    distributed.all_reduce(counts, op=distributed.ReduceOp.MIN, group=_control())
    return int(counts)


@functools.cache
def _control() -> Any:
    """Return a process group for messages on the CPU, with a timeout of a year, as rank 0 may work alone for long."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def broadcast(message: Any) -> Any:
    """Return rank 0's `message` on every rank."""
    messages = [message]
    distributed.broadcast_object_list(messages, src=0, group=_control())
    return messages[0]


def total(count: int) -> int:
    """Return the sum of the ranks' counts; every rank waits for all others."""
    counts = torch.tensor(count)
    distributed.all_reduce(counts, group=_control())
    return int(counts)
