"""People as judges: `python -m gradsift.evaluation.human RUN` serves blinded pairs, `--results` counts the votes.

`pairs` finds what is compared, `votes` keeps who said what, `server` shows the pages, `results` adds it up.
"""
