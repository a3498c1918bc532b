"""Draw the README's figure and write its lines and its table from the committed demo records and runs.

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
CHECKS = ROOT / "benchmarks" / "results" / "check"
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


def checks() -> list[dict]:
    """The runs measured beside their forecasts, in the order of the demo."""
    paths = [CHECKS / f"{name}.json" for name in records()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def check_table(runs: list[dict]) -> str:
    """What was forecast and what came, from step 2 on: at the first step both are next to nothing."""
    lines = [
        "| run | step | margin change forecast, nats (90 %) | measured | safety KL forecast, nats (90 %) | measured |",
        "|---|---|---|---|---|---|",
    ]
    inside, values = 0, 0
    for run in runs:
        changes = [margin - run["anchor_margin"] for margin in run["measured"]["margin"]]
        sides = (("margin_change", changes, "+.2f"), ("safety_kl", run["measured"]["safety_kl"], ".2g"))
        for at, step in enumerate(run["steps"]):
            cells = [run["name"].replace("-", ", ", 1), str(step)]
            for key, measured, style in sides:
                value, low, high = (run["predicted"][key][bound][at] for bound in ("value", "low", "high"))
                cells += [f"{value:{style}} ({low:{style}} to {high:{style}})", f"{measured[at]:{style}}"]
                inside, values = inside + (low <= measured[at] <= high), values + 1
            if step > 1:
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{inside} of the {values} values, those at step 1 among them, lie in their intervals."]
    )


def between(text: str, mark: str, block: str) -> str:
    """The text with this block between the two comments that name it."""
    pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- end of {mark} -->)"
    return re.sub(pattern, lambda found: found[1] + block + found[2], text, flags=re.S)


def main() -> None:
    """Write the figure, and the README's lines and table."""
    found = records()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(standalone(found[SHOWN]), encoding="utf-8")
    lines = "\n".join(line(record) for record in found.values())
    print(lines)
    readme = between(README.read_text(encoding="utf-8"), "demo lines", f"```text\n{lines}\n```")
    README.write_text(between(readme, "demo check", check_table(checks())), encoding="utf-8")


if __name__ == "__main__":
    main()
