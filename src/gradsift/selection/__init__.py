"""Selectors: one module a method; they turn scores into exactly the budget's worth of examples.

A selector is a function. It takes `scores` and `size`, the budget, and then names what else it needs,
as a scorer does (see `gradsift.scoring`); nothing else is computed:

    embeddings         `gradsift.features.vectors.Features` of the pool, by the run's embedder
    target_embeddings  the same of the target set, with each row's task
    gradients          projected per-sample gradients of the pool
    target_gradients   the same of the target set, with each row's task
    task               a progress bar, as for a scorer

Its keyword-only parameters are its constants, filled from `conf/selector/<name>.yaml`. It returns a
`Choice`: only examples that are `scored`, none twice, never more than `size`. A selector of your own is
such a function and a YAML file with its `_target_`.
"""
