"""From a drawn SVG file to a fragment that can stand in a page: no declarations, no clashing ids, colours by theme."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# Drawn colour -> CSS variable of the page, so that one drawing suits a light and a dark page. Each is used for
# nothing else. Value, budget and paths are from the Okabe-Ito palette, which colour-blind readers can tell apart.
INK, MUTED, GRID, BEYOND = "#1b2228", "#5b6770", "#dfe4e8", "#e9ecef"
VALUE, BUDGET, SURFACE = "#0072b2", "#d55e00", "#fefefe"
PATHS = ("#009e74", "#cc79a7", "#9a6b00", "#56b4e9", "#6b5bb5", "#7a7a7b")
THEME = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BEYOND: "beyond",
    VALUE: "value",
    BUDGET: "budget",
    SURFACE: "surface",
    **{colour: f"path-{index}" for index, colour in enumerate(PATHS)},
}
DASHES = ("5 2", "2 1.6", "7 2 1.5 2", "1 1.4", "9 3", "4 1.5 1 1.5 1 1.5")


def fragment(document: str, name: str, label: str) -> Markup:
    """Make a drawing fit to stand inline in an HTML page.

    Args:
        document: a whole SVG file, as matplotlib writes it.
        name: letters and digits, put before every id: two drawings on one page share matplotlib's ids otherwise.
        label: what the picture shows, for readers who cannot see it.
    """
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", body, flags=re.S)
    view = re.search(r'viewBox="([\d. ]+)"', body)
    body = re.sub(r"^<svg[^>]*>", "", body, count=1, flags=re.S)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'\bxlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var(--{variable})")
    opening = f'<svg viewBox="{view[1] if view else "0 0 1 1"}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + body)
