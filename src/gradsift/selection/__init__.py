"""Selectors: one module per method; they choose exactly the budget's number of examples.

A selector is a function. Its first two parameters are `scores` and `size`, the budget; the others name further inputs,
as a scorer's do (see `gradsift.scoring`), and nothing else is computed:

    embeddings         `gradsift.features.vectors.Features` of the pool, computed by the run's embedder
    target_embeddings  `Features` of the target set, computed by the same embedder, with each row's task
    gradients          projected per-sample gradients of the pool
    target_gradients   projected per-sample gradients of the target set, with each row's task
    task               a progress bar, as for a scorer

Its keyword-only parameters are its constants, set in `conf/selector/<name>.yaml`. It returns a `Choice`: only examples
that are `scored`, none twice, never more than `size`. A selector of your own is such a function and a YAML file with
its `_target_`.
"""
