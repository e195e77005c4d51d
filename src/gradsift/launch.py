"""Starts the processes (ranks) of one run if `compute.devices` or `compute.num_nodes` is more than 1.

Every rank runs the same function. The ranks are started by `torchrun`, or by this module with torchrun's library. For
several machines, start the same command on each of them. Three environment variables tell the machines about each
other: `NODE_RANK` (or Slurm's `SLURM_NODEID`) is the machine's own number, `MASTER_ADDR` is the address of the first
machine, and `MASTER_PORT` is a free port of the first machine.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from gradsift.config import ComputeConfig
from gradsift.errors import ConfigError, GradsiftError, first_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

T = TypeVar("T")
_NODE_NUMBERS = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID")
_TORCHS_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
LOST = "connection to the other ranks was lost"  # start of the error of a rank that ended because another one failed


def is_launched() -> bool:
    """Return whether torchrun, or `on_all_ranks`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leads(compute: ComputeConfig) -> bool:
    """Return whether this process is rank 0 or starts rank 0; no other process writes the run's folder."""
    return os.environ["RANK"] == "0" if is_launched() else node_of(compute) == 0


def node_of(compute: ComputeConfig) -> int:
    """Return the number of this machine, counted from 0: with several machines, the number in the environment.

    Raises:
        ConfigError: the environment lacks the number or the first machine's address.
    """
    if compute.num_nodes == 1:
        return 0
    number = next((os.environ[name] for name in _NODE_NUMBERS if name in os.environ), "")
    if not number.isdigit() or int(number) >= compute.num_nodes:
        raise ConfigError(
            f"compute.num_nodes={compute.num_nodes}, but {' or '.join(_NODE_NUMBERS)} does not give the number of this "
            f"machine ({number!r} is set); start one process on each machine with srun, or set NODE_RANK to 0, 1, ..."
        )
    if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT", "").isdigit():
        raise ConfigError(
            f"compute.num_nodes={compute.num_nodes} needs MASTER_ADDR (the first machine) and MASTER_PORT (a free port "
            "there) in the environment of every machine"
        )
    return int(number)


def on_all_ranks(compute: ComputeConfig, function: Callable[..., T], *arguments: Any) -> T | None:
    """Call a function in `compute.ranks` processes, and return the value of this machine's first rank.

    The function must be defined at the top level of a module, because the function and its arguments are pickled for
    the ranks. A process that torchrun started is a rank already, so it calls the function itself and returns the value.

    Raises:
        GradsiftError: a rank failed; the error has the message of the rank that failed first.
        ConfigError: torchrun started more or fewer processes than `compute.ranks`.
    """
    if is_launched() and int(os.environ["WORLD_SIZE"]) != compute.ranks:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but compute.devices={compute.devices} times "
            f"compute.num_nodes={compute.num_nodes} is {compute.ranks}; give compute=ddp and the numbers of torchrun"
        )
    if is_launched() or compute.ranks == 1:
        return function(*arguments)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every rank prints DDP's advice on unused parameters
    is_main = threading.current_thread() is threading.main_thread()  # in other threads torch does not handle signals
    handlers = {number: signal.getsignal(number) for number in _TORCHS_SIGNALS} if is_main else {}
    with tempfile.TemporaryDirectory(prefix="gradsift-ranks-") as logs:
        logging.disable(logging.CRITICAL)  # the errors that torch would log are reported below
        try:
            values: dict[int, T] = elastic_launch(_launch_config(compute, logs), _rank)(function, arguments)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            raise _failure(error) from error
        except DistError as error:
            raise GradsiftError(
                f"the machines cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                f"({first_line(error)}); MASTER_ADDR has to be the first machine and MASTER_PORT free there"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return values.get(node_of(compute) * compute.devices)


def _launch_config(compute: ComputeConfig, logs: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    if compute.num_nodes == 1:  # port 0: a free port of this machine is taken
        meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    else:
        node = node_of(compute)
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": {"rank": node}}
    return LaunchConfig(
        min_nodes=compute.num_nodes,
        max_nodes=compute.num_nodes,
        nproc_per_node=compute.devices,
        run_id=uuid.uuid4().hex if compute.num_nodes == 1 else "gradsift",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        **meeting,
    )


def _rank(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Call the function in the process of one rank; if another rank is lost, raise an error that begins with `LOST`."""
    from torch.distributed import DistError

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the writing of run.json
        raise GradsiftError(f"{LOST} (SIGTERM: another rank failed, or the run was told to end)")

    # sent if another rank failed; the error that `stop` raises lets this rank finish run.json and the tracker
    signal.signal(signal.SIGTERM, stop)
    try:
        return function(*arguments)
    except GradsiftError as error:
        raise GradsiftError(str(error)) from error  # never a subclass, because `_failure` compares the class's name
    except RuntimeError as error:
        if isinstance(error, DistError) or "onnection closed by peer" in str(error):  # gloo's message
            raise GradsiftError(f"{LOST} ({first_line(error)})") from error
        raise


def _failure(error: ChildFailedError) -> Exception:
    """Return the error of the first rank that failed by itself.

    If all ranks of this machine failed only because another rank was lost, the error says so. The error is a
    `GradsiftError`, or a `RuntimeError` if gradsift has a defect.
    """
    texts = {}  # "<exception's class>: <message>" by rank; None if the process left no error message
    for rank, failure in error.failures.items():
        message = failure.error_file_data.get("message") if failure.error_file_data else None
        texts[rank] = str(message["message"]) if isinstance(message, dict) else None
    own = [rank for rank, text in texts.items() if LOST not in (text or "")]
    rank = min(own or texts, key=lambda rank: error.failures[rank].timestamp)
    if (text := texts[rank]) is None:
        code = error.failures[rank].exitcode
        return GradsiftError(
            f"rank {rank} exited with code {code} without a message (possibly out of memory: see the system's log)"
        )
    name, _, message = text.partition(": ")
    if not own:
        return GradsiftError(f"the {message}; the output of the other machines gives the reason")
    if name == GradsiftError.__name__:
        return GradsiftError(message)
    return RuntimeError(f"rank {rank}: {text}")
