"""What a run found, for scripts (`run.json`) and for people (tables)."""
