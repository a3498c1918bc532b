"""What `tiltmeter evaluate` and `tiltmeter audit` do between parsing and printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltmeter import store
from tiltmeter.commands import Ticker
from tiltmeter.jobs.audit import Audit, AuditOptions
from tiltmeter.jobs.audit import audit as run_audit
from tiltmeter.jobs.audit_words import lines_of as audit_lines
from tiltmeter.jobs.evaluate import EvaluateOptions, Evaluation
from tiltmeter.jobs.evaluate import evaluate as run_evaluate
from tiltmeter.jobs.evaluate_words import lines_of as evaluation_lines
from tiltmeter.jobs.judges import judge_of
from tiltmeter.lm.judging import Judge
from tiltmeter.report.result_page import write_result_page

__all__ = ["AuditOptions", "EvaluateOptions", "audit", "audit_lines", "evaluate", "evaluation_lines", "judge_of"]


def evaluate(
    model: str, given: Mapping[str, Any], options: EvaluateOptions, judge: Judge, out: Path | None, ticker: Ticker
) -> Evaluation:
    """Run one evaluation and store it."""
    if out is None:
        return run_evaluate(model, options=options, judge=judge, report=ticker.report, **given)
    with store.new_folder(out) as folder:
        result = run_evaluate(model, options=options, judge=judge, report=ticker.report, **given)
        write_result_page([result.record], folder / "index.html", f"Evaluation of {model}")
        store.write_record(folder, result.record, result.arrays)
    return result


def audit(
    base: str,
    tuned: str,
    given: Mapping[str, Any],
    options: AuditOptions,
    judge: Judge,
    out: Path | None,
    ticker: Ticker,
) -> Audit:
    """Run one audit and store it."""
    if out is None:
        return run_audit(base, tuned, options=options, judge=judge, report=ticker.report, **given)
    with store.new_folder(out) as folder:
        result = run_audit(base, tuned, options=options, judge=judge, report=ticker.report, **given)
        write_result_page([result.record], folder / "index.html", f"Audit of {tuned}")
        store.write_record(folder, result.record, result.arrays)
    return result
