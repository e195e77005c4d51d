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
from gradsift.evaluation import remote
from gradsift.evaluation.remote import check_generator, serving, vllm_arguments


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_POLL", 0.02)


STAND_IN = [sys.executable, str(Path(__file__).with_name("server_stand_in.py"))]


def greedy_server(base: Path, tuned: Path, endpoint: Endpoint) -> None:
    """Let the endpoint answer token ids with the greedy decoding of transformers and peft, by the name of a model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(base)}
    plain = AutoModelForCausalLM.from_pretrained(base)
    models[tuned.name] = peft.PeftModel.from_pretrained(plain, str(tuned / "adapter"))

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


def made_by(gradsift: Any, stage: str) -> list[Path]:
    """Return the folders of a stage's artifacts in the last run."""
    stages = gradsift.runs()[-1]["stages"]
    return [gradsift.store / stage / each["artifact"] for each in stages if each["name"] == stage]


def answers_of(gradsift: Any) -> list[tuple[str, list[str]]]:
    """Return the generator and the answers of each artifact of the stage in the last run."""
    rows = [json.loads((folder / "model_outputs.json").read_text()) for folder in made_by(gradsift, "generate")]
    return [(each[0]["generator"], [row["output"] for row in each]) for each in rows]


def test_a_server_gives_the_answers_of_greedy_decoding(after_smoke: Any, endpoint: Endpoint) -> None:
    run = (*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=6", f"benchmark.general=[{TERSE}]")
    assert after_smoke(*run) == 0  # the finetuned target answers both sets, the untuned one the general set
    local = answers_of(after_smoke)
    (base,), (tuned,) = after_smoke.store.glob("backbone/nano-llama-*"), made_by(after_smoke, "finetune")
    greedy_server(base, tuned, endpoint)
    served_by = ("generator=openai", f"generator.base_url={endpoint.address}", "generator.model=base")
    # one request at a time: the server reads its latest
    assert after_smoke(*run, *served_by, "generator.concurrency=1") == 0
    served = answers_of(after_smoke)
    assert len(served) == 3
    assert served == local and any(text for _, texts in local for text in texts)
    assert {body["model"] for body in endpoint.bodies} == {"base", tuned.name}
    assert set(endpoint.paths) == {"/v1/completions"}
    asked = len(endpoint.bodies)
    assert after_smoke(*run, *served_by, "generator.concurrency=2", "generator.retries=1") == 0
    assert len(endpoint.bodies) == asked  # the artifact does not depend on them


def test_a_server_that_does_not_know_the_adapter_is_told_apart(
    after_smoke: Any, endpoint: Endpoint, capfd: Any
) -> None:
    endpoint.behave = lambda text, attempt: (404, "no such model", {})
    served_by = ("generator=openai", f"generator.base_url={endpoint.address}", "generator.prompt=chat")
    assert after_smoke(*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=2", *served_by) == 2
    message = capfd.readouterr().err
    assert "check generator.model=" in message and "the LoRA adapter in" in message and "judge." not in message
    assert set(endpoint.paths) == {"/v1/chat/completions"}


def test_a_started_server_gets_vllms_arguments(after_smoke: Any) -> None:
    serve = f"generator.serve=[{','.join(STAND_IN)}]"
    run = (*SMOKE, "scorer=random", "stop_after=generate", "benchmark.limit=1", "generator=vllm", serve)
    assert after_smoke(*run, "generator.serve_arguments=[--seed,'3']") == 0
    said = [json.loads(texts[0]) for _, texts in answers_of(after_smoke)]
    (base,), (tuned,) = after_smoke.store.glob("backbone/nano-llama-*"), made_by(after_smoke, "finetune")
    with_adapter = next(each for each in said if "--enable-lora" in each["arguments"])
    arguments = with_adapter["arguments"]
    assert arguments[0] == str(base) and with_adapter["body"]["model"] == tuned.name
    assert f"{tuned.name}={tuned / 'adapter'}" in arguments
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
    config = EndpointGeneratorConfig(name="openai", base_url="https://host/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match=r"NO_SUCH_KEY \(generator\.api_key_env\).*generator\.base_url"):
        check_generator(config)
