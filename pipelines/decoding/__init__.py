"""Decode clips: from encoded bytes to pixels."""
