"""Failures that a user can mend, and the exit codes that launchers act on."""

EXIT_DONE = 0
EXIT_FAILURE = 1  # an error that nobody foresaw
EXIT_CONFIG = 2  # the configuration or the launch is wrong: running it again changes nothing
EXIT_DATA = 3  # the data are wrong: likewise
EXIT_DIVERGED = 4  # the numbers are no longer finite: likewise
EXIT_NO_PROGRESS = 5  # faults, and two restarts led no further: somebody must look
EXIT_REQUEUE = 75  # stopped before the end, in good order or by a fault of a machine: run the same command again
EXIT_INTERRUPTED = 130  # Ctrl-C


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
