"""Evaluation: metrics, saved logits, ensembles, and the command of evaluate.py."""
