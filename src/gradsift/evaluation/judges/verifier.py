"""The verifier: grades answers against the benchmark's reference answer, without any model.

As a rater it is an oracle: it works out the right response to an example of the embedded world from the
example's own text. Nobody has that for data of their own, so what it selects is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from gradsift.data.verifiable import right_answer
from gradsift.errors import ConfigError
from gradsift.evaluation.judges import Combine, JudgeRequest, Rating, RatingRequest, Reply, content_hash
from gradsift.evaluation.judges.rating import SCALES


class VerifierJudge:
    """Scores an answer 1 if `matches(answer, reference)`, else 0. It has no preference for a place."""

    combine: Combine = "signs"

    def __init__(
        self,
        matches: Callable[[str, str], bool],
        name: str = "verifier",
        by_benchmark: Mapping[str, Callable[[str, str], bool]] | None = None,
    ) -> None:
        """`by_benchmark` replaces `matches` for the sets that it names.

        `name` must tell different kinds of both apart: it stands for them in `prompt_hash`.
        """
        self.name = name
        self._matches = matches
        self._by_benchmark = by_benchmark or {}

    def prompt_hash(self, request: JudgeRequest) -> str:
        """Hash of the verifier's name, the two answers and the reference answer."""
        return content_hash(self.name, request.first, request.second, request.reference)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
        """Grade each pair, in order.

        Raises:
            ConfigError: an item has no reference answer; nothing is graded then.
        """
        known: list[tuple[JudgeRequest, str]] = []
        for request in requests:
            if request.reference is None:
                raise ConfigError(
                    f"judge=verifier: item {request.benchmark}/{request.item_id} has no reference answer; "
                    f"set benchmark.catalog.{request.benchmark}.reference (in a file of answers: `reference`), or "
                    "choose judge=openai or judge=local"
                )
            known.append((request, request.reference))
        for request, reference in known:
            matches = self._by_benchmark.get(request.benchmark, self._matches)
            first, second = (int(matches(answer, reference)) for answer in (request.first, request.second))
            yield request, Reply(f"{first} {second}", (float(first), float(second)))

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Rating]]:
        """Grade each example: the highest grade if its response is right, else the lowest.

        For `complexity`, which nothing in that world measures, the number of words of the right response,
        up to the end of the scale.

        Raises:
            ConfigError: an instruction is none of the embedded world's.
        """
        for request in requests:
            scale = SCALES[request.question]
            try:
                right = right_answer(request.instruction, request.input)
            except ConfigError as error:
                raise ConfigError(
                    f"judge=verifier can rate data=verifiable alone, and example {request.position + 1} is none of it "
                    f"({error}); choose judge=openai or judge=local"
                ) from error
            if request.question == "complexity":
                grade = min(scale.high, max(scale.low, len(right.split())))
            else:
                grade = scale.high if self._matches(request.response, right) else scale.low
            yield request, Rating(right, float(grade))

    def rating_cost(self) -> dict[str, float | int | None]:
        """Nothing is paid for."""
        return {}
