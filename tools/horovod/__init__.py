"""Build, cache, install and prove Horovod for the installed torch: `python -m tools.horovod`."""
