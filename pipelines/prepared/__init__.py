"""Data sets made of data sets: shards, re-encoded clips, copies on a node's disk; and checks of them all."""
