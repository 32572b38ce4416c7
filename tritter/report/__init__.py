"""What a person reads after a run: a table, plots, and a page of several runs."""
