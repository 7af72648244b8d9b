"""The clip stream: which clips, frames and crops training and evaluation use, as pure functions."""
