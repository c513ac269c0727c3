"""Check a built site: each link within it leads to a file and an anchor that are there, and no page loads anything from elsewhere.

`python scripts/check_site.py build/site`; mkdocs has checked the Markdown by then, this also sees what is generated.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a page loads by itself, as against where a reader may go.
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# Of the kinds of <link>, those that are not fetched.
ONLY_NAMED = {"canonical", "next", "prev", "edit", "alternate"}


class Page(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADING and LOADING[tag] in given and given.get("rel") not in ONLY_NAMED:
            self.loads.append(given[LOADING[tag]])


def faults_of(site: Path) -> list[str]:
    """What is wrong, a sentence each."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        # The page for addresses that do not exist is shown under any of them, so its links begin at the root.
        base = site if path.name == "404.html" else path.parent
        where = path.relative_to(site.resolve())
        for link in page.loads:
            if urlsplit(link).netloc:
                faults.append(f"{where} loads {link}")
        for link in [*page.links, *page.loads]:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = path if not target.path else (base / unquote(target.path).lstrip("/")).resolve()
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                faults.append(f"{where} links to {link}, which is not there")
            elif target.fragment and file in pages and unquote(target.fragment) not in pages[file].ids:
                faults.append(f"{where} links to {link}, and there is no such anchor")
    return faults


if __name__ == "__main__":
    site = Path(sys.argv[1])
    faults = faults_of(site)
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(list(site.rglob('*.html')))} pages, {len(faults)} faults")
    sys.exit(bool(faults))
