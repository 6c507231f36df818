"""Renders the HTML document of a page with its style sheet, which has a light and a dark theme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastrlhf.runtime.atomic import write_file


def render_page(title: str, facts: list[str], sections: list[tuple[str, str]], footer: str = "") -> str:
    """Renders a whole HTML document: the title, a line of facts, links to the sections, and the sections. Each section
    is (heading, markup).

    Title, facts, headings and footer are escaped by this function; the markup of sections is not. The content security
    policy in the head forbids requests and scripts.
    """
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    chips = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>\n{content}</section>\n'
        for i, (name, content) in enumerate(sections)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)} - fastrlhf</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="facts">{chips}</p><nav>{links}</nav></header>
<main>
{body}</main>
{f"<footer>{escape(footer)}</footer>" if footer else ""}
</body>
</html>
"""


def write_page(path: Path, page: str) -> None:
    """Writes a page atomically: after a failure the old page is still there. Raises ValueError, with the fix, if the
    file cannot be written."""
    try:
        write_file(path, page, errors="xmlcharrefreplace")
    except OSError as error:
        told = f"{str(path)!r} cannot be written: {error.strerror}; give another page with --output PAGE"
        raise ValueError(told) from error


def scrolling(table: str) -> str:
    """Wraps a table so that it scrolls sideways if it is too wide; a shadow marks an edge behind which there are more
    columns."""
    return f'<div class="wide" tabindex="0">{table}</div>'


def render_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Renders a table of plain texts, which this function escapes; the first column holds the names of the rows."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in others)}</tr>\n"
        for first, *others in rows
    )
    return scrolling(f'<table class="values"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>')


def token_markup(text: str) -> str:
    """Renders the text of a token; a line break gets a visible sign in addition, and an empty token becomes a dot."""
    return escape(text).replace("\n", "&crarr;\n") or "&middot;"


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430;
  --muted: #667085; --rule: #e3e7ed; --grid: #edf0f4; --bad: #b42318;
  --shade: rgb(20 30 50 / 0.35);
  --c0: #7446d8; --c1: #a17a00; --c2: #0d8f6f; --c3: #dd6b10;
  --c4: #2563eb; --c5: #c0297d; --c6: #0b8fb3; --c7: #5b6472;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #191f28; --ink: #e6eaf0;
    --muted: #95a0b1; --rule: #2b3440; --grid: #252d38; --bad: #ff8a7a;
    --shade: rgb(0 0 0 / 0.9);
    --c0: #b394ff; --c1: #e3bd3f; --c2: #3fcfa5; --c3: #ff9440;
    --c4: #6ea0ff; --c5: #ff74b8; --c6: #4fd0f0; --c7: #aab4c3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1320px; padding: 28px 24px 48px; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { margin: 0; font-size: 24px; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 17px; }
.facts { margin: 6px 0 14px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 2px 18px; }
nav { display: flex; flex-wrap: wrap; gap: 6px; }
nav a {
  padding: 3px 12px; border: 1px solid var(--rule); border-radius: 999px; background: var(--card); color: inherit;
  text-decoration: none;
}
nav a:hover, nav a:focus-visible { border-color: var(--c0); color: var(--c0); }
section { margin-top: 32px; scroll-margin-top: 12px; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); }
figure, .wide, details { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
figure { display: flex; flex-direction: column; justify-content: space-between; padding: 10px 10px 4px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; padding: 0 4px 2px; }
figcaption > b { overflow-wrap: anywhere; font-weight: 600; }
figcaption small { color: var(--muted); font: inherit; font-weight: 400; }
.key { display: flex; flex-wrap: wrap; gap: 0 12px; color: var(--muted); font-size: 12.5px; }
.key b { color: var(--ink); font-weight: 600; }
.key em { color: var(--bad); font-style: normal; }
i { display: inline-block; width: 9px; height: 9px; margin-right: 6px; border-radius: 50%; }
figure svg { display: block; width: 100%; height: auto; }
figure svg svg { overflow: hidden; }
svg text { fill: var(--muted); font-size: 9.5px; }
text.y, text.over { text-anchor: end; }
text.x { text-anchor: middle; }
.hits rect { y: 20px; height: 128px; fill: transparent; }
.hits rect:hover { fill: var(--ink); opacity: 0.1; }
.grid { stroke: var(--grid); }
path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line { stroke-width: 1.6; }
.dot { stroke-width: 6; }
.dashed path { stroke-dasharray: 4 3; }
.key .dashed i { border-radius: 0; height: 2px; width: 12px; vertical-align: 3px; }
.raw { stroke-width: 0.8; opacity: 0.35; }
.bar { vertical-align: -3px; margin-right: 10px; }
.track { stroke: var(--rule); stroke-width: 4; stroke-linecap: round; }
.half { stroke: var(--muted); stroke-dasharray: 2 2; }
.interval { stroke-width: 7; stroke-linecap: round; opacity: 0.45; }
.bar circle { stroke: var(--card); stroke-width: 1.5; }
.wide {
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--card) 40%, transparent) left / 48px 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 18px 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 18px 100% no-repeat scroll,
    var(--card);
}
.wide::-webkit-scrollbar { height: 10px; }
.wide::-webkit-scrollbar-thumb { background: var(--muted); border: 3px solid var(--card); border-radius: 5px; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 9px 14px; text-align: left; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--muted); font-size: 12.5px; font-weight: 600; white-space: nowrap; }
.results td, .results tbody th { white-space: nowrap; }
.results th:nth-child(n + 3), .results td:nth-child(n + 3) { text-align: right; }
.values td, .values th:nth-child(n + 2) { text-align: right; }
.values tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 130px; }
.values th, .values td { padding: 6px 12px; }
.group { padding-bottom: 1px; }
.group > .charts, .group > .wide { margin: 0 12px 12px; }
.group > .wide { border: 1px solid var(--rule); border-radius: 10px; }
summary small { color: var(--muted); font: inherit; font-weight: 400; margin-left: 6px; }
.muted { color: var(--muted); }
.samples td { vertical-align: top; }
.samples td div { max-height: 180px; max-width: 620px; overflow: auto; }
.samples td div { white-space: pre-wrap; overflow-wrap: break-word; }
.samples .text div { min-width: min(240px, 60vw); }
h3 { margin: 14px 0 4px; font-size: 13px; font-weight: 600; color: var(--muted); }
.tokens { margin: 0; font: 13px/1.9 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.tokens span { border-radius: 3px; border-right: 1px solid var(--page); overflow-wrap: anywhere; }
.given { color: var(--muted); }
.gain { background: color-mix(in srgb, var(--c4) var(--w), transparent); }
.loss { background: color-mix(in srgb, var(--c3) var(--w), transparent); }
article { padding: 0 14px 10px; border-top: 1px solid var(--rule); }
.legend { padding: 4px 14px 10px; color: var(--muted); font-family: inherit; }
.legend .gain, .legend .loss { color: var(--ink); }
.prompt { background: var(--rule); }
.reset { background: color-mix(in srgb, var(--c3) 32%, transparent); }
.trained { background: color-mix(in srgb, var(--c2) 30%, transparent); }
.masked { background: color-mix(in srgb, var(--c6) 25%, transparent); }
.eos, .score { background: var(--c5); color: var(--card); }
.special { outline: 1px dashed var(--muted); outline-offset: -1px; }
h4 { margin: 8px 0 2px; font-size: 12px; font-weight: 400; color: var(--muted); }
details { margin-bottom: 10px; }
details .wide { border-width: 1px 0 0; border-radius: 0; }
summary { padding: 9px 14px; cursor: pointer; font-weight: 600; }
pre { margin: 0; padding: 4px 14px 14px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
footer { margin-top: 36px; color: var(--muted); font-size: 12.5px; }
@media (max-width: 500px) { body { padding: 16px 12px 32px; } .samples td div { max-width: 80vw; } }
@media print { nav { display: none; } figure, tr { break-inside: avoid; } }
"""
