"""Run folders: resume, restarts, code version."""
