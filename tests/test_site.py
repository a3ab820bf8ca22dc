"""The documentation: a site that builds without a warning, and pages that quote what the program says and reads."""

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import config_reference  # noqa: E402

DOCS = ROOT / "docs"


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    assert mkdocs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))  # strict: a warning is an error
    pages = {page.with_suffix(".html").name for page in DOCS.glob("*.md")}
    assert {page.name for page in (tmp_path / "site").glob("*.html")} == pages | {"404.html"}
    assert not re.search(r'(src|href)="https?://(?!squidfunk)', (tmp_path / "site" / "index.html").read_text())


def test_page_of_settings_is_that_of_the_schema() -> None:
    assert (DOCS / "config.md").read_text(encoding="utf-8") == config_reference.page(), (
        "run: python scripts/config_reference.py"
    )


def messages_of_the_package() -> str:
    """Return the text of every string in the package, adjacent strings joined, values left out."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "qlora_train").rglob("*.py"))
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(value for value in constants if isinstance(value, str))


def test_troubleshooting_quotes_what_the_program_says() -> None:
    page, texts = (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), messages_of_the_package()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 25
    fragments = {part.strip() for message in quoted for part in message.split("...")}
    assert {fragment for fragment in fragments if fragment not in texts} == set()
