"""Balance poles on carts: a policy and a value, learned from what they do (Barto et al. 1983; Mnih et al. 2016)."""

from collections.abc import Iterator

import torch
from script import Script
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import smooth_l1_loss
from torch.optim import Adam

CARTS, STEPS, DISCOUNT = 16, 24, 0.97


def pushed(state: Tensor, right: Tensor) -> Tensor:
    """Position, speed, angle and turning speed of the carts a fiftieth of a second later: (CARTS, 4)."""
    speed, angle, turning = state[:, 1:].unbind(1)
    force = (20.0 * right - 10.0 + 0.05 * turning.square() * angle.sin()) / 1.1
    turned = (9.8 * angle.sin() - angle.cos() * force) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    moved = force - 0.05 * turned * angle.cos() / 1.1
    return state + 0.02 * torch.stack([speed, moved, turning, turned], 1)


def train(script: Script) -> Iterator[float]:
    """Yield how many of 100 pushes end a cart's turn."""
    body, act, judge = nn.Sequential(nn.Linear(4, 64), nn.Tanh()), nn.Linear(64, 2), nn.Linear(64, 1)
    opt = script.optimizer(nn.ModuleList([body, act, judge]), lambda params: Adam(params, lr=0.01))
    state = 0.1 * torch.rand(CARTS, 4) - 0.05
    while True:
        values, chances, fell = [], [], []
        for _ in range(STEPS):
            hidden = body(state)
            policy, value = Categorical(logits=act(hidden)), judge(hidden)[:, 0]
            action = policy.sample()
            values.append(value)
            chances.append(policy.log_prob(action))
            state = pushed(state, action)
            fell.append((state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.21))
            state = torch.where(fell[-1][:, None], 0.1 * torch.rand_like(state) - 0.05, state)
        result, results = judge(body(state))[:, 0].detach(), []
        for down in reversed(fell):
            result = torch.where(down, 0.0, 1.0 + DISCOUNT * result)
            results.insert(0, result)
        value, result = torch.stack(values), torch.stack(results)
        policy_loss = -(torch.stack(chances) * (result - value.detach())).mean()
        script.descend(opt, policy_loss + smooth_l1_loss(value, result))
        yield 100 * torch.stack(fell).float().mean().item()
