"""The documentation: its code runs, its commands and links exist, no message of the package is without an entry."""

from __future__ import annotations

import doctest
import importlib
import re

import messages
import pytest
import torch
from conftest import OPS
from models import batch, mlp, weights
from originals import stand_ins  # noqa: F401
from pages import (
    DOCS,
    NOT_RUN,
    PAGES,
    ROOT,
    RUN_BY,
    TARGETS,
    blocks,
    code_spans,
    commands,
    headings,
    name,
    problems,
    prose,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import adahessian_fused

pages = pytest.mark.parametrize("page", PAGES, ids=name)
LANGUAGES = {"", "python", "sh", "diff", "text", "bibtex", "cpp", "yaml", "toml", "json", "mermaid"}


# ---- code ------------------------------------------------------------------------------------------------------------


def namespace() -> dict[str, object]:
    """What a page may take for granted: a model, a loss function and a few batches."""
    model = mlp(torch.float32)
    return {"model": model, "loss_fn": nn.functional.mse_loss, "batches": [batch(i, model) for i in range(3)]}


@pytest.fixture
def steps():
    """For each step that any optimizer takes, whether it moved parameters to where they are finite."""
    before, moved = {}, []

    def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    def compare(optimizer: torch.optim.Optimizer, *unused: object) -> None:
        pairs = zip(parameters(optimizer), before.pop(optimizer), strict=True)
        moved.append(any(bool((a != b).any() and a.isfinite().all()) for a, b in pairs))

    handles = [
        register_optimizer_step_pre_hook(lambda opt, *unused: before.update({opt: parameters(opt)})),
        register_optimizer_step_post_hook(compare),
    ]
    yield moved
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and name(p) not in RUN_BY], ids=name)
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_python_blocks_run(page, steps):
    names, ran = namespace(), ""
    for block in blocks(page, "python"):
        if "torch_optimizer import" in block.code and "compat" not in block.code:
            pytest.importorskip("torch_optimizer")
        code = compile("\n" * block.line + block.code, str(page), "exec")  # so that errors tell the line
        if not block.comment.startswith(NOT_RUN):
            exec(code, names)
            ran += block.code
    assert any(steps) == bool(re.search(r"\bstep\(", ran))


@pytest.mark.filterwarnings("error::UserWarning", "ignore:Using backward\\(\\) with create_graph=True")
def test_every_loop_of_mixed_precision_trains(device):
    model = mlp(torch.float32, device)
    names = {"model": model, "loss_fn": nn.functional.mse_loss, "device": device}
    names["batches"] = [batch(i, model) for i in range(8)]  # the first ones may overflow with the first loss scale
    page = DOCS / "mixed_precision.md"
    setup, *loops = (compile("\n" * block.line + block.code, str(page), "exec") for block in blocks(page, "python"))
    exec(setup, names)
    assert len(loops) == 8
    for loop in loops:
        before = weights(model)
        exec(loop, names)
        after = weights(model)
        assert all((a != b).any() and a.isfinite().all() for a, b in zip(after, before, strict=True)), loop


@pytest.mark.parametrize("page", [p for p in PAGES if name(p) in RUN_BY], ids=name)
def test_other_pages_are_run_elsewhere(page):
    assert page.name in (ROOT / RUN_BY[name(page)]).read_text()


@pages
def test_blocks_are_in_a_known_language_and_say_why_they_do_not_run(page):
    for block in blocks(page):
        assert block.language in LANGUAGES
        if block.comment.startswith("not run"):
            assert re.fullmatch(NOT_RUN + r"\w.{8,}", block.comment), "expected <!-- not run: the reason -->"


@pages
def test_commands_exist(page):
    found = [problem for block in blocks(page, "sh") for c in commands(block) for problem in problems(c)]
    found += [f"make {t}" for t in re.findall(r"`make ([\w-]+)", prose(page)) if t not in TARGETS]
    assert not found


NONSENSE = """make nonsense
make test NONSENSE=1
pip install '.[nonsense]'
python -m bench.run --nonsense
python -m adahessian_fused nonsense
python nonsense.py
ADAHESSIAN_NONSENSE=1 make test
nonsense"""


@pytest.mark.parametrize("command", NONSENSE.splitlines())
def test_nonsense_is_noticed(command):
    assert list(problems(command))


@pytest.mark.parametrize(
    "module",
    sorted(p.stem if p.parent.name == "adahessian_fused" else f"{p.parent.name}.{p.stem}"
           for p in (ROOT / "adahessian_fused").rglob("*.py") if ">>> " in p.read_text()),
)  # fmt: skip
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(f"adahessian_fused.{module}"))
    assert result.failed == 0


def test_all_public_classes_and_functions_have_an_example_or_are_described_by_one():
    text = (DOCS / "api.md").read_text()
    missing = [n for n in adahessian_fused.__all__ if f"::: adahessian_fused.{n}" not in text and n != "__version__"]
    assert not missing


# ---- links -----------------------------------------------------------------------------------------------------------


@pages
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", prose(page)):
        if "://" in target:
            continue
        place = page.parent / target if target else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor[1:] in headings(place), f"{target}{anchor}"


def test_every_page_is_reached_from_the_start_page():
    texts = {page: page.read_text() for page in PAGES}
    linked = {
        (page.parent / target).resolve() for page in PAGES for target in re.findall(r"\]\(([^)#\s]+\.md)", texts[page])
    }
    assert not [name(page) for page in DOCS.rglob("*.md") if page not in linked and page != DOCS / "README.md"]


# ---- messages --------------------------------------------------------------------------------------------------------


def entries() -> list[str]:
    """Beginnings of messages on the troubleshooting page: in its headings and the first column of its tables."""
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    chosen = [line if line.startswith("#") else line.split("|")[1] for line in lines if re.match(r"###|\| *`", line)]
    return [entry for line in chosen for entry in code_spans(line)]


def says(message: messages.Message, entry: str) -> bool:
    return message.text.startswith(entry.removesuffix(messages.HOLE))


FOUND = [*messages.in_python(), *messages.in_cpp(), *messages.in_cmake()]


def test_every_message_has_an_entry():
    assert len(FOUND) > 90
    known = entries()
    assert not [message for message in FOUND if not any(says(message, entry) for entry in known)]


def test_every_entry_is_a_message():
    assert not [entry for entry in entries() if not any(says(message, entry) for message in FOUND)]
    assert len(set(entries())) == len(entries())


# ---- files that pages name ------------------------------------------------------------------------------------------


def test_files_listed_in_contributing_exist():
    """In its tables ``OP`` stands for the name of any op, ``NAME`` for a name that is to be chosen."""
    rows = [line for line in (DOCS / "contributing.md").read_text().splitlines() if line.startswith("| `")]
    listed = [file.replace("NAME", "*") for row in rows for file in code_spans(row.split("|")[1])]
    assert len(listed) > 15
    assert not [file for op in OPS for file in listed if not list(ROOT.glob(file.replace("OP", op)))]
