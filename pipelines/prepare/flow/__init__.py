"""Optical flow of a data set: `prepare.py flow`."""
