"""The scan: decode every clip once, and write the manifests."""
