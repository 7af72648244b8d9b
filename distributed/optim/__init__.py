"""Optimizer mathematics: pure functions of the step, unaware of processes."""
