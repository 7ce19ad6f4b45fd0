"""The twin of nlac.py whose critic is a number and whose actor follows a gradient: clipped PPO.

Actor, prompts, worlds and rollouts are the same.

 1. Act as nlac.py does; keep the sampled ids.
 2. V(s): a linear head on the last hidden state at the last token of the state, just before the
    reply.
 3. Advantages by GAE over turns (a turn is an action; gamma and lambda count turns). Normalised
    over the batch.
 4. Clipped PPO for some epochs: every sampled token has its own ratio and its turn's advantage;
    value loss and entropy bonus beside it.

On policy: no replay buffer, no target weights, no KL term. The worlds pay at the end of an
episode, so its return stands at its last turn. A step takes epochs x episodes / batch size
gradient steps: of a tiny model 8, as nlac.py. --k, --m and --examples shape the base model, which
is nlac.py's; its other settings are without effect here. It cannot be resumed.

    python docs/ppo.py --lr 1e-4 --entropy-coef 0
    python docs/ppo.py --seed 1 --match runs/nlac-s1 --out-dir runs/ppo-s1
"""

import itertools
from collections import Counter
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


# docs/experiments.sh has the search of learning rate and entropy bonus
TINY = dict(lr=3e-4, batch_size=32, critic_gate=0.0)


# ------------------------------------------------------------------------- advantages and loss


def gae(rewards, values, gamma, lam):
    """Advantages A and returns A + V of an episode's turns.

    A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t; V = 0 after the end.
    """
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        value_after = values[t + 1] if t + 1 < len(values) else 0.0
        delta = rewards[t] + gamma * value_after - values[t]
        following = delta + gamma * lam * following
        advantages[t] = following
    return advantages, [a + v for a, v in zip(advantages, values)]


def clipped_loss(logprobs, old, advantages, clip):
    """- sum_t min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t) over tokens [N].

    r_t = exp(logprobs - old), its gradient that of `logprobs`.
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def reply_lengths(mask):
    """Sampled tokens per turn: the runs of 1 in a dialogue's mask."""
    return [len(list(run)) for sampled, run in itertools.groupby(mask) if sampled]


def look(model, head, chat, rows, temperature):
    """What the model says about dialogues [(ids, mask)], in one forward.

    Flat, episode by episode: logprobs [N] and entropies [N] of sampled tokens, values [turns].
    """
    ids = common.pad_rows([ids for ids, _ in rows], chat.pad).to(model.device)  # [B, T]
    sampled = common.pad_rows([mask for _, mask in rows], 0).to(model.device).bool()
    real = common.pad_rows([[1] * len(ids) for ids, _ in rows], 0).to(model.device)
    with common.compute(model):
        out = model(input_ids=ids, attention_mask=real, use_cache=False, output_hidden_states=True)
    acted = sampled[:, 1:]  # [B, T - 1]: position t says what it thinks of token t + 1
    all_logprobs = torch.log_softmax(out.logits[:, :-1][acted].float() / temperature, -1)  # [N, V]
    logprobs = all_logprobs.gather(1, ids[:, 1:][acted][:, None])[:, 0]
    entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    states = acted & ~sampled[:, :-1]  # [B, T - 1]: the reply begins at the next token
    values = head(out.hidden_states[-1][:, :-1][states].float())[:, 0]
    return logprobs, entropies, values


# ----------------------------------------------------------------------------------- learner


def rollout_with_ids(*args, **options):
    """nlac.rollout, and the (ids, mask) of its dialogues: ratios need the ids that were sampled."""
    made = []

    class Recorded(common.Dialogues):
        def __init__(self, *a):
            super().__init__(*a)
            made.append(self)

    plain = common.Dialogues
    common.Dialogues = Recorded
    try:
        episodes = nlac.rollout(*args, **options)
    finally:
        common.Dialogues = plain
    return episodes, [row for dialogues in made for row in zip(dialogues.ids, dialogues.mask)]


@dataclass
class Played:
    """An episode as the update needs it."""

    row: tuple  # ids and mask of its dialogue
    turns: list[int]  # sampled tokens of each
    old: torch.Tensor  # log-probs of the sampled tokens, by the weights that played
    values: list[float]  # of its turns, by the same
    advantages: torch.Tensor | None = None  # of its sampled tokens
    returns: torch.Tensor | None = None  # of its turns


class PPO(_loop.Learner):
    """Steps 1 to 4."""

    def __init__(self, model, chat, world, args):
        super().__init__(model, chat, world, args)
        width = model.get_input_embeddings().embedding_dim
        self.head = torch.nn.Linear(width, 1, device=model.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.trained = torch.nn.ModuleList([model, self.head])
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)

    @classmethod
    def check(cls, args):
        for name in "gamma", "gae_lambda":
            value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
            common.check(0 <= value <= 1, f"{flag} must be in [0, 1], not {value}")
        for name in "value_coef", "entropy_coef":
            value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
            common.check(value >= 0, f"{flag} must be at least 0, not {value}")
        common.check(args.clip > 0, f"--clip must be above 0, not {args.clip}")
        common.check(args.epochs >= 1, f"--epochs must be at least 1, not {args.epochs}")
        common.check(args.episodes_per_step % args.batch_size == 0,
                     "--batch-size must divide --episodes-per-step")

    def act(self, step, seeds):
        episodes, self.rows = rollout_with_ids(
            self.model, self.chat, self.args, "train", seeds, temperature=self.args.temperature,
            stream=("act", step))
        return episodes

    def learn(self, step, episodes, rng, clock):
        args = self.args
        played = self.with_advantages(episodes)
        common.set_rate(self.optimizer, args.lr * min(1, step / 10))
        updates = args.epochs * len(played) // args.batch_size
        losses = Counter(policy_loss=0.0, value_loss=0.0, kl=0.0)
        for _ in range(args.epochs):
            order = rng.sample(played, len(played))
            for start in range(0, len(order), args.batch_size):
                batch = sorted(order[start:start + args.batch_size], key=lambda p: len(p.row[0]))
                losses.update(self.gradient_step(batch))
        self.extra["gradient_steps"] += updates
        clock.lap("update")
        decoded = sum(episode.logprob for episode in episodes)
        gap = decoded - sum(p.old.sum().item() for p in played)
        return {name: loss / updates for name, loss in losses.items()} | {
            "value_first": common.mean(p.values[0] for p in played),
            "value_last": common.mean(p.values[-1] for p in played),
            "logprob_gap": gap / sum(len(p.old) for p in played)}

    def with_advantages(self, episodes):
        """Steps 2 and 3: what each episode is learnt from."""
        args, played, of_turns = self.args, [], []
        for i in range(0, len(self.rows), args.micro_batch_size):
            rows = self.rows[i:i + args.micro_batch_size]
            turns = [reply_lengths(mask) for _, mask in rows]
            with torch.no_grad():
                old, _, values = self.look(rows)
            old = old.split([sum(lengths) for lengths in turns])
            values = values.split([len(lengths) for lengths in turns])
            for row, lengths, logprobs, v in zip(rows, turns, old, values):
                played.append(Played(row, lengths, logprobs, v.tolist()))
        for one, episode in zip(played, episodes):
            rewards = [0.0] * (len(one.values) - 1) + [episode.score]
            advantages, returns = gae(rewards, one.values, args.gamma, args.gae_lambda)
            one.returns = torch.tensor(returns, device=self.model.device)
            of_turns.append(advantages)
        batch = torch.tensor([a for advantages in of_turns for a in advantages])
        mean = batch.mean().item()
        std = batch.std(correction=0).item() + 1e-6
        for one, advantages in zip(played, of_turns):
            of_tokens = []
            for advantage, length in zip(advantages, one.turns):
                of_tokens += [(advantage - mean) / std] * length
            one.advantages = torch.tensor(of_tokens, device=self.model.device)
        return played

    def gradient_step(self, batch):
        """Step 4 on a batch; its losses."""
        args, losses, total = self.args, Counter(), 0.0
        tokens = sum(len(p.old) for p in batch)  # divisors span the whole batch
        turns = sum(len(p.turns) for p in batch)
        for i in range(0, len(batch), args.micro_batch_size):
            micro = batch[i:i + args.micro_batch_size]
            logprobs, entropies, values = self.look([p.row for p in micro])
            old = torch.cat([p.old for p in micro])
            advantages = torch.cat([p.advantages for p in micro])
            policy = clipped_loss(logprobs, old, advantages, args.clip) / tokens
            errors = values - torch.cat([p.returns for p in micro])
            value = 0.5 * errors.square().sum() / turns
            bonus = args.entropy_coef * entropies.sum() / tokens
            loss = policy + args.value_coef * value - bonus
            loss.backward()
            total += loss.item()
            drift = (old - logprobs).detach()
            kl = ((-drift).exp() - 1 + drift).sum().item() / tokens
            losses.update(policy_loss=policy.item(), value_loss=value.item(), kl=kl)
        common.gradient_step(self.trained, self.optimizer, total, [p.row for p in batch])
        return losses

    def look(self, rows):
        """See the function of that name."""
        return look(self.model, self.head, self.chat, rows, self.args.temperature)


if __name__ == "__main__":
    _loop.main("ppo", Args, PPO, TINY, {"batch_size": 8, "episodes_per_step": 8})
