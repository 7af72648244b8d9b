"""The clip stream: which clips, frames and crops, as pure functions."""
