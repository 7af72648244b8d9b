"""Log what a run does: metrics, input stalls, stragglers, skipped steps, bad clips."""
