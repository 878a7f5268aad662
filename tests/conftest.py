"""Which backends and which device the tests run on.

By default every backend that can run here is tested, and the others skip with their reason. With ``--device cuda`` the
same tests run on CUDA tensors. ``--require native,triton`` makes a backend of the list fail where it cannot run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import seeds
import torch
from cases import cases_for

sys.path.append(str(Path(__file__).parents[1]))  # for bench; behind an installed adahessian_fused

OPS = ("rademacher", "perturb", "hessian_diag", "adahessian_step")
BACKENDS = {"cpu": ("reference", "native", "emulated", "triton"), "cuda": ("reference", "native", "triton")}
# Of tests of the optimizer: every backend that is fast enough to run all of them, and interpreted Triton as well.
ENGINES = {"engine": ("reference", "native"), "every_engine": ("reference", "native", "triton")}
# Of `make test`, whose workers take one file after the other: those that take long come first.
LONG = """
    adahessian_step distributed trainers train_step train_step_seen train_step_losses triton_inspect cuda_inspect
    friendly fuzz bench zoo instruction_sets ops hessian_diag op_properties strategies demo convergence installation
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=sorted(BACKENDS), default="cpu", help="where the tensors under test live")
    parser.addoption("--require", default="", metavar="A,B", help="backends that fail, not skip, where they cannot run")


def safe_path() -> dict[str, str]:
    """The environment of a program of its own, as `make gpu` has it: nothing is imported from the folder it runs in."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def compute_alike() -> None:
    """Have PyTorch's CUDA libraries compute the same numbers each time: many tests compare two runs bit for bit.

    The package's own kernels do so anyway: the order of all sums is fixed, and which products are fused with an
    addition is written down. Products of float32 are not to be TF32's, either, whose errors no bound expects.

    What stays: where it may only warn, PyTorch's fused attention adds up the gradients of blocks of keys in any order,
    and the maxima of bags theirs. Tests that compare their bits have one such block, and at most two bags with a row.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    for products in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        products.fp32_precision = "ieee"


def interpret_triton() -> None:
    """Have Triton's interpreter replace the language's functions once: at each call it takes most of the time."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the Triton kernels
    with contextlib.suppress(ImportError):
        from triton import language
        from triton.runtime import interpreter

        # A kernel knows the first module, Triton's own device functions the second.
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
        interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(list): run the test once for each backend and case of the list")
    seeds.shift()
    if config.getoption("--device") == "cpu":
        interpret_triton()
    else:
        config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")
        compute_alike()
    known = {name for names in BACKENDS.values() for name in names}
    unknown = set(filter(None, config.getoption("--require").split(","))) - known
    if unknown:
        raise pytest.UsageError(f"--require: unknown backend {sorted(unknown)}; expected some of {sorted(known)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Tests collect garbage of their own, without a look at hundreds of thousands of objects each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for share, test in sys.modules["tolerances"].largest if "tolerances" in sys.modules else []:
        terminalreporter.write_line(f"largest share of a bound: {share:.2f} {test}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    for argument in ENGINES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(argument, ENGINES[argument] if device == "cpu" else BACKENDS[device], indirect=True)
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        metafunc.parametrize("backend", BACKENDS[device], indirect=True)
        return
    pairs = [(backend, case) for backend in BACKENDS[device] for case in cases_for(backend, device, marker.args[0])]
    metafunc.parametrize(("backend", "case"), pairs, indirect=["backend"], ids=[f"{b}-{c}" for b, c in pairs])


def _emulated() -> SimpleNamespace:
    from adahessian_fused import backends

    backends.get("native")  # loads the library that has the emulated kernels too
    ops = torch.ops.adahessian_fused_emulated
    return SimpleNamespace(**{op: getattr(ops, op).default for op in OPS})


def _load(name: str, device: str) -> tuple[object | None, str | None]:
    """The backend, or the reason why it cannot run."""
    from adahessian_fused import backends

    if name != "emulated":
        reason = backends.unavailable_reason(name, device)
        return (None, reason) if reason else (backends.get(name), None)
    reason = backends.unavailable_reason("native", "cpu")
    try:
        return (None, f"needs the native library: {reason}") if reason else (_emulated(), None)
    except AttributeError as error:
        return None, str(error)


def _require(name: str, request: pytest.FixtureRequest) -> SimpleNamespace:
    ops, reason = _load(name, request.config.getoption("--device"))
    if ops is None:
        required = name in request.config.getoption("--require").split(",")
        (pytest.fail if required else pytest.skip)(f"backend {name} cannot run here: {reason}")
    return SimpleNamespace(name=name, **{op: getattr(ops, op) for op in OPS})


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors under test live: "cpu" or "cuda"."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One backend: its name and its ops."""
    return _require(request.param, request)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The name of a backend for the optimizer."""
    return _require(request.param, request).name


every_engine = engine


@pytest.fixture(scope="session")
def native(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The native backend alone, for what only compiled operators promise."""
    return _require("native", request)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced but not compiled, which would take long."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
    # Nothing of a compiler's is to be freed, and to look for it takes longer the more objects a process has.
    monkeypatch.setattr("adahessian_fused.train_step.compiled._give_back", lambda: None)
