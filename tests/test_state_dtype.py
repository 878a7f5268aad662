"""AdaHessian with state_dtype=torch.bfloat16: memory, checkpoints, conventions, and that training does not suffer.

How the ops round is in test_rounding.py.
"""

from __future__ import annotations

import pytest
import torch
from models import assert_same, fresh, mlp, train
from published import AdaHessian
from tolerances import assert_within, norm_bound
from torch import nn

HALF = torch.bfloat16
MOMENTS = ("exp_avg", "exp_hessian_diag_sq")


def reduced(model, **options):
    return fresh(model, state_dtype=HALF, **options)


def of(opt, key):
    return [state[key] for state in opt.state.values()]


# ---- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_are_bfloat16_and_take_half_the_memory(every_engine, device, dtype):
    sizes = []
    for state_dtype in (None, HALF):
        model, opt = fresh(mlp(dtype, device), state_dtype=state_dtype, backend=every_engine, lr=1e-3)
        train(opt, model, 1)
        assert {t.dtype for key in MOMENTS for t in of(opt, key)} == {state_dtype or torch.float32}
        sizes.append([of(opt, key)[0].untyped_storage().nbytes() for key in MOMENTS])
    assert sizes[0] == [2 * size for size in sizes[1]]


def test_float64_parameters_are_refused():
    opt = AdaHessian([nn.Parameter(torch.ones(2))], state_dtype=HALF)
    with pytest.raises(ValueError, match=r"state_dtype=torch.bfloat16 with torch.float64 parameters; expected None"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    assert len(opt.param_groups) == 1


def test_hessian_diag_is_float32(engine, device):
    model, opt = reduced(mlp(torch.float32, device), backend=engine)
    train(opt, model, 3)
    p, beta2 = model[0].weight, opt.param_groups[0]["betas"][1]
    expected = (opt.state[p]["exp_hessian_diag_sq"].float() / (1 - beta2**3)).sqrt()
    assert opt.hessian_diag(p).dtype == torch.float32
    assert torch.equal(opt.hessian_diag(p), expected)


def test_statistics_are_summed_in_float32(engine, device):
    model, opt = reduced(mlp(torch.float32, device), backend=engine)
    train(opt, model, 3)
    diag = torch.cat([opt.hessian_diag(p).flatten() for p in model.parameters()])
    norm = diag.double().norm()
    assert_within(opt.statistics().hessian_diag_norm, norm, norm_bound(diag), "norm")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_float32_states_are_rounded_to_nearest_and_bfloat16_ones_widened(device):
    wide, opt_wide = fresh(mlp(torch.float32, device))
    train(opt_wide, wide, 3)
    narrow, opt_narrow = reduced(wide)
    opt_narrow.load_state_dict(opt_wide.state_dict())
    again, opt_again = fresh(wide)
    opt_again.load_state_dict(opt_narrow.state_dict())
    for key in MOMENTS:
        rounded = [t.to(HALF) for t in of(opt_wide, key)]
        assert_same(of(opt_narrow, key), rounded)
        assert_same(of(opt_again, key), [t.float() for t in rounded])
    for model, opt, dtype in ((narrow, opt_narrow, HALF), (again, opt_again, torch.float32)):
        train(opt, model, 1)
        assert {t.dtype for key in MOMENTS for t in of(opt, key)} == {dtype}


# ---- conventions -----------------------------------------------------------------------------------------------------


def test_off_steps_round_m_by_other_bits(device):
    """The bits are numbered by the step, not by the Hessian step: two off-steps must not round alike."""
    p = nn.Parameter(torch.zeros(20_000, device=device))
    opt = AdaHessian([p], lr=0.0, betas=(0.0, 0.999), update_each=10, state_dtype=HALF)
    kept = []
    for _ in range(3):
        p.grad = torch.full_like(p, 1 + 2**-8)  # half an ulp above 1
        opt.step(hessian=[torch.ones_like(p)] if not kept else None)
        kept.append(opt.state[p]["exp_avg"] > 1)
    for one, other in ((0, 1), (1, 2)):
        assert abs((kept[one] == kept[other]).double().mean() - 0.5) < 5 * 0.5 / 20_000**0.5


# ---- training --------------------------------------------------------------------------------------------------------
