"""How many tuning rows a forecast needs: the same run foretold from few rows and from many.

Run: python benchmarks/rows.py PLAN.yaml OUT SET[,SET...] ROWS[,ROWS...]

PLAN and OUT are those of a `tiltmeter validate` whose cells of these sets are finished; the first regime and seed are
taken. The straight and the curved path are made from samples of so many rows and evaluated on the prompts of the plan.
Writes benchmarks/results/rows.json, a forecast at a time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltmeter.geometry.forecast import follow
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.path import CurvedPath, LinearPath
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.subject import Options, Subject, measure_subject, with_lora
from tiltmeter.jobs.tuning import prepare_tuning
from tiltmeter.jobs.validation_plan import Cell, read_plan
from tiltmeter.jobs.validation_runner import CELLS
from tiltmeter.lm.model import undisturbed
from tiltmeter.store import read_record, write_text

RESULTS = Path(__file__).parent / "results"


def foretold(subject: Subject, cell: Cell, options: Options, steps: list[int]) -> dict[str, Any]:
    """Margin change and KL along both paths, from a sample of `options.max_tuning` rows."""
    begin = time.perf_counter()
    tuning = prepare_tuning(subject, cell.set.open(), cell.recipe, options)
    clock, metric, clip = cell.recipe.clock(), cell.recipe.metric, cell.recipe.max_grad_norm or None

    def slope(displacement: Tensor | None = None) -> Any:
        found = measure_slope(tuning.objective, tuning.batches, clip=clip, displacement=displacement, groups=1)
        return replace(found, spread=found.spread.mul_(tuning.spread_factor(tuning.batches)), groups=())

    linear = LinearPath(metric, clock, slope())
    probe = max(1, clock.steps // 2)
    curved = CurvedPath(linear, slope(linear.displacement(probe)), probe)
    out: dict[str, Any] = {"rows": len(tuning.encoded.examples)}
    for name, path in (("linear", linear), ("curved", curved)):
        values, _ = follow(path, steps, subject.standing)
        change = values.margin - subject.anchor_margin.double()
        out[name] = {"margin_change": change.mean(-1).tolist(), "safety_kl": values.safety_kl.mean(-1).tolist()}
    return {**out, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Foretell every named set from every number of rows."""
    plan, out = read_plan(Path(sys.argv[1])), Path(sys.argv[2])
    regime, options = plan.regimes[0], plan.options
    cells = [cell for cell in plan.cells() if cell.regime == regime and cell.seed == regime.seeds[0]]
    opened = with_lora(open_model(plan.model), regime.recipe.lora, options.seed)
    result: dict[str, Any] = {**provenance("cpu"), "plan": Path(sys.argv[1]).name, "regime": regime.name, "sets": {}}
    with undisturbed(opened.loaded.model):
        subject = measure_subject(opened, plan.split()[0], regime.recipe.lora, options)
        for name in sys.argv[3].split(","):
            [cell] = [each for each in cells if each.set.name == name]
            record = read_record(out / CELLS / cell.name)[0]
            seen, steps = record["measured"]["assessed"], record["predicted"]["steps"]
            places = [seen["steps"].index(step) for step in steps]
            measured = {key: [seen[key]["value"][i] for i in places] for key in ("margin_change", "safety_kl")}
            result["sets"][name] = {"steps": steps, "measured": measured, "foretold": []}
            print(name, "steps", steps, "measured", [round(x, 3) for x in measured["margin_change"]])
            for rows in sys.argv[4].split(","):
                made = foretold(subject, cell, replace(options, max_tuning=int(rows)), steps)
                result["sets"][name]["foretold"].append(made)
                for path in ("linear", "curved"):
                    told = [round(x, 3) for x in made[path]["margin_change"]]
                    print(f"  {made['rows']:3d} rows {path:<7} {told} ({made['seconds']:.0f} s)", flush=True)
                write_text(RESULTS / "rows.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
