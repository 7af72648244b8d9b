"""Offline preparation of data sets: annotations, scan, repacking."""
