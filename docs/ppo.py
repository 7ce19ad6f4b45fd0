"""The number-critic twin of nlac.py: same actor, prompts, worlds and rollouts, but the critic is a number and the actor follows a gradient.

 1. Act as nlac.py does; keep the sampled ids.
 2. V(s): a linear head on the last hidden state at the last token of the state, just before the reply.
 3. Advantages by GAE over turns (a turn is an action; gamma and lambda count turns). Normalised over the batch.
 4. Clipped PPO for some epochs: every sampled token has its own ratio and its turn's advantage; value loss and entropy bonus beside it.

On policy: no replay buffer, no target weights, no KL term. The worlds pay at the end of an episode, so its return stands at its last turn.
A step takes epochs x episodes / batch size gradient steps: 8 with the defaults, as nlac.py. --k, --m and --examples shape the base model,
which is nlac.py's; its other settings are without effect here. It cannot be resumed.

    python docs/ppo.py --lr 1e-4 --entropy-coef 0
    python docs/ppo.py --seed 1 --match docs/results/nlac-s1 --out-dir docs/results/ppo-s1
"""

import itertools
from dataclasses import dataclass

import _loop
import torch

import common
import nlac


@dataclass
class Args(_loop.Args):
    batch_size: int = common.flag(8, "episodes per gradient step; divides --episodes-per-step")
    epochs: int = common.flag(4, "passes over the episodes of a step")
    clip: float = common.flag(0.2, "of the ratio")
    gamma: float = common.flag(0.95, "discount per turn")
    gae_lambda: float = common.flag(0.95, "per turn")
    value_coef: float = common.flag(0.5, "weight of the value loss")
    entropy_coef: float = common.flag(0.01, "weight of the entropy bonus")


# for --model tiny; see docs/experiments.sh for the search
TINY = dict(lr=3e-4, batch_size=32, critic_gate=0.0)


# ------------------------------------------------------------------------------------------------------ advantages and loss


def gae(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t, V = 0 after the end. Returns (A, A + V)."""
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t]
        advantages[t] = following = delta + gamma * lam * following
    return advantages, [a + v for a, v in zip(advantages, values)]


def clipped_loss(logprobs, old, advantages, clip):
    """- sum_t min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t) over tokens [N], with r_t = exp(logprobs - old)."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum()


def reply_lengths(mask):
    """Sampled tokens per turn: the runs of 1 in a dialogue's mask."""
    return [len(list(run)) for sampled, run in itertools.groupby(mask) if sampled]


def look(model, head, chat, rows, temperature):
    """What the model says about dialogues [(ids, mask)], in one forward, flat and episode by episode:
    logprobs [N] and entropies [N] of the sampled tokens, values [turns]."""
    ids = common.pad_rows([ids for ids, _ in rows], chat.pad).to(model.device)  # [B, T]
    sampled = common.pad_rows([mask for _, mask in rows], 0).to(model.device).bool()
    real = common.pad_rows([[1] * len(ids) for ids, _ in rows], 0).to(model.device)
    with common.compute(model):
        out = model(input_ids=ids, attention_mask=real, use_cache=False, output_hidden_states=True)
    logp = torch.log_softmax(out.logits[:, :-1][sampled[:, 1:]].float() / temperature, -1)  # [N, V]
    states = sampled[:, 1:] & ~sampled[:, :-1]  # [B, T - 1]: the reply begins at the next token
    values = head(out.hidden_states[-1][:, :-1][states].float())[:, 0]
    return logp.gather(1, ids[:, 1:][sampled[:, 1:]][:, None])[:, 0], -(logp.exp() * logp).sum(-1), values


# ------------------------------------------------------------------------------------------------------------------ learner


def rollout_with_ids(*args, **options):
    """nlac.rollout, and the (ids, mask) of its dialogues: ratios need the ids that were sampled."""
    made = []

    class Recorded(common.Dialogues):
        def __init__(self, *a):
            super().__init__(*a)
            made.append(self)

    common.Dialogues, plain = Recorded, common.Dialogues
    try:
        episodes = nlac.rollout(*args, **options)
    finally:
        common.Dialogues = plain
    return episodes, [row for dialogues in made for row in zip(dialogues.ids, dialogues.mask)]


class PPO(_loop.Learner):
    def __init__(self, model, chat, world, args):
        super().__init__(model, chat, world, args)
        self.head = torch.nn.Linear(model.get_input_embeddings().embedding_dim, 1, device=model.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.trained = torch.nn.ModuleList([model, self.head])
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                           weight_decay=0.0)

    @classmethod
    def check(cls, args):
        for name in "gamma", "gae_lambda":
            common.check(0 <= getattr(args, name) <= 1, f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}")
        for name in "value_coef", "entropy_coef":
            common.check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
        common.check(args.clip > 0, f"--clip must be above 0, not {args.clip}")
        common.check(args.epochs >= 1, f"--epochs must be at least 1, not {args.epochs}")
        common.check(args.episodes_per_step % args.batch_size == 0, "--batch-size must divide --episodes-per-step")

    def act(self, step, seeds):
        episodes, self.rows = rollout_with_ids(self.model, self.chat, self.args, "train", seeds, temperature=self.args.temperature,
                                               stream=("act", step))
        return episodes

    def learn(self, step, episodes, rng, clock):
        args, rows = self.args, self.rows
        losses = {"policy_loss": 0.0, "value_loss": 0.0, "kl": 0.0}
        size, lengths = args.micro_batch_size, [reply_lengths(mask) for _, mask in rows]
        old, values = [], []  # per episode: log-probs [tokens], values [turns], of the weights that played
        with torch.no_grad():
            for i in range(0, len(rows), size):
                logprobs, _, v = look(self.model, self.head, self.chat, rows[i:i + size], args.temperature)
                old += logprobs.split([sum(n) for n in lengths[i:i + size]])
                values += [part.tolist() for part in v.split([len(n) for n in lengths[i:i + size]])]
        pairs = [gae([0.0] * (len(v) - 1) + [e.score], v, args.gamma, args.gae_lambda) for e, v in zip(episodes, values)]
        flat = torch.tensor([a for advantages, _ in pairs for a in advantages])
        mean, std = flat.mean().item(), flat.std(correction=0).item() + 1e-6  # normalised over the turns of the batch
        token_advantages = [torch.tensor([(a - mean) / std for a, n in zip(advantages, turns) for _ in range(n)], device=self.model.device)
                            for (advantages, _), turns in zip(pairs, lengths)]
        returns = [torch.tensor(r, device=self.model.device) for _, r in pairs]
        played = sum(e.logprob for e in episodes) - sum(o.sum().item() for o in old)

        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 10)
        updates = args.epochs * len(rows) // args.batch_size
        for _ in range(args.epochs):
            order = rng.sample(range(len(rows)), len(rows))
            for start in range(0, len(order), args.batch_size):
                batch = sorted(order[start:start + args.batch_size], key=lambda i: len(rows[i][0]))
                tokens = sum(len(old[i]) for i in batch)  # divisors span the whole batch
                turns, total = sum(len(lengths[i]) for i in batch), 0.0
                for j in range(0, len(batch), size):
                    micro = batch[j:j + size]
                    logprobs, entropies, v = look(self.model, self.head, self.chat, [rows[i] for i in micro], args.temperature)
                    before = torch.cat([old[i] for i in micro])
                    policy = clipped_loss(logprobs, before, torch.cat([token_advantages[i] for i in micro]), args.clip) / tokens
                    value = 0.5 * (v - torch.cat([returns[i] for i in micro])).square().sum() / turns
                    loss = policy + args.value_coef * value - args.entropy_coef * entropies.sum() / tokens
                    loss.backward()
                    total += loss.item()
                    drift = (before - logprobs).detach()
                    losses["policy_loss"] += policy.item() / updates
                    losses["value_loss"] += value.item() / updates
                    losses["kl"] += ((-drift).exp() - 1 + drift).sum().item() / tokens / updates
                common.gradient_step(self.trained, self.optimizer, total, [rows[i] for i in batch])
        self.extra["gradient_steps"] += updates
        clock.lap("update")
        return losses | {"value_first": common.mean(v[0] for v in values), "value_last": common.mean(v[-1] for v in values),
                         "logprob_gap": played / sum(map(len, old))}


if __name__ == "__main__":
    _loop.main("ppo", Args, PPO, TINY, {"batch_size": 8, "episodes_per_step": 8})
