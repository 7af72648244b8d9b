"""From the bytes of a clip to its pixels."""
