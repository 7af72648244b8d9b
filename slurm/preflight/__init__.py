"""Checks of a job's nodes before it takes them; slurm/preflight.sh runs them and says what there is to set."""
