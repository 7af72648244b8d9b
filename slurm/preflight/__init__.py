"""Checks of a job's nodes before the job starts; slurm/preflight.sh runs them and documents their variables."""
