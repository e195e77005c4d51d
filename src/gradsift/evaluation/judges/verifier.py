"""The verifier: grades answers against the benchmark's reference answer, without any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gradsift.errors import ConfigError
from gradsift.evaluation.judges import Combine, JudgeRequest, Reply, content_hash


class VerifierJudge:
    """Scores an answer 1 if `matches(answer, reference)`, else 0. It has no preference for a place."""

    combine: Combine = "signs"

    def __init__(self, matches: Callable[[str, str], bool], name: str = "verifier") -> None:
        """`name` must tell different kinds of `matches` apart: it stands for them in `prompt_hash`."""
        self.name = name
        self._matches = matches

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
                    f"set benchmark.catalog.{request.benchmark}.reference, or choose judge=openai or judge=local"
                )
            known.append((request, request.reference))
        for request, reference in known:
            first, second = (int(self._matches(a, reference)) for a in (request.first, request.second))
            yield request, Reply(f"{first} {second}", (float(first), float(second)))
