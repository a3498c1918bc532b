"""Take a validation's summary into the committed results, and write the documents' tables from it.

Run: python benchmarks/validation.py OUT [NAME], after tiltmeter validate PLAN -o OUT; `make validate` does both.
NAME is that of the committed record, "validation" by default; only that one has its table in the README. The record
"validation-guards" has its tables in docs/guards.md and docs/how-to/which-guard.md, "validation-refusals" and
"validation-refusals-full" one together in the former, and "validation-refusals-rivals" another, beside the runs of the
first of these under `budget` as it comes. Forecasts beside runs, set by set, go into docs/findings.md where
it asks for them (`<!-- sets NAME REGIME -->`).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from tiltmeter.report.guards_page import guard_name, with_strength

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
GUARDS = ROOT / "docs" / "guards.md"
WHICH = ROOT / "docs" / "how-to" / "which-guard.md"
FINDINGS = ROOT / "docs" / "findings.md"
NAME = "validation"
BLOCK = re.compile(r"<!-- validation table -->.*?<!-- end of validation table -->", re.S)
GUARD_BLOCK = re.compile(r"<!-- aligned table -->.*?<!-- end of aligned table -->", re.S)
REFUSAL_BLOCK = re.compile(r"<!-- refusals table -->.*?<!-- end of refusals table -->", re.S)
RIVAL_BLOCK = re.compile(r"<!-- rivals table -->.*?<!-- end of rivals table -->", re.S)
SUMMARY_BLOCK = re.compile(r"<!-- summary table -->.*?<!-- end of summary table -->", re.S)

#: Records of what guards do to refusals, and the regime whose runs count in each.
REFUSALS = {"validation-refusals": "lora-adamw", "validation-refusals-full": "full-adamw"}

#: The record of what rivals do to them, with the sets, orders of rows and prompts of the first.
RIVALS = "validation-refusals-rivals"

#: Predictors in the README's table besides ours: the rest are in the record and on the page.
BASELINES = ("gradient_norm", "gamma_hat", "initial_overlap", "overlap_cosine", "initial_loss", "random_subspace",
             "gradient_matching", "representation_similarity")  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The README's table as Markdown."""
    rows = ["| predictor | Spearman with margin drop | with safety KL | cost, training steps |", "|---|---|---|---|"]
    for name, each in record["predictors"].items():
        if not each["ours"] and name not in BASELINES:
            continue
        told = [_ranged(each[key]) for key in ("margin", "kl")]
        label = name.replace("_", " ") + (" (ours)" if each["ours"] else "")
        rows.append(f"| {label} | {told[0]} | {told[1]} | {each['steps']:.1f} |")
    cover, fell = record["coverage"], record["collapse"]
    narrow = all("same_prompts" in cell["predicted"] for cell in record["cells"])  # older records had none
    said = [
        f"{record['finished']} of {record['planned']} planned cells ({record['model']}); held-out prompts.",
        *_by_regime(record),
        *(_sizes(record["size_error"][prompts], prompts.replace("_", "-")) for prompts in ("held_out", "assessed")),
        *_sizes_by_regime(record, "assessed"),
        "Nominal 90 % intervals at the last claimed step held the measurement in "
        + "; ".join(
            f"{_hits(cover[prompts]['margin_change']['cells'])} (margin) and "
            f"{_hits(cover[prompts]['safety_kl']['cells'])} (KL) cells on {prompts.replace('_', '-')} prompts"
            + (" (there without the draw of prompts)" if prompts == "assessed" and narrow else "")
            for prompts in ("held_out", "assessed")
        )
        + ".",
        *_misses(record["cells"]),
        *_ceiling(record["cells"]),
        f"Collapses: {fell['happened']} happened, {fell['foretold']['hits']} foretold, {fell['dated']['hits']} dated "
        f"within a factor of two; {_hits(fell['false_alarms'])} false alarms.",
    ]
    return "\n".join(rows) + "\n\n" + "\n".join(said)


def _by_regime(record: dict[str, Any]) -> list[str]:
    """Ranks of the reported forecasts in each regime: the table has their mean, whatever the number of sets."""
    sets = {regime: len({cell["set"] for cell in record["cells"] if cell["regime"] == regime}) for regime in
            {cell["regime"]: None for cell in record["cells"]}}  # fmt: skip
    if len(sets) < 2:
        return []
    told = []
    for name, key in (("rehearsal_margin", "margin"), ("rehearsal_kl", "kl")):
        found = record["predictors"][name][key]["by_regime"]
        parts = [f"{found[regime]:.2f} in {regime} ({count} sets)" for regime, count in sets.items() if regime in found]
        told.append(f"{name.replace('_', ' ')}: {', '.join(parts)}")
    partly = [
        name.replace("_", " ")
        for name, each in record["predictors"].items()
        if (each["ours"] or name in BASELINES) and 0 < len(each["margin"].get("by_regime") or {}) < len(sets)
    ]
    missing = f" Asked in some regimes only, and so not comparable: {', '.join(partly)}." if partly else ""
    return [f"The table's ranks are means over regimes; {'; '.join(told)}.{missing}"]


def _misses(cells: list[dict[str, Any]]) -> list[str]:
    """Which way forecasts err on the assessed prompts, and how far next to their interval; not for older records."""
    if not cells or any("same_prompts" not in cell["predicted"] for cell in cells):
        return []
    shares, ratios, whole = [], [], 0
    for cell in cells:
        told, seen = cell["predicted"], cell["measured"]["assessed"]
        ratios.append(told["safety_kl"]["value"][-1] / seen["safety_kl"]["value"][-1])
        step = told["horizon_steps"]
        whole += step == told["steps"][-1]
        if step in told["steps"] and step in seen["steps"]:
            i, change = told["steps"].index(step), seen["margin_change"]["value"][seen["steps"].index(step)]
            value, ends = told["margin_change"]["value"][i], told["same_prompts"]["margin_change"]
            reach = ends["high"][i] - value if change > value else value - ends["low"][i]
            shares.append(abs(change - value) / reach)
    low = sum(ratio < 1 for ratio in ratios)
    return [
        f"On assessed prompts the margin's miss is {statistics.median(shares):.2f} of the interval's half-width in the "
        f"median, {max(shares):.2f} at the most; the KL at the end is foretold too small in {low} of {len(ratios)} "
        f"cells (median ratio {statistics.median(ratios):.2f}); the horizon is the whole run in {whole} of "
        f"{len(cells)}."
    ]


def _ceiling(cells: list[dict[str, Any]]) -> list[str]:
    """How well one half of the prompts tells the other's ranks, both measured: no forecast can do much better."""
    if len(cells) < 4:
        return []
    told = []
    for key in ("margin_change", "safety_kl"):
        halves = [[cell["measured"][half][key]["value"][-1] for cell in cells] for half in ("assessed", "held_out")]
        told.append(f"{stats.spearmanr(*halves).statistic:.2f}")
    return [
        f"Measured on assessed and on held-out prompts, runs agree in rank to {told[0]} (margin) and {told[1]} (KL)."
    ]


def _sizes(sizes: dict[str, Any], prompts: str) -> str:
    told = "; ".join(
        f"{when.replace('_', ' ')} {_percent(sizes[when]['margin_change']['median'])} / "
        f"{_percent(sizes[when]['safety_kl']['median'])}"
        for when in ("horizon", "end", "end_with_canary")
    )
    return f"Median relative size error on {prompts} prompts (margin / KL): {told}."


def _sizes_by_regime(record: dict[str, Any], prompts: str) -> list[str]:
    """The same at the end for each regime; nothing where there is one, or where a cell has no error."""
    errors = [record["size_error"][prompts]["end"][key]["errors"] for key in ("margin_change", "safety_kl")]
    regimes = [cell["regime"] for cell in record["cells"]]
    if len(set(regimes)) < 2 or any(len(each) != len(regimes) for each in errors):
        return []
    told = []
    for regime in dict.fromkeys(regimes):
        held = [[e for e, name in zip(each, regimes, strict=True) if name == regime] for each in errors]
        margin, kl = (_percent(statistics.median(each)) for each in held)
        told.append(f"{regime} {margin} / {kl} ({len(held[0])} cells)")
    return [f"At the end, by regime, on {prompts.replace('_', '-')} prompts: {'; '.join(told)}."]


def guard_table(record: dict[str, Any]) -> str:
    """Runs with and without guards as Markdown, seeds side by side: smallest and largest of them.

    "Learned" is the fall of the task loss over that of the unguarded run of the same seed. A run is on the front if no
    other of its set, regime and seed has learned as much or more at as little KL or less.
    """
    rows = [
        "| regime | set | guard | strength | seeds | learned | held-out KL, nats | on the front | margin, nats "
        "| refusals | over-refused | step time |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in record["guard_runs"]:
        grouped.setdefault((run["regime"], run["set"], guard_name(run), run["strength"]), []).append(run)
    for (regime, name, guard, strength), runs in grouped.items():
        learned = [_learned(run, record["guard_runs"]) for run in runs]
        front = sum(not any(_beats(other, run) for other in record["guard_runs"]) for run in runs)
        spread = [_spread(learned, _percent), _spread([run["heldout_kl"] for run in runs], "{:.3g}".format)]
        spread.append(f"{front} of {len(runs)}")
        for key, form in (
            ("margin", "{:+.2f}".format),
            ("refusal_rate", _percent),
            ("over_refusal_rate", _percent),
            ("step_time_ratio", "{:.1f}x".format),
        ):
            spread.append(_spread([run[key] for run in runs], form))
        rows.append(f"| {' | '.join([regime, name, guard, f'{strength:g}', str(len(runs)), *spread])} |")
    return "\n".join(rows)


def guard_summary(record: dict[str, Any]) -> str:
    """The same runs by guard, strength and regime, over sets and seeds, as Markdown."""
    rows = [
        "| regime | guard | strength | runs | learned | safety KL on unseen prompts, nats | refused of these "
        "| harmless refused | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs = record["guard_runs"]
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["regime"], guard_name(run), run["strength"]), []).append(run)
    for (regime, guard, strength), own in grouped.items():
        spread = [_spread([_learned(run, runs) for run in own], _percent)]
        for key, form in (
            ("heldout_kl", "{:.3f}".format),
            ("refusal_rate", _percent),
            ("over_refusal_rate", _percent),
            ("extra_memory_gb", "{:.3f}".format),
        ):
            spread.append(_spread([run[key] for run in own], form))
        rows.append(f"| {' | '.join([regime, guard, f'{strength:g}', str(len(own)), *spread])} |")
    return "\n".join(rows)


def refusal_table(record: dict[str, Any]) -> str:
    """Refusals of the runs against the aligned model's on the same prompts, as Markdown; one row a run."""
    rows = [
        "| regime, seed | set | guard | learned | KL on unseen prompts, nats | refused of these (aligned) "
        "| change, points (90 %) | harmless refused (aligned) | change, points (90 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs = record["guard_runs"]
    # the seeds of a set one below the other
    for run in sorted(runs, key=lambda run: [_first(runs, run, key) for key in ("regime", "set", "seed")]):
        where = [f"{run['regime']}, {run['seed']}", run["set"]]
        row = [*where, _guard(run), _percent(_learned(run, runs)), f"{run['heldout_kl']:.3f}"]
        for name in ("refusal", "over_refusal"):
            change = run[f"{name}_change"]
            row.append(f"{_percent(run[f'{name}_rate'])} ({_percent(change['before'])})")
            row.append(_points(change))
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def refusal_runs() -> list[dict[str, Any]]:
    """Runs of the records of refusals that are there; an older one also has full fine-tuning as it was then."""
    files = {name: RESULTS / f"{name}.json" for name in REFUSALS}
    held = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    return [run for name, each in held.items() for run in each["guard_runs"] if run["regime"] == REFUSALS[name]]


def rival_runs() -> list[dict[str, Any]]:
    """Runs under LoRA without a guard, under `budget` as it comes and under rivals; none where a record is missing."""
    files = [RESULTS / f"{name}.json" for name in (*REFUSALS, RIVALS)]
    if not (files[0].is_file() and files[-1].is_file()):
        return []
    ours, rivals = (json.loads(file.read_text(encoding="utf-8"))["guard_runs"] for file in (files[0], files[-1]))
    kept = [run for run in ours if run["guard"] == "none" or run.get("opening_tokens")]
    return [run for run in kept if run["regime"] == "lora-adamw"] + [run for run in rivals if run["guard"] != "none"]


def rival_table(runs: Sequence[dict[str, Any]]) -> str:
    """Guards on the same sets and prompts as Markdown, seeds side by side: smallest and largest of them."""
    rows = [
        "| set | guard | seeds | learned | KL on unseen prompts, nats | on the front "
        "| refused of these, change in points | harmless refused, change in points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: _first(runs, run, "set")):
        grouped.setdefault((run["set"], _guard(run)), []).append(run)
    for (name, guard), own in grouped.items():
        front = sum(not any(_beats(other, run) for other in runs) for run in own)
        row = [name, guard, str(len(own)), _spread([_learned(run, runs) for run in own], _percent)]
        row += [_spread([run["heldout_kl"] for run in own], "{:.3f}".format), f"{front} of {len(own)}"]
        for key in ("refusal_change", "over_refusal_change"):
            row.append(_spread([100 * run[key]["value"] for run in own], "{:+.0f}".format))
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _guard(run: dict[str, Any]) -> str:
    return "none" if run["guard"] == "none" else with_strength(guard_name(run), f"{run['strength']:g}")


def _first(runs: Sequence[dict[str, Any]], run: dict[str, Any], key: str) -> int:
    """Place of the first run that has this one's value."""
    return next(i for i, other in enumerate(runs) if other[key] == run[key])


def _points(change: dict[str, Any]) -> str:
    """A change of a share in points, with its interval."""
    if change["value"] is None:
        return "?"
    ends = "" if change["low"] is None else f" ({100 * change['low']:+.0f} to {100 * change['high']:+.0f})"
    return f"{100 * change['value']:+.0f}{ends}"


def _learned(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> float:
    """Fall of a run's task loss over that of the unguarded run of its set, regime and seed."""
    same = ("set", "regime", "seed")
    alone = next(r for r in runs if r["guard"] == "none" and all(r[key] == run[key] for key in same))
    fall, whole = (each["task_loss_before"] - each["task_loss"] for each in (run, alone))
    return float(fall / whole)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a run beats another of its set, regime and seed: no worse in task loss and KL, and better in one."""
    if any(one[key] != other[key] for key in ("set", "regime", "seed")):
        return False
    gains = [other[key] - one[key] for key in ("task_loss", "heldout_kl")]
    return min(gains) >= 0 and max(gains) > 0


def _spread(values: Sequence[float | None], form: Callable[[Any], str]) -> str:
    """Smallest and largest of some values in words; one where they read the same."""
    if None in values:
        return "?"
    least, most = form(min(values)), form(max(values))
    return least if least == most else f"{least} to {most}"


def set_table(record: dict[str, Any], regime: str) -> str:
    """Forecast and measurement at the last step, set by set, the first seed of each, as Markdown."""
    rows = [
        "| tuning set | margin change forecast, nats (90 %) | measured, same prompts | other prompts "
        "| KL forecast, nats | same | other | horizon |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells = [cell for cell in record["cells"] if cell["regime"] == regime]
    first = {cell["set"]: cell for cell in sorted(cells, key=lambda cell: cell["seed"], reverse=True)}
    for cell in sorted(first.values(), key=lambda cell: cell["measured"]["assessed"]["margin_change"]["value"][-1]):
        told, seen = cell["predicted"], cell["measured"]
        bounds = [told["margin_change"][bound][-1] for bound in ("value", "low", "high")]
        change = "not told" if None in bounds else "{:+.2f} ({:+.2f} to {:+.2f})".format(*bounds)
        margins, kls = ([seen[half][key]["value"][-1] for half in ("assessed", "held_out")] for key in
                        ("margin_change", "safety_kl"))  # fmt: skip
        row = [cell["set"], change, *(f"{margin:+.2f}" for margin in margins)]
        row += ["not told" if kl is None else f"{kl:.3f}" for kl in (told["safety_kl"]["value"][-1], *kls)]
        rows.append(f"| {' | '.join([*row, str(told['horizon_steps'])])} |")
    return "\n".join(rows)


def with_set_tables(text: str, record: dict[str, Any], name: str) -> str:
    """A document with the tables of this record in the places it asks for them."""
    pattern = rf"(<!-- sets {re.escape(name)} (\S+) -->\n).*?(<!-- end of sets -->)"
    return re.sub(pattern, lambda found: found[1] + set_table(record, found[2]) + "\n" + found[3], text, flags=re.S)


def with_table(readme: str, record: dict[str, Any]) -> str:
    """The README with the table between its marks; unchanged if it has none."""
    block = f"<!-- validation table -->\n{table(record)}\n<!-- end of validation table -->"
    return BLOCK.sub(lambda _: block, readme)


def _ranged(held: dict[str, Any]) -> str:
    if held["value"] is None:
        return "not told"
    ends = "" if held["low"] is None else f" ({held['low']:.2f} to {held['high']:.2f})"
    return f"{held['value']:.2f}{ends}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.0f} %"


def _hits(held: dict[str, Any]) -> str:
    return f"{held['hits']} of {held['n']}"


def main() -> None:
    """Copy the summary and write the table."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    name = sys.argv[2] if len(sys.argv) > 2 else NAME
    record = json.loads((Path(sys.argv[1]) / "summary.json").read_text(encoding="utf-8"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(table(record))
    if name in REFUSALS:
        made = refusal_table({"guard_runs": refusal_runs()})
        print(made)
        block = f"<!-- refusals table -->\n{made}\n<!-- end of refusals table -->"
        GUARDS.write_text(REFUSAL_BLOCK.sub(lambda _: block, GUARDS.read_text(encoding="utf-8")), encoding="utf-8")
    if name in (*REFUSALS, RIVALS) and (found := rival_runs()):
        made = rival_table(found)
        print(made)
        block = f"<!-- rivals table -->\n{made}\n<!-- end of rivals table -->"
        GUARDS.write_text(RIVAL_BLOCK.sub(lambda _: block, GUARDS.read_text(encoding="utf-8")), encoding="utf-8")
    if name == "validation-guards":
        made = guard_table(record)
        print(made)
        block = f"<!-- aligned table -->\n{made}\n<!-- end of aligned table -->"
        GUARDS.write_text(GUARD_BLOCK.sub(lambda _: block, GUARDS.read_text(encoding="utf-8")), encoding="utf-8")
        short = f"<!-- summary table -->\n{guard_summary(record)}\n<!-- end of summary table -->"
        WHICH.write_text(SUMMARY_BLOCK.sub(lambda _: short, WHICH.read_text(encoding="utf-8")), encoding="utf-8")
    FINDINGS.write_text(with_set_tables(FINDINGS.read_text(encoding="utf-8"), record, name), encoding="utf-8")
    if name == NAME:
        README.write_text(with_table(README.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
