"""The exit codes that launchers act on. Only EXIT_REQUEUE asks for another start."""

EXIT_DONE = 0

# An unexpected error.
EXIT_FAILURE = 1

# The configuration or the launch is wrong: the same command fails again.
EXIT_CONFIG = 2

# The data set is wrong: the same command fails again.
EXIT_DATA = 3

# Gradients were non-finite too many steps in a row: the same command fails again.
EXIT_DIVERGED = 4

# Faults ended the run several times without progress: someone must look.
EXIT_NO_PROGRESS = 5

# Stopped before the end, by a signal or by a machine's fault: run the same command again (EX_TEMPFAIL of sysexits.h).
EXIT_REQUEUE = 75

# Ctrl-C (128 + SIGINT).
EXIT_INTERRUPTED = 130
