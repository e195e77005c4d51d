"""Laws of `proxy=hf` and `target=hf`: any model by its id or folder, and the models that have a name of their own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import made_once
from hub_stand_in import COMMIT, printed_by_client, serving
from hydra.core.config_store import ConfigStore
from test_norms import tiny_model
from test_tokens import example
from transformers import Qwen3Config, Qwen3ForCausalLM

from gradsift.composition import compose_config, in_full, register_schemas
from gradsift.config import KNOWN_MODELS, ModelConfig
from gradsift.data.tokens import encode
from gradsift.errors import ConfigError, DataError
from gradsift.training.backbones import Backbone
from gradsift.training.lora import CONFIG_FILE
from gradsift.training.pins import require_chat_template, require_known

FOREIGN = ("data=json", "data.path=rows.jsonl", "stop_after=finetune")
PIN = """
import json, sys, time
from pathlib import Path
from gradsift.artifacts import Store
from gradsift.config import ModelConfig
from gradsift.errors import DataError
from gradsift.runtime import Display
from gradsift.training.pins import pin, require_model
store = Store(Path("store"), say=lambda line: None)
for line in sys.stdin:
    path, revision = json.loads(line)
    config, started = ModelConfig(path=path, revision=revision), time.monotonic()
    try:
        require_model(store, config)
        answer = pin(store, Display(), config).info["revision"]
        assert store.has("backbone", "tiny", {"hub": path, "revision": revision}, [], version=2)
    except DataError as error:
        answer = str(error)
    print(json.dumps([answer, time.monotonic() - started]))
assert "torch" not in sys.modules
"""
OWN_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
ASKED = {
    "tiny": ("owner/tiny", None),
    "a revision": ("owner/tiny", COMMIT),
    "another revision": ("owner/tiny", "v9"),
    "gated": ("owner/gated", None),
    "missing": ("owner/missing", None),
    "adapter": ("owner/adapter", None),
    "own code": ("owner/own", None),
    "no name": ("a/b/c", None),
}


# ------------------------------------------------------------------------------------------- options


def test_a_model_is_named_by_its_id_and_has_options_beside_it() -> None:
    proxy = ("proxy.model.revision=abc", "proxy=hf", "proxy.model=Qwen/Qwen3-0.6B", "proxy.model.dtype=bfloat16")
    config = compose_config([*FOREIGN, *proxy, "target=hf", "target.model='/models/My Model/'"])
    model = config.proxy.model
    assert (model.kind, model.path) == ("pretrained", "Qwen/Qwen3-0.6B")
    assert (model.revision, model.dtype) == ("abc", "bfloat16")
    assert (config.proxy.name, config.target.name) == ("qwen3-0.6b", "my_model")
    assert config.target.model.path == "/models/My Model/"
    assert config.models == [config.proxy.model, config.target.model]


def test_only_a_models_own_option_is_spelt_in_full() -> None:
    asked = ["+proxy.model=a/b=c", "proxy.model={path: a/b}", "judge.model=m", "proxy.model.path=a/b", "-m"]
    assert in_full(asked) == ["+proxy.model.path=a/b=c", *asked[1:]]


BOTH = ("proxy=hf", "proxy.model=a/b", "target=hf", "target.model=a/b")


@pytest.mark.parametrize(
    ("option", "template"),
    [
        ("template.file=own.jinja", "own.jinja"),
        ("template.file='my own.jinja'", "my own.jinja"),
        ("template=chat", "chat"),
    ],
)
def test_one_option_is_the_template_of_proxy_and_target(option: str, template: str) -> None:
    config = compose_config([option, *FOREIGN, *BOTH])
    assert (config.proxy.template, config.target.template) == (template, template)
    named = compose_config([*FOREIGN, "proxy=qwen3_0.6b", "target=llama3_8b", option])
    assert (named.proxy.template, named.target.template) == (template, template)


@pytest.mark.parametrize("other", ["proxy.template=chat", "++target.template=chat", "template=chat"])
def test_two_templates_for_one_model_are_refused(other: str, gradsift: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*FOREIGN, *BOTH, other, "template.file=own.jinja"]
    words = r"sets the template of proxy and target; give it or \S+, not both"
    with pytest.raises(ConfigError, match=words):
        compose_config(options)
    assert gradsift(*options) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error


def test_a_template_that_does_not_exist_is_named(gradsift: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in {
        "template=vicuna": "proxy.template='vicuna' is not known; choose one of: alpaca, chat, plain, or name the file",
        "template.file=own.txt": "or name the file of a chat template, as in FILE.jinja",
        "template.file=own.jinja": "template=own.jinja cannot be read",
    }.items():
        Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
        assert gradsift(*FOREIGN, *BOTH, option) == 2
        assert words in capsys.readouterr().err


def test_a_sweep_over_templates_has_a_job_for_each(gradsift: Any) -> None:
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    quiet = ("tracker=none", "report=false", "proxy=tiny_bytes", "target=smollm2", "stop_after=load")
    assert gradsift("-m", *FOREIGN[:2], *quiet, "template=alpaca,plain", "hydra.sweep.dir=sweep") == 0
    configs = [yaml.safe_load(path.read_text())["values"] for path in sorted(Path("sweep").glob("*/config.yaml"))]
    assert [(each["proxy"]["template"], each["target"]["template"]) for each in configs] == [
        ("alpaca", "alpaca"),
        ("plain", "plain"),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["proxy=hf"], "as in proxy.model=ID or target.model=ID"),
        (["proxy=gpt2", "target=hf"], "as in proxy.model=ID or target.model=ID"),
        (["proxy=smollm2", "proxy.model=a/b"], "model.path=a/b is not read with model.kind=smollm2; take proxy=hf"),
        (["proxy=qwen3_6b"], "proxy=qwen3_6b does not exist; did you mean qwen3_0.6b?"),
        (["proxy=hf", "proxy.model=a/b", "proxy.model.dtype=float16"], "dtype='float16' is not known; choose one of"),
    ],
)
def test_what_names_no_model_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([*FOREIGN, *options])
    assert words in str(caught.value)


def test_named_models_are_hf_with_an_id_and_the_models_own_chat_template() -> None:
    config = compose_config([*FOREIGN, "proxy=qwen3_0.6b", "target=llama3_8b", "target.model.revision=abc"])
    assert (config.proxy.name, config.proxy.template) == ("qwen3_0.6b", "chat")
    assert config.proxy.model.path == "Qwen/Qwen3-0.6B"
    assert (config.target.name, config.target.template, config.target.model.revision) == ("llama3_8b", "chat", "abc")
    register_schemas()
    stored = ConfigStore.instance().repo
    for name, path in KNOWN_MODELS.items():
        for group in ("proxy", "target"):
            node = stored[group][f"{name}.yaml"].node
            assert (node.name, node.model.path, node.defaults[0]) == (name, path, "hf")


# ------------------------------------------------------------------------------------ folders and hub


def test_a_folder_that_is_no_model_is_refused_before_the_slow_imports(
    gradsift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradsift.pipeline", None)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG_FILE).write_text("{}")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(OWN_CODE))
    for group, model, words in [
        ("proxy", "own", 'needs the code that comes with it, as transformers has no model_type="mine"'),
        ("target", "own", "model.trust_remote_code=true runs the code, if you trust it"),
        ("proxy", "adapter", "model.path=adapter is a folder without config.json but with an adapter: give its base"),
        ("target", "./none", "model.path=./none is neither a folder here nor a model of the hub"),
    ]:
        others = "target=smollm2" if group == "proxy" else "proxy=smollm2"
        options = (*FOREIGN, f"{group}=hf", f"{group}.model={model}", others, "tracker=none", "report=false")
        assert gradsift(*options) == 2
        assert words in capsys.readouterr().err


def test_a_run_with_a_folder_in_two_precisions(gradsift: Any, tmp_path: Path, byte_tokenizer: Any) -> None:
    """Proxy and target of one folder: each computes in its own precision, and what it computed says so."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(byte_tokenizer), **shape, **heads)).save_pretrained(
        tmp_path / "Tiny-1M"
    )
    byte_tokenizer.save_pretrained(tmp_path / "Tiny-1M")
    rows = [{"instruction": f"Say {n}.", "output": "ab" * (n % 5 + 1)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    proxy = ("proxy=hf", "proxy.model=Tiny-1M", "proxy.members=2", "proxy.model.dtype=bfloat16", "proxy.batch_size=4")
    target = ("target=hf", "target.model=Tiny-1M", "target.epochs=1", "alpha=0.3")
    quiet = ("tracker=none", "report=false", "compute.threads=1", "compute.device=cpu", "proxy.max_length=32")
    assert gradsift(*FOREIGN, *proxy, *target, "target.max_length=32", *quiet) == 0
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/*/manifest.json")]
    named = {(each["stage"], *sorted(n["precision"] for n in each["numerics"].values())) for each in manifests}
    assert ("member", "bfloat16") in named
    assert ("finetune", "float32") in named
    assert list((tmp_path / "store/finetune").glob("tiny-1m-3rows-*/adapter"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "phi3"},  # transformers has this architecture, too
        {"auto_map": {"AutoModelForSequenceClassification": "m.M"}},  # for another task
        {"auto_map": None},
        {"auto_map": "m.M"},
    ],
)
def test_code_that_is_not_needed_is_no_reason_to_refuse_a_model(changes: dict[str, Any]) -> None:
    require_known(ModelConfig(path="own"), OWN_CODE | changes)
    require_known(ModelConfig(path="own", trust_remote_code=True), OWN_CODE)
    for kind in ("mine", "ph", None, 7):  # a part of a known name is none
        with pytest.raises(DataError, match=f'no model_type="{kind}"'):
            require_known(ModelConfig(path="own"), OWN_CODE | {"model_type": kind})


@pytest.mark.parametrize("file", [None, "tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_a_tokenizer_without_a_chat_template_is_refused_before_any_work(file: str | None, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tmp_path))
    require_chat_template(config, "target.template")  # a model without these settings is refused when it is loaded
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    if file is None:
        with pytest.raises(ConfigError, match=r"target\.template=chat needs .*; choose target\.template=alpaca"):
            require_chat_template(config, "target.template")
        return
    (tmp_path / file).write_text('{"chat_template": "{{ messages }}"}')
    require_chat_template(config, "target.template")


def test_a_targets_chat_template_is_missed_before_the_proxy_is_trained(
    gradsift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradsift.pipeline", None)
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "base/tokenizer_config.json").write_text("{}")
    options = ("proxy=smollm2", "target=hf", "target.model=base", "target.template=chat", "tracker=none")
    assert gradsift(*FOREIGN, *options) == 2
    refused = "{}.template=chat needs a tokenizer with a chat template, and the tokenizer of {} has none"
    assert refused.format("target", "base") in capsys.readouterr().err
    assert gradsift("proxy.template=chat", "tracker=none") == 2
    assert refused.format("proxy", "nano") in capsys.readouterr().err
    assert gradsift(*FOREIGN[:2], *options, "stop_after=selection", "report=false") == 2  # no target is needed
    assert "target.template" not in capsys.readouterr().err


CHAT = """
from pathlib import Path
from gradsift.artifacts import Store
from gradsift.config import ModelConfig
from gradsift.errors import ConfigError
from gradsift.training.pins import require_chat_template, require_model
for name in ("owner/base", "owner/chat"):
    config = ModelConfig(path=name)
    require_model(Store(Path("store")), config)
    try:
        require_chat_template(config, "proxy.template")
        print("usable")
    except ConfigError as error:
        print(error)
"""


def test_a_hub_models_chat_template_is_looked_for_before_any_work(tmp_path: Path) -> None:
    for name in ("base", "chat"):
        folder = tmp_path / "hub/owner" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with serving(tmp_path / "hub") as address:
        base, chat = printed_by_client(CHAT, address, tmp_path).splitlines()
    assert base.startswith(
        "proxy.template=chat needs a tokenizer with a chat template, and the tokenizer of owner/base"
    )
    assert chat == "usable"


@pytest.mark.parametrize(
    ("options", "is_used"),
    [
        (("scorer=random",), True),
        (("scorer=random", "stop_after=generate"), False),
        (("scorer=full",), False),
        (("scorer=llm_rating", "stop_after=selection", "report=false"), True),
    ],
)
def test_a_local_judge_is_among_the_models_of_a_run_that_judges(options: tuple[str, ...], is_used: bool) -> None:
    others = ("proxy=gpt2", "target=llama2_7b", "benchmark=vicuna", "judge=local")
    config = compose_config([*FOREIGN[:2], *others, *options])
    assert (config.models[-1:] == [config.judge.model]) is is_used


@pytest.fixture(scope="session")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """The commit or the error's message, and the seconds it took, for each of `ASKED`, and without any network."""

    def make(folder: Path) -> None:
        for name in ("tiny", "gated", "adapter", "own"):
            (folder / "hub/owner" / name).mkdir(parents=True)
        (folder / "hub/owner/gated/.gated").touch()
        (folder / "hub/owner/adapter/adapter_config.json").write_text("{}")
        (folder / "hub/owner/own/config.json").write_text(json.dumps(OWN_CODE))
        tiny_model("llama").config.save_pretrained(folder / "hub/owner/tiny")

        with serving(folder / "hub") as address:
            answers = printed_by_client(PIN, address, folder, ASKED.values())
        gone = [("owner/other", None), ASKED["tiny"]]  # nobody serves there any more
        answers += printed_by_client(PIN, address, folder, gone)
        (folder / "answers").write_text(answers)

    lines = (made_once(tmp_path_factory, "model_hub", make) / "answers").read_text().splitlines()
    names = [*ASKED, "no network", "pinned before"]
    return dict(zip(names, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    ("asked", "words"),
    {
        "tiny": COMMIT,
        "a revision": COMMIT,
        "pinned before": COMMIT,
        "another revision": "has no such revision; check model.revision",
        "gated": "is gated: accept its licence on its hub page, then log in with `hf auth login`",
        "missing": "neither a folder here nor a model of the hub; check the name",
        "adapter": "has no config.json on the hub",
        "own code": "model.path=owner/own needs the code that comes with it",
        "no name": "neither a folder here nor a model of the hub; check the name",
        "no network": "the hub cannot be reached and the local cache does not have it",
    }.items(),
)
def test_a_hub_model_is_pinned_or_refused_at_once(asked: str, words: str, pinned: dict[str, Any]) -> None:
    answer, seconds = pinned[asked]
    assert words in answer
    assert seconds < 10  # the hub's client would retry for 24


def test_token_ids_that_the_model_does_not_know_are_refused(byte_tokenizer: Any) -> None:
    examples, _ = encode([example("say", "z")], byte_tokenizer, "plain", 32)
    with pytest.raises(
        DataError, match=r"gives the token id 25\d, but the GPT2LMHeadModel has embeddings of 61 tokens"
    ):
        Backbone(tiny_model("gpt2"), byte_tokenizer).require_embedded(examples)
