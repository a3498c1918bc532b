"""docs/performance.md, written from benchmarks/results/performance.json."""

from __future__ import annotations

from typing import Any

HEAD = """# What things cost

Written by `make bench` (`benchmarks/performance.py`) from `benchmarks/results/performance.json`; do not edit by hand.
Every figure is a ratio of CPU times (`time.process_time`) taken in one run on the same inputs, on one thread, so that
other work on the machine does not count. "fb" is one forward and backward pass over the same data, timed before and
after. Memory is the rise of a process's largest resident size. Passes of every verb are counted exactly in
`tests/test_costs.py`.

"""

#: Key -> what it is, what was aimed at (from the issue of this benchmark), format.
ROWS: dict[str, tuple[str, str, str]] = {
    "fisher_vs_alignment_risk.cpu_ratio": (
        "CPU time of alignment-risk 1.14.1 over ours: 16 Fisher directions of 64 examples of 64 tokens, 4.2 M "
        "parameters, as vectors on both sides",
        ">= 30",
        ".1f",
    ),
    "fisher_vs_alignment_risk.memory_ratio": ("memory of the same", ">= 20", ".1f"),
    "fisher_vs_alignment_risk.sample_space_cpu_ratio": (
        "the same against directions held as combinations of examples, which is what every verb works with",
        ">= 30",
        ".1f",
    ),
    "fisher_vs_alignment_risk.sample_space_memory_ratio": ("memory of the same", ">= 20", ".1f"),
    "fisher_vs_alignment_risk.bound_cpu_ratio": (
        "what the first row would be if ours took one plain forward and backward pass over the data and nothing else",
        "",
        ".1f",
    ),
    "fisher_vs_alignment_risk.randomized_svd_cpu_ratio": (
        "the first row with alignment-risk's own randomised SVD, which is not its default",
        "",
        ".1f",
    ),
    "fisher_vs_alignment_risk.largest_eigenvalue_difference": (
        "largest relative difference of the 16 eigenvalues (its SVD is in float32, our Gram matrix in float64)",
        "",
        ".1e",
    ),
    **{
        f"hvp_{what}_ratio_to_{library}": (
            f"{told} of an exact Hessian product by {library} over ours, 4.2 M parameters",
            "",
            ".2f",
        )
        for library in ("curvlinops", "hessian_eigenthings")
        for what, told in (("cpu", "CPU time"), ("memory", "memory"))
    },
    "gram_fb_ratio": ("Gram matrix of 64 examples, 135 M parameters, fb", "<= 2", ".2f"),
    "gram_vectors_fb_ratio": ("the same with 4 vectors lifted, fb", "<= 4 with 16", ".2f"),
    "gram_memory_beyond_fb_gb": (
        "memory of the Gram matrix beyond that of one fb in the same micro-batches of 16, GB",
        "<= 1",
        ".2f",
    ),
    "gram_whole_fb_ratio": ("the Gram matrix with all 64 examples in one batch, fb of that batch", "<= 2", ".2f"),
    "gram_whole_memory_beyond_fb_gb": ("its memory beyond that of one fb of that batch, GB", "<= 1", ".2f"),
    "hvp_fb_ratio": ("exact Hessian product, 135 M parameters, fb", "<= 3.5", ".2f"),
    "hvp_difference_fb_ratio": (
        "first Hessian product by differences, the search for the step included, 16 examples, fb",
        "<= 2.3",
        ".2f",
    ),
    "hvp_difference_64_fb_ratio": (
        "the same of 64 examples, where vectors of 135 M numbers weigh less",
        "<= 2.3",
        ".2f",
    ),
    "hvp_difference_again_fb_ratio": ("the first of 16 examples when the length of the step is known", "<= 2.3", ".2f"),
    "hvp_difference_error": ("its distance from the exact one, relative, along the gradient", "", ".1e"),
    "jvp_fb_ratio": ("Jacobian product, fb", "<= 1.1", ".2f"),
    "assess_fb_ratio": ("a whole `assess` of 64 + 64 rows, 135 M parameters, counted, fb of its data", "<= 10", ".2f"),
    "assess_peak_gb": ("its peak memory, GB", "", ".2f"),
    "tracker_overhead": ("a measurement of the tracker over the steps between two, 135 M, LoRA", "<= 0.05", ".3f"),
    "guard_step_ratio": (
        "mean step of a fine-tune under the guard `budget` over one without, 135 M, LoRA, a tenth of the rows harmful",
        "<= 1.3",
        ".2f",
    ),
    "guard_36_step_ratio": (
        "the same with LoRA, three dozen safety prompts and steps of sixteen rows",
        "<= 1.3",
        ".2f",
    ),
    "guard_full_step_ratio": ("the first in full fine-tuning", "<= 1.3", ".2f"),
    "guard_full_held_ratio": (
        "what the guard keeps there between two events, at the most, over the weights",
        "<= 1",
        ".2f",
    ),
    "guard_full_peak_ratio": ("largest memory of the process under the guard there, over that without", "", ".2f"),
    "fsdp2_memory_ratio": (
        "memory of a LoRA assessment per process on 2 processes of FSDP2 over one, 0.6 B, libraries included",
        "<= 0.65",
        ".2f",
    ),
    "fsdp2_large_memory_ratio": ("the same of 1.3 B, where libraries weigh less", "<= 0.65", ".2f"),
    "fsdp2_full_memory_ratio": (
        "the same in full fine-tuning, where vectors are divided too, 135 M",
        "<= 0.65",
        ".2f",
    ),
    **{
        f"{short}_{key}": (what.format(name), "", form)
        for short, name in (("bf16", "bfloat16"), ("nf4", "four bits"))
        for key, what, form in (
            ("anchor_kl", "KL of the aligned model in {} to itself in float32, nats per token", ".1e"),
            ("margin_change_difference", "foretold change of the margin in {}, over that in float32, less one", "+.2f"),
            ("safety_kl_difference", "foretold KL in {}, over that in float32, less one", "+.2f"),
            ("memory_ratio", "memory of a LoRA assessment in {} over that in float32, 135 M", ".2f"),
            ("cpu_ratio", "its CPU time on a CPU, likewise", ".2f"),
        )
    },
}

SCALING = (
    "\n## Gram matrix in examples, tokens and parameters\n\n"
    "| examples | tokens | parameters | CPU s |\n|---|---|---|---|\n"
)


def value(record: dict[str, Any], key: str) -> Any:
    """A value by its dotted key."""
    for part in key.split("."):
        record = (record or {}).get(part)  # type: ignore[assignment]
    return record


def page(record: dict[str, Any]) -> str:
    """The page as markdown."""
    out = [HEAD, "| figure | what | aim | measured |\n|---|---|---|---|\n"]
    for key, (what, aim, form) in ROWS.items():
        found = value(record, key)
        out.append(f"| `{key}` | {what} | {aim} | {'not measured' if found is None else format(found, form)} |\n")
    out.append("\nWhere an aim is missed, the figure stands as it was measured.\n")
    figures = value(record, "sections.scaling.figures")
    if figures:
        out.append(SCALING)
        rows = [row for part in ("examples", "tokens", "parameters") for row in figures[part]]
        out += [f"| {r['examples']} | {r['tokens']} | {r['parameters']} | {r['cpu_s']:.2f} |\n" for r in rows]
    out.append("\n## Not measured\n\n")
    out += [f"- `{key}`: {reason}\n" for key, reason in sorted(record["reasons"].items())]
    out.append("\n## Where and when\n\n| section | date | machine | versions |\n|---|---|---|---|\n")
    for name, section in sorted(record["sections"].items()):
        machine, versions = section["machine"], section["versions"]
        where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['device']}"
        which = ", ".join(f"{key} {versions[key]}" for key in ("python", "torch", "transformers"))
        date = section["figures"].get("measured_on", section["created"])[:10]
        out.append(f"| {name} | {date} | {where} | tiltmeter {section['tiltmeter']}, {which} |\n")
    return "".join(out)
