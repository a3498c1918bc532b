"""Watch a fine-tune that runs in transformers' Trainer: one line more than without.

Run: python examples/track_trainer.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tiltmeter import Budgets, Tracker, TrackerCallback, TrackerOptions, demo


def main(folder: Path) -> Tracker:
    # Your own model, tokenizer and data go here; these are the toy ones of the demo.
    place = demo.model("demo:tiny").folder
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    train = [encode(row, tokenizer) for row in demo.rows("demo:tiny-copy")]

    # The tracker measures the aligned model when it is made, so make it before training.
    tracker = Tracker(
        model,
        tokenizer,
        demo.rows("demo:tiny-safety"),  # or "prompts.jsonl"
        folder / "track",
        options=TrackerOptions(refusal_opening="sorry I cannot", compliance_opening="sure here"),
        budgets=Budgets(kl=0.05),
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=40,
            learning_rate=5e-4,
            save_steps=5,
            report_to="none",  # "tensorboard" and "wandb" get the measurements too
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.add_callback(TrackerCallback(tracker, trainer.log, stop=True))  # the one line
    trainer.train()
    return tracker


def encode(row: dict[str, str], tokenizer: AutoTokenizer) -> dict[str, list[int]]:
    prompt = [{"role": "user", "content": row["prompt"]}]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [{"role": "assistant", "content": row["completion"]}]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    labels = [-100] * len(asked) + whole[len(asked) :]
    return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}


if __name__ == "__main__":
    tracked = main(Path(sys.argv[1] if len(sys.argv) > 1 else "track-trainer"))
    for row in tracked.rows:
        print(f"step {row['step']:3d}  margin {row['margin']:+.2f}  safety KL {row['safety_kl']:.2g}")
    print(tracked.breach.text if tracked.breach else "inside the budget")
