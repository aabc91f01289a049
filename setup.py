"""What pyproject.toml cannot say: the README of a package index, whose links have to be absolute.

README.md links files beside it, which works in a copy of the repository and on every forge. An index shows the text
alone. So with an address named ``Repository`` among ``[project.urls]`` the built distributions link to the files of
this version's tag there.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup


def absolute_links(text: str, repository: str | None, version: str) -> str:
    """Markdown with links to files beside it, linked at a repository instead; as it is where no repository is known."""
    if repository is None:
        return text

    def linked(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        kind = "raw" if picture else "blob"  # a page about a picture is no picture
        return f"{picture}[{label}]({repository.rstrip('/')}/{kind}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", linked, text)


if __name__ == "__main__":
    here = Path(__file__).parent
    project = tomllib.loads((here / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=absolute_links(
            (here / "README.md").read_text(encoding="utf-8"), project["urls"].get("Repository"), project["version"]
        ),
        long_description_content_type="text/markdown",
    )
