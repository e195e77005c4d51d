"""Evaluation of finetuned models: benchmark items, answers, judgments and the pairwise winning score (PWS)."""
