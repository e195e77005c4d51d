"""The verifier grades answers against the benchmark's reference answer, without a model.

As a rater it is an oracle: it computes the right response to an example of the embedded world (`data=verifiable`) from
the example's text. No such oracle exists for other data. A selection by the verifier's grades therefore shows what a
rater without errors would achieve in the embedded world, not what a real rater achieves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradsift.data.verifiable import right_answer
from gradsift.errors import ConfigError
from gradsift.evaluation.judges import Combine, JudgeRequest, Pair, RatingRequest, Reply, content_hash
from gradsift.evaluation.judges.rating import SCALES
from gradsift.evaluation.matching import Match


class VerifierJudge:
    """Scores an answer 1 if it matches the reference answer, else 0. It has no position bias."""

    combine: Combine = "signs"

    def __init__(self, matches: Match, name: str = "verifier", by_benchmark: Mapping[str, Match] | None = None) -> None:
        """Args:
        matches: (answer, reference answer) -> whether the answer is right.
        name: identifies `matches` and `by_benchmark` in `prompt_hash`.
        by_benchmark: rules that replace `matches` for some benchmarks, by name.
        """
        self.name = name
        self._matches = matches
        self._by_benchmark = by_benchmark or {}

    def prompt_hash(self, request: JudgeRequest) -> str:
        """Hash the verifier's name, the two answers and the reference answer."""
        return content_hash(self.name, request.first, request.second, request.reference)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Pair]]]:
        """Yield the scores of each pair, in the order of the requests.

        Raises:
            ConfigError: an item has no reference answer; then nothing is graded.
        """
        for request in requests:
            if request.reference is None:
                raise ConfigError(
                    f"judge=verifier: item {request.benchmark}/{request.item_id} has no reference answer; "
                    f"set benchmark.catalog.{request.benchmark}.reference (in a file of answers: `reference`), or "
                    "choose judge=openai or judge=local"
                )
        for request in requests:
            matches = self._by_benchmark.get(request.benchmark, self._matches)
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
                right = right_answer(request.instruction, request.input)
            except ConfigError as error:
                raise ConfigError(
                    f"judge=verifier can only rate data=verifiable, and example {request.position + 1} is not part of "
                    f"it ({error}); choose judge=openai or judge=local"
                ) from error
            if request.question == "complexity":
                grade = min(scale.high, max(scale.low, len(right.split())))
            else:
                grade = scale.high if self._matches(request.response, right) else scale.low
            yield request, Reply(right, float(grade))

    def rating_cost(self) -> dict[str, float | int | None]:
        """Return an empty dict: ratings cost nothing."""
        return {}
