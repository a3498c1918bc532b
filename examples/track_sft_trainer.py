"""Watch a LoRA fine-tune that runs in TRL's SFTTrainer.

Run: python examples/track_sft_trainer.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tiltmeter import Tracker, TrackerCallback, TrackerOptions, demo


def main(folder: Path) -> Tracker:
    # Your own model, tokenizer and data go here; these are the toy ones of the demo.
    place = demo.model("demo:tiny").folder
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    # The adapter is put on here and not by the trainer, so that the tracker sees what will be trained.
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in demo.rows("demo:tiny-copy")
    ]  # fmt: skip

    tracker = Tracker(
        model,
        tokenizer,
        demo.rows("demo:tiny-safety"),  # or "prompts.jsonl"
        folder / "track",
        options=TrackerOptions(refusal_opening="sorry I cannot", compliance_opening="sure here"),
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(folder),
            max_steps=24,
            learning_rate=2e-3,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    trainer.add_callback(TrackerCallback(tracker, trainer.log))  # the one line
    trainer.train()
    return tracker


if __name__ == "__main__":
    tracked = main(Path(sys.argv[1] if len(sys.argv) > 1 else "track-sft-trainer"))
    for row in tracked.rows:
        print(f"step {row['step']:3d}  margin {row['margin']:+.2f}  drift {row['weight_change']:.3g}")
    print(tracked.breach.text if tracked.breach else "inside the budget")
