"""Errors that a user can fix, each with the exit code that launchers act on."""

from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_NO_PROGRESS, EXIT_REQUEUE


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and the fix."""

    exit_code = EXIT_CONFIG


class DivergedError(ArithmeticError):
    """Too many steps in a row were skipped for non-finite gradients."""

    exit_code = EXIT_DIVERGED


class NoProgressError(RuntimeError):
    """Restarts at the same step keep failing."""

    exit_code = EXIT_NO_PROGRESS


class DataError(ValueError):
    """The data set does not match the configuration or its manifest."""

    exit_code = EXIT_DATA


class StorageError(RuntimeError):
    """A file system or file server fails; a later start, or one on another node, may succeed."""

    exit_code = EXIT_REQUEUE
