"""TRAPO in one file: Trust-Region Adaptive Policy Optimization (arXiv 2512.17636).

Post-training usually runs SFT on expert solutions and then RL. TRAPO does both inside every
training instance. The policy first tries a problem alone; where it does badly, it is given the
beginning of an expert solution and continues from there.

Below is one group of eight rollouts, from the end of `python trapo.py --steps 21` on one machine. A
clock of 24 hours shows 12 and is moved five times, on lines named g to k: where does it end? The
answer is the last number, after `#`. [ ] holds the expert's tokens, asides (now, think) and a slip
(oops) among them; A is the advantage:

prompt: f 12 g +4 h -9 i -7 j -6 k +1 ?
  micro-group 1: mean reward so far 0.00 >= -1: no help
    reward 0, A -0.25:  # 15 <eos>
    reward 0, A -0.25:  # 1 <eos>
    reward 0, A -0.25:  g +4 16 h -9 7 i -6 1 j -7 18 k +1 18 # 18 <eos>
    reward 0, A -0.25:  # 12 <eos>
  micro-group 2: mean reward so far 0.00 < 0.5: 21% of the solution
    reward 0, A -0.25:  [now g +4 16 h] -9 7 i -7 0 j -6 18 k +4 22 # 22 <eos>
    reward 1, A +0.75:  [now g +4 16 h] -9 7 i -6 1 j -7 18 k +1 19 # 19 <eos>
  micro-group 3: mean reward so far 0.17 < 0.7: 50% of the solution
    reward 0, A -0.25:  [now g +4 16 h -9 7 i -7 17 oops i] -6 11 j +1 12 k +4 16 # 16 <eos>
  micro-group 4: mean reward so far 0.14 < 0.9: 100% of the solution
    reward 1, A +0.75:  [now g +4 16 h -9 7 i -7 17 oops i -7 0 think j -6 18 k +1 19 # 19 <eos>]

One update then trains two kinds of tokens (Section 2): it moves the weights along grad log p, the
gradient of a token's log-probability, times

    the policy's own (completion)   A, as in a group-relative policy gradient
    the expert's (prefix)           min(p / alpha, 1): Trust-Region SFT (Eq. 3)

What this file leaves out of GRPO, and why:
    1. no reference model, no KL penalty: the paper trains without them
    2. no division by the group's standard deviation or the response's length: Dr. GRPO's repairs
    3. no importance ratio, no PPO clip: one update per batch of rollouts is on-policy

Words: a *rollout* is one response to a prompt: an expert *prefix* (mostly empty), continued by the
policy's *completion*. A prompt's rollouts are its *group*, drawn in *micro-groups*. A *reward* (the
paper's return) is 1 if the answer is right, else 0; an *advantage* is that less the group's mean.

    python trapo.py                                     the embedded experiment: CPU, offline
    python trapo.py --model Qwen2.5-0.5B-Instruct       the same loop on GSM8K, on one GPU

The lecture:  settings, 1 losses, 2 adaptive guidance, 3 log-probs, 4 the update, 5 step and loop.
The workshop: 6 the sampler, 7 models, data and reward, 8 processes and checkpoints, 9 metrics and
evaluation, 10 the command line. "Part" is of this file, "Section" of the paper.
"""
import argparse, contextlib, copy, dataclasses, datetime, decimal  # noqa: E401
import functools, json, logging, math, os, random, re, shutil  # noqa: E401
import sys, time, traceback, typing  # noqa: E401
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Tokens = list[int]
Sampled = tuple[Tokens, list[float]]  # tokens, and the log-probs they were drawn with

# ==== Settings of the method; those of the data, the machine and the run follow in Part 10.
def setting(default: object, help: str, group: str | None = None) -> typing.Any:
    """A field that is a flag of the command line; `group` opens a group of flags."""
    return field(default_factory=lambda: copy.copy(default), metadata=dict(help=help, group=group))

ALWAYS = 2.0  # as a threshold: every mean reward is below it
MICRO = {"sizes": [4, 2, 1, 1], "ratios": [0.0, 0.2, 0.5, 1.0], "thresholds": [-1.0, 0.5, 0.7, 0.9]}
WHOLE = {"sizes": [7, 1], "ratios": [0.0, 1.0], "thresholds": [-1.0, ALWAYS]}

@dataclass
class Recipe:
    """Defaults suit a small model on GSM8K; the paper's value is in parentheses."""
    method: str = setting("trapo", "preset of the seven settings below", group="method")
    sizes: list[int] = setting(MICRO["sizes"], "rollouts in each micro-group")
    ratios: list[float | str] = setting(MICRO["ratios"], "share of the solution; low:high: random")
    thresholds: list[float] = setting(MICRO["thresholds"], "guided if the mean reward is below")
    prefix_loss: str = setting("trsft", "loss on the expert's tokens")
    prefix_weight: float = setting(1.0, "weight of the loss on the expert's tokens")
    anneal: int = setting(0, "let ratios and prefix weight fall to 0 by this step; 0: never")
    baseline: str = setting("group", "A = reward less the mean of the group, or of the context")
    alpha: float = setting(0.1, "edge of the trust region, a probability (paper: 0.1)")
    max_prompt: int = setting(1024, "longest prompt, tokens (paper: 1024)", "optimisation")
    max_response: int = setting(1024, "longest response, prefix included, tokens (paper: 8192)")
    steps: int = setting(200, "training steps")
    prompts: int = setting(32, "prompts per step, over all processes (paper: 128)")
    lr: float = setting(5e-6, "AdamW's learning rate, constant after the warm-up (paper: 5e-6)")
    warmup: int = setting(5, "steps of linear warm-up")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this L2 norm")
    temperature: float = setting(1.0, "sampling temperature of the rollouts (paper: 1)")
    seed: int = setting(0, "of everything random")

    @property
    def schedule(self) -> list["MicroGroup"]:
        """Algorithm 1's table, a row per micro-group."""
        return [MicroGroup(*row) for row in zip(self.sizes, self.ratios, self.thresholds)]

METHODS = {  # a method is four settings, a rival's some more
    "trapo": MICRO | {"prefix_loss": "trsft"},
    "micro": MICRO | {"prefix_loss": "none"},  # this row and the next two: Table 2
    "naive": MICRO | {"prefix_loss": "sft"},
    "micro-luffy": MICRO | {"prefix_loss": "luffy"},
    "fixed-prefix": MICRO | {"thresholds": [-1.0, ALWAYS, ALWAYS, ALWAYS], "prefix_loss": "trsft"},
    "grpo": {"sizes": [8], "ratios": [0.0], "thresholds": [-1.0], "prefix_loss": "none"},
    "luffy": WHOLE | {"prefix_loss": "luffy"},
    "sft": {"sizes": [1], "ratios": [1.0], "thresholds": [ALWAYS], "prefix_loss": "sft"},
    # Rivals, and where a row departs from its paper. HPT (arXiv 2509.04419): 7 tries, not 8.
    "hpt": WHOLE | {"thresholds": [-1.0, 1e-9], "prefix_loss": "sft", "baseline": "context"},
    # POPE (2601.18779: shortest useful hint), PrefixRL (2601.18795: own traces): random, for all.
    "pope": {"sizes": [4, 4], "ratios": [0.0, "0.2:0.5"], "thresholds": [-1.0, ALWAYS],
             "prefix_loss": "none", "baseline": "context"},
    # UFT (2505.16984): 8 rollouts, not 4; shares are uniform (mean .75), not binomial (.95), and
    # fall to 0, not .05; the weight falls, too, and is on a sum over a constant, not on a mean.
    "uft": {"sizes": [8], "ratios": ["0.5:1"], "thresholds": [ALWAYS], "prefix_loss": "sft",
            "prefix_weight": 0.001, "anneal": 120},
    # CHORD-phi (2508.11408): SFT on the same problems; 7 tries, not 8; GRPO's weight is 1, not .9.
    "chord": WHOLE | {"prefix_loss": "chord-phi", "prefix_weight": 0.1, "baseline": "context"},
    # GHPO (2507.10628): always 32 rollouts: failures stay, and after a success tries go on.
    "ghpo": {"sizes": [8] * 4, "ratios": [0.0, 0.25, 0.5, 0.75], "thresholds": [-1.0] + [1e-9] * 3,
             "prefix_loss": "none", "baseline": "context"}}

# ==== Part 1. The losses. All are per token; the update (Part 4) sums them.
#
# Let p be the policy's probability of an expert token. SFT minimises -log p. On grad log p its
# weight is 1 however unlikely the token is, so text that the policy would never write pulls as hard
# as any. The policy is moved to where neither it nor the expert is at home, and its rollouts
# degenerate (Section 2.2). TrSFT lets the weight fall with p below p = alpha. (Eq. 3 is stated on
# grad p = p grad log p: there SFT's weight is 1/p, and TrSFT clips it at 1/alpha.) With alpha = 0.1
# and 45 other tokens that share 1 - p; note that SFT's gradient does not explode, it never fades:
#
#       p      weight on grad log p:  SFT     TrSFT     norm of SFT's gradient in the logits
#      .5                              1       1                     .51
#      .1                              1       1                     .91
#      .01                             1        .1                  1.00
#      .001                            1        .01                 1.01
#
# TrSFT's optimum drops the expert's rare tokens and renormalises the main modes (Proposition 1): it
# is mode-seeking, where SFT is mode-covering. So it teaches a form that the policy finds very
# unlikely slowly: at p = .0001 its weight is a thousandth. (alpha = 1 is DFT, arXiv 2508.05629.)
def trsft_loss(logprobs: Tensor, alpha: float) -> Tensor:
    """Trust-Region SFT, Eq. 3:  grad L = -min(p / alpha, 1) grad log p = -grad p / max(p, alpha).

        L(p) = -log p                       if p >= alpha   (inside the trust region: SFT)
             = 1 - log(alpha) - p / alpha   if p <  alpha   (outside)

    The two pieces meet at p = alpha. alpha = 0 is SFT; one outside [0, 1] is a ValueError.
    From log p of the expert's tokens (nats, any shape) to losses, same shape and dtype.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if alpha < 1e-30:  # only p = 0 could be outside, and that piece would take log(0) or overflow
        return -logprobs
    p = logprobs.exp()
    return torch.where(p >= alpha, -logprobs, 1 - math.log(alpha) - p / alpha)

def luffy_loss(logprobs: Tensor, advantages: Tensor | float, gamma: float = 0.1) -> Tensor:
    """LUFFY's loss on expert tokens (arXiv 2504.14945), not clipped:  -A p / (p + gamma)."""
    p = logprobs.exp()
    return -advantages * p / (p + gamma)

PREFIX_LOSSES = {  # what the expert's tokens may be trained with; weights are on grad log p
    "trsft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, alpha),
    "sft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, 0.0),
    "luffy": lambda logprobs, advantages, alpha: luffy_loss(logprobs, advantages),
    # ProFit (arXiv 2601.09195), TrSFT with a hard edge: weight 1[p >= alpha]
    "profit": lambda logprobs, advantages, alpha: -logprobs * (logprobs.exp() >= alpha),
    # CHORD-phi (arXiv 2508.11408): weight p (1 - p), a constant for the gradient
    "chord-phi": lambda logprobs, advantages, alpha: (
        logprobs.exp() * logprobs.expm1()).detach() * logprobs,
    "none": lambda logprobs, advantages, alpha: torch.zeros_like(logprobs)}

def policy_gradient_loss(logprobs: Tensor, advantages: Tensor | float) -> Tensor:
    """The group-relative policy gradient (Section 2.3) on the policy's own tokens:  -A log p.

    REINFORCE with the group's mean as baseline. PPO and GRPO weigh its gradient by the ratio of p
    to the p that the token was drawn with, and clip that ratio, since they update several times on
    the same rollouts. With one update per batch it is 1. (A bf16 sampler's p differs a little: the
    metric logprob_gap says how much; nothing corrects it.) From log p (nats, any shape) and
    advantages (broadcastable) to losses of that shape.
    """
    return -advantages * logprobs

def group_advantages(rewards: Tensor) -> Tensor:
    """[..., G] rewards -> [..., G] advantages: reward minus the group's mean, guided ones included.

    Not divided by the standard deviation, which would favour groups nearly all right or all wrong.
    The mean b includes rollouts that were guided only because this one failed, so b depends on r.
    That only rescales grad P, P the success rate from this prompt and prefix: with r 0 or 1
    E[(r - b) grad log pi] = (1 - E[b | r = 1] + E[b | r = 0]) grad P,  and the factor is above 0 as
    soon as b includes rollouts drawn before or beside this one, which do not depend on its r.
    """
    return rewards - rewards.mean(-1, keepdim=True)

# ==== Part 2. Adaptive guidance: micro-group sampling (Section 2.3, Algorithm 1).
#
# How much help a problem needs is not known in advance, so it is found out: before each micro-group
# the mean reward of all rollouts drawn so far is compared with a threshold. Hard problems get
# longer and longer prefixes, easy ones none. There is no model in this part: `generate` and
# `reward` are functions, and the tests drive them with a script.
@dataclass(frozen=True)
class MicroGroup:
    """n_i rollouts that start from the first L_i of the expert's tokens if guided (Algorithm 1)."""
    size: int         # n_i, rollouts
    ratio: float | str  # L_i, share of the expert solution, in [0, 1]; or a range, low:high
    threshold: float  # t_i: guided if the mean reward so far is below it; -1 never, ALWAYS always

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
    solution_length: int = 0     # tokens of the solution that the prefix is, or would be, cut from
    sampler_logprobs: list[float] = field(default_factory=list)  # of the completion, when drawn
    logprobs: list[float] = field(default_factory=list)   # of prefix + completion, by the update
    entropies: list[float] = field(default_factory=list)  # likewise; [] if it left the rollout out

def is_guided(rewards_so_far: list[float], micro_group: MicroGroup) -> bool:
    """Algorithm 1's test: is the mean reward so far (0 before the first rollout) below t_i?"""
    return sum(rewards_so_far) / max(1, len(rewards_so_far)) < micro_group.threshold

def draw_prefix(problem: Problem, ratio: float | str,
                rng: random.Random) -> tuple[Tokens | None, Tokens]:
    """One of the problem's solutions, and the prefix that would be given; (None, []) if none."""
    if not problem.solutions:
        return None, []
    solution = rng.choice(problem.solutions)
    low, *high = map(float, str(ratio).split(":"))
    return solution, expert_prefix(solution, rng.uniform(low, *high) if high else low)

def expert_prefix(solution_ids: Tokens, ratio: float) -> Tokens:
    """The first round(ratio * length) ids of the solution; all of them, EOS included, at ratio 1.

    The paper cuts anywhere; the released code moves on to a paragraph break if one is near.
    """
    return solution_ids[:round(ratio * len(solution_ids))]

def sample_groups(problems: list[Problem], schedule: list[MicroGroup],
                  generate: Callable[[list[Tokens], list[int]], list[Sampled]],
                  reward: Callable[[Problem, Tokens], float], rng: random.Random, *,
                  max_response: int = 1024) -> list[list[Rollout]]:
    """Algorithm 1: every problem's group of rollouts, in the order drawn, by micro-groups.

    Args: problems: a guided micro-group picks one of a problem's solutions.
        generate: (requests, limits on new tokens) -> a completion and its log-probs for each.
        reward: of a response, prefix and completion together, in [0, 1], as thresholds assume.
        rng: picks solutions, and shares.   max_response: tokens, prefix and completion together.
    """
    # All picks come first, so who is guided does not change what rng picks for the others.
    picks = [[draw_prefix(p, micro_group.ratio, rng) for micro_group in schedule] for p in problems]
    groups: list[list[Rollout]] = [[] for _ in problems]
    for m, micro_group in enumerate(schedule):
        unfinished = []
        for problem, group, picked in zip(problems, groups, picks):
            solution, prefix = picked[m]
            if not is_guided([r.reward for r in group], micro_group):
                prefix = []
            new = [Rollout(problem.prompt_ids, prefix, micro_group=m,
                           solution_length=len(solution or [])) for _ in range(micro_group.size)]
            group += new
            if prefix != solution:  # the whole solution would leave nothing to generate
                unfinished += new
        requests = [r.prompt + r.prefix for r in unfinished]
        limits = [max(0, max_response - len(r.prefix)) for r in unfinished]
        completions = generate(requests, limits) if requests else []
        for r, (completion, logprobs) in zip(unfinished, completions, strict=True):
            r.completion, r.sampler_logprobs = completion, logprobs
        for problem, group in zip(problems, groups):
            for r in group[-micro_group.size:]:
                r.reward = reward(problem, r.prefix + r.completion)
    return groups

# ==== Part 3. Log-probs of response tokens: what every loss above is a function of.
#
# A group's rollouts begin alike: with the prompt, and guided ones with the same expert's tokens. So
# a micro-batch is a tree, each distinct beginning a node, and the policy computes a node once. A
# token's state depends on the tokens before it, and those are the node's path: so this is exact.
#
#     a b c d .         a - b - c - d
#     a b c e .   ->         \   \- e       6 nodes for 11 tokens, in one row: a b c d e f
#     a b f .                 \- f          (the last token, ".", predicts nothing)
#
# Logits of whole batches are what runs out of memory first: 128 sequences of 64 tokens at Qwen's
# vocabulary of 151 936 are 5 GB a copy. So the hidden states are cut down to the positions that
# matter, and the head is applied in chunks, which the backward pass computes again.
HEAD_CHUNK = 1024  # tokens whose [tokens, vocabulary] logits exist at one time

def token_logprobs(policy: nn.Module, sequences: list[Tokens], starts: list[int],
                   temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each sequence's tokens from `starts` on, with gradient, and entropies without.

    The state at position t - 1 predicts token t: of [5, 6, 7, 8] from start 2 on, positions 1 and 2
    give log p(7 | 5 6) and log p(8 | 5 6 7).

    Args: sequences: token ids, ragged.
        starts: index of the first token to score in each, >= 1 (the first token has no context).
        temperature: log-probs are those of softmax(logits / temperature), what was sampled from.
    Returns: two lists of tensors in nats, one of [len(sequence) - start] per sequence.
    """
    tree: dict[tuple[int, int], int] = {}  # (parent, token) -> node: 0, 1, 2, ...
    paths: list[list[int]] = []            # a sequence's nodes, without its last token's
    for sequence in sequences:
        path = [-1]
        for token in sequence[:-1]:
            path.append(tree.setdefault((path[-1], token), len(tree)))
        paths.append(path[1:])
    hidden = tree_states(policy, tree, paths)                          # [N, H]; in Part 7
    scored = [node for path, start in zip(paths, starts) for node in path[start - 1:]]
    states = hidden[scored].split(HEAD_CHUNK)
    targets = [token for s, start in zip(sequences, starts) for token in s[start:]]
    targets = torch.tensor(targets, device=hidden.device).split(HEAD_CHUNK)
    head = policy.get_output_embeddings()
    chunks = [checkpoint(chunk_logprobs, head, h, y, temperature, use_reentrant=False,
                         preserve_rng_state=False) for h, y in zip(states, targets)]
    lengths = [len(s) - start for s, start in zip(sequences, starts)]
    logprobs, entropies = (torch.cat(pieces).split(lengths) for pieces in zip(*chunks))
    return list(logprobs), list(entropies)

# ==== Part 4. The update. The loss of a batch of rollouts is
#
#     ( sum over completion tokens of the policy-gradient loss
#     + prefix weight * sum over prefix tokens of the prefix loss )  /  (rollouts * max response)
#
# The divisor is a constant (Dr. GRPO): dividing by each response's own length would go easy on long
# wrong answers. It also makes the gradient a plain sum, so neither the cut into micro-batches, nor
# their order, nor leaving out rollouts that add exactly nothing can change it.
def is_inert(rollout: Rollout, prefix_loss: str) -> bool:
    """Is the rollout's gradient zero for certain? Then the update leaves it out."""
    no_advantage = rollout.advantage == 0
    prefix_is_inert = not rollout.prefix or prefix_loss == "none" or (
        prefix_loss == "luffy" and no_advantage)
    return prefix_is_inert and (no_advantage or not rollout.completion)

def rollout_loss(rollout: Rollout, logprobs: Tensor, args: Recipe) -> Tensor:
    """Prefix loss plus policy-gradient loss, summed over [len(prefix + completion)] log-probs."""
    prefix, completion = logprobs.tensor_split([len(rollout.prefix)])
    expert = PREFIX_LOSSES[args.prefix_loss](prefix, rollout.advantage, args.alpha).sum()
    own = policy_gradient_loss(completion, rollout.advantage).sum()
    return args.prefix_weight * expert + own

def accumulate_gradients(policy: nn.Module, rollouts: list[Rollout], args: "Settings") -> float:
    """Add the gradient of the batch's loss to the parameters' .grad; returns the loss, and leaves
    log-probs and entropies on every rollout that is trained. Of several processes (WORLD, Part 8)
    each has its own rollouts, and returns their part of the loss; the gradient is that of all."""
    trained = [r for r in rollouts if not is_inert(r, args.prefix_loss)]
    batches = micro_batches(trained, args.micro_tokens)  # so that each fits into memory
    divisor, total = sum(gather(len(rollouts))) * args.max_response, 0.0  # of all processes
    for batch in batches:
        sequences = [r.prompt + r.prefix + r.completion for r in batch]
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.bf16):
            logprobs, entropies = token_logprobs(
                policy, sequences, [len(r.prompt) for r in batch], args.temperature)
        loss = sum(rollout_loss(r, values, args) for r, values in zip(batch, logprobs)) / divisor
        loss.backward()
        total += loss.item()
        for r, values, entropy in zip(batch, logprobs, entropies):
            r.logprobs, r.entropies = values.tolist(), entropy.tolist()
    if WORLD > 1:
        for p in policy.parameters():
            dist.all_reduce(p.grad)  # the sum of all processes' gradients, in each of them
    return total

# ==== Part 5. One step, and the loop.
#
# Everything random comes from generators seeded with (seed, step, process), the order of the data
# and evaluations with the seed. So weights, optimizer state and the number of steps are a run's
# whole state: resumed, on a CPU with as many processes, it equals one never stopped, bit for bit.
def annealed(args: "Settings", step: int) -> "Settings":
    """The settings of a step: with --anneal N ratios and prefix weight are multiplied by
    (1 + cos(pi step / N)) / 2, a cosine from 1 to 0, and are 0 from step N on."""
    if not args.anneal:
        return args
    left = (1 + math.cos(math.pi * min(1, step / args.anneal))) / 2
    ratios = [":".join(str(left * float(end)) for end in str(ratio).split(":"))
              for ratio in args.ratios]
    return dataclasses.replace(args, ratios=ratios, prefix_weight=left * args.prefix_weight)

def train_step(policy: nn.Module, sampler: nn.Module, optimizer: torch.optim.Optimizer,
               task: "Task", args: "Settings", step: int) -> tuple[dict, list[list[Rollout]]]:
    """Rollouts, then one update on all of them: (metrics over all processes, this one's groups)."""
    # ---- Rollout phase: this process's share of the step's prompts, a group of rollouts each.
    times = [time.perf_counter()]
    args, rng = annealed(args, step), random.Random(f"{args.seed} {step} {RANK}")
    torch.manual_seed(rng.getrandbits(63))
    problems = batch_at(step, task, args)[RANK::WORLD]

    def generate(requests: list[Tokens], limits: list[int]) -> list[Sampled]:
        return list(zip(*sample(sampler, requests, limits, args.temperature,
                                kv_tokens=args.kv_tokens)))
    groups = sample_groups(problems, args.schedule, generate, task.reward, rng,
                           max_response=args.max_response)
    times.append(time.perf_counter())
    peers = groups if args.baseline == "group" else [  # a rollout that is alone has A = 0
        [r for r in group if r.micro_group == m]
        for group in groups for m in range(len(args.schedule))]
    for rollouts in peers:
        advantages = group_advantages(torch.tensor([float(r.reward) for r in rollouts]))
        for r, advantage in zip(rollouts, advantages.tolist()):
            r.advantage = advantage

    # ---- Learning phase: one update.
    rollouts = [r for group in groups for r in group]
    for p in policy.parameters():  # zeros, not None, or AdamW's momentum would skip an inert step
        p.grad = torch.zeros_like(p)
    loss = accumulate_gradients(policy, rollouts, args)
    norm = float(nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm))
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.step()
        refresh(sampler, policy)  # if it is a copy, in bf16
    return step_metrics(policy, rollouts, loss, norm, times, args), groups

def train(args: "Settings") -> None:
    """The whole run: load or resume; then roll out, update, evaluate and save, step by step."""
    policy, tokenizer, sampler, optimizer, task, done = prepare(args)  # steps done, 0 or resumed
    open_log(args, done, tokenizer)
    if done == 0 and task.heldout:
        metrics = {"eval": evaluate(sampler, task, args, greedy=True)}
        log(args, done, metrics)
        print_once(f"step 0: {in_short(metrics)}")
    bar = tqdm(range(done, args.steps), args.method, disable=RANK > 0)
    for step in bar:
        metrics, groups = train_step(policy, sampler, optimizer, task, args, step)
        done, last = step + 1, step + 1 == args.steps
        due = last or done % args.eval_every == 0
        if due:
            metrics["eval"] = evaluate(sampler, task, args, greedy=last)
            show_group(groups, tokenizer, args)
            print_once(f"step {done}: {in_short(metrics)}")
        log(args, done, metrics, groups[:2] if due else [])
        if last or done % args.save_every == 0:
            save(policy, tokenizer, Path(args.out, f"checkpoint-{done}"),
                 {"step": done, "optimizer": optimizer.state_dict()})
        bar.set_postfix_str(in_short(metrics), refresh=False)
    save(policy, tokenizer, Path(args.out, "model"))
    print_once(f"{args.out}/model is the model; for its rollouts: python eval.py look {args.out}")

# ==== The workshop. This was TRAPO; below is what it runs on.
#
# ==== Part 6. The sampler: draws rollouts for train_step, and responses for `evaluate` and eval.py.
#
# Not model.generate: here a group's prompt is read once, finished rows leave, every request has
# random numbers of its own, and each token's log-prob is returned with it.
@torch.inference_mode()
def sample(policy: nn.Module, requests: list[Tokens], limits: list[int], temperature: float = 1.0,
           *, uniforms: Tensor | None = None, kv_tokens: int = 1 << 19,
           ) -> tuple[list[Tokens], list[list[float]]]:
    """Draw one completion per request from the exact policy: no top-k, no top-p, no penalty.

    Args: requests: token ids, ragged, none empty.   limits: new tokens allowed for each.
        temperature: divides the logits; 0 is greedy.
        uniforms: [requests, longest limit] random numbers in [0, 1), float64; else torch's own.
        kv_tokens: split the requests so that a batch's cache holds at most so many tokens.
    Returns: completions (EOS included when reached) and the log-probs of what was drawn, nats,
        under softmax(logits / temperature), or softmax(logits) if greedy.
    """
    was_training = policy.training
    policy.eval()  # in train mode gradient checkpointing would drop the cache
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    # Every request has its own random numbers, so what it draws does not depend (up to rounding) on
    # how the requests are split, or on when finished rows leave the batch.
    if uniforms is None:
        uniforms = torch.rand(len(requests), max(limits, default=0), dtype=torch.float64)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    rows = max(1, kv_tokens // max((len(r) + max(limits) for r in requests), default=1))
    for indices in (order[i:i + rows] for i in range(0, len(order), rows)):
        results = decode(policy, [requests[i] for i in indices], [limits[i] for i in indices],
                         uniforms[indices].to(policy.device), temperature)
        for i, completion, values in zip(indices, *results):
            completions[i], logprobs[i] = completion, values
    policy.train(was_training)
    return completions, logprobs

def decode(policy: nn.Module, requests: list[Tokens], limits: list[int], uniforms: Tensor,
           temperature: float) -> tuple[list[Tokens], list[list[float]]]:
    """One batch of `sample`: run the requests, then draw a token of every row in each step."""
    logits, batch = prefill(policy, requests, max(limits))
    eos_ids = policy.generation_config.eos_token_id or ()
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    rows = list(range(len(requests)))  # the request of each of the batch's rows
    alive = {row for row in rows if limits[row] > 0}
    for t in range(max(limits)):
        drawn = torch.stack(draw_tokens(logits, uniforms[:, t], temperature))  # [2, B], float64
        for row, token, logprob in zip(rows, *drawn.tolist()):
            if row in alive:
                completions[row].append(int(token))
                logprobs[row].append(logprob)
                if token in eos_ids or t + 1 == limits[row]:
                    alive.remove(row)
        if not alive:
            break
        # Finished rows leave in few moves: each copies the whole cache, and may record a graph.
        few = (0.5 if batch.graph else 0.75) * len(rows)
        if batch.used == batch.bias.shape[1] or len(alive) <= few:
            kept = [k for k, row in enumerate(rows) if row in alive]
            batch = DecodeBatch(policy, batch.cache, kept, batch.bias[:, :batch.used],
                                batch.position, max(limits) - t)
            drawn, uniforms, rows = drawn[:, kept], uniforms[kept], [rows[k] for k in kept]
        logits = batch.step(drawn[0])
    return completions, logprobs

def prefill(policy: nn.Module, requests: list[Tokens], most: int) -> tuple[Tensor, "DecodeBatch"]:
    """Run each distinct request once, padded on the left: all completions start in one column.
    Returns [B, V] logits, and a batch that holds the cache of the B requests, for `most` tokens."""
    distinct = [list(request) for request in dict.fromkeys(map(tuple, requests))]
    copies = [distinct.index(request) for request in requests]
    width = max(map(len, distinct))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in distinct], device=policy.device)
    places = torch.tensor([range(len(r) - width, len(r)) for r in distinct], device=policy.device)
    cache = transformers.DynamicCache(config=policy.config)
    logits = policy(input_ids=ids, attention_mask=places >= 0, use_cache=True, cache=cache,
                    position_ids=places.clamp(min=0), logits_to_keep=1).logits
    bias = torch.where(places >= 0, 0.0, -math.inf).to(policy.dtype)
    return logits[copies, -1], DecodeBatch(policy, cache, copies, bias, places[:, -1:], most)

ROOM = 16  # tokens that a new batch can take in at least; the unit of its width
capture_stream = functools.cache(torch.cuda.Stream)  # one for all: memory is reused by stream

class DecodeBatch:
    """A batch's decode step on tensors of fixed size and place, as a CUDA graph needs them.
    When finished rows leave, or the room is used up, the kept rows move into a new batch."""
    def __init__(self, policy: nn.Module, cache: transformers.Cache, kept: list[int], bias: Tensor,
                 position: Tensor, most: int) -> None:
        """Take in the `kept` rows of a cache, of [B, T] bias (-inf at padding) and of [B, 1] newest
        position, and free the cache's memory layer by layer. At most `most` tokens will follow."""
        self.policy, self.used, self.position = policy, bias.shape[1], position[kept]
        room = min(max(1, most), max(ROOM, self.used // 2))  # few moves, little that stays empty
        room += -(self.used + room) % ROOM  # CUDA's kernel wants biases of a width of 16 N
        self.bias = nn.functional.pad(bias[kept], (0, room), value=-math.inf)     # [B, T + room]
        self.token = torch.zeros_like(self.position)
        self.cache = transformers.StaticCache(policy.config, max_cache_len=self.used + room)
        for i, layer in enumerate(cache.layers):
            self.cache.update(layer.keys[kept, :, :self.used], layer.values[kept, :, :self.used], i)
            layer.keys = layer.values = None
        dynamic = "dynamic" in str(getattr(policy.config, "rope_parameters", ""))  # reads positions
        self.graph = self.record() if policy.device.type == "cuda" and not dynamic else None

    def step(self, tokens: Tensor) -> Tensor:
        """Append [B] tokens; returns the [B, V] logits of the next ones."""
        self.token.copy_(tokens[:, None])
        self.position += 1
        self.bias[:, self.used] = 0
        self.used += 1
        if not self.graph:
            return self.forward()
        self.graph.replay()
        return self.logits

    def forward(self) -> Tensor:
        """[B, V] logits after self.token; a mask of four dimensions is taken as it is."""
        bias = self.bias[:, None, None]
        return self.policy(input_ids=self.token, attention_mask=bias, position_ids=self.position,
                           cache=self.cache, use_cache=True).logits[:, -1]

    def record(self) -> torch.cuda.CUDAGraph:
        """`forward` as a CUDA graph: one launch, not 80 a layer that cost more than the work."""
        filled = self.cache.layers[0].cumulative_length.clone()
        stream, graph = capture_stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up run, which capture demands, and which writes to
            self.forward()               # one place behind the prompt: taken back below
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self.forward()
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(filled)
        return graph

def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, V] logits and [B] random numbers in [0, 1) -> [B] tokens and their log-probs.

    Inverts the cumulative distribution, whose sums are float64: float32 would round away the tail
    of a vocabulary of 150 000. Temperature 0 takes the most likely token.
    """
    if temperature not in (0, 1):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    top, token = logits.max(-1, keepdim=True)                                     # [B, 1]
    weights = (logits - top.float()).exp()  # float32 if they are bf16
    cumulative = weights.cumsum(-1, dtype=torch.float64)                          # [B, V]
    last = cumulative[:, -1:]
    if temperature:
        # Rounding may not carry it past the last token of a weight above zero.
        target = torch.minimum(uniforms[:, None] * last, last.nextafter(torch.zeros_like(last)))
        token = torch.searchsorted(cumulative, target, right=True)
    logprobs = logits.gather(1, token) - top.float() - last.log()
    return token[:, 0], logprobs[:, 0]

# ==== Part 7. Models, data and reward: what `prepare` and eval.py load.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
HUB = {"gsm8k": ("openai/gsm8k", "main"), "openr1": ("Elliott/Openr1-Math-46k-8192", None)}

class InputError(ValueError):
    """The user's input cannot be used: the program prints one line and exits with 2."""

@contextlib.contextmanager
def as_input_error(doing: str, remedy: str) -> Iterator[None]:
    """Whatever is raised while reading becomes one InputError with a remedy."""
    try:
        yield
    except Exception as error:  # the Hub, the network, parsers and safetensors: each has its own
        cause = error if isinstance(error, InputError) else error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(error).__name__
        raise InputError(f"cannot {doing} ({reason}): {remedy}") from error

def tree_states(policy: nn.Module, tree: dict, paths: list[list[int]]) -> Tensor:
    """[N, H] hidden states of a tree's nodes, which the policy gets as one row. For attention,
    which alone needs sequences, `attend` rebuilds them from `rows`, passed as its mask."""
    width, device = max(map(len, paths)), policy.device
    rows = torch.tensor([path + [0] * (width - len(path)) for path in paths], device=device)
    places = {node: b * width + t for b, path in enumerate(paths) for t, node in enumerate(path)}
    places = torch.tensor(list(places.values()), device=device)  # [N]: one of a node's, in `rows`
    ids = torch.tensor([[token for _, token in tree]], device=device)             # [1, N]
    return policy.base_model(
        input_ids=ids, position_ids=places[None] % width, use_cache=False, places=places,
        attention_mask=rows[None, None]).last_hidden_state[0]

def chunk_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor,
                   temperature: float) -> tuple[Tensor, Tensor]:
    """[N, H] hidden states and [N] targets -> [N] log-probs and [N] entropies (no gradient)."""
    logits = head(hidden)                                                         # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropies = torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropies

def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           places: Tensor | None = None, **options: object) -> tuple[Tensor, None]:
    """The usual attention; given `places`, attention along the paths of [1, heads, N, D] nodes.
    Then `mask` holds the [1, 1, B, T] nodes of the paths, padded on the right: causal attention
    never looks there."""
    if places is None:
        return plain_attention(module, query, key, value, mask, **options)
    nodes, (batch, length) = mask.flatten(), mask.shape[2:]
    unpacked = [x[0].index_select(1, nodes).unflatten(1, (batch, length)).transpose(0, 1)
                for x in (query, key, value)]                                     # [B, heads, T, D]
    if query.device.type == "cpu":  # its kernel is ten times slower in bfloat16, backward
        unpacked = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in unpacked]
    with torch.autocast("cpu", enabled=False):
        out, _ = plain_attention(module, *unpacked, None, **options)              # [B, T, heads, D]
    return out.to(value.dtype).flatten(0, 1).index_select(0, places)[None], None

plain_attention = transformers.AttentionInterface()["sdpa"]
transformers.AttentionInterface.register("sdpa", attend)  # for all models of this process

def model_folder(name: str) -> Path:
    """A run's folder stands for the final model in it: runs/x is runs/x/model."""
    return Path(name, "model") if Path(name, "model", "config.json").exists() else Path(name)

def load_policy(name: str) -> tuple[nn.Module, object]:
    """A causal LM with fp32 master weights on the CPU, and its tokenizer: from a local folder, a
    Hub id, or a bare Qwen name. InputError if it cannot be had or used."""
    folder, safe = model_folder(name), {"trust_remote_code": False}
    path = str(folder) if folder.is_dir() or "/" in name else f"Qwen/{name}"
    with as_input_error(f"use model {name}", "give the folder or Hub id of a model like Qwen2.5"):
        if transformers.utils.find_adapter_config_file(path):
            raise ValueError("it is a LoRA adapter: merge it into its base model first")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        # fp32 always: at a learning rate of 5e-6 most updates would round to nothing in bf16.
        # No dropout: log-probs would differ from pass to pass.
        policy, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attention_dropout=0.0, output_loading_info=True, **safe)
        for fault in "missing_keys", "unexpected_keys":
            if report[fault]:
                raise ValueError(f"{fault} of weights: {', '.join(sorted(report[fault]))}")
        ends = policy.generation_config.eos_token_id  # chat models have several
        ends = {turn_end(tokenizer), tokenizer.eos_token_id, *(
            ends if isinstance(ends, list) else [ends])}
        # Fresh: a contradiction among sampling defaults would be refused at the first checkpoint.
        policy.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(ends - {None}), pad_token_id=tokenizer.pad_token_id)
        check_policy(policy)
    return policy, tokenizer

def turn_end(tokenizer) -> int:
    """The id that ends an assistant's turn: the special token that the chat template prints after
    it, else EOS. ValueError if there is neither."""
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<answer>"}]
        after = render(tokenizer, turns).partition("<answer>")[2]
        ids = tokenizer(after.strip(), add_special_tokens=False).input_ids
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        end = ids[0] if special & set(ids[:1]) else end
    if end is None or len(tokenizer) < 2:  # transformers makes up a Qwen tokenizer that is missing
        raise ValueError("its tokenizer is missing, or has no EOS token to end a response")
    return end

def render(tokenizer, turns: list[dict[str, str]], **options: bool) -> str:
    """Turns by the chat template. A date in it is always the same, or no run could be resumed."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = "{% macro strftime_now(style) %}01 Jan 2026{% endmacro %}" + template
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **options)

@torch.no_grad()
def check_policy(policy: nn.Module) -> None:
    """ValueError for a model whose log-probs token_logprobs would get wrong: it does without the
    model's own logits and masks, and sample uses them, so the two are compared."""
    if getattr(policy.config, "sliding_window", None):
        raise ValueError("its attention slides")
    ids = list(range(1, 17))
    (_, new), (_, sampled) = sample(policy, [ids, ids[:5]], [2, 2], 0.0)  # the second is padded
    (_, scored), _ = token_logprobs(policy, [ids, ids[:5] + new], [5, 5])  # and shares a beginning
    if not torch.allclose(scored, torch.tensor(sampled), atol=1e-3, rtol=1e-3):
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
    heldout: list[Problem]
    reward: Callable[[Problem, Tokens], float]

def batch_at(step: int, task: Task, args: Recipe) -> list[Problem]:
    """The prompts of a step, whatever the number of processes; every problem once an epoch."""
    n, places = len(task.train), range(step * args.prompts, (step + 1) * args.prompts)
    order = {epoch: random.Random(f"order {args.seed} {epoch}").sample(range(n), n)
             for epoch in {i // n for i in places}}
    return [task.train[order[i // n][i % n]] for i in places]

UNREADABLE = "the answer cannot be read, so nothing is right"

@functools.lru_cache(maxsize=4096)
def grade(response: str, answer: str) -> tuple[float, str]:
    """Math-Verify's verdict: (1.0 or 0.0, a note if response or answer hold nothing to compare)."""
    from math_verify import errors, parse, utils, verify  # parse and verify stop after 5 seconds
    right, found = parse(f"${plain_numbers(answer)}$"), parse(plain_numbers(last_box(response)))
    is_word = len(right) < 2 and answer.isalpha()  # a text, but no expression
    if not right or is_word or answer.lower() in ("proof", "notfound"):
        return 0.0, UNREADABLE
    if plain_numbers(answer) != answer or "\\times 10^" in answer:
        # Math-Verify rounds to 6 decimals, where 1e-27 is 2e-27, and takes 10^8 for no 1.0e8.
        number = utils.timeout(5)(float)  # 9^9^9^9 would take for ever
        with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError,  # no numbers
                                 errors.TimeoutException):
            return float(math.isclose(number(right[0]), number(found[0]), rel_tol=1e-6)), ""
    return float(verify(right, found)), "" if found else "no answer found"

def plain_numbers(text: str) -> str:
    """8.7e8 as 870000000: Math-Verify would read e as Euler's number."""
    return re.sub(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,2}(?!\w|\.\d)",
                  lambda number: f"{decimal.Decimal(number[0]):f}", text)

def last_box(response: str) -> str:
    """Math-Verify joins boxes that stand close together. So empty ones (the instruction's) go, and
    of two with words between ("no, it is") the last counts; lists and spam stay joined, and wrong.
    """
    first, *boxes = re.sub(r"\\boxed\{\s*\}", "", response).split("\\boxed{")
    if len(boxes) == 2 and set(re.findall("[a-z]+", boxes[0].rpartition("}")[2])) - {"and", "or"}:
        boxes = boxes[1:]
    return "\\boxed{".join([first, *boxes])

def load_rows(dataset: str, split: str = "train") -> list[dict]:
    """Rows of `gsm8k`, `openr1` or a local file; InputError if they cannot be had. Numbers in JSON
    stay as they were written: an answer of 0.10 is not 0.1."""
    hub, config = HUB.get(dataset, (None, None))
    parse, rows = functools.partial(json.loads, parse_float=str, parse_int=str), []
    with as_input_error(f"read {hub or dataset}", "give .parquet, .json, or a row a line in UTF-8"):
        if hub:
            from datasets import load_dataset
            return load_dataset(hub, config, split=split).to_list()
        if dataset.endswith(".parquet"):
            from pyarrow import parquet
            return parquet.read_table(dataset).to_pylist()
        text = Path(dataset).read_text(encoding="utf-8-sig")
        if dataset.endswith(".json"):
            return list(parse(text))
        for number, line in enumerate(text.split("\n"), 1):
            with as_input_error(f"read line {number}", "correct it"):
                rows += [parse(line)] if line.strip() else []
    return rows

def read_row(row: dict) -> tuple[object, list[str], object]:
    """(problem, solutions, answer) of a row of OpenR1 (prompt, target, reward_model), GSM8K
    (question, answer with "####"), or plain (problem or question, answer, perhaps solution)."""
    if "reward_model" in row:
        problem = [m["content"] for m in row["prompt"] if m["role"] == "user"][-1]
        solutions = [m["content"] for m in row.get("target") or []]
        return problem, solutions, row["reward_model"]["ground_truth"]
    problem, answer = row["problem" if "problem" in row else "question"], row["answer"]
    if "question" in row and "####" in str(answer):  # with calculator marks <<48/2=24>>
        solution, _, answer = re.sub(r"<<.*?>>", "", answer).rpartition("####")
        answer = answer.strip().replace(",", "")
        return problem, [f"{solution.strip()}\n\\boxed{{{answer}}}"], answer
    solutions = row.get("solution") or []
    return problem, solutions if isinstance(solutions, list) else [solutions], answer

def as_text(value: object) -> str:
    """A text, a number as text, nothing as ""; ValueError for what was not meant as text."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{decimal.Decimal(str(value)):f}"  # not 2e-05
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise ValueError(f"neither text nor number: {value}")  # a list, True, NaN
    return "" if value is None else str(value).strip()

def prompt_tokens(problem: str, tokenizer) -> Tokens:
    """The problem with INSTRUCTION: a chat's first turn, or plain text for a model without chat.
    What looks like a special token in the problem is text. InputError if the template loses it."""
    text = f"{problem}\n{INSTRUCTION}"
    if not tokenizer.chat_template:
        ids = tokenizer(text + "\n\n", split_special_tokens=True).input_ids  # with BOS, if usual
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    chat = render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    pieces = chat.partition(problem)
    if problem not in pieces:
        raise InputError("the chat template leaves out the problem")
    if not any(str(token) in problem for token in tokenizer.added_tokens_decoder.values()):
        pieces = [chat]
    return [i for piece in pieces for i in tokenizer(
        piece, add_special_tokens=False, split_special_tokens=piece == problem).input_ids]

def solution_tokens(text: str, prompt: str, tokenizer) -> Tokens:
    """An expert's text. Think tags go, but where the prompt has opened one the text closes it."""
    text = re.sub(r"<think>\n?", "", text)
    if not prompt.rstrip().endswith("<think>"):
        text = re.sub(r"</think>\n?", "", text)
    elif "</think>" not in text:
        text = f"</think>\n\n{text}"
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

def make_problems(rows: list[dict], tokenizer, args: "Settings",
                  heldout: bool = False) -> list[Problem]:
    """Rows -> Problems. Held-out ones need no solution; others without one are never guided.
    InputError if nothing is left, or for a row of another form."""
    problems, dropped, end = [], Counter(), turn_end(tokenizer)
    name = heldout and args.test or args.dataset
    for number, row in enumerate(rows, 1):
        with as_input_error(f"use row {number} of {name}", "see the README on columns"):
            problem, solutions, answer = read_row(row)
            problem, answer, *texts = map(as_text, (problem, answer, *solutions))
            texts = [text for text in texts if text and not heldout]
            if not problem or not answer:
                dropped["no problem or answer"] += 1
                continue
            prompt_ids = prompt_tokens(problem, tokenizer)
            prompt = tokenizer.decode(prompt_ids[-8:])
            encoded = [[*solution_tokens(text, prompt, tokenizer), end] for text in texts]
        short = [ids for ids in encoded if len(ids) <= args.max_response]
        if len(prompt_ids) > args.max_prompt:
            dropped["prompt too long"] += 1
        elif encoded and not short:
            dropped["solution too long"] += 1
        else:
            problems.append(Problem(prompt_ids, short, answer))
    counts = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "none"
    if not problems:
        raise InputError(f"{name} has no usable row{' to hold out' * heldout}; dropped: {counts}")
    solved = "held out" if heldout else f"{sum(bool(p.solutions) for p in problems)} with solutions"
    print_once(f"{name!r}: {len(problems)} problems, {solved}; dropped: {counts}")
    return problems

def make_task(tokenizer, args: "Settings") -> Task:
    """The data, with Math-Verify as reward. Held out: the last rows of --test, of GSM8K's own test
    set, or of the data set, a tenth of it at most."""
    rows = load_rows(args.dataset)
    apart = args.test or args.dataset == "gsm8k"
    test = load_rows(args.test or args.dataset, "test") if apart else rows
    split = len(test) - min(args.eval_size, len(test) if apart else len(test) // 10)
    rows, test = rows if apart else rows[:split], test[split:]
    wanted = test or apart and args.eval_size
    heldout = make_problems(test, tokenizer, args, heldout=True) if wanted else []
    asked = {tuple(p.prompt_ids) for p in heldout}
    train = [p for p in make_problems(rows, tokenizer, args) if tuple(p.prompt_ids) not in asked]
    if not train:
        raise InputError(f"{args.dataset}: all problems are held out; --eval-size 0 holds out none")
    if min(args.thresholds) >= ALWAYS and not any(problem.solutions for problem in train):
        raise InputError(f"--method {args.method} needs solutions, and {args.dataset} has none")

    def reward(problem: Problem, response: Tokens) -> float:  # change me, within [0, 1]
        return grade(tokenizer.decode(response, skip_special_tokens=True), problem.answer)[0]
    return Task(train, heldout, reward)

# ==== Part 8. Processes and checkpoints: what `train` stands on.
#
# Under torchrun every process has the whole policy, and rolls out its share of the prompts. Their
# gradients are added up, so all make the same update. One process uses none of that.
RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def start_processes(backend: str, device: str) -> None:
    """Join the processes that torchrun started, if it did."""
    if WORLD > 1 and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if WORLD > 1:  # a day: the others wait while one writes a checkpoint
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))

def gather(value: object) -> list:
    """Every process's value, in the order of their ranks: [value] if there is one process."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

def micro_batches(rollouts: list[Rollout], budget: int) -> list[list[Rollout]]:
    """Rollouts cut into micro-batches of at most `budget` tokens: a prompt counts once, a response
    as the longest beside it. Rollouts of a prompt are neighbours, long responses first."""
    def cost(batch: list[Rollout]) -> int:
        prompts = {tuple(r.prompt) for r in batch}
        longest = max(len(r.prefix + r.completion) for r in batch)
        return sum(map(len, prompts)) + len(batch) * longest

    by_length = sorted(rollouts, key=lambda r: -len(r.prefix + r.completion))
    prompts = [r.prompt for r in by_length]
    batches: list[list[Rollout]] = []
    for r in sorted(by_length, key=lambda r: prompts.index(r.prompt)):
        if not batches or cost([*batches[-1], r]) > budget:
            batches.append([])
        batches[-1].append(r)
    return batches

def make_sampler(policy: nn.Module, args: "Settings") -> nn.Module:
    """What rollouts are drawn from, on args.device: the policy, or a bf16 copy if args.bf16."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape: half a second, often
    if not args.bf16:
        return policy.to(args.device)
    # Parameters are cast one by one, so that there is never a second fp32 model, and no buffers:
    # RoPE's must stay fp32.
    copies = {id(p): nn.Parameter(p.detach().to(args.device, torch.bfloat16), False)
              for p in policy.parameters()}
    return copy.deepcopy(policy, copies).to(args.device)

@torch.no_grad()
def refresh(sampler: nn.Module, policy: nn.Module) -> None:
    """Copy the policy's weights into the sampler, one by one: onto themselves if it is no copy."""
    for old, new in zip(sampler.parameters(), policy.parameters(), strict=True):
        old.copy_(new)

def prepare(args: "Settings") -> tuple:
    """What a run starts from: models, tokenizer, optimizer, task, and the number of steps done."""
    saved = checkpoints(Path(args.out)) if args.resume else []
    if not saved and Path(args.out, "model").exists():
        raise InputError(f"{args.out} is finished, and has no checkpoint to go on from")
    policy, tokenizer = load_policy(str(saved[-1]) if saved else args.model)
    if policy.num_parameters() < 1e6:
        torch.set_num_threads(1)  # its matrices are so small that threads wait for each other
    check_context(policy, args.max_prompt + args.max_response)
    task = make_task(tokenizer, args)
    sampler = make_sampler(policy, args)
    policy.to(args.device).train()
    if args.recompute:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0)
    if not saved:
        return policy, tokenizer, sampler, optimizer, task, 0
    with as_input_error(f"use {saved[-1]}/trainer.pt", "delete that checkpoint"):
        trainer = torch.load(saved[-1] / "trainer.pt", "cpu", weights_only=True)
        optimizer.load_state_dict(trainer["optimizer"])
        return policy, tokenizer, sampler, optimizer, task, trainer["step"]

def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in out.glob("checkpoint-*/") if path.name[11:].isdecimal())
    return sorted(found, key=lambda path: int(path.name[11:]))

def save(policy: nn.Module, tokenizer, folder: Path, trainer: dict | None = None) -> None:
    """Write a model's folder, whole or not at all: aside, then renamed. With a trainer (optimizer
    and step) it is a checkpoint, of which the newest two are kept. All processes must call it."""
    aside = folder.with_name(".unfinished")
    if RANK == 0:
        shutil.rmtree(aside, ignore_errors=True)
        policy.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if trainer:
            with (aside / "trainer.pt").open("wb") as file:  # a file's errors are plain ones
                torch.save(trainer, file)
        # The model of a finished run that was given more steps goes: the last checkpoint holds it.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for older in checkpoints(folder.parent)[:-2]:
            shutil.rmtree(older, ignore_errors=True)
    gather(0)  # nobody goes on before it is there

def write_whole(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)

def open_log(args: "Settings", start: int, tokenizer) -> None:
    """Cut a resumed run's logs back to step `start`, and write what describes the run."""
    if RANK:
        return
    out, data = Path(args.out), {}
    if not args.resume:
        (out / "settings.json").touch(exist_ok=False)  # of two new runs the later one ends here
    for path in filter(Path.exists, (out / "metrics.jsonl", out / "rollouts.jsonl")):
        kept = [line for line in path.read_text().splitlines(True)  # a kill may have torn the last
                if line.endswith("}\n") and json.loads(line)["step"] <= start > 0]
        write_whole(path, "".join(kept))
    for key in "dataset", "test", "max_prompt", "max_response":
        value = getattr(args, key)
        is_file = isinstance(value, str) and value not in HUB
        data[key] = os.path.abspath(value) if is_file else value
    write_whole(out / "settings.json", json.dumps(vars(args) | {"resume": False}, indent=1))
    write_whole(out / "defaults.json", json.dumps(data, indent=1))
    tokenizer.save_pretrained(out / "tokenizer")  # for `eval.py look`

def log(args: "Settings", step: int, metrics: dict, groups: Iterable[list[Rollout]] = ()) -> None:
    """Append a line to metrics.jsonl, and one for each group worth keeping to rollouts.jsonl."""
    records = [{"rollouts": [vars(r) for r in group]} for group in groups]
    for name, lines in ("rollouts.jsonl", records), ("metrics.jsonl", [metrics]):
        if RANK == 0:
            with Path(args.out, name).open("a") as file:
                file.writelines(json.dumps({"step": step, **line}) + "\n" for line in lines)

# ==== Part 9. Metrics, evaluation, printing: what the loop reports.
def print_once(text: str) -> None:
    """Print a line, once for all processes, and above a progress bar."""
    if RANK == 0:
        tqdm.write(text)

def mean(values: Iterable[float]) -> float | None:
    """The mean, or None if there is none or it is not finite."""
    values = list(values)
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    return total / len(values) if values and math.isfinite(total) else None

def step_metrics(policy: nn.Module, rollouts: list[Rollout], loss: float, norm: float,
                 times: list[float], args: "Settings") -> dict:
    """A line of metrics.jsonl: what a step's rollouts, of all processes, say."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize()  # or the update's time is counted as the next step's
    began, sampled, updated = *times, time.perf_counter()
    rollouts = [r for part in gather(rollouts) for r in part]
    completed = [r for r in rollouts if r.completion]
    trained = [r for r in rollouts if r.logprobs]
    p = [math.exp(x) for r in trained for x in r.logprobs[:len(r.prefix)]]
    eos_ids = policy.generation_config.eos_token_id or ()
    return {
        # Of the first micro-group alone: later rollouts are free where the first ones went well.
        "reward_unguided": mean(r.reward for r in rollouts if r.micro_group == 0 and not r.prefix),
        "reward_guided": mean(r.reward for r in completed if r.prefix),
        "guided": mean(bool(r.prefix) for r in rollouts),
        **{f"guided_{m + 1}": mean(bool(r.prefix) for r in rollouts if r.micro_group == m)
           for m in range(len(args.schedule))},
        "response_length": mean(len(r.prefix + r.completion) for r in rollouts),
        "completion_length": mean(len(r.completion) for r in completed),
        "truncated": mean(r.completion[-1] not in eos_ids for r in completed),
        # Of trained rollouts alone: groups that are all right or all wrong are not in it.
        "entropy": mean(x for r in trained for x in r.entropies[len(r.prefix):]),
        "logprob_gap": mean(abs(x - y) for r in trained for x, y in zip(
            r.logprobs[len(r.prefix):], r.sampler_logprobs)),
        "prefix_p": mean(p), "prefix_outside_share": mean(x < args.alpha for x in p),
        "tokens_generated": sum(len(r.completion) for r in rollouts),
        "tokens_trained": sum(len(r.logprobs) for r in trained),
        "rollouts_skipped": len(rollouts) - len(trained),
        "loss": mean([sum(gather(loss))]), "grad_norm": mean([norm]),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,  # of process 0's GPU
        "seconds_sample": sampled - began, "seconds_update": updated - sampled}

def in_short(metrics: dict) -> str:
    """What is printed of a step; "cut off" is the share of responses that --max-response ended."""
    names = {"reward_unguided": "alone", "guided": "guided", "truncated": "cut off", "loss": "loss"}
    values = metrics.get("eval", {}) | {names[key]: metrics.get(key) for key in names}
    skipped = "; no update, as the gradient is not finite" * (metrics.get("grad_norm", 0) is None)
    return ", ".join(f"{name} {x:.3f}" for name, x in values.items() if x is not None) + skipped

def evaluate(sampler: nn.Module, task: Task, args: "Settings", greedy: bool) -> dict[str, float]:
    """Share of held-out problems solved: by one sampled response each; by a greedy one if asked."""
    accuracy, problems = {}, task.heldout[RANK::WORLD]
    torch.manual_seed(args.seed)  # the same random numbers each time, however many processes
    uniforms = torch.rand(len(task.heldout), args.max_response, dtype=torch.float64)[RANK::WORLD]
    names = {"held out": args.temperature} | ({"held out, greedy": 0.0} if greedy else {})
    for name, temperature in names.items() if task.heldout else ():
        responses, _ = sample(sampler, [p.prompt_ids for p in problems],
                              [args.max_response] * len(problems), temperature,
                              uniforms=uniforms, kv_tokens=args.kv_tokens)
        right = sum(gather(sum(map(task.reward, problems, responses))))
        accuracy[name] = right / len(task.heldout)
    return accuracy

def show_group(groups: list[list[Rollout]], tokenizer, args: Recipe) -> None:
    """Print the group that was helped most, the expert's prefix set apart: the method at work."""
    for group in sorted(groups, key=lambda group: sum(bool(r.prefix) for r in group))[-1:]:
        print_once("prompt: " + tokenizer.decode(group[0].prompt))
        for m, micro_group in enumerate(args.schedule):
            print_once(f"  micro-group {m + 1}: {help_given(group, m, micro_group)}")
            for r in (r for r in group if r.micro_group == m):
                prefix = f"[{tokenizer.decode(r.prefix)}] " if r.prefix else ""
                print_once(f"    reward {r.reward:.0f}, A {r.advantage:+.2f}:  {prefix}"
                           + tokenizer.decode(r.completion))

def help_given(group: list[Rollout], m: int, micro_group: MicroGroup) -> str:
    """What decided on help for micro-group m of a group, and what it got, in words."""
    first = next(r for r in group if r.micro_group == m)
    rewards = [r.reward for r in group if r.micro_group < m]
    average, guided = sum(rewards) / max(1, len(rewards)), is_guided(rewards, micro_group)
    part = len(first.prefix) / max(1, first.solution_length)
    sign, given = ("<", f"{part:.0%} of the solution") if guided else (">=", "no help")
    return f"mean reward so far {average:.2f} {sign} {micro_group.threshold:g}: {given}"

# ==== Part 10. The command line: typed > the resumed run's settings > the model's defaults.json
# > the method's preset > defaults.
EMBEDDED = Path(__file__).resolve().parent / ".clock" / "model"

@dataclass
class Settings(Recipe):
    """The recipe, its data, and how and where it is computed."""
    model: str = setting(str(EMBEDDED), "folder, Hub id or bare Qwen name", group="model and data")
    dataset: str = setting("gsm8k", "gsm8k, openr1, or a .jsonl / .json / .parquet file")
    test: str | None = setting(None, "file of held-out rows; default: the data set's own or last")
    eval_size: int = setting(200, "held-out problems")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute",
                          group="speed and memory")
    bf16: bool | None = setting(None, "compute and sample in bfloat16; default: on CUDA, if it can")
    micro_tokens: int = setting(4096, "tokens in a micro-batch of the update, a prompt once")
    kv_tokens: int = setting(1 << 19, "tokens in the sampler's cache")
    recompute: bool = setting(False, "gradient checkpointing: less memory, a third more time")
    out: str | None = setting(None, "folder; default: runs/<model>-<method>-seed<seed>", "run")
    eval_every: int = setting(20, "steps between evaluations")
    save_every: int = setting(20, "steps between checkpoints")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")

    def __post_init__(self) -> None:
        """InputError for what is no number, or out of range."""
        for f in dataclasses.fields(Settings):
            default, value = f.default_factory(), getattr(self, f.name)
            low, high = RANGES.get(f.name, (1e-12, 1e12))
            values = value if isinstance(default, list) else [value]
            for x in values if type(default) in (int, float, list) else []:
                with as_input_error(f"use {f.name} {x}", f"give a number in [{low:g}, {high:g}]"):
                    if not all(low <= float(end) <= high for end in str(x).split(":", 1)):
                        raise ValueError("out of range")  # NaN, too

CHOICES = {"method": METHODS, "prefix_loss": PREFIX_LOSSES, "device": ("cpu", "cuda"),
           "baseline": ("group", "context")}
RANGES = {"ratios": (0, 1), "alpha": (0, 1), "thresholds": (-1e9, 1e9), "seed": (0, 2**63),
          "lr": (1e-12, 1), "warmup": (0, 1e12), "anneal": (0, 1e12), "prefix_weight": (0, 1e12),
          "eval_size": (0, 1e12)}  # other numbers are above 0

class Parser(argparse.ArgumentParser):
    """argparse, whose errors are InputErrors: one line."""
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see python {self.prog} --help)")

def share(text: str) -> float | str:
    """For argparse: a share, or a range of them, low:high."""
    return text if ":" in text else float(text)

def make_parser() -> Parser:
    """A flag for every field of Settings; what is not typed is not there."""
    parser = Parser(description="TRAPO in one file. Without --model: the embedded experiment.",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default, kind = f.default_factory(), (typing.get_args(f.type) or [f.type])[0]
        shown = f" ({default})" if default not in (None, False, "") else ""
        options = {"help": f.metadata["help"] + shown}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": share if f.name == "ratios" else kind,
                        "nargs": "+" if isinstance(default, list) else None,
                        "choices": CHOICES.get(f.name)}
        group.add_argument("--" + f.name.replace("_", "-"), **options)
    return parser

def parse_args(argv: list[str] | None = None) -> Settings:
    """The command line's Settings; InputError for what cannot be used, with nothing loaded yet."""
    typed = vars(make_parser().parse_args(argv))
    args = fill_in(typed)
    if args.resume:
        before = vars(fill_in(read_settings(Path(args.out, "settings.json"))))
        for key in {*vars(Recipe()), "model", "dataset", "test", "eval_size"} - {"steps", "lr"}:
            if typed.get(key, before[key]) != before[key]:
                raise InputError(f"--resume cannot change {key} of a run: leave the flag out")
        args = Settings(**before | typed | {"out": args.out})
    check_settings(args)
    return args

def fill_in(known: dict) -> Settings:
    """Settings of what is known; the model's defaults, the method's and this machine's beside."""
    folder = model_folder(known.get("model", str(EMBEDDED)))
    if "dataset" not in known:
        known = read_defaults(folder) | known
    args = Settings(**known)
    if folder.name == "model" or folder.name.startswith("checkpoint-"):
        folder = folder.resolve().parent
    preset = {"bf16": args.device == "cuda" and torch.cuda.is_bf16_supported(False),  # not emulated
              **METHODS[args.method],
              "out": f"runs/{folder.name.lstrip('.')}-{args.method}-seed{args.seed}"}
    return dataclasses.replace(args, **{k: v for k, v in preset.items() if k not in known})

def read_settings(path: Path) -> dict:
    """Settings in a JSON file."""
    with as_input_error(f"use {path}", "correct it, or give another folder"):
        known = json.loads(path.read_text())
        Settings(**known)
    return known

def read_defaults(folder: Path) -> dict:
    """What defaults.json in a model's folder, or the one around it, says; {} if there is none."""
    for path in folder / "defaults.json", folder.resolve().parent / "defaults.json":
        if folder.is_dir() and path.exists():
            known = read_settings(path)
            for key in "dataset", "test":
                if known.get(key) not in (None, *HUB):  # a file, as seen from there
                    known[key] = os.path.normpath(path.parent / known[key])
            return known
    return {}

def check_settings(args: Settings) -> None:
    """InputError for lists that do not fit together, and for what is not there."""
    if not len(args.sizes) == len(args.ratios) == len(args.thresholds):
        raise InputError("--sizes, --ratios and --thresholds need equally many values")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA: use --device cpu")
    for name in {args.dataset, args.test} - {None, *HUB}:
        if not Path(name).is_file():
            raise InputError(f"no data set '{name}': give a file, or one of {', '.join(HUB)}")

@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The end of a program: what the user or the disk is to blame for is one line and exit code 2.
    Of several processes one that fails ends at once, and torchrun then ends the others, for which
    destroy_process_group would wait."""
    transformers.utils.logging.disable_progress_bar()
    for noisy in "huggingface_hub", "transformers", "datasets", "math_verify":  # it is said once
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    code = 0
    try:
        yield
        if WORLD > 1:
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        text = str(error).replace("\n", "\\n") or "interrupted"
        if "No space left" in f"{error!r} {error.__context__!r}":  # torch's error has no such class
            text = "no space left on the disk: free space there, then go on"
        elif not isinstance(error, InputError | OSError | UnicodeError | KeyboardInterrupt):
            traceback.print_exc()
            code, text = 1, "a fault of the program: please report the lines above"
        print("error:", text, file=sys.stderr, flush=True)
    if WORLD > 1:
        os._exit(code)
    if code:
        raise SystemExit(code)

def main(argv: list[str] | None = None) -> None:
    """Train by the command line."""
    with one_line_errors():
        args = parse_args(argv)
        start_processes("nccl" if args.device == "cuda" else "gloo", args.device)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if not args.resume and gather(any(Path(args.out).iterdir()))[0]:
            raise InputError(f"{args.out} is not empty: --resume the run in it, if there is one, "
                             "remove it, or give another --out")
        train(args)

if __name__ == "__main__":
    main()
