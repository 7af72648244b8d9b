"""The generated data set of moving shapes, for smoke tests."""
