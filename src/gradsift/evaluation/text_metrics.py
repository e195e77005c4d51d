"""Metrics that compare answers with reference answers, without a judge.

accuracy  The share of correct answers. The benchmark's rule decides what is correct (`gradsift.evaluation.matching`).
rouge_l   The mean F-measure of the longest common subsequence of words, 0 to 1 (Lin, 2004), as the package rouge-score
          computes it. Words are runs of ASCII letters and digits, in lower case and not stemmed.
bleu      Corpus BLEU, 0 to 100 (Papineni et al., 2002; Post, 2018), as the package sacrebleu computes it by default.
meteor    The mean METEOR, 0 to 1 (Lavie and Agarwal, 2007), as the package nltk computes it by default. Words are split
          as for BLEU. METEOR needs WordNet's files, in which nltk looks up only the stem of a word. So a word has no
          synonyms if its stem is not a word (the stem of "happy" is "happi").

A metric that cannot be computed is None instead of 0, and the results give the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.errors import ConfigError
from gradsift.evaluation.generation import ModelOutput
from gradsift.evaluation.matching import MATCHERS

_WORDNET_FILES = [
    "lexnames",
    *(f"{kind}.{part}" for kind in ("data", "index") for part in ("noun", "verb", "adj", "adv")),
]
_REASONS = {
    "rouge_l": "no reference answer has an ASCII letter or digit, and ROUGE-L ignores all other characters",
    "bleu": "no answer has four tokens, and BLEU needs n-grams of up to four tokens",
    "meteor": "METEOR needs WordNet's files; give their folder with benchmark.wordnet_dir=DIR",
}


def measure(rows: Sequence[ModelOutput], match_of: Callable[[str], str], wordnet: Any = None) -> dict[str, Any]:
    """Compute all metrics of one model's answers, over the items with a reference answer.

    Args:
        match_of: returns the rule (a key of `MATCHERS`) by which answers to a benchmark are compared.
        wordnet: nltk's reader of WordNet (see `read_wordnet`); None omits METEOR.

    Returns:
        `{"benchmarks": {name: metrics}, "pooled": metrics, "bleu_signature": ...}`, where `metrics` is
        `{"items", "accuracy", "rouge_l", "bleu", "meteor", "absent": {metric: reason}}`. "pooled" has the metrics over
        the items of all benchmarks. "absent" is left out if no metric is None.
    """

    def metrics(rows: Sequence[ModelOutput]) -> dict[str, Any]:
        answers = [row["output"] for row in rows]
        references = [str(row["reference"]) for row in rows]
        right = sum(MATCHERS[match_of(row["dataset"])](row["output"], str(row["reference"])) for row in rows)
        values: dict[str, Any] = {
            "items": len(rows),
            "accuracy": right / len(rows),
            "rouge_l": rouge_l(answers, references),
            "bleu": bleu(answers, references),
            "meteor": None if wordnet is None else meteor(answers, references, wordnet),
        }
        absent = {name: reason for name, reason in _REASONS.items() if values[name] is None}
        return {**values, "absent": absent} if absent else values

    from sacrebleu.metrics import BLEU

    signed = BLEU()
    signed.corpus_score(["a"], [["a"]])  # the first corpus sets the number of references in the signature
    known = [row for row in rows if row["reference"] is not None]
    by_benchmark: dict[str, list[ModelOutput]] = {}
    for row in known:
        by_benchmark.setdefault(row["dataset"], []).append(row)
    return {
        "benchmarks": {name: metrics(each) for name, each in by_benchmark.items()},
        "pooled": metrics(known),
        "bleu_signature": str(signed.get_signature()),  # case, tokens, smoothing, version
    }


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Return the mean ROUGE-L F-measure over the pairs whose reference has a word; None if there is no such pair."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(False)
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    scores = [
        float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
        if tokenizer.tokenize(reference)
    ]
    return sum(scores) / len(scores) if scores else None


def bleu(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Return corpus BLEU; None if no answer has four tokens, as BLEU would then be 0 whatever the references are."""
    from sacrebleu.metrics import BLEU

    score = BLEU().corpus_score(list(answers), [list(references)])
    return float(score.score) if score.totals[-1] else None


def meteor(answers: Sequence[str], references: Sequence[str], wordnet: Any) -> float:
    """Return the mean METEOR over the pairs of an answer and its reference."""
    from nltk.translate.meteor_score import single_meteor_score
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    scores = [
        float(single_meteor_score(split(reference).split(), split(answer).split(), wordnet=wordnet))
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)


def check_wordnet(folder: str | None) -> Path | None:
    """Return `folder` (`benchmark.wordnet_dir`) as a path, or None if no folder is given.

    Raises:
        ConfigError: the folder lacks a file that METEOR reads.
    """
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if missing := [name for name in _WORDNET_FILES if not (path / name).is_file()]:
        raise ConfigError(
            f"benchmark.wordnet_dir={folder} lacks {', '.join(missing)}; give the folder `dict` of Princeton's WordNet "
            "3.0, or null to omit METEOR"
        )
    return path


def read_wordnet(folder: Path) -> Any:
    """Return nltk's reader of WordNet. `folder` is the folder `dict` of Princeton's WordNet."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """Do nothing: a mapping to other versions of WordNet would need nltk's own copy of WordNet."""

    nltk.data.path.append(str(folder))  # nltk reads files only below these folders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about missing files of other languages
        return Reader(str(folder), None)


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return `after` - `before` for each key whose value is a number in both, except the number of items.

    A lower metric or a higher loss means forgetting.
    """
    numbers = [{name for name, value in values.items() if isinstance(value, int | float)} for values in (before, after)]
    shared = numbers[0] & numbers[1] - {"items"}
    return {name: float(after[name]) - float(before[name]) for name in before if name in shared}
