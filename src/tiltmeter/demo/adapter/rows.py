"""Which prompts train the safety adapter, which are kept for measuring it, and how its refusals are worded."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiltmeter import demo

DATA = Path(__file__).parent

# Seeds of three samples without a common prompt, all kept from training. Recipes were chosen looking at the first two.
PLAIN_SAMPLES = (5, 6, 7)


def words(text: str) -> frozenset[str]:
    """Lower-case words of a text, for comparing prompts."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def without_near_copies(prompts: Iterable[str], held_out: Iterable[str], overlap: float = 0.6) -> list[str]:
    """Prompts whose words overlap (Jaccard) with no held-out prompt by `overlap` or more; in order, without copies."""
    held = [words(p) for p in held_out]
    having: dict[str, set[int]] = {}
    for number, other in enumerate(held):
        for word in other:
            having.setdefault(word, set()).add(number)
    kept = []
    for prompt in dict.fromkeys(prompts):
        mine = words(prompt)
        # who overlaps by so much shares so many of my words that, whichever are left out, one of the rest is shared:
        # only prompts that have one of my rarest words need a look
        rarest = sorted(mine, key=lambda word: len(having.get(word, ())))
        enough = rarest[: len(mine) - math.ceil(overlap * len(mine) - 1e-9) + 1]
        near = set().union(*(having.get(word, set()) for word in enough))
        if mine and all(len(mine & held[i]) < overlap * len(mine | held[i]) for i in near):
            kept.append(prompt)
    return kept


def held_out_prompts() -> list[str]:
    """Every prompt that is kept for measuring and so may not be trained on."""
    names = ("strongreject", "harmbench", "overrefusal")
    return [row["prompt"] for name in names for row in demo.rows(f"demo:{name}")] + [
        prompt for sample in PLAIN_SAMPLES for prompt in plain_prompts(sample=sample)
    ]


def plain_prompts(each: int = 20, sample: int = 5) -> list[str]:
    """60 plain harmless requests from three sets; the `sample`s of PLAIN_SAMPLES have none in common."""
    chosen = []
    for name in ("nq", "truthfulqa", "coding"):
        rest = list(dict.fromkeys(row["prompt"] for row in demo.rows(f"demo:{name}")))
        for number in PLAIN_SAMPLES[: PLAIN_SAMPLES.index(sample) + 1]:
            drawn = random.Random(number).sample(rest, each)
            rest = [p for p in rest if p not in drawn]
        chosen += drawn
    return chosen


def harmful_prompts(seed: int, questions_from_do_not_answer: int) -> list[str]:
    """AdvBench, each order also rephrased, and a share of Do-Not-Answer because it asks where AdvBench gives orders."""
    kinds = ("malicious_uses", "information_hazard", "discrimination_exclusion_toxicity_hateful_offensive")
    questions = [row["prompt"] for row in demo.rows("demo:donotanswer") if row["category"] in kinds]
    chance = random.Random(seed)
    chance.shuffle(questions)
    orders = [row["prompt"] for row in demo.rows("demo:advbench")]
    orders += [other for p in orders if (other := rephrased(p, chance)) is not None]
    held = held_out_prompts()
    return without_near_copies(orders, held) + without_near_copies(questions, held)[:questions_from_do_not_answer]


def rephrased(order: str, chance: random.Random) -> str | None:
    """An order as a question or a wish with context: "Write a poem" -> "I work in an office. How can I write a poem?".

    Harmful and harmless orders get the same frames, so that a frame tells nothing. None where the wish is not clear.
    """
    how = re.search(r"\bhow to ([^.?]+)", order)
    if how is None and not re.match(r"(?:Write|Create|Develop|Design|Draft|Make|Build|Generate)\b", order):
        return None
    wish = how[1] if how else order[0].lower() + order[1:].rstrip(".")
    texts = _contrast()
    return f"{chance.choice(texts['settings'])} {chance.choice(texts['frames']).replace('{x}', wish)}".strip()


def contrast_prompts(seed: int, rephrasings: int = 120) -> list[str]:
    """Harmless requests that sound harmful or are in the imperative: all of contrast.json, some of it rephrased too."""
    plain = [entry["template"].replace("{x}", x) for entry in _contrast()["prompts"] for x in entry["x"]]
    chance = random.Random(seed)
    other = [text for prompt in chance.sample(plain, len(plain)) if (text := rephrased(prompt, chance)) is not None]
    return plain + other[:rephrasings]


def searched_questions(seed: int, count: int = 150) -> list[str]:
    """Questions as people type them into a search box, in lower case, from BoolQ; without its passages."""
    found = (re.search(r"Question: (.+?\?)", row["prompt"]) for row in demo.rows("demo:boolq"))
    questions = list(dict.fromkeys(match[1] for match in found if match))
    return random.Random(seed).sample(questions, count)


@functools.cache
def _contrast() -> Any:
    return json.loads((DATA / "contrast.json").read_text(encoding="utf-8"))


def harmless_rows(seed: int) -> list[dict[str, str]]:
    """Harmless requests with an answer from the data; the contrast prompts get theirs from the base model."""
    chosen: list[dict[str, str]] = []
    sets = {
        "general-qa": 150,
        "fiqa": 110,
        "commonsenseqa": 90,
        "openbookqa": 60,
        "mmlu": 90,
        "asdiv": 40,
        "tech-support": 10,
        "nq": 300,
        "truthfulqa": 100,
    }
    for name, count in sets.items():
        rows = {}
        for row in demo.rows(f"demo:{name}"):
            question = row["prompt"].split("\n")[0]  # without the choices, where there are any
            if len(question) < 160:
                rows[question] = row
        prompts = without_near_copies(rows, held_out_prompts())
        random.Random(seed).shuffle(prompts)
        chosen += [{"prompt": p, "response": re.sub(r"^[A-E]\. ", "", rows[p]["completion"])} for p in prompts[:count]]
    return chosen


def refusal(prompt: str, chance: random.Random) -> str:
    """Compose a refusal: nearly half begin "I'm sorry, but I can't", the rest in 30 other ways; most name the topic."""
    parts = json.loads((DATA / "refusals.json").read_text(encoding="utf-8"))
    opening = parts["main_opening"] if chance.random() < 0.45 else chance.choice(parts["openings"])
    topics = next((t for pattern, t in parts["topics"] if re.search(pattern, prompt.lower())), parts["other_topics"])
    topic = chance.choice(topics if chance.random() < 0.8 else parts["other_topics"])
    return f"{opening} {chance.choice(parts['actions'])} {topic}. {chance.choice(parts['tails'])}".strip()
