"""A sample of the judged answers for the report's page, with the judge's replies for both orders of the answers."""

from __future__ import annotations

from collections import Counter
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from gradsift.evaluation.generation import OUTPUTS_FILE, item_key, read_model_outputs, without_turns
from gradsift.evaluation.judges import with_input
from gradsift.evaluation.judgments import ORDERS, Judgment, read_judgments
from gradsift.evaluation.pws import in_both_orders, outcome
from gradsift.pages import presentable
from gradsift.report.material import Material, Missing, Run, attempt
from gradsift.report.run_tables import grouped

MOST = 120  # pairs on a page
CUT = 600  # characters of a text


class Words(NamedTuple):
    """The judge's reply to a pair of answers that was shown in one order."""

    order: str  # "model first" or "model second"
    scores: str  # of model and reference, as in "8 : 7", or "invalid"
    text: str  # the reply; for an invalid judgment the reason and the reply


class JudgedPair(NamedTuple):
    """A question with the answers of two models: the one tuned on a selection, and the one tuned on all rows.

    The texts are not escaped for HTML.
    """

    method: str  # and budget
    benchmark: str
    outcome: str
    question: str
    model: str
    reference: str
    words: list[Words]


def judged_pairs(material: Material, most: int = MOST) -> tuple[list[JudgedPair], list[str]]:
    """Return up to `most` judged pairs, and the reasons why the answers of some runs could not be read (see `attempt`).

    Every combination of method and alpha gets the same number of pairs, from its first run whose answers are in the
    store. Within a combination the outcomes get the same number of pairs, if there are enough items with each outcome.
    The pairs of an outcome are evenly spaced over the items with this outcome.
    """
    judged = [run for run in material.finished if run.has("judge")]
    groups = grouped(judged, lambda run: run.label)
    if not groups:
        return [], ["no run has judgments in the store"]
    each = max(1, most // len(groups))
    pairs: list[JudgedPair] = []
    reasons: list[str] = []
    for name, runs in groups.items():
        for run in runs:
            sample, reason = attempt(partial(_sample, name, run, each))
            if sample is not None:
                pairs += sample
                break
            reasons.append(reason)
    return pairs[:most], reasons


def _sample(name: str, run: Run, most: int) -> list[JudgedPair]:
    judged = run.one("judge")
    by_fingerprint = {artifact.fingerprint: artifact for artifact in run.artifacts.get("generate", [])}
    parents = judged.manifest["parents"][:2]  # the model's answers, then the reference's
    if any(parent not in by_fingerprint for parent in parents):
        raise Missing(f"{run.name}: the judged answers are not in the store any more")
    rows, reference_rows = (
        {item_key(row): row for row in without_turns(read_model_outputs(by_fingerprint[parent].file(OUTPUTS_FILE)))}
        for parent in parents
    )
    pairs = in_both_orders(read_judgments(judged.file("judgments.jsonl")))

    def outcome_of(key: tuple[str, str]) -> str:
        return outcome(pairs[key].get("forward"), pairs[key].get("reverse"), judged.info["combine"])

    by_outcome = grouped(pairs, outcome_of)
    turns = [(turn, kind) for kind, keys in by_outcome.items() for turn in range(len(keys))]
    turns = sorted(turns, key=itemgetter(0))[:most]  # the first item of each outcome, then the second of each
    sizes = Counter(kind for _, kind in turns)
    sample = []
    for turn, kind in turns:
        key = by_outcome[kind][turn * len(by_outcome[kind]) // sizes[kind]]
        row = rows[key]
        words = [_words(pairs[key][order]) for order in ORDERS if order in pairs[key]]
        question, answer = with_input(row["instruction"], row["input"]), reference_rows[key]["output"]
        sample.append(JudgedPair(name, key[0], kind, _cut(question), _cut(row["output"]), _cut(answer), words))
    return sample


def _words(judgment: Judgment) -> Words:
    shown = "model first" if judgment.order == "forward" else "model second"
    if judgment.score_model is None or judgment.score_reference is None:
        return Words(shown, "invalid", _cut(f"{judgment.reason}: {judgment.reply}"))
    scores = " : ".join(f"{score:.4g}" for score in (judgment.score_model, judgment.score_reference))
    return Words(shown, scores, _cut(judgment.reply or judgment.reason or ""))


def _cut(text: str) -> str:
    text = presentable(text)
    return text if len(text) <= CUT else f"{text[:CUT]} … ({len(text) - CUT:,} more characters)"
