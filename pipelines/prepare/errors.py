"""The error of a data set that cannot be prepared."""


class DataSetError(ValueError):
    """Annotations or videos that cannot be used; the message names file and line and says the fix."""
