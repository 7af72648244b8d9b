"""The error that prepare.py reports for a data set it cannot prepare."""


class DataSetError(ValueError):
    """Unusable annotations, videos or options; the message names the file and line, and the fix."""
