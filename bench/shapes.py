"""Parameter shapes of the models and lists that the cases are made of."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet20() -> list[Shape]:
    """CIFAR ResNet-20 with batch norm (He et al. 2016): 59 tensors, 0.27 M numbers."""
    shapes: list[Shape] = [(16, 3, 3, 3), (16,), (16,)]
    for stage, width in enumerate((16, 32, 64)):
        for conv in range(6):
            inputs = width // 2 if stage > 0 and conv == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,)]
    return [*shapes, (10, 64), (10,)]


def resnet50() -> list[Shape]:
    """ImageNet ResNet-50 (He et al. 2016): 161 tensors, 25.6 M numbers."""
    shapes: list[Shape] = []

    def conv(outputs: int, inputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    conv(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(width, inputs, 1)
            conv(width, width, 3)
            conv(4 * width, width, 1)
            if block == 0:
                conv(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2(layers: int, width: int) -> list[Shape]:
    """GPT-2 (Radford et al. 2019), the head tied to the embedding: small is (12, 768), medium is (24, 1024)."""
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,)]


def awkward() -> list[Shape]:
    """Primes, and sizes around the multiples that vectors and tiles like."""
    return [(1_000_003,), (104_729,), (257, 263), (7, 11, 13), (65_521, 3), (127,), (2_049,), (31, 17, 3, 3), (1,)]
