"""What the examples train on: scikit-learn's 1,797 digits, 8x8 pixels from 0 to 1."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def images_and_labels() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: images (N, 1, 8, 8) and labels (N,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def batches(train: TensorDataset, size: int = 64) -> DataLoader:
    """Return the training set, shuffled, in full batches."""
    return DataLoader(train, size, shuffle=True, drop_last=True)


def conv_net() -> nn.Module:
    """Return a network of 4,074 parameters."""
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Return the share of the test set that a model of logits gets right."""
    images, labels = test.tensors
    logits: Tensor = model.eval()(images)
    return (logits.argmax(1) == labels).float().mean().item()
