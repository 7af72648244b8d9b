"""The report of a run: history, charts, HTML."""
