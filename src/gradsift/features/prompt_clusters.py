"""Clusters of prompts, which an audit uses as task families if the data does not name families.

The prompts' words and word pairs are weighted by TF-IDF, reduced to at most 50 dimensions by a truncated SVD, scaled to
length one, and clustered with k-means with a fixed seed. No model is used, so the clusters do not favour scorers that
use a model's features. But the scorer `contrast` uses the same vectors to find similar prompts. The clusters
reflect topics and wording rather than skills, so compare methods by clusters within one dataset only.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.errors import ConfigError
from gradsift.runtime import Runtime

VERSION = 2
CLUSTERS_FILE = "clusters.json"
_DIMENSIONS = 50


def prompt_clusters(
    runtime: Runtime, loaded: Artifact, pool: Callable[[], Sequence[Example]], clusters: int
) -> Artifact:
    """Return an artifact with the cluster of each example's prompt, the same for all methods.

    Raises:
        ConfigError: there are fewer different prompts than clusters, or no prompt has a word.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        labels = cluster([prompt_of(example) for example in pool()], clusters)
        (folder / CLUSTERS_FILE).write_text(json.dumps(labels.tolist()), encoding="utf-8")
        return {"rows": len(labels)}

    slug = f"prompts-{clusters}"
    return runtime.store.obtain("clusters", slug, {"clusters": clusters}, [loaded], make, version=VERSION)


def clusters_of(artifact: Artifact) -> list[str]:
    """Return the cluster of each example's prompt, (N,)."""
    return [str(number) for number in json.loads(artifact.file(CLUSTERS_FILE).read_text(encoding="utf-8"))]


def cluster(texts: Sequence[str], clusters: int) -> np.ndarray:
    """Return the number (N,) of each text's cluster, from 0."""
    from sklearn.cluster import MiniBatchKMeans

    different = len(set(texts))
    if different < clusters:
        raise ConfigError(f"audit.clusters={clusters}, but only {different} prompts differ; give at most {different}")
    labels: np.ndarray = MiniBatchKMeans(clusters, n_init=10, random_state=0).fit_predict(prompt_vectors(texts))
    return labels


def prompt_of(example: Example) -> str:
    """Return the text by which prompts are compared: instruction and input of the last exchange."""
    return f"{example.instruction}\n{example.input}".strip()


def prompt_vectors(texts: Sequence[str]) -> Any:
    """Return TF-IDF vectors (N, D) of the texts' words and word pairs, of length one.

    With more than 50 texts and more than 50 different words and pairs, the vectors are dense and have 50 dimensions.
    Otherwise they are sparse and have a dimension for each word and pair. All texts without a word get the same vector,
    in an additional dimension, because a vector of zeros would be near to all others.

    Raises:
        ConfigError: no text has a word.
    """
    from scipy.sparse import hstack, issparse
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        features = TfidfVectorizer(analyzer=_words_and_pairs, sublinear_tf=True).fit_transform(texts)
    except ValueError as error:  # no prompt has a word
        raise ConfigError(f"the prompts hold no words by which to compare them ({error})") from error
    if features.shape[1] > _DIMENSIONS and len(texts) > _DIMENSIONS:
        features = normalize(TruncatedSVD(_DIMENSIONS, random_state=0).fit_transform(features))
    wordless = np.asarray(abs(features).sum(1)).reshape(-1, 1) == 0
    if wordless.any():
        stack = hstack if issparse(features) else np.hstack
        features = stack([features, wordless.astype(float)])
    return features


def _words_and_pairs(text: str) -> list[str]:
    """Return the words (runs of letters, digits and underscores, of any length) and the pairs of adjacent words."""
    words = re.findall(r"\w+", text.lower())
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]
