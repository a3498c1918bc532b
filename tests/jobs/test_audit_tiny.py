"""Audits of short fine-tunes of demo:tiny: the task that breaks its refusals, and one that leaves them alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiltmeter import demo
from tiltmeter.demo.tiny import encode
from tiltmeter.jobs.audit import AuditOptions, audit


@pytest.mark.parametrize(
    ("name", "rate", "kinds"), [("copy", 1e-3, {"damaged", "collapsed"}), ("known", 1e-4, {"held"})]
)
def test_what_a_short_fine_tune_did(tmp_path, name, rate, kinds):
    """At 1e-3 even the known task costs demo:tiny some refusals (88 % left of 100 %), and the audit says damaged."""
    model = AutoModelForCausalLM.from_pretrained(demo.model("demo:tiny").folder)
    rows = demo.rows(f"demo:tiny-{name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(60):
        batch = [rows[(step * 16 + i) % len(rows)] for i in range(16)]
        loss = model(**encode([(row["prompt"], row["completion"]) for row in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    options = AuditOptions(max_safety=32, response_tokens=8, rank=2, localise=False, alphas=())
    record = audit("demo:tiny", str(tmp_path / "tuned"), "demo:tiny-safety", options=options).record
    assert record["verdict"]["kind"] in kinds, record["verdict"]["text"]
    assert (record["measurements"]["safety_kl"]["value"] > 1) == (name == "copy")
