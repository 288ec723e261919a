"""Self-contained pages: tables hold every number, charts are SVG that a script inside the page makes interactive.

A chart is drawn twice by the same library: here, so that it is there without scripts, and in the reader's browser,
where it fits its column, answers the pointer and turns series on and off. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from specflow.files import write_text

DRAWN_WIDTH = 440
"""Pixels of the SVG that stands without scripts; it is scaled to its column."""
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
SERIES = [f"var(--c{i})" for i in range(1, 9)]
"""Colours are the page's own variables, so that dark and print take theirs."""
TEXT, AXIS, GRID = "currentColor", "var(--axis)", "var(--line)"

THEME: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "aria": False,
    "view": {"stroke": None},
    "axis": {
        "labelColor": TEXT,
        "titleColor": TEXT,
        "domainColor": AXIS,
        "tickColor": AXIS,
        "gridColor": GRID,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelLimit": 150,
        "tickSize": 4,
    },
    "axisX": {"grid": False, "labelFlush": False, "labelAngle": 0},
    "axisY": {"domain": False, "ticks": False, "tickCount": 5},
    "legend": {
        "orient": "top",
        "title": None,
        "columns": 3,
        "labelColor": TEXT,
        "labelFontSize": 11,
        "labelLimit": 170,
        "symbolSize": 70,
        "symbolStrokeWidth": 2,
        "rowPadding": 3,
        "columnPadding": 14,
        "offset": 8,
    },
    "range": {"category": SERIES},
    "line": {"strokeWidth": 2},
    "point": {"filled": True, "size": 55, "opacity": 1},
    "bar": {"color": SERIES[0]},
    "text": {"color": TEXT, "fontSize": 11},
    "rule": {"color": AXIS},
}


def figure(chart: alt.LayerChart | alt.Chart, title: str, caption: str = "") -> Markup:
    """A <figure> of an Altair chart whose width is "container"; `title` is its heading and its accessible label.

    Numbers that matter must stand in a table as well: the picture alone is out of reach for some readers.
    """
    spec = {**chart.to_dict(), "autosize": {"type": "fit-x", "contains": "padding"}, "config": THEME}
    spec.pop("$schema", None)
    label = " ".join(part for part in (f"{title}.", caption) if part)
    return Markup(
        '<figure><p class="title">{}</p><div class="chart" role="img" aria-label="{}">{}'
        '<script type="application/json">{}</script></div>{}</figure>'
    ).format(
        title,
        label,
        Markup(_drawn(spec, title)),
        Markup(json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")),
        Markup("<figcaption>{}</figcaption>").format(caption) if caption else "",
    )


def _drawn(spec: dict[str, Any], title: str) -> str:
    """The bare <svg>: scales to its column, hidden from readers that get the label, ids that no other figure shares."""
    svg = vl_convert.vegalite_to_svg({**spec, "width": DRAWN_WIDTH}, vl_version=VEGA_LITE)
    head, body = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 :]
    width, height = (re.search(rf'\b{side}="([\d.]+)"', head) for side in ("width", "height"))
    box = f"0 0 {width[1]} {height[1]}" if width and height else "0 0 0 0"
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", body)
    return f'<svg class="drawn" xmlns="http://www.w3.org/2000/svg" viewBox="{box}" aria-hidden="true">{body}'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, emphasis: int | None = None) -> Markup:
    """A table of texts or Markup, scrolling within itself where it is too wide; `emphasis` is a column in bold."""
    head = Markup("").join(Markup("<th>{}</th>").format(cell) for cell in header)
    lines = Markup("").join(
        Markup("<tr>{}</tr>\n").format(
            Markup("").join(
                Markup('<td class="strong">{}</td>' if column == emphasis else "<td>{}</td>").format(cell)
                for column, cell in enumerate(row)
            )
        )
        for row in rows
    )
    return Markup('<div class="scroll"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody></table></div>').format(
        head, lines
    )


def document(title: str, body: Markup, *, verdict: str = "", tone: str = "") -> str:
    """A whole page: heading, a verdict of one sentence (`tone`: good, bad or open), a body of snippets from here."""
    return (
        environment().get_template("pages/document.html.j2").render(title=title, body=body, verdict=verdict, tone=tone)
    )


def write_document(path: Path, title: str, body: Markup, *, verdict: str = "", tone: str = "") -> None:
    """Write `document` to `path`, whole or not at all."""
    write_text(path, document(title, body, verdict=verdict, tone=tone))


@cache
def environment() -> Environment:
    """Templates of the package, with the filters that all pages share."""
    made = Environment(
        loader=PackageLoader("specflow", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"script": script}
    made.filters |= {
        "ratio": ratio,
        "percent": percent,
        "points": points,
        "count": count,
        "measured": measured,
        "lossless": lossless,
        "tone": tone,
    }
    return made


@cache
def script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed, and page.js: modules, so that their names stay apart; about 0.9 MB."""
    libraries = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    own = resources.files("specflow").joinpath("pages/page.js").read_text(encoding="utf-8")
    safe = [code.replace("</script", "<\\/script").replace("<!--", "<\\!--") for code in (libraries, own)]
    return Markup("\n".join(f'<script type="module">{code}</script>' for code in safe))


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points."""
    return "-" if value is None else f"{100 * value:+.1f}"


def count(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:,.4g}".replace(",", " ")


def measured(value: float | None, form: str = "{:,.1f}", scale: float = 1.0) -> str:
    """A reading by `form`, or a dash where there is none."""
    return "-" if value is None else form.format(value * scale).replace(",", " ")


def lossless(value: bool | None) -> str:
    return {True: "yes", False: "NO", None: "sampled"}[value]


def tone(verdict: str) -> str:
    """How a verdict's sentence begins decides its colour."""
    if verdict.startswith("Pays"):
        return "good"
    return "bad" if verdict.startswith("Does not pay") else "open"
