"""Executed notebooks as web pages that load nothing from outside: pictures and style inside, and an index."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown import markdown2html
from pygments.formatters import HtmlFormatter

from dgs.atomic import replacing
from dgs.errors import UserError
from dgs.pipeline import STAGES
from dgs.workspace import MAIN

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
a { color: #0072b2; } img { max-width: 100%; height: auto; } .anchor-link { display: none; }
pre { overflow-x: auto; padding: .6rem .8rem; margin: .4rem 0; font-size: 13px; line-height: 1.4; }
.highlight pre { background: #f5f5f5; border-radius: 4px; }
.prompt, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3; } th { text-align: left; }
nav { font-size: 14px; margin-bottom: 1.5rem; } code { font-size: 14px; }
"""


def _page(title: str, body: str, home: bool) -> str:
    highlight = HtmlFormatter().get_style_defs(".highlight")
    nav = "" if home else '<nav><a href="index.html">All pages</a></nav>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{highlight}</style></head>"
        f"<body>{nav}{body}</body></html>\n"
    )


def _links(body: str, pages: dict[str, str]) -> str:
    """Links to notebooks that have a page lead there; other relative ones lead nowhere from here and become text."""

    def replaced(found: re.Match[str]) -> str:
        target, text = found["target"], found["text"]
        if re.match(r"https?:|#", target):
            return found[0]
        page = pages.get(Path(target).stem)
        return f'<a href="{page}">{text}</a>' if page else text

    return re.sub(r'<a href="(?P<target>[^"]*)"[^>]*>(?P<text>.*?)</a>', replaced, body, flags=re.DOTALL)


def _embedded(body: str, folder: Path) -> str:
    """Pictures of a report's own folder inside the page; any other is left out, with its name in its place."""

    def replaced(found: re.Match[str]) -> str:
        source = found["source"]
        if source.startswith("data:"):
            return found[0]
        file = (folder / source).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file() or file.suffix != ".png":
            return html.escape(source)
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}">'

    return re.sub(r'<img\b[^>]*?\bsrc="(?P<source>[^"]*)"[^>]*>', replaced, body)


def notebook_page(path: Path, pages: dict[str, str]) -> tuple[str, str]:
    """One executed notebook: (its title, its page).

    Args:
        pages: {a notebook's name: its page}, for links.
    """
    notebook = nbformat.read(path, as_version=4)
    body, _ = HTMLExporter(template_name="basic", embed_images=True).from_notebook_node(notebook)
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)  # a page stands still
    found = re.search(r"^# (.+)$", notebook.cells[0].source if notebook.cells else "", re.MULTILINE)
    title = found[1] if found else path.stem
    return title, _page(title, _embedded(_links(body, pages), path.parent), home=False)


def _order(path: Path) -> tuple[int, str]:
    stage = path.stem.partition("-")[0]
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), path.stem)


def write_pages(root: Path, profile: str) -> Path:
    """Pages of a profile's executed notebooks and of its REPORT.md in build/<profile>/report, whole or not at all.

    Returns:
        the index page.

    Raises:
        UserError: no executed notebooks.
    """
    results = root / "results" / profile
    notebooks = sorted((results / "notebooks").glob("*.ipynb"), key=_order)
    if not notebooks:
        how = "dvc repro" if profile == MAIN else f"make repro PROFILE={profile}"
        raise UserError(f"Expected executed notebooks in {results / 'notebooks'}, found none. Run {how} first.")
    pages = {path.stem: f"{path.stem}.html" for path in notebooks}
    for stage in STAGES:  # "train" leads to the first of train-<method>
        pages.setdefault(stage, next((p for name, p in pages.items() if name.startswith(f"{stage}-")), "index.html"))
    folder = root / "build" / profile / "report"
    with replacing(folder) as draft:
        entries = []
        for path in notebooks:
            title, page = notebook_page(path, pages)
            (draft / pages[path.stem]).write_text(page, encoding="utf-8")
            note = f" ({path.stem.partition('-')[2]})" if "-" in path.stem else ""
            entries.append(f'<li><a href="{pages[path.stem]}">{html.escape(title)}{html.escape(note)}</a></li>')
        report = results / "REPORT.md"
        if report.exists():
            body = _embedded(_links(markdown2html(report.read_text(encoding="utf-8")), pages), results)
            (draft / "report.html").write_text(_page(f"Report: {profile}", body, home=False), encoding="utf-8")
            entries.insert(0, '<li><a href="report.html">Report: tables and figures</a></li>')
        body = f"<h1>dgs, profile {html.escape(profile)}</h1><ul>{''.join(entries)}</ul>"
        (draft / "index.html").write_text(_page(f"dgs, profile {profile}", body, home=True), encoding="utf-8")
    return folder / "index.html"
