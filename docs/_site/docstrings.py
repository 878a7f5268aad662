"""Docstrings for the website: the roles that help() and editors show as they are become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

PUBLIC = {
    "adahessian_fused.AdaHessian": "adahessian_fused.AdaHessian",
    "check_hvp": "adahessian_fused.check_hvp",
    "backward": "adahessian_fused.AdaHessian.backward",
    "backward_split": "adahessian_fused.AdaHessian.backward_split",
    "step": "adahessian_fused.AdaHessian.step",
}


class Roles(griffe.Extension):
    """Turns ``:class:`~a.B``` into a link where the reference has that page, into code elsewhere."""

    def on_instance(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Rewrite the docstring of everything that has one."""
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value)


def _markdown(text: str) -> str:
    def role(found: re.Match[str]) -> str:
        target = found[1].lstrip("~.")
        name = target.rsplit(".", 1)[-1] if found[1].startswith("~") else target
        return f"[`{name}`][{PUBLIC[target]}]" if target in PUBLIC else f"`{name}`"

    text = re.sub(r":(?:class|meth|func|mod|data):`([~.\w]+)`", role, text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE).replace("\n:\n", "\n")
