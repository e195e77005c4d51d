"""From files to batches: examples, their formats, prompt templates and tokens."""
