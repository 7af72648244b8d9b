"""Read the annotation files of the published data sets."""
