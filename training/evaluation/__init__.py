"""Evaluation: metrics, protocols, saved logits, ensembles."""
