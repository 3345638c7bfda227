"""The Markdown that people read, taken apart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = {
    file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8")
    for file in [
        *sorted(REPOSITORY.glob("README*.md")),
        *sorted((REPOSITORY / "docs").rglob("*.md")),
    ]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def fenced(text: str, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    """The text without code."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^(?: {4,}).*$", "", FENCE.sub("", text), flags=re.M)
    )


def read_commands(text: str) -> list[tuple[str, ...]]:
    """The words of every ``coin-ray`` command, and those after ``python`` of every
    command that starts a script or module of this repository: in bash blocks, indented
    ones and spans of code."""
    unfenced = FENCE.sub("", text)
    spans = re.findall(r"`(python [^`\n]+)`", unfenced)
    indented = re.findall(r"^ {4}((?:.*\\\n)*.*)$", unfenced, re.M)
    blocks = [*fenced(text, "bash", "sh"), *indented, *spans]
    lines = (
        line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    )
    return [words for line in lines for words in _command_words(line)]


def mentioned_subcommands(text: str) -> set[str]:
    """The subcommands of ``coin-ray`` in spans of code."""
    return set(re.findall(r"`coin-ray ([a-z][\w-]*)[^`\n]*`", FENCE.sub("", text)))


def _command_words(line: str) -> Iterator[tuple[str, ...]]:
    if "[" in line.split("#")[0]:
        return  # brackets: a line of a synopsis
    if re.match(r"\s*(\w+=\S+ )*coin-ray ", line):
        words = shlex.split(line, comments=True)
        yield tuple(words[words.index("coin-ray") :])
    elif re.search(r"python (pipelines/|tune/|-m coin_ray)", line):
        words = shlex.split(line, comments=True)
        if "python" in words:
            yield tuple(words[words.index("python") + 1 :])


def served(text: str) -> list[tuple[dict[str, str], str, dict[str, str]]]:
    """(variables, import path, words) of every ``serve run`` of an application of ours."""
    matches = re.findall(
        r"^ *((?:[A-Z_]+=\S+ )*)serve run (coin_ray\.[\w.:]+)((?: \w+=\S+)*)",
        text,
        re.M,
    )
    return [
        (_pairs(before), target, _pairs(words)) for before, target, words in matches
    ]


def _pairs(words: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words.split())


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of headings; the site generator checks its own."""
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.M):
        plain = (
            re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        )
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.append(name if name not in names else f"{name}-{names.count(name)}")
    return set(names)


def links(text: str) -> list[str]:
    return [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text))
        if not re.match(r"[a-z]+://|mailto:", target)
    ]
