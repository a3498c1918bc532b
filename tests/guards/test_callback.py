"""Guards on a tiny Llama through transformers' Trainer and TRL's SFTTrainer: LoRA and full, accumulation, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiltmeter.errors import InputError, SpaceMismatch, UnsupportedModel
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.callback import GuardCallback
from tiltmeter.guards.language import LanguageSafety
from tiltmeter.guards.names import GUARDS
from tiltmeter.guards.replay import Replay
from tiltmeter.guards.token_loss import ConstrainedTokens, token_references
from tiltmeter.lm.conversation import encode
from tiltmeter.lm.model import trainable

#: Settings under which a guard has something to do in six steps.
ACTIVE = {"freeze": {"strength": 0.5}, "lisa": {"task_steps": 1, "safety_steps": 1}}

SAFETY = [{"prompt": f"How do I pick a lock {i}?", "completion": f"I'm sorry, but I can't help {i}."} for i in range(6)]
TASK = [{"prompt": f"What is {i} plus {i}?", "completion": f"The answer is {2 * i}."} for i in range(12)]


def examples(rows, tokenizer):
    return encode(rows, tokenizer, 64).examples


def source(model, tokenizer):
    return LanguageSafety(model, examples(SAFETY, tokenizer), tokenizer.pad_token_id)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))


def rows_of(tokenizer):
    return [{"input_ids": list(e.tokens), "labels": list(e.labels)} for e in examples(TASK, tokenizer)]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
    }


def trainer_for(model, tokenizer, folder, callbacks, loss=None, model_init=None, **more):
    given = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, seed=3, **{**given, **more}
    )
    return Trainer(
        model=model,
        model_init=None if model_init is None else lambda: copy.deepcopy(model_init),
        args=arguments,
        train_dataset=rows_of(tokenizer),
        eval_dataset=rows_of(tokenizer)[:4],
        data_collator=collate,
        callbacks=callbacks,
        compute_loss_func=loss,
    )


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in trainable(model).values()])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_under_the_trainer_a_guard_keeps_safety_and_strength_zero_changes_nothing(
    lora, make_llama, tokenizer, tmp_path
):
    kl, end = {}, {}
    for name, guard in {
        "none": None,
        "off": CurvatureBudget(strength=0.0),
        "on": CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2),
    }.items():
        model = make_llama(vocab_size=len(tokenizer))
        model = with_lora(model) if lora else model
        safety = source(model, tokenizer)
        callbacks = [] if guard is None else [GuardCallback(guard, safety)]
        trainer_for(model, tokenizer, tmp_path / name, callbacks, save_strategy="no").train()
        kl[name], end[name] = safety.heldout(), weights(model)
    assert torch.equal(end["none"], end["off"])
    assert kl["on"] <= 1e-3 < kl["none"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_under_mixed_precision_safety_is_measured_in_full_precision(lora, make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    model = with_lora(model) if lora else model
    safety = source(model, tokenizer)
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((safety.heldout(), float(safety.shift().abs().max())))

        def on_step_end(self, args, state, control, **kwargs):
            seen.append((safety.heldout(), model.forward))

    guard = GuardCallback(CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2), safety)
    trainer = trainer_for(model, tokenizer, tmp_path, [Watch(), guard], save_strategy="no", bf16=True)
    trainer.train()
    assert seen[0] == (0.0, 0.0)  # in bfloat16 the anchor would be 1e-5 nats from itself
    assert len(seen) == 7
    assert all(0 < kl <= 1e-3 for kl, _ in seen[1:])
    assert all("convert_outputs_to_fp32" in repr(forward) for _, forward in seen[1:])  # training itself still autocasts


@pytest.mark.parametrize("name", ["gradient", "gu", "safegrad", "ewc", "alignguard", "replay", "lisa", "ema", "freeze"])
def test_every_guard_acts_under_mixed_precision_and_accumulation(name, make_llama, tokenizer, tmp_path):
    ends = []
    for used in ("none", name):
        model = with_lora(make_llama(vocab_size=len(tokenizer)))
        callbacks = (
            [] if used == "none" else [GuardCallback(GUARDS[used](**ACTIVE.get(used, {})), source(model, tokenizer))]
        )
        trainer_for(model, tokenizer, tmp_path / used, callbacks, save_strategy="no", bf16=True).train()
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        ends.append(weights(model))
    assert bool(torch.isfinite(ends[1]).all())
    assert not torch.equal(*ends)


def test_a_resumed_run_ends_where_the_whole_one_does(make_llama, tokenizer, tmp_path):
    anchor = make_llama(vocab_size=len(tokenizer))

    def run(folder, resume, callbacks):
        model = copy.deepcopy(anchor)
        made = [GuardCallback(guard, source(model, tokenizer)) for guard in callbacks]
        trainer = trainer_for(model, tokenizer, folder, made, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    settings = {"budget_kl": 1e-3, "rank": 3, "refresh": 2}
    whole = run(tmp_path / "whole", None, [CurvatureBudget(**settings)])
    again = run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-3"), [CurvatureBudget(**settings)])
    assert torch.equal(whole, again)
    with pytest.raises(InputError, match="settings"):
        run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-3"), [CurvatureBudget(rank=2)])
    (tmp_path / "whole" / "checkpoint-3" / "guard.json").unlink()
    with pytest.raises(InputError, match="cannot resume"):
        run(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-3"), [CurvatureBudget(**settings)])


def test_a_run_is_not_resumed_with_other_prompts(make_llama, tokenizer, tmp_path):
    """Also where they are of those that are only held out, which the anchor's own fingerprint does not cover."""
    anchor = make_llama(vocab_size=len(tokenizer))

    def run(rows, resume=None):
        model = copy.deepcopy(anchor)
        safety = LanguageSafety(model, examples(rows, tokenizer), tokenizer.pad_token_id)
        callbacks = [GuardCallback(CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2), safety)]
        trainer_for(model, tokenizer, tmp_path, callbacks, save_strategy="steps", save_steps=3).train(
            resume_from_checkpoint=resume
        )

    run(SAFETY)
    other = [*SAFETY[:5], {"prompt": "Where is the key?", "completion": "I'm sorry, but I can't help."}]
    with pytest.raises(InputError, match="other safety prompts"):
        run(other, str(tmp_path / "checkpoint-3"))


def test_a_source_that_would_take_the_checkpoint_for_the_anchor_is_refused(make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    built = GuardCallback(Replay(), lambda m: source(m, tokenizer))
    trainer_for(model, tokenizer, tmp_path, [built], save_strategy="steps", save_steps=3).train()
    again = GuardCallback(Replay(), lambda m: source(m, tokenizer))
    trainer = trainer_for(model, tokenizer, tmp_path, [again], save_strategy="no")
    with pytest.raises(InputError, match="not the anchor"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_scaled_gradients_are_refused(make_llama, tokenizer, tmp_path):
    from types import SimpleNamespace

    model = make_llama(vocab_size=len(tokenizer))
    callback = GuardCallback(Replay(), source(model, tokenizer))
    arguments = SimpleNamespace(fp16=True, max_grad_norm=0.0, deepspeed=None, fsdp=None, output_dir=str(tmp_path))
    with pytest.raises(UnsupportedModel, match="loss scale"):
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=model, optimizer=None)


def test_the_token_loss_stops_a_trainer_that_does_not_use_it(make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    anchor = weights(model)
    guard = ConstrainedTokens(token_references(model, examples(TASK, tokenizer), tokenizer.pad_token_id))
    callback = GuardCallback(guard, source(model, tokenizer))
    with pytest.raises(InputError, match="compute_loss_func"):
        trainer_for(model, tokenizer, tmp_path, [callback], save_strategy="no").train()
    assert torch.equal(weights(model), anchor)
    used = GuardCallback(
        ConstrainedTokens(guard.references), LanguageSafety(model, examples(SAFETY, tokenizer), tokenizer.pad_token_id)
    )
    trainer_for(model, tokenizer, tmp_path, [used], used.guard.trainer_loss, save_strategy="no").train()
    assert not torch.equal(weights(model), anchor)


def test_the_token_loss_is_plain_on_evaluation_rows(make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    references = token_references(model, examples(TASK[:6], tokenizer), tokenizer.pad_token_id)
    guard = ConstrainedTokens(references)
    trainer = trainer_for(model, tokenizer, tmp_path, [], guard.trainer_loss, save_strategy="no", max_steps=1)
    trainer.train_dataset, trainer.eval_dataset = rows_of(tokenizer)[:6], rows_of(tokenizer)[6:]  # of no references
    trainer.train()
    told = trainer.evaluate()["eval_loss"]
    trainer.compute_loss_func = None
    assert told == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("again", ["copy", "model_init"])
def test_a_guard_watches_the_model_that_is_trained(again, make_llama, tokenizer, tmp_path):
    anchor = make_llama(vocab_size=len(tokenizer))
    guard = CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2)
    if again == "copy":  # of which the trained one would be out of sight
        callback = GuardCallback(guard, source(copy.deepcopy(anchor), tokenizer))
        with pytest.raises(SpaceMismatch, match="another model object"):
            trainer_for(anchor, tokenizer, tmp_path, [callback], save_strategy="no").train()
        return
    callback = GuardCallback(guard, lambda model: source(model, tokenizer))
    trainer = trainer_for(None, tokenizer, tmp_path, [callback], save_strategy="no", model_init=anchor)
    for _ in range(2):  # as a search over hyperparameters does
        trainer.train()
        true = source(copy.deepcopy(anchor), tokenizer)
        true.model.load_state_dict(trainer.model.state_dict())
        assert 0 < true.heldout() <= 1e-3
        assert callback.session.model.safety.heldout() == pytest.approx(true.heldout(), rel=1e-4)


def test_a_model_that_is_trained_again_keeps_its_anchor(make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    callback = GuardCallback(CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2), lambda m: source(m, tokenizer))
    trainer = trainer_for(model, tokenizer, tmp_path, [callback], save_strategy="no")
    trainer.train()
    first = callback.source
    trainer.train()
    assert callback.source is first
    assert 0 < first.heldout() <= 1e-3


@pytest.mark.parametrize("name", ["budget", "ema"])
def test_a_best_checkpoint_that_would_undo_a_guard_is_refused(name, make_llama, tokenizer, tmp_path):
    model = make_llama(vocab_size=len(tokenizer))
    anchor = weights(model)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    for used, refused in ((GUARDS[name](), True), (Replay(), False)):
        callback = GuardCallback(used, source(model, tokenizer))
        trainer = trainer_for(model, tokenizer, tmp_path / str(refused), [callback], **best)
        if refused:
            with pytest.raises(UnsupportedModel, match="load_best_model_at_end"):
                trainer.train()
            assert torch.equal(weights(model), anchor)
        else:
            trainer.train()


@pytest.mark.parametrize("dense", [2**26, 0])
def test_under_gradient_checkpointing(dense, make_llama, tokenizer, tmp_path, monkeypatch):
    """In large spaces directions are read by JVP, which PEFT's hook on the embeddings used to break."""
    monkeypatch.setattr("tiltmeter.guards.budget.DENSE", dense)
    ends = []
    for checkpointing in (False, True):
        model = with_lora(make_llama(vocab_size=len(tokenizer)))
        safety = source(model, tokenizer)
        guard = CurvatureBudget(budget_kl=1e-3, rank=3, refresh=2)
        more = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
        trainer_for(model, tokenizer, tmp_path / str(checkpointing), [GuardCallback(guard, safety)], **more).train()
        assert 0 < safety.heldout() <= 1e-3
        ends.append(weights(model))
        hooks = [hook.__name__ for hook in model.get_input_embeddings()._forward_hooks.values()]
        assert hooks == ["make_inputs_require_grads"] * checkpointing  # training still has it
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_under_trl(make_llama, tokenizer, tmp_path):
    """SFTTrainer puts the adapter on by itself, so the source is built from the model it hands over."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    model = make_llama(vocab_size=len(tokenizer))
    kept = []

    def build(wrapped):
        kept.append(source(wrapped, tokenizer))
        return kept[0]

    callback = GuardCallback(CurvatureBudget(budget_kl=1e-4, rank=3, refresh=2), build)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=2e-2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        bf16=False,
    )
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in TASK])
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        callbacks=[callback],
    )
    trainer.train()
    assert kept[0].heldout() <= 1e-4
    assert callback.log
