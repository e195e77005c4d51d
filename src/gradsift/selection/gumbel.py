"""Random sampling by score: the higher an example's score, the more likely it is selected."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_first


def gumbel(scores: Scores, size: int, *, temperature: float, seed: int) -> Choice:
    """Draw examples without replacement, each time with probabilities proportional to exp(z / temperature).

    z is the score, standardised over the scored examples (0 if all scores are equal), so that a temperature has the
    same effect for every scorer. As the temperature goes to 0, the draw becomes the selection of the highest scores; as
    it goes to infinity, the draw becomes uniform. The draw adds independent Gumbel noise to each z / temperature, and
    selects the examples with the largest sums (Kool et al., arXiv 1903.06059).

    Returns:
        The positions of min(size, number of scored examples) examples, in the order in which they are drawn.
    """
    ranked = best_first(scores)
    # one number per rank instead of per row, so that the same scores in another row order give the same draw
    noise = np.random.default_rng(seed).gumbel(size=len(ranked))
    values = scores.score[ranked]
    z = np.zeros(len(values))
    if len(values) and values.min() != values.max():
        z = (values - values.mean()) / values.std()
    return Choice(ranked[np.argsort(-(z / temperature + noise), kind="stable")[:size]])
