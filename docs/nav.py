"""MkDocs hook: a new method card appears in the navigation and in the list of cards without another edit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MARK = "<!-- cards -->"


def on_config(config: Any) -> Any:
    """Replace every "folder/*.md" in the navigation by the pages of that folder that nothing else names."""
    docs = Path(config["docs_dir"])
    config["nav"] = _expanded(config["nav"], docs)
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put a table of the cards beside a page where it says so."""
    if MARK not in markdown:
        return markdown
    folder = Path(config["docs_dir"], page.file.src_uri).parent
    rows = [_row(path) for path in cards(folder)]
    return markdown.replace(MARK, "\n".join(["| card | in one sentence |", "|---|---|", *rows]))


def cards(folder: Path) -> list[Path]:
    """Return the pages of a folder but its index, by name."""
    return [path for path in sorted(folder.glob("*.md")) if path.name != "index.md"]


def _row(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    first = re.search(r"^# .+\n+((?:(?![#|`<!]).+\n)+)", text, re.MULTILINE)
    sentence = " ".join(first[1].split()).split(". ")[0].rstrip(".") if first else ""
    return f"| [{title[1] if title else path.stem}]({path.name}) | {sentence.replace('|', '/')} |"


def _expanded(nav: Any, docs: Path) -> Any:
    if isinstance(nav, dict):
        return {key: _expanded(value, docs) for key, value in nav.items()}
    if not isinstance(nav, list):
        return nav
    entries: list[Any] = []
    for item in nav:
        if isinstance(item, str) and item.endswith("/*.md"):
            entries += [
                str(path.relative_to(docs).as_posix()) for path in cards(docs / item[: -len("/*.md")])
            ]
        else:
            entries.append(_expanded(item, docs))
    return entries
