"""Draw the README's figure and write its lines from the committed demo records.

Run: python benchmarks/figures.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tiltmeter.jobs.demo import line
from tiltmeter.report.fields import path_names, read_curve
from tiltmeter.report.plots import draw_forecast
from tiltmeter.report.svg import THEME

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo"
FIGURE = ROOT / "docs" / "figures" / "demo.svg"
README = ROOT / "README.md"
SHOWN = "lora-gsm8k"
QUANTITIES = ("margin", "safety_kl", "refusal_rate")
WIDTH, HEIGHT = 350, 262


def records() -> dict[str, dict]:
    """Committed demo records by name, in the order of the demo."""
    order = [f"{regime}-{name}" for regime in ("lora", "full") for name in ("gsm8k", "stdlib-code", "identity")]
    kept = [name for name in order if (RESULTS / f"{name}.json").exists()]
    return {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in kept}


def standalone(record: dict) -> str:
    """Three forecasts side by side as one SVG file on white, without style sheets."""
    colours = {variable: colour for colour, variable in THEME.items()}
    panels = []
    for place, quantity in enumerate(QUANTITIES):
        curve = read_curve(record, quantity)
        if curve is None:
            continue
        drawing = str(draw_forecast(curve, path_names([record]), f"f{place}"))
        drawing = re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], drawing)
        placed = f'<svg x="{place * (WIDTH + 15)}" y="10" width="{WIDTH}" height="{HEIGHT}" '
        panels.append(drawing.replace("<svg ", placed, 1))
    width, height = len(QUANTITIES) * (WIDTH + 15), HEIGHT + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(panels)}</svg>\n'
    )


def with_lines(readme: str, lines: str) -> str:
    """The README with these lines in their place."""
    block = f"<!-- demo lines -->\n```text\n{lines}\n```\n<!-- end of demo lines -->"
    return re.sub(r"<!-- demo lines -->.*?<!-- end of demo lines -->", lambda _: block, readme, flags=re.S)


def main() -> None:
    """Write the figure and the README's lines."""
    found = records()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(standalone(found[SHOWN]), encoding="utf-8")
    lines = "\n".join(line(record) for record in found.values())
    print(lines)
    README.write_text(with_lines(README.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
