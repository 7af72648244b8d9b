"""Communication backends: one process, torch.distributed and Horovod under one protocol."""
