"""Selectors, one module per method: they choose the examples to keep, at most as many as the budget.

A selector is a function. Its first two parameters are `scores` and `size` (the budget, a number of examples). Its other
positional parameters name further inputs, which the pipeline computes only if they are named. All inputs of scorers are
available (see `gradsift.scoring`). Selectors use these:

    examples           the examples of the pool
    embeddings         `gradsift.features.vectors.Features` of the pool, computed by the run's embedder
    target_embeddings  `Features` of the target set, computed by the same embedder, with each row's task
    gradients          `Features`: projected per-sample gradients of the pool
    target_gradients   `Features`: projected per-sample gradients of the target set, with each row's task
    task               shows a progress bar, as for a scorer

The selector's keyword-only parameters are its constants, set in `conf/selector/<name>.yaml`. The function returns a
`Choice` of at most `size` examples, all of them with the status `scored` and each at most once. To add a selector,
write such a function and a YAML file with the function's path as `_target_`.
"""
