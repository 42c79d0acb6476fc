"""What mkdocs does not check of the site it built: python docs/site/check.py build/site.

Nothing that a page needs comes from the network; every link leads to a file, and to a place in it, that is there; no
markup stayed behind as text.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a page loads something. An <a href> to the web is a link, which nobody needs to follow.
LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
LOST = re.compile(r"<p>[^<]*:(?:func|class|meth|mod):|<p>(?:[^<]*\n)?\| --- \||<p>[^<]*\n- ")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if (tag, name) in LOADS:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif name in ("id", "name"):
                self.anchors.add(value)


def flaws(site: Path) -> list[str]:
    texts = {
        path.resolve(): path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html")) if path.name != "404.html"
    }
    pages = {path: Page(text) for path, text in texts.items()}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name}: loads {url}" for url in page.loaded if urlsplit(url).netloc]
        found += [f"{name}: markup in the text: {lost}" for lost in LOST.findall(texts[path])]
        for url in [*page.loaded, *page.links]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {url}: no such place in the page")
    for path in sorted(site.rglob("*.css")):
        urls = re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: loads {url}" for url in urls]
    if len(pages) < 20 or not (site / "search" / "search_index.js").exists():
        found.append("the site lacks pages, or its search")
    return found


def main() -> None:
    site = Path(sys.argv[1])
    found = flaws(site)
    print(*found, sep="\n" if found else "")
    if found:
        sys.exit(1)
    print(f"{site / 'index.html'}: {sum(1 for _ in site.rglob('*.html'))} pages, which load nothing from the network")


if __name__ == "__main__":
    main()
