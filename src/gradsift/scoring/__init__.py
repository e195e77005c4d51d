"""Scores: one module a method, higher = keep.

A scorer is a function. Its positional parameters name what it needs, and the pipeline computes
nothing else:

    count        N, the number of examples
    examples     the examples (their quality labels, where there are any, are not among them)
    statistics   `gradsift.gradients.statistics.Statistics` of the proxy ensemble
    late_losses  (N,) mean loss of the members at the late snapshot
    backbone     the proxy's backbone, without adapters
    rater        `gradsift.evaluation.judges.Rater`: the run's judge, which can grade single examples
    budget       `budget(scored)`: how many examples will be selected where `scored` have a score. The
                 scores then belong to one alpha, and every alpha computes its own
    task         a progress bar: `with task(description, total) as advance`

Its keyword-only parameters are its constants, filled from `conf/scorer/<name>.yaml`. It returns
`Scores`. A scorer of your own is such a function and a YAML file with its `_target_`.
"""
