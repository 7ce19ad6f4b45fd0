"""common.py against full forwards, `model.generate`, the templates' own rendering, and a killed process."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

torch.set_num_threads(1)

TEXTS = ["user\nassistant\n", "system\nYou are a player.", "the lamp is on the table .", "you see nothing here"]
TOKENIZER = common.tiny_tokenizer(TEXTS, ["A constant line. It is one token."])
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    pad_token_id=0, tie_word_embeddings=False,  # tied ones make a random model repeat its last token
    initializer_range=0.4,  # large: attention must matter, or a wrong mask would not show
)  # fmt: skip
WINDOW = 8  # far shorter than the dialogues below
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(  # positions are learned: absolute ones matter
        GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.4)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}


def build(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build("qwen3")


@pytest.fixture
def chat():
    chat = common.Chat(TOKENIZER)
    chat.eos += list(range(0, 40))  # a random model hits one of them now and then, so rows end at different times
    return chat


def ragged(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 30, (count,), generator=generator).tolist()
    sizes[1] = 1  # nothing but the token that decoding starts from
    return [torch.randint(0, len(TOKENIZER), (n,), generator=generator).tolist() for n in sizes]


@torch.no_grad()
def forward_logprobs(model, ids, temperature=1.0):
    """log p of ids[1:], from one forward over one row without padding or cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / temperature
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def assert_same_choice(model, prompt, ours, theirs):
    """Equal ids; where they first differ, a full forward must call it a tie (float noise decides those)."""
    split = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if split is None:
        assert ours == theirs
        return
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ours[:split]])).logits[0, -1]
    assert max(logits) - min(logits[ours[split]], logits[theirs[split]]) < 1e-4


# -------------------------------------------------------------------------------------------------------- generation


def test_greedy_equals_model_generate(model, chat):
    prompts = ragged(9)
    replies = common.generate(model, chat, prompts, max_new_tokens=20, temperature=0, seeds=[0] * len(prompts), rows=4)
    ids = common.pad_rows(prompts, chat.pad, "left")
    mask = common.pad_rows([[1] * len(row) for row in prompts], 0, "left")
    full = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False,
        eos_token_id=chat.eos, pad_token_id=chat.pad,
    )  # fmt: skip
    full = full[:, ids.shape[1] :].tolist()
    for prompt, theirs, ours, complete in zip(prompts, full, replies.ids, replies.complete, strict=True):
        end = next((i + 1 for i, token in enumerate(theirs) if token in chat.eos), len(theirs))
        assert_same_choice(model, prompt, ours, theirs[:end])
        assert complete == (ours[-1] in chat.eos) and (complete or len(ours) == 20)
    assert 1 < len({len(row) for row in replies.ids})  # some ended early: rows did leave the batch


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_replies_equal_a_full_forward(model, chat, temperature):
    prompts = ragged(7)
    replies = common.generate(model, chat, prompts, max_new_tokens=12, temperature=temperature, seeds=list(range(7)), rows=3)
    for prompt, ids, logprobs in zip(prompts, replies.ids, replies.logprobs, strict=True):
        expected = forward_logprobs(model, prompt + ids, temperature)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


def test_sampling_does_not_depend_on_batching(qwen3, chat):
    prompts, seeds = ragged(10), [common.row_seed(0, i) for i in range(10)]
    options = dict(max_new_tokens=12, temperature=1.0)
    reference = common.generate(qwen3, chat, prompts, seeds=seeds, **options)
    for rows in (1, 3, 10):
        assert common.generate(qwen3, chat, prompts, seeds=seeds, rows=rows, **options).ids == reference.ids
    backward = common.generate(qwen3, chat, prompts[::-1], seeds=seeds[::-1], rows=4, **options)
    assert backward.ids[::-1] == reference.ids
    assert common.generate(qwen3, chat, prompts, seeds=[s + 1 for s in seeds], **options).ids != reference.ids


@pytest.mark.parametrize("rows", [2, 5, 256])
def test_samples_equal_repeated_prompts(qwen3, chat, rows):
    prompts, seeds = ragged(4), list(range(12))
    options = dict(max_new_tokens=8, temperature=1.0, seeds=seeds)
    once = common.generate(qwen3, chat, prompts, samples=3, rows=rows, **options)
    repeated = common.generate(qwen3, chat, [p for p in prompts for _ in range(3)], **options)
    assert once.ids == repeated.ids and once.texts == repeated.texts
    assert len(set(map(tuple, once.ids))) > 8  # the samples of a prompt differ


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_softmax(qwen3, chat, temperature):
    count, prompt = 6000, ragged(1 + 1)[0]
    seeds = [common.row_seed(0, i) for i in range(count)]
    replies = common.generate(qwen3, chat, [prompt], max_new_tokens=1, temperature=temperature, seeds=seeds, samples=count, rows=2000)
    with torch.no_grad():
        logits = qwen3(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = count * torch.softmax(logits / temperature, -1)
    observed = torch.bincount(torch.tensor([row[0] for row in replies.ids]), minlength=len(expected)).float()
    often = expected >= 5
    assert often.sum() > 20  # the test would be empty on a peaked distribution
    observed, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (observed, expected))
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_tokens_are_the_inverse_cdf_of_their_uniforms(model, chat):
    prompts, seeds = ragged(4), [11, 12, 13, 14]
    replies = common.generate(model, chat, prompts, max_new_tokens=10, temperature=0.8, seeds=seeds)
    for prompt, ids, noise in zip(prompts, replies.ids, common.uniforms(seeds, 10).double(), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        cdf = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
        at = torch.tensor(ids)[:, None]
        below, above = (cdf - cdf.diff(dim=-1, prepend=cdf[:, :1] * 0)).gather(1, at), cdf.gather(1, at)
        noise = noise[: len(ids), None]
        assert (below - 1e-4 < noise).all() and (noise < above + 1e-4).all()


def test_uniforms():
    u = common.uniforms([common.row_seed(7, i) for i in range(2000)], 20).double()
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005
    assert (torch.corrcoef(u.T) - torch.eye(20)).abs().max() < 0.12  # token to token
    neighbours = common.uniforms(range(2000), 1)[:, 0]
    assert abs(torch.corrcoef(torch.stack([neighbours[1:], neighbours[:-1]]))[0, 1]) < 0.1
    # the reference values of splitmix64 for seed 1234567: its first two outputs, cut to 24 bits
    first = [6457827717110365317, 3203168211198807973]
    assert common.uniforms([1234567], 2)[0].tolist() == [(z >> 40) / 2**24 for z in first]


def test_row_seed():
    assert common.row_seed(0, 1, "a") != common.row_seed(0, "1", "a") != common.row_seed(0, 1, "b")
    assert len({common.row_seed(0, i, j) for i in range(50) for j in range(50)}) == 2500
    code = "import common; print(common.row_seed(3, 'train', 5))"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=Path(common.__file__).parent, text=True)
    assert int(output) == common.row_seed(3, "train", 5)
    with pytest.raises(TypeError):
        common.row_seed(0, 0.5)


def test_generate_rejects_wrong_calls(qwen3, chat):
    for prompts, seeds in [([[1]], []), ([[1], []], [0, 0])]:
        with pytest.raises(ValueError):
            common.generate(qwen3, chat, prompts, max_new_tokens=1, temperature=1.0, seeds=seeds)


# --------------------------------------------------------------------------------------------------------- dialogues

SCHEDULE = [[0, 1, 2, 3, 4], [0, 2, 3, 4], [4, 2], [2, 4], [2, 3], [3]]  # rows drop out, come back, change order
OBSERVATIONS = ["the lamp is on the table .", "", "you see nothing here " * 4, "ok", "a much longer line, of bytes"]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_dialogues_equal_full_forwards(model, chat, temperature):
    dialogues = common.Dialogues(model, chat, ragged(5, seed=1))
    spoken = [[] for _ in dialogues.ids]
    forced = 0
    for turn, rows in enumerate(SCHEDULE):
        before = [list(ids) for ids in dialogues.ids]
        seeds = [common.row_seed(0, row, turn) for row in rows]
        options = dict(max_new_tokens=9, temperature=temperature, seeds=seeds)
        texts = dialogues.reply(rows, **options)
        scratch = common.generate(model, chat, [before[row] for row in rows], **options)
        for row, text, expected in zip(rows, texts, scratch.ids, strict=True):
            new = dialogues.ids[row][len(before[row]) :]
            assert dialogues.ids[row][: len(before[row])] == before[row]
            ids = new[: sum(dialogues.mask[row][len(before[row]) :])]
            complete = ids[-1] in chat.eos
            if temperature == 0:
                assert_same_choice(model, before[row], ids, expected)
            else:
                assert ids == expected
            assert text == chat.decode(ids) and (complete or len(ids) == 9)
            assert new == ids + ([] if complete else [chat.eos[0]])
            assert dialogues.mask[row][len(before[row]) :] == [1] * len(ids) + [0] * (not complete)
            forced += not complete
            spoken[row] += ids
        idle = set(range(5)) - set(rows)
        assert all(dialogues.ids[row] == before[row] for row in idle)
        if turn + 1 < len(SCHEDULE):
            dialogues.extend(rows, [OBSERVATIONS[(row + turn) % 5] for row in rows])
    assert forced > 0
    for ids, mask, logprobs, sampled in zip(dialogues.ids, dialogues.mask, dialogues.logprobs, spoken, strict=True):
        assert len(ids) == len(mask) == len(logprobs)
        assert [i for i, m in zip(ids, mask, strict=True) if m] == sampled
        expected = forward_logprobs(model, ids, temperature or 1.0) * torch.tensor(mask[1:])
        torch.testing.assert_close(torch.tensor(logprobs[1:]), expected, atol=1e-4, rtol=0)
    assert max(map(len, dialogues.ids)) > 10 * WINDOW


def test_dialogues_without_rows_or_with_wrong_ones(qwen3, chat):
    dialogues = common.Dialogues(qwen3, chat, ragged(3))
    options = dict(max_new_tokens=2, temperature=1.0)
    assert dialogues.reply([], seeds=[], **options) == []
    with pytest.raises(ValueError):
        dialogues.reply([0, 0], seeds=[1, 2], **options)
    with pytest.raises(ValueError):
        dialogues.reply([0, 1], seeds=[1], **options)


# --------------------------------------------------------------------------------------------------------- log-probs


def test_pad_rows():
    assert common.pad_rows([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    assert common.pad_rows([[1, 2], [], [3]], 9, "left").tolist() == [[1, 2], [9, 9], [9, 3]]
    assert common.pad_rows([[], []], 9).shape == (2, 0) and common.pad_rows([], 9).shape == (0, 0)
    assert common.pad_rows([[], []], 9).dtype == torch.long


def test_token_logprobs_with_padding(model):
    rows = ragged(5)
    ids = common.pad_rows(rows, 0)
    logprobs = common.token_logprobs(model, ids, temperature=0.8)
    assert logprobs.dtype == torch.float32 and logprobs.shape == (5, ids.shape[1] - 1)
    for row, line in zip(rows, logprobs, strict=True):
        if len(row) > 1:
            torch.testing.assert_close(line[: len(row) - 1], forward_logprobs(model, row, 0.8), atol=1e-4, rtol=0)


def test_target_logprobs_equal_token_logprobs(model, chat):
    prompts, targets = ragged(5), [[5, 6, 7], [8], [], [9] * 12, [1, 2]]
    logprobs, mask = common.target_logprobs(model, chat, prompts, targets, temperature=0.8)
    assert logprobs.shape == mask.shape == (5, 12)
    assert mask.tolist() == [[1] * len(t) + [0] * (12 - len(t)) for t in targets]
    for prompt, target, line in zip(prompts, targets, logprobs, strict=True):
        expected = forward_logprobs(model, prompt + target, 0.8)[len(prompt) - 1 :]
        torch.testing.assert_close(line[: len(target)], expected, atol=1e-4, rtol=0)


def test_gradient_of_target_logprobs(chat):
    model = build("qwen3")
    prompts, targets = ragged(3), [[5, 6], [8], [9, 9, 9]]
    logprobs, mask = common.target_logprobs(model, chat, prompts, targets)
    (logprobs * mask).sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    for prompt, target in zip(prompts, targets, strict=True):  # the same, row by row and without padding
        ids = torch.tensor([prompt + target])
        common.token_logprobs(model, ids)[0, len(prompt) - 1 :].sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- chat

TEMPLATES = {
    "chatml": (common.CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "qwen3": (  # a thought of an earlier turn is dropped; without thinking the prompt ends in an empty thought
        "{%- for message in messages %}{%- set content = message.content %}"
        "{%- if message.role == 'assistant' and '</think>' in content %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
        "<|im_end|>",
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"],
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
    ),
    "mistral": (  # spaces around the text although the text itself is stripped; no end token after a user turn
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
        "{% endfor %}",
        "</s>",
        ["<s>", "</s>"],
    ),
}
EOS = {"llama3": "<|end_of_text|>", "gemma": "<eos>", "qwen3": "<|endoftext|>"}  # not what ends a turn
DIALOGUE = [
    {"role": "system", "content": "You are a player."},
    {"role": "user", "content": "the lamp is on the table ."},
    {"role": "assistant", "content": "you see"},
    {"role": "user", "content": "nothing here"},
    {"role": "assistant", "content": "the lamp"},
    {"role": "user", "content": "ok"},
]


def template_chat(kind):
    template, end, specials = TEMPLATES[kind]
    tokenizer = common.tiny_tokenizer(TEXTS)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": [s for s in specials if "think" not in s]})
    tokenizer.add_tokens(["<think>", "</think>"])  # one token each, not special: as in Qwen3
    tokenizer.bos_token = next((s for s in specials if s in ("<s>", "<bos>", "<|begin_of_text|>")), None)
    tokenizer.eos_token = EOS.get(kind, end)
    return common.Chat(tokenizer)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("text", ["ok", "  two  spaces and a line\n", "the lamp é 🙂"])
def test_turn_is_what_the_template_renders(kind, text):
    chat = template_chat(kind)
    end = chat.tokenizer.convert_tokens_to_ids(TEMPLATES[kind][1])
    assert chat.eos[0] == end and chat.tokenizer.eos_token_id in chat.eos
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you see"}]
    messages += [{"role": "user", "content": text}]
    rendered = chat.prompt(messages)
    turn = [end, *chat.turn(text)]
    assert rendered[-len(turn) :] == turn
    assert chat.encode("you see")[-1] in rendered[-len(turn) - 2 : -len(turn)]  # the reply stands right before it


@pytest.mark.parametrize("kind", TEMPLATES)
def test_prompt_and_dialogue(kind):
    chat = template_chat(kind)
    show = lambda ids: chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    prompt = show(chat.prompt(DIALOGUE[:2]))
    assert prompt.count("You are a player.") == 1 and prompt.count("the lamp is on the table .") == 1
    folded = kind in ("gemma", "mistral")
    assert folded == ("You are a player.\n\nthe lamp" in prompt) and DIALOGUE[0]["role"] == "system"
    dialogue = show(chat.dialogue(DIALOGUE))
    whole = show(chat.prompt(DIALOGUE))
    if kind == "qwen3":  # the rollout's ids keep the empty thoughts that the template drops from earlier turns
        assert dialogue.count("<think>\n\n</think>\n\n") == 3
        assert whole.count("<think>") == 1
        head = "<|im_start|>assistant\n"
        whole = whole.replace(head + "<think>\n\n</think>\n\n", head).replace(head, head + "<think>\n\n</think>\n\n")
    if kind == "mistral":  # its spaces around a reply are the template's; a rollout has what was sampled
        whole, dialogue = whole.replace(" ", ""), dialogue.replace(" ", "")
    assert dialogue == whole


def test_thinking_switch():
    chat = template_chat("qwen3")
    thinking = common.Chat(chat.tokenizer, thinking=True)
    empty = chat.encode("<think>\n\n</think>\n\n")
    assert chat.prompt(DIALOGUE[:2]) == thinking.prompt(DIALOGUE[:2]) + empty
    assert chat.turn("ok") == thinking.turn("ok") + empty


@pytest.mark.parametrize("kind", TEMPLATES)
def test_control_tokens_in_a_text_stay_text(kind):
    chat = template_chat(kind)
    specials = set(chat.tokenizer.all_special_ids)
    count = lambda ids: sum(i in specials for i in ids)  # noqa: E731
    end = TEMPLATES[kind][1]
    for text in (end, f"lost{end}\n{end}you won"):
        for build in (chat.turn, lambda text: chat.prompt([{"role": "user", "content": text}])):
            assert count(build(text)) == count(build("lost"))
        assert count(chat.encode(text)) == 0 and chat.decode(chat.encode(text)) == text
        assert count(chat.reply(text)) == 1


def test_dialogue_equals_the_ids_of_a_rollout(qwen3):
    chat = common.Chat(TOKENIZER)
    dialogues = common.Dialogues(qwen3, chat, [chat.prompt(DIALOGUE[:2])])
    chat.eos += chat.encode("the")  # so that the reply below is complete without being chosen by the model
    dialogues.reply([0], max_new_tokens=4, temperature=1.0, seeds=[5])
    ids = dialogues.ids[0][len(chat.prompt(DIALOGUE[:2])) :]
    dialogues.extend([0], ["nothing here"])
    assert dialogues.ids[0] == chat.prompt(DIALOGUE[:2]) + ids + chat.turn("nothing here")
    dialogues = common.Dialogues(qwen3, chat, [chat.prompt(DIALOGUE[:2])])
    for i in (2, 4):
        dialogues._append(0, chat.reply(DIALOGUE[i]["content"]), 1)
        dialogues.extend([0], [DIALOGUE[i + 1]["content"]])
    assert dialogues.ids[0] == chat.dialogue(DIALOGUE)
    assert chat.reply("you see") == [*chat.encode("you see"), chat.eos[0]]
    with pytest.raises(ValueError):
        chat.dialogue(DIALOGUE[:2] + DIALOGUE[3:4])


def test_chat_without_template_is_refused(capsys):
    tokenizer = common.tiny_tokenizer(TEXTS)
    tokenizer.chat_template = None
    refused(capsys, lambda: common.Chat(tokenizer), "no chat template")


# --------------------------------------------------------------------------------------------------- tiny tokenizer

RULES = ["A constant line. It is one token.", "A constant line.", "-> answer: yes", "x[1]*"]
CORPUS = ["the lamp is on the table .", "  It's 1,200 metres — naïve 東京\n\tdone", "household hold house", RULES[0]]


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory):
    """As a run meets it: saved and loaded again."""
    path = tmp_path_factory.mktemp("tokenizer")
    common.tiny_tokenizer(CORPUS, RULES).save_pretrained(path)
    Qwen3Config(vocab_size=2000).save_pretrained(path)  # AutoTokenizer looks at the architecture, too
    return common.Chat(AutoTokenizer.from_pretrained(path))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")) | st.text("the lampx[1]*\n 's→A") | st.sampled_from(RULES + CORPUS))
def test_tokenizer_is_lossless(tiny_chat, text):
    assert tiny_chat.decode(tiny_chat.encode(text)) == text


def test_tokenizer_words_and_constants(tiny_chat):
    count = lambda text: len(tiny_chat.encode(text))  # noqa: E731
    assert count("the lamp is on the table .") == 7
    assert [count(word) for word in ("household", " hold", " house", " 東京", " metres", "the")] == [1] * 6
    assert [count(rule) for rule in RULES] == [1] * 4
    assert count("the lamp" + RULES[0] + " is") == 4  # the longest constant wins, inside a text as well
    assert tiny_chat.encode("A constant line. It is") != tiny_chat.encode(RULES[0])
    assert count("zebra") == 5
    assert tiny_chat.decode([*tiny_chat.encode("the"), tiny_chat.eos[0], tiny_chat.pad]) == "the"


# -------------------------------------------------------------------------------------------------------- tiny model

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


def corpus():
    system = {"role": "system", "content": RULES[0]}
    asked = [([system, {"role": "user", "content": f"colour of {k} ?"}], f"it is {v}") for k, v in COLOURS.items()]
    longer = [
        ([*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": "sure ?"}], "yes") for messages, reply in asked
    ]
    return (asked * 3 + longer) * 400


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def load_tiny(cache, examples=corpus, **options):
    return common.load("tiny:32x1", corpus=examples, constants=RULES, cache_dir=cache, **options)


def test_tiny_model_learns_and_is_cached(cache, monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, chat = load_tiny(cache)
    assert torch.equal(before, torch.get_rng_state())
    assert model.config.architectures == ["Qwen3ForCausalLM"] and common.count_parameters(model) < 50_000
    assert not model.training and model.dtype == torch.float32
    messages = corpus()[:4]
    replies = common.generate(model, chat, [chat.prompt(m) for m, _ in messages], max_new_tokens=6, temperature=0, seeds=[0] * 4)
    assert replies.texts == [reply for _, reply in messages] and all(replies.complete)
    assert sum(p.name.startswith("tiny-") for p in cache.iterdir()) == 1  # and no temporary directory is left
    with monkeypatch.context() as patch:
        patch.setattr(common, "build_tiny", lambda *_: pytest.fail("built again"))
        again, _ = load_tiny(cache)
        with pytest.raises(pytest.fail.Exception):
            load_tiny(cache, lambda: corpus()[:-1])
        with pytest.raises(pytest.fail.Exception):
            load_tiny(cache, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_tiny_model_is_seeded(tmp_path):
    few = lambda: corpus()[:512]  # noqa: E731
    models = [load_tiny(tmp_path / name, few, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    same, other = ([torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True)] for model in models[1:])
    assert all(same) and not all(other)


def test_load_refuses(tmp_path, capsys, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("tiny:0x1", "tiny:33x1", "tiny:64", "tiny:axb"):
        refused(capsys, lambda name=name: common.load(name, corpus=corpus, cache_dir=tmp_path), name)
    refused(capsys, lambda: common.load(str(tmp_path / "missing")), "config.json")
    refused(capsys, lambda: common.load("nobody/no-such-model"), "cannot be loaded")
    model, chat = load_tiny(cache)
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    chat.tokenizer.save_pretrained(broken)
    assert common.load(str(broken))[1].eos == chat.eos
    (broken / "chat_template.jinja").unlink()
    refused(capsys, lambda: common.load(str(broken)), "no chat template")
    (broken / "model.safetensors").write_bytes(b"not a model")
    refused(capsys, lambda: common.load(str(broken)), "cannot be loaded")
    (broken / "config.json").write_text("{")
    refused(capsys, lambda: common.load(str(broken)), "cannot be loaded")


def test_ema_update():
    target, source = build("qwen3"), build("qwen3")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    common.ema_update(target, source, 0.9)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


# -------------------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Args:
    model: str = "tiny"
    seed: int = 0
    steps: int = 6
    lr: float = 1e-3
    batch_size: int = 8
    micro_batch_size: int = 4
    max_new_tokens: int = 8
    temperature: float = 1.0
    eval_temperature: float = 0.0
    eval_episodes: int = 4
    eval_every: int = 5
    save_every: int = 5
    rate: float | None = None
    out_dir: str = "runs/x"
    resume: bool = False
    device: str = "cpu"
    dtype: str = "auto"


def refused(capsys, call, *words):
    """`call` leaves with status 2 and one line on stderr that holds all `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.fixture(autouse=True)
def signals():
    """`start` installs handlers: give pytest its own back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def started(path, **changes):
    run = common.Run("toy", Args(**changes), path)
    run.start()
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_creates_nothing_before_start(tmp_path, capsys):
    path = tmp_path / "deep" / "run"
    run = common.Run("toy", Args(), path)
    assert not path.parent.exists()
    run.start({"note": "x"})
    record = json.loads((path / "args.json").read_text())
    assert record["script"] == "toy" and record["args"]["lr"] == 1e-3 and record["note"] == "x"
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu" and "git_commit" in record
    refused(capsys, lambda: common.Run("toy", Args(), path), "--resume", "--out-dir")
    late = common.Run("toy", Args(), tmp_path / "late")
    started(tmp_path / "late")
    refused(capsys, late.start, "exists")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["deep", "late"]


def test_resume_refuses(tmp_path, capsys):
    path = tmp_path / "run"
    resume = lambda script="toy", **changes: common.Run(script, Args(resume=True, **changes), path)  # noqa: E731
    refused(capsys, resume, "no run")
    started(path)
    refused(capsys, lambda: resume(lr=2e-3), "lr was 0.001 and is 0.002")
    refused(capsys, lambda: resume("other"), "other")
    assert resume(steps=9, device="cuda").resume() is None
    run = resume(steps=9)
    run.start()
    assert json.loads((path / "args.json").read_text())["args"]["steps"] == 9
    run.log({"step": 1})
    run.save({"step": 1})
    assert resume().resume() == {"step": 1}
    content = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text("")
    refused(capsys, resume, "metrics.jsonl")
    (path / "metrics.jsonl").write_text(content)
    state = path / "checkpoint" / "state.pt"
    whole = state.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"junk" * 100):
        state.write_bytes(damage)
        refused(capsys, resume, "state.pt", "damaged")
    state.write_bytes(whole)
    assert resume().resume() == {"step": 1}
    (path / "args.json").write_text('{"script": ')
    refused(capsys, resume, "args.json", "damaged")


def test_checkpoint_and_logs(tmp_path):
    run = started(tmp_path / "run")
    run.log({"step": 0, "loss": float("nan"), "text": "naïve 東京\n"})
    run.write_rollouts([{"turns": ["a", "b"]}, {"turns": []}])
    tensor = torch.randn(3)
    run.save({"step": 1, "tensor": tensor, "nested": [{"a": (1, None)}]})
    run.log({"step": 1})
    run.write_rollouts([{"turns": ["late"]}])
    again = common.Run("toy", Args(resume=True), run.dir)
    again.start()
    state = again.resume()
    assert torch.equal(state["tensor"], tensor) and state["nested"] == [{"a": (1, None)}]
    assert lines(run.dir / "metrics.jsonl") == [{"step": 0, "loss": None, "text": "naïve 東京\n"}]
    assert lines(run.dir / "rollouts.jsonl") == [{"turns": ["a", "b"]}, {"turns": []}]
    assert [p.name for p in (run.dir / "checkpoint").iterdir()] == ["state.pt"]


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = started(tmp_path / "run")
    run.save({"step": 1})

    def fail(saved, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        run.save({"step": 2})
    assert common.Run("toy", Args(resume=True), run.dir).resume() == {"step": 1}


def test_finish(tmp_path, cache):
    model, chat = load_tiny(cache)
    run = started(tmp_path / "run")
    for success in (0.25, 0.5):  # a second time: a finished run resumed with more steps
        run.finish({"after": {"success": success, "se": float("nan")}}, model, chat)
        assert json.loads((run.dir / "summary.json").read_text())["after"] == {"success": success, "se": None}
    again, chat_again = common.load(str(run.dir / "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert chat_again.prompt(DIALOGUE[:2]) == chat.prompt(DIALOGUE[:2])


TOY = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from test_common import Args
import common

def main(path, resume, die_at, number):
    run = common.Run("toy", Args(resume=resume), path)
    run.start()
    state = run.resume() or {{"step": 0, "x": torch.zeros(1), "rng": torch.Generator().manual_seed(0).get_state()}}
    generator, x = torch.Generator(), state["x"]
    generator.set_state(state["rng"])
    for step in range(state["step"], 6):
        x = x + torch.rand(1, generator=generator)
        run.log({{"step": step, "x": x.item()}})
        if step == die_at:
            os.kill(os.getpid(), number)
        run.write_rollouts([{{"step": step, "x": x.item()}}])
        if run.stopping or step % 2 == 1:
            run.save({{"step": step + 1, "x": x, "rng": generator.get_state()}})
        if run.stopping:
            sys.exit(run.stopping)
    run.save({{"step": 6, "x": x, "rng": generator.get_state()}})

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3]), int(sys.argv[4]))
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    here = Path(__file__).parent
    toy = {}
    source = TOY.format(root=str(here))
    exec(compile(source, "toy", "exec"), toy)  # in this process: every subprocess imports torch for seconds
    toy["main"](tmp_path / "whole", False, -1, 0)
    script = tmp_path / "toy.py"
    script.write_text(source)
    environment = os.environ | {"PYTHONPATH": str(here.parent)}

    def child(name, number, die_at):
        command = [sys.executable, script, tmp_path / name, "new", str(die_at), str(int(number))]
        return subprocess.run(command, env=environment, capture_output=True, text=True).returncode

    # SIGKILL before the first checkpoint, and after one in the middle of a step; SIGTERM finishes the step
    assert child("early", signal.SIGKILL, 0) == -signal.SIGKILL
    assert child("middle", signal.SIGKILL, 4) == -signal.SIGKILL
    assert child("asked", signal.SIGTERM, 2) == 143
    assert [line["step"] for line in lines(tmp_path / "asked" / "rollouts.jsonl")] == [0, 1, 2]
    for name in ("early", "middle", "asked"):
        toy["main"](tmp_path / name, True, -1, 0)
        for file in common.Run.LOGS:
            assert (tmp_path / name / file).read_text() == (tmp_path / "whole" / file).read_text(), name


def test_interrupt_sets_stopping(tmp_path, capsys):
    run = started(tmp_path / "run")
    assert not run.stopping
    signal.raise_signal(signal.SIGINT)
    assert run.stopping == 130 and "once more" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second kills


# ------------------------------------------------------------------------------------------------------ command line


def test_parse_args():
    args = common.parse_args(Args, ["--lr", "0.5", "--batch-size", "16", "--micro_batch_size=2", "--resume"])
    assert (args.lr, args.batch_size, args.micro_batch_size, args.resume) == (0.5, 16, 2, True)
    assert common.parse_args(Args, []) == Args()


@pytest.mark.parametrize(
    "argv",
    ["--lr fast", "--steps 1.5", "--nonsense 3", "--lr", "--temp 1", "stray", "--resume maybe", "--lr -x", "--seed ''"],
)
def test_parser_failures_are_one_line(argv, capsys):
    refused(capsys, lambda: common.parse_args(Args, argv.split()))


def test_errors_of_the_dataclass_are_one_line(capsys):
    @dataclasses.dataclass
    class Strict:
        lr: float = 1.0

        def __post_init__(self):
            raise ValueError("no\nsuch  value")

    refused(capsys, lambda: common.parse_args(Strict, []), "no such value")


def test_help_works(capsys):
    with pytest.raises(SystemExit) as caught:
        common.parse_args(Args, ["--help"])
    assert caught.value.code == 0 and "--batch-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        "--lr nan", "--lr inf", "--lr=-inf", "--lr -1", "--rate nan", "--temperature 0", "--temperature nan",
        "--temperature -1", "--eval-temperature -0.1", "--steps 0", "--steps -1", "--batch-size 0",
        "--micro-batch-size 0", "--batch-size 9", "--max-new-tokens 0", "--eval-episodes 0", "--eval-every -1",
        "--save-every 0", "--seed -1", "--device cuda:99", "--device warp", "--device meta", "--device cpu:3",
        "--dtype float16", "--dtype auot",
    ],
)  # fmt: skip
def test_impossible_values_are_refused(argv, capsys):
    args = common.parse_args(Args, argv.split())
    flag = argv.replace("=", " ").split()[0]
    refused(capsys, lambda: common.check_common(args), flag)


def test_possible_values_pass():
    common.check_common(Args())
    common.check_common(Args(lr=0.0, eval_temperature=0.7, steps=1, micro_batch_size=8, rate=-0.5, dtype="bfloat16"))

    @dataclasses.dataclass
    class Few:
        seed: int = 1

    common.check_common(Few())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_one_is_refused(capsys):
    refused(capsys, lambda: common.check_common(Args(device="cuda")), "--device")


# ------------------------------------------------------------------------------------------------------------ the rest


def test_mean_se():
    assert common.mean_se([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx(math.sqrt((1 / 3) / 4)))
    mean, se = common.mean_se(x for x in [True])
    assert mean == 1.0 and math.isnan(se) and math.isnan(common.mean_se([])[0])


def test_facts_about_the_machine():
    assert common.versions()["torch"] == torch.__version__
    assert 50e6 < common.peak_memory_bytes("cpu") < 1e12
    commit = common.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
