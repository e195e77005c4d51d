"""The ranks of a run: the number of this process, its share of the work, and how results are gathered.

All ranks go through the same sequence of stages (`gradsift.launch`). A stage that divides its work gives each rank a
share of the examples; every other stage is made by rank 0 alone (`SharedStore`).

With `compute=fsdp` and several ranks, the layers of the target are divided over the ranks (FSDP2), so that they need
not fit on one GPU. Each rank then holds a part of each weight of the layers. The parts of a layer are gathered from all
ranks only while the layer computes, so all ranks must make the same forward and backward passes. Embeddings, head, last
normalisation layer and adapters are whole on every rank.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from gradsift.artifacts import Artifact, Make, Store
from gradsift.config import ComputeConfig
from gradsift.cost import counting, passed
from gradsift.data.batching import by_length, shard_of, spread_out
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.journal import Journal
from gradsift.launch import is_launched
from gradsift.manifests import read_manifest
from gradsift.runtime import Advance, weighed
from gradsift.training.device import TokenBudget, device_of, is_out_of_memory

S = TypeVar("S")
T = TypeVar("T")

_MAKE, _DONE, _ENDED = "make", "done", "ended"  # rank 0's messages
_MARK = "_is_fsdp_managed_module"  # with it, transformers' `generate` continues until the answers of all ranks end
_HOOK = "maybe_distribute_model"  # `from_pretrained` calls it after building a model on `meta`, before reading files
_alone = False  # whether this process makes a stage without the other ranks


def join(compute: ComputeConfig) -> None:
    """Join the process group of all ranks if the run has several ranks.

    Lightning chooses the backend of the group and the device of each rank.
    """
    if is_launched() and compute.ranks > 1 and not distributed.is_initialized():
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy

        for package in ("fabric", "pytorch"):  # each logs several lines about the group
            logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
        Fabric(
            accelerator="gpu" if device_of(compute).type == "cuda" else "cpu",
            devices=compute.devices,
            num_nodes=compute.num_nodes,
            strategy=DDPStrategy(timeout=timedelta(hours=12)),  # ranks may wait long for the slowest share of a pass
        ).launch()


def rank() -> int:
    """Return the number, from 0, of this process among those that share the current work; 0 if it works alone."""
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def size() -> int:
    """Return the number of processes that share the current work; 1 if this process works alone."""
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work alone: in this context `size()` is 1, and nothing is divided or gathered."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(examples: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return the examples that this rank works on; every example is in the share of exactly one rank."""
    return examples if size() == 1 else shard_of(examples, rank(), size())


def gather(columns: Mapping[str, torch.Tensor], total: int) -> dict[str, torch.Tensor]:
    """Return the columns of all ranks, concatenated in the order of the ranks, on every rank.

    Args:
        columns: tensors (n,) by name, with a value for each of the n examples of this rank's `share`; the examples may
            be in any order.
        total: number of examples in the shares of all ranks together.
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
    """Return `work(tokens)`, where `tokens` is the number of tokens that `budget` allows per pass.

    If there is only one rank and memory runs out, `budget.run` calls `work` again with fewer tokens.

    Raises:
        GradsiftError: memory ran out on this rank and there are several ranks, which must all make the same passes.
    """
    if size() == 1:
        return budget.run(work, lengths)
    try:
        result = work(budget.tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise GradsiftError(
            f"rank {rank()}: memory ran out with {budget.tokens:,} tokens at once, and several ranks cannot repeat a "
            "step with fewer; lower compute.tokens"
        ) from error
    passed(sum(lengths))
    return result


def rounds(batches: Sequence[S]) -> Iterator[Sequence[S]]:
    """Yield the batches in order, in rounds of one batch per rank; the last round may have fewer batches."""
    for start in range(0, len(batches), size()):
        yield batches[start : start + size()]


def together(batches: Sequence[S], work: Callable[[S], list[T]]) -> list[T]:
    """Return the results of `work` for all batches of a round, on every rank; each rank computes one of the batches.

    The results are pickled for the other ranks, so their tensors must be on the CPU.
    """
    if size() == 1:
        return list(chain.from_iterable(map(work, batches)))
    if rank() < len(batches):
        mine = work(batches[rank()])
    else:
        with counting():  # a pass through a divided model needs all ranks, but these tokens are not counted
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
    """Divide the examples into groups of similar length, and yield lists of results of `work` until no group is left.

    Each rank calls `work` on its share of the groups, but all results are yielded on every rank.

    Args:
        work: see `TokenBudget.group`. If there are several ranks, the results are pickled (see `together`).
        in_step: whether all ranks must make the same passes, because the model is divided over them.
    """
    if size() == 1:
        yield from budget.passes(examples, work, journal, advance)
        return

    def results_of(group: list[Encoded]) -> list[T]:
        if not in_step:
            return budget.group(group, work)
        return [run(budget, lambda tokens: work(group), [len(example.input_ids) for example in group])]

    # all ranks must form the same groups, but an earlier pass may have halved the budget of one rank
    budget.tokens = _reduced(budget.tokens, distributed.ReduceOp.MIN)
    advance_by_tokens = weighed(advance, len(examples), sum(len(example.input_ids) for example in examples))
    for groups in rounds(spread_out(by_length(examples, budget.tokens))):
        encoded = list(chain.from_iterable(groups))
        yield journal.once([each.row for each in encoded], functools.partial(together, groups, results_of))
        advance_by_tokens(sum(len(each.input_ids) for each in encoded))


@functools.cache
def _control() -> Any:
    """Return a process group for messages on the CPU.

    Its timeout is a year, because the other ranks may wait long for a message while rank 0 works alone.
    """
    return distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def broadcast(message: Any) -> Any:
    """Return rank 0's `message` on every rank."""
    messages = [message]
    distributed.broadcast_object_list(messages, src=0, group=_control())
    return messages[0]


def _reduced(count: int, operation: Any) -> int:
    counts = torch.tensor(count)
    distributed.all_reduce(counts, op=operation, group=_control())
    return int(counts)


def largest(count: int) -> int:
    """Return the largest value of `count` on any rank; every rank waits until all ranks have called this function."""
    return _reduced(count, distributed.ReduceOp.MAX)


def total(count: int) -> int:
    """Return the sum of `count` over all ranks; every rank waits until all ranks have called this function."""
    return _reduced(count, distributed.ReduceOp.SUM)


class RunEnded(Exception):
    """Raised on every rank except rank 0 when rank 0 stops before the last stage; rank 0 itself reports the reason."""


class SharedStore(Store):
    """A store whose `obtain` is called by all ranks with the same arguments.

    Rank 0 finds or makes the artifact while the other ranks wait. Only a stage with `divided=True` is made by all ranks
    together; the other ranks then work in a temporary copy of rank 0's folder.
    """

    def _provide(self, wanted: Artifact, make: Make, *, light: bool, exact: bool, divided: bool) -> Artifact:
        options = {"light": light, "exact": exact, "divided": divided}
        if size() == 1:  # rank 0, within a stage that it makes by itself
            return super()._provide(wanted, make, **options)
        if rank():
            return _follow(wanted, make)

        def make_here(folder: Path) -> Mapping[str, Any]:
            if not divided:
                with alone():
                    return make(folder)
            broadcast((_MAKE, wanted.fingerprint, str(folder.resolve())))
            total(0)  # waits until the other ranks have copied the folder
            return _make_on_every_rank(make, folder)

        try:
            artifact = super()._provide(wanted, make_here, **options)
        except Exception:
            if not divided:  # in a divided stage no rank waits for a message, and the launcher ends the other ranks
                broadcast((_ENDED, wanted.fingerprint, ""))
            raise
        broadcast((_DONE, wanted.fingerprint, ""))
        return artifact


def _follow(wanted: Artifact, make: Make) -> Artifact:
    """Do what rank 0's messages ask this rank to do until rank 0 has the artifact, and return the artifact."""
    while True:
        order, fingerprint, folder = broadcast(None)
        if order == _ENDED:
            raise RunEnded
        if fingerprint != wanted.fingerprint:
            raise GradsiftError(
                f"rank {rank()} needs {wanted.stage} {wanted.path.name}, but rank 0 works on {fingerprint}; "
                "start all ranks with the same command, code and input files"
            )
        if order == _DONE:
            manifest, damage = read_manifest(wanted.path, stage=wanted.stage, fingerprint=fingerprint)
            if damage is not None:
                raise GradsiftError(
                    f"rank {rank()} cannot read {wanted.path} ({damage}); give all ranks the same store with "
                    "artifacts=DIR"
                )
            return Artifact(wanted.stage, wanted.path, fingerprint, manifest)
        with tempfile.TemporaryDirectory(prefix="gradsift-rank-") as scratch:
            copy = Path(scratch) / wanted.path.name
            shutil.copytree(folder, copy)
            total(0)
            _make_on_every_rank(make, copy)


def _make_on_every_rank(make: Make, folder: Path) -> Mapping[str, Any]:
    """Call `make` and return its result; on rank 0, count the forward tokens of all ranks."""
    with counting() as tokens:
        info = make(folder)
    tokens_of_all = total(tokens())
    if rank() == 0:
        passed(tokens_of_all)
    return info


def divides(compute: ComputeConfig) -> bool:
    return compute.strategy == "fsdp" and size() > 1


def is_divided(model: Any) -> bool:
    """Return whether the layers of a causal language model, adapted or not, are divided over the ranks."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(causal, _MARK, False))


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a causal language model: the modules of the classes that `_no_split_modules` names.

    Raises:
        ConfigError: the model has no module of such a class.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"compute.strategy=fsdp cannot tell the layers of {type(model).__name__}; take compute.strategy=ddp"
        )
    return layers


@contextmanager
def in_parts(compute: ComputeConfig, wanted: bool) -> Iterator[dict[str, Any]]:
    """Make transformers divide the models that it loads in this context; yield the options for `from_pretrained`.

    Of each divided weight, only this rank's part is read from the files. If `wanted` is False, models are loaded whole
    and the options are empty.
    """
    if not wanted:
        yield {}
        return
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, _HOOK):
        raise GradsiftError(
            "compute.strategy=fsdp needs a newer transformers (5.23 works); update it, or take compute.strategy=ddp"
        )
    from transformers.distributed import DistributedConfig

    device = device_of(compute)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def divided(kind: type, model: Any, *settings: Any) -> Any:
        _divide(model, device)
        return model

    own = vars(PreTrainedModel).get(_HOOK)  # None if a parent class defines it
    setattr(PreTrainedModel, _HOOK, classmethod(divided))
    try:
        yield {"distributed_config": DistributedConfig(), "device_map": {"": device}}
    finally:
        delattr(PreTrainedModel, _HOOK)
        if own is not None:
            setattr(PreTrainedModel, _HOOK, own)


def _divide(model: Any, device: torch.device) -> None:
    """Divide the layers of a causal language model over all ranks, in place; the model is on torch's meta device."""
    # imported here, because the import takes half a second and most runs divide nothing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layers = layers_of(model)
    # GPT-2's last hidden states are a view, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest)  # lets FSDP fetch the next layer's weights ahead
    setattr(model, _MARK, True)
