"""Scorers: one module per method; a higher score means keep.

A scorer is a function. Its positional parameters name its inputs, and the pipeline computes nothing else:

    count        N, the number of examples
    examples     the examples, without their quality labels
    labels       `gradsift.data.load.Labels` of generated or corrupted data, else None: for references, not for methods
    statistics   `gradsift.gradients.statistics.Statistics` of the proxy ensemble
    late_losses  (N,) mean loss of the members at the late snapshot
    answer_losses
                 `gradsift.proxy.answer_losses.AnswerLosses` of the members at the late snapshot; with
                 proxy.ensemble=mc_dropout of the one adapter, without dropout
    embedding_gradients
                 `gradsift.gradients.embedding_head.EmbeddingGradients` after the first epoch of the ensemble's first
                 adapter; no other adapter is trained for it
    directions   (M, N) cosines of each member's gradient of an example with its mean gradient of the pool; (1, N) for
                 proxy.ensemble=mc_dropout, whose members share their weights
    gradients, target_gradients
                 `gradsift.features.vectors.Features` of the gradients of the pool and of the target set
    backbone     the proxy's backbone, without adapters
    proxy_inputs the backbone, and the examples in tokens of the proxy's template
    embeddings, target_embeddings
                 `gradsift.features.vectors.Features` of the examples and of the target set's rows (with their tasks),
                 computed by the run's embedder
    rater        `gradsift.evaluation.judges.Rater`: the run's judge, which can grade single examples
    published_scores
                 `gradsift.scoring.scores.Scores` that `data.scores` gives
    task         a progress bar: `with task(description, total) as advance`
    journal      `gradsift.journal.Journal`: keeps results for a resumed run

Its keyword-only parameters are its constants, set in `conf/scorer/<name>.yaml`. It returns `Scores`, or one number per
example. A scorer of your own is such a function in a module beside the command, and a YAML file in `./conf/scorer/`
with its `_target_`; or a function that is passed to `gradsift.select`.
"""
