"""Annotation files of data sets: which clips there are, with which labels."""
