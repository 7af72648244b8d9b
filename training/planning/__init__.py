"""Plan a run before it starts: estimates, memory, checks."""
