"""From a finetuned model to a PWS: benchmark items, answers, judgments and the figure they add up to."""
