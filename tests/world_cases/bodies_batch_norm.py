"""Compare batch norm over ranks with uneven parts with torch's batch norm over each group's clips together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distributed.batch_norm.layer import convert_batch_norm

if TYPE_CHECKING:
    from .bodies import Context


@dataclass(frozen=True)
class Case:
    """A norm over inputs (clips, 3, *size); with `halves` each half of the world is a group."""

    kind: type[Any]
    size: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format
    affine: bool = True
    halves: bool = False


CASES = {
    "images": Case(nn.BatchNorm2d, (5, 4)),
    "channels_last": Case(nn.BatchNorm2d, (5, 4), torch.channels_last),
    "clips": Case(nn.BatchNorm3d, (2, 3, 3), torch.channels_last_3d),
    "not_affine": Case(nn.BatchNorm2d, (3, 3), affine=False),
    "halves": Case(nn.BatchNorm2d, (4, 4), halves=True),
}


def batch_norm_over_ranks(context: "Context") -> dict[str, float]:
    """Return each case's largest relative difference over outputs, gradients and running statistics."""
    return {name: _largest_difference(context, case) for name, case in CASES.items()}


def _largest_difference(context: "Context", case: Case) -> float:
    """Run two steps of one layer; rank r has r + 2 clips, far from 0 and from those of its neighbours."""
    backend = context.backend
    rank, world = backend.topology.rank, list(range(backend.topology.size))
    half = max(1, len(world) // 2)
    rank_groups = [world[:half], world[half:]] if case.halves and len(world) > 1 else [world]
    mine = next(group for group in rank_groups if rank in group)

    # Every rank generates the clips of all ranks.
    torch.manual_seed(11)
    plain = case.kind(3, affine=case.affine).double()
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    joined = nn.Sequential(case.kind(3, affine=case.affine).double())
    joined[0].load_state_dict(plain.state_dict())
    convert_batch_norm(joined, backend, 1, rank_groups, 1)
    differences = []
    for _ in range(2):
        x_by_rank = [torch.randn(member + 2, 3, *case.size, dtype=torch.float64) + 30 * member for member in world]
        grad_by_rank = [torch.randn_like(x) for x in x_by_rank]
        found = _passed(joined, x_by_rank[rank].contiguous(memory_format=case.memory_format), grad_by_rank[rank])
        sizes = [member + 2 for member in mine]
        expected = _passed(
            plain,
            torch.cat([x_by_rank[member] for member in mine]),
            torch.cat([grad_by_rank[member] for member in mine]),
        )
        place = mine.index(rank)
        differences += [_difference(one, other.split(sizes)[place]) for one, other in zip(found, expected, strict=True)]
    # Each rank has its part of the gradient, which the reducer would sum.
    for name, parameter in plain.named_parameters():
        grad_C = joined.get_parameter(f"0.{name}").grad
        assert grad_C is not None
        backend.all_reduce_(grad_C, "test.gradient", joined[0].layout.group)  # type: ignore[union-attr, arg-type]
        differences.append(_difference(grad_C, parameter.grad))
    for name in ("running_mean", "running_var"):
        differences.append(_difference(joined.get_buffer(f"0.{name}"), plain.get_buffer(name)))
    return max(differences)


def _passed(norm: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
