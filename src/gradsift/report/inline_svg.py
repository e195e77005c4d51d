"""A figure's SVG as a part of an HTML page: it follows the page's colours and needs no style of its own.

The page's content security policy allows no `style` attribute, so what matplotlib writes there becomes attributes; ids
get the figure's name in front, as all figures share one document; the four neutral colours become the page's. Elements
and attributes that no figure needs, and links that lead anywhere, are left out.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

from gradsift.report.figures.style import FAINT, INK, PAPER, RULE

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_THEMED = {INK: "var(--ink)", FAINT: "var(--soft)", RULE: "var(--line)", PAPER: "var(--card)"}
_DROPPED = ("metadata", "style", "script", "foreignObject", "a", "title")
_FONT = re.compile(r"(?P<more>.*?)(?P<size>[\d.]+)(?:px)?\s+(?P<family>.+)")
_LOCAL = re.compile(r"url\(#([^)]+)\)")


def inline_svg(text: str, name: str, label: str) -> Markup:
    """The `<svg>` element of a file that matplotlib wrote.

    Args:
        name: of the figure; begins its ids.
        label: what a screen reader says of it.
    """
    root = ElementTree.fromstring(text)  # noqa: S314 - written by matplotlib a moment ago
    shown = _element(root, name)
    for key in ("height", "version"):  # the height follows from the width that there is room for
        shown.attrib.pop(key, None)
    # what matplotlib's own style sheet says of all elements
    shown.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    written = ElementTree.tostring(shown, encoding="unicode")
    return Markup(written)  # noqa: S704 - escaped by ElementTree


def _element(source: ElementTree.Element, name: str) -> ElementTree.Element:
    made = ElementTree.Element(source.tag.removeprefix(_SVG))
    made.text, made.tail = source.text, source.tail
    for key, value in source.attrib.items():
        if key == "style":
            for attribute, its in _declarations(value):
                made.set(attribute, _themed(_LOCAL.sub(rf"url(#{name}-\1)", its)))
        elif key == "id":
            made.set("id", f"{name}-{value}")
        elif key == _LINK or key == "href":
            if value.startswith("#"):
                made.set("href", f"#{name}-{value[1:]}")
            elif made.tag == "image" and value.startswith("data:image/png;base64,"):
                made.set("href", value)
        elif not key.startswith("{") and not key.lower().startswith("on"):
            made.set(key, _themed(_LOCAL.sub(rf"url(#{name}-\1)", value)))
    for child in source:
        if isinstance(child.tag, str) and child.tag.removeprefix(_SVG) not in _DROPPED:
            made.append(_element(child, name))
    return made


def _declarations(style: str) -> list[tuple[str, str]]:
    found = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (font := _FONT.fullmatch(value)):
            found += [("font-size", font["size"]), ("font-family", "inherit")]
            found += [("font-weight", "bold")] if "bold" in font["more"] or "700" in font["more"] else []
            found += [("font-style", "italic")] if "italic" in font["more"] else []
        elif key and value:
            found.append((key, value))
    return found


def _themed(value: str) -> str:
    return _THEMED.get(value.lower(), value)
