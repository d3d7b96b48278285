"""Render docs/*.md to docs/site/*.html, strictly: a broken link or a method without a page is an error.

.venv/bin/python docs/build.py [--check]        # --check: no files are written
"""

from __future__ import annotations

import html
import os
import re
import shutil
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from lissom.methods import FAMILIES, METHODS

DOCS = Path(__file__).parent
SITE = DOCS / "site"
BENCHMARKS = DOCS.parent / "benchmarks"  # pages of results, which method pages link to
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #22303c; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e8ecef; }}
code, pre {{ background: #f3f6f8; border-radius: .3rem; padding: .1rem .3rem; }} pre {{ padding: .7rem; overflow-x: auto; }} pre code {{ padding: 0; }}
</style></head><body><p><a href="{root}index.html">lissom</a></p>
{body}</body></html>
"""


def sources() -> list[Path]:
    return sorted(p for p in DOCS.rglob("*.md") if SITE not in p.parents)


def method_table() -> str:
    """The methods by family, from the table itself."""
    lines: list[str] = []
    for family, methods in FAMILIES.items():
        lines += [f"### {family}", "", "| method | what it does | source |", "|---|---|---|"]
        lines += [
            f"| [{m.name}](methods/{m.name}.md) | {_cell(m.summary)} | {_cell(m.source)} |" for m in methods.values()
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").replace("<!-- methods -->", method_table())


def links(text: str) -> list[str]:
    """Targets of all links and images, code left out."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or []:
            if child.type in ("link_open", "image"):
                found.append(str(child.attrs.get("href") or child.attrs.get("src")))
    return found


def problems() -> list[str]:
    """Broken links, methods without a page, pages that nothing links to."""
    out, reached = [], {DOCS / "index.md"}
    for page in sources():
        for link in links(text_of(page)):
            target = link.split("#")[0]
            if not target or re.match(r"[a-z]+:", target):
                continue
            path = Path(os.path.normpath(page.parent / target))
            reached.add(path)
            if not path.exists():
                out.append(f"{page.relative_to(DOCS)}: the link {link} leads nowhere")
    out += [f"methods/{n}.md is missing" for n in METHODS if not (DOCS / "methods" / f"{n}.md").is_file()]
    out += [f"{p.relative_to(DOCS)}: no page links to it" for p in sources() if p not in reached]
    return list(dict.fromkeys(out))


def build() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    for page in [*sources(), *BENCHMARKS.glob("*.md")]:
        place = page.relative_to(DOCS if page.is_relative_to(DOCS) else DOCS.parent).with_suffix(".html")
        text = text_of(page)
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), place.stem)
        body = MarkdownIt("commonmark").enable("table").render(text)
        body = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.md(["#])', r"\1.html\2", body)
        target = SITE / place
        target.parent.mkdir(parents=True, exist_ok=True)
        root = "../" * (len(place.parts) - 1)
        body = re.sub(r'href="(?:\.\./)+benchmarks/', f'href="{root}benchmarks/', body)
        target.write_text(PAGE.format(title=html.escape(title), body=body, root=root), encoding="utf-8")
    if (BENCHMARKS / "figures").is_dir():
        shutil.copytree(BENCHMARKS / "figures", SITE / "benchmarks" / "figures")


def main() -> int:
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        return 1
    if "--check" not in sys.argv[1:]:
        build()
        print(SITE / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
