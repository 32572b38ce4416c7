"""From the command line to running jobs: arguments, composition, plan, sweep and exit code."""
