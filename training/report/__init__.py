"""The report of a run: its history, charts and page."""
