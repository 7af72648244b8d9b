"""A real Slurm with emulated nodes on one machine, for tests and by hand. Nothing that trains imports this package."""
