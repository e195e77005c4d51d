"""Metrics beside the judge: answers against reference answers, item by item or as a corpus.

accuracy  share of right answers, by the benchmark's own rule (see `gradsift.evaluation.matching`)
rouge_l   mean F-measure of the longest common subsequence of words, 0 to 1 (Lin, 2004); package rouge-score: lower
          case, ASCII letters and digits alone, no stemming
bleu      corpus BLEU, 0 to 100 (Papineni et al., 2002; Post, 2018); package sacrebleu with its defaults
meteor    mean METEOR, 0 to 1 (Lavie and Agarwal, 2007); package nltk with its constants, the words split as for
          BLEU. Needs WordNet's files, in which nltk looks up stems: a word that stemming changes has no synonyms

A metric that cannot be computed is None with a reason beside it, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.errors import ConfigError
from gradsift.evaluation.generation import ModelOutput
from gradsift.evaluation.matching import MATCHERS

_WORDNET_FILES = (
    "lexnames",
    *(f"{kind}.{part}" for kind in ("data", "index") for part in ("noun", "verb", "adj", "adv")),
)
_NO_WORDNET = "METEOR needs WordNet's files: give their folder with benchmark.wordnet_dir=DIR"
_NO_WORDS = "no reference answer has an ASCII letter or digit, and ROUGE-L counts nothing else"
_TOO_SHORT = "no answer has four tokens, and BLEU multiplies the precisions of one to four in a row"

Synonyms = Any  # nltk's WordNetCorpusReader


def measure(
    rows: Sequence[ModelOutput],
    match_of: Callable[[str], str],
    wordnet: Synonyms | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """All metrics of one model's answers, over the items with a reference answer.

    Args:
        match_of: the rule of a benchmark's accuracy, by its name.
        wordnet: what `read_wordnet` gave; without it METEOR is absent.
        progress: told how many rows were just measured, each of them twice: for its benchmark and for all.

    Returns:
        `{"benchmarks": {name: metrics}, "pooled": metrics, "bleu_signature": ...}`, where metrics are
        `{"items", "accuracy", "rouge_l", "bleu", "meteor", "absent": {metric: reason}}`. Pooled is over all
        items at once. Sets without reference answers are left out.
    """
    known = [row for row in rows if row["reference"] is not None]
    by_set: dict[str, list[ModelOutput]] = {}
    for row in known:
        by_set.setdefault(row["dataset"], []).append(row)
    return {
        "benchmarks": {name: _measure(found, match_of, wordnet, progress) for name, found in by_set.items()},
        "pooled": _measure(known, match_of, wordnet, progress),
        "bleu_signature": bleu_signature(),
    }


def _measure(
    rows: Sequence[ModelOutput],
    match_of: Callable[[str], str],
    wordnet: Synonyms | None,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    answers = [row["output"] for row in rows]
    references = [str(row["reference"]) for row in rows]
    right = [
        MATCHERS[match_of(row["dataset"])](answer, reference)
        for row, answer, reference in zip(rows, answers, references, strict=True)
    ]
    found: dict[str, Any] = {
        "items": len(rows),
        "accuracy": sum(right) / len(right),
        "rouge_l": rouge_l(answers, references),
        "bleu": bleu(answers, references),
        "meteor": None if wordnet is None else meteor(answers, references, wordnet),
    }
    reasons = {"rouge_l": _NO_WORDS, "bleu": _TOO_SHORT, "meteor": _NO_WORDNET}
    absent = {name: reason for name, reason in reasons.items() if found[name] is None}
    progress(len(rows))
    return {**found, "absent": absent} if absent else found


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Mean ROUGE-L F over the pairs whose reference has a word; None where none has."""
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
    """Corpus BLEU; None where no answer is long enough for a run of four tokens, which would make every corpus 0."""
    score = _bleu().corpus_score(list(answers), [list(references)])
    return float(score.score) if score.totals[-1] else None


def bleu_signature() -> str:
    """What sacrebleu asks to be told beside its figure: case, tokens, smoothing, version."""
    metric = _bleu()
    metric.corpus_score(["a"], [["a"]])  # it knows the number of references only once it has met one
    return str(metric.get_signature())


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()


def meteor(answers: Sequence[str], references: Sequence[str], wordnet: Synonyms) -> float:
    """Mean METEOR of the pairs."""
    from nltk.translate.meteor_score import single_meteor_score
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    scores = [
        float(single_meteor_score(split(reference).split(), split(answer).split(), wordnet=wordnet))
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)


def check_wordnet(folder: str | None) -> Path | None:
    """The folder of `benchmark.wordnet_dir`.

    Raises:
        ConfigError: one of the files that METEOR reads is not in it.
    """
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if missing := [name for name in _WORDNET_FILES if not (path / name).is_file()]:
        raise ConfigError(
            f"benchmark.wordnet_dir={folder} lacks {', '.join(missing)}; give the folder `dict` of WordNet 3.0 as "
            "Princeton distributes it, or leave it empty for no METEOR"
        )
    return path


def read_wordnet(folder: Path) -> Synonyms:
    """nltk's reader of WordNet's own files, which are text."""
    import warnings

    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """Other languages are mapped through a copy in nltk's own folders; there is none, and none is asked for."""

    nltk.data.path.append(str(folder))  # nltk reads nothing outside the folders that stand there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that other languages are not there
        return Reader(str(folder), None)


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """after - before of every figure that both have. Below zero is forgotten, except for losses and perplexities."""
    found = {}
    for name, value in before.items():
        if name != "items" and all(isinstance(one, int | float) for one in (value, after.get(name))):
            found[name] = float(after[name]) - float(value)
    return found
