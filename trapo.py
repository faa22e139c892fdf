"""TRAPO in one file: Trust-Region Adaptive Policy Optimization (arXiv 2512.17636).

Post-training usually runs SFT on expert solutions and then RL. TRAPO does both inside every
training instance. The policy first tries a problem alone; where it does badly, it is given the
beginning of an expert solution and continues from there. Here is one group of eight rollouts, as
the program prints it (--eval-every 13). A clock shows 14 and is moved five times, on lines named m
to q: where does it end? [ ] holds the expert's tokens, detours and all; A is the advantage:

prompt: l 14 m +7 n +7 o +6 p -8 q +1 ?
  micro-group 1: no help
    reward 0, A -0.25:  # 23 <eos>
    reward 0, A -0.25:  # 7 <eos>
    reward 0, A -0.25:  # 9 <eos>
    reward 0, A -0.25:  # 23 <eos>
  micro-group 2: 20% of the solution, as the mean return so far is 0.00
    reward 0, A -0.25:  [see m +7 21 n] +7 4 o +6 10 p -8 2 # 2 <eos>
    reward 1, A +0.75:  [see m +7 21 n] +7 4 o +6 10 p -8 2 q +1 3 # 3 <eos>
  micro-group 3: 50% of the solution, as the mean return so far is 0.17
    reward 0, A -0.25:  [see m +7 21 n +7 4 o +6 1 oops o] -8 22 p +1 23 q +1 0 # 0 <eos>
  micro-group 4: 100% of the solution, as the mean return so far is 0.14
    reward 1, A +0.75:  [see m +7 21 n +7 4 o +6 1 oops o +6 10 now p -8 2 q +1 3 # 3 <eos>]

One update then trains two kinds of tokens (Section 2):

    the policy's own (completion)   by a group-relative policy gradient, with A as weight
    the expert's (prefix)           by Trust-Region SFT: SFT, whose gradient weight 1/p is clipped
                                    at 1/alpha (Eq. 3)

What this file leaves out of GRPO, and why:
    1. no reference model, no KL penalty: the paper trains without them
    2. no division by the group's standard deviation or the response's length: Dr. GRPO's repairs
    3. no importance ratio, no PPO clip: one update per batch of rollouts is on-policy

Words: a *rollout* is one response to a prompt: an expert *prefix* (mostly empty), continued by the
policy's own *completion*. The eight rollouts of a prompt are its *group*, drawn in *micro-groups*.
The *return* of a rollout is its reward, 1 or 0; its *advantage* is the reward minus the group's
mean.

    python trapo.py                                     the embedded experiment: CPU, offline
    python trapo.py --model Qwen2.5-0.5B-Instruct       the same loop on GSM8K, on one GPU

The lecture:  settings, 1 losses, 2 adaptive guidance, 3 log-probs, 4 the update, 5 step and loop.
The workshop: 6 the sampler, 7 models, data and reward, 8 the clock world, 9 processes and
checkpoints, 10 metrics, evaluation and printing, 11 the command line.
"""
import argparse, contextlib, copy, dataclasses, fcntl, functools, glob  # noqa: E401
import json, logging, math, os, random, re, resource, shutil  # noqa: E401
import signal, sys, time, typing  # noqa: E401
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as full_state  # whole tensors from shards
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Tokens = list[int]
Drawn = tuple[Tokens, list[float]]  # a completion, and the log-probs it was drawn with
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

def gather(value: object) -> list:
    """Every process's value, in the order of their ranks: [value] if there is one process."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

# ==== Settings. A preset goes over these defaults, and a flag of the command line over a preset.
def setting(default: object, help: str, group: str | None = None) -> typing.Any:
    """A field of Settings that is a flag of the command line; `group` opens a group of flags."""
    metadata = {"help": help, "group": group}
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)

ALWAYS = 2.0  # as a threshold: every mean return is below it
MICRO = {"sizes": [4, 2, 1, 1], "ratios": [0.0, 0.2, 0.5, 1.0], "thresholds": [-1.0, 0.5, 0.7, 0.9]}

@dataclass
class Settings:
    """All that a run depends on. Defaults are for a small model on GSM8K; (paper: its value)."""
    method: str = setting("trapo", "preset of the next four settings", group="method")
    sizes: list[int] = setting(MICRO["sizes"], "rollouts in each micro-group")
    ratios: list[float] = setting(MICRO["ratios"], "share of the expert solution given")
    thresholds: list[float] = setting(MICRO["thresholds"], "guided if the mean return is below")
    prefix_loss: str = setting("trsft", "loss on the expert's tokens")
    alpha: float = setting(0.1, "edge of the trust region, a probability (paper: 0.1)")
    model: str | None = setting(None, "folder, Hub id or bare Qwen name; none: embedded experiment",
                                "model and data")
    dataset: str | None = setting(None, "gsm8k, openr1, or a .jsonl / .json / .parquet file")
    max_prompt: int = setting(1024, "longest prompt, tokens (paper: 1024)")
    max_response: int = setting(1024, "longest response, prefix included, tokens (paper: 8192)")
    steps: int = setting(200, "training steps", group="optimisation")
    base_steps: int = setting(2500, "pretraining steps of the embedded experiment's base")
    base_worked: float = setting(0.0, "share of that base's late quiz questions that were worked")
    prompts: int = setting(32, "prompts per step, over all processes (paper: 128)")
    lr: float = setting(5e-6, "AdamW's learning rate, constant after the warm-up (paper: 5e-6)")
    warmup: int = setting(5, "steps of linear warm-up")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this L2 norm")
    temperature: float = setting(1.0, "sampling temperature of the rollouts (paper: 1)")
    device: str | None = setting(None, "cuda or cpu; default: cuda, if any", "speed and memory")
    bf16: bool | None = setting(None, "compute and sample in bfloat16; default: on CUDA")
    micro_tokens: int = setting(4096, "padded tokens in a micro-batch of the update")
    kv_tokens: int = setting(1 << 19, "tokens in the sampler's cache")
    speculate: bool | None = setting(None, "draw all micro-groups in one pass; default: on CUDA")
    recompute: bool = setting(False, "gradient checkpointing: less memory, a third more time")
    out: str | None = setting(None, "folder; default: runs/<model>-<method>-seed<seed>", "run")
    seed: int = setting(0, "of everything random")
    eval_every: int = setting(20, "steps between evaluations")
    eval_size: int = setting(200, "held-out problems")
    save_every: int = setting(50, "steps between checkpoints")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")
    overwrite: bool = setting(False, "replace the run in --out")
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's; this and `decay` are set by presets alone
    decay: bool = False                       # in the second half, lr falls linearly to 0

    @property
    def schedule(self) -> list["MicroGroup"]:
        """Algorithm 1's table, a row per micro-group."""
        return [MicroGroup(*row) for row in zip(self.sizes, self.ratios, self.thresholds)]

METHODS = {  # a method is four settings: the rows of Table 2, and the baselines
    "trapo": MICRO | {"prefix_loss": "trsft"},
    "micro": MICRO | {"prefix_loss": "none"},
    "naive": MICRO | {"prefix_loss": "sft"},
    "micro-luffy": MICRO | {"prefix_loss": "luffy"},
    "fixed-prefix": MICRO | {"thresholds": [-1.0, ALWAYS, ALWAYS, ALWAYS], "prefix_loss": "trsft"},
    "grpo": {"sizes": [8], "ratios": [0.0], "thresholds": [-1.0], "prefix_loss": "none"},
    "luffy": {"sizes": [7, 1], "ratios": [0.0, 1.0], "thresholds": [-1.0, ALWAYS],
              "prefix_loss": "luffy"},
    "sft": {"sizes": [1], "ratios": [1.0], "thresholds": [ALWAYS], "prefix_loss": "sft"}}

# ==== Part 1. The losses. All are per token; the update (Part 4) sums them.
#
# Let p be the policy's probability of an expert token. SFT minimises -log p, whose gradient
# -(1/p) grad p explodes as p -> 0: the tokens least likely to the policy move it most, into text
# that neither it nor the expert writes, and its rollouts degenerate (Section 2.2). TrSFT clips the
# weight 1/p. Its optimum drops the expert's rare tokens and renormalises the main modes
# (Proposition 1): it is mode-seeking, where SFT is mode-covering.
def trsft_loss(logprobs: Tensor, alpha: float) -> Tensor:
    """Trust-Region SFT, Eq. 3:  grad L = -1 / max(p, alpha) * grad p.

        L(p) = -log p                       if p >= alpha   (inside the trust region: SFT)
             = 1 - log(alpha) - p / alpha   if p <  alpha   (outside: constant weight 1/alpha)

    The two pieces meet at p = alpha. alpha = 0 is SFT; alpha = 1 is 1 - p; outside [0, 1] it is a
    ValueError. From log p of the expert's tokens (nats, any shape) to losses, same shape and dtype.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if alpha < 1e-30:  # every p is inside; the other piece would take log(0), or overflow
        return -logprobs
    p = logprobs.exp()
    return torch.where(p >= alpha, -logprobs, 1 - math.log(alpha) - p / alpha)

def luffy_loss(logprobs: Tensor, advantages: Tensor | float, gamma: float = 0.1) -> Tensor:
    """LUFFY's loss on expert tokens (arXiv 2504.14945):  -A p / (p + gamma), not clipped.

    From log p (nats, any shape) and advantages (broadcastable to it) to losses of that shape.
    """
    p = logprobs.exp()
    return -advantages * p / (p + gamma)

PREFIX_LOSSES = {  # what the expert's tokens may be trained with: the last rows of Table 2
    "trsft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, alpha),
    "sft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, 0.0),
    "luffy": lambda logprobs, advantages, alpha: luffy_loss(logprobs, advantages),
    "none": lambda logprobs, advantages, alpha: torch.zeros_like(logprobs)}

def policy_gradient_loss(logprobs: Tensor, advantages: Tensor | float) -> Tensor:
    """The group-relative policy gradient (Section 2.3) on the policy's own tokens:  -A log p.

    REINFORCE with the group's mean as baseline. PPO and GRPO weigh its gradient by the ratio of p
    to the p that the token was drawn with, and clip that ratio, since they update several times on
    the same rollouts. In one update per batch it is 1. (A bf16 sampler's p differs a little: the
    metric logprob_gap says how much; nothing corrects it.) From log p (nats, any shape) and
    advantages (broadcastable) to losses of that shape.
    """
    return -advantages * logprobs

def group_advantages(rewards: Tensor) -> Tensor:
    """[..., G] rewards -> [..., G] advantages: reward minus the group's mean, guided ones included.

    Not divided by the standard deviation, which would favour groups nearly all right or all wrong.
    The mean holds rollouts that were guided because this one failed. With rewards of 0 and 1 that
    multiplies the expected gradient of each context (prompt + prefix) by a positive factor.
    """
    return rewards - rewards.mean(-1, keepdim=True)

# ==== Part 2. Adaptive guidance: micro-group sampling (Section 2.3, Algorithm 1).
#
# How much help a problem needs is not known in advance, so it is found out: before each micro-group
# the mean return of all rollouts drawn so far is compared with a threshold. Hard problems get
# longer and longer prefixes, easy ones none. There is no model in this part: `generate` and
# `reward` are functions, and the tests drive them with a script.
@dataclass(frozen=True)
class MicroGroup:
    """n_i rollouts that start from the first L_i of the expert's tokens if guided (Algorithm 1)."""
    size: int         # n_i, rollouts
    ratio: float      # L_i, share of the expert solution, in [0, 1]
    threshold: float  # t_i: guided if the mean return so far is below it; -1 never, ALWAYS always

@dataclass
class Problem:
    """A prompt, the expert's solutions (perhaps none; each ends in EOS), and the answer."""
    prompt_ids: Tokens
    solutions: list[Tokens]
    answer: str

@dataclass
class Rollout:
    """A response = prefix + completion: drawn and scored in Part 2, weighted in 5, trained in 4."""
    prompt: Tokens
    prefix: Tokens               # the expert's tokens, [] when not guided
    completion: Tokens = field(default_factory=list)  # the policy's, EOS included when reached
    reward: float = 0.0
    micro_group: int = 0         # index into the schedule
    advantage: float = 0.0
    sampler_logprobs: list[float] = field(default_factory=list)  # of the completion, when drawn
    logprobs: list[float] = field(default_factory=list)   # of prefix + completion, by the update
    entropies: list[float] = field(default_factory=list)  # likewise; [] if it left the rollout out

def is_guided(returns_so_far: list[float], micro_group: MicroGroup) -> bool:
    """Algorithm 1's test: is the mean return so far (0 before the first rollout) below t_i?"""
    return sum(returns_so_far) / max(1, len(returns_so_far)) < micro_group.threshold

def expert_prefix(solution_ids: Tokens, ratio: float) -> Tokens:
    """The first round(ratio * length) ids of the solution; all of them, EOS included, at ratio 1.

    The paper cuts anywhere; the released code moves on to a paragraph break if one is near.
    """
    return solution_ids[:round(ratio * len(solution_ids))]

def sample_groups(problems: list[Problem], schedule: list[MicroGroup],
                  generate: Callable[[list[Tokens], list[int]], list[Drawn]],
                  reward: Callable[[Problem, Tokens], float], rng: random.Random, *,
                  max_response: int = 1024, speculate: bool = False) -> list[list[Rollout]]:
    """Algorithm 1: every problem's group of rollouts, in the order drawn, by micro-groups.

    Args: problems: anything with .prompt_ids and .solutions; a guided micro-group picks one.
        generate: (requests, limits on new tokens) -> a completion and its log-probs for each.
        reward: of a response, prefix and completion together, in [0, 1].
        rng: picks the solutions.   max_response: tokens, prefix and completion together.
        speculate: draw all that may be needed in one call of generate; the same distribution.
    """
    # All picks come first, so who is guided does not change what rng picks for the others.
    solutions = [[rng.choice(p.solutions) if p.solutions else None for _ in schedule]
                 for p in problems]
    if speculate:
        generate = draw_ahead(problems, solutions, schedule, generate, max_response)
    groups: list[list[Rollout]] = [[] for _ in problems]
    for m, micro_group in enumerate(schedule):
        unfinished = []
        for problem, group, picked in zip(problems, groups, solutions):
            solution, prefix = picked[m], []
            if solution is not None and is_guided([r.reward for r in group], micro_group):
                prefix = expert_prefix(solution, micro_group.ratio)
            new = [Rollout(problem.prompt_ids, prefix, micro_group=m)
                   for _ in range(micro_group.size)]
            group += new
            if prefix != solution:  # the whole solution would leave nothing to generate
                unfinished += new
        requests = [r.prompt + r.prefix for r in unfinished]
        limits = [max(0, max_response - len(r.prefix)) for r in unfinished]
        drawn = generate(requests, limits) if requests else []
        for r, (completion, logprobs) in zip(unfinished, drawn, strict=True):
            r.completion, r.sampler_logprobs = completion, logprobs
        for problem, group in zip(problems, groups):
            for r in group[-micro_group.size:]:
                r.reward = reward(problem, r.prefix + r.completion)
    return groups

# ==== Part 3. Log-probs of response tokens: what every loss above is a function of.
#
# Logits of whole batches are what runs out of memory first: 128 sequences of 64 tokens at Qwen's
# vocabulary of 151 936 are 5 GB a copy. So the hidden states are cut down to the positions that
# matter, and the head is applied in chunks, which the backward pass computes again.
HEAD_CHUNK = 1024  # tokens whose [tokens, vocabulary] logits exist at one time

def token_logprobs(policy: nn.Module, sequences: list[Tokens], starts: list[int],
                   temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each sequence's tokens from `starts` on, with gradient, and entropies without.

    Padding is on the right and needs no mask: causal attention never looks there.

    Args: sequences: token ids, ragged.
        starts: index of the first token to score in each, >= 1 (the first token has no context).
        temperature: log-probs are those of softmax(logits / temperature), what was sampled from.
    Returns: two lists of tensors in nats, one of [len(sequence) - start] per sequence.
    """
    width, device = max(map(len, sequences)), policy.device
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)  # [B, T]
    hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
    scored = torch.tensor([[start <= t < len(s) for t in range(width)]
                           for s, start in zip(sequences, starts)], device=device)      # [B, T]
    targets = ids[scored].split(HEAD_CHUNK)                                             # of [N]
    states = hidden[:, :-1][scored[:, 1:]].split(HEAD_CHUNK)  # position t - 1 predicts token t
    head, score = policy.get_output_embeddings(), chunk_logprobs
    if len(targets) > 1:
        score = functools.partial(checkpoint, chunk_logprobs, use_reentrant=False,
                                  preserve_rng_state=False)
    chunks = [score(head, h, y, temperature) for h, y in zip(states, targets)]
    lengths = [len(s) - start for s, start in zip(sequences, starts)]
    logprobs, entropies = (torch.cat(pieces).split(lengths) for pieces in zip(*chunks))
    return list(logprobs), list(entropies)

def chunk_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor,
                   temperature: float) -> tuple[Tensor, Tensor]:
    """[N, H] hidden states and [N] targets -> [N] log-probs and [N] entropies (no gradient)."""
    logits = head(hidden)                                                         # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropies = torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropies

# ==== Part 4. The update. The loss of a batch of rollouts is
#
#     ( sum over completion tokens of the policy-gradient loss
#     + sum over prefix tokens of the prefix loss )  /  (number of rollouts * max response tokens)
#
# The divisor is a constant (Dr. GRPO): dividing by each response's own length would go easy on long
# wrong answers. It also makes the gradient a plain sum, so neither the cut into micro-batches, nor
# their order, nor leaving out rollouts that add exactly nothing can change it.
def is_inert(rollout: Rollout, prefix_loss: str) -> bool:
    """Is the rollout's gradient zero for certain? Then the update leaves it out."""
    weightless = rollout.advantage == 0
    prefix_is_inert = not rollout.prefix or prefix_loss == "none" or (
        prefix_loss == "luffy" and weightless)
    return prefix_is_inert and (weightless or not rollout.completion)

def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices cut into micro-batches of at most `budget` padded tokens (or one sequence).

    Sorted by length, longest first: neighbours need little padding, and an out-of-memory error
    comes in the first micro-batch.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches

def rollout_loss(rollout: Rollout, logprobs: Tensor, args: Settings) -> Tensor:
    """Prefix loss plus policy gradient, summed, of [prefix + completion] log-probs: a scalar."""
    prefix, completion = logprobs.tensor_split([len(rollout.prefix)])
    expert = PREFIX_LOSSES[args.prefix_loss](prefix, rollout.advantage, args.alpha)
    return expert.sum() + policy_gradient_loss(completion, rollout.advantage).sum()

def accumulate_gradients(policy: nn.Module, rollouts: list[Rollout], args: Settings) -> float:
    """Add the gradient of the batch's loss to the parameters' .grad; returns the loss, and leaves
    log-probs and entropies on every rollout that is trained."""
    active = [r for r in rollouts if not is_inert(r, args.prefix_loss)]
    batches = micro_batches([len(r.prompt + r.prefix + r.completion) for r in active],
                            args.micro_tokens)
    # Under FSDP (Part 9) token_logprobs is the policy's own method, and gradients are averaged over
    # the processes: hence the divisor is the mean of theirs.
    logprobs_of = getattr(policy, "token_logprobs", functools.partial(token_logprobs, policy))
    divisor = sum(gather(len(rollouts))) / WORLD * args.max_response
    batches += [[]] * (max(gather(len(batches))) - len(batches))  # all must take part in each pass
    total = 0.0
    for indices in batches:
        batch = [active[i] for i in indices]
        sequences = [r.prompt + r.prefix + r.completion for r in batch] or [[0, 0]]
        starts = [len(r.prompt) for r in batch] or [1]
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.bf16):
            logprobs, entropies = logprobs_of(sequences, starts, args.temperature)
        loss = 0.0 if batch else 0 * logprobs[0].sum()
        for r, both, entropy in zip(batch, logprobs, entropies):
            r.logprobs, r.entropies = both.tolist(), entropy.tolist()
            loss = loss + rollout_loss(r, both, args)
        (loss / divisor).backward()
        total += loss.item() / divisor
    return total

# ==== Part 5. One step, and the loop.
def train_step(policy: nn.Module, sampler: nn.Module, optimizer: torch.optim.Optimizer,
               task: "Task", args: Settings, step: int) -> tuple[dict, list[list[Rollout]]]:
    """Rollouts, then the update: (metrics over all processes, this process's groups).

    The sampler has the policy's weights (Part 9): it is the policy itself, or a copy to draw from.
    """
    spent = Counter(seconds_sample=0.0)  # seconds and tokens

    def generate(requests: list[Tokens], limits: list[int]) -> list[Drawn]:
        began = time.perf_counter()
        completions, logprobs = sample(sampler, requests, limits, args.temperature,
                                       kv_tokens=args.kv_tokens)
        spent["seconds_sample"] += time.perf_counter() - began
        spent["tokens_generated"] += sum(map(len, completions))
        return list(zip(completions, logprobs))

    # ---- Rollout phase: this process's share of the step's prompts, a group of rollouts each.
    began = time.perf_counter()
    rng = random.Random(f"{args.seed} {step} {RANK}")
    torch.manual_seed(rng.getrandbits(63))
    groups = sample_groups(batch_at(step, task, args)[RANK::WORLD], args.schedule, generate,
                           task.reward, rng, max_response=args.max_response,
                           speculate=args.speculate)
    for group in groups:
        advantages = group_advantages(torch.tensor([float(r.reward) for r in group]))
        for r, advantage in zip(group, advantages.tolist()):
            r.advantage = advantage
    spent["seconds_reward"] = time.perf_counter() - began - spent["seconds_sample"]

    # ---- Learning phase: one update on all of them.
    began = time.perf_counter()
    rollouts = [r for group in groups for r in group]
    for p in policy.parameters():  # zeros, not None, or AdamW's momentum would skip an inert step
        p.grad = torch.zeros_like(p)
    loss = accumulate_gradients(policy, rollouts, args)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if WORLD > 1 else norm)
    if math.isfinite(norm):
        set_learning_rate(optimizer, step, args)
        optimizer.step()
        refresh(sampler, policy)
    spent["seconds_update"] = time.perf_counter() - began
    return step_metrics(policy, rollouts, loss, norm, spent, args), groups

def train(args: Settings) -> None:
    """The whole run: load or resume; then roll out, update, evaluate and save, step by step."""
    policy, tokenizer, sampler, optimizer, task, done = prepare(args)  # steps done, 0 or resumed
    log, skipped = open_log(args, done), 0
    if done == 0 and task.heldout:
        log(done, {"eval": evaluate(sampler, task, args, whole=True)})
    with caught_signals() as signals:
        bar = tqdm(range(done, args.steps), title(args), disable=RANK > 0)
        for step in bar:
            metrics, groups = train_step(policy, sampler, optimizer, task, args, step)
            done, last = step + 1, step + 1 == args.steps
            skipped = skipped + 1 if metrics["grad_norm"] is None else 0  # in a row
            due = last or done % args.eval_every == 0
            if due and task.heldout:
                metrics["eval"] = evaluate(sampler, task, args, whole=last)
                show_group(groups, tokenizer, args)
            log(done, metrics, [as_record(group, tokenizer, args) for group in groups[:2] if due])
            bar.set_postfix(in_short(metrics), refresh=False)
            stop = any(gather(bool(signals) or skipped == 3))  # in any process
            if stop or last or done % args.save_every == 0:
                save(policy, tokenizer, optimizer, done, args)
            if stop:
                break
        finish(args, done, skipped, signals)

# ==== The workshop. This was TRAPO; below is what it runs on.
#
# ==== Part 6. The sampler: draws rollouts for train_step, and responses for `evaluate` and eval.py.
#
# Not model.generate, which takes top-k, top-p and a repetition penalty from the model's
# generation_config: samples from another distribution would make the policy gradient biased.
@torch.inference_mode()
def sample(policy: nn.Module, requests: list[Tokens], limits: list[int], temperature: float = 1.0,
           *, noise: Tensor | None = None, kv_tokens: int = 1 << 19,
           ) -> tuple[list[Tokens], list[list[float]]]:
    """Draw one completion per request from the exact policy.

    Args: requests: token ids, ragged, none empty.   limits: new tokens allowed for each.
        temperature: divides the logits; 0 is greedy.
        noise: [requests, longest limit] uniform numbers, float64; else from torch's generator.
        kv_tokens: split the requests so that a batch's cache holds at most so many tokens.
    Returns: completions (EOS included when reached) and the log-probs of what was drawn, nats,
        under softmax(logits / temperature), or softmax(logits) if greedy.
    """
    was_training = policy.training
    policy.eval()  # in train mode gradient checkpointing would drop the cache
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    # Every request has its own random numbers, so what it draws does not depend (up to rounding) on
    # how the requests are split, or on when finished rows leave the batch.
    if noise is None:
        noise = torch.rand(len(requests), max(limits, default=0), dtype=torch.float64)
    for indices in micro_batches([len(request) + max(limits) for request in requests], kv_tokens):
        drawn = decode(policy, [requests[i] for i in indices], [limits[i] for i in indices],
                       noise[indices].to(policy.device), temperature)
        for i, completion, values in zip(indices, *drawn):
            completions[i], logprobs[i] = completion, values
    policy.train(was_training)
    return completions, logprobs

def decode(policy: nn.Module, requests: list[Tokens], limits: list[int], noise: Tensor,
           temperature: float) -> tuple[list[Tokens], list[list[float]]]:
    """One batch of `sample`: run the requests, then draw a token of every row in each step."""
    logits, batch = prefill(policy, requests, max(limits))
    ends = policy.generation_config.eos_token_id or ()
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    rows, alive = list(range(len(requests))), [limit > 0 for limit in limits]
    for t in range(max(limits)):
        tokens, values = draw_tokens(logits, noise[:, t], temperature)
        for k, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), values.tolist())):
            if alive[k]:
                completions[row].append(token)
                logprobs[row].append(logprob)
                alive[k] = token not in ends and len(completions[row]) < limits[row]
        if not any(alive):
            break
        # Finished rows leave once they are a quarter of the batch: a move copies the whole cache.
        if batch.used == batch.mask.shape[1] or sum(alive) <= 0.75 * len(alive):
            kept = [k for k, lives in enumerate(alive) if lives]
            batch = Buffers(policy, batch.cache, kept, batch.mask[:, :batch.used], batch.position,
                            max(limits) - t)
            tokens, noise = tokens[kept], noise[kept]
            rows, alive = [rows[k] for k in kept], [True] * len(kept)
        logits = batch.step(tokens)
    return completions, logprobs

def prefill(policy: nn.Module, requests: list[Tokens], most: int) -> tuple[Tensor, "Buffers"]:
    """Run each distinct request once, padded on the left: all completions start in one column.
    Returns [B, V] logits, and buffers that hold the cache of the B requests."""
    distinct = list(dict.fromkeys(map(tuple, requests)))
    row_of = {request: row for row, request in enumerate(distinct)}
    copies = [row_of[tuple(request)] for request in requests]
    width = max(map(len, distinct))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in distinct], device=policy.device)
    lengths = torch.tensor(list(map(len, distinct)), device=policy.device)
    mask = torch.arange(width, device=policy.device) >= width - lengths[:, None]
    cache = transformers.DynamicCache(config=policy.config)
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=True, cache=cache,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1).logits
    return logits[copies, -1], Buffers(policy, cache, copies, mask, lengths[:, None] - 1, most)

ROOM = 32  # tokens that new buffers can take in at least
capture_stream = functools.cache(torch.cuda.Stream)  # one for all graphs: memory is kept by stream

class Buffers:
    """A batch's decode step on tensors of fixed size and place, as a CUDA graph needs them.
    When finished rows leave, or the room is used up, the kept rows move into new buffers."""
    def __init__(self, policy: nn.Module, cache: transformers.Cache, kept: list[int], mask: Tensor,
                 position: Tensor, most: int) -> None:
        """Take in the `kept` rows of a cache, of [B, T] mask, and of [B, 1] position of the newest
        token, and free the cache's memory layer by layer. At most `most` tokens will follow."""
        self.policy, self.used, self.position = policy, mask.shape[1], position[kept]
        room = min(max(1, most), max(ROOM, self.used // 2))  # few moves, little that stays empty
        self.mask = nn.functional.pad(mask[kept], (0, room))                      # [B, T + room]
        self.token = torch.zeros_like(self.position)
        self.cache = transformers.StaticCache(policy.config, max_cache_len=self.used + room)
        for i, layer in enumerate(cache.layers):
            self.cache.update(layer.keys[kept, :, :self.used], layer.values[kept, :, :self.used], i)
            layer.keys = layer.values = None
        self.replay = self.record() if policy.device.type == "cuda" else None

    def step(self, tokens: Tensor) -> Tensor:
        """Append [B] tokens; returns the [B, V] logits of the next ones."""
        self.token.copy_(tokens[:, None])
        self.position += 1
        self.mask[:, self.used] = True
        self.used += 1
        return self.replay() if self.replay else self.forward()

    def forward(self) -> Tensor:
        """[B, V] logits after self.token; a mask of four dimensions is taken as it is."""
        mask = self.mask[:, None, None]
        return self.policy(input_ids=self.token, attention_mask=mask, position_ids=self.position,
                           cache=self.cache, use_cache=True).logits[:, -1]

    def record(self) -> Callable[[], Tensor]:
        """`forward` as a CUDA graph: one launch in place of some 80 a layer, which bound it."""
        filled = self.cache.layers[0].cumulative_length.clone()
        stream, graph = capture_stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up run, which capture demands, and which writes to
            self.forward()               # one place behind the prompt: taken back below
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            logits = self.forward()
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(filled)

        def replay() -> Tensor:
            graph.replay()
            return logits
        return replay

def draw_tokens(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, V] logits and [B] uniform numbers in [0, 1) -> [B] tokens and their log-probs.

    Inverts the cumulative distribution: of blocks of the vocabulary, then within the block that was
    hit. The sums are float64: float32 would round away the tail of a vocabulary of 150 000.
    Temperature 0 takes the most likely token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
    top, token = logits.max(-1, keepdim=True)                                     # [B, 1]
    size = min(256, logits.shape[1])
    weights = nn.functional.pad((logits - top).exp(), (0, -logits.shape[1] % size))
    blocks = weights.unflatten(1, (-1, size))                                     # [B, N, 256]
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)                         # [B, N]
    if temperature:
        target = noise[:, None] * ends[:, -1:]
        block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0]    # [B, 256]
        inside = inside.double().cumsum(-1)
        rest = target - nn.functional.pad(ends, (1, 0)).gather(1, block)
        # Rounding may not carry it past the block's last token of a weight above zero.
        rest = torch.minimum(rest, inside[:, -1:].nextafter(torch.zeros_like(rest)))
        token = block * size + torch.searchsorted(inside, rest, right=True)
        token = token.clamp(max=logits.shape[1] - 1)
    logprobs = logits.gather(1, token) - top - ends[:, -1:].log()
    return token[:, 0], logprobs[:, 0]

def draw_ahead(problems: list[Problem], solutions: list[list[Tokens | None]],
               schedule: list[MicroGroup], generate: Callable, max_response: int) -> Callable:
    """Draw every branch that the thresholds may choose in ONE call; a `generate` that hands out.

    For trapo: 4+2+1+1 free and 2+1 guided, 11 requests a prompt. The distribution is exactly that
    of drawing in turn: rollouts of equal requests are independent and alike, so it does not matter
    which of them is handed out, nor whether it was drawn before the decision, unseen.
    """
    branches = []  # (request, limit)
    for problem, picked in zip(problems, solutions):
        for m, (micro_group, solution) in enumerate(zip(schedule, picked)):
            # Returns lie in [0, 1], so the two extremes show what may be decided.
            extremes = [[0.0], [1.0]] if m else [[]]
            for guided in {solution is not None and is_guided(x, micro_group) for x in extremes}:
                prefix = expert_prefix(solution, micro_group.ratio) if guided else []
                if prefix != solution:
                    branch = problem.prompt_ids + prefix, max(0, max_response - len(prefix))
                    branches += [branch] * micro_group.size
    stock = defaultdict(list)
    drawn = generate(*map(list, zip(*branches))) if branches else []
    for (request, limit), completion in zip(branches, drawn, strict=True):
        stock[tuple(request), limit].append(completion)
    return lambda requests, limits: [stock[tuple(request), limit].pop(0)
                                     for request, limit in zip(requests, limits)]

# ==== Part 7. Models, data and reward: what `prepare` and eval.py load.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB = {"gsm8k": ("openai/gsm8k", "main"), "openr1": ("Elliott/Openr1-Math-46k-8192", None)}

class InputError(ValueError):
    """The user's input cannot be used: main() prints the message as one line and exits with 2."""

def brief(error: BaseException) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__

@contextlib.contextmanager
def explained(doing: str, remedy: str) -> Iterator[None]:
    """Whatever is raised while reading or writing becomes one InputError with a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the Hub, the network, parsers and safetensors: each has its own
        raise InputError(f"cannot {doing} ({brief(error.__cause__ or error)}): {remedy}") from error

def load_policy(name: str) -> tuple[nn.Module, object]:
    """A causal LM with fp32 master weights on the CPU, and its tokenizer: from a local folder, a
    Hub id, or a bare Qwen name. InputError if it cannot be had or used."""
    path = name if os.path.isdir(name) or "/" in name else f"Qwen/{name}"
    safe = {"trust_remote_code": False}
    with explained(f"use model '{name}' (tried a folder of that name and the Hub id {path})",
                   "give the folder of a decoder such as Qwen2.5, or delete a damaged checkpoint"):
        config = transformers.AutoConfig.from_pretrained(path, **safe)
        for key, value in list(vars(config).items()):  # dropout: log-probs would differ by pass
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        # fp32 always: at a learning rate of 5e-6 most updates would round to nothing in bf16.
        policy, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **safe)
        if report["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(report['missing_keys']))}")
        # Fresh: sampling defaults are of no use here, and a contradiction among them would be
        # refused only when the first checkpoint is saved.
        policy.generation_config = transformers.GenerationConfig(
            eos_token_id=end_tokens(policy, tokenizer), pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id)
        check_policy(policy)
    return policy, tokenizer

def end_tokens(policy: nn.Module, tokenizer) -> Tokens:
    """The ids that end a response: chat models have several (<|im_end|>, <|endoftext|>), and base
    models stop at what their template prints after an assistant's turn. ValueError without EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no EOS token, so no response would end")
    ends = policy.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<answer>"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("<answer>")[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        found |= special & set(tokenizer(after, add_special_tokens=False).input_ids[:1])
    return sorted(found)

@torch.no_grad()
def check_policy(policy: nn.Module) -> None:
    """ValueError for a model whose log-probs token_logprobs or sample would get wrong: they do
    without its output layer and its masks, so they are compared with its own logits."""
    if getattr(policy.config, "sliding_window", None):
        raise ValueError("its attention slides")
    ids = list(range(1, 17))
    (_, new), (_, drawn) = sample(policy, [ids, ids[:5]], [2, 2], 0.0)  # the second is padded
    whole = ids[:5] + new
    logits = policy(torch.tensor([whole])).logits[0, :-1]
    own = logits.log_softmax(-1)[range(len(whole) - 1), whole[1:]]
    (ours,), _ = token_logprobs(policy, [whole], [1])
    for found in (ours, torch.tensor(drawn)):
        if not torch.allclose(found, own[-len(found):], atol=1e-3, rtol=1e-3):
            raise ValueError("its logits are capped, scaled or not finite")

def check_context(policy: nn.Module, tokens: int) -> None:
    """InputError if responses would run beyond what the model was made for (`tokens` in all)."""
    limit = getattr(policy.config, "max_position_embeddings", None) or math.inf
    if tokens > limit:
        raise InputError(f"prompt and response may have {tokens} tokens, but the model's context is"
                         f" {limit}: lower their limits, or see .github/running.md")

@dataclass
class Task:
    """All that the training loop knows of the data."""
    train: list[Problem]
    heldout: dict[str, list[Problem]]  # name of a held-out set -> its problems, the main one first
    reward: Callable[[Problem, Tokens], float]
    in_order: bool = False             # a curriculum: not to be shuffled

@functools.lru_cache(maxsize=4096)
def grade(response: str, answer: str) -> tuple[float, str]:
    """Math-Verify's verdict: (1.0 or 0.0, a note if the response holds no answer)."""
    from math_verify import parse, verify  # which catch their errors, and stop after 5 seconds
    found = parse(response)
    return float(verify(parse(f"${answer}$"), found)), "" if found else "no answer found"

def load_rows(dataset: str, split: str = "train"):
    """Rows of `gsm8k`, `openr1` or a local file; InputError if they cannot be had."""
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what goes wrong is said once
    hub, config = HUB.get(dataset, (None, None))
    with explained(f"read the {'Hub data set' if hub else 'file'} {hub or dataset}",
                   "give a local file of rows in UTF-8: .jsonl, .json or .parquet"):
        if hub:
            return load_dataset(hub, config, split=split)
        if not os.path.getsize(dataset):
            raise ValueError("it is empty")
        return load_dataset(KINDS[Path(dataset).suffix], data_files=glob.escape(dataset),
                            split="train")

def read_row(row: dict) -> tuple[object, list[str], object]:
    """(problem, solutions, answer) of a row of OpenR1 (prompt, target, reward_model), GSM8K
    (question, answer with "####"), or plain (problem or question, answer, perhaps solution)."""
    if "reward_model" in row:
        problem = [m["content"] for m in row["prompt"] if m["role"] == "user"][-1]
        solutions = [re.sub(r"</?think>\n?", "", m["content"]) for m in row.get("target") or []]
        return problem, solutions, row["reward_model"]["ground_truth"]
    problem, answer = row["problem" if "problem" in row else "question"], row["answer"]
    if "question" in row and "####" in str(answer):  # with calculator marks <<48/2=24>>
        solution, _, answer = re.sub(r"<<.*?>>", "", answer).rpartition("####")
        answer = answer.strip().replace(",", "")
        return problem, [f"{solution.strip()}\n\\boxed{{{answer}}}"], answer
    solutions = row.get("solution") or []
    solutions = solutions if isinstance(solutions, list) else [solutions]
    return problem, solutions, answer

def as_text(value: str | int | float | None) -> str:
    """A text, a number as text, nothing as ""; ValueError for what was not meant as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None) or value != value:
        raise ValueError(f"neither text nor number: {value}")  # a list, True, NaN
    return "" if value is None else str(value).strip()

def prompt_tokens(problem: str, tokenizer) -> Tokens:
    """The problem with INSTRUCTION: a chat's first turn, or plain text for a model without chat."""
    text = f"{problem}\n{INSTRUCTION}"
    if not tokenizer.chat_template:
        ids = tokenizer(text + "\n\n").input_ids  # with the BOS, if the model is used to one
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False).input_ids

def make_problems(rows: Iterable[dict], tokenizer, args: Settings,
                  heldout: bool = False) -> list[Problem]:
    """Rows -> Problems; what is empty or too long is dropped and counted. Held-out ones need no
    solution; others without one are never guided. InputError if nothing is left, or for a row of
    another form."""
    problems, dropped = [], Counter()
    for row in rows:
        with explained(f"use a row of {args.dataset}", "see the README on columns"):
            problem, solutions, answer = read_row(row)
            problem, answer, *texts = map(as_text, (problem, answer, *solutions))
            prompt_ids = prompt_tokens(problem, tokenizer)
            encoded = [tokenizer(text, add_special_tokens=False).input_ids
                       + [tokenizer.eos_token_id] for text in texts if text and not heldout]
        short = [ids for ids in encoded if len(ids) <= args.max_response]
        if not problem or not answer:
            dropped["no problem or answer"] += 1
        elif len(prompt_ids) > args.max_prompt:
            dropped["prompt too long"] += 1
        elif encoded and not short:
            dropped["solution too long"] += 1
        else:
            problems.append(Problem(prompt_ids, short, answer))
    counts = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "none"
    if not problems:
        raise InputError(f"{args.dataset} has no usable row{' to hold out' * heldout}; "
                         f"dropped: {counts}")
    kind = "held out" if heldout else f"({sum(bool(p.solutions) for p in problems)} with solutions)"
    say(f"{args.dataset}: {len(problems)} problems {kind}; dropped: {counts}")
    return problems

def math_task(tokenizer, args: Settings) -> Task:
    """Problems with Math-Verify as reward. Held out: GSM8K's test set, or a file's last rows."""
    rows, heldout = load_rows(args.dataset), []
    test = load_rows("gsm8k", "test") if args.dataset == "gsm8k" else rows
    size = min(args.eval_size, len(test) if args.dataset == "gsm8k" else len(rows) // 10)
    if size:
        test = test.select(range(len(test) - size, len(test)))
        heldout = make_problems(test, tokenizer, args, heldout=True)
    if args.dataset != "gsm8k":
        rows = rows.take(len(rows) - size)
    asked = {tuple(problem.prompt_ids) for problem in heldout}
    train = [problem for problem in make_problems(rows, tokenizer, args)
             if tuple(problem.prompt_ids) not in asked]
    if not train:
        raise InputError(f"{args.dataset}: all problems are held out; --eval-size 0 holds out none")
    if min(args.thresholds) >= ALWAYS and not any(problem.solutions for problem in train):
        raise InputError(f"--method {args.method} needs solutions, and {args.dataset} has none")

    def reward(problem: Problem, response: Tokens) -> float:
        return grade(tokenizer.decode(response, skip_special_tokens=True), problem.answer)[0]

    return Task(train, {"held out": heldout} if heldout else {}, reward)

# ==== Part 8. The clock world: the embedded experiment, small enough for a CPU.
#
# A 24-hour clock shows h; k times some hours (1-9) are added or taken away, each step on a line
# named by a letter. A tiny Qwen2 is "pretrained" from scratch on a textbook (prompts that end in
# ":" and worked lines) and a quiz (prompts that end in "?" and blurted answers): it knows how to
# work, but does not when asked. The expert works, but rambles, takes wrong turns and
# corrects them, as R1's traces do. Chance is 4 %.
#
#     prompt   j 8 k -9 l +8 m +1 ?          direct   # 8 <eos>
#     worked   k -9 23 l +8 7 m +1 8 # 8 <eos>
#     expert   k -9 23 let's l +8 14 oops l +8 7 m +1 8 # 8 <eos>
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FILLERS = ("let's hmm so now then well okay next wait right and first see think slowly "
           "indeed").split()
CLOCK_WORDS = ["<pad>", "<eos>", "?", ":", "#", "oops", *LETTERS, *map(str, range(24)),
               *(f"{sign}{n}" for sign in "+-" for n in range(1, 10)), *FILLERS]

SOUND = {"textbook (k 2-4)": 0.95, "direct (k 1)": 0.9}  # what a base must reach

def clock_model(seed: int) -> tuple[nn.Module, object]:
    """An untrained model like Qwen2, of 98 752 parameters, and its word-level tokenizer. By Llama's
    class: beside a config of type qwen2, AutoTokenizer replaces any tokenizer by Qwen2's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLOCK_WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(cleanup=False)  # spaces between words
    torch.manual_seed(seed)
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(CLOCK_WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.1, attention_bias=True, tie_word_embeddings=False, eos_token_id=[1],
        pad_token_id=0))
    return policy, transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

def clock_problem(tokenizer, rng: random.Random, k: int, mark: str, worked: bool = True,
                  filler: float = 0.0, slip: float = 0.0, largest: int = 9) -> Problem:
    """One chain of k steps of 1 to `largest` hours and its solution, as shown above.
    filler, slip: probability of an aside, and of a wrong line, before each line."""
    hour, letter = rng.randrange(24), rng.randrange(16)
    prompt, lines = [LETTERS[letter], str(hour)], []
    for name in LETTERS[letter + 1:letter + 1 + k]:
        change = rng.choice((-1, 1)) * rng.randint(1, largest)
        hour = (hour + change) % 24
        prompt += [name, f"{change:+d}"]
        if rng.random() < filler:
            lines.append(rng.choice(FILLERS))
        if rng.random() < slip:
            lines += [name, f"{change:+d}", str((hour + rng.randint(1, 23)) % 24), "oops"]
        lines += [name, f"{change:+d}", str(hour)]
    solution = [*(lines if worked else []), "#", str(hour), "<eos>"]
    ids = tokenizer.convert_tokens_to_ids
    return Problem(ids([*prompt, mark]), [ids(solution)], str(hour))

def clock_task(tokenizer, args: Settings) -> Task:
    """`clock`: 512 questions with k in 5..9, one expert solution each, and four held-out sets.
    `clock-corpus`: what the base is pretrained on, as expert solutions for --method sft, in order.
    Reward 1 for a response that ends in `# answer <eos>` and has exactly one `#`."""
    if not set(CLOCK_WORDS) <= tokenizer.get_vocab().keys():
        raise InputError("--dataset clock needs a --model of the embedded experiment, or none")

    def reward(problem: Problem, response: Tokens) -> float:
        ending = tokenizer.convert_tokens_to_ids(["#", problem.answer, "<eos>"])
        return float(response[-3:] == ending and response.count(ending[0]) == 1)

    def problems(name: str, size: int, shortest: int, longest: int, mark: str) -> list[Problem]:
        rng = random.Random(f"{name} {args.seed}")
        return [clock_problem(tokenizer, rng, rng.randint(shortest, longest), mark, filler=0.3,
                              slip=0.1) for _ in range(size)]

    if args.dataset == "clock-corpus":
        rng, total = random.Random(f"textbook and quiz {args.seed}"), args.steps * args.prompts
        corpus = [corpus_problem(tokenizer, rng, i / total, args.base_worked) for i in range(total)]
        return Task(corpus, {}, reward, in_order=True)
    sets = {"in range (k 5-9)": (5, 9, "?"), "longer (k 10)": (10, 10, "?"),
            "textbook (k 2-4)": (2, 4, ":"), "direct (k 1)": (1, 1, "?")}
    return Task(problems("train", 512, 5, 9, "?"),
                {name: problems(name, args.eval_size, *kind) for name, kind in sets.items()
                 if args.eval_size}, reward)

def base_fault(folder: Path, args: Settings) -> str:
    """Why a pretrained base is not fit for the experiment, or "": it must know, greedily, how to
    work and how to blurt."""
    policy, tokenizer = load_policy(str(folder))
    args = fill_in({"dataset": "clock", "seed": args.seed, "temperature": 0.0})
    task = clock_task(tokenizer, args)
    task.heldout = {name: task.heldout[name] for name in SOUND}
    scores = evaluate(policy, task, args, whole=True)
    return ", ".join(f"{name}: {scores[name + ', greedy']:.3f} < {least}"
                     for name, least in SOUND.items() if scores[name + ", greedy"] < least)

def corpus_problem(tokenizer, rng: random.Random, progress: float,
                   share_worked: float = 0.0) -> Problem:
    """A text of the pretraining corpus, `progress` (0 to 1) of the way through it.

    Copying a change from the prompt comes first, from changes of every size, then the addition,
    from 1 up to 9 hours: a base that learns to add first tends never to copy. In the first half
    every other "?" is worked, or the skill leans on the ":" and nothing is left to unlock.
    """
    early, level = progress < 0.5, 9 if progress < 0.2 else min(9, 1 + int(20 * (progress - 0.2)))
    mark = "?" if rng.random() < (0.4 if early else 0.25) else ":"
    worked = mark == ":" or rng.random() < (0.5 if early else share_worked)
    k = 1 if not worked and (early or rng.random() < 0.8) else rng.randint(1, 10)
    return clock_problem(tokenizer, rng, k, mark, worked, filler=0.04, slip=0.01, largest=level)

# ==== Part 9. Processes and checkpoints: what `train` stands on.
#
# Under torchrun every process samples its share of the prompts from a copy of its own, and FSDP
# keeps the fp32 weights, gradients and optimizer states in shards. One process uses none of that.
# Everything random comes from generators seeded with (seed, step, rank), the order of the data with
# the seed: so weights, optimizer state and the number of steps are a run's whole state, and a run
# that was killed and resumed equals one that was not, bit for bit.
KEPT = 20_000_000  # bytes that rollouts.jsonl may have
WHOLE = full_state.StateDictOptions(full_state_dict=True, cpu_offload=True)

def prepare(args: Settings) -> tuple:
    """What a run starts from: models, tokenizer, optimizer, task, and the number of steps done."""
    saved = checkpoints(Path(args.out)) if args.resume else []
    source = str(saved[-1]) if saved else args.model
    policy, tokenizer = load_policy(source) if source else clock_model(args.seed)
    with explained(f"read {source}/trainer.pt", "delete that checkpoint"):
        state = torch.load(f"{source}/trainer.pt", weights_only=True, mmap=True) if saved else {}
    check_context(policy, args.max_prompt + args.max_response)
    task = (clock_task if args.dataset in CLOCKS else math_task)(tokenizer, args)
    sampler = make_sampler(policy, args)  # before sharding: it is whole
    policy.train()
    if args.recompute:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    shard(policy, args) if WORLD > 1 else policy.to(args.device)
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, tuple(args.betas), weight_decay=0.0)
    if state.get("optimizer", {}).get("state"):  # empty if every update was skipped
        full_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=WHOLE)
    step = state.get("step", 0)
    if step > args.steps:
        raise InputError(f"the run in {args.out} is at step {step}: give --steps beyond")
    if args.device == "cpu" and args.dataset not in CLOCKS:
        foretell(sampler, task, args)
    return policy, tokenizer, sampler, optimizer, task, step

def foretell(sampler: nn.Module, task: Task, args: Settings) -> None:
    """On a CPU, say what a step may take, from the first tokens of the first prompt's rollouts."""
    prompt, rows, seconds = batch_at(0, task, args)[0].prompt_ids, sum(args.sizes), []
    for new in (1, 9):
        began = time.perf_counter()
        sample(sampler, [prompt] * rows, [new] * rows, kv_tokens=args.kv_tokens)
        seconds.append(time.perf_counter() - began)
    longest = args.max_response * (seconds[1] - seconds[0]) / 8
    # A backward pass costs two forward passes; the prompt's was read once for all of its rollouts.
    update = 3 * rows * seconds[0] / len(prompt) * (len(prompt) + args.max_response)
    minutes = args.prompts / WORLD * (longest + update) / 60
    if minutes > 1:
        say(f"A step may take up to {minutes:.1f} minutes here ({args.prompts} x {rows} rollouts, "
            f"each up to {args.max_response} tokens). Fewer: --prompts, --max-response, --bf16.")

def make_sampler(policy: nn.Module, args: Settings) -> nn.Module:
    """What rollouts are drawn from: a copy of the policy on its device, in bf16 if args.bf16."""
    if args.device == "cpu" and WORLD == 1 and not args.bf16:
        return policy
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    # Parameters are cast one by one, so that there is never a second fp32 model, and no buffers:
    # RoPE's must stay fp32.
    copies = {id(p): nn.Parameter(p.detach().to(args.device, dtype, copy=True), False)
              for p in policy.parameters()}
    return copy.deepcopy(policy, copies).to(args.device)

@torch.no_grad()
def refresh(sampler: nn.Module, policy: nn.Module) -> None:
    """Copy the policy's weights into the sampler, one parameter at a time."""
    for mine, new in zip(sampler.parameters(), policy.parameters(), strict=True):
        if mine is not new:
            mine.copy_(new.full_tensor() if WORLD > 1 else new)
    if sampler.device.type == "cuda":
        torch.cuda.synchronize()  # or the update's time is counted as the next step's

def shard(policy: nn.Module, args: Settings) -> None:
    """FSDP2 in place, from the CPU: each decoder layer a unit, the rest another."""
    from torch.distributed import fsdp
    options = {"mesh": dist.init_device_mesh(args.device, (WORLD,))}
    if args.bf16:
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*policy.base_model.layers, policy):
        fsdp.fully_shard(part, **options)
    # FSDP gathers the weights when a method of the policy is called that it was told of.
    policy.token_logprobs = functools.partial(token_logprobs, policy)
    fsdp.register_fsdp_forward_method(policy, "token_logprobs")

def batch_at(step: int, task: Task, args: Settings) -> list[Problem]:
    """The prompts of a step, whatever the number of processes; every problem once an epoch."""
    n, places = len(task.train), range(step * args.prompts, (step + 1) * args.prompts)
    order = {epoch: range(n) if task.in_order else
             random.Random(f"order {args.seed} {epoch}").sample(range(n), n)
             for epoch in {i // n for i in places}}
    return [task.train[order[i // n][i % n]] for i in places]

def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, args: Settings) -> None:
    """A linear warm-up, then constant; with args.decay, falling to 0 in the second half."""
    factor = min(1, (step + 1) / max(1, args.warmup))
    if args.decay:
        factor *= min(1, 2 * (1 - step / args.steps))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor

@contextlib.contextmanager
def caught_signals() -> Iterator[list[float]]:
    """A list that fills when Ctrl-C or SIGTERM comes; a second one ends the program at once (but
    for a second: torchrun passes a Ctrl-C on that its processes had already)."""
    came: list[float] = []

    def note(number: int, frame: object) -> None:
        came.append(time.monotonic())
        if came[-1] > came[0] + 1:
            raise KeyboardInterrupt
    usual = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)

@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Make a run's folder and hold it, so that no other run writes into it."""
    with explained(f"write to {folder}", "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        with explained(f"write to {folder}: another run does", "give another --out"):
            if RANK == 0:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        gather(0)  # the others wait here
        yield
    finally:
        os.close(handle)

def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in out.glob("checkpoint-*/") if path.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))

def save(policy: nn.Module, tokenizer, optimizer, step: int, args: Settings) -> None:
    """Write <out>/checkpoint-<step>, whole or not at all; the newest two are kept.
    All processes must call it."""
    weights = full_state.get_model_state_dict(policy, options=WHOLE)
    state = full_state.get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    out = Path(args.out)
    final, temporary = out / f"checkpoint-{step}", out / ".unfinished"
    if RANK:
        return
    with explained(f"save to {out}", "free space there, then --resume from the older checkpoint"):
        shutil.rmtree(temporary, ignore_errors=True)
        policy.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        torch.save({"step": step, "optimizer": state}, temporary / "trainer.pt")
        os.replace(temporary, final)
        for older in checkpoints(out)[:-2]:
            shutil.rmtree(older)

def write_whole(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)

def open_log(args: Settings, start: int) -> Callable[..., None]:
    """Write settings.json; a function that appends a step's metrics to metrics.jsonl, and groups
    worth keeping to rollouts.jsonl. Both are cut back to step `start`; --overwrite removes what
    the old run left."""
    gather(0)  # nobody writes before everybody has read
    if RANK:
        return lambda step, metrics, groups=(): None
    out, last = Path(args.out), time.perf_counter()
    kept: dict[str, list[str]] = {"metrics.jsonl": [], "rollouts.jsonl": []}
    for name in kept if start else ():
        path = out / name
        with explained(f"read {path}", "delete the lines that are damaged"):
            kept[name] = [line for line in path.read_text().splitlines(True)  # a kill may have
                          if line.endswith("}\n")                             # torn the last one
                          and json.loads(line)["step"] <= start] if path.exists() else []
    if len(kept["metrics.jsonl"]) < start:
        say(f"{out}/metrics.jsonl lacks some of the first {start} steps")
    with explained(f"write to {out}", "free space there, then --resume"):
        for old in checkpoints(out) if args.overwrite else ():  # before the settings: a kill in
            shutil.rmtree(old)                                  # between must not mix two runs
        settings = dataclasses.asdict(args) | {"resume": False, "overwrite": False}
        write_whole(out / "settings.json", json.dumps(settings, indent=1))
        for old in out.iterdir() if args.overwrite else ():
            if old.is_file() and old.name != "settings.json":
                old.unlink()
        for name, lines in kept.items():
            write_whole(out / name, "".join(lines))

    def log(step: int, metrics: dict, groups: Iterable[dict] = ()) -> None:
        """Append a line of metrics, and a line for each group, as long as there is room."""
        nonlocal last
        before, last = last, time.perf_counter()
        metrics |= {"seconds": last - before}
        with explained(f"write to {out}", "free space there, then --resume"):
            for name, lines in ("rollouts.jsonl", groups), ("metrics.jsonl", [metrics]):
                with (out / name).open("a") as file:
                    for line in lines:
                        text = json.dumps({"step": step, **line}) + "\n"
                        if name == "metrics.jsonl" or file.tell() + len(text) < KEPT:
                            file.write(text)
    return log

def finish(args: Settings, step: int, skipped: int, signals: list[float]) -> None:
    """How a run ends: a complete one's model is copied into <out> itself, the weights last."""
    gather(0)  # rank 0 has saved: torchrun ends all processes when one has ended
    out, again = Path(args.out), f"python trapo.py --resume --out {args.out}"
    if skipped == 3:
        say("three updates in a row were not finite; the weights from before them are saved: "
            f"{again} --lr <lower>")
        raise SystemExit(1)
    if step < args.steps:
        again = "the same command" if args.dataset == "clock-corpus" else again
        say(f"stopped after step {step}; to go on: {again}")
        raise SystemExit(130)
    if RANK == 0:
        saved = out / f"checkpoint-{step}"
        files = [file for file in saved.iterdir() if file.name != "trainer.pt"]
        with explained(f"write to {out}", "free space there, then --resume"):
            for file in sorted(files, key=lambda file: "safetensors" in file.name):
                shutil.copy(file, out / ".copy")
                os.replace(out / ".copy", out / file.name)
            shutil.rmtree(out / ".unfinished", ignore_errors=True)
        if args.dataset != "clock-corpus":
            tell(out)
    if any(gather(bool(signals))):  # and: the files are there
        raise SystemExit(130)

# ==== Part 10. Metrics, evaluation, printing: what the loop reports.
def say(text: str) -> None:
    """Print a line, once for all processes, and above a progress bar."""
    if RANK == 0:
        with contextlib.suppress(OSError):  # the run goes on, though nobody may listen any more
            tqdm.write(text)

def mean(values: Iterable[float]) -> float | None:
    """The mean, or None if there is none or it is not finite."""
    values = list(values)
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    return total / len(values) if values and math.isfinite(total) else None

def step_metrics(policy: nn.Module, rollouts: list[Rollout], loss: float, norm: float,
                 spent: Counter, args: Settings) -> dict:
    """A line of metrics.jsonl: what a step's rollouts, of all processes, say."""
    rollouts = [r for part in gather(rollouts) for r in part]
    own = [r for r in rollouts if r.completion]
    trained = [r for r in rollouts if r.logprobs]
    p = [math.exp(x) for r in trained for x in r.logprobs[:len(r.prefix)]]
    ends = policy.generation_config.eos_token_id or ()
    peak = (torch.cuda.max_memory_allocated() / 2**30 if policy.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
    return {
        # Of the first micro-group alone: later rollouts are free where the first ones went well.
        "reward_unguided": mean(r.reward for r in rollouts if r.micro_group == 0 and not r.prefix),
        "reward_guided": mean(r.reward for r in rollouts if r.prefix),
        "guided": mean(bool(r.prefix) for r in rollouts),
        **{f"guided_{m + 1}": mean(bool(r.prefix) for r in rollouts if r.micro_group == m)
           for m in range(len(args.schedule))},
        "response_length": mean(len(r.prefix + r.completion) for r in rollouts),
        "completion_length": mean(len(r.completion) for r in own),
        "truncated": mean(r.completion[-1] not in ends for r in own),
        # Of trained rollouts alone: groups that are all right or all wrong are not in it.
        "entropy": mean(x for r in trained for x in r.entropies[len(r.prefix):]),
        "logprob_gap": mean(abs(x - y) for r in trained for x, y in zip(
            r.logprobs[len(r.prefix):], r.sampler_logprobs)),
        "prefix_p": mean(p),
        "prefix_outside_share": mean(x < args.alpha for x in p),
        "prefix_weight": mean(1 / max(x, args.alpha, 1e-300) for x in p),
        "prefix_inverse_p": mean(1 / max(x, 1e-300) for x in p),
        "tokens_generated": sum(gather(spent["tokens_generated"])),
        "tokens_trained": sum(len(r.logprobs) for r in trained),
        "rollouts_skipped": len(rollouts) - len(trained),
        "loss": mean(gather(loss)), "grad_norm": mean([norm]), "peak_memory_gib": peak,
        **{name: value for name, value in spent.items() if name.startswith("seconds")}}

def evaluate(sampler: nn.Module, task: Task, args: Settings, whole: bool) -> dict[str, float]:
    """Share of held-out problems solved, by one response each, sampled as in training and greedy;
    unless `whole`, only of the first held-out set, sampled: a cheap point of the curve."""
    found = {}
    for name, problems in list(task.heldout.items())[:None if whole else 1]:
        mine, numbers = problems[RANK::WORLD], torch.Generator().manual_seed(args.seed)
        noise = torch.rand(len(problems), args.max_response, dtype=torch.float64, generator=numbers)
        for temperature in (args.temperature, 0.0) if whole else (args.temperature,):
            responses, _ = sample(sampler, [p.prompt_ids for p in mine],
                                  [args.max_response] * len(mine), temperature,
                                  noise=noise[RANK::WORLD], kv_tokens=args.kv_tokens)
            right = sum(gather(sum(map(task.reward, mine, responses))))
            found[name if temperature else f"{name}, greedy"] = right / len(problems)
    return found

def show_group(groups: list[list[Rollout]], tokenizer, args: Settings) -> None:
    """Print the group that was helped most, the expert's prefix set apart: the method at work."""
    left, right = ("\033[33m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    for group in sorted(groups, key=lambda group: sum(bool(r.prefix) for r in group))[-1:]:
        say("prompt: " + tokenizer.decode(group[0].prompt))
        for m, micro_group in enumerate(args.schedule):
            drawn = [r for r in group if r.micro_group == m]
            so_far = mean(r.reward for r in group if r.micro_group < m)
            helped = f"{micro_group.ratio:.0%} of the solution" if drawn[0].prefix else "no help"
            say(f"  micro-group {m + 1}: {helped}"
                + ("" if so_far is None else f", as the mean return so far is {so_far:.2f}"))
            for r in drawn:
                prefix = f"{left}{tokenizer.decode(r.prefix)}{right} " if r.prefix else ""
                say(f"    reward {r.reward:.0f}, A {r.advantage:+.2f}:  {prefix}"
                    + tokenizer.decode(r.completion))

def as_record(group: list[Rollout], tokenizer, args: Settings) -> dict:
    """A group for rollouts.jsonl, which `eval.py look` shows: every token's text, log-prob and
    weight in the update, -dL/dlog p: the advantage, or an expert token's share of SFT's weight."""
    def short(values: Iterable[float | None]) -> list[float | None]:
        return [float(f"{x:.4g}") if x is not None and math.isfinite(x) else None for x in values]

    kept = []
    for r in group:
        ids = r.prefix + r.completion
        context = [ids[max(0, i - 3):i] for i in range(len(ids))]
        texts = [(tokenizer.decode(before), tokenizer.decode([*before, token]))
                 for before, token in zip(context, ids)]
        # A character may take several tokens, and is seen with the last: then the text changes.
        text = [both[len(os.path.commonprefix((old, both))):] for old, both in texts]
        logprobs = torch.tensor(r.logprobs, dtype=torch.float64, requires_grad=True)
        weights = torch.zeros(len(ids))
        if r.logprobs:
            weights, = torch.autograd.grad(-rollout_loss(r, logprobs, args), logprobs)
        kept.append({"micro_group": r.micro_group + 1, "reward": r.reward, "advantage": r.advantage,
                     "expert": len(r.prefix), "text": text, "weight": short(weights.tolist()),
                     "logprob": short(r.logprobs or [None] * len(r.prefix) + r.sampler_logprobs)})
    return {"prompt": tokenizer.decode(group[0].prompt), "rollouts": kept}

def title(args: Settings) -> str:
    """What the progress bar says is going on."""
    return "pretraining the base" if args.dataset == "clock-corpus" else args.method

def in_short(metrics: dict) -> dict:
    """What of a step the progress bar shows; in SFT, where all is the expert's, only the loss."""
    rollouts = {"alone": metrics["reward_unguided"], "helped": metrics["guided"]}
    return {"loss": metrics["loss"]} | (rollouts if rollouts["alone"] is not None else {})

def tell(out: Path) -> None:
    """What a run came to, by metrics.jsonl: accuracy, success alone, help, and what was lost."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (line.get("eval", {}) for line in (lines[:1] + lines[-1:] or [{}, {}]))
    for name in before:
        say(f"{name:30} before {before[name]:.3f}   after {after.get(name, math.nan):.3f}")
    steps = [line for line in lines if "guided" in line]
    n = max(1, len(steps) // 10)
    for key, did in (("reward_unguided", "Alone, the policy solved {:.1%} of training problems"),
                     ("guided", "It was given part of a solution in {:.1%} of its rollouts")):
        first, last = (mean(line[key] for line in part if line[key] is not None)
                       for part in (steps[:n], steps[-n:]))
        if first is None or last is None:  # SFT tries nothing alone
            break
        say(f"{did.format(first)} in the first {n} steps, {last:.1%} in the last {n}.")
    lost = [f"{name}, from {before[name]:.1%} to {after[name]:.1%}" for name in before
            if after.get(name, 1) < before[name] - 0.05]
    if lost:
        say("Lost, by more than 5 points: " + "; ".join(lost) + ".")
    say(f"Model, metrics and rollouts are in {out}; to look at them: python eval.py look {out}")

# ==== Part 11. The command line: typed > the resumed run's settings > presets > defaults.
CLOCK = {"lr": 4e-4, "steps": 80, "prompts": 16, "max_prompt": 32, "max_response": 56,
         "micro_tokens": 1024, "eval_every": 25, "eval_size": 256}
CORPUS = CLOCK | {"method": "sft", "lr": 5e-3, "steps": 2500, "warmup": 20, "decay": True,
                  "prompts": 32, "betas": (0.9, 0.98), "save_every": 300}
CLOCKS = {"clock": CLOCK, "clock-corpus": CORPUS}
MAY_CHANGE = ("steps", "base_steps", "eval_every", "save_every", "device", "bf16", "micro_tokens",
              "kv_tokens", "speculate", "recompute", "out", "lr", "resume")
CHOICES = {"method": METHODS, "prefix_loss": PREFIX_LOSSES, "device": ("cpu", "cuda")}
RANGES = {"ratios": (0, 1), "thresholds": (-1e9, 1e9), "alpha": (0, 1), "base_worked": (0, 1),
          "warmup": (0, 1e9), "seed": (0, 2**63 - 1), "eval_size": (0, 1e9),
          "betas": (0, 0.9999)}  # others: above 0

class Parser(argparse.ArgumentParser):
    """argparse, whose errors are InputErrors: one line."""
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message + f" (see python {self.prog} --help)")

def make_parser() -> Parser:
    """A flag for every field of Settings that has a help text; what is not typed is None."""
    parser = Parser(description="TRAPO in one file. Without --model: the embedded experiment.",
                    allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        if not f.metadata:
            continue
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default, kind = f.default_factory(), (typing.get_args(f.type) or [f.type])[0]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        options = {"help": f.metadata["help"] + f" ({shown})" * (default not in (None, False))}
        if kind is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": CHOICES.get(f.name),
                        "metavar": None if f.name in CHOICES else kind.__name__,
                        "nargs": "+" if isinstance(default, list) else None}
        group.add_argument("--" + f.name.replace("_", "-"), default=None, **options)
    return parser

def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line's Settings; InputError for what cannot be used, with nothing loaded yet."""
    parsed = vars(make_parser().parse_args(argv))
    typed = {name: value for name, value in parsed.items() if value is not None}
    if "" in typed.values():
        raise InputError("a flag has an empty value: give one, or leave the flag out")
    args = fill_in(typed)
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if args.resume:
        before = read_settings(args.out)
        if not before:
            raise InputError(f"--resume: there is no run in {args.out}")
        changed = [k for k in typed if k not in MAY_CHANGE and typed[k] != before.get(k)]
        if changed:
            raise InputError(f"--resume cannot change {', '.join(changed)} of the run in {args.out}"
                             ": leave the flag out, or start a new run with another --out")
        args = fill_in(before | typed | {"out": args.out})
    with explained("use these settings", "give others, or another --out"):
        check_values(args)
        check_files(args)
    return args

def fill_in(known: dict) -> Settings:
    """Settings of what is known, and of presets and defaults for the rest."""
    with explained("use the settings of the run", "give another --out"):
        args = Settings(**known)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cuda = args.device == "cuda"
        if args.dataset is None:
            embedded = not args.model or read_settings(args.model).get("dataset") in CLOCKS
            args.dataset = "clock" if embedded else "gsm8k"
        preset = CLOCKS.get(args.dataset, {})
        method = known.get("method") or preset.get("method", "trapo")
        name = Path(args.model).name if args.model else args.dataset
        preset = {"bf16": cuda, "speculate": cuda, "out": f"runs/{name}-{method}-seed{args.seed}",
                  **preset, **METHODS[method], "method": method}
    return dataclasses.replace(args, **{k: v for k, v in preset.items() if k not in known})

def read_settings(folder: str) -> dict:
    """The settings of the run in this folder, or around this checkpoint; {} if there is none."""
    run = Path(folder).parent if Path(folder).name.startswith("checkpoint-") else Path(folder)
    path = run / "settings.json"
    with explained(f"read {path}", "give another folder"):
        return dict(json.loads(path.read_text())) if path.exists() else {}

def check_values(args: Settings) -> None:
    """InputError for a number out of its range, or lists that do not fit together."""
    for f in dataclasses.fields(Settings):
        kinds, values = typing.get_args(f.type) or (f.type,), getattr(args, f.name)
        low, high = RANGES.get(f.name, (1 if int in kinds else 1e-12, 1e12))
        for value in values if isinstance(values, list | tuple) else [values]:
            name = f"--{f.name.replace('_', '-')}: {value}"
            is_number = type(value) is int or type(value) is float
            if not (type(value) in kinds or is_number and float in kinds):
                raise InputError(f"{name} is of the wrong kind")
            if is_number and not low <= value <= high:  # NaN neither
                raise InputError(f"{name} is not in [{low:g}, {high:g}]")
            if value not in CHOICES.get(f.name, [value]):
                raise InputError(f"{name} is none of {', '.join(CHOICES[f.name])}")
    if not len(args.sizes) == len(args.ratios) == len(args.thresholds):
        raise InputError("--sizes, --ratios and --thresholds need equally many values")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA: use --device cpu")

def check_files(args: Settings) -> None:
    """InputError for a data set that is not there, or a folder that must not be written to."""
    out, data = Path(args.out), args.dataset
    if data not in CLOCKS and not args.model:
        raise InputError(f"--dataset {data} needs a --model")
    if data not in {**HUB, **CLOCKS} and not (Path(data).suffix in KINDS and os.path.isfile(data)):
        raise InputError(f"no data set '{data}': give one of {', '.join(HUB)}, or the path of an "
                         "existing .jsonl, .json or .parquet file")
    inside = args.model and Path(args.model).resolve().is_relative_to(out.resolve())
    if inside and not args.resume:
        raise InputError(f"--model {args.model} lies in --out {out}: give another --out")
    run = (out / "settings.json").exists()
    if args.resume and list(out.glob("model*.safetensors*")) and not checkpoints(out):
        raise InputError(f"{out} is finished and has no checkpoint to resume: give another --out")
    found = out.exists() and any(file.name[0] != "." for file in out.iterdir())
    if found and not (run and (args.resume or args.overwrite)):
        raise InputError(f"{out} is not empty: give another --out, or --resume or --overwrite the "
                         "run in it, if there is one")

def make_base(args: Settings) -> str:
    """The folder of the embedded experiment's base, pretrained once for a seed; and again, with
    another corpus and start, if it is not sound (unless it was cut short by --base-steps)."""
    name = f"clock-base-{args.base_steps}-{args.base_worked:g}-seed{args.seed}"
    for attempt in range(4):
        base = Path(args.out).parent / (name + f"-again{attempt}" * (attempt > 0))
        if base.resolve() == Path(args.out).resolve():
            raise InputError(f"--out {args.out} is the base's own folder: give another --out")
        with locked(base, wait=True):  # another run of this seed may be making it
            if not gather((base / "model.safetensors").exists())[0]:
                say(f"pretraining the base of seed {args.seed}, once")
                train(fill_in({
                    "dataset": "clock-corpus", "seed": args.seed + attempt * 2**32,
                    "out": str(base), "bf16": False, "steps": args.base_steps, "resume": True,
                    "base_worked": args.base_worked, "device": args.device}))
        fault = base_fault(base, args) if args.base_steps >= CORPUS["steps"] else ""
        if not fault:
            return str(base)
        say(f"{base} is not sound ({fault})")
    raise InputError(f"four bases of seed {args.seed} are not sound: give another --seed")

def main(argv: list[str] | None = None) -> None:
    """Train; the embedded experiment first pretrains its base, unless that was done before."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries, without network
    try:
        args = parse_args(argv)
        if WORLD > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # Others wait while rank 0 writes a checkpoint, for longer than NCCL's ten minutes.
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                    timeout=timedelta(days=1))
        if args.dataset in CLOCKS:
            torch.set_num_threads(1)  # its matrices are so small that threads wait for each other
        with locked(Path(args.out)):
            if not args.model and args.dataset == "clock":
                args.model = make_base(args)
            train(args)
    except (InputError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, InputError) else 130
        leave(code)
        raise SystemExit(code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def leave(code: int = 0) -> None:
    """End one of several processes at once: gloo's threads may abort a Python that dies slowly."""
    if WORLD > 1:
        sys.stdout.flush()
        os._exit(code)

if __name__ == "__main__":
    main()
    leave()
