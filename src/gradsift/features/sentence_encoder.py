"""Embeddings from a model of the package sentence-transformers, an optional dependency.

The model's files determine how the package pools the token vectors and whether it normalises the result. Code that
comes with a model is never loaded. The weights of the transformer must be safetensors; the weights of another module,
such as a dense layer, may be in a `pytorch_model.bin`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import SentenceTransformersConfig
from gradsift.data.examples import Example, Rejected
from gradsift.data.templates import render
from gradsift.data.tokens import Encoded, chunks, start_of
from gradsift.errors import ConfigError, DataError, first_line
from gradsift.features.embeddings import Embedder
from gradsift.manifests import file_hash
from gradsift.names import slug_of_path
from gradsift.runtime import Advance, Runtime
from gradsift.training.device import device_of
from gradsift.training.numerics import dtype_of, rounds_to_tf32

VERSION = 1
_LAYOUT = "modules.json"  # part of every saved sentence encoder


class SentenceEncoder:
    """A sentence-transformers model as a `gradsift.features.embeddings.Encoder`."""

    def __init__(self, encoder: Any, config: SentenceTransformersConfig) -> None:
        self._encoder, self._text = encoder, config.text
        own = encoder.max_seq_length
        encoder.max_seq_length = min(config.max_length, own) if own else config.max_length
        self._contents: dict[int, str] = {}  # by `Encoded.row`
        self.model = encoder[0].auto_model
        self.dimensions = int(encoder.get_embedding_dimension())

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Encoded], int, list[Rejected]]:
        """See `Encoder.read`. No example is rejected, because no chat template is used."""
        limit, tokenizer = self._encoder.max_seq_length, self._encoder.tokenizer
        texts, cut, row = [], 0, 0
        for contents in chunks((start_of(text_of(each, self._text), tokenizer, limit) for each in examples), len):
            tokens = tokenizer(contents, truncation=False, verbose=False)["input_ids"]
            for content, ids in zip(contents, tokens, strict=True):
                if content.strip():
                    kept = np.array(ids[:limit], dtype=np.int32)
                    texts.append(Encoded(row, examples[row].row_index, kept, np.zeros(len(kept), dtype=bool)))
                    self._contents[row] = content
                cut += len(ids) > limit
                row += 1
            advance(len(contents))
        return texts, cut, []

    def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
        contents = [self._contents[text.row] for text in texts]
        options = {"batch_size": len(contents), "show_progress_bar": False, "convert_to_tensor": True}
        vectors: np.ndarray = self._encoder.encode(contents, **options).float().cpu().numpy()
        return vectors


def text_of(example: Example, text: str) -> str:
    """Return the earlier turns, instruction and input of an example, and its output unless `text` is `prompt`.

    Each of these parts begins on a new line.
    """
    segments = render(example, "plain")
    kept = segments[:-1] if text == "prompt" else segments
    return "".join(segment.text for segment in kept)


def sentence_embedder(runtime: Runtime, config: SentenceTransformersConfig) -> Embedder:
    """Return the embedder that `config` describes.

    The model's version is pinned at once (see `sentence_encoder`), and the model is loaded on first use.
    """
    pin = sentence_encoder(runtime, config)
    settings = {"text": config.text, "max_length": config.max_length}
    return Embedder(config.name, settings, pin, functools.cache(lambda: load_sentence_encoder(runtime, config, pin)))


def sentence_encoder(runtime: Runtime, config: SentenceTransformersConfig) -> Artifact:
    """Return an artifact that pins the model's version: a folder by the hashes of its files, a hub model by its commit.

    Raises:
        ConfigError: the package is not installed.
        DataError: `embedder.model` is neither a folder of a saved sentence encoder nor a model of the hub.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            f"embedder={config.name} needs the package sentence-transformers; install it with "
            "`pip install -c constraints.txt -e '.[embeddings]'`, or take embedder=hidden_states"
        )
    folder = Path(config.model).expanduser()
    settings: dict[str, Any] = {"hub": config.model, "revision": config.revision}
    if folder.is_dir():
        if not (folder / _LAYOUT).is_file():
            raise DataError(
                f"embedder.model={config.model} is a folder without {_LAYOUT}; give one that sentence-transformers "
                "saved"
            )
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt", ".model"))
        settings = {"files": {str(p.relative_to(folder)): file_hash(p) for p in files}}

    def make(part: Path) -> Mapping[str, Any]:
        if "files" in settings:
            return {"revision": None, "content": ""}
        from huggingface_hub import hf_hub_download

        with _loading(config):
            # from the hub or, if the hub cannot be reached, from the local cache
            file = hf_hub_download(config.model, _LAYOUT, revision=config.revision)
        commit = Path(file).parent.name
        return {"revision": commit, "content": commit}

    slug = slug_of_path(config.model)
    pin = runtime.store.obtain("sentence_encoder", slug, settings, [], make, version=VERSION, light=True)
    numerics = {"precision": str(dtype_of(runtime.compute)).removeprefix("torch.")}
    return replace(pin, numerics=numerics | ({"products": "tf32"} if rounds_to_tf32(runtime.compute) else {}))


def load_sentence_encoder(runtime: Runtime, config: SentenceTransformersConfig, pin: Artifact) -> SentenceEncoder:
    """Load and return the model. `pin` is the artifact of `sentence_encoder`, which names the version to load."""
    from sentence_transformers import SentenceTransformer

    folder = Path(config.model).expanduser()
    with _loading(config):
        encoder = SentenceTransformer(
            str(folder) if folder.is_dir() else config.model,
            device=str(device_of(runtime.compute)),
            revision=pin.info["revision"],
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": dtype_of(runtime.compute)},
        )
    return SentenceEncoder(encoder.eval(), config)


@contextmanager
def _loading(config: SentenceTransformersConfig) -> Iterator[None]:
    """Turn the errors of a model that cannot be loaded into a `DataError` that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:  # HfHubHTTPError is an OSError
        raise DataError(
            f"embedder.model={config.model} could not be loaded ({first_line(error)}): the hub cannot be reached and "
            "the model is not in the local cache, or it is not a sentence-transformers model with safetensors; give a "
            "folder with such a model"
        ) from error
