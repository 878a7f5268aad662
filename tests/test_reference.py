"""The specification itself against known answers: everything else is tested against it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Spec
from problem import SEED

from adahessian_fused.reference import block_mean, philox4x32, rademacher_signs, to_logical, to_stored

ONES = 0xFFFFFFFF
KNOWN_PHILOX = (  # Random123's kat_vectors: counter, key, result
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_PHILOX, ids=("zeros", "ones", "pi"))
def test_philox_gives_the_published_vectors(counter, key, words):
    found = philox4x32(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(word.item() for word in found) == words


def test_a_negative_seed_is_the_same_64_bits():
    counter = tuple(torch.tensor([ONES]) for _ in range(4))
    assert philox4x32(counter, -1) == philox4x32(counter, 2**64 - 1)


def test_signs_are_the_bits_of_the_words():
    # Counter (call, param_id, hessian_step, sample): element 128 * call + 32 * word + bit; a set bit is -1.
    z = rademacher_signs(300, 5, torch.tensor(6), SEED, 7).tolist()
    calls = [philox4x32(tuple(torch.tensor([c]) for c in (call, 5, 6, 7)), SEED) for call in range(3)]
    expected = [1 - 2 * (calls[e // 128][e % 128 // 32].item() >> e % 32 & 1) for e in range(300)]
    assert z == expected


BLOCK_MEANS = (
    (1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    (2, [1, 2, 3, 4, 5], [1.5, 3.5, 5]),
    (3, [1, -2, 4, 8, 2], [1, 5]),
    (5, [1, 2, 3, 4, 5], [3]),
    (9, [1, 2], [1.5]),
    (4, [], []),
)


@pytest.mark.parametrize(("block", "values", "means"), BLOCK_MEANS)
def test_block_mean(block, values, means):
    assert block_mean(torch.tensor(values, dtype=torch.float64), block).tolist() == means


@pytest.mark.parametrize("order", ["channels_last", "transposed"])
def test_storage_order_is_torch_s_own(order):
    spec = Spec((3, 4, 5, 2), order=order)
    tensor = torch.arange(120).reshape(spec.shape).clone()
    stored = torch.empty_strided(spec.shape, spec.strides(), dtype=torch.int64).copy_(tensor)
    flat = stored.as_strided((120,), (1,))
    assert torch.equal(to_logical(flat, *spec.period_and_stride()), tensor.reshape(-1))
    assert torch.equal(to_stored(tensor.reshape(-1), *spec.period_and_stride()), flat)
    if order == "channels_last":
        assert stored.is_contiguous(memory_format=torch.channels_last)


# ---- the probe and Hutchinson's estimator ---------------------------------------------------------------------------


def signs(numel: int, param_id: int = 1, hessian_step: int = 0, seed: int = SEED, sample: int = 0) -> torch.Tensor:
    return rademacher_signs(numel, param_id, torch.tensor(hessian_step), seed, sample)


def test_z_has_mean_zero_and_no_correlations():
    n = 1 << 16
    variants = [{}, {"param_id": 2}, {"hessian_step": 1}, {"sample": 1}, {"seed": SEED + 1}, {"seed": SEED + 2**32}]
    z = torch.stack([signs(n, **variant) for variant in variants]).double()
    shifted = torch.stack([z[0].roll(lag) for lag in (1, 2, 32, 64, 128, 129)])
    sums = torch.cat([z.sum(1), (z @ z.T).triu(1)[tuple(torch.triu_indices(6, 6, 1))], shifted @ z[0]])
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert sums.abs().max() < 5 * math.sqrt(n)  # 27 sums of n independent signs, each of standard deviation sqrt(n)
