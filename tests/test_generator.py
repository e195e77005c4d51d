"""Answers from a server: those of HF's greedy decoding, under the adapter's name, from a server that ends."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import SMOKE
from endpoint import Endpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradsift.config import TERSE, EndpointGeneratorConfig, GeneratorConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.evaluation.remote import check_generator, serving, vllm_arguments

STAND_IN = [sys.executable, str(Path(__file__).with_name("server_stand_in.py"))]


def greedy_server(store: Path, name: str, endpoint: Endpoint) -> None:
    """Let the endpoint answer token ids with the greedy decoding of transformers and peft, by the name of a model."""
    (base,) = store.glob("backbone/nano-llama-*")
    tokenizer = AutoTokenizer.from_pretrained(base)
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(base)}
    plain = AutoModelForCausalLM.from_pretrained(base)
    models[name] = peft.PeftModel.from_pretrained(plain, str(store / "finetune" / name / "adapter"))

    def behave(prompt: str, attempt: int) -> tuple[int, str, dict[str, str]]:
        body = endpoint.bodies[-1]
        assert body["temperature"] == 0
        ids = torch.tensor([json.loads(prompt)])
        with torch.no_grad():
            out = models[body["model"]].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        return 200, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), {}

    endpoint.behave = behave


def outputs_of(store: Path) -> list[dict[str, list[str]]]:
    """Return the answers of each artifact of the stage, by the generator's name, oldest first."""
    files = sorted(store.glob("generate/*/model_outputs.json"), key=lambda file: file.stat().st_mtime_ns)
    rows = [json.loads(file.read_text()) for file in files]
    return [{each[0]["generator"]: [row["output"] for row in each]} for each in rows]


def test_a_server_gives_the_answers_of_greedy_decoding(gradsift: Any, endpoint: Endpoint) -> None:
    run = (*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=6", f"benchmark.general=[{TERSE}]")
    assert gradsift(*run) == 0  # the finetuned target answers both sets, the untuned one the general set
    local = outputs_of(gradsift.store)
    (tuned,) = gradsift.store.glob("finetune/*/adapter")
    greedy_server(gradsift.store, tuned.parent.name, endpoint)
    remote = ("generator=openai", f"generator.base_url={endpoint.address}", "generator.model=base")
    # one request at a time: the server reads its latest
    assert gradsift(*run, *remote, "generator.concurrency=1") == 0
    served = outputs_of(gradsift.store)[len(local) :]
    assert len(served) == 3
    assert served == local and any(text for answers in local for texts in answers.values() for text in texts)
    assert {body["model"] for body in endpoint.bodies} == {"base", tuned.parent.name}
    assert set(endpoint.paths) == {"/v1/completions"}
    asked = len(endpoint.bodies)
    assert gradsift(*run, *remote, "generator.concurrency=2", "generator.retries=1") == 0
    assert len(endpoint.bodies) == asked  # the artifact does not depend on them


def test_a_server_that_does_not_know_the_adapter_is_told_apart(gradsift: Any, endpoint: Endpoint, capfd: Any) -> None:
    endpoint.behave = lambda text, attempt: (404, "no such model", {})
    remote = ("generator=openai", f"generator.base_url={endpoint.address}", "generator.prompt=chat")
    assert gradsift(*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=2", *remote) == 2
    message = capfd.readouterr().err
    assert "check generator.model=" in message and "the LoRA adapter in" in message and "judge." not in message
    assert set(endpoint.paths) == {"/v1/chat/completions"}


def test_a_started_server_gets_vllms_arguments(gradsift: Any) -> None:
    serve = f"generator.serve=[{','.join(STAND_IN)}]"
    run = (*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=1", "generator=vllm", serve)
    assert gradsift(*run, "generator.serve_arguments=[--seed,'3']") == 0
    said = [json.loads(texts[0]) for answers in outputs_of(gradsift.store) for texts in answers.values()]
    (base,) = gradsift.store.glob("backbone/nano-llama-*")
    (tuned,) = gradsift.store.glob("finetune/*/adapter")
    with_adapter = next(each for each in said if "--enable-lora" in each["arguments"])
    arguments = with_adapter["arguments"]
    assert arguments[0] == str(base) and with_adapter["body"]["model"] == tuned.parent.name
    assert f"{tuned.parent.name}={tuned}" in arguments
    assert arguments[arguments.index("--dtype") + 1] == "float32"
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert arguments[-6:-4] == ["--seed", "3"]


def test_the_largest_rank_is_one_that_vllm_allows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "revision": "abc", "adapters": {"a": tmp_path}}
    arguments = vllm_arguments("hub/id", "name", **options, rank=12)
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"
    assert arguments[arguments.index("--revision") + 1] == "abc"
    assert "--enable-lora" not in vllm_arguments("hub/id", "name", **options | {"adapters": {}}, rank=12)


def test_no_process_of_a_server_is_left(tmp_path: Path) -> None:
    note = tmp_path / "child"
    with serving([*STAND_IN, "--child", str(note)], tmp_path / "log", 60) as address:
        assert address.startswith("http://127.0.0.1:")
    status = Path("/proc") / note.read_text() / "status"
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_ends_or_hangs_is_an_error_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(GradsiftError, match=r"(?s)ended with code 1.*the card has no memory left"):
        serving([*STAND_IN, "--dies"], tmp_path / "log", 60).__enter__()
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(GradsiftError, match=r"does not answer.*generator.start_timeout=0.2"):
        serving(hangs, tmp_path / "other", 0.2).__enter__()


def test_what_cannot_be_asked_is_refused() -> None:
    assert GeneratorConfig().name == "local"
    with pytest.raises(ConfigError, match=r"generator=openai needs the address of a server: generator.base_url=URL"):
        EndpointGeneratorConfig(name="openai")
    with pytest.raises(ConfigError, match=r"give generator.serve=\[\]"):
        EndpointGeneratorConfig(name="vllm", serve=["vllm", "serve"], base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match=r"generator.max_usd=1 needs generator.price_input"):
        EndpointGeneratorConfig(name="openai", base_url="http://127.0.0.1:1/v1", max_usd=1.0)
    with pytest.raises(ConfigError, match="there is no program no-such-program here"):
        check_generator(EndpointGeneratorConfig(name="vllm", serve=["no-such-program", "serve"]))
    remote = EndpointGeneratorConfig(name="openai", base_url="https://host/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match=r"NO_SUCH_KEY \(generator\.api_key_env\).*generator\.base_url"):
        check_generator(remote)
