"""What replaces ACT in the controls of its paper: stages for --pipeline beside act, il and rl.

    sft-choice    the right choice of two actions is imitated
    dpo           direct preference for the expert's action over the candidate (arXiv 2305.18290)
    no-reasoning  GRPO on the choice as in act, by a prompt that asks for no thought

All else is act.py's: data, epochs, evaluation, files, --resume.

    python docs/act_controls.py --pipeline dpo,il --out-dir runs/dpo,il
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import act
import common


@dataclass
class Args(act.Args):
    pair_batch_size: int = common.flag(16, "pairs per step of sft-choice and dpo (not in the paper)")
    dpo_beta: float = common.flag(0.1, "of dpo (not in the paper)")


def only_last(messages):
    """A dialogue of which the last reply alone is to be imitated."""
    *before, last = messages
    return [*({**m, "shot": True} if m["role"] == "assistant" else m for m in before), last]


def sft_choice(job):
    """The expert's action, written below the question."""
    args = job.args
    for step, batch in act.stage_steps(job, job.pairs, args.pair_batch_size, args.sft_lr):
        dialogues = []
        for pair in act.in_random_order(job, step, batch):
            asked = act.question(job.world, args, pair)
            dialogues.append(only_last([*asked, act.assistant(act.written(pair["expert"]))]))
        metrics = act.imitate(job.model, job.chat, args, job.optimizer, dialogues)
        act.end_step(job, step, metrics)


def dpo(job):
    """The expert's action is to become likelier, as the policy's reply, than the candidate."""
    args, chat = job.args, job.chat
    steps = act.stage_steps(job, job.pairs, args.pair_batch_size, args.sft_lr, refers=True)
    for step, batch in steps:
        triples = []
        for pair in batch:
            prompt = chat.dialogue(act.dialogue(job.world, args, pair["messages"]))
            replies = [chat.reply(act.written(pair[which])) for which in ("expert", "candidate")]
            triples.append((prompt, *replies))
        act.end_step(job, step, dpo_step(job, triples))


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Its eq. 7, - log sigmoid(beta (log-ratio chosen - log-ratio rejected)), of log-probs [B]."""
    margin = chosen - reference_chosen - rejected + reference_rejected
    return -torch.nn.functional.logsigmoid(beta * margin)


def reply_logprobs(model, job, rows, which):
    """log p of whole replies, [B]; `which` of (prompt, chosen, rejected)."""
    prompts, targets = [row[0] for row in rows], [row[which] for row in rows]
    logprobs, _ = common.target_logprobs(model, job.chat, prompts, targets, job.args.temperature)
    return logprobs.sum(1)


def dpo_step(job, triples):
    """One gradient step on the mean loss over (prompt, chosen, rejected), lists of ids."""
    args, loss, gained = job.args, 0.0, 0.0
    for rows in act.groups(triples, args.micro_batch_size):
        with torch.no_grad():
            before = [reply_logprobs(job.reference, job, rows, which) for which in (1, 2)]
        now = [reply_logprobs(job.model, job, rows, which) for which in (1, 2)]
        part = dpo_loss(*now, *before, args.dpo_beta).sum() / len(triples)
        part.backward()
        loss += part.item()
        more = now[0] - before[0] > now[1] - before[1]
        gained += more.float().sum().item() / len(triples)
    norm = common.gradient_step(job.model, job.optimizer, loss, triples)
    return {"loss": loss, "chosen_gained_more": gained, "grad_norm": norm}


def no_reasoning(job):
    """Which of two actions? At once."""
    act.grpo(job, job.pairs, reasons=False)


STAGES = {"sft-choice": sft_choice, "dpo": dpo, "no-reasoning": no_reasoning}


def main():
    """act.main with more stages."""
    args = common.parse_args(Args, act.TINY)
    common.check(args.kl or "dpo" not in args.pipeline,
                 "dpo measures against the start of its stage: --kl must be above 0")
    act.Args = Args
    act.STAGES |= STAGES
    act.PAIRED |= {*STAGES}
    act.AT_LEAST |= {"pair_batch_size": 1, "dpo_beta": 0}
    act.main()


if __name__ == "__main__":
    main()
