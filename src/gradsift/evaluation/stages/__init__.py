"""The stages that evaluate models: answers, their metrics, losses, forgetting, judgments and the PWS."""
