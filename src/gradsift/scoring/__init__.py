"""Scorers, one module per method. Examples with higher scores are preferred.

A scorer is a function. Its positional parameters name its inputs, and the pipeline computes only the inputs that are
named. These are available:

    count        N, the number of examples
    examples     the examples, without their quality labels
    labels       `gradsift.data.load.Labels` of generated or corrupted data, else None. Only reference scorers such as
                 `random_clean` may use the labels
    statistics   `gradsift.gradients.statistics.Statistics` of the proxy ensemble
    late_losses  (N,) each example's loss at the late snapshot, averaged over the members
    answer_losses
                 `gradsift.proxy.member_tables.AnswerLosses` of the members at the late snapshot, with dropout off; for
                 proxy.ensemble=mc_dropout, the losses of the single adapter
    embedding_gradients
                 `gradsift.gradients.embedding_head.EmbeddingGradients` after the first epoch of the ensemble's first
                 adapter; the other adapters are not trained for this input
    directions   (M, N) for each member, the cosine of each example's gradient with the pool's mean gradient; (1, N) for
                 proxy.ensemble=mc_dropout, whose members share their weights
    gradients, target_gradients
                 `gradsift.features.vectors.Features` of the pool's and of the target set's examples, made from their
                 gradients (`gradsift.features.gradients`)
    backbone     the proxy's backbone, without adapters
    proxy_inputs the backbone, and the examples tokenised in the proxy's template
    embeddings, target_embeddings
                 `gradsift.features.vectors.Features` of the examples and of the target set's rows (with their tasks),
                 computed by the run's embedder
    rater        `gradsift.evaluation.judges.Rater`: the run's judge, which can grade single examples
    published_scores
                 `gradsift.scoring.scores.Scores` from the file `data.scores`
    task         shows a progress bar: `with task(description, total) as advance`, then `advance(number of steps done)`
    journal      `gradsift.journal.Journal`: keeps the partial results of an interrupted run

The scorer's keyword-only parameters are its constants, set in `conf/scorer/<name>.yaml`. The scorer returns `Scores`,
or one number per example. To add a scorer, write such a function in a module in the working directory, and name it as
`_target_` in a YAML file in `./conf/scorer/`; or pass the function to `gradsift.select`.
"""
