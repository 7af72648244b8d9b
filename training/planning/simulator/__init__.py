"""Simulate a run on a cluster: pure functions of numbers, without torch. docs/scaling.md explains the model."""
