"""What pyproject.toml cannot say: an index shows the README without the repository around it, so there its links are absolute."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def readme_for_an_index() -> str:
    """README.md with the project's address before each link into the repository; pictures are asked for as files."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{target})"

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)", absolute, readme)


if __name__ == "__main__":
    setup(long_description=readme_for_an_index(), long_description_content_type="text/markdown")
