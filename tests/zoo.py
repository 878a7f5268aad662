"""Small models of many kinds, each with a loss of a batch; the fuzzer draws networks of plain layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WORDS = 11


class Animal(NamedTuple):
    """A model and its loss; ``reference`` computes the same by operators that PyTorch differentiates right."""

    model: nn.Module
    loss: Callable[..., Tensor]  # of the model and the batch
    batch: Sequence[Tensor]
    reference: Callable[..., Tensor]
    mean: bool  # whether the loss is a mean over the examples


def animal(model, loss, *batch, reference=None, mean=True) -> Animal:
    return Animal(model, loss, batch, reference or loss, mean)


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def images(n=4, size=8):
    return torch.randn(n, 3, size, size), torch.arange(n) % 5


def tokens(n=2, length=6):
    return torch.randint(0, WORDS, (n, length))


# ---- transformers ----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


def language_loss(model, x):
    return model(input_ids=x, labels=x).loss


def gpt2():
    t = transformers()
    sizes = {"vocab_size": WORDS, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = t.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return animal(t.GPT2LMHeadModel(config), language_loss, tokens())


def llama():
    t = transformers()
    config = t.LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, pad_token_id=0, **SIZES)
    return animal(t.LlamaForCausalLM(config), language_loss, tokens())


def llama_checkpointed():
    a = llama()
    twin = a.model
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def reference(model, x):
        model.gradient_checkpointing_disable()
        return language_loss(model, x)

    return a._replace(model=twin, reference=reference)


def bert():
    t = transformers()
    config = t.BertConfig(vocab_size=WORDS, max_position_embeddings=8, num_labels=5, **SIZES, **NO_DROPOUT)

    def loss(model, x, y):
        return model(input_ids=x, attention_mask=(x > 0).long(), labels=y).loss

    return animal(t.BertForSequenceClassification(config), loss, tokens(4), torch.arange(4) % 5)


def t5():
    t = transformers()
    sizes = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = t.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)

    def loss(model, x, y):
        return model(input_ids=x, labels=y).loss

    return animal(t.T5ForConditionalGeneration(config), loss, tokens(), tokens())


def vit():
    t = transformers()
    config = t.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES, **NO_DROPOUT)

    def loss(model, x, y):
        return model(pixel_values=x, labels=y).loss

    return animal(t.ViTForImageClassification(config), loss, *images())


class Encoder(nn.Module):
    """nn.TransformerEncoder over a sequence, and a head."""

    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def encoder():
    return animal(Encoder(), cross_entropy, torch.randn(4, 6, 8), torch.arange(4) % 5)


# ---- convolutions ----------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """One step down and one up, with group norms."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        self.up, self.out = nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x):
        y = F.silu(self.norms[0](self.down(x)))
        y = F.silu(self.norms[1](self.middle(y))) + y
        return self.out(torch.cat([self.up(y), x], 1))


def u_net():
    return animal(UNet(), lambda model, x: (model(x) - x).square().mean(), images()[0])


# ---- sequences, sets, graphs -----------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Messages along edges, added up at their ends."""

    def __init__(self):
        super().__init__()
        self.message, self.update, self.norm = nn.Linear(6, 4), nn.Linear(7, 3), nn.LayerNorm(3)

    def forward(self, x, source, target):
        messages = F.relu(self.message(torch.cat([x[source], x[target]], 1)))
        received = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, target, messages)
        strongest = torch.zeros_like(received).scatter_reduce(
            0, target[:, None].expand_as(messages), messages, "amax", include_self=False
        )
        return self.norm(self.update(torch.cat([x, received + strongest], 1)))


def graph():
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    return animal(
        Graph(), lambda model, x: model(x, *edges).square().sum(1).tanh().mean(), torch.randn(5, 3), mean=False
    )


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(WORDS, 4, mode="mean"), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.bags(x)).tanh()


def bags():
    def by_embedding(model, x, y):
        return F.cross_entropy(model.head(F.embedding(x, model.bags.weight).mean(1)).tanh(), y)

    return animal(Bags(), cross_entropy, tokens(4), torch.arange(4) % 5, reference=by_embedding)


class Experts(nn.Module):
    """Each example goes to the expert of its sign; the third is nobody's."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        y = torch.zeros(len(x), 4, dtype=x.dtype)
        for i in chosen.unique().tolist():
            rows = (chosen == i).nonzero()[:, 0]
            y = y.index_copy(0, rows, self.experts[i](x[rows]).tanh())
        return self.head(y)


def experts():
    x = torch.randn(6, 3)
    x[:, 0] = torch.tensor([1.0, -1, 1, -1, 1, -1])
    return animal(Experts(), cross_entropy, x, torch.arange(6) % 5)


# ---- parametrizations and checkpoints --------------------------------------------------------------------------------


def weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    def reference(model, x, y):
        conv, weight = model[0], model[0].parametrizations.weight
        g, v = weight.original0, weight.original1
        kernel = v * g / v.flatten(1).norm(dim=1).view(g.shape)  # PyTorch's operator has a wrong second derivative
        return F.cross_entropy(model[1:](F.conv2d(x, kernel, conv.bias)), y)

    return animal(model, cross_entropy, *images(), reference=reference)


class Checkpointed(nn.Module):
    """Every operator of the mode in a checkpoint, some in two."""

    def __init__(self):
        super().__init__()
        conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
        self.conv, self.batch_norm, self.bags = (
            conv,
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.EmbeddingBag(5, 8),
        )
        self.project, self.attend, self.head = nn.Linear(4, 8), Encoder(norm_first=True), nn.RMSNorm(8)
        self.use = lambda function, *args: checkpoint(function, *args, use_reentrant=False)

    def inner(self, x):
        return self.use(self.batch_norm, self.use(self.conv, x))

    def forward(self, x):
        y = self.use(self.project, self.use(self.inner, x).flatten(2).mT)
        bag = self.use(self.bags, torch.arange(2 * len(x)).view(-1, 2) % 5)
        return self.use(self.attend, self.use(self.head, y + bag[:, None]))


def checkpoints():
    def without(model, x, y):
        model.use = lambda function, *args: function(*args)
        model.bags.forward = lambda words: F.embedding(words, model.bags.weight).mean(1)
        return cross_entropy(model, x, y)

    def with_them(model, x, y):
        return cross_entropy(model, x, y)

    return animal(Checkpointed(), with_them, *images(4, 4), reference=without, mean=False)


# ---- losses that hold gradients --------------------------------------------------------------------------------------


def gradient_penalty():
    """WGAN-GP's critic."""
    layers = nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()

    def loss(model, real, fake, mix):
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return model(fake).mean() - model(real).mean() + 10 * penalty

    batch = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4, 1, 1, 1)
    return animal(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 1)), loss, *batch)


def inner_gradient():
    """A step of gradient descent in the loss: meta-learning."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

    def loss(model, x, y):
        params = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, params, (x,)), y)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {name: p - 0.5 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return F.mse_loss(functional_call(model, fast, (x.flip(0),)), y)

    return animal(model, loss, torch.randn(6, 3), torch.randn(6, 1), mean=False)


def differential_equation():
    """A PINN: second derivatives by the inputs in the loss, fourth ones in its curvature."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.GroupNorm(2, 6), nn.Linear(6, 1))

    def loss(model, points):
        points = points.clone().requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), points, create_graph=True)
        return (du[:, 1] - ddu[:, 0]).square().mean() + u.square().mean()

    return animal(model, loss, torch.rand(6, 2))


ZOO = {
    make.__name__: make
    for make in (
        *(gpt2, llama, llama_checkpointed, bert, t5, vit, encoder, u_net, graph, bags, experts, weight_norm),
        *(checkpoints, gradient_penalty, inner_gradient, differential_equation),
    )
}
