"""Human evaluation of pairs of answers.

`python -m gradsift.evaluation.human RUN` shows the pairs on a local page, without the names of the models. With
`--results` the command counts the votes.
"""
