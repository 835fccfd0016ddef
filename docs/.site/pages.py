"""What of the repository lies outside of ``docs/`` and is a page of the site all the same, and links to it."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", **{f"{n}.md": f"{n.lower()}.md" for n in ("CONTRIBUTING", "SECURITY", "CHANGELOG")}}
EXAMPLES = {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))}
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages made of files at the root, and one for each example."""
    for source, page in PAGES.items():
        text = _linked((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    for source, page in EXAMPLES.items():
        code = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=f"# {source}\n\n```python\n{code}```\n"))
    listed = "".join(f"- [{Path(source).name}]({Path(page).name})\n" for source, page in EXAMPLES.items())
    files.append(File.generated(config, "examples/index.md", content=f"# Examples\n\n{listed}"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of ``docs/`` to the pages that stand for what they lead to."""
    where = page.file.src_uri
    generated = {*PAGES.values(), *EXAMPLES.values(), "examples/index.md"}
    return markdown if where in generated else _linked(markdown, f"docs/{where}", where)


def _linked(text: str, source: str, page: str) -> str:
    """Return a file's text with its links, which hold in the repository, as they hold in the site."""

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        known = {**PAGES, **EXAMPLES, "examples": "examples/index.md"}
        place = known.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return LINK.sub(turned, text)
