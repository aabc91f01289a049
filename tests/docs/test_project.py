"""Version and links are the same wherever they are said."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_version_is_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "docs/references.md").read_text()
    assert f'\n__version__ = "{version}"\n' in (ROOT / "parasolver_core/__init__.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    index = (ROOT / "docs/index.md").read_text()
    listed = re.findall(r"^(\w+)$", index, flags=re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == set(listed)
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(re.findall(r"\((\w+)\.md\)", index.split("## All pages")[1]))  # for forges


def test_the_plan_of_the_house_names_every_module() -> None:
    plan = (ROOT / "docs/architecture.md").read_text()
    modules = [file for root in ("parasolver_core", "adapters") for file in (ROOT / root).rglob("*.py")]
    assert {
        file.stem for file in modules if file.stem != "__init__" and not re.search(rf"\b{file.stem}\b", plan)
    } == set()


def test_an_index_gets_absolute_links() -> None:
    absolute_links = runpy.run_path(str(ROOT / "setup.py"))["absolute_links"]
    text = (ROOT / "README.md").read_text()
    assert absolute_links(text, None, "1.2.3") == text
    address = "https://forge.example/parasolver"
    targets = re.findall(r"\]\(([^)\s]+)\)", absolute_links(text, address, "1.2.3"))
    assert f"{address}/raw/v1.2.3/docs/images/rounds.png" in targets
    assert f"{address}/blob/v1.2.3/docs/references.md#how-to-cite" in targets
    assert all(target.startswith("https://") for target in targets)
    kept = "[a](#below) [b](https://other.example/x) [c](mailto:d@e.example)"
    assert absolute_links(kept, address, "1.2.3") == kept
