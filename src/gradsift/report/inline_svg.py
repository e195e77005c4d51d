"""Conversion of a figure's SVG file into an `<svg>` element of the report's page.

The page's content security policy allows no `style` attribute, so the styles that matplotlib writes become SVG
attributes. Every id gets the figure's name as a prefix, so that no two figures of the page have equal ids. The four
neutral colours of `figures.style` become CSS variables of the page. Scripts, event handlers, links to other documents,
and elements that no figure needs are removed.
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
    """Return the `<svg>` element of a figure for the page.

    Args:
        text: content of an SVG file that matplotlib wrote.
        name: name of the figure, the prefix of its ids.
        label: text for screen readers.
    """
    root = ElementTree.fromstring(text)  # noqa: S314 - matplotlib wrote it
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag.removeprefix(_SVG) in _DROPPED:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = _attributes(element, name)
    for key in ("height", "version"):  # the browser computes the height from the width
        root.attrib.pop(key, None)
    # the style sheet of matplotlib's SVG, which is removed, sets the last two for all elements
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - escaped by ElementTree


def _attributes(element: ElementTree.Element, name: str) -> dict[str, str]:
    source = dict(element.attrib)
    style, link = source.pop("style", ""), source.pop(_LINK, source.pop("href", ""))
    attributes = {}
    for key, value in [*source.items(), *_declarations(style)]:
        if key == "id":
            attributes["id"] = f"{name}-{value}"
        elif not key.startswith("{") and not key.lower().startswith("on"):
            attributes[key] = _THEMED.get(value.lower(), _LOCAL.sub(rf"url(#{name}-\1)", value))
    if link.startswith("#"):
        attributes["href"] = f"#{name}-{link[1:]}"
    elif element.tag == "image" and link.startswith("data:image/png;base64,"):
        attributes["href"] = link
    return attributes


def _declarations(style: str) -> list[tuple[str, str]]:
    """Return the declarations of a `style` attribute as SVG attributes (name, value)."""
    attributes = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (font := _FONT.fullmatch(value)):
            attributes += [("font-size", font["size"]), ("font-family", "inherit")]
            attributes += [("font-weight", "bold")] if "bold" in font["more"] or "700" in font["more"] else []
            attributes += [("font-style", "italic")] if "italic" in font["more"] else []
        elif key and value:
            attributes.append((key, value))
    return attributes
