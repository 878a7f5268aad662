"""Two image data sets as uint8 tensors: scikit-learn's digits, and CIFAR-10 from its binary files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes

DIGITS_TEST_SHARE = 0.2
DIGITS_SPLIT_SEED = 0  # of the split only: every run is tested on the same images


class DataError(Exception):
    """The data are not where, or not what, they should be; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) as uint8, labels (N,) as int64, mean and standard deviation of the training pixels (C,)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    padding: int = 0  # of the random crop; 0 means no augmentation
    n_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on a device."""
        names = ("train_x", "train_y", "test_x", "test_y", "mean", "std")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels as float32 with mean 0 and standard deviation 1 over the training set, channel by channel."""
        return (x.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def batches_per_epoch(self, batch_size: int) -> int:
        """Full batches in the training set; what is left over is not used in this epoch."""
        return len(self.train_y) // batch_size

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of an epoch: of (seed, epoch) alone, so every optimizer sees the same."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_y), generator=generator)
        for i in range(self.batches_per_epoch(batch_size)):
            chosen = order[i * batch_size : (i + 1) * batch_size].to(self.train_x.device)
            x = self.train_x[chosen]
            if self.padding:
                x = random_crop_flip(x, self.padding, generator)
            yield self.normalise(x), self.train_y[chosen]

    def test_batches(self, batch_size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order."""
        for x, y in zip(self.test_x.split(batch_size), self.test_y.split(batch_size), strict=True):
            yield self.normalise(x), y


def random_crop_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with zeros, cut out a window of the old size at a random place, mirror half of the images; one gather in all.

    Shapes: (N, C, H, W) to (N, C, H, W). The random numbers come from the CPU ``generator`` whatever the device of x.
    """
    n, _, height, width = x.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    mirror = torch.randint(2, (n, 1), generator=generator).bool()
    columns = torch.arange(width)
    rows = (top + torch.arange(height)).to(x.device)
    columns = (left + torch.where(mirror, columns.flip(0), columns)).to(x.device)
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def pixel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of uint8 images, exactly, from its histogram."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in x.unbind(1):
        share = torch.bincount(channel.reshape(-1).int(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean)
        stds.append((share * (values - mean) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(stds).float()


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 digits: images (8x8 pixels from 0 to 16), labels, indices for training and for testing.

    Every class has the same share of both parts.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    everything = np.arange(len(digits.target))
    train, test = train_test_split(
        everything, test_size=DIGITS_TEST_SHARE, stratify=digits.target, random_state=DIGITS_SPLIT_SEED
    )
    return digits.images, digits.target, train, test


def load_digits() -> Dataset:
    """Return the digits as (N, 1, 8, 8), not augmented: a mirrored digit is another character."""
    images, labels, train, test = digits_split()
    x = torch.from_numpy(images).to(torch.uint8)[:, None]
    y = torch.from_numpy(labels).long()
    mean, std = pixel_statistics(x[train])
    return Dataset("digits", x[train], y[train], x[test], y[test], mean, std)


def cifar_folder(root: Path) -> Path:
    """Where the binary files are: ``root`` or its subfolder of the published name."""
    for folder in (root / CIFAR_FOLDER, root):
        if any((folder / name).exists() for name in CIFAR_TRAIN + CIFAR_TEST):
            return folder
    where = f"neither {root} nor {root / CIFAR_FOLDER} has {CIFAR_TRAIN[0]}"
    if not root.is_dir():
        where = f"{root} is not a folder"
    elif any((folder / "data_batch_1").exists() for folder in (root, root / "cifar-10-batches-py")):
        where += " (what is there is the Python version of the data)"
    raise DataError(
        f"CIFAR-10 not found: {where}. Expected {', '.join(CIFAR_TRAIN + CIFAR_TEST)} of the binary version: "
        f"download and unpack {CIFAR_URL}, and pass the folder as --root"
    )


def read_cifar_file(path: Path, records: int) -> tuple[Tensor, Tensor]:
    """Images (records, 3, 32, 32) as uint8 and labels (records,) of one binary file."""
    source = f"It is part of {CIFAR_URL}"
    if not path.is_file():
        raise DataError(f"{path} is missing; expected a file of {records * CIFAR_RECORD:,} bytes. {source}")
    size = path.stat().st_size
    if size != records * CIFAR_RECORD:
        raise DataError(
            f"{path} has {size:,} bytes; expected {records * CIFAR_RECORD:,} ({records:,} x {CIFAR_RECORD:,}). "
            f"{source}; a smaller file is often an interrupted download"
        )
    table = np.fromfile(path, dtype=np.uint8).reshape(records, CIFAR_RECORD)
    images = table[:, 1:].reshape(records, *CIFAR_SHAPE)
    return torch.from_numpy(images.copy()), torch.from_numpy(table[:, 0].astype(np.int64))


def load_cifar10(root: str | Path, records: int = 10_000) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009) from the published binary files, with the usual crop and mirror augmentation.

    Args:
        root: folder with the files, or the one above it.
        records: images in each file.

    Raises:
        DataError: a file is missing or is not what it should be.
    """
    folder = cifar_folder(Path(root))
    parts = {name: read_cifar_file(folder / name, records) for name in CIFAR_TRAIN + CIFAR_TEST}
    train_x, train_y = (torch.cat([parts[name][i] for name in CIFAR_TRAIN]) for i in (0, 1))
    test_x, test_y = parts[CIFAR_TEST[0]]
    mean, std = pixel_statistics(train_x)
    return Dataset("cifar10", train_x, train_y, test_x, test_y, mean, std, padding=4)
