"""The job: configuration, recipe, training step and loop, evaluation, records."""
