"""The pages of the documentation, what is in them, and what the commands in them need."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"])
NOT_RUN = "not run: "
RUN_BY = {  # pages whose code needs more than a model and a few batches, and what runs it
    "docs/distributed.md": "tests/distributed_wrappers.py",
    "docs/mixed_precision.md": "tests/test_docs.py",
    "docs/trainers.md": "tests/test_trainers.py",
}


class Block(NamedTuple):
    """A block of code. ``comment`` is the HTML comment right before it: ``not run: reason`` keeps it from running."""

    language: str
    code: str
    comment: str
    line: int


def name(page: Path) -> str:
    """The page's path from the root, for test ids."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks in one of the languages; all without any."""
    text = page.read_text()
    pattern = r"(?:^ *<!-- ?(.*?) ?-->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$"
    found = [
        Block(m[3], textwrap.dedent(m[4]), m[1] or "", text.count("\n", 0, m.start(4)))
        for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"a block of {name(page)} does not end"
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    """What stands between backticks, also double ones."""
    return [(m[2] or m[3]).strip() for m in re.finditer(r"(``)(.+?)``|`([^`\n]+)`", text)]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[ ]", "-", re.sub(r"[^\w\- ]", "", title.lower()).strip()) for title in titles}


# ---- commands --------------------------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M))
OTHERS = {"cd", "export", "git", "tensorboard"}  # programs that are not ours


def commands(block: Block) -> list[str]:
    """The commands of a shell block, one a line."""
    return [line.strip() for line in block.code.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def problems(command: str) -> Iterator[str]:
    """What a command names that there is not."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        variable = words.pop(0).split("=")[0]
        if variable.startswith("ADAHESSIAN") and not _mentioned(variable):
            yield f"no such variable: {variable}"
    program, *rest = words
    if program == "make":
        for word in rest:
            variable = word.split("=")[0]
            if not (re.search(rf"\b{variable}\b", MAKEFILE) if "=" in word else word in TARGETS):
                yield f"no such target or variable of the Makefile: {word}"
    elif program == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", command):
            yield from (f"no such extra: {e}" for e in extra.split(",") if e not in EXTRAS)
    elif program in ("python", "python3", "torchrun"):
        yield from _problems_of_python(rest)
    elif program not in OTHERS:
        yield f"a program this test does not know: {program}"


def _mentioned(variable: str) -> bool:
    places = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.cpp")]
    return any(variable in place.read_text() for place in places)


def _problems_of_python(words: list[str]) -> Iterator[str]:
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        source = _source_of(module)
    else:
        script = next((word for word in words if word.endswith(".py")), "")
        rest = words[words.index(script) + 1 :] if script else []
        source = ROOT / script if script else None
    if source is None or not source.exists():
        if not ("-m" in words and module in ("pytest", "http")):
            yield f"no such module or script: {' '.join(words)}"
        return
    texts = [source.read_text()]
    if rest[:1] == ["bench"]:
        texts.append((ROOT / "bench" / "run.py").read_text())
    for word in rest:
        if word.startswith("--") and not any(f'"{word.split("=")[0]}"' in text for text in texts):
            yield f"no such option of {name(source)}: {word}"
    if "add_parser(" in texts[0] and rest and f'add_parser("{rest[0]}"' not in texts[0]:
        yield f"no such command of {name(source)}: {rest[0]}"


def _source_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.exists()), None)
