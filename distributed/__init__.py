"""Everything that knows there is more than one process.

Kept free of imports: `distributed.topology` must load without torch.
"""
