"""Parse XML from untrusted sources."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from xml.parsers import expat

from coin_ray.errors import InputError


def parse_xml(
    raw: bytes, uri: str, root_tag: str
) -> tuple[ET.Element, dict[ET.Element, int]]:
    """Return the root element <``root_tag``> and the line of each element. Entity
    declarations are refused: entities can grow without end.

    Raises InputError naming ``uri`` and the line.
    """
    parser, builder = expat.ParserCreate(), ET.TreeBuilder()
    lines: dict[ET.Element, int] = {}

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    def refuse_entity(*_: object) -> None:
        raise InputError(
            f"{uri}:{parser.CurrentLineNumber}: entity declarations are not allowed in"
            " an annotation"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse_entity
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise InputError(f"{uri}:{error.lineno}: not XML: {reason}") from None
    root = builder.close()
    if root.tag != root_tag:
        raise InputError(f"{uri}:1: expected <{root_tag}>, got <{root.tag}>")
    return root, lines
