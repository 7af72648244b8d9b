"""Optimizers, EMA of weights, gradient checks."""
