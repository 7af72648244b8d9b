"""Checkpoints: written atomically by a background thread, verified when read."""
