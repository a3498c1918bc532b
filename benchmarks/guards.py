"""Every guard on the same fine-tunes: what was learned, what was kept, what it cost.

    python benchmarks/guards.py                     all guards on demo:tiny, minutes on one core
    python benchmarks/guards.py --only budget- --only none-
    python benchmarks/guards.py --list              what is to be run, without running it
    python benchmarks/guards.py --table             put the committed results into docs/guards.md and guards.html

Every run leaves its own file, so a plan that was interrupted goes on where it was; finished runs are gathered in
benchmarks/results/guards.json, as the plan "tiny", beside those of the aligned model, which `tiltmeter validate` makes
in hours of benchmarks/plans/guards.yaml, refusals.yaml, refusals-rivals.yaml and refusals-full.yaml and
benchmarks/validation.py keeps (validation-guards.json and so on). The guard's safety prompts and the ones that are
measured are different ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tiltmeter.errors import TiltmeterError
from tiltmeter.guards.session import Session
from tiltmeter.guards.token_loss import ConstrainedTokens
from tiltmeter.guards.trainee import Trainee
from tiltmeter.jobs.guarding import guard_named, safety_source, usual_opening
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.recipe import Lora
from tiltmeter.jobs.subject import with_lora
from tiltmeter.lm.conversation import Example, batches, encode
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward, negative_log_likelihood
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import judge_refusal
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import negative_margin_objective
from tiltmeter.lm.safety import prepare_safety, refusal_rate
from tiltmeter.report.guards_page import write_guards_page
from tiltmeter.store import write_text

RESULTS = Path(__file__).parent / "results"
PARTS = RESULTS / "guards.parts"

#: Runs of the aligned model by name: the plans that they are of, and the regimes whose runs count (older ones of full
#: fine-tuning are with refusals, too). Unguarded runs are those of the first plan.
ALIGNED = {
    "aligned": (("guards",), ("lora-adamw", "full-adamw")),
    "refusals": (("refusals", "refusals-rivals"), ("lora-adamw",)),
    "refusals-full": (("refusals-full",), ("full-adamw",)),
}

#: Strengths that each guard is run at; the first is its default.
STRENGTHS = {
    "none": [0.0],
    "budget": [0.05, 0.2, 0.01],  # the budget in nats: that is the knob of this one
    "gradient": [1.0],
    "gu": [1.0],
    "safegrad": [1.0],
    "ewc": [10.0],
    "alignguard": [10.0],
    "safe_lora": [1.0],
    "token_loss": [1.0],
    "replay": [1.0, 0.1],
    "lisa": [1.0],
    "ema": [0.98],
    "lox": [1.0],
    "freeze": [0.5],
}


@dataclass(frozen=True)
class Plan:
    """What is run: model, safety prompts, tuning sets, recipes."""

    model: str
    safety: str
    guarded: int
    measured: int
    harmless: str
    sets: tuple[str, ...]
    harmful: str
    regimes: dict[str, tuple[Lora | None, float]]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    max_length: int
    response_tokens: int
    max_tokens: int
    minutes: float


TINY = Plan(
    "demo:tiny", "demo:tiny-safety", 48, 64, "demo:tiny-known", ("demo:tiny-copy", "demo:tiny-copy+10%"),
    "demo:tiny-harmful", {"full": (None, 3e-4), "lora": (Lora(8, 16.0), 1e-3)}, (0, 1), 120, 8, 64, 10, 4096, 0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One fine-tune under one guard."""

    guard: str
    strength: float
    set: str
    seed: int
    regime: str

    @property
    def name(self) -> str:
        """Of its file."""
        tuned = self.set.removeprefix("demo:").replace("%", "")
        return f"{self.guard}-{self.strength:g}-{tuned}-{self.regime}-{self.seed}"


def runs_of(plan: Plan) -> list[Run]:
    """All runs, the unguarded and ours first."""
    pairs = [(guard, s) for guard, values in STRENGTHS.items() for s in values]
    every = itertools.product(plan.seeds, plan.regimes, plan.sets, pairs)
    return [Run(guard, s, tuned, seed, regime) for seed, regime, tuned, (guard, s) in every]


def tuning_of(plan: Plan, name: str, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and held-out ones of the task; "+10%" puts harmful rows among the first."""
    rows = open_rows(name.partition("+")[0]).rows
    kept = len(rows) // 4
    train, test = list(rows[:-kept]), list(rows[-kept:])
    if name.endswith("+10%"):
        train += open_rows(plan.harmful).rows[: max(1, len(train) // 9)]
    return [list(encode(part, tokenizer, plan.max_length).examples) for part in (train, test[:64])]  # type: ignore[return-value]


def opened_for(plan: Plan, regime: str, seed: int) -> Opened:
    """The aligned model with its trainable parameters marked."""
    return with_lora(open_model(plan.model), plan.regimes[regime][0], seed)


def base_for(plan: Plan) -> Any:
    """A base for Safe LoRA and LoX: the model trained to comply, since demo:tiny has no base of its own."""
    opened = open_model(plan.model)
    forward = Forward(opened.loaded.model.requires_grad_(True), trainable(opened.loaded.model))
    examples = encode(open_rows(plan.harmful).rows, opened.loaded.tokenizer, plan.max_length).examples
    optimizer = torch.optim.AdamW(forward.parameters.values(), lr=1e-3, weight_decay=0.0)
    for step in range(60):
        chosen = [examples[i % len(examples)] for i in range(8 * step, 8 * step + 8)]
        optimizer.zero_grad()
        loss_of(forward, chosen, plan, opened.loaded.tokenizer.pad_token_id).backward()
        optimizer.step()
    return opened.loaded.model


def loss_of(
    forward: Forward, chosen: list[Example], plan: Plan, pad: int, tokens: ConstrainedTokens | None = None
) -> torch.Tensor:
    """Mean loss per supervised token, or the constrained one."""
    count = sum(example.supervised for example in chosen)
    total = torch.zeros(())
    for _, batch in batches(chosen, pad, plan.max_tokens):
        if tokens is not None:
            outputs = forward.model(input_ids=batch.tokens, use_cache=False)
            total = total + tokens.trainer_loss(outputs, batch.labels, count)
        else:
            logits, labels = forward.logits(dict(forward.parameters), batch)
            total = total + negative_log_likelihood(logits, labels).sum() / count
    return total


def train(run: Run, plan: Plan, opened: Opened, session: Session, examples: list[Example]) -> tuple[float, float]:
    """Seconds of processor time for the steps as they are, and for the guard's part in them."""
    forward = Forward(opened.loaded.model, session.model.parameters)
    pad, guard = opened.loaded.tokenizer.pad_token_id, session.guard
    tokens = guard if isinstance(guard, ConstrainedTokens) and guard.strength > 0 else None
    generator = torch.Generator().manual_seed(run.seed)
    order: list[int] = []
    own = theirs = 0.0
    for _ in range(plan.steps):
        if len(order) < plan.batch:
            order = torch.randperm(len(examples), generator=generator).tolist()
        chosen = [examples[order.pop()] for _ in range(plan.batch)]
        begin = time.process_time()
        session.model.optimizer.zero_grad()
        loss_of(forward, chosen, plan, pad, tokens).backward()
        torch.nn.utils.clip_grad_norm_(list(forward.parameters.values()), 1.0)
        between = time.process_time()
        session.before_step()
        ready = time.process_time()
        session.model.optimizer.step()
        moved = time.process_time()
        session.after_step()
        own += between - begin + moved - ready
        theirs += ready - between + time.process_time() - moved
    session.end()
    return own, theirs


def execute(run: Run, plan: Plan) -> dict[str, Any]:
    """One run, measured on prompts that the guard never saw."""
    torch.manual_seed(run.seed)
    opened = opened_for(plan, run.regime, run.seed)
    model, tokenizer, pad = opened.loaded.model, opened.loaded.tokenizer, opened.loaded.tokenizer.pad_token_id
    rows = open_rows(plan.safety).rows
    asked = rows[plan.guarded : plan.guarded + plan.measured]
    openings = {"refusal_opening": opened.refusal_opening, "compliance_opening": opened.compliance_opening}
    length = {"max_length": plan.max_length, "response_tokens": plan.response_tokens}
    safety = prepare_safety(opened.loaded, asked, limit=plan.measured, **length, **openings)
    forward = Forward(model, trainable(model))
    divergence = divergence_objective(forward, safety.responses, pad, plan.max_tokens)
    margin = negative_margin_objective(forward, safety.refusals, safety.compliances, pad, plan.max_tokens)
    learned, task = tuning_of(plan, run.set, tokenizer)
    base = base_for(plan) if run.guard in ("safe_lora", "lox") else None
    knob = {"budget_kl": run.strength} if run.guard == "budget" else {"strength": run.strength}
    guard = guard_named(run.guard, opened, tuning=learned, base=base, **knob)
    opening = usual_opening(run.guard)
    source = safety_source(opened, rows[: plan.guarded], limit=plan.guarded, opening_tokens=opening, **length)
    optimizer = torch.optim.AdamW(forward.parameters.values(), lr=plan.regimes[run.regime][1], weight_decay=0.0)
    session = Session(guard, Trainee(dict(forward.parameters), optimizer, source, 0, run.seed, plan.steps))
    before = {"task_loss": _task_loss(forward, task, plan, pad), "margin": float(-margin.losses().mean())}
    begin = time.process_time()
    session.begin()
    start = time.process_time() - begin
    own, theirs = train(run, plan, opened, session, learned)
    answers = generate(opened.loaded, _prompts(asked), plan.response_tokens)
    harmless = generate(opened.loaded, _prompts(open_rows(plan.harmless).rows[:64]), plan.response_tokens)
    refused, over = (refusal_rate([judge_refusal(a) for a in said]) for said in (answers, harmless))
    return {
        **asdict(run),
        **({} if run.guard == "none" else {"opening_tokens": opening}),
        "task_loss": _task_loss(forward, task, plan, pad),
        "heldout_kl": float(divergence.losses().mean()),
        "margin": float(-margin.losses().mean()),
        "refusal_rate": refused.value,
        "over_refusal_rate": over.value,
        "step_time_ratio": (own + theirs) / own,
        "extra_memory_gb": session.most / 1e9,
        "start_seconds": start,
        "anchor": {**before, "refusal_rate": safety.refusal_rate().value},
        "log": [[d.step, d.what, d.why] for d in guard.memory.log[:20]],
    }


def _prompts(rows: Any) -> list[Any]:
    return [row["prompt"] for row in rows]


def _task_loss(forward: Forward, examples: list[Example], plan: Plan, pad: int) -> float:
    with torch.no_grad():
        return float(loss_of(forward, examples, plan, pad))


def is_done(run: Run, part: Path) -> bool:
    """Whether a run is there, of the guard as it comes now."""
    if not part.is_file():
        return False
    held = json.loads(part.read_text())
    return "refused" in held or held.get("opening_tokens", 0) == usual_opening(run.guard)


def gather() -> dict[str, Any]:
    """All finished runs of the plan."""
    done = [PARTS / "tiny" / f"{run.name}.json" for run in runs_of(TINY)]
    runs = [{"plan": "tiny", **json.loads(part.read_text())} for part in done if part.is_file()]
    return {"runs": runs, "plans": {"tiny": {**asdict(TINY), **provenance("cpu")}}}


def with_aligned(held: dict[str, Any]) -> dict[str, Any]:
    """The same with the committed runs of the aligned model."""
    runs = [run for run in held["runs"] if run["plan"] not in ALIGNED]
    plans = dict(held["plans"])
    for name, (made, regimes) in ALIGNED.items():
        for place, plan in enumerate(made):
            if not (RESULTS / f"validation-{plan}.json").is_file():  # `make guards` makes it later
                continue
            record = json.loads((RESULTS / f"validation-{plan}.json").read_text())
            about = {key: record[key] for key in ("model", "created", "tiltmeter", "versions", "machine")}
            kept = [run for run in record["guard_runs"] if run["regime"] in regimes]
            runs += [{**run, "plan": name} for run in kept if not place or run["guard"] != "none"]
            plans[name if not place else plan] = {"plan": f"benchmarks/plans/{plan}.yaml", **about}
    return {"runs": runs, "plans": plans}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown rows: every guard and strength over all runs of the plan "tiny", mean and range."""
    free = {(r["set"], r["regime"], r["seed"]): r for r in runs if r["guard"] == "none"}
    rows = [
        "| guard | strength | runs | learned | held-out KL, nats | refusals | over-refusals | step time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for guard, strength in sorted({(r["guard"], r["strength"]) for r in runs if "refused" not in r}):
        own = [r for r in runs if (r["guard"], r["strength"]) == (guard, strength) and "refused" not in r]
        own = [r for r in own if (r["set"], r["regime"], r["seed"]) in free]
        gains = []
        for r in own:
            start, best = r["anchor"]["task_loss"], free[r["set"], r["regime"], r["seed"]]["task_loss"]
            gains.append((start - r["task_loss"]) / (start - best))
        cells = [_range(gains, "{:.0%}"), _range([r["heldout_kl"] for r in own], "{:.3g}")]
        for key in ("refusal_rate", "over_refusal_rate"):
            cells.append(_range([r[key] for r in own if r[key] is not None], "{:.0%}"))
        cells.append(_range([r["step_time_ratio"] for r in own], "{:.1f}x"))
        rows.append(f"| {guard} | {strength:g} | {len(own)} | {' | '.join(cells)} |")
    return rows


def _range(values: list[float], form: str) -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def write_table() -> None:
    """Replace the table between the two marks of docs/guards.md."""
    path = RESULTS.parents[1] / "docs" / "guards.md"
    before, _, rest = path.read_text().partition("<!-- table -->\n")
    runs = [r for r in json.loads((RESULTS / "guards.json").read_text())["runs"] if r["plan"] == "tiny"]
    write_text(
        path,
        before + "<!-- table -->\n" + "\n".join(table(runs)) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2],
    )


def write_results(held: dict[str, Any]) -> None:
    """The results with those of the aligned model, and their page."""
    held = with_aligned(held)
    write_text(RESULTS / "guards.json", json.dumps(held, indent=1) + "\n")
    write_guards_page(held, RESULTS / "guards.html", "Guards on the same fine-tunes")


def main() -> None:
    """Run what is missing of a plan, and gather."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", default=[], help="runs whose name begins so; may be repeated")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        write_table()
        write_results(json.loads((RESULTS / "guards.json").read_text()))
        return
    torch.set_num_threads(1)
    chosen = [r for r in runs_of(TINY) if not given.only or any(r.name.startswith(p) for p in given.only)]
    folder = PARTS / "tiny"
    missing = [run for run in chosen if not is_done(run, folder / f"{run.name}.json")]
    print(f"{len(chosen)} runs, {len(missing)} to do, about {TINY.minutes:g} minutes each on one core")
    if given.list:
        print("\n".join(run.name for run in missing))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(missing, 1):
        try:
            found = execute(run, TINY)
        except TiltmeterError as error:  # a guard that refuses says so in the table
            found = {**asdict(run), "refused": str(error)}
        write_text(folder / f"{run.name}.json", json.dumps(found, indent=1) + "\n")
        shown = {key: found[key] for key in ("task_loss", "heldout_kl", "refusal_rate") if key in found}
        print(f"{number}/{len(missing)} {run.name} {found.get('refused', shown)}", flush=True)
    write_results(gather())


if __name__ == "__main__":
    main()
