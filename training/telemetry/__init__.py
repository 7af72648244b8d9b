"""Log what a run does: metrics, phases of its steps, input stalls, stragglers, skipped steps, bad clips."""
