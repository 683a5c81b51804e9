"""Checks of a study's report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Insists on closed elements, alternative texts and a page that loads nothing; collects the text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "b")
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                assert value and value.startswith("data:image/svg+xml;base64,")
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def check_report(folder: Path) -> Page:
    text = (folder / "report.html").read_text(encoding="utf-8")
    own = re.sub(r"base64,[\w+/=]*", "", text)
    assert "http" not in own and "url(" not in own and "@import" not in own
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    figures = sorted(path.stem for path in (folder / "plots").glob("*.svg"))
    assert figures == sorted(path.stem for path in (folder / "plots").glob("*.png"))
    assert page.seen.count("img") == len(figures) > 0
    for path in (folder / "plots").glob("*.svg"):
        ET.parse(path)
    return page
