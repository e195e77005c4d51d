"""Human evaluation: `python -m gradsift.evaluation.human RUN` serves blinded pairs; `--results` counts the votes."""
