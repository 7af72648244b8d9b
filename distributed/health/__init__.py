"""Detect dead and hung ranks, and end the job with the right exit code."""
