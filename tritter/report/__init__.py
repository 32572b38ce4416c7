"""What a person reads after a run: a table and plots, both from summary.json alone."""
