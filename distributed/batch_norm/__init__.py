"""Batch norm over groups of clips that one or several ranks hold."""
