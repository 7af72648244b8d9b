"""The generated data set: moving shapes, for smoke tests."""
