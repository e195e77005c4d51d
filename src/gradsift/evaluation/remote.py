"""Answers from an OpenAI-compatible server that serves the target (`generator=openai`, `generator=vllm`).

The server decodes greedily. It gets each prompt as token ids, rendered with the target's template. With
`generator.prompt=chat`, it gets messages instead, and renders them with its own chat template. A finetuned target is a
LoRA adapter, which the server must serve under the name of the finetune's artifact folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import EndpointGeneratorConfig, TargetConfig
from gradsift.data.tokens import encode_prompt
from gradsift.errors import ConfigError, GradsiftError
from gradsift.evaluation.chat import ChatClient, client_of
from gradsift.evaluation.endpoint import Endpoint, Messages, token_prompt
from gradsift.evaluation.generation import Question, room_of
from gradsift.evaluation.judges import JudgeError, with_input
from gradsift.manifests import UNFINISHED
from gradsift.runtime import Advance, Runtime
from gradsift.training.backbones import config_of, load_tokenizer, source_of
from gradsift.training.numerics import dtype_of

_POLL = 0.5  # seconds between checks whether the server answers
_PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL
_MOST_SHOWN = 2000  # characters of the server's output in an error
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM allows for --max-lora-rank


def check_generator(config: EndpointGeneratorConfig) -> None:
    """Raise ConfigError if the server's program or the endpoint's key is missing, so that a run fails early."""
    if config.serve and shutil.which(config.serve[0]) is None:
        raise ConfigError(
            f"generator.serve=[{','.join(config.serve)}]: there is no program {config.serve[0]} here; install it, name "
            "another, or give generator.serve=[] generator.base_url=URL for a server that runs already"
        )
    if not config.serve:
        Endpoint(config.base_url, config.api_key_env, group="generator")


def generator_settings(config: EndpointGeneratorConfig) -> dict[str, Any]:
    """Return the settings that answers depend on, besides the target.

    The command that starts the server is one of these settings, because servers round differently.
    """
    own = {name: getattr(config, name) for name in ("name", "base_url", "model", "prompt")}
    return own | {"serve": [*config.serve, *config.serve_arguments]}


@contextmanager
def endpoint_answers(
    runtime: Runtime,
    config: EndpointGeneratorConfig,
    target_config: TargetConfig,
    target: Artifact,
    tuned: Artifact | None,
    max_new_tokens: int,
    folder: Path,
) -> Iterator[Callable[[Sequence[Question], Advance], list[str]]]:
    """Yield a function that answers questions.

    A server that `generator.serve` starts is ended after the `with` block.
    """
    model = config.model or str(target_config.model.path or target.path)
    name, where = model, ""
    if tuned:
        name = tuned.path.name
        where = f"; the server must serve the LoRA adapter in {tuned.path / 'adapter'} under the name {name}"
    with ExitStack() as stack:
        base_url = config.base_url
        if config.serve:
            log = folder / UNFINISHED / "server.log"
            source, revision = source_of(target, target_config.model)
            arguments = vllm_arguments(
                source,
                model,
                dtype=str(dtype_of(runtime.compute)).removeprefix("torch."),
                revision=revision,
                adapters={name: tuned.file("adapter")} if tuned else {},
                rank=target_config.lora.rank,
            )
            command = [*config.serve, *arguments, *config.serve_arguments]
            with runtime.display.task(f"start {config.serve[0]}", None):
                base_url = stack.enter_context(serving(command, log, config.start_timeout))
        client = client_of(
            runtime,
            config,
            model=name,
            base_url=base_url,
            max_tokens=max_new_tokens,
            group="generator",
            known_as=f"{generator_settings(config)['serve']} {target.identity}" if config.serve else None,
        )
        prompt_of = _prompt_of(config, target_config, target, max_new_tokens)

        def answer(questions: Sequence[Question], advance: Advance) -> list[str]:
            try:
                return _answers_of(client, list(map(prompt_of, questions)), f"generate-{folder.name}", advance)
            except JudgeError as error:
                raise GradsiftError(f"{error}{where}") from error

        yield answer


def _answers_of(client: ChatClient, prompts: Sequence[Messages], scope: str, advance: Advance) -> list[str]:
    """Return the replies, without surrounding white space; raise GradsiftError if a prompt is refused."""
    answers = [""] * len(prompts)
    refused: list[str] = []

    asked = client.ask(prompts, lambda position, reply: reply.text, scope=scope, unread="no text", tries=1)
    for position, reply in asked:
        if reply.value is None:
            refused.append(f"question {position + 1} ({reply.reason}: {reply.text[:200]})")
        else:
            answers[position] = reply.value.strip()
        advance(1)
    if refused:
        raise GradsiftError(
            f"{client.name} refuses {len(refused)} of {len(prompts)} questions, first {refused[0]}; "
            "a question without an answer cannot be judged: lower benchmark.max_new_tokens, or leave the set out"
        )
    return answers


def _prompt_of(
    config: EndpointGeneratorConfig, target_config: TargetConfig, target: Artifact, max_new_tokens: int
) -> Callable[[Question], Messages]:
    """Return a function that renders a question: as messages if `config.prompt` is "chat", else as token ids."""

    def messages(question: Question) -> Messages:
        turns = [{"role": turn.role, "content": turn.content} for turn in question.history]
        return [*turns, {"role": "user", "content": with_input(question.item.instruction, question.item.input)}]

    if config.prompt == "chat":
        return messages
    tokenizer = load_tokenizer(target, target_config.model)
    room = room_of(config_of(target, target_config.model), max_new_tokens)

    def tokens(question: Question) -> Messages:
        item, history = question
        ids = encode_prompt(item.instruction, item.input, tokenizer, target_config.template, history)
        return token_prompt(ids if room is None else ids[-room:])

    return tokens


def vllm_arguments(
    model: str, name: str, *, dtype: str, revision: str | None, adapters: dict[str, Path], rank: int
) -> list[str]:
    """Return arguments of `vllm serve`, without host and port.

    Args:
        model: hub id, or a folder.
        name: the name that requests use for the model without an adapter.
        adapters: folders in peft's format, by the names that requests use.
        rank: LoRA rank of the adapters.
    """
    # with --generation-config vllm, vLLM ignores the model's own generation config, such as a repetition penalty
    arguments = [model, "--served-model-name", name, "--dtype", dtype, "--generation-config", "vllm"]
    arguments += ["--revision", revision] if revision else []
    if adapters:
        largest = next((allowed for allowed in _RANKS if rank <= allowed), rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(largest), "--lora-modules"]
        arguments += [f"{adapter}={folder.resolve()}" for adapter, folder in adapters.items()]
    return arguments


@contextmanager
def serving(command: Sequence[str], log: Path, timeout: float) -> Iterator[str]:
    """Start a server and yield its base URL as soon as it answers; end all its processes after the `with` block.

    Args:
        command: program and arguments; `--host` and `--port` are added.
        log: file for the server's output.

    Raises:
        GradsiftError: the server ends, or does not answer within `timeout` seconds; the message quotes the end of the
            server's output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        server = subprocess.Popen(  # noqa: S603 - the user's own command
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                ended = f"ended with code {server.returncode}" if server.poll() is not None else "does not answer"
                shown = log.read_text(encoding="utf-8", errors="replace")[-_MOST_SHOWN:].strip()
                raise GradsiftError(
                    f"the server of generator.serve {ended}; check generator.serve and generator.serve_arguments, or "
                    f"raise generator.start_timeout={timeout:g}. Its last output: {shown or 'none'}"
                )
            time.sleep(_POLL)
        yield address
    finally:
        _end(server)


def _answers(address: str) -> bool:
    import httpx2 as httpx

    try:
        return httpx.get(f"{address}/models", timeout=5, trust_env=False).is_success  # without a proxy
    except httpx.HTTPError:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    # they share the server's process group; SIGKILL even if the server has ended, since its children may outlive it
    for signum, wait in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            server.wait(wait)
