"""Markdown to one HTML file that needs no other."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem }}
th, td {{ border: 1px solid #ccc; padding: 0.3rem 0.6rem }} img {{ max-width: 100%; height: auto }}
</style>
"""


def to_html(text: str, folder: Path) -> str:
    """The page with the plots it shows, which are relative to ``folder``, inside."""
    title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
    body = MarkdownIt("commonmark").enable("table").render(text)

    def inline(match: re.Match) -> str:
        path = folder / match[1]
        if not path.exists():
            return match[0]
        return f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    return HEAD.format(title=title) + re.sub(r'<img src="([^"]+\.png)"', inline, body)
