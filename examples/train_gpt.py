"""A small GPT on the characters of a text: compiled, autocast, GradScaler, accumulation, clipping, a schedule, DDP.

An ordinary trainer. With AdaHessian it has three other lines, marked with #:

    python examples/train_gpt.py                          # AdaHessian
    python examples/train_gpt.py --optimizer adamw
    torchrun --nproc-per-node 2 examples/train_gpt.py     # on several ranks
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from adahessian_fused import AdaHessian, curvature_friendly


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*wide, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.mix(attention.transpose(1, 2).flatten(-2)))
        return x + self.mlp(self.after(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout=0.1) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file to learn; by default this one")
    parser.add_argument("--optimizer", choices=("adahessian", "adamw"), default="adahessian")
    parser.add_argument("--compile", default="inductor", help='backend of torch.compile; "" for none')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=10, help="steps from one with curvature to the next")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> float:
    """Train; returns the loss on text that was not seen."""
    args, several = arguments(given), "RANK" in os.environ
    if several:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = dist.get_rank() if several else 0
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    torch.manual_seed(0)
    text = args.text.read_text()
    characters = sorted(set(text))
    tokens, context, batch = torch.tensor([characters.index(c) for c in text]), 32, 8
    split = len(tokens) * 9 // 10

    def draw(part: Tensor) -> tuple[Tensor, Tensor]:
        begins = torch.randint(len(part) - context, (batch, 1)) + torch.arange(context + 1)
        return part[begins[:, :-1]].to(device), part[begins[:, 1:]].to(device)

    model = GPT(len(characters), context).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    second_order = args.optimizer == "adahessian"
    lr = 0.15 if second_order else 3e-3
    if second_order:
        opt = AdaHessian(groups, lr=lr, update_each=args.every)  #
        curvature_friendly(model, opt)  #
    else:
        opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    if args.compile:
        model = torch.compile(model, backend=args.compile)
    if several:
        model = DistributedDataParallel(model)
    torch.manual_seed(1 + rank)
    warmup = args.steps // 10
    for step in range(args.steps):
        share = step / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
        for group in opt.param_groups:
            group["lr"] = lr * share
        for micro_step in range(args.accumulate):
            last = micro_step + 1 == args.accumulate
            with model.no_sync() if several and not last else contextlib.nullcontext():
                with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                    _, loss = model(*draw(tokens[:split]))
                if second_order:
                    opt.backward(loss / args.accumulate, grad_scaler=scaler)  #
                else:
                    scaler.scale(loss / args.accumulate).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        if step % 20 == 0 and rank == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        loss = sum(model(*draw(tokens[split:]))[1].item() for _ in range(8)) / 8
    if rank == 0:
        print(f"loss of unseen text {loss:.3f}")
    if several:
        dist.destroy_process_group()
    return loss


if __name__ == "__main__":
    main()
