"""Clusters of prompts, which an audit uses as task families if the data does not name families.

The vector of a prompt has the TF-IDF weights of its words and word pairs. The vectors are reduced to at most 50
dimensions by a truncated SVD, scaled to norm 1, and clustered by k-means with a fixed seed. No model is used, so the
clusters do not favour scorers that use a model's features. But they may favour the scorer `contrast`, which uses the
same vectors to find similar prompts. The clusters reflect topics and wording rather than skills, so compare methods by
clusters within one dataset only.
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
    """Return an artifact with the cluster of each example's prompt. The clusters do not depend on the run's method.

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
    """Return, for each example, the name of its prompt's cluster: the cluster's number as a string."""
    return [str(number) for number in json.loads(artifact.file(CLUSTERS_FILE).read_text(encoding="utf-8"))]


def cluster(texts: Sequence[str], clusters: int) -> np.ndarray:
    """Divide the texts into `clusters` clusters, and return the number of each text's cluster, (N,), counted from 0."""
    from sklearn.cluster import MiniBatchKMeans

    different = len(set(texts))
    if different < clusters:
        raise ConfigError(f"audit.clusters={clusters}, but only {different} prompts differ; give at most {different}")
    labels: np.ndarray = MiniBatchKMeans(clusters, n_init=10, random_state=0).fit_predict(prompt_vectors(texts))
    return labels


def prompt_of(example: Example) -> str:
    """Return the text by which prompts are compared: the instruction and input of the example's last exchange."""
    return f"{example.instruction}\n{example.input}".strip()


def prompt_vectors(texts: Sequence[str]) -> Any:
    """Return the TF-IDF vectors of the texts over their words and word pairs, (N, D), each with norm 1.

    With more than 50 texts and more than 50 different words and pairs, the vectors are dense and have 50 dimensions.
    Otherwise they are sparse and have a dimension for each word and pair. All texts without a word get the same vector,
    in an additional dimension. Their TF-IDF vector would be zero, which is nearer to every other vector than unrelated
    texts are to each other.

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
    """Return the words of a text in lower case, and its pairs of adjacent words.

    A word is a run of letters, digits and underscores, of any length.
    """
    words = re.findall(r"\w+", text.lower())
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]
