"""What an exact product costs for models of many kinds, and which operators make it: ``python -m bench.wider``.

A Hessian step and a first-order step (gradients only, no optimizer) take turns; their processor times give the cost.
Matrix products and convolutions are done three times, so the floor is 3. What an operator takes beyond three times what
it takes in a first-order step, as a share of that step, is its excess.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adahessian_fused import curvature_friendly

from .display import table
from .machine import machine

HEADER = ("model", "first order", "cost", "excess of operators")
Record = dict[str, Any]
Problem = tuple[nn.Module, Callable[[nn.Module], Tensor]]
WORDS, LENGTH, EXAMPLES = 8192, 128, 4
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}


def _language(model: nn.Module, **inputs: Tensor) -> Problem:
    tokens = torch.randint(1, WORDS, (EXAMPLES, LENGTH))
    return model, lambda m: m(input_ids=tokens, labels=tokens, **inputs).loss


def _gpt2() -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 256, "n_layer": 2, "n_head": 4}
    return _language(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)))


def _llama() -> Problem:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _language(LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **SIZES)))


def _bert() -> Problem:
    from transformers import BertConfig, BertForMaskedLM

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _language(BertForMaskedLM(BertConfig(vocab_size=WORDS, **none, **SIZES)))


def _t5() -> Problem:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=WORDS, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return _language(T5ForConditionalGeneration(config))


def _vit() -> Problem:
    from transformers import ViTConfig, ViTForImageClassification

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=10, **none, **SIZES))
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 10
    return model, lambda m: m(pixel_values=images, labels=labels).loss


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _images(*layers: nn.Module, n: int = 8, size: int = 32) -> Problem:
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
    images, labels = torch.randn(n, 3, size, size), torch.arange(n) % 10
    model(images)
    return model, lambda m: F.cross_entropy(m(images), labels)


def _bottlenecks() -> Problem:
    def block() -> nn.Module:
        conv = [(256, 64, 1), (64, 64, 3), (64, 256, 1)]
        layers = [
            m
            for i, o, k in conv
            for m in (nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        ]
        return _Residual(*layers[:-1])

    stem = nn.Conv2d(3, 256, 7, stride=2, padding=3), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return _images(*stem, block(), nn.ReLU(), block(), nn.ReLU(), size=64)


def _depthwise() -> Problem:
    def block() -> nn.Module:
        wide = nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.Hardswish()
        each = nn.Conv2d(256, 256, 5, padding=2, groups=256, bias=False), nn.BatchNorm2d(256), nn.Hardswish()
        return _Residual(*wide, *each, nn.Conv2d(256, 64, 1, bias=False), nn.BatchNorm2d(64))

    return _images(nn.Conv2d(3, 64, 3, stride=2, padding=1), block(), block())


def _unet() -> Problem:
    def block() -> nn.Module:
        half = (nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
        return _Residual(*half, nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))

    down, up = nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), block(), down, block(), up, block(), nn.Conv2d(64, 3, 3, padding=1)
    )
    images, noise = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    return model, lambda m: (m(images) - noise).square().mean()


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words, self.layers, self.head = nn.Embedding(WORDS, 256), kind(256, 256, 2), nn.Linear(256, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.words(tokens))[0])


def _recurrent(kind: type[nn.RNNBase]) -> Problem:
    tokens = torch.randint(WORDS, (LENGTH, EXAMPLES))
    return _Recurrent(kind), lambda m: F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())


MODELS: dict[str, Callable[[], Problem]] = {
    "GPT-2": _gpt2,
    "Llama": _llama,
    "BERT": _bert,
    "ViT": _vit,
    "T5": _t5,
    "ResNet-50's bottlenecks": _bottlenecks,
    "depthwise convolutions": _depthwise,
    "U-Net, GroupNorm and SiLU": _unet,
    "LSTM": functools.partial(_recurrent, nn.LSTM),
    "GRU": functools.partial(_recurrent, nn.GRU),
}


def steps(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a first-order step and one with a Hessian-vector product, without updates."""
    model, loss = problem
    params = [p for p in model.parameters() if p.requires_grad]
    z = [torch.randint(0, 2, p.shape).mul_(2).sub_(1).to(p) for p in params]

    def first() -> None:
        torch.autograd.grad(loss(model), params, allow_unused=True)

    def second() -> None:
        with curvature_friendly():
            value = loss(model)
        grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        used = [(g, v) for g, v in zip(grads, z, strict=True) if g is not None and g.requires_grad]
        torch.autograd.grad([g for g, _ in used], params, [v for _, v in used], allow_unused=True)

    return first, second


def cost(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median of the ratios of their processor times, and the first one's in seconds."""
    first(), second()
    found = []
    for _ in range(rounds):
        times = [time.process_time()]
        for step in (first, second):
            step()
            times.append(time.process_time())
        found.append((times[1] - times[0], times[2] - times[1]))
    return statistics.median(b / a for a, b in found), min(a for a, _ in found)


def excess(first: Callable[[], None], second: Callable[[], None]) -> list[tuple[str, float]]:
    """Operators by what they take beyond three times their first order, in first-order steps."""
    times = []
    for step in (first, second):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(), step()
        times.append(Counter({e.key: e.self_cpu_time_total for e in profiler.key_averages()}))
    before, after = times
    total = sum(before.values())
    return sorted(((k, (after[k] - 3 * before[k]) / total) for k in after), key=lambda pair: -pair[1])


def records(names: Sequence[str], rounds: int) -> Iterator[Record]:
    """Return what is measured of each model."""
    for name in names:
        torch.manual_seed(0)
        pair = steps(MODELS[name]())
        ratio, seconds = cost(*pair, rounds)
        most = {op.removeprefix("aten::"): share for op, share in excess(*pair)[:4] if share > 0.02}
        yield {"model": name, "first_order_seconds": seconds, "cost": ratio, "excess": most}


def cells(record: Record) -> list[str]:
    """Return a row of the table."""
    most = ", ".join(f"{op} {share:.2f}" for op, share in record["excess"].items())
    return [record["model"], f"{1e3 * record['first_order_seconds']:.0f} ms", f"{record['cost']:.2f}", most]


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.wider", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/wider holds those of docs/benchmarks.md")
    args = parser.parse_args()
    data: dict[str, Any] = {"machine": machine("cpu"), "rounds": args.rounds, "models": []}
    for record in records(args.models, args.rounds):
        data["models"].append(record)
        if args.out is not None:
            args.out.write_text(json.dumps(data, indent=1) + "\n")
    table("exact products over first order; floor 3", HEADER, [cells(record) for record in data["models"]])


if __name__ == "__main__":
    main()
