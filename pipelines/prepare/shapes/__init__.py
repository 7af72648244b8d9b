"""The generated data sets: moving shapes for smoke tests, and moving textures for optical flow."""
