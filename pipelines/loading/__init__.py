"""Batches of clips: worker processes or DALI."""
