"""Do the claims and the tests notice a lost factor? Break the package on purpose and see who complains.

Each mutant is one textual change to a temporary copy of the package. The claims of one topic that leans on
the change, and the tests of the measurements, then run on that copy. A mutant is killed when at least one claim fails
and at least one test fails; one that survives means the theory check proves less than it says.

    python benchmarks/mutants.py [NAME ...]     # all of them: about 10 s each on one core

Writes benchmarks/results/mutants.json after every mutant, and prints the table that stands in docs/theory.md.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
TESTS = ["tests/geometry/test_claims.py"]

#: All topics, tried on the faithful copy.
TOPICS = ("kl", "law", "overlap", "descent", "noise", "adam", "lora", "paths", "projection")
FUNCTIONS = {"paths": "path_claims"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old`, which must occur exactly once in geometry/`file`, becomes `new`.

    `topic` names the claims that are tried on it, those of `jobs/theory_TOPIC.py`.
    """

    name: str
    file: str
    topic: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "lambda twice in the energy", "sensitivity", "law", "(self.eigenvalues * z", "(self.eigenvalues.square() * z"
    ),
    Mutant("1/2 missing in the energy", "sensitivity", "law", ".sum(-1) / 2", ".sum(-1)"),
    Mutant("1/m missing in the spectrum", "sensitivity", "law", "gram.double() / m", "gram.double()"),
    Mutant("1/m missing in the Hessian", "objective", "kl", "value.mean() if weights", "value.sum() if weights"),
    Mutant("1/8 becomes 1/4", "motion", "law", "self.full * t**4 / 4", "self.full * t**4 / 2"),
    Mutant(
        "sign of the acceleration",
        "motion",
        "law",
        "torch.add(first, second).div_(2)",
        "torch.add(first, second).div_(-2)",
    ),
    Mutant("sign of the cubic term", "motion", "overlap", "forms, -path[:, 0, 1]", "forms, path[:, 0, 1]"),
    Mutant("1/2 missing before H g", "objective", "law", "t**2 / 2 * acceleration", "t**2 * acceleration"),
    Mutant(
        "mean over answers not taken off",
        "objective",
        "lora",
        "derivatives - (p * derivatives)",
        "derivatives - 0 * (p)",
    ),
    Mutant(
        "own square kept between groups",
        "motion",
        "noise",
        "forms.sum((-2, -1)) - diagonal) / (j * (j - 1)",
        "diagonal) / (j",
    ),
    Mutant("noise of gamma added", "motion", "noise", "turn[:, 0, 0] - turn[:, 1, 1]", "turn[:, 0, 0] + turn[:, 1, 1]"),
    Mutant(
        "b_k with k (k + 1) / 2",
        "metric",
        "descent",
        "pull = self.momentum * pull + covered\n",
        "pull = self.momentum * pull + covered + rate\n",
    ),
    Mutant(
        "momentum forgotten in flow time",
        "metric",
        "descent",
        "covered += rate * (1.0 + self.momentum * velocity if self.nesterov else velocity)",
        "covered += rate",
    ),
    Mutant(
        "momentum forgotten in the response",
        "metric",
        "paths",
        "self.momentum * velocity + slope\n            position",
        "slope\n            position",
    ),
    Mutant(
        "Nesterov's look-ahead forgotten in b_k",
        "metric",
        "descent",
        "covered + self.momentum * pull if self.nesterov else pull",
        "pull",
    ),
    Mutant(
        "metric forgotten in the direction",
        "metric",
        "adam",
        "mean / ((mean.square() + spread.square()).sqrt_().add_(self.epsilon))",
        "mean",
    ),
    Mutant(
        "metric forgotten in D",
        "metric",
        "adam",
        "1.0 / ((mean.square() + spread.square()).sqrt() + self.epsilon)",
        "torch.ones_like(mean)",
    ),
    Mutant(
        "spread forgotten in the direction",
        "metric",
        "adam",
        "mean / ((mean.square() + spread.square()).sqrt_()",
        "mean / ((mean.square()).sqrt_()",
    ),
    Mutant("start norm of Krylov lost", "krylov", "paths", "self.start_norm * (vectors", "1.0 * (vectors"),
    Mutant("sign of H g in the Taylor path", "path", "descent", "alpha=second)", "alpha=-second)"),
    Mutant("secant path at the end of its intervals", "path", "paths", "(node + 0.5)", "(node + 1.0)"),
    Mutant(
        "decay without flow time",
        "path",
        "descent",
        "alpha=-covered * metric.weight_decay",
        "alpha=-metric.weight_decay",
    ),
    Mutant(
        "square of the sum for the sum of squares",
        "clock",
        "noise",
        "self.rates.square().cumsum(0)",
        "self.rates.cumsum(0).square()",
    ),
    Mutant(
        "metric forgotten in the projection",
        "projection",
        "projection",
        "moved = column if preconditioner is None else column * preconditioner",
        "moved = column",
    ),
    Mutant("projection twice as long", "projection", "projection", "alpha=-weight)", "alpha=-2 * weight)"),
)


def try_mutant(mutant: Mutant | None) -> dict[str, object]:
    """Which claims and which tests fail on a broken copy (None: on a faithful one, with all topics)."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for test in TESTS:
            (copy / test).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / test, copy / test)
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            path = copy / "src" / "tiltmeter" / "geometry" / f"{mutant.file}.py"
            text = path.read_text()
            if text.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: expected the text once in {mutant.file}.py: {mutant.old!r}")
            path.write_text(text.replace(mutant.old, mutant.new))
        topics = (mutant.topic,) if mutant else TOPICS
        child = multiprocessing.get_context("fork").Process(target=_check, args=(copy, topics))
        child.start()
        child.join()
        claims = json.loads((copy / "claims.json").read_text())
        cases = list(ElementTree.parse(copy / "tests.xml").iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return {
        "name": mutant.name if mutant else "none",
        "file": f"geometry/{mutant.file}.py" if mutant else "",
        "claims": claims,
        "tests": failed,
        "killed": bool(claims) and bool(failed),
    }


def _check(copy: Path, topics: tuple[str, ...]) -> None:
    """Run tests and claims of a copy in this process, which has torch already but no tiltmeter."""
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy / "src"))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    pytest.main(["-q", "-p", "no:cacheprovider", "--junitxml=tests.xml", *TESTS])
    failed = []
    for topic in topics:
        module = importlib.import_module(f"tiltmeter.jobs.theory_{topic}")
        assert str(module.__file__).startswith(str(copy))
        try:
            claims = getattr(module, FUNCTIONS.get(topic, f"{topic}_claims"))(0)
            failed += [claim.id for claim in claims if not claim.holds]
        except Exception as error:
            failed.append(f"{topic}: {type(error).__name__}")
    (copy / "claims.json").write_text(json.dumps(failed))


def warm_up() -> None:
    """Load torch and its rules of differentiation once; every copy is then checked in a fork of this process."""
    import torch
    from torch.func import jvp

    for heavy in ("pytest", "hypothesis", "scipy.integrate", "scipy.linalg", "scipy.stats"):
        importlib.import_module(heavy)
    torch.set_num_threads(1)

    def logs(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(torch.stack([x, 2 * x**2, -x])[None], -1)

    one = torch.ones(())
    jvp(lambda x: jvp(logs, (x,), (one,))[1], (one,), (one,))


def table(rows: list[dict[str, object]]) -> str:
    """Markdown for docs/theory.md."""
    lines = ["| mutant | in | claims that fail | tests that fail |", "|---|---|---|---|"]
    for row in rows:
        claims, tests = row["claims"], row["tests"]
        assert isinstance(claims, list)
        assert isinstance(tests, list)
        shown = ", ".join(claims[:3]) + (f" and {len(claims) - 3} more" if len(claims) > 3 else "")
        lines.append(f"| {row['name']} | {row['file']} | {len(claims)}: {shown} | {len(tests)} |")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    warm_up()
    baseline = try_mutant(None) if not names else {"claims": [], "tests": []}
    if baseline["claims"] or baseline["tests"]:
        print(f"the unbroken package fails already: {baseline['claims']} {baseline['tests']}")
        return 1
    old = json.loads(RESULTS.read_text())["mutants"] if names and RESULTS.exists() else []
    rows = {row["name"]: row for row in old}
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            rows[mutant.name] = try_mutant(mutant)
            ordered = [rows[m.name] for m in MUTANTS if m.name in rows]
            print(mutant.name, rows[mutant.name]["killed"], file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps({"tests": TESTS, "mutants": ordered}, indent=1) + "\n")
    print(table(ordered))
    survivors = [row["name"] for row in ordered if not row["killed"]]
    print(f"{len(ordered) - len(survivors)} of {len(ordered)} killed; survivors: {survivors}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
