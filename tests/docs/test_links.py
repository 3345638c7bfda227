from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, REPOSITORY, anchors, links


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    missing = []
    for link in links(PAGES[page]):
        linked_file, _, anchor = link.partition("#")
        target = (
            (REPOSITORY / page).parent / linked_file
            if linked_file
            else REPOSITORY / page
        )
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            missing.append(link)
    assert not missing


def test_links_are_found_at_all() -> None:
    assert len(links(PAGES["docs/method.md"])) > 30
    assert "docs/own-data.md#without-a-gpu" in links(PAGES["README.zh.md"])
    assert links("[`f`](a.py) `[no](b)` [web](https://c)\n```\n[no](d)\n```\n") == [
        "a.py"
    ]
    assert anchors("# What *is* `it`, then?\n## A & B\n## A & B\n") == {
        "what-is-it-then",
        "a--b",
        "a--b-1",
    }


def test_every_page_is_on_the_site() -> None:
    site_pages = re.findall(
        r"[\w./-]+\.md",
        yaml.safe_dump(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]),
    )
    assert sorted(site_pages) == sorted(
        p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")
    )


def test_functions_beside_equations_exist() -> None:
    """Each `name` that links to a source file is defined there."""
    for page in ("docs/equations.md", "docs/method.md"):
        linked_names = re.findall(
            r"\[((?:`[\w.]+`(?:, )?)+)\]\((\.\./coin_ray/[^)]+\.py)\)", PAGES[page]
        )
        assert len(linked_names) > 10
        for names, file in linked_names:
            source = ((REPOSITORY / page).parent / file).resolve().read_text()
            for name in re.findall(r"`([\w.]+)`", names):
                assert (
                    re.search(rf"(def|class) {name.split('.')[-1]}\b", source)
                    or Path(file).name in name
                    or name in file
                ), (name, file)


FIGURE = re.compile(r"\d+(?:\.\d+)?")


def test_the_chinese_readme_tells_the_same_figures_and_commands() -> None:
    def rows(page: str) -> list[list[str]]:
        return [
            FIGURE.findall(line)
            for line in PAGES[page].splitlines()
            if (line.startswith("|") and "±" in line) or "38.7" in line
        ]

    def settings(page: str) -> list[list[str]]:
        return [
            re.findall(r"--[\w.-]+|pipelines/\w+\.py|coin-ray \w+", block)
            for block in re.findall(r"```bash\n(.*?)```", PAGES[page], re.S)
        ]

    assert rows("README.md") == rows("README.zh.md")
    assert settings("README.md") == settings("README.zh.md")
