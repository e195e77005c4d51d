"""The verifier grades answers against the benchmark's reference answer, without a model.

As a rater it makes no errors: it computes the right response to each example of the embedded world (`data=verifiable`).
So a selection by the verifier's grades shows what a perfect rater achieves in the embedded world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gradsift.data.verifiable import task_of
from gradsift.errors import ConfigError
from gradsift.evaluation.judges import Judge, JudgeRequest, Pair, Rater, RatingRequest, Reply, content_hash
from gradsift.evaluation.judges.rating import SCALES
from gradsift.evaluation.matching import Match


@dataclass
class VerifierJudge(Judge, Rater):
    """Scores an answer 1 if it matches the reference answer, else 0, independently of the other answer.

    Attributes:
        matches: function of an answer and the reference answer that returns whether the answer is right.
        name: identifies `matches` and `by_benchmark` in `prompt_hash`.
        by_benchmark: functions that replace `matches` for some benchmarks, by the benchmark's name.
    """

    matches: Match
    name: str = "verifier"
    by_benchmark: Mapping[str, Match] = field(default_factory=dict)

    def prompt_hash(self, request: JudgeRequest) -> str:
        return content_hash(self.name, request.first, request.second, request.reference)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Pair]]]:
        for request in requests:
            if request.reference is None:
                raise ConfigError(
                    f"judge=verifier: item {request.benchmark}/{request.item_id} has no reference answer; "
                    f"set benchmark.catalog.{request.benchmark}.reference (in a file of answers: `reference`), or "
                    "choose judge=openai or judge=local"
                )
        for request in requests:
            matches = self.by_benchmark.get(request.benchmark, self.matches)
            reference = str(request.reference)
            first, second = (int(matches(answer, reference)) for answer in (request.first, request.second))
            yield request, Reply(f"{first} {second}", (float(first), float(second)))

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Reply[float]]]:
        """Yield the grade of each example: the scale's highest grade if its response is right, else the lowest.

        The grade of `complexity`, which the embedded world does not define, is the number of words of the right
        response, limited to the scale.

        Raises:
            ConfigError: an instruction is not one of the embedded world.
        """
        for request in requests:
            scale = SCALES[request.question]
            try:
                right = task_of(request.instruction, request.input).answer
            except ConfigError as error:
                raise ConfigError(
                    f"judge=verifier can only rate data=verifiable, and example {request.position + 1} is not part of "
                    f"it ({error}); choose judge=openai or judge=local"
                ) from error
            if request.question == "complexity":
                grade = min(scale.high, max(scale.low, len(right.split())))
            else:
                grade = scale.high if self.matches(request.response, right) else scale.low
            yield request, Reply(right, float(grade))
