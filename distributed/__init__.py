"""Code that knows of more than one process: topology, backends, batch norm over ranks, checkpoints, health.

This file imports nothing, so that `distributed.topology` loads without torch.
"""
