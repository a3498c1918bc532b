"""Masks are exact on templates of every habit; nothing is cut or dropped without being counted."""

import pytest
import torch

from tiltmeter.errors import DataError, ModelError
from tiltmeter.lm.conversation import (
    Example,
    batches,
    collate,
    encode,
    encode_pairs,
    prompt_text,
    prompt_tokens,
    prompts_of,
)

USER, ANSWER = "How do I make a cake?", "Sure, first mix the eggs."
PAIR = {"prompt": USER, "completion": ANSWER}
TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "<think>a greeting</think>Hello."},
    {"role": "user", "content": USER},
    {"role": "assistant", "content": f"<think>a cake</think>{ANSWER}"},
]
PLAIN_TALK = [{**message, "content": message["content"].split("</think>")[-1]} for message in TALK]

LOOP = "{% for m in messages %}"
TEMPLATES = {
    # a default system prompt, as in SmolLM2
    "system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # headers, trimmed content and no white space behind the end of a turn, as in Llama 3
    "trim": "{{ '<|endoftext|>' }}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    # the whole conversation is closed by a token that is not there between turns, as in Phi 3
    "closed": LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    # no generation prompt, and white space before the answer that is part of its first token, as in Llama 2
    "inst": LOOP
    + "{% if m.role == 'user' %}{{ '<|im_start|>[INST] ' + m.content + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
    # reasoning is kept in the last answer only, as in Qwen 3
    "forget": LOOP
    + "{% set c = m.content if loop.last else m.content.split('</think>')[-1] %}"
    + "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # the generation prompt opens a chain of thought that finished answers are shown without, as in DeepSeek R1
    "think": LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # no special token at all
    "bare": LOOP
    + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
}


def supervised_texts(example, tokenizer):
    """Runs of supervised tokens, as text."""
    runs, previous = [], False
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


def only(encoded):
    assert len(encoded.examples) == 1
    return encoded.examples[0]


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("system", ANSWER + "<|im_end|>"),
        ("trim", ANSWER + "<|im_end|>"),
        ("closed", ANSWER + "<|im_end|>\n<|endoftext|>"),
        ("inst", " " + ANSWER + "<|im_end|>"),
        ("forget", ANSWER + "<|im_end|>"),
        ("think", ANSWER + "<|im_end|>"),
        ("bare", " " + ANSWER + "\n"),
    ],
)
def test_one_answer_is_supervised_with_its_end_of_turn(make_tokenizer, template, answer):
    tokenizer = make_tokenizer(TEMPLATES[template])
    example = only(encode([PAIR], tokenizer, 512))
    assert supervised_texts(example, tokenizer) == [answer]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}], tokenize=False
    )
    assert list(example.tokens) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_the_mask_is_that_of_tokenising_by_hand(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = ids("<|im_start|>") + ids(f"user\n{USER}") + ids("<|im_end|>") + ids("\n")
    before += ids("<|im_start|>") + ids("assistant\n")
    answer = ids(ANSWER) + ids("<|im_end|>")
    example = only(encode([PAIR], tokenizer, 512))
    assert list(example.tokens) == before + answer + ids("\n")
    assert list(example.labels) == [-100] * len(before) + answer + [-100] * len(ids("\n"))
    assert example.supervised == len(answer)


@pytest.mark.parametrize(
    ("template", "talk", "answers"),
    [
        ("system", PLAIN_TALK, ["Hello.<|im_end|>", ANSWER + "<|im_end|>"]),
        ("trim", PLAIN_TALK, ["Hello.<|im_end|>", ANSWER + "<|im_end|>"]),
        ("closed", PLAIN_TALK, ["Hello.<|im_end|>", ANSWER + "<|im_end|>\n<|endoftext|>"]),
        ("inst", PLAIN_TALK, [" Hello.<|im_end|>", " " + ANSWER + "<|im_end|>"]),
        ("bare", PLAIN_TALK, [" Hello.\n", " " + ANSWER + "\n"]),
        # nothing was forgotten, so both stand there as they were given
        ("forget", PLAIN_TALK, ["Hello.<|im_end|>", ANSWER + "<|im_end|>"]),
        # the first answer has lost its reasoning: a loss on it would teach answers without
        ("forget", TALK, [f"<think>a cake</think>{ANSWER}<|im_end|>"]),
        # all or nothing: the second answer is unchanged, but the first is not
        ("forget", [*TALK[:2], *PLAIN_TALK[2:], *TALK[2:]], [f"<think>a cake</think>{ANSWER}<|im_end|>"]),
        ("think", TALK, [ANSWER + "<|im_end|>"]),
        ("think", [*PLAIN_TALK[2:], *PLAIN_TALK], [ANSWER + "<|im_end|>"]),
        ("think", PLAIN_TALK, [ANSWER + "<|im_end|>"]),
    ],
)
def test_all_answers_are_supervised_unless_history_is_rewritten(make_tokenizer, template, talk, answers):
    tokenizer = make_tokenizer(TEMPLATES[template])
    assert supervised_texts(only(encode([{"messages": talk}], tokenizer, 512)), tokenizer) == answers


def test_an_answer_that_the_template_trims_is_still_found(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["trim"])
    example = only(encode([{"prompt": "  " + USER, "completion": f"\n  {ANSWER} \n"}], tokenizer, 512))
    assert supervised_texts(example, tokenizer) == [ANSWER + "<|im_end|>"]


@pytest.mark.parametrize("answer", ["\nSure", "  Sure\n\n", " ", "Sure\n"])
def test_white_space_of_the_answer_is_its_own(tokenizer, answer):
    """A newline that ends the answer comes before the end of the turn; the template's comes behind it."""
    rows = [{"prompt": USER, "completion": answer}]
    if not answer.strip():
        with pytest.raises(DataError, match="no completion"):
            encode(rows, tokenizer, 512)
        return
    assert supervised_texts(only(encode(rows, tokenizer, 512)), tokenizer) == [answer + "<|im_end|>"]


def with_offsets(tokenizer, trim):
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    return tokenizer


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "supervised"),
    [
        ("A:", " 4", " 4"),
        ("A: ", "4", " 4"),  # one token, of which only white space is the prompt's
        ("Hel", "lo there", " there"),  # one token "Hello": part of it is the prompt's, so it is not the answer's
        ("A:  ", "\nSure", "\nSure"),
        ("A:", "  Sure", "  Sure"),
    ],
)
def test_tokens_that_span_the_boundary(plain_tokenizer, trim, prompt, completion, supervised):
    """Some tokenizers leave the white space of a token out of its offsets; the mask must not depend on it."""
    plain_tokenizer.add_tokens(["Hello"])
    tokenizer = with_offsets(plain_tokenizer, trim)
    if prompt == "A: ":
        assert " 4" in [tokenizer.decode([token]) for token in tokenizer("A: 4")["input_ids"]]
    example = only(encode([{"prompt": prompt, "completion": completion}], tokenizer, 64))
    assert list(example.tokens) == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    assert supervised_texts(example, tokenizer) == [supervised + "<|im_end|>"]


def test_emoji_of_several_tokens_stay_whole(tokenizer):
    example = only(encode([{"prompt": "🙂", "completion": "🍰🙂"}], tokenizer, 64))
    assert supervised_texts(example, tokenizer) == ["🍰🙂<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]},
        {"messages": [{"role": "user", "content": USER, "name": None}, {"role": "assistant", "content": ANSWER}]},
        {"prompt": USER, "completion": ANSWER, "text": None, "messages": None},
        {"prompt": [{"role": "user", "content": USER}], "completion": [{"role": "assistant", "content": ANSWER}]},
        {"prompt": [{"role": "user", "content": USER}], "completion": ANSWER},
        {"prompt": USER, "response": ANSWER},
        {"question": USER, "answer": ANSWER},
        {"instruction": USER, "input": "", "output": ANSWER},
        {"instruction": "How do I", "input": "make a cake?", "output": ANSWER},
        {"instruction": "How do I", "context": "make a cake?", "response": ANSWER},
        {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]},
        {"conversations": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": USER}]}], "completion": ANSWER},
    ],
)
def test_every_format_of_the_same_talk_gives_the_same_tokens(tokenizer, row):
    example = only(encode([row], tokenizer, 512))
    expected = USER if row.get("instruction") != "How do I" else "How do I\n\nmake a cake?"
    assert example == only(encode([{"prompt": expected, "completion": ANSWER}], tokenizer, 512))


def test_a_system_prompt_goes_first(tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *PLAIN_TALK[2:]]
    expected = only(encode([{"messages": talk}], tokenizer, 512))
    for row in ({**PAIR, "system": "Be brief."}, {"system_prompt": "Be brief.", "question": USER, "response": ANSWER}):
        assert only(encode([row], tokenizer, 512)) == expected
    assert only(encode([{**PAIR, "system": "  "}], tokenizer, 512)) == only(encode([PAIR], tokenizer, 512))


def test_answers_inside_the_prompt_are_not_supervised(tokenizer):
    row = {"prompt": PLAIN_TALK[:3], "completion": PLAIN_TALK[3:]}
    assert supervised_texts(only(encode([row], tokenizer, 512)), tokenizer) == [ANSWER + "<|im_end|>"]


def test_a_talk_that_opens_with_the_assistant_or_ends_with_the_user(tokenizer):
    talk = [{"role": "assistant", "content": "Good morning."}, *PLAIN_TALK, {"role": "user", "content": "Hello"}]
    example = only(encode([{"messages": talk}], tokenizer, 512))
    assert supervised_texts(example, tokenizer) == ["Hello.<|im_end|>", ANSWER + "<|im_end|>"]
    assert not tokenizer.decode(example.tokens).endswith("Hello<|im_end|>\n")


def test_tools_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("{% if tools %}{{ tools[0].name }}{% endif %}" + TEMPLATES["bare"])
    for tools in ([{"name": "cook"}], '[{"name": "cook"}]'):
        text = tokenizer.decode(only(encode([{"messages": PLAIN_TALK, "tools": tools}], tokenizer, 512)).tokens)
        assert text.startswith("cookuser: Hello")


def test_running_text_is_supervised_whole_but_for_its_first_token(tokenizer, plain_tokenizer):
    for each in (tokenizer, plain_tokenizer):
        example = only(encode([{"text": "Hello there."}], each, 64))
        ids = [*each("Hello there.")["input_ids"], each.eos_token_id]
        assert list(example.tokens) == ids
        assert list(example.labels) == [-100, *ids[1:]]


def framing(tokenizer):
    """Let a tokenizer put special tokens before and behind every text, as some do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )


def test_a_template_writes_all_special_tokens_itself(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["trim"])
    bare = only(encode([PAIR], tokenizer, 512))
    framing(tokenizer)
    assert only(encode([PAIR], tokenizer, 512)) == bare
    assert tokenizer("Hello")["input_ids"][0] == 1


def test_text_is_closed_once(plain_tokenizer):
    framing(plain_tokenizer)
    example = only(encode([{"prompt": "A:", "completion": " 4"}], plain_tokenizer, 64))
    assert supervised_texts(example, plain_tokenizer) == [" 4<|im_end|>"]
    assert example.tokens[0] == 1
    assert example.tokens.count(2) == 1
    opening = only(encode_pairs(["A:"], [" 4"], plain_tokenizer, 64, end=False))
    assert opening.tokens == example.tokens[:-1]
    assert prompt_tokens("A:", plain_tokenizer) == plain_tokenizer("A:")["input_ids"][:-1]


def test_supervising_all_leaves_out_the_first_token_only(tokenizer):
    for row in (PAIR, {"messages": PLAIN_TALK}, {"prompt": USER}):
        example = only(encode([row], tokenizer, 512, supervise="all"))
        assert example.labels == (-100, *example.tokens[1:])


def test_without_a_template_strings_are_joined_as_they_are(plain_tokenizer):
    example = only(encode([{"prompt": "A:", "completion": " 4"}], plain_tokenizer, 64))
    assert plain_tokenizer.decode(example.tokens) == "A: 4<|im_end|>"


@pytest.mark.parametrize("row", [{"messages": PLAIN_TALK}, {**PAIR, "system": "Be brief."}])
def test_conversations_without_a_template_are_refused_with_the_ways_out(plain_tokenizer, row):
    with pytest.raises(DataError, match=r"no chat template.*chat model.*chat_template.*`prompt`"):
        encode([row], plain_tokenizer, 64)


def test_cutting_is_counted(tokenizer):
    whole = only(encode([PAIR], tokenizer, 512))
    first = next(i for i, label in enumerate(whole.labels) if label != -100)
    for length in (first + 1, len(whole.tokens) - 1):
        encoded = encode([PAIR], tokenizer, length)
        assert (encoded.truncated, encoded.skipped) == (1, {})
        assert only(encoded).tokens == whole.tokens[:length]
        assert only(encoded).labels == whole.labels[:length]
    assert encode([PAIR], tokenizer, len(whole.tokens)).truncated == 0
    with pytest.raises(DataError, match=r"not one of 1 rows can be used: prompt longer than max_length \(1\)"):
        encode([PAIR], tokenizer, first)


def test_unusable_rows_are_counted_by_reason(make_tokenizer):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = make_tokenizer(refusing + TEMPLATES["bare"])
    rows = [
        {"prompt": USER},
        PAIR,
        {"prompt": USER, "completion": "  "},
        {"text": " \n"},
        {"label": 1, "a": 2},
        {},
        {"prompt": " ", "completion": ANSWER},
        {**PAIR, "system": "Be brief."},
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "user"}, "Hello"]},
        {"messages": [{"content": "Hello"}]},
        {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": 4}]},
        {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "assistant", "content": ANSWER}]},
        {"conversations": [{"from": "parrot", "value": "Hello"}]},
        {**PAIR, "tools": "{"},
        {"prompt": USER * 40, "completion": ANSWER},
        PAIR,
    ]
    encoded = encode(rows, tokenizer, 64)
    assert [example.row for example in encoded.examples] == [1, 18]
    assert encoded.rows_read == len(rows)
    assert encoded.skipped == {
        "no completion": 4,
        "empty text": 1,
        "unknown columns a, label": 1,
        "unknown columns (none)": 1,
        "no prompt": 1,
        "the chat template refuses it: no system role": 1,
        "messages are not a list of role and content": 4,
        "message content is not text": 1,
        "unknown speaker 'parrot'": 1,
        "tools are not JSON": 1,
        "prompt longer than max_length": 1,
    }


@pytest.mark.parametrize("shown", ["", "{{ messages[-1].content | length }} {{ messages[-1].content }}"])
def test_an_answer_the_template_does_not_show_is_not_guessed(make_tokenizer, shown):
    tokenizer = make_tokenizer("{{ messages | length }}{% if add_generation_prompt %}assistant{% endif %}" + shown)
    with pytest.raises(DataError, match=r"does not show the answer as it was given \(1\)"):
        encode([PAIR], tokenizer, 64)


def test_nothing_at_all_is_an_error(tokenizer):
    with pytest.raises(DataError, match="not one of 0 rows can be used: there are none"):
        encode([], tokenizer, 64)


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast tokenizer"):
        encode([PAIR], Slow(), 64)


@pytest.mark.parametrize("template", TEMPLATES)
def test_pairs_with_an_end_are_whole_conversations(make_tokenizer, template):
    tokenizer = make_tokenizer(TEMPLATES[template])
    talk = [{"role": "user", "content": USER}]
    encoded = encode_pairs([USER, talk], [ANSWER, ANSWER], tokenizer, 512, end=True)
    expected = only(encode([PAIR], tokenizer, 512))
    assert [(e.tokens, e.labels) for e in encoded.examples] == [(expected.tokens, expected.labels)] * 2
    assert [e.row for e in encoded.examples] == [0, 1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_openings_follow_the_generation_prompt_and_stay_open(make_tokenizer, template):
    tokenizer = make_tokenizer(TEMPLATES[template])
    example = only(encode_pairs([USER], ["Sure, here"], tokenizer, 512, end=False))
    before = tokenizer.apply_chat_template(
        [{"role": "user", "content": USER}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(example.tokens) == before + "Sure, here"
    assert supervised_texts(example, tokenizer) == ["Sure, here"]


def test_pairs_for_a_base_model_are_joined(plain_tokenizer):
    for end, closing in ((True, "<|im_end|>"), (False, "")):
        encoded = encode_pairs(["A:", [{"role": "user", "content": "A:"}]], [" 4"] * 2, plain_tokenizer, 64, end=end)
        for example in encoded.examples:
            assert plain_tokenizer.decode(example.tokens) == "A: 4" + closing
            assert supervised_texts(example, plain_tokenizer) == [" 4" + closing]
        assert len(encoded.examples) == 2
        with pytest.raises(DataError, match="no chat template"):
            encode_pairs([PLAIN_TALK[:3]], [" 4"], plain_tokenizer, 64, end=end)


def test_pairs_must_match_and_say_something(tokenizer):
    with pytest.raises(DataError, match="2 prompts but 1 completions"):
        encode_pairs(["a", "b"], ["c"], tokenizer, 64, end=True)
    for end in (True, False):
        encoded = encode_pairs([USER, USER], ["", ANSWER], tokenizer, 512, end=end)
        assert encoded.skipped == {"no completion": 1}
        assert only(encoded).row == 1


def test_prompts_are_what_comes_before_the_last_answer(tokenizer):
    rows = [PAIR, {"messages": PLAIN_TALK}, {"messages": PLAIN_TALK[:3]}, {"prompt": USER}, {**PAIR, "system": "Be."}]
    user = {"role": "user", "content": USER}
    assert prompts_of(rows, tokenizer) == [
        [user],
        PLAIN_TALK[:3],
        PLAIN_TALK[:3],
        [user],
        [{"role": "system", "content": "Be."}, user],
    ]
    for row in ({"text": "Hello"}, {"messages": PLAIN_TALK[1:2]}, {"label": 1}):
        with pytest.raises(DataError, match="row 1 has no prompt"):
            prompts_of([PAIR, row], tokenizer)


def test_prompt_text_asks_the_assistant_to_speak(tokenizer, plain_tokenizer):
    expected = f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(USER, tokenizer) == expected
    assert prompt_text([{"role": "user", "content": USER}], tokenizer) == expected
    assert prompt_text([{"role": "user", "content": USER}], plain_tokenizer) == USER


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_tokens_are_those_before_the_answer(make_tokenizer, template):
    tokenizer = make_tokenizer(TEMPLATES[template])
    example = only(encode_pairs([USER], ["Sure, here"], tokenizer, 512, end=False))
    assert prompt_tokens(USER, tokenizer) == list(example.tokens[: -example.supervised])


def examples_of(*lengths):
    return [Example(tuple(range(1, n + 1)), (-100, *range(2, n + 1)), row) for row, n in enumerate(lengths)]


def test_collate_pads_on_the_right_without_loss():
    batch = collate(examples_of(2, 4), pad_id=2)  # the padding token may well be one that is also supervised
    torch.testing.assert_close(batch.tokens, torch.tensor([[1, 2, 2, 2], [1, 2, 3, 4]]), rtol=0, atol=0)
    torch.testing.assert_close(batch.labels, torch.tensor([[-100, 2, -100, -100], [-100, 2, 3, 4]]), rtol=0, atol=0)
    with pytest.raises(DataError, match="no examples"):
        collate([], 0)


def test_padding_changes_no_loss(llama, tokenizer):
    rows = [PAIR, {"messages": PLAIN_TALK}]
    examples = encode(rows, tokenizer, 512).examples

    def losses(batch):
        logits = llama(batch.tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.mT, batch.labels[:, 1:], reduction="none").sum(1)

    alone = torch.cat([losses(collate([example], 0)) for example in examples])
    torch.testing.assert_close(losses(collate(examples, 0)), alone)


@pytest.mark.parametrize("max_tokens", [1, 8, 16, 24, 1000])
def test_batches_hold_every_example_once_within_the_budget(max_tokens):
    lengths = (3, 9, 2, 8, 3, 8, 1)
    examples = examples_of(*lengths)
    grouped = batches(examples, 0, max_tokens)
    assert sorted(i for indices, _ in grouped for i in indices) == list(range(len(lengths)))
    assert [indices[0] for indices, _ in grouped] == sorted(indices[0] for indices, _ in grouped)
    for indices, batch in grouped:
        assert indices == sorted(indices)
        assert batch.tokens.numel() <= max_tokens or len(indices) == 1
        expected = collate([examples[i] for i in indices], 0)
        torch.testing.assert_close(batch.tokens, expected.tokens, rtol=0, atol=0)
        torch.testing.assert_close(batch.labels, expected.labels, rtol=0, atol=0)


def test_batches_group_similar_lengths():
    padded = sum(batch.tokens.numel() for _, batch in batches(examples_of(2, 10, 2, 10, 2, 10), 0, 30))
    assert padded == 36  # no padding at all
    assert batches([], 0, 30) == []


def test_an_example_is_cut_after_so_many_tokens_of_its_last_answer():
    tokens = tuple(range(10, 20))
    two_turns = Example(tokens, (-100, 11, 12, -100, -100, 15, 16, 17, 18, -100), 3)
    assert two_turns.opened(2) == Example(tokens[:7], (-100, 11, 12, -100, -100, 15, 16), 3)
    assert two_turns.opened(4).tokens == tokens[:9]
    assert two_turns.opened(5) is two_turns
    unsupervised = Example(tokens, (-100,) * 10, 0)
    assert unsupervised.opened(1) is unsupervised
    assert two_turns.answered() == Example(tokens, (-100,) * 5 + (15, 16, 17, 18, -100), 3)
    assert two_turns.answered().opened(2) == Example(tokens[:7], (-100,) * 5 + (15, 16), 3)
    assert unsupervised.answered() == unsupervised
    one = Example(tokens[:3], (-100, 11, 12), 0)
    assert one.answered() == one
