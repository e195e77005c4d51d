"""The stages after the finetune: answers, their metrics, losses, forgetting, and judgments with the PWS."""
