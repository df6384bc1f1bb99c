"""What a reader, or a browser, finds in a page of HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = ("meta", "link", "br", "img", "input", "hr")


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: (name, attributes) of every element, in order.
        tables: rows of cells of every table.
        cards: (figure, label, note).
        texts: by id of the section's heading, its text.
        scripts: their sources.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.cards: list[list[str]] = []
        self.texts: dict[str, str] = {"": ""}
        self.scripts: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if tag in VOID:
            return
        self._open.append((tag, given))
        if tag == "h2":
            self._section = given["id"]
            self.texts[self._section] = ""
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif given.get("class") == "card":
            self.cards.append(["", "", ""])
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
            self._open.pop()
        if tag in ("td", "th", "span", "div", "p"):
            self.texts[self._section] += "\n"

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self._open]
        if inside and inside[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in inside:
            self.texts[self._section] += data
        if "td" in inside or "th" in inside:
            self.tables[-1][-1][-1] += data.strip()
        if len(self._open) > 1 and self._open[-2][1].get("class") == "card":
            self.cards[-1][("b", "span", "small").index(inside[-1])] += data

    def of_class(self, name: str) -> list[dict[str, str]]:
        """Attributes of the elements that have a class."""
        return [given for _, given in self.tags if name in given.get("class", "").split()]

    def card(self, label: str) -> tuple[str, str]:
        """(figure, note) of the card with this label."""
        (found,) = ((value, note) for value, title, note in self.cards if title == label)
        return found

    def check_alone(self) -> None:
        """It fetches nothing, runs nothing but what optc wrote, and shows no number with more digits than anyone reads."""
        links = [value for _, given in self.tags for key, value in given.items() if key in ("src", "href", "action")]
        assert all(link.startswith("#") for link in links), links
        assert {link[1:] for link in links} <= {given.get("id") for _, given in self.tags}, "every anchor is there"
        assert not [key for _, given in self.tags for key in given if key.startswith("on")], "no handlers"
        assert all("fetch(" not in text and "XMLHttp" not in text for text in self.scripts)
        long = re.findall(r"\d\.\d{7,}", " ".join(text for key, text in self.texts.items() if key != "stages"))
        assert not long, long
