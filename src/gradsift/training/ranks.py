"""One training, or one pass over examples, by several processes: the ranks of a torch.distributed group.

The process that makes an artifact is rank 0. It starts the others for this one piece of work, each with the same
function and arguments, and they end with it: no script is started again, so a job of a sweep, its store, its locks
and its folder are there once, whatever launched it. Examples are divided over the ranks and what is found comes
together on all of them; what the other ranks write goes to a scratch folder.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import get_context

from gradsift.artifacts import Store
from gradsift.config import ComputeConfig
from gradsift.cost import counting, passed
from gradsift.data.batching import shard_of
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.nodes import meeting, node_of
from gradsift.runtime import Display, Runtime
from gradsift.training.backbones import quieten
from gradsift.training.device import device_of

T = TypeVar("T")
_local_size = 1  # ranks on this machine
_PATIENCE = 30.0  # seconds in which other ranks end after rank 0 has
_READY = ""  # what a rank says before it joins
_ENDED = "ended without a word; memory, perhaps: see the system's log"


def rank() -> int:
    """Of this process in its group; 0 without one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Processes of the group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(examples: Sequence[Encoded]) -> Sequence[Encoded]:
    """This rank's part of the examples: every one is one rank's, none is there twice."""
    return examples if size() == 1 else shard_of(examples, rank(), size())


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients; a parameter without one has zero."""
    if size() == 1:
        return
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.flatten() for part in parts])
    distributed.all_reduce(flat)
    for parameter, summed in zip(parameters, flat.split([part.numel() for part in parts]), strict=True):
        parameter.grad = summed.view_as(parameter)


def gather(columns: Mapping[str, torch.Tensor], total: int) -> dict[str, torch.Tensor]:
    """The columns of all ranks, one after another, on every rank.

    Args:
        columns: (n,) each, of the examples of `share`, in any order.
        total: examples of all ranks.
    """
    if size() == 1:
        return dict(columns)
    counts = [len(range(number, total, size())) for number in range(size())]
    mine = torch.stack([column.double() for column in columns.values()])  # a row's number is exact in float64
    padded = torch.nn.functional.pad(mine, (0, max(counts) - mine.shape[1])).contiguous()
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded)
    whole = torch.cat([part[:, :count] for part, count in zip(found, counts, strict=True)], 1)
    return {name: values.to(column.dtype) for (name, column), values in zip(columns.items(), whole, strict=True)}


def shard_weights(adapted: Any, compute: ComputeConfig) -> None:
    """Divide the frozen weights of the model's layers over the ranks (`compute.strategy=fsdp`), a layer at a time.

    A layer's weights are whole only while it is passed through (torch's `fully_shard`). The adapter's stay with
    every rank, and so do embeddings and head: the gradients come together as without.

    Raises:
        GradsiftError: a model that does not say which of its modules are its layers.
    """
    if size() == 1 or compute.strategy != "fsdp":
        return
    causal = adapted.get_base_model()
    names = set(causal._no_split_modules or ())
    layers = [module for module in causal.modules() if type(module).__name__ in names]
    if not layers:
        raise GradsiftError(
            f"compute.strategy=fsdp cannot tell the layers of {type(causal).__name__}; take compute.strategy=ddp"
        )
    mesh = init_device_mesh(device_of(compute).type, (size(),))
    whole = {parameter for parameter in adapted.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    rest = {parameter for parameter in adapted.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(causal.base_model, mesh=mesh, ignored_params=rest)  # has the layers fetch each other's weights ahead


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each pass through the model needs all ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def most(count: int) -> int:
    """The largest of the ranks' counts."""
    counts = torch.tensor(count)
    counts = counts.cuda() if distributed.get_backend() == "nccl" else counts
    distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
    return int(counts)


class Ranks(DDPStrategy):
    """Lightning's strategy for a group that is there already.

    The model is not wrapped: the wrapper averages each backward pass over the ranks, while here a step has several
    and ranks have unequal numbers of examples. `sum_gradients` does it once a step.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=_Environment())

    def configure_ddp(self) -> None:
        pass


class _Environment(TorchElasticEnvironment):
    def world_size(self) -> int:
        return size()

    def global_rank(self) -> int:
        return rank()

    def local_rank(self) -> int:
        return rank() % _local_size

    def node_rank(self) -> int:
        return rank() // _local_size


# ------------------------------------------------------------------------------------------ processes


def on_all_ranks(runtime: Runtime, folder: Path, work: Callable[..., T], *arguments: Any) -> T:
    """`work(runtime, folder, *arguments)` on `compute.ranks` processes; returns what it returned in this one.

    Args:
        folder: of the artifact in the making; other ranks work in a copy of it, which is dropped.
        work: a function of a module; it and the arguments are pickled.

    Raises:
        GradsiftError: a rank failed; with its reason.
    """
    if runtime.compute.ranks == 1:
        return work(runtime, folder, *arguments)
    with (
        tempfile.TemporaryDirectory(prefix="gradsift-ranks-") as scratch,
        _others(runtime, folder, Path(scratch), work, arguments),
    ):
        return _work(runtime, folder, Path(scratch), work, arguments)


def _work(runtime: Runtime, folder: Path, scratch: Path, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """In the group: rank 0 in `folder`, every other in a copy of rank 0's folder as it stands."""
    places = [str(folder.resolve())]
    distributed.broadcast_object_list(places)
    if rank():
        folder = scratch / f"rank{rank()}"
        shutil.copytree(places[0], folder)
    distributed.barrier()
    return _counted(work, runtime, folder, arguments)


def _counted(work: Callable[..., T], runtime: Runtime, folder: Path, arguments: tuple[Any, ...]) -> T:
    """What `work` returns; the forward tokens of all ranks are counted on rank 0, for the unit under way there."""
    with counting() as tokens:
        found = work(runtime, folder, *arguments)
    total = torch.tensor(tokens())
    total = total.cuda() if distributed.get_backend() == "nccl" else total
    distributed.all_reduce(total)
    passed(int(total))
    return found


@contextmanager
def _others(
    runtime: Runtime, folder: Path, scratch: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> Iterator[None]:
    """The other ranks at work, and this process in a group with them."""
    context = get_context("spawn")
    processes: list[SpawnProcess] = []
    ends: list[Connection] = []
    try:
        for number in range(1, runtime.compute.devices):
            ours, theirs = context.Pipe(duplex=False)
            given = (number, runtime.compute, runtime.seed, torch.get_num_threads(), scratch, folder, theirs)
            process = context.Process(target=_other, args=(*given, pickle.dumps((work, arguments))), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        _await(processes, ends)
        with _group(0, runtime.compute, scratch, folder.name):
            yield
        for process in processes:
            process.join(_PATIENCE)
    except Exception as error:
        if isinstance(error, GradsiftError):
            raise
        for number, (process, end) in enumerate(zip(processes, ends, strict=True), start=1):
            if reason := _last_word(process, end):
                raise GradsiftError(reason if reason != _ENDED else f"rank {number} {_ENDED}") from error
        raise
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _await(processes: Sequence[SpawnProcess], ends: Sequence[Connection]) -> None:
    """Wait until every other rank is about to join: a group would wait for one that died."""
    for process, end in zip(processes, ends, strict=True):
        wait([end, process.sentinel])
        try:
            ready = end.poll() and end.recv() == _READY
        except EOFError:
            ready = False
        if not ready:
            raise RuntimeError("a rank did not join the group")


def _last_word(process: SpawnProcess, end: Connection) -> str | None:
    """What a rank failed of; None if it did not, or not yet."""
    try:
        while end.poll(1):
            if (text := end.recv()) != _READY:
                return str(text)
    except EOFError:
        process.join(1)
    return _ENDED if process.exitcode else None


def _other(
    number: int,
    compute: ComputeConfig,
    seed: int,
    threads: int,
    scratch: Path,
    folder: Path,
    said: Connection,
    pickled: bytes,
) -> None:
    """A rank's process: the same work in a folder of its own, silently."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; rank 0 ends the others
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    try:
        torch.set_num_threads(threads)
        quieten()
        work, arguments = pickle.loads(pickled)  # noqa: S301 - rank 0's own
        display = Display(Console(file=io.StringIO()))
        runtime = Runtime(Store(scratch / "store", display.say), compute, display, seed)
        said.send(_READY)
        with _group(number, compute, scratch, folder.name):
            _work(runtime, folder, scratch, work, arguments)
    except Exception as error:  # noqa: BLE001 - rank 0 raises it
        said.send(str(error) if isinstance(error, GradsiftError) else f"rank {number}: {type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _end_with_rank_0() -> None:
    """A killed rank 0 cannot end the others, which would keep their GPUs until torch's timeout."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _group(local: int, compute: ComputeConfig, scratch: Path, unit: str) -> Iterator[None]:
    """The group of all machines' ranks, of which this is number `local` of its machine.

    Args:
        unit: the artifact's name, on all machines the same: a group's own.
    """
    global _local_size
    _local_size = compute.devices
    cuda = device_of(compute).type == "cuda"
    if cuda:
        torch.cuda.set_device(local)
    number = node_of(compute) * compute.devices + local
    if compute.num_nodes == 1:
        found: Any = distributed.FileStore(str(scratch / "group"), compute.ranks)  # type: ignore[attr-defined]
    else:
        unit = unit.removesuffix(".part")
        found = distributed.PrefixStore(unit, meeting(number == 0))  # type: ignore[attr-defined]
    distributed.init_process_group("nccl" if cuda else "gloo", store=found, rank=number, world_size=compute.ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()
