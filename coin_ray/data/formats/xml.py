"""XML that strangers wrote."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from xml.parsers import expat

from coin_ray.errors import InputError


def parse_xml(
    data: bytes, uri: str, root: str
) -> tuple[ET.Element, dict[ET.Element, int]]:
    """The element <root>, and the line of each element. Entities of the file's own are
    refused: they can grow without end.

    Raises InputError naming ``uri`` and the line.
    """
    parser, builder = expat.ParserCreate(), ET.TreeBuilder()
    lines: dict[ET.Element, int] = {}

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    def refuse(*_: object) -> None:
        raise InputError(
            f"{uri}:{parser.CurrentLineNumber}: entity declarations have no place in an"
            " annotation"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError(
            f"{uri}:{error.lineno}: not XML: {expat.ErrorString(error.code)}"
        ) from None
    found = builder.close()
    if found.tag != root:
        raise InputError(f"{uri}:1: expected <{root}>, got <{found.tag}>")
    return found, lines
