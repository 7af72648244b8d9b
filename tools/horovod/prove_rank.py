"""Run one all-reduce of rank + 1 under a launcher; rank 0 prints the facts. prove.py starts it by its path."""

import json

import horovod.torch as hvd
import torch


def main() -> None:
    """Exit with an error on each rank whose sum is wrong; otherwise rank 0 prints one line of JSON."""
    hvd.init()
    total = hvd.allreduce(torch.full((3,), hvd.rank() + 1.0), op=hvd.Sum, name="proof")
    expected = hvd.size() * (hvd.size() + 1) / 2
    if not torch.equal(total, torch.full((3,), expected)):
        raise SystemExit(
            f"rank {hvd.rank()} of {hvd.size()}: the all-reduce gave {total.tolist()}, expected {expected}"
        )
    if hvd.rank() == 0:
        facts = {
            "size": hvd.size(),
            "sum": total[0].item(),
            "mpi_built": bool(hvd.mpi_built()),
            "gloo_built": bool(hvd.gloo_built()),
            "nccl_built": bool(hvd.nccl_built()),
            "cuda_built": bool(hvd.cuda_built()),
            "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        }
        print("PROOF " + json.dumps(facts), flush=True)
    # Under MPI a rank that leaves early breaks the others.
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main()
