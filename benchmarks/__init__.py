"""Side-by-side speed comparisons; each prints ratios that were measured in one run."""
