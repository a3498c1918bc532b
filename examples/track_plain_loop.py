"""Watch a fine-tune in a plain PyTorch loop: tell the tracker of every step.

Run: python examples/track_plain_loop.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiltmeter import Tracker, TrackerOptions, demo


def main(folder: Path) -> Tracker:
    # Your own model, tokenizer and data go here; these are the toy ones of the demo.
    place = demo.model("demo:tiny").folder
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = demo.rows("demo:tiny-copy")

    tracker = Tracker(
        model,
        tokenizer,
        demo.rows("demo:tiny-safety"),  # or "prompts.jsonl"
        folder,
        options=TrackerOptions(refusal_opening="sorry I cannot", compliance_opening="sure here"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, 33):
        chats = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in rows[8 * step - 8 : 8 * step]
        ]
        batch = tokenizer.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.after_step(step, 1e-3, task_loss=loss.item(), tokens=batch["input_ids"].numel())
        if tracker.breach is not None:
            break
    return tracker


if __name__ == "__main__":
    tracked = main(Path(sys.argv[1] if len(sys.argv) > 1 else "track-plain-loop"))
    for row in tracked.rows:
        print(f"step {row['step']:3d}  margin {row['margin']:+.2f}  task loss {row['task_loss']}")
    print(tracked.breach.text if tracked.breach else "inside the budget")
