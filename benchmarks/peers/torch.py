"""PyTorch's side: sums of sparse tensors, and sparse embeddings under SparseAdam."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from benchmarks import workloads
from benchmarks.peers import server
from benchmarks.steps import Step


def _wait(result: Any) -> None:
    del result
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cycle(
    *, applies: int, ids: int, rows: int, columns: int, zipf: float | None, device: str
) -> dict[str, Step]:
    """Sum of sparse tensors, then coalesce; without the division by row counts, which it lacks."""
    given = [
        (
            torch.from_numpy(each.astype(np.int64))[None].to(device),
            torch.from_numpy(values).to(device),
        )
        for each, values in workloads.gradients(applies, ids, rows, columns, zipf)
    ]

    def run() -> Any:
        tensors = [
            torch.sparse_coo_tensor(*each, (rows, columns), check_invariants=False)
            for each in given
        ]
        total = tensors[0]
        for tensor in tensors[1:]:
            total = total + tensor
        return total.coalesce()

    return {"PyTorch": Step(run, _wait)}


def train_step(*, rows: int, ids: int, device: str) -> dict[str, Step]:
    """``nn.Embedding(sparse=True)`` and ``SparseAdam``, four backward passes a step."""
    table = torch.nn.Embedding(rows, workloads.WIDTH, sparse=True, device=device)
    hidden = torch.nn.Parameter(torch.randn(workloads.WIDTH, device=device) / 8)
    optimizers = [
        torch.optim.SparseAdam(list(table.parameters()), lr=1e-3),
        torch.optim.Adam([hidden], lr=1e-3),
    ]
    batches = workloads.batches(rows, ids)
    turn = itertools.cycle([torch.from_numpy(each.astype(np.int64)).to(device) for each in batches])

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro_batch in next(turn):
            value = ((table(micro_batch) @ hidden - 1.0) ** 2).mean() / workloads.MICRO_BATCHES
            value.backward()
        for optimizer in optimizers:
            optimizer.step()

    return {"PyTorch": Step(run, _wait)}


if __name__ == "__main__":
    server.serve(torch.__version__, {"cycle": cycle, "train_step": train_step})
