"""What a run logs about itself: metrics, stragglers, input stalls, skipped steps."""
