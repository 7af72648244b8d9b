"""Failures that a user can mend, and the exit codes that launchers act on."""

from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED, EXIT_NO_PROGRESS


class ConfigError(ValueError):
    """The configuration asks for something that cannot be; the message names the key and the fix."""

    exit_code = EXIT_CONFIG


class DivergedError(ArithmeticError):
    """The gradient was not finite too often: going on would train nothing."""

    exit_code = EXIT_DIVERGED


class NoProgressError(RuntimeError):
    """Starting again has not helped."""

    exit_code = EXIT_NO_PROGRESS


class DataError(ValueError):
    """The data set is not what the configuration or its manifest says."""

    exit_code = EXIT_DATA
