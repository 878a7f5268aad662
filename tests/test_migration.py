"""The pages in docs/migration: their diffs are import lines, their tables tell the defaults."""

from __future__ import annotations

import inspect
import re

import pytest
from models import batch, mlp, weights
from originals import DROP_INS, Origin, stand_ins  # noqa: F401
from pages import DOCS, blocks
from torch import nn

PAGES = DOCS / "migration"
pages = pytest.mark.parametrize("origin", DROP_INS)

pytestmark = [
    pytest.mark.usefixtures("stand_ins"),
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
]


def run(code: str) -> dict:
    """Run a script as its reader would: with a model, a loss function and batches."""
    model = mlp()
    before = weights(model)
    names = {"model": model, "loss_fn": nn.functional.mse_loss, "batches": [batch(i, model) for i in range(3)]}
    exec(compile(code, "<a block of docs/migration>", "exec"), names)
    moved = [(a != b).any() for a, b in zip(weights(model), before, strict=True)]
    assert all(moved) == any(moved) == (".step()" in code)
    return names


def test_every_origin_has_a_page_and_a_line_in_the_list():
    assert {page.stem for page in PAGES.glob("*.md")} == {*DROP_INS, "README"}
    listed = (PAGES / "README.md").read_text()
    assert all(f"[{o}.md]({o}.md) | `compat.{o}.{Origin(o).drop_in.__name__}`" in listed for o in DROP_INS)


@pages
def test_a_script_changes_by_its_import_line(origin):
    [diff] = blocks(PAGES / f"{origin}.md", "diff")
    lines = diff.code.splitlines()
    changed = [line for line in lines if not line.startswith(" ") and line]
    assert re.fullmatch(r"-from [\w.]+ import (\w+)\n\+from [\w.]+ import \1", "\n".join(changed))
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
    original = Origin(origin).original
    theirs, ours = run(before)["opt"], run(after)["opt"]
    assert (type(theirs), type(ours)) == (original, Origin(origin).drop_in)


@pages
def test_table_of_defaults(origin):
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (PAGES / f"{origin}.md").read_text(), re.MULTILINE)
    parameters = list(inspect.signature(Origin(origin).original).parameters.values())[1:]
    assert rows == [(p.name, repr(p.default)) for p in parameters if p.kind is not p.VAR_KEYWORD]
