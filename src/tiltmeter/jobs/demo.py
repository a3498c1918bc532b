"""The main job on the embedded default: an aligned 135 M model, real safety prompts, three real tuning sets."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from tiltmeter import __version__, store
from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs.assess import Assessment, assess_subject
from tiltmeter.jobs.estimate import Estimate
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, with_lora
from tiltmeter.jobs.tuning import sample_tuning
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.rows import RowSet

MODEL, SAFETY = "demo:aligned", "demo:strongreject-small"
TUNING = ("demo:gsm8k", "demo:stdlib-code", "demo:identity")

#: Two everyday recipes. LoRA's rate is the usual one; full fine-tuning takes the smaller rate it needs.
RECIPES: dict[str, Recipe] = {
    "lora": Recipe(
        learning_rate=3e-4, schedule="constant", steps=32, batch_size=4, lora=Lora(8, 16, ("q_proj", "v_proj"))
    ),
    "full": Recipe(learning_rate=1e-5, schedule="constant", steps=32, batch_size=4),
}

#: Small enough for two cores; see docs for what more prompts and rows change.
OPTIONS = Options(max_safety=5, max_tuning=6, response_tokens=10, max_length=96, rank=4, groups=3, grid=3, looks=3)


class Ticker(Protocol):
    """Follows the work."""

    prefix: str

    def report(self, stage: str) -> None:
        """Begin a stage."""
        ...

    def announce(self, expected: Estimate) -> None:
        """Take the estimate."""
        ...

    def listen(self, passes: Passes) -> None:
        """Take the pass counts."""
        ...


def run(
    out: Path,
    *,
    full: bool,
    seed: int,
    force: bool,
    ticker: Ticker,
    model: str = MODEL,
    safety: str = SAFETY,
    tuning: tuple[str, ...] = TUNING,
    options: Options = OPTIONS,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> list[dict[str, Any]]:
    """Assess every tuning set under every recipe; each result goes to its own folder as soon as it is there.

    Args:
        out: parent of the result folders.
        full: whether to assess full fine-tuning besides LoRA.
        seed: of everything random.
        force: assess again what is already there. Results of other settings or versions are replaced in any case.
        ticker: follows the work.
        model: the aligned model.
        safety: safety prompts.
        tuning: tuning sets.
        options: how much to measure.
        recipes: regime -> recipe.

    Returns: the records, in the order of regimes and sets.

    Cost: the safety side is measured once per regime.
    """
    options = replace(options, seed=seed)
    # of all parameters the coupling takes long: the demo shows it under LoRA, `tiltmeter assess` under both
    asked = {
        regime: replace(options, coupling=options.coupling and each.lora is not None)
        for regime, each in recipes.items()
    }
    records: dict[tuple[str, str], dict[str, Any]] = {}
    wanted = [regime for regime in recipes if full or regime != "full"]
    for regime in wanted:
        for name in tuning:
            folder = _folder(out, regime, name)
            if not force and (folder / store.RECORD).exists():
                found = store.read_record(folder)[0]
                if _answers(found, model, safety, recipes[regime], asked[regime]):
                    records[regime, name] = found
    answered = None
    for regime in wanted:
        missing = [name for name in tuning if (regime, name) not in records]
        if not missing:
            continue
        ticker.prefix = f"{regime}: "
        ticker.report("loading the model")
        opened = with_lora(open_model(model), recipes[regime].lora, seed)
        with undisturbed(opened.loaded.model):
            for name in missing:  # data that cannot be used should end the job before the long part
                sample_tuning(opened.loaded, open_rows(name), recipes[regime], asked[regime])
            subject = measure_subject(
                opened,
                open_rows(safety),
                recipes[regime].lora,
                asked[regime],
                safety=answered,
                report=ticker.report,
                listen=ticker.listen,
            )
            answered = subject.safety
            for name in missing:
                ticker.prefix = f"{regime}, {name.removeprefix('demo:')}: "
                records[regime, name] = _one(
                    subject, open_rows(name), recipes[regime], asked[regime], out, regime, ticker
                )
        del opened, subject
        gc.collect()
    return [records[regime, name] for regime in wanted for name in tuning]


def _one(
    subject: Subject, rows: RowSet, recipe: Recipe, options: Options, out: Path, regime: str, ticker: Ticker
) -> dict[str, Any]:
    with store.new_folder(_folder(out, regime, rows.name), replace=True) as part:
        result: Assessment = assess_subject(
            subject, rows, recipe, options, report=ticker.report, announce=ticker.announce
        )
        store.write_record(part, result.record, result.arrays)
    return result.record


def _folder(out: Path, regime: str, name: str) -> Path:
    return out / f"{regime}-{name.removeprefix('demo:')}"


def _answers(record: Mapping[str, Any], model: str, safety: str, recipe: Recipe, options: Options) -> bool:
    """Whether a stored record answers this very question: same inputs, settings and version of tiltmeter."""
    asked = json.loads(json.dumps({"recipe": recipe.as_dict(), "options": asdict(options)}))  # tuples become lists
    return bool(
        record["tiltmeter"] == __version__
        and (record["model"]["name"], record["safety"]["name"]) == (model, safety)
        and record["recipe"] == asked["recipe"]
        and record.get("options") == asked["options"]
    )


def line(record: Mapping[str, Any]) -> str:
    """One line of the demo's summary."""
    forecast, recipe = record["forecast"], record["recipe"]
    change, kl = forecast["margin_change"], forecast["safety_kl"]
    return (
        f"{recipe['regime']:<5} {record['tuning']['name'].removeprefix('demo:'):<12} "
        f"margin {change['value'][-1]:+.2f} nats, KL {kl['value'][-1]:.2g} at step {recipe['steps']}, "
        f"horizon {forecast['horizon_steps']:>2}: {record['verdict']['kind']}"
    )
