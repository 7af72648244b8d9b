"""One script that spends nine minutes of a bare GPU machine well: `bash tools/first_light/first_light.sh`."""
