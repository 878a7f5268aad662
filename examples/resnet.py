"""ResNets for small images (He et al. 2016, section 4.2): 6n + 2 layers in 3 stages, parameter-free shortcuts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; where the size changes, every second pixel and zero channels (option A)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.new_channels = stride, c_out - c_in

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the block's input, or every second pixel of it between zero channels, half of them on each side."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A convolution, 3 stages of ``n_blocks`` blocks, global average pooling and a linear layer.

    Args:
        n_blocks: blocks a stage; 3 is ResNet-20, 5 is ResNet-32.
        in_channels: 1 for grey images, 3 for colour.
        n_classes: outputs.
    """

    def __init__(self, n_blocks: int, in_channels: int = 3, n_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.stages = nn.Sequential()
        c_in = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for i in range(n_blocks):
                self.stages.append(Block(c_in, width, stride=2 if stage > 0 and i == 0 else 1))
                c_in = width
        self.head = nn.Linear(c_in, n_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, n_classes)."""
        x = F.relu(self.bn(self.conv(x)))
        return self.head(self.stages(x).mean((2, 3)))


def resnet20(in_channels: int = 3, n_classes: int = 10) -> ResNet:
    """ResNet-20, 0.27 M parameters."""
    return ResNet(3, in_channels, n_classes)


def resnet32(in_channels: int = 3, n_classes: int = 10) -> ResNet:
    """ResNet-32, 0.46 M parameters."""
    return ResNet(5, in_channels, n_classes)


MODELS = {"resnet20": resnet20, "resnet32": resnet32}
