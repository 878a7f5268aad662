"""The formulae of docs/scale.md against what PyTorch counts; the page says what the script writes."""

from __future__ import annotations

import pytest

from bench import scale


@pytest.mark.parametrize("way", scale.WAYS)
def test_flops(way):
    assert scale.counted_flops(way) == scale.expected_flops(way)


def test_bytes_in_all_reduces():
    counted, expected = scale.counted_bytes()
    assert counted == expected


def test_page_is_up_to_date(monkeypatch):
    """All of it but the counts, which the other tests have."""
    text = scale.PAGE.read_text()
    begin = text.index("|  | counted")
    monkeypatch.setattr(scale, "_checks", lambda: text[begin : text.index("\n\n", begin)])
    assert scale.page() == text
