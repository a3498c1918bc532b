"""What a validation runs: data sets x seeds x regimes, read from one YAML file."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tiltmeter import store
from tiltmeter.errors import DataError, InputError
from tiltmeter.guards.names import GUARDS
from tiltmeter.jobs.assess import check_options
from tiltmeter.jobs.guarding import FEWEST, GuardOptions
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.predict import chosen
from tiltmeter.jobs.recipe import Recipe, recipe_of
from tiltmeter.jobs.subject import Options
from tiltmeter.jobs.trial import TIMING
from tiltmeter.lm.rows import RowSet, digest_of
from tiltmeter.lm.safety import spread

KEYS = ("model", "safety", "sets", "seeds", "regimes", "options", "predictors", "guards")

#: Level at which older cells have the intervals of refusals, whatever was asked.
USUAL_LEVEL = 0.9

#: What says where a guard of the plan is run.
WHERE = "regimes", "seeds"


@dataclass(frozen=True)
class Part:
    """Rows of one source.

    Attributes:
        source: file, hub id or `demo:` name.
        rows: most rows, evenly spread; None for all.
        shortest: only so many of the shortest rows, in characters: long prompts leave no room within few tokens.
        completion: answer that replaces the rows' own; None keeps them.
    """

    source: str
    rows: int | None = None
    completion: str | None = None
    shortest: int | None = None


@dataclass(frozen=True)
class SetPlan:
    """A tuning set: one source, or several mixed in a fixed random order."""

    name: str
    parts: tuple[Part, ...]

    def open(self) -> RowSet:
        """Read the rows.

        Raises:
            DataError: a source cannot be read, or a row has no prompt to answer.
        """
        rows: list[dict[str, Any]] = []
        for part in self.parts:
            held = _shortest(open_rows(part.source).rows, part.shortest)
            rows += [_answered(held[i], part) for i in spread(len(held), part.rows or len(held))]
        if len(self.parts) > 1:
            random.Random(0).shuffle(rows)
        return RowSet(self.name, tuple(rows), digest_of(rows))


@dataclass(frozen=True)
class Regime:
    """A recipe, which sets and seeds it is run on, and which predictors are asked.

    In a large space some predictors hold several vectors of it; a regime may leave them out.
    """

    name: str
    recipe: Recipe
    sets: tuple[str, ...]
    seeds: tuple[int, ...]
    predictors: tuple[str, ...]


@dataclass(frozen=True)
class GuardPlan:
    """A guard that fine-tunes are repeated under.

    Attributes:
        options: the guard; None is the run without, which is always there.
        regimes: names of the regimes that it is run in; None for all.
        seeds: that it is run with; None for all.
    """

    options: GuardOptions | None
    regimes: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def covers(self, regime: str, seed: int) -> bool:
        """Whether it is run there."""
        return (self.regimes is None or regime in self.regimes) and (self.seeds is None or seed in self.seeds)


@dataclass(frozen=True)
class Guarding:
    """Guards as an axis of the plan.

    Attributes:
        axis: guards that fine-tunes are repeated under, the run without first.
        prompts: safety prompts that guards learn from; none of them is measured.
        harmless: set whose prompts should not be refused, or None.
        harmless_rows: how many of them are asked.
    """

    axis: tuple[GuardPlan, ...]
    prompts: int
    harmless: str | None
    harmless_rows: int


@dataclass(frozen=True)
class Cell:
    """One real fine-tune: with its forecast, or under a guard."""

    regime: Regime
    set: SetPlan
    seed: int
    guard: GuardOptions | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        guarded = "" if self.guard is None else f"-{self.guard.label}"
        return f"{self.assessment}-s{self.seed}{guarded}"

    @property
    def assessment(self) -> str:
        """Name of its assessment's folder, shared by all seeds: they differ in the order of the rows alone."""
        return f"{self.regime.name}-{self.set.name}"

    @property
    def recipe(self) -> Recipe:
        """The recipe with this cell's seed."""
        return replace(self.regime.recipe, seed=self.seed)


@dataclass(frozen=True)
class Plan:
    """A validation.

    Attributes:
        model: the aligned model.
        safety: safety prompts.
        assessed: prompts that the forecast sees.
        held_out: further prompts that are measured only.
        sets: tuning sets.
        regimes: recipes.
        options: how much to measure.
        guarding: guards as an axis, or None.
    """

    model: str
    safety: str
    assessed: int
    held_out: int
    sets: tuple[SetPlan, ...]
    regimes: tuple[Regime, ...]
    options: Options = field(default_factory=Options)
    guarding: Guarding | None = None

    def cells(self) -> list[Cell]:
        """All cells: the first seed of every regime and set, then the second, so that partial results are whole."""
        sets = {each.name: each for each in self.sets}
        seeds = sorted({seed for regime in self.regimes for seed in regime.seeds})
        return [
            Cell(regime, sets[name], seed, guard.options)
            for seed in seeds
            for regime in self.regimes
            if seed in regime.seeds
            for name in regime.sets
            for guard in (self.guarding.axis if self.guarding else (GuardPlan(None),))
            if guard.covers(regime.name, seed)
        ]

    def split(self) -> tuple[RowSet, RowSet, RowSet]:
        """Assessed, held-out and guards' prompts, drawn from rows evenly spread over the safety set.

        Raises:
            DataError: there are fewer rows than that.
        """
        rows = open_rows(self.safety)
        taught = self.guarding.prompts if self.guarding else 0
        wanted = self.assessed + self.held_out + taught
        if len(rows.rows) < wanted:
            raise DataError(f"{self.safety} has {len(rows.rows)} rows; the plan asks for {wanted}")
        places = spread(len(rows.rows), wanted)
        random.Random(0).shuffle(places)
        seen = self.assessed + self.held_out
        parts = (places[: self.assessed], places[self.assessed : seen], places[seen:])
        held = [tuple(rows.rows[i] for i in sorted(part)) for part in parts]
        first, second, third = (
            RowSet(f"{self.safety} ({name})", part, digest_of(part))
            for name, part in zip(("assessed", "held out", "for guards"), held, strict=True)
        )
        return first, second, third

    def run(self, cell: Cell) -> str:
        """Digest of everything that decides what a cell's run measures, whatever is forecast of it."""
        held = self.options
        return store.digest_json(
            {
                "model": self.model,
                "safety": [self.safety, self.assessed, self.held_out],
                "set": [[p.source, p.rows or 0, p.completion or "", p.shortest or 0] for p in cell.set.parts],
                "recipe": repr(cell.recipe),
                "options": [
                    held.response_tokens,
                    held.max_length,
                    held.seed,
                    *([] if held.level == USUAL_LEVEL else [held.level]),
                ],
            }
        )

    def question(self, cell: Cell) -> str:
        """Digest of everything that decides a cell's result."""
        guards: dict[str, Any] = {}
        if self.guarding is not None:
            held = self.guarding
            shared = [held.prompts, held.harmless or "", held.harmless_rows]
            guards = {"guards": shared, "guard": cell.guard.question if cell.guard else "None", "timing": TIMING}
        if cell.guard is not None:  # nothing is foretold for it: how that is done does not matter
            return store.digest_json({**guards, "run": self.run(cell), "grid": self.options.grid})
        return store.digest_json(
            {
                **guards,
                "model": self.model,
                "safety": [self.safety, self.assessed, self.held_out],
                "set": [[p.source, p.rows or 0, p.completion or "", p.shortest or 0] for p in cell.set.parts],
                "recipe": repr(cell.recipe),
                # settings that were added since count only where they differ from what was before
                "options": repr(self.options).replace(", forecast_only=False", "").replace(", screen=False", ""),
                **({} if self.options.level == USUAL_LEVEL else {"refusals": "of this level"}),
                "predictors": list(cell.regime.predictors),
            }
        )


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: the file is missing or malformed, a key is unknown or missing, or a value cannot be used.
    """
    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the plan {path}: {error}") from error
    if not isinstance(held, Mapping):
        raise InputError(f"the plan {path} must be a mapping with {', '.join(KEYS)}")
    _only(held, KEYS, "the plan")
    for key in ("model", "safety", "sets", "regimes"):
        if not held.get(key):
            raise InputError(f"the plan lacks {key}; expected {', '.join(KEYS)}")
    safety = held["safety"]
    if not isinstance(safety, Mapping):
        raise InputError("safety in the plan must have name, assessed and held_out")
    _only(safety, ("name", "assessed", "held_out"), "safety")
    sets = tuple(_set(each) for each in held["sets"])
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise InputError(f"two sets of the plan have one name: {', '.join(names)}")
    seeds = tuple(int(seed) for seed in held.get("seeds") or (0,))
    asked = held.get("predictors") or ("all",)
    regimes = tuple(_regime(name, each, names, seeds, asked) for name, each in held["regimes"].items())
    plan = Plan(
        str(held["model"]),
        str(safety.get("name")),
        _count(safety, "assessed"),
        _count(safety, "held_out"),
        sets,
        regimes,
        _options(held.get("options") or {}, _count(safety, "assessed")),
        _guarding(held.get("guards"), regimes),
    )
    check_options(plan.options)
    if plan.options.screen:
        raise InputError("a validation judges intervals and horizons, which a screening has none of; leave out screen")
    return plan


def _only(held: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in held:
        if key not in keys:
            raise InputError(f"unknown key {key!r} in {where}: expected {', '.join(keys)}")


def _count(held: Mapping[str, Any], key: str) -> int:
    value = held.get(key)
    if not isinstance(value, int) or value < 2:
        raise InputError(f"safety.{key} must be a number of prompts, at least 2, got {value!r}")
    return value


def _set(held: Any) -> SetPlan:
    if isinstance(held, str):
        return SetPlan(_name(held.removeprefix("demo:")), (Part(held),))
    if not isinstance(held, Mapping) or not held.get("name") or not held.get("parts"):
        raise InputError(f"a set of the plan is a name, or has name and parts; got {held!r}")
    _only(held, ("name", "parts"), "a set")
    parts = []
    for part in held["parts"]:
        _only(part, ("source", "rows", "completion", "shortest"), f"a part of {held['name']}")
        parts.append(Part(str(part["source"]), part.get("rows"), part.get("completion"), part.get("shortest")))
    return SetPlan(_name(str(held["name"])), tuple(parts))


def _regime(name: str, held: Any, sets: Sequence[str], seeds: tuple[int, ...], asked: Sequence[str]) -> Regime:
    if not isinstance(held, Mapping) or not isinstance(held.get("recipe"), Mapping):
        raise InputError(f"regime {name} needs a section recipe of TrainingArguments; got {held!r}")
    _only(held, ("recipe", "sets", "seeds", "predictors"), f"regime {name}")
    own = tuple(held.get("sets") or sets)
    for each in own:
        if each not in sets:
            raise InputError(f"regime {name} names the set {each!r}, which is none of {', '.join(sets)}")
    recipe = recipe_of(held["recipe"])
    recipe.clock()
    own_seeds = tuple(int(seed) for seed in held.get("seeds") or seeds)
    return Regime(_name(name), recipe, own, own_seeds, chosen(held.get("predictors") or asked))


def _guarding(held: Any, regimes: Sequence[Regime]) -> Guarding | None:
    if held is None:
        return None
    if not isinstance(held, Mapping) or not held.get("axis"):
        raise InputError("guards in the plan must have axis, a list of guards; expected also prompts, harmless")
    _only(held, ("axis", "prompts", "harmless", "harmless_rows"), "guards")
    axis = [GuardPlan(None)]
    for each in held["axis"]:
        given = {"name": each} if isinstance(each, str) else dict(each)
        _only(given, ("name", "strength", "budget_kl", "base", "answer_tokens", "opening_tokens", *WHERE), "a guard")
        if given.get("name") == "none":
            continue
        if given.get("name") not in GUARDS:
            raise InputError(f"unknown guard {given.get('name')!r}; expected one of {', '.join(sorted(GUARDS))}")
        for key, least in (("answer_tokens", 1), ("opening_tokens", 0)):
            count = given.get(key, least)
            if key == "opening_tokens" and count is None:
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise InputError(f"{key} of guard {given['name']} must be a number of at least {least}, got {count!r}")
        where = _somewhere(given.pop("regimes", None), [each.name for each in regimes], "regimes", given["name"])
        seeds = {seed for each in regimes for seed in each.seeds}
        when = _somewhere(given.pop("seeds", None), sorted(seeds), "seeds", given["name"])
        guard = GuardPlan(GuardOptions(**given), where, when)
        if not any(guard.covers(each.name, seed) for each in regimes for seed in each.seeds):
            raise InputError(f"guard {given['name']} is never run: none of its regimes has one of its seeds")
        axis.append(guard)
    labels = [guard.options.label for guard in axis if guard.options is not None]
    if len(set(labels)) < len(labels):
        raise InputError(f"two guards of the plan are the same: {', '.join(labels)}")
    prompts = int(held.get("prompts", FEWEST))
    if prompts < FEWEST:
        raise InputError(f"guards.prompts must be at least {FEWEST}, got {prompts}")
    return Guarding(tuple(axis), prompts, held.get("harmless"), int(held.get("harmless_rows", 16)))


def _somewhere(asked: Any, there: Sequence[Any], what: str, guard: str) -> tuple[Any, ...] | None:
    """Regimes or seeds that a guard is run in, checked against those of the plan; None for all."""
    if asked is None:
        return None
    known = [(type(each), each) for each in there]
    if not isinstance(asked, list) or not asked or any((type(each), each) not in known for each in asked):
        raise InputError(f"{what} of guard {guard} must be a list of {', '.join(map(str, there))}; got {asked!r}")
    return tuple(asked)


def _options(held: Mapping[str, Any], assessed: int) -> Options:
    _only(held, [each.name for each in fields(Options)], "options")
    return Options(**{**held, "max_safety": assessed})


def _shortest(rows: Sequence[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """The `count` rows with the fewest characters, in their own order."""
    if count is None:
        return list(rows)
    sizes = [
        sum(len(str(row[key])) for key in ("prompt", "completion", "text", "messages") if key in row) for row in rows
    ]
    kept = sorted(sorted(range(len(rows)), key=sizes.__getitem__)[:count])
    return [rows[i] for i in kept]


def _name(text: str) -> str:
    """A name that is fit for a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "set"


def _answered(row: dict[str, Any], part: Part) -> dict[str, Any]:
    if part.completion is None:
        return row
    if "prompt" not in row:
        raise DataError(f"{part.source}: a completion is given, but a row has no column prompt")
    return {"prompt": row["prompt"], "completion": part.completion}
