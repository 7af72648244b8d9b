"""Measure a machine as the simulator needs it, and write its conf/cluster/NAME.yaml: `plan.py calibrate=NAME`."""
