"""One HTML page that holds everything: its style, tables, and pictures, which are PNG files beside it too."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdft_dist.report.charts import save

STYLE = """
:root { color-scheme: light; --line: #d8dce2; --soft: #5a6472; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 1rem; color: #1c2128; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 75ch; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } .row { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0; }
.row img { width: 330px; flex: 1 1 300px; max-width: 460px; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.text { min-width: 10rem; max-width: 24rem; }
td.text div { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }
.right { color: #116329; background: #eefaf0; } .wrong { color: #a40e26; background: #fdf0f1; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; }
summary { cursor: pointer; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page; `parts` are HTML, the title is text."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en>{head}\n{body}\n</html>\n"


def side_by_side(pictures: Sequence[str]) -> str:
    """Pictures in a row, as many as the window holds."""
    return f"<div class=row>{''.join(pictures)}</div>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), texts: Sequence[int] = ()
) -> str:
    """Cells of text under `head`; `numbers` are the columns that are flush right, `texts` those of long texts."""
    kinds = dict.fromkeys(numbers, " class=n")

    def cell(i: int, text: str) -> str:
        return text_cell(text) if i in texts else f"<td{kinds.get(i, '')}>{escape(text)}</td>"

    first = "".join(f"<th{kinds.get(i, '')}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{first}</tr>{body}</table></div>"


def text_cell(text: str, mark: str = "") -> str:
    """A cell of a long text, which may be marked as "right" or "wrong". One that nobody could see is told of."""
    shown = text if text.strip() or not text else f"(white space only: {text!r:.80})"
    return f"<td class='text {mark}'><div>{escape(shown)}</div></td>"


def picture(figure: Any, name: str, alt: str, out: Path) -> str:
    """The figure as a PNG file, and within the page."""
    file = out / f"{name}.png"
    save(figure, file)
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
