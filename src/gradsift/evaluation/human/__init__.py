"""People as judges: `python -m gradsift.evaluation.human RUN` serves blinded pairs, `--results` counts the votes."""
