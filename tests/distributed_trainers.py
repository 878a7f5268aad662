"""Lightning and Accelerate on two ranks, with nothing but the optimizer's line; run by test_trainers.py."""

from __future__ import annotations

import os

import accelerate
import lightning as L
import torch
from distributed_problem import everything, same_bits
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from published import AdaHessian
from ranks import Ranks, worlds
from tolerances import assert_trajectory
from torch.utils.data import DataLoader, DistributedSampler
from trainers import BATCH, Net

OPTIONS = {"lr": 0.05, "update_each": 2, "seed": 0, "probe_per_rank": False}
STEPS = 3


def examples(steps: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)
    n = steps * BATCH
    pixels, labels = torch.rand(n, 64, generator=random), torch.randint(0, 10, (n,), generator=random)
    return [{"pixels": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def alone(accumulate: int = 1) -> list[torch.Tensor]:
    """What one process learns from the joint batches; a sampler gives every second example to each rank."""
    model = Net()
    opt = AdaHessian(model.parameters(), process_group="alone", **OPTIONS)
    for i, batch in enumerate(DataLoader(examples(STEPS * accumulate), BATCH)):
        opt.backward(model(**batch)["loss"] / accumulate)
        if (i + 1) % accumulate == 0:
            opt.step()
            opt.zero_grad()
    return list(model.parameters())


@worlds(2)
def check_accelerate(ranks: Ranks):
    os.environ |= {"RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    for accumulate in (1, 2):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        assert accelerator.num_processes == 2
        model = Net()
        own = AdaHessian(model.parameters(), **OPTIONS)
        own.hook_backward()
        loader = DataLoader(examples(STEPS * accumulate), BATCH // 2)
        model, opt, loader = accelerator.prepare(model, own, loader)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                opt.step()
                opt.zero_grad()
        assert own.param_groups[0]["step"] == STEPS
        assert_trajectory(list(model.module.parameters()), alone(accumulate), STEPS, 1e3)
        assert same_bits(everything(model, own), ranks.group)


@worlds(2)
def check_lightning(ranks: Ranks):
    class Environment(LightningEnvironment):
        creates_processes_externally = True
        world_size = staticmethod(lambda: ranks.size)
        global_rank = staticmethod(lambda: ranks.rank)
        local_rank = staticmethod(lambda: ranks.rank)
        set_world_size = set_global_rank = lambda self, number: None

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            self.opt = AdaHessian(self.parameters(), **OPTIONS)
            return self.opt

    module = Module()
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = DDPStrategy(cluster_environment=Environment(), process_group_backend="gloo")
    sampler = DistributedSampler(examples(STEPS), ranks.size, ranks.rank, shuffle=False)
    options = {"max_epochs": 1, "use_distributed_sampler": False}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, **options, **silent)
    trainer.fit(module, DataLoader(examples(STEPS), BATCH // 2, sampler=sampler))
    assert module.opt.param_groups[0]["step"] == STEPS
    assert_trajectory(list(module.net.parameters()), alone(), STEPS, 1e3)
    assert same_bits(everything(module.net, module.opt), ranks.group)
