"""A nine-minute test of this checkout on a bare GPU machine: `bash tools/first_light/first_light.sh`."""
