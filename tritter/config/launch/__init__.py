"""The way from the command line to jobs that run: words, composition, plan, sweep, exit code."""
