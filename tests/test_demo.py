"""The demo in examples/: its network, its data, and one short run of the whole program."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from published import AdaHessian

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECORDS = 20  # a small stand-in for the 10,000 of a real CIFAR-10 file


def load(name: str) -> ModuleType:
    """A module of examples/ under a name of its own, so that ``data`` or ``resnet`` shadow nothing."""
    spec = importlib.util.spec_from_file_location(f"adahessian_demo_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, resnet = load("data"), load("resnet")


# ---- the network -----------------------------------------------------------------------------------------------------


# He et al. 2016, Table 6: 0.27 M and 0.46 M parameters.
@pytest.mark.parametrize(("model", "count"), [("resnet20", 269_722), ("resnet32", 464_154)])
def test_parameter_count(model, count):
    assert sum(p.numel() for p in resnet.MODELS[model]().parameters()) == count


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_digits_split_is_deterministic_disjoint_and_stratified():
    pytest.importorskip("sklearn")
    images, labels, train, test = data.digits_split()
    again = data.digits_split()
    assert np.array_equal(train, again[2])
    assert np.array_equal(test, again[3])
    assert sorted([*train, *test]) == list(range(len(images)))
    shares = np.bincount(labels[test]) / np.bincount(labels)
    assert np.abs(shares - data.DIGITS_TEST_SHARE).max() < 1 / np.bincount(labels).min()


def test_batches_depend_on_seed_and_epoch_alone():
    pytest.importorskip("sklearn")
    digits = data.load_digits()

    def labels(seed: int, epoch: int) -> list[int]:
        return torch.cat([y for _, y in digits.batches(100, seed, epoch)]).tolist()

    assert labels(0, 0) == labels(0, 0)
    assert labels(0, 0) != labels(0, 1)
    assert labels(0, 0) != labels(1, 0)
    assert len(labels(0, 0)) == 100 * digits.batches_per_epoch(100)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with the six binary files, a few random records each, and the records."""
    rng = np.random.default_rng(0)
    files = {}
    for name in data.CIFAR_TRAIN + data.CIFAR_TEST:
        records = rng.integers(0, 256, (RECORDS, data.CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
        files[name] = records
    return tmp_path, files


def test_cifar_values(cifar):
    root, files = cifar
    dataset = data.load_cifar10(root, RECORDS)
    train = np.concatenate([files[name] for name in data.CIFAR_TRAIN])
    assert dataset.train_y.tolist() == train[:, 0].tolist()
    assert dataset.test_y.tolist() == files["test_batch.bin"][:, 0].tolist()
    # A record is the label and three planes, row by row: pixel (c, i, j) is byte 1 + 1024 c + 32 i + j.
    assert dataset.train_x[23, 2, 5, 7] == train[23, 1 + 2 * 1024 + 5 * 32 + 7]
    assert dataset.train_x.shape == (5 * RECORDS, 3, 32, 32)
    planes = train[:, 1:].reshape(-1, 3, 1024).astype(np.float64)
    assert dataset.mean.tolist() == pytest.approx(planes.mean((0, 2)).tolist(), rel=torch.finfo(torch.float32).eps)
    assert dataset.std.tolist() == pytest.approx(planes.std((0, 2)).tolist(), rel=torch.finfo(torch.float32).eps)


def test_cifar_file_of_the_wrong_size(cifar):
    root, _ = cifar
    with (root / "data_batch_3.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(data.DataError, match=r"data_batch_3\.bin has 61,461 bytes; expected 61,460 .*cifar-10-binary"):
        data.load_cifar10(root, RECORDS)


def test_crop_and_flip_are_windows_of_the_padded_image():
    x = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    y = data.random_crop_flip(x, 2, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, y, strict=True):
        windows = {(i, j, False): before[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)}
        windows |= {(i, j, True): window.flip(2) for (i, j, _), window in windows.items()}
        found = [key for key, window in windows.items() if torch.equal(window, after)]
        assert len(found) == 1
        seen.add(found[0])
    assert {key[0] for key in seen} == {key[1] for key in seen} == set(range(5))
    assert {key[2] for key in seen} == {False, True}


# ---- agreement with the reference ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load_as_the_program_does():
    """Imports a module as the program does, with its folder in front; forgotten afterwards."""
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture(scope="module")
def measure(load_as_the_program_does):
    return load_as_the_program_does("measure")


def agree(measure: ModuleType, contestant) -> bool:
    """Whether the program would accept a contestant."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    (result,) = measure.agreement([contestant], resnet.ResNet(1, 1), measure.Settings(weight_decay=5e-4), x, y)
    return result.ok


@pytest.mark.parametrize("name", ["plain", "fused", "fused5", "compiled", "cheap"])
def test_first_update_agrees_with_the_reference(measure, name):
    assert agree(measure, measure.CONTESTANTS[name])


@pytest.mark.parametrize("change", [{"lr": 0.15 * (1 + 1e-4)}, {"averaging": "abs"}, {"seed": 1}, {"weight_decay": 0}])
def test_a_wrong_update_is_found_out(measure, change):
    def make(params, settings):
        options = {"lr": 0.15, "seed": 0, "weight_decay": settings.weight_decay / settings.lr_adahessian}
        return AdaHessian(params, **options | change)

    assert not agree(measure, dataclasses.replace(measure.CONTESTANTS["fused"], make=make))


# ---- the program -----------------------------------------------------------------------------------------------------


def test_short_run(load_as_the_program_does, set_threads, tmp_path):
    for module in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(module)
    names = ("sgd", "fused2")
    short = ("--epochs=1", "--batch-size=32", "--batches=2", "--rounds=2", "--threads=1", "--device=cpu", "--seed=3")
    arguments = [*short, "--out", str(tmp_path / "new" / "out"), "--optimizers", *names]
    assert load_as_the_program_does("train_resnet").main(arguments) == 0
    results = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert {"cpu", "cores", "threads", "device", "backend", "torch", "commit"} <= set(results["machine"])
    assert [check["name"] for check in results["check"]] == ["fused2"]
    assert all(check["of_tolerance"] <= 1 for check in results["check"])
    assert tuple(results["optimizers"]) == names
    for row in results["optimizers"].values():
        assert all(len(curve) == 1 for curve in row["curves"].values())
        assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"]
        assert row["peak_memory_mb"] > 0
    assert results["optimizers"]["fused2"]["paper_cost_x_sgd"] == 1.71
    assert (tmp_path / "new" / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "file/out"), "cannot write to --out"),
        (("--data", "cifar10", "--root", "nowhere", "--out", "."), "CIFAR-10 not found"),
    ],
)
def test_what_cannot_be_done_is_said(load_as_the_program_does, arguments, said, tmp_path, monkeypatch, capsys):
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert load_as_the_program_does("train_resnet").main([*arguments]) == 1
    assert said in capsys.readouterr().err
