"""Answers from an OpenAI-compatible server that serves the target (`generator=openai`, `generator=vllm`).

The server decodes greedily. It gets prompts in the target's template as token ids or, with `generator.prompt=chat`,
messages that it renders with its own chat template. A finetuned target is a LoRA adapter, which the server must serve
under the name of the finetune's artifact folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import EndpointGeneratorConfig, TargetConfig
from gradsift.data.tokens import encode_prompt
from gradsift.errors import GradsiftError
from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.chat_protocol import Messages, token_prompt
from gradsift.evaluation.endpoint import Endpoint
from gradsift.evaluation.generation import Question, room_of
from gradsift.evaluation.judges import JudgeError
from gradsift.evaluation.replies import Completion, Replies, Terms
from gradsift.evaluation.serving import require_command, serving, vllm_arguments
from gradsift.evaluation.turns import with_input
from gradsift.manifests import UNFINISHED
from gradsift.runtime import Advance, Runtime
from gradsift.training.backbones import load_description, source_of
from gradsift.training.numerics import dtype_of

_CLIENT_OPTIONS = ("api_key_env", "timeout", "retries", "max_wait", "give_up", "concurrency")


def check_generator(config: EndpointGeneratorConfig) -> None:
    """Raise ConfigError if the server's program or the endpoint's key is missing, so that a run fails early."""
    require_command(config.serve)
    if not config.serve:
        Endpoint(config.base_url, config.api_key_env)


def generator_settings(config: EndpointGeneratorConfig) -> dict[str, Any]:
    """Return the settings, besides the target, that answers depend on.

    They name the server, because different servers round differently.
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
    replies: Path,
    folder: Path,
) -> Iterator[Callable[[Sequence[Question], Advance], list[str]]]:
    """Yield a function that answers questions. A server that `generator.serve` starts runs until the end of the block.

    Args:
        replies: file in which replies are stored.
        folder: folder of the artifact that is being made.
    """
    model = config.model or str(target_config.model.path or target.path)
    name, where = model, ""
    if tuned:
        name = tuned.path.name
        where = f"; it has to be served as {name}, the LoRA adapter in {tuned.path / 'adapter'}"
    with ExitStack() as stack:
        base_url = config.base_url
        if config.serve:
            log = folder / UNFINISHED / "server.log"
            command = _command(runtime, config, target_config, target, tuned, model)
            with runtime.display.task(f"start {config.serve[0]}", None):
                base_url = stack.enter_context(serving(command, log, config.start_timeout))
        client = ChatClient(
            model=name,
            base_url=base_url,
            replies=Replies(replies, runtime.display.say),
            max_tokens=max_new_tokens,
            terms=Terms(config.price_input, config.price_output, config.max_usd, config.max_calls),
            group="generator",
            known_as=f"{generator_settings(config)['serve']} {target.identity}" if config.serve else None,
            skip_thinking=False,
            say=runtime.display.say,
            **{option: getattr(config, option) for option in _CLIENT_OPTIONS},
        )
        prompts_of = _prompts(config, target_config, target, max_new_tokens)

        def answer(questions: Sequence[Question], advance: Advance) -> list[str]:
            try:
                return answers_of(client, prompts_of(questions), f"generate-{folder.name}", advance)
            except JudgeError as error:
                raise GradsiftError(f"{error}{where}") from error

        yield answer


def _command(
    runtime: Runtime,
    config: EndpointGeneratorConfig,
    target_config: TargetConfig,
    target: Artifact,
    tuned: Artifact | None,
    name: str,
) -> list[str]:
    source, revision = source_of(target, target_config.model)
    arguments = vllm_arguments(
        source,
        name,
        dtype=str(dtype_of(runtime.compute)).removeprefix("torch."),
        revision=revision,
        adapters={tuned.path.name: tuned.file("adapter")} if tuned else {},
        rank=target_config.lora.rank,
    )
    return [*config.serve, *arguments, *config.serve_arguments]


def answers_of(client: ChatClient, prompts: Sequence[Messages], scope: str, advance: Advance) -> list[str]:
    """Return the replies to the prompts, without surrounding white space.

    Raises:
        GradsiftError: the server refuses a prompt.
        JudgeError: requests failed.
    """
    answers = [""] * len(prompts)
    refused: list[str] = []

    def text(position: int, completion: Completion) -> str:
        return completion.text

    for position, reply in client.ask(prompts, text, scope=scope, unread="no text", tries=1):
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


def _prompts(
    config: EndpointGeneratorConfig, target_config: TargetConfig, target: Artifact, max_new_tokens: int
) -> Callable[[Sequence[Question]], list[Messages]]:
    if config.prompt == "chat":
        return lambda questions: [_messages(question) for question in questions]
    tokenizer, model_config = load_description(target, target_config.model)
    room = room_of(model_config, max_new_tokens)

    def tokens(question: Question) -> Messages:
        item, history = question
        ids = encode_prompt(item.instruction, item.input, tokenizer, target_config.template, history)
        return token_prompt(ids if room is None else ids[-room:])

    return lambda questions: [tokens(question) for question in questions]


def _messages(question: Question) -> Messages:
    turns = [{"role": turn.role, "content": turn.content} for turn in question.history]
    return [*turns, {"role": "user", "content": with_input(question.item.instruction, question.item.input)}]
