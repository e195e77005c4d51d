"""Laws of embeddings: equal to pooling one example at a time, whatever the padding, batches and blocks."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy, float64
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, EmbedderConfig, HiddenStatesConfig, SentenceTransformersConfig
from gradsift.data.batching import collate
from gradsift.data.examples import Example, Turn, make_example
from gradsift.data.tokens import Encoded, encode
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.features import embeddings as embeddings_module
from gradsift.features.embeddings import (
    Embedder,
    HiddenStates,
    embed,
    embedded,
    hidden_states_embedder,
    pool,
    pooled_states,
)
from gradsift.features.sentence_encoder import load_sentence_encoder, sentence_encoder
from gradsift.features.vectors import FEATURES_FILE, IDS_FILE, finish_features, open_features, read_features
from gradsift.journal import JOURNAL_FILE
from gradsift.manifests import UNFINISHED
from gradsift.runtime import Display, Runtime
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

POOLINGS = ("mean", "weighted_mean", "last")
ROWS = [
    ("name a colour", "", "red"),
    ("add", "3 4", "7"),
    ("name a colour", "", "red"),  # equal to the first
    ("write", "", "a b c d e f g h i j k l m n o p"),
    ("say nothing", "", ""),  # no response token
    ("add", "3 4", "8"),
]


def examples() -> list[Example]:
    seen: Counter[str] = Counter()
    return [make_example(10 + 2 * row, (), *texts, {}, seen) for row, texts in enumerate(ROWS)]


def model_of(architecture: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, initializer_range=0.3, **shape))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, **shape, **heads))
    return model.requires_grad_(False).eval()


@pytest.fixture
def backbone(byte_tokenizer: Any) -> Backbone:
    return Backbone(model_of("gpt2", len(byte_tokenizer)), byte_tokenizer)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    display = Display(Console(file=io.StringIO()))
    return Runtime(Store(tmp_path / "store", say=lambda line: None), ComputeConfig(device="cpu"), display, seed=0)


exact_model = functools.lru_cache(maxsize=1)(exact_copy)


def slow(model: Any, ids: Sequence[int], pooling: str) -> np.ndarray:
    """Pool one text in float64 without padding, in a loop over its tokens."""
    with torch.no_grad():
        found = exact_model(model)(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[-1][0]
    if pooling == "last":
        return found[-1].numpy()
    total, weights = np.zeros(found.shape[1]), 0.0
    for place, state in enumerate(found.numpy(), start=1):
        weight = float(place) if pooling == "weighted_mean" else 1.0
        total += weight * state
        weights += weight
    return total / weights


# ------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_ragged_batch_is_pooled_as_each_text_alone(architecture: str, padding_side: str, pooling: str) -> None:
    model = model_of(architecture, 50)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 50, length) for length in (1, 9, 4, 17, 9)]
    texts[1][-2:] = 7  # the id of the padding is a token like any other
    batch = collate(
        [Encoded(row, row, ids, np.zeros(len(ids), bool)) for row, ids in enumerate(texts)], 7, padding_side
    )
    with torch.no_grad():
        found = pooled_states(model, batch, pooling)
    assert found.dtype == torch.float32
    assert_close_by_norm(found, np.stack([slow(model, ids, pooling) for ids in texts]), k=256, dim=-1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_by_hand_ignores_values_at_the_padding(pooling: str) -> None:
    hidden = torch.tensor([[[np.nan], [1.0], [4.0]], [[6.0], [3.0], [np.inf]]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = {"mean": [2.5, 4.5], "weighted_mean": [3.0, 4.0], "last": [4.0, 3.0]}[pooling]
    assert pool(hidden, mask, pooling).flatten().tolist() == pytest.approx(expected)


def test_half_precision_states_are_summed_in_float32() -> None:
    hidden = torch.cat([torch.full((1, 1, 1), 256.0), torch.ones(1, 999, 1)], dim=1).to(torch.bfloat16)
    mean = pool(hidden, torch.ones(1, 1000, dtype=torch.int64), "mean")  # in bfloat16 256 + 1 is 256
    assert float(mean) == pytest.approx(1.255, rel=1e-6)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match="pooling='max' is not known"):
        HiddenStatesConfig(name="hidden_states", pooling="max")


# ------------------------------------------------------------------------------------------- batches


def text_of(row: int, ids: np.ndarray) -> Encoded:
    return Encoded(row, row, ids.astype(np.int32), np.zeros(len(ids), dtype=bool))


def texts_of(count: int) -> list[Encoded]:
    rng = np.random.default_rng(0)
    return [text_of(row, rng.integers(0, 200, length)) for row, length in enumerate(rng.integers(1, 40, count))]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_neither_token_budget_nor_order_changes_an_embedding(pooling: str, backbone: Backbone) -> None:
    encoder = HiddenStates(backbone, HiddenStatesConfig(name="x", pooling=pooling), "plain")
    texts = texts_of(30)
    expected = [unit(slow(backbone.model, text.input_ids.tolist(), pooling)) for text in texts]
    for tokens, order in ((1, texts), (64, texts[::-1]), (10_000, texts)):
        vectors = embedded(encoder, order, TokenBudget(tokens, lambda line: None), lambda done: None)
        for text, vector in zip(order, vectors, strict=True):
            assert_close_by_norm(vector, expected[text.row], k=256)


def test_out_of_memory_halves_the_batch_and_changes_no_embedding(backbone: Backbone) -> None:
    class Small(HiddenStates):
        def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
            if len(texts) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().embed(texts)

    config, texts = HiddenStatesConfig(name="x"), texts_of(20)
    vectors = embedded(
        Small(backbone, config, "plain"), texts, TokenBudget(10_000, lambda line: None), lambda done: None
    )
    for text, vector in zip(texts, vectors, strict=True):
        assert_close_by_norm(vector, unit(slow(backbone.model, text.input_ids.tolist(), config.pooling)), k=256)


# --------------------------------------------------------------------------------------------- texts


def read(backbone: Backbone, text: str, rows: Sequence[Example], template: str = "plain", **options: Any) -> list[str]:
    config = HiddenStatesConfig(name="x", text=text, **options)
    embedder = hidden_states_embedder(config, template, None, lambda: backbone)  # type: ignore[arg-type]
    texts, _, _ = embedder.load().read(rows, lambda done: None)
    decoded = {text.row: backbone.tokenizer.decode(text.input_ids) for text in texts}
    return [decoded.get(row, "") for row in range(len(rows))]


def test_the_text_is_prompt_and_response_or_either_as_asked(backbone: Backbone) -> None:
    rows = examples()[1:2]
    encoded, _ = encode(rows, backbone.tokenizer, "alpaca", 128)
    assert read(backbone, "prompt_and_response", rows, "alpaca") == [backbone.tokenizer.decode(encoded[0].input_ids)]
    assert read(backbone, "prompt", rows) == ["add\n3 4\n"]
    assert read(backbone, "prompt", rows, "chat")[0].endswith("<|im_start|>assistant\n")
    assert read(backbone, "instruction_input_output", rows, "alpaca") == ["add\n3 4\n7<eos>"]  # no template in it


def test_a_conversation_is_read_whole_and_a_long_text_is_cut(backbone: Backbone) -> None:
    turns = (Turn("user", "hello"), Turn("assistant", "hi"))
    one = make_example(0, turns, "add", "", "7", {}, Counter())
    assert read(backbone, "prompt", [one]) == ["hello\nhi\nadd\n"]
    assert read(backbone, "prompt_and_response", [one]) == ["hello\nhi\nadd\n7<eos>"]
    assert read(backbone, "prompt", [one], max_length=4) == ["add\n"]
    assert read(backbone, "prompt_and_response", [one], max_length=4) == ["d\n7<eos>"]  # the response goes last


def test_what_has_no_response_token_is_an_empty_text(backbone: Backbone) -> None:
    texts = read(backbone, "prompt_and_response", examples())
    assert texts[4] == ""
    assert all(texts[row] for row in (0, 1, 2, 3, 5))
    assert read(backbone, "prompt", examples())[4] == "say nothing\n"


# --------------------------------------------------------------------------------------------- stage


def parent(runtime: Runtime, stage: str) -> Artifact:
    return runtime.store.obtain(stage, "x", {}, [], lambda folder: {}, version=1)


def embedder_of(
    runtime: Runtime, backbone: Backbone, encoder: Callable[[Any], Any] = lambda e: e, **options: Any
) -> Embedder:
    config = HiddenStatesConfig(name="hidden_states", **options)
    made = hidden_states_embedder(config, "plain", parent(runtime, "backbone"), lambda: backbone)
    return Embedder(made.name, made.settings, made.model, lambda: encoder(made.load()))


def test_the_stage_writes_unit_rows_in_the_pools_order_and_equal_ones_for_duplicates(
    runtime: Runtime, backbone: Backbone
) -> None:
    source, rows = parent(runtime, "load"), examples()
    artifact = embed(runtime, embedder_of(runtime, backbone), source, lambda: (rows, []))
    features = read_features(artifact)
    assert features.vectors.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(features.vectors, axis=1), [1, 1, 1, 1, 0, 1], rtol=1e-6)
    assert features.vectors[0].tobytes() == features.vectors[2].tobytes()
    assert features.vectors[1].tobytes() != features.vectors[5].tobytes()
    encoded, _ = encode(rows, backbone.tokenizer, "plain", 128)
    for example in encoded:
        expected = slow(backbone.model, example.input_ids.tolist(), "mean")
        assert_close_by_norm(np.array(features.vectors[example.row]), expected / np.linalg.norm(expected), k=256)
    named = json.loads(artifact.file(IDS_FILE).read_text())
    assert named["ids"] == [example.example_id for example in rows]
    assert (artifact.info["empty"], artifact.info["cut"]) == (1, 0)
    assert set(artifact.manifest["files"]) == {"features.npy", "ids.json"}


def test_tasks_of_a_target_set_come_with_its_vectors(runtime: Runtime, backbone: Backbone) -> None:
    tasks = ["a", "a", "b", "b", "b", "c"]
    source = parent(runtime, "target_set")
    features = read_features(embed(runtime, embedder_of(runtime, backbone), source, lambda: (examples(), tasks)))
    assert features.tasks == tuple(tasks)


def test_embeddings_are_found_again_until_something_changes_them(runtime: Runtime, backbone: Backbone) -> None:
    def made(source: str = "load", **options: Any) -> str:
        embedder = embedder_of(runtime, backbone, **options)
        return embed(runtime, embedder, parent(runtime, source), lambda: (examples(), [])).fingerprint

    first = made()
    assert made() == first
    others = [{"pooling": "last"}, {"text": "prompt"}, {"max_length": 9}, {"source": "target_set"}]
    assert len({first, *(made(**other) for other in others)}) == 5


@pytest.mark.parametrize("place", [0, 6, 9, 12, 60, 127])
def test_an_array_whose_header_has_changed_is_read_again_as_it_was(tmp_path: Path, place: int) -> None:
    written = open_features(tmp_path, 100, 8)
    written[:] = 1
    written.flush()
    file = tmp_path / UNFINISHED / FEATURES_FILE
    size = file.stat().st_size
    flip(file, place)
    finish_features(tmp_path, open_features(tmp_path, 100, 8), [""] * 100)
    assert (np.load(tmp_path / FEATURES_FILE) == 1).all()
    assert (tmp_path / FEATURES_FILE).stat().st_size == size


@pytest.mark.parametrize("damage", [None, "vectors", "journal", "cut journal"])
def test_an_interrupted_stage_continues_with_the_block_it_was_in(
    runtime: Runtime, backbone: Backbone, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings_module, "_BLOCK", 2)
    seen: list[int] = []

    class Watched:
        def __init__(self, encoder: HiddenStates, lives: float) -> None:
            self.encoder, self.lives, self.read = encoder, lives, encoder.read
            self.model, self.dimensions = encoder.model, encoder.dimensions

        def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
            if len(seen) >= self.lives:
                raise KeyboardInterrupt
            seen.append(len(texts))
            return self.encoder.embed(texts)

    def run(lives: float) -> Artifact:
        embedder = embedder_of(runtime, backbone, lambda encoder: Watched(encoder, lives))
        return embed(runtime, embedder, parent(runtime, "load"), lambda: (examples(), []))

    with pytest.raises(KeyboardInterrupt):
        run(lives=1)
    assert seen == [2]
    (part,) = runtime.store.root.glob("embeddings/*.part")
    if damage is not None:
        place = {"vectors": 128, "journal": 30, "cut journal": None}[damage]
        file = part / UNFINISHED / (FEATURES_FILE if damage == "vectors" else JOURNAL_FILE)
        flip(file, place) if place is not None else file.write_bytes(file.read_bytes()[:-9])
    resumed = run(lives=99)
    # four different texts in all: nothing was embedded twice, but for a block that was damaged
    assert seen == ([2, 2] if damage is None else [2, 2, 2])
    fresh = Runtime(Store(runtime.store.root.parent / "other", say=lambda line: None), *_rest(runtime))
    whole = embed(fresh, embedder_of(fresh, backbone), parent(fresh, "load"), lambda: (examples(), []))
    assert read_features(resumed).vectors.tobytes() == read_features(whole).vectors.tobytes()
    assert set(resumed.manifest["files"]) == {"features.npy", "ids.json"}


def flip(file: Path, place: int) -> None:
    """Change one bit, as a failing disk may."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def _rest(runtime: Runtime) -> tuple[Any, ...]:
    return runtime.compute, runtime.display, runtime.seed


def test_an_embedding_that_is_not_finite_is_named_by_its_row(runtime: Runtime, backbone: Backbone) -> None:
    letter = backbone.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    backbone.model.transformer.wte.weight.data[letter] = torch.nan
    rows = [*examples(), make_example(77, (), "q", "", "x", {}, Counter())]
    with pytest.raises(GradsiftError, match=r"embedding of row 77 is not finite; take compute.precision=float32"):
        embed(runtime, embedder_of(runtime, backbone), parent(runtime, "load"), lambda: (rows, []))


def test_a_model_without_hidden_states_of_its_own_is_refused(backbone: Backbone) -> None:
    bare = Backbone(backbone.model.transformer, backbone.tokenizer)  # its base model is itself
    with pytest.raises(ConfigError, match="gives no hidden states apart from its logits; take another proxy"):
        HiddenStates(bare, HiddenStatesConfig(name="x"), "plain")
    with pytest.raises(ConfigError, match="embedder=mine is not known"):
        hidden_states_embedder(EmbedderConfig(name="mine"), "plain", None, lambda: bare)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ sentence-transformers

installed = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="the extra `embeddings` (sentence-transformers) is not installed",
)


@pytest.fixture
def saved(tmp_path: Path, byte_tokenizer: Any) -> Path:
    """Save a small random BERT with mean pooling in sentence-transformers' format."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(byte_tokenizer), initializer_range=0.3, **shape)).save_pretrained(
        tmp_path / "b"
    )
    byte_tokenizer.save_pretrained(tmp_path / "b")
    transformer = Transformer(str(tmp_path / "b"), max_seq_length=24)
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def sentences(runtime: Runtime, folder: Path | str, **options: Any) -> Any:
    config = SentenceTransformersConfig(name="sentence_transformers", model=str(folder), **options)
    return load_sentence_encoder(runtime, config, sentence_encoder(runtime, config))


@installed
def test_a_sentence_encoder_embeds_each_row_as_if_alone(runtime: Runtime, saved: Path) -> None:
    from sentence_transformers import SentenceTransformer

    seen: Counter[str] = Counter()
    rows = [*examples(), make_example(99, (), " ", "", " ", {}, seen)]
    encoder = sentences(runtime, saved)
    embedder = Embedder("sentence_transformers", {}, parent(runtime, "backbone"), lambda: encoder)
    artifact = embed(runtime, embedder, parent(runtime, "load"), lambda: (rows, []))
    vectors = read_features(artifact).vectors
    alone = SentenceTransformer(str(saved), device="cpu").double()
    for row, (instruction, given, output) in enumerate(ROWS):
        lines = [instruction, given, output] if given else [instruction, output]
        with float64():
            expected = alone.encode(["\n".join(lines)], normalize_embeddings=True)[0]
        assert_close_by_norm(np.array(vectors[row]), expected, k=256)
    assert not vectors[6].any()  # nothing but white space
    assert artifact.info["cut"] == 1  # the long row; the model reads 24 tokens


@installed
def test_max_length_only_shortens_and_the_prompt_leaves_the_response_out(runtime: Runtime, saved: Path) -> None:
    lengths = [len(text.input_ids) for text in sentences(runtime, saved).read(examples(), lambda done: None)[0]]
    assert max(lengths) == 24
    shorter = sentences(runtime, saved, max_length=8, text="prompt")
    texts, cut, refused = shorter.read(examples()[:2], lambda done: None)
    assert not refused
    assert shorter._contents == {0: "name a colour\n", 1: "add\n3 4\n"}
    assert ([len(text.input_ids) for text in texts], cut) == ([8, 8], 1)
    whole = shorter.embed(texts[:1])
    shorter._contents[0] = "name a c"
    np.testing.assert_array_equal(whole, shorter.embed(texts[:1]))  # the same tokens in the same batch


@installed
def test_the_pin_holds_the_pooling_too_and_no_code_of_the_models_runs(runtime: Runtime, saved: Path) -> None:
    config = SentenceTransformersConfig(name="sentence_transformers", model=str(saved))
    before = sentence_encoder(runtime, config)
    assert sentence_encoder(runtime, config).fingerprint == before.fingerprint
    pooling = next(saved.glob("1_*/config.json"))
    pooling.write_text(pooling.read_text() + "\n")
    assert sentence_encoder(runtime, config).fingerprint != before.fingerprint
    modules = json.loads((saved / "modules.json").read_text())
    modules[1]["type"] = "own_code.Pooling"
    (saved / "modules.json").write_text(json.dumps(modules))
    (saved / "own_code.py").write_text("raise SystemExit('the code of the folder ran')\n")
    with pytest.raises(DataError, match=r"embedder.model=.* could not be loaded .*own_code"):
        sentences(runtime, saved)


@installed
def test_what_is_no_sentence_encoder_is_refused_by_name(runtime: Runtime, tmp_path: Path, saved: Path) -> None:
    with pytest.raises(
        DataError, match=r"is a folder without modules\.json; give one that sentence-transformers saved"
    ):
        sentences(runtime, tmp_path)
    (saved / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"embedder.model=.* could not be loaded"):
        sentences(runtime, saved)
    with pytest.raises(DataError, match=r"nobody/nothing could not be loaded .*give a folder with such a model"):
        sentences(runtime, "nobody/nothing")  # the tests have no network


def test_a_missing_package_is_reported_with_its_install_command(
    gradsift: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sentence_transformers" else find(name, *rest)
    )
    options = ("scorer=sbert", "target_set=verifiable", "embedder=sentence_transformers", "stop_after=scores")
    assert gradsift("experiment=smoke", "tracker=none", *options) == 2
    assert "pip install -c constraints.txt -e '.[embeddings]'" in capsys.readouterr().err
    assert not list(gradsift.store.glob("score/*"))  # type: ignore[attr-defined]
