"""DLRM (Naumov et al. 2019): embedding bags, inner products of all pairs, two perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def perceptron(widths: Sequence[int], *, last: bool) -> nn.Sequential:
    """Linear layers with a ReLU between them, and behind the last one if asked for."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Dlrm(nn.Module):
    """Log-odds of a click.

    Args:
        n_dense: numbers of an example.
        sizes: rows of every field's table; row 0 stands for no category.
        width: of an embedding.
        bottom, top: hidden widths of the perceptrons.
    """

    def __init__(
        self, n_dense: int, sizes: Sequence[int], width: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum", padding_idx=0) for size in sizes)
        for table in self.tables:
            nn.init.uniform_(table.weight, -(table.weight.shape[0] ** -0.5), table.weight.shape[0] ** -0.5)
            with torch.no_grad():
                table.weight[0] = 0
        self.bottom = perceptron((n_dense, *bottom, width), last=True)
        n_vectors = len(sizes) + 1
        self.register_buffer("pairs", torch.tril_indices(n_vectors, n_vectors, -1), persistent=False)
        self.top = perceptron((width + self.pairs.shape[1], *top, 1), last=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """(N, n_dense) and (N, fields, bag) to (N,)."""
        x = self.bottom(dense)
        vectors = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, products], 1)).squeeze(1)
