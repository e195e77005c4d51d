"""Clusters of prompts, for data whose kinds of task nobody has named.

TF-IDF of the prompts' words and word pairs, reduced to at most 50 dimensions by a truncated SVD, rows of length one,
k-means: cheap, seeded, and without a model, so that no scorer's own features judge it. They count topics and wordings,
not skills: use the number to compare methods on one dataset.
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

VERSION = 1
CLUSTERS_FILE = "clusters.json"
_DIMENSIONS = 50


def prompt_clusters(
    runtime: Runtime, loaded: Artifact, pool: Callable[[], Sequence[Example]], clusters: int
) -> Artifact:
    """Clusters of the examples by their prompts; made once for a dataset, so that all methods are held against one.

    Raises:
        ConfigError: there are fewer different prompts than clusters, or no prompt has a word.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        prompts = [f"{example.instruction}\n{example.input}".strip() for example in pool()]
        labels = cluster(prompts, clusters)
        (folder / CLUSTERS_FILE).write_text(json.dumps(labels.tolist()), encoding="utf-8")
        return {"rows": len(prompts)}

    slug = f"prompts-{clusters}"
    return runtime.store.obtain("clusters", slug, {"clusters": clusters}, [loaded], make, version=VERSION)


def clusters_of(made: Artifact) -> list[str]:
    """The cluster of each example's prompt, (N,)."""
    numbers: list[int] = json.loads(made.file(CLUSTERS_FILE).read_text(encoding="utf-8"))
    return [str(number) for number in numbers]


def _pieces(text: str) -> list[str]:
    """Words of any length, numbers and scripts without spaces included, and pairs of neighbours."""
    words = re.findall(r"\w+", text.lower())
    return words + [f"{one} {other}" for one, other in itertools.pairwise(words)]


def cluster(texts: Sequence[str], clusters: int) -> np.ndarray:
    """The cluster (N,) of each text, from 0."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    different = len(set(texts))
    if different < clusters:
        raise ConfigError(f"audit.clusters={clusters}, but only {different} prompts differ; give at most {different}")
    try:
        words = TfidfVectorizer(analyzer=_pieces, sublinear_tf=True).fit_transform(texts)
    except ValueError as error:  # not a word in any prompt
        raise ConfigError(f"audit.clusters={clusters}: the prompts hold no words to cluster by ({error})") from error
    features = words
    if words.shape[1] > _DIMENSIONS and len(texts) > _DIMENSIONS:
        features = normalize(TruncatedSVD(_DIMENSIONS, random_state=0).fit_transform(words))
    found = MiniBatchKMeans(clusters, n_init=10, random_state=0).fit_predict(features)
    labels: np.ndarray = found
    return labels
