"""The documentation is whole: links lead somewhere, names and methods are described, and its Python runs."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from test_readme import README, blocks, given, pytestmark  # noqa: F401  (a fixture and marks, found by their names)

import lightning_prune

ROOT = README.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in [README, *PAGES]}
IDS = {path: str(path.relative_to(ROOT)) for path in TEXTS}
RUN = "<!-- run -->"
RUNNABLE = [path for path in PAGES if RUN in TEXTS[path]]
# the source whose messages any user can meet; those of single methods stand on their cards
SOURCES = (
    "callback", "checks", "fit", "instantiate", "masks", "objective", "oneshot", "pipeline", "schedules",
    "selection", "shrink", "standalone", "structured", "channels", "targets", "methods/magnitude", "methods/random",
)  # fmt: skip


def without_code(text: str) -> str:
    """Blank out fenced blocks and code spans, where brackets are no links."""
    text = re.sub(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def links(text: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(text))


def anchor(heading: str) -> str:
    """Make an anchor the way Python-Markdown does."""
    plain = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return re.sub(r"[-\s]+", "-", plain)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^( *)(`{3,})[^\n]*\n.*?^\1\2", "", TEXTS[path], flags=re.M | re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def code_spans(text: str) -> list[str]:
    text = re.sub(r"^( *)(`{3,})[^\n]*\n.*?^\1\2", "", text, flags=re.M | re.S)
    return [span.strip() for _, span in re.findall(r"(`+)(?!`)(.*?)(?<!`)\1(?!`)", text)]


@pytest.mark.parametrize("path", TEXTS, ids=IDS.get)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    broken = []
    for link in links(TEXTS[path]):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", TEXTS, ids=IDS.get)
def test_every_file_of_the_repository_that_is_named_exists(path: Path) -> None:
    commands = "\n".join(code for _, code in blocks(TEXTS[path], "bash"))
    spans = " ".join([*code_spans(TEXTS[path]), commands])
    named = re.findall(r"(?<![\w./$-])((?:conf|docs|examples|lightning_prune|tests)/[\w./*<>-]*)", spans)
    missing = [name for name in named if "<" not in name and not list(ROOT.glob(name.rstrip("/.")))]
    assert [name for name in missing if name not in THE_READERS_OWN] == []


# files of the reader's own application, in the tutorial on Hydra
THE_READERS_OWN = {"conf/config.yaml"}


@pytest.mark.parametrize("name", lightning_prune.__all__)
def test_every_public_name_is_described(name: str) -> None:
    described = " ".join(span for path in PAGES for span in code_spans(TEXTS[path]))
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", described)


def test_every_pruning_yaml_has_a_card() -> None:
    entries = [entry.name for entry in files("lightning_prune.conf").joinpath("pruning").iterdir()]
    names = {Path(entry).stem for entry in entries if entry.endswith(".yaml")} - {"none"}
    assert {"magnitude", "gradual_magnitude", "random"} <= names
    assert names - {path.stem for path in (DOCS / "methods").glob("*.md")} == set()


@pytest.mark.parametrize("path", sorted((DOCS / "methods").glob("*.md")), ids=IDS.get)
def test_a_card_shows_the_yaml_and_the_callback(path: Path) -> None:
    if path.stem == "index":
        return
    assert TEXTS[path].startswith("# ")
    assert f"pruning={path.stem}" in TEXTS[path]
    assert blocks(TEXTS[path])


def test_every_key_and_choice_of_the_command_is_described() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune")
    text = TEXTS[DOCS / "cli.md"]
    groups = {entry.name for entry in files("lightning_prune.conf").iterdir() if entry.is_dir()} - {"__pycache__"}
    keys = [key for key in cfg if key not in groups]
    keys += [f"{group}.{key}" for group in ("dense", "measure") for key in cfg[group]]
    assert [key for key in keys if f"`{key}" not in text] == []
    for group in groups - {"pruning", "experiment"}:
        choices = [entry.name for entry in files("lightning_prune.conf").joinpath(group).iterdir()]
        names = [Path(choice).stem for choice in choices if choice.endswith(".yaml")]
        assert [name for name in names if f"`{name}`" not in text] == [], group


@pytest.mark.parametrize("path", TEXTS, ids=IDS.get)
def test_every_python_block_compiles(path: Path) -> None:
    for number, (_, code) in enumerate(blocks(TEXTS[path])):
        compile(code, f"{IDS[path]}, block {number}", "exec")


@pytest.mark.parametrize("path", RUNNABLE, ids=IDS.get)
def test_every_block_marked_to_run_runs(path: Path, given: dict[str, Any], request: Any) -> None:  # noqa: F811
    marked = [code for above, code in blocks(TEXTS[path]) if above == RUN]
    assert len(marked) == TEXTS[path].count(RUN)
    for number, code in enumerate(marked):
        fresh = {**given, "model": type(given["model"])(), "__name__": "snippet"}
        exec(compile(code, f"{IDS[path]}, block {number} marked to run", "exec"), fresh)


def messages(path: Path) -> list[str]:
    """Return the longest constant piece of every message that a module raises or warns with."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if isinstance(node, ast.Raise) or ast.unparse(call.func) == "rank_zero_warn":
            found.append(max(pieces(call.args[0]), key=len, default=""))
    return [piece for piece in found if len(piece) > 8]


def pieces(node: ast.expr) -> list[str]:
    """Return the constant parts of a string, of an f-string or of a sum of them."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.BinOp):
        return [*pieces(node.left), *pieces(node.right)]
    values = node.values if isinstance(node, ast.JoinedStr) else []
    return [str(value.value) for value in values if isinstance(value, ast.Constant)]


def normalized(text: str) -> str:
    return " ".join(re.sub(r"[`.,;:()\[\]]", " ", text).split())


@pytest.mark.parametrize("source", SOURCES)
def test_every_message_is_in_the_table(source: str) -> None:
    table = normalized(TEXTS[DOCS / "troubleshooting.md"])
    path = Path(lightning_prune.__file__).parent / f"{source}.py"
    found = messages(path)
    assert [message for message in found if normalized(message) not in table] == []


def test_the_messages_of_a_module_are_found() -> None:
    path = Path(lightning_prune.__file__).parent / "masks.py"
    assert any("must be finite to be pruned" in message for message in messages(path))
