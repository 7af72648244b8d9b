"""Scan every clip once and write the manifests."""
