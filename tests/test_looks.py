"""Looks at lists of tensors, in C and in Python, and the updates that know tensors by their addresses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adahessian_fused import _C, AdaHessian, backends, looks
from adahessian_fused.bucket import Bucket

P = torch.nn.Parameter


def tensors():
    return [P(torch.randn(3, 4)), P(torch.randn(5, 1, 2).bfloat16()), P(torch.randn(4, 3).t()), torch.randn(())]


def rebound(of):
    of[0].data = torch.zeros(3, 4)


def narrowed(of):
    of[1].data = of[1].data.float()


def transposed(of):
    of[2].data = of[2].data.contiguous()


def shorter(of):
    del of[-1]


KINDS = {"native": _C.Looks, "python": looks.PythonLooks}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [rebound, narrowed, transposed, shorter])
def test_a_change_is_seen(kind, change):
    of = tensors()
    then = KINDS[kind](of)
    of[0].data.add_(1)  # numbers are no looks
    assert then.same(of)
    change(of)
    assert not then.same(of) or (kind == "python" and change is shorter)


@pytest.mark.parametrize("kind", KINDS)
def test_the_address_of_an_empty_tensor_tells_nothing(kind):
    of = [torch.zeros(0, 3)]
    assert not KINDS[kind](of).same(of)


def written(of, others, column=1):
    table = torch.zeros(len(of), 3, dtype=torch.int64)
    return _C.Looks(of).addresses(others, table.data_ptr(), 3, column), table[:, column].tolist()


def test_addresses_are_those_of_the_tensors():
    of, others = tensors(), [x.detach().clone() for x in tensors()]
    assert written(of, others) == (True, [x.data_ptr() for x in others])


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "dtype": lambda x: x.double(),
    "order": lambda x: x.t().contiguous().t(),
    "shape": lambda x: x.reshape(4, 3),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "negative": torch._neg_view,
    "subclass": lambda x: x.as_subclass(Subclass),
    "expanded": lambda x: x[:1].expand(3, 4),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_addresses_of_other_tensors_are_not_written(kind):
    of = [torch.randn(3, 4)]
    assert not written(of, [OTHERS[kind](of[0].clone())])[0]
    assert written(of, [torch.empty_like(of[0])])[0]


def missing(params):
    params[1].grad = None


def sparse(params):
    params[0].grad = params[0].grad.to_sparse()


def of_a_subclass(params):
    params[0].grad = params[0].grad.as_subclass(Subclass)


def replaced(params):
    params[2] = P(params[2].detach().clone())
    params[2].grad = torch.zeros_like(params[2])


@pytest.mark.parametrize("change", [None, missing, sparse, of_a_subclass, replaced, rebound, shorter])
def test_gradients_are_fetched_together_in_the_plain_case_only(change):
    params = [P(torch.randn(shape)) for shape in ((3, 4), (5,), (4, 3))]
    looks, known = _C.Looks(params), list(params)
    for p in params:
        p.grad = torch.ones_like(p)
    if change is None:
        assert all(g is p.grad for g, p in zip(looks.gradients(params, known), params, strict=True))
    else:
        change(params)
        assert looks.gradients(params, known) is None


@pytest.mark.parametrize("without_c", [False, True])
def test_what_autograd_follows(without_c, monkeypatch):
    if without_c:
        monkeypatch.setattr(looks, "_c", lambda: None)
    plain, followed = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not looks.requires_grad([])
    assert not looks.requires_grad([plain, plain.as_subclass(Subclass)])
    assert looks.requires_grad([plain, followed.as_subclass(Subclass)])
    assert looks.requires_grad(iter([plain, 2 * followed]))


def steps(change=lambda p: None, dtype=torch.float64, count=4):
    """Parameters after some steps, every other one without curvature; ``change`` is called before each."""
    torch.manual_seed(0)
    params = [P(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (7,), ())]
    opt = AdaHessian(params, seed=0, update_each=2, warmup=0)
    for _ in range(count):
        opt.zero_grad()
        opt.backward(sum((p**3).sum() for p in params))
        change(params)
        opt.step()
    return [p.detach() for p in params]


def no_addresses(*args):
    return None


@pytest.mark.parametrize("without", ["addresses", "C"])
def test_the_update_is_the_same_without(without, monkeypatch):
    expected = steps()
    if without == "C":
        monkeypatch.setattr(looks, "_c", lambda: None)
    monkeypatch.setattr(Bucket, "addresses", no_addresses)
    assert all(map(torch.equal, steps(), expected))


GRADIENTS = {
    "negative": lambda g: torch._neg_view(-g),
    "transposed": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
    "new": torch.clone,
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_that_is_stored_in_another_way(kind):
    def change(params):
        for p in params:
            p.grad = GRADIENTS[kind](p.grad)

    assert all(map(torch.equal, steps(change), steps()))


def test_a_parameter_with_other_memory():
    def change(params):
        params[0].data = params[0].data.clone()

    assert all(map(torch.equal, steps(change), steps()))


def test_who_watches_operators_sees_which_tensors_an_update_changes():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.adahessian_fused.adahessian_step.default:
                seen.extend(args[0])
            return func(*args, **(kwargs or {}))

    seen, p = [], P(torch.ones(3))
    opt = AdaHessian([p])
    opt.backward((p**2).sum())
    with Watch():
        opt.step()
    assert seen[0] is p


def test_an_update_counts_as_a_write():
    p = P(torch.ones(3))
    opt = AdaHessian([p])
    kept = (p**2).sum()
    opt.backward((p**2).sum())
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_what_is_left_of_a_step_does_not_write_to_memory_that_was_given_back(monkeypatch):
    params = [P(torch.ones(3)), P(torch.ones(3, dtype=torch.float64))]
    opt, native, left = AdaHessian(params, warmup=0, backend="native"), backends.get("native"), [2]
    opt.backward(sum((p**3).sum() for p in params))
    op = native.step_at_addresses

    def fails(**arguments):
        left[0] -= 1
        if left[0] in (0, -1):
            raise torch.OutOfMemoryError
        op(**arguments)

    monkeypatch.setattr(native, "step_at_addresses", fails)
    with pytest.raises(torch.OutOfMemoryError):  # which is tried once more
        opt.step()
    old = params[1].data
    params[1].data = old.clone()
    opt.step()
    assert (old == 1).all()
    assert (params[1] < 1).all()


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_a_gradient_without_memory_is_zero(kind):
    """Autograd's zeros: of p that a loss depends on by its sign alone."""
    steps = []
    for loss in (lambda p: p.sgn().sum(), lambda p: (0 * p).sum()):
        p = P(torch.tensor([1.0, -2.0, 3.0]))
        opt = AdaHessian([p], lr=0.1, backend=kind, weight_decay=0.1, update_each=2)
        for _ in range(2):  # with curvature, and without
            opt.zero_grad()
            opt.backward(loss(p))
            opt.backward(p.pow(4).sum())
            opt.step()
            opt.zero_grad()
            opt.backward(loss(p))
            opt.step()
        opt.step(hessian=[torch._efficientzerotensor(3)])
        steps.append(p.tolist())
    assert steps[0] == steps[1]


def test_finite_differences_of_signs_are_zeros():
    p = P(torch.tensor([1.0, -2.0, 3.0]))
    opt = AdaHessian([p], hvp="finite_difference")
    opt.step(lambda: p.sgn().sum())
    assert opt.hessian_diag(p).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_a_gradient_of_inference_mode_is_stepped_along_once(kind):
    p = P(torch.ones(3))
    with torch.inference_mode():
        p.grad = torch.ones(3)
    opt = AdaHessian([p], lr=0.1, backend=kind)
    opt.step(hessian=[torch.ones(3)])
    assert p.tolist() == pytest.approx([0.9] * 3, rel=1e-4)
    assert opt.state[p]["step"] == 1
