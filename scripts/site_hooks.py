"""What mkdocs does for this site besides: a notebook is a page, made of its cells."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook; the notebook itself stays a file that the page links to."""
    for each in list(files):
        if each.src_uri.endswith(".ipynb"):
            page = page_of(Path(config.docs_dir) / each.src_uri)
            files.append(File.generated(config, each.src_uri.removesuffix("ipynb") + "md", content=page))
    return files


def page_of(notebook: Path) -> str:
    """A notebook's cells as Markdown, with a link to the file behind the title."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    title, _, rest = texts[0].partition("\n")
    link = f"This page is the notebook [{notebook.name}]({notebook.name}); CI executes it."
    shown = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells[1:], texts[1:], strict=True)
    ]
    return "\n\n".join([title, link, rest.strip(), *shown]) + "\n"
