"""What things cost, as ratios of CPU times taken in one run on the same inputs, on one thread.

    python benchmarks/performance.py                    every section
    python benchmarks/performance.py fisher products    some of them; the others stay as they were measured
    make bench                                          the same as the first

Sections (see `performance_parts.py`): fisher (4.2 M-parameter Llama of random weights against alignment-risk 1.14.1,
which gets an environment of its own, `.venv-alignment-risk`, with torch borrowed from ours), peers (Hessian products by
curvlinops and hessian-eigenthings, in `.venv-peers`), gram, products and difference_64
(SmolLM2-135M-Instruct), scaling, tracker, guard, guard_full, guard_36, assess (read off assess-cost-full.json), dtypes
(the aligned model in float32, bfloat16 and four bits), fsdp2, fsdp2_large and fsdp2_full. Every section goes into
benchmarks/results/performance.json and docs/performance.md as soon as it is done, with its own date.

Ratios with `fb` in their names are in forward+backward passes over the same data.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performance_page import page
from safetensors.torch import load_file

from tiltmeter.jobs.provenance import provenance
from tiltmeter.store import write_text

HERE = Path(__file__).parent
RESULT = HERE / "results" / "performance.json"
ASSESSMENT = HERE / "results" / "assess-cost-full.json"
PAGE = HERE.parent / "docs" / "performance.md"
RIVAL = HERE.parent / ".venv-alignment-risk"
PEERS = HERE.parent / ".venv-peers"
PARTS = HERE / "performance_parts.py"

NO_GPU = "there was no GPU on the machine that this was measured on"

#: Figures of the issue of this benchmark that no section here measures.
UNMEASURED = {
    "bf16_7b_lora_assess": NO_GPU,
    "four_bit_on_a_gpu": NO_GPU,
    "gram_16_vectors_fb_ratio": "16 vectors of 135 M numbers take 8.6 GB, which the machine could not spare; "
    "gram_vectors_fb_ratio is with 4 of them, and with 16 on the 4.2 M-parameter model",
}

#: Of the section peers, with what they import at run time.
PEER_PACKAGES = (
    "curvlinops-for-pytorch==3.0.1",
    "hessian-eigenthings==1.0.0a5",
    "backpack-for-pytorch==1.7.1",
    "einconv",
    "einops",
    "jaxtyping",
    "linear_operator==0.6.1",
    "unfoldNd",
    "wadler_lindig",
)

Figures = dict[str, Any]


def alone(*words: str, python: Path = Path(sys.executable), script: Path = PARTS) -> Figures:
    """Run a part in a process of its own, on one thread; its last line is what it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(script), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def environment(folder: Path, *packages: str) -> Path:
    """Python of an environment with these packages, not what they ask for; torch and the rest are those of this one."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        ours = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
        (site / "borrowed.pth").write_text(f"{ours}\n", encoding="utf-8")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([str(python), *install, *packages], check=True)
        (folder / "complete").touch()
    return python


def fisher() -> Figures:
    """Top 16 Fisher directions of 64 examples, ours and theirs; their numbers over ours."""
    inputs = RIVAL.parent / ".venv-alignment-risk-inputs"
    python = environment(RIVAL, "alignment-risk==1.14.1")
    alone("fisher-inputs", str(inputs))
    found = {name: alone(f"fisher-{name}", str(inputs)) for name in ("directions", "vectors")}
    for method in ("svd", "randomized_svd"):
        found[method] = alone(str(inputs), method, python=python, script=HERE / "performance_rival.py")
    theirs, ours = found["svd"], found["vectors"]
    out: Figures = {"measured": {name: _without(part, "eigenvalues") for name, part in found.items()}}
    for prefix, part in (("", ours), ("sample_space_", found["directions"])):
        out[f"{prefix}cpu_ratio"] = theirs["cpu_s"] / part["cpu_s"]
        out[f"{prefix}memory_ratio"] = theirs["extra_peak_gb"] / part["extra_peak_gb"]
    out["bound_cpu_ratio"] = theirs["cpu_s"] / found["directions"]["forward_backward_cpu_s"]
    out["randomized_svd_cpu_ratio"] = found["randomized_svd"]["cpu_s"] / ours["cpu_s"]
    out["largest_eigenvalue_difference"] = max(
        abs(a / b - 1) for a, b in zip(theirs["eigenvalues"], ours["eigenvalues"], strict=True)
    )
    return out


def peers() -> Figures:
    """One Hessian product of a small Llama by others; CPU time and memory over ours."""
    inputs = str(RIVAL.parent / ".venv-alignment-risk-inputs" / "peers")
    python = environment(PEERS, *PEER_PACKAGES)
    about = alone("peers-inputs", inputs)
    ours = alone("peers-ours", inputs)
    out: Figures = {**about, "ours": ours}
    want = load_file(f"{inputs}/ours.safetensors")["exact"].double()
    for library in ("curvlinops", "hessian-eigenthings"):
        theirs = alone(inputs, library, python=python, script=HERE / "performance_peers.py")
        found = load_file(f"{inputs}/{library}.safetensors")["product"].double()
        key = library.replace("-", "_")
        out[key] = {**theirs, "difference": float((found - want).norm() / want.norm())}
        out[f"{key}_cpu_ratio"] = theirs["cpu_s"] / ours["exact_cpu_s"]
        out[f"{key}_memory_ratio"] = theirs["extra_peak_gb"] / ours["extra_peak_gb"]
    return out


def gram(micro_batch: int) -> Figures:
    """Gram matrix of 64 examples of the 135 M-parameter model, and four vectors lifted from it."""
    found = alone("gram", str(micro_batch))
    found["micro_batch"] = micro_batch
    found["forward_backward_extra_peak_gb"] = alone("gram-passes", str(micro_batch))["extra_peak_gb"]
    found["memory_beyond_fb_gb"] = found["extra_peak_gb"] - found["forward_backward_extra_peak_gb"]
    return found


def dtypes() -> Figures:
    """One LoRA assessment of the aligned model with its weights in float32, bfloat16 and four bits."""
    folder = str(RIVAL.parent / ".venv-alignment-risk-inputs" / "dtypes")
    alone("dtypes-model", folder)
    held = {name: alone("dtypes-assess", folder, name) for name in ("float32", "bfloat16", "nf4")}
    out: Figures = dict(held)
    whole = held["float32"]
    for name, short in (("bfloat16", "bf16"), ("nf4", "nf4")):
        out[f"{short}_anchor_kl"] = alone("dtypes-kl", folder, name)["kl"]
        for key in ("margin_change", "safety_kl"):
            out[f"{short}_{key}_difference"] = held[name][key] / whole[key] - 1
        out[f"{short}_memory_ratio"] = (held[name]["peak_gb"] - held[name]["before_gb"]) / (
            whole["peak_gb"] - whole["before_gb"]
        )
        out[f"{short}_cpu_ratio"] = held[name]["cpu_s"] / whole["cpu_s"]
    return out


def fsdp2(width: int) -> Figures:
    """A LoRA assessment of random weights in one process and in two that hold half of the weights each.

    0.6 billion weights at a width of 1280, 1.3 billion at 1856; what libraries take is the same with both.
    """
    folder = str(RIVAL.parent / ".venv-alignment-risk-inputs" / f"fsdp2-{width}")
    try:
        return {
            "parameters": alone("fsdp2-model", folder, str(width))["parameters"],
            **_divided("fsdp2-assess", folder),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes of weights


def fsdp2_full() -> Figures:
    """A full fine-tuning assessment of the 135 M-parameter model, likewise: vectors are divided too."""
    folder = RIVAL.parent / ".venv-alignment-risk-inputs" / "fsdp2-full"
    folder.mkdir(parents=True, exist_ok=True)
    return _divided("fsdp2-full", str(folder))


def _divided(part: str, folder: str) -> Figures:
    """One part in one process and in two: the largest size of a process."""
    one = alone(part, folder)
    settings = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *settings, "--mixed_precision", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "--dynamo_backend", "no", str(PARTS), part, folder]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    two = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    most = max(each["peak_gb"] for each in two)
    beyond = max(each["peak_gb"] - each["before_gb"] for each in two) / (one["peak_gb"] - one["before_gb"])
    same = max(abs(each["kl"] / one["kl"] - 1) for each in two)
    return {
        "one": one,
        "two": two,
        "memory_ratio": most / one["peak_gb"],
        "memory_ratio_beyond_libraries": beyond,
        "largest_difference": same,
    }


def guard(regime: str, prompts: int = 12, rows: int = 8, steps: str = "") -> Figures:
    """Mean step of a fine-tune and its memory under `budget`, over those of one without."""
    free, held = (alone("guard", regime, name, str(prompts), str(rows), steps) for name in ("none", "budget"))
    return {
        "safety_prompts": prompts,
        "none": free,
        "budget": held,
        "step_ratio": held["step_cpu_s"] / free["step_cpu_s"],
        "held_ratio": held["held_gb"] / held["trained_gb"],
        "peak_ratio": held["peak_gb"] / free["peak_gb"],
    }


def assess() -> Figures:
    """One whole assessment of the 135 M-parameter model, counted; benchmarks/assess_cost.py measures it."""
    told = json.loads(ASSESSMENT.read_text(encoding="utf-8"))
    return {
        "fb_ratio": told["cost"]["fb_equivalents"],
        "peak_gb": told["peak_gb"],
        "cpu_threads": told["threads"],
        "options": {key: told["options"][key] for key in ("max_safety", "max_tuning", "max_length", "rank")},
        "tokens": told["supervised_and_context_tokens"],
        "measured_on": told["created"],
    }


SECTIONS: dict[str, Callable[[], Figures]] = {
    "fisher": fisher,
    "peers": peers,
    "gram": lambda: gram(16),
    "gram_whole": lambda: gram(64),
    "products": lambda: alone("products"),
    "difference_64": lambda: alone("products", "64", "hvp_difference"),
    "scaling": lambda: alone("scaling"),
    "tracker": lambda: alone("tracker"),
    "guard": lambda: guard("lora"),
    "guard_full": lambda: guard("full"),
    "guard_36": lambda: guard("lora", 36, 16, "12"),
    "assess": assess,
    "dtypes": dtypes,
    "fsdp2": lambda: fsdp2(1280),
    "fsdp2_large": lambda: fsdp2(1856),
    "fsdp2_full": fsdp2_full,
}

#: Key of the result -> section, key there.
HEADLINES = {
    "hvp_cpu_ratio_to_curvlinops": ("peers", "curvlinops_cpu_ratio"),
    "hvp_memory_ratio_to_curvlinops": ("peers", "curvlinops_memory_ratio"),
    "hvp_cpu_ratio_to_hessian_eigenthings": ("peers", "hessian_eigenthings_cpu_ratio"),
    "hvp_memory_ratio_to_hessian_eigenthings": ("peers", "hessian_eigenthings_memory_ratio"),
    "gram_fb_ratio": ("gram", "fb_ratio"),
    "gram_vectors_fb_ratio": ("gram", "with_vectors_fb_ratio"),
    "gram_memory_beyond_fb_gb": ("gram", "memory_beyond_fb_gb"),
    "gram_whole_fb_ratio": ("gram_whole", "fb_ratio"),
    "gram_whole_memory_beyond_fb_gb": ("gram_whole", "memory_beyond_fb_gb"),
    "hvp_fb_ratio": ("products", "hvp_fb_ratio"),
    "hvp_difference_fb_ratio": ("products", "hvp_difference_fb_ratio"),
    "hvp_difference_64_fb_ratio": ("difference_64", "hvp_difference_fb_ratio"),
    "hvp_difference_again_fb_ratio": ("products", "hvp_difference_again_fb_ratio"),
    "hvp_difference_error": ("products", "hvp_difference_error"),
    "jvp_fb_ratio": ("products", "jvp_fb_ratio"),
    "assess_fb_ratio": ("assess", "fb_ratio"),
    "assess_peak_gb": ("assess", "peak_gb"),
    "tracker_overhead": ("tracker", "overhead"),
    "guard_step_ratio": ("guard", "step_ratio"),
    "guard_full_step_ratio": ("guard_full", "step_ratio"),
    "guard_36_step_ratio": ("guard_36", "step_ratio"),
    "guard_full_held_ratio": ("guard_full", "held_ratio"),
    "guard_full_peak_ratio": ("guard_full", "peak_ratio"),
    "fsdp2_memory_ratio": ("fsdp2", "memory_ratio"),
    "fsdp2_large_memory_ratio": ("fsdp2_large", "memory_ratio"),
    "fsdp2_full_memory_ratio": ("fsdp2_full", "memory_ratio"),
    **{
        f"{short}_{key}": ("dtypes", f"{short}_{key}")
        for short in ("bf16", "nf4")
        for key in ("anchor_kl", "margin_change_difference", "safety_kl_difference", "memory_ratio", "cpu_ratio")
    },
}
FISHER = (
    "cpu_ratio",
    "memory_ratio",
    "sample_space_cpu_ratio",
    "sample_space_memory_ratio",
    "bound_cpu_ratio",
    "randomized_svd_cpu_ratio",
    "largest_eigenvalue_difference",
)


def assembled(sections: dict[str, Figures]) -> Figures:
    """The record: headline figures, null with a reason where there is none, and the sections they come from."""
    reasons = dict(UNMEASURED)
    out: Figures = {"threads": 1, "sections": sections, "reasons": reasons}
    for key, (section, inner) in HEADLINES.items():
        out[key] = sections.get(section, {}).get("figures", {}).get(inner)
        if out[key] is None:
            told = sections.get(section, {}).get("figures", {}).get("reason")
            reasons[key] = told or f"the section {section} was not run" + (" since" if section in sections else " yet")
    figures = sections.get("fisher", {}).get("figures", {})
    out["fisher_vs_alignment_risk"] = {key: figures.get(key) for key in FISHER}
    if not figures:
        reasons["fisher_vs_alignment_risk"] = "the section fisher was not run yet"
    return out


def _without(part: Figures, key: str) -> Figures:
    return {name: value for name, value in part.items() if name != key}


def main() -> None:
    """Run the sections that are named, or all, and write after each."""
    names = sys.argv[1:] or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        sys.exit(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    for name in names:
        begin = time.perf_counter()
        figures = SECTIONS[name]()
        stored = json.loads(RESULT.read_text(encoding="utf-8"))["sections"] if RESULT.exists() else {}
        stored[name] = {**provenance("cpu"), "figures": figures}
        write_text(RESULT, json.dumps(assembled(stored), indent=1, sort_keys=True, allow_nan=False) + "\n")
        write_text(PAGE, page(json.loads(RESULT.read_text(encoding="utf-8"))))
        print(f"{name:<10} {time.perf_counter() - begin:5.0f} s  {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
