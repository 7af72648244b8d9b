"""Load batches of clips, with worker processes or DALI."""
