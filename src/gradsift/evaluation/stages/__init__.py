"""The stages behind the finetune, one module each: answers, their metrics, losses, forgetting, judgments and PWS."""
