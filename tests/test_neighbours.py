"""What others do in the same process at the same time: threads, wrappers of PyTorch's functions, reused buffers."""

from __future__ import annotations

import contextlib
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from published import AdaHessian
from torch import nn

from adahessian_fused import curvature_friendly


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, begun, go_on):
        ctx.events = begun, go_on
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        begun, go_on = ctx.events
        begun.set()
        go_on.wait(5)
        return grad, None, None


def test_a_pass_of_another_thread_concerns_only_its_own_leaves():
    events, leaf = (threading.Event(), threading.Event()), torch.ones(3, requires_grad=True)
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = AdaHessian([p], lr=0.1)
    opt.backward(p.pow(4).sum())
    other = threading.Thread(target=lambda: Waits.apply(leaf, *events).sum().backward())
    other.start()
    events[0].wait(5)
    nn.utils.clip_grad_norm_([p], 0.1)
    events[1].set()
    other.join()
    opt.step()  # clipping is not taken for a backward pass
    assert not torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("made", ["before", "after"])
def test_wrappers_of_backward_come_and_go(made):
    p = nn.Parameter(torch.ones(3))
    opts = [AdaHessian([p])] if made == "before" else []
    with mock.patch("torch.autograd.backward", wraps=torch.autograd.backward) as wrapped:
        opts += [AdaHessian([p])] if made == "after" else []
        p.square().sum().backward(create_graph=True)
        assert wrapped.call_count == 1
        opts[0].step()
    p.grad = None
    p.square().sum().backward(create_graph=True)
    opts[0].step()
    assert opts[0].param_groups[0]["step"] == 2


def test_a_batch_whose_labels_are_all_ignored_has_no_curvature():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    ignored, some = torch.full((4,), -100), torch.tensor([1, -100, 0, 4])
    v = torch.randn(4, 5, dtype=torch.float64)

    def product(loss):
        [g] = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(g, x, v)[0]

    for y in (ignored, some):
        expected = product(F.cross_entropy(x, y))
        with curvature_friendly():
            torch.testing.assert_close(product(F.cross_entropy(x, y)), expected, rtol=1e-12, atol=1e-14)
    assert not product(F.cross_entropy(x, ignored)).any()


@pytest.mark.parametrize("buffer", ["labels", "mask"])
def test_a_buffer_written_to_before_its_backward_pass_is_an_error(buffer):
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    labels, mask = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 4)
    with curvature_friendly():
        if buffer == "labels":
            loss = F.cross_entropy(q[0, 0], labels)
            labels.fill_(0)
        else:
            loss = F.scaled_dot_product_attention(q, q, q, mask).square().sum()
            mask.fill_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_may_be_written_to_after_cross_entropy(reduction):
    """PyTorch keeps their log-softmax alone."""
    x, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, -100, 2])
    v = torch.randn(4, 5, dtype=torch.float64)

    def derivatives():
        logits = 2 * x
        loss = F.cross_entropy(logits, y, reduction=reduction).pow(2).sum()
        logits.zero_()
        [g] = torch.autograd.grad(loss, x, create_graph=True)
        [h] = torch.autograd.grad(g, x, v, create_graph=True)
        return g, h, torch.autograd.grad(h, x, v)[0]

    with curvature_friendly():
        found = derivatives()
    torch.testing.assert_close(found, derivatives(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_a_mask_that_pytorch_refuses_is_its_error(dtype):
    q, mask, errors = torch.randn(1, 2, 4, 8, requires_grad=True), torch.ones(4, 4, dtype=dtype), []
    for mode in (contextlib.nullcontext(), curvature_friendly()):
        with mode, pytest.raises(RuntimeError, match="Expected attn_mask dtype") as error:
            F.scaled_dot_product_attention(q, q, q, mask)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_told_model_in_eval_mode_says_what_to_write():
    model = nn.EmbeddingBag(5, 3, mode="mean").eval()
    opt = AdaHessian(model.parameters())
    with curvature_friendly(model, opt), pytest.raises(RuntimeError, match="training mode; in eval mode"):
        opt.backward(model(torch.tensor([[1, 2]])).square().sum())
    with curvature_friendly():
        loss = model(torch.tensor([[1, 2]])).square().sum()
    opt.backward(loss)
