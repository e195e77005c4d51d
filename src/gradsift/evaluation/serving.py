"""Run a model server on this machine for as long as a stage needs the server."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gradsift.errors import ConfigError, GradsiftError

_POLL = 0.5  # seconds between checks whether the server answers
_PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL
_MOST_SHOWN = 2000  # characters of the server's output in an error
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM allows for --max-lora-rank


def vllm_arguments(
    model: str, name: str, *, dtype: str, revision: str | None, adapters: dict[str, Path], rank: int
) -> list[str]:
    """Return arguments of `vllm serve`, without the port.

    Args:
        model: hub id, or a folder.
        name: the name that requests for the model without an adapter use.
        adapters: folders in peft's format, by the names that requests use.
        rank: the adapters' LoRA rank.
    """
    # otherwise vLLM takes defaults, such as a repetition penalty, from the model's own generation config
    arguments = [model, "--served-model-name", name, "--dtype", dtype, "--generation-config", "vllm"]
    arguments += ["--revision", revision] if revision else []
    if adapters:
        largest = next((allowed for allowed in _RANKS if rank <= allowed), rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(largest), "--lora-modules"]
        arguments += [f"{adapter}={folder.resolve()}" for adapter, folder in adapters.items()]
    return arguments


def require_command(command: Sequence[str]) -> None:
    """Raise ConfigError unless the command is empty or its program exists."""
    if command and shutil.which(command[0]) is None:
        raise ConfigError(
            f"generator.serve=[{','.join(command)}]: there is no program {command[0]} here; install it, name another, "
            "or give generator.serve=[] generator.base_url=URL for a server that runs already"
        )


@contextmanager
def serving(command: Sequence[str], log: Path, timeout: float) -> Iterator[str]:
    """Start a server and yield its base URL when it answers; after the block, end the server and all its processes.

    Args:
        command: program and arguments; host and port are added.
        log: file for the server's output.

    Raises:
        GradsiftError: the server ends, or does not answer within `timeout` seconds; the message quotes the end of the
            server's output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        server = subprocess.Popen(  # noqa: S603 - the user's own command
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                ended = f"ended with code {server.returncode}" if server.poll() is not None else "does not answer"
                shown = log.read_text(encoding="utf-8", errors="replace")[-_MOST_SHOWN:].strip()
                raise GradsiftError(
                    f"the server of generator.serve {ended}; check generator.serve and generator.serve_arguments, or "
                    f"raise generator.start_timeout={timeout:g}. Its last output: {shown or 'none'}"
                )
            time.sleep(_POLL)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(server)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started, which share its session."""
    # SIGKILL even if the server has ended: its children may outlive it
    for signum, wait in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            server.wait(wait)
