"""Shards, transcoded clips, rescaled frames and staged copies of prepared data."""
