"""What MkDocs is told to do with the pages: a place in the navigation for each, and links that work on the website."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]


def on_config(config: Any) -> Any:
    """Append the pages that the navigation does not mention."""
    listed = set(_pages(config["nav"]))
    found = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
    more = [page for page in found if page not in listed]
    if more:
        config["nav"].append({"More": more})
    return config


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [page for child in children for page in _pages(child)]


def on_page_markdown(markdown: str, *, page: Any, config: Any, **unused: Any) -> str:
    """Links to files outside docs: to the repository if its address is configured, else the text alone."""
    folder = (DOCS / page.file.src_path).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        place = (folder / target).resolve()
        if place.is_relative_to(DOCS) or not place.exists():
            return found[0]  # MkDocs complains about what there is not
        if not config["repo_url"]:
            return text
        return f"[{text}]({config['repo_url'].rstrip('/')}/blob/HEAD/{place.relative_to(DOCS.parent)})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)", link, markdown)
