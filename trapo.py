"""TRAPO in one file: Trust-Region Adaptive Policy Optimization (arXiv 2512.17636).

Post-training usually runs SFT on expert solutions and then RL. TRAPO does both inside every
training instance (Algorithm 1). For a problem x with an expert solution y:

    the policy tries alone                                  4 rollouts     micro-group 1
    it did badly?  it starts from the first 20 % of y       2 rollouts     micro-group 2
    still badly?   it starts from the first half of y       1 rollout      micro-group 3
    still badly?   it is shown the whole of y               1 rollout      micro-group 4

and one update then trains two kinds of tokens:

    the policy's own (completion)   by a group-relative policy gradient (Section 2.3)
    the expert's (prefix)           by Trust-Region SFT: SFT's gradient weight 1/p is clipped at
                                    1/alpha (Eq. 3)

What this file leaves out of GRPO, and why:
    1. no reference model, no KL penalty: the paper trains without them
    2. no division by the group's standard deviation or the response's length: Dr. GRPO's repairs
    3. no importance ratio and no clip: one update per batch of rollouts is on-policy, so the ratio
       is 1 (--updates 2 brings both back)

Words: a *rollout* is one response to a prompt: an expert *prefix* (mostly empty), continued by the
policy's own *completion*. The 8 rollouts of a prompt form its *group*, drawn in *micro-groups*. The
*return* of a rollout is its reward, 1 or 0; its *advantage* is the reward minus the group's mean.

    python trapo.py                                     the embedded experiment: CPU, offline
    python trapo.py --model Qwen2.5-0.5B-Instruct       the same loop on GSM8K, on one GPU

Parts: 1 losses, 2 adaptive guidance, 3 the policy, 4 the update, 5 data and reward, 6 the embedded
experiment, 7 processes and checkpoints, 8 the training loop, 9 the command line.
"""
import argparse, copy, functools, importlib.util, itertools, json, logging, math, os  # noqa: E401
import random, re, resource, shutil, signal, sys, threading, time  # noqa: E401
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as full_state  # whole tensors from shards
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Tokens = list[int]

class InputError(ValueError):
    """The user's input cannot be used: main() prints the message as one line and exits with 2."""

# ==== Part 1. The losses. All are per token; the update (Part 4) sums them.
#
# Let p be the policy's probability of an expert token. SFT minimises -log p, whose gradient
# -(1/p) grad p explodes as p -> 0: the expert's least likely tokens move the policy most, into
# regions that neither supports, and its own rollouts degenerate (Section 2.2). TrSFT clips the
# weight. Its optimum drops the expert's rare tokens and renormalises the main modes
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
    if alpha == 0:  # every p is inside; the other piece would take log(0)
        return -logprobs
    p = logprobs.exp()
    return torch.where(p >= alpha, -logprobs, 1 - math.log(alpha) - p / alpha)

def luffy_loss(logprobs: Tensor, advantages: Tensor | float, gamma: float = 0.1) -> Tensor:
    """LUFFY's loss on expert tokens (arXiv 2504.14945):  -A p / (p + gamma), never clipped.

    From log p (nats, any shape) and advantages (broadcastable to it) to losses of that shape.
    """
    p = logprobs.exp()
    return -advantages * p / (p + gamma)

PREFIX_LOSSES = {  # what the expert's tokens may be trained with: the last rows of Table 2
    "trsft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, alpha),
    "sft": lambda logprobs, advantages, alpha: trsft_loss(logprobs, 0.0),
    "luffy": lambda logprobs, advantages, alpha: luffy_loss(logprobs, advantages),
    "none": lambda logprobs, advantages, alpha: torch.zeros_like(logprobs)}

def policy_gradient_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor | float,
                         clip: float | None = None) -> Tensor:
    """The group-relative policy gradient (Section 2.3):  -ratio * A  with  ratio = p / p_old.

    On policy (old = logprobs.detach()) the ratio is 1, and the gradient with respect to log p is
    -A: REINFORCE with the group's mean as baseline. `clip` is PPO's epsilon; None leaves the ratio
    alone. Log-probs now and when drawn have one shape, that of the losses; advantages broadcast.
    """
    ratio = (logprobs - old_logprobs).exp()
    if clip is None:
        return -ratio * advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

def group_advantages(rewards: Tensor) -> Tensor:
    """[..., G] rewards -> [..., G] advantages: reward minus the group's mean, guided ones included.

    Not divided by the standard deviation, which would favour groups nearly all right or all wrong.
    """
    return rewards - rewards.mean(-1, keepdim=True)

# ==== Part 2. Adaptive guidance: micro-group sampling (Section 2.3, Algorithm 1).
#
# How much help a problem needs is not known in advance, so it is found out: before each micro-group
# the mean return of all rollouts drawn so far is compared with a threshold. Hard problems get
# longer and longer prefixes, easy ones none. There is no model in this part: `generate` and `score`
# are functions, and the tests drive them with a script.
@dataclass(frozen=True)
class MicroGroup:
    """n_i rollouts that start from the first L_i of the expert's tokens if guided (Algorithm 1)."""
    size: int         # n_i, rollouts
    ratio: float      # L_i, share of the expert solution, in [0, 1]
    threshold: float  # t_i: guided if the mean return so far is below it; -1 never, inf always

@dataclass
class Problem:
    """A prompt, the expert's solutions (perhaps none; each ends in EOS), and the answer."""
    prompt_ids: Tokens
    solutions: list[Tokens]
    answer: str

@dataclass
class Rollout:
    """One response = prefix + completion; its last four fields are filled in by Parts 4 and 8."""
    prompt: Tokens
    prefix: Tokens      # the expert's tokens, [] when not guided
    completion: Tokens  # the policy's tokens, EOS included when it was reached
    reward: float
    micro_group: int    # index into the schedule
    advantage: float = 0.0
    # Log-probs of the completion when it was drawn; then, of a trained rollout, log-probs and
    # entropies of prefix and completion before the first update.
    sampler_logprobs: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

def is_guided(returns_so_far: list[float], group: MicroGroup) -> bool:
    """Algorithm 1's test: is the mean return so far (0 before the first rollout) below t_i?"""
    return sum(returns_so_far) / max(1, len(returns_so_far)) < group.threshold

def expert_prefix(solution_ids: Tokens, ratio: float, breaks: Iterable[int] = ()) -> Tokens:
    """The first round(ratio * length) ids of the solution; all of them, EOS included, at ratio 1.

    `breaks`, ids that end a paragraph: the cut moves on to behind the next one, if that comes
    within 30 % of the solution's length (the released code; the paper cuts anywhere).
    """
    length = len(solution_ids)
    cut = round(ratio * length)
    reach = min(length, cut + round(0.3 * length)) if cut else 0
    return solution_ids[:next((i + 1 for i in range(cut, reach) if solution_ids[i] in breaks), cut)]

def sample_groups(problems: list[Problem], schedule: list[MicroGroup],
                  generate: Callable[[list[Tokens], list[int]], list[Tokens]],
                  score: Callable[[Problem, Tokens], float], rng: random.Random,
                  speculate: bool = False, max_response: int = 1024,
                  breaks: Iterable[int] = ()) -> list[list[Rollout]]:
    """Algorithm 1: draw every problem's group of rollouts, micro-group by micro-group.

    With `speculate`, every branch that the thresholds may choose is drawn in ONE generate call
    (trapo: 4+2+1+1 free and 2+1 guided, 11 requests a prompt); the walk keeps those that it would
    have drawn. The distribution is exactly the same: given the policy, branches are independent,
    and a decision looks only at rollouts kept from earlier micro-groups, so it cannot matter
    whether a branch is drawn after the decision or before it, unseen.

    Args: problems: anything with .prompt_ids and .solutions; a guided micro-group picks one.
        generate: (requests, limits on new tokens) -> completions.   score: reward of a response.
        rng: picks the solutions.   max_response: tokens, prefix and completion together.
    Returns: for each problem its sum(sizes) rollouts, in the order drawn.
    """
    # Picked before anything is drawn, so that no decision changes what the others pick.
    solutions = [[rng.choice(p.solutions) if p.solutions else None for _ in schedule]
                 for p in problems]
    drawn: dict[tuple[int, int, bool], list[tuple[Tokens, Tokens]]] = {}

    def draw(branches: Iterable[tuple[int, int, bool]]) -> None:
        """Fill `drawn` for (problem, micro-group, guided) branches with one generate call."""
        jobs = [(i, m, helped, expert_prefix(solutions[i][m], schedule[m].ratio, breaks)
                 if helped else []) for i, m, helped in branches for _ in range(schedule[m].size)]
        unfinished = [(i, prefix) for i, m, _, prefix in jobs if prefix != solutions[i][m]]
        completions = iter(generate(
            [problems[i].prompt_ids + prefix for i, prefix in unfinished],
            [max(0, max_response - len(prefix)) for _, prefix in unfinished]) if unfinished else ())
        for i, m, helped, prefix in jobs:  # a complete solution leaves nothing to generate
            completion = [] if prefix == solutions[i][m] else next(completions)
            drawn.setdefault((i, m, helped), []).append((prefix, completion))

    def guided(i: int, m: int, returns: list[float]) -> bool:
        return solutions[i][m] is not None and is_guided(returns, schedule[m])

    if speculate:  # returns lie in [0, 1], so the two extremes show what may be decided
        draw(dict.fromkeys((i, m, guided(i, m, returns)) for m in range(len(schedule))
                           for i in range(len(problems))
                           for returns in ([[0.0], [1.0]] if m else [[]])))
    groups: list[list[Rollout]] = [[] for _ in problems]
    for m in range(len(schedule)):
        chosen = [(i, m, guided(i, m, [r.reward for r in group])) for i, group in enumerate(groups)]
        if not speculate:
            draw(chosen)
        for i, m, helped in chosen:
            for prefix, completion in drawn[i, m, helped]:
                reward = score(problems[i], prefix + completion)
                groups[i].append(Rollout(problems[i].prompt_ids, prefix, completion, reward, m))
    return groups

# ==== Part 3. The policy: loading it, sampling from it, and the log-probs that training needs.
def load_policy(name: str) -> tuple[nn.Module, object]:
    """A causal LM with fp32 master weights on the CPU, and its tokenizer (by transformers).

    From a local folder, a Hub id, or a bare Qwen name; InputError if it cannot be had or used.
    """
    path = name if os.path.isdir(name) or "/" in name else f"Qwen/{name}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        # fp32 always: at a learning rate of 5e-6 most updates would round to nothing in bf16.
        policy = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # the Hub, the network and safetensors all raise their own
        raise InputError(f"cannot load model '{name}' (tried a folder of that name and the Hub "
                         f"id {path}: {brief(error)}); give a local folder: --model path/to/model"
                         ) from error
    policy.generation_config.eos_token_id = sorted(
        {*end_ids(policy), tokenizer.eos_token_id} - {None})
    check_policy(policy)
    return policy, tokenizer

def brief(error: Exception) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__

def end_ids(policy: nn.Module) -> Tokens:
    """The ids that end a response: chat models have several (<|im_end|>, <|endoftext|>)."""
    ends = policy.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends] if ends is not None else []

@torch.no_grad()
def check_policy(policy: nn.Module) -> None:
    """InputError unless token_logprobs and sample agree with the model's own logits.

    They do without its output layer and its masks: a model that scales its logits, or whose
    attention slides, would be trained on wrong probabilities without a word.
    """
    def agrees() -> bool:
        ids = list(range(1, 17))
        expected = policy(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        (ours,), _ = token_logprobs(policy, [ids], [1])
        (_, new), (_, drawn) = sample(policy, [ids, ids[:5]], [2, 2], 0.0)  # the second is padded
        (again,), _ = token_logprobs(policy, [ids[:5] + new], [5])
        return all(torch.allclose(x, y, atol=1e-3, rtol=1e-3) for x, y in (
            (ours, expected[range(15), ids[1:]]), (again, torch.tensor(drawn))))

    if getattr(policy.config, "sliding_window", None) or not agrees():
        raise InputError(f"{type(policy).__name__} does more than full attention and a matrix "
                         "product for its logits (sliding window, soft-capping, scaling?): use a "
                         "model without, such as Qwen2.5")

@torch.inference_mode()
def sample(policy: nn.Module, requests: list[Tokens], limits: list[int],
           temperature: float = 1.0, static: bool = False, kv_tokens: int = 1 << 19,
           ) -> tuple[list[Tokens], list[list[float]]]:
    """Draw one completion per request from the exact policy.

    Not model.generate, which takes top-k, top-p and a repetition penalty from the model's
    generation_config: samples from another distribution make the policy gradient biased.

    Args: requests: token ids, ragged, none empty.   limits: new tokens allowed for each.
        temperature: divides the logits; 0 is greedy.   static: decode on fixed buffers.
        kv_tokens: split the requests so that a batch's cache holds at most so many tokens.
    Returns: completions (EOS included when reached) and the log-probs of what was drawn, nats,
        under softmax(logits / temperature), or softmax(logits) if greedy.
    """
    was_training = policy.training
    policy.eval()  # in train mode gradient checkpointing would drop the cache
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    # Every request has its own random numbers, so what it draws depends neither on how the requests
    # are split, nor on when finished rows leave the batch.
    noise = torch.rand(len(requests), max(limits, default=0), dtype=torch.float64)
    for batch in micro_batches([len(request) + max(limits) for request in requests], kv_tokens):
        drawn = decode(policy, [requests[i] for i in batch], [limits[i] for i in batch],
                       noise[batch].to(policy.device), temperature, static)
        for i, tokens, scores in zip(batch, *drawn):
            completions[i], logprobs[i] = tokens, scores
    policy.train(was_training)
    return completions, logprobs

def decode(policy: nn.Module, requests: list[Tokens], limits: list[int], noise: Tensor,
           temperature: float, static: bool) -> tuple[list[Tokens], list[list[float]]]:
    """One batch of `sample`: prefill each distinct request once, then a token a step.

    A decode step of a small model on a GPU is bound by the launches of its kernels, so with
    `static` it runs on buffers of fixed size and is replayed as one CUDA graph. Otherwise finished
    rows leave the batch, once they make up a quarter of it (a cut copies the whole cache).
    """
    ends, place = set(end_ids(policy)), {}  # distinct request -> its row in the prefill
    copies = [place.setdefault(tuple(request), len(place)) for request in requests]
    width = max(map(len, place))  # padded on the left: all completions start level
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in place], device=policy.device)
    mask = torch.tensor([[t >= width - len(r) for t in range(width)] for r in place],
                        device=policy.device)
    cache = transformers.DynamicCache(config=policy.config)
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=cache,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1).logits
    cache.batch_select_indices(torch.tensor(copies, device=policy.device))
    logits, mask = logits[copies, -1], nn.functional.pad(mask[copies], (0, max(limits)))
    position = mask.sum(1, keepdim=True) - 1  # of the newest token of each row
    token = torch.zeros_like(position)
    mask = mask[:, None, None]  # transformers takes four dimensions as they are, in every step
    if static:
        replay = graphed_step(policy, cache, token, position, mask)
    completions, logprobs = [[] for _ in requests], [[] for _ in requests]
    rows, alive = list(range(len(requests))), [limit > 0 for limit in limits]
    for now in range(width, width + max(limits)):
        choice, scores = draw_tokens(logits, noise[:, now - width], temperature)
        for k, (row, new, logprob) in enumerate(zip(rows, choice.tolist(), scores.tolist())):
            if alive[k]:
                completions[row].append(new)
                logprobs[row].append(logprob)
                alive[k] = new not in ends and len(completions[row]) < limits[row]
        if not any(alive):
            break
        token.copy_(choice[:, None])
        position += 1
        mask[..., now] = True
        if static:
            logits = replay()
            continue
        if sum(alive) <= 0.75 * len(rows):
            kept = [k for k, lives in enumerate(alive) if lives]
            cache.batch_select_indices(torch.tensor(kept, device=policy.device))
            token, position, mask, noise = (x[kept] for x in (token, position, mask, noise))
            rows, alive = [rows[k] for k in kept], [True] * len(kept)
        logits = policy(input_ids=token, attention_mask=mask[..., :now + 1], position_ids=position,
                        past_key_values=cache, use_cache=True).logits[:, -1]
    return completions, logprobs

def graphed_step(policy: nn.Module, cache, token: Tensor, position: Tensor,
                 mask: Tensor) -> Callable[[], Tensor]:
    """A decode step on fixed buffers, which the caller fills: () -> [B, V] logits.

    On CUDA it is recorded once and replayed, one launch in place of some 80 a layer. The cache's
    contents move into one whose tensors never move or grow.
    """
    fixed = transformers.StaticCache(config=policy.config, max_cache_len=mask.shape[-1])
    for i, layer in enumerate(cache.layers):
        fixed.update(layer.keys, layer.values, i)
    cache.layers.clear()  # its memory is needed

    def step() -> Tensor:
        return policy(input_ids=token, attention_mask=mask, position_ids=position,
                      past_key_values=fixed, use_cache=True).logits[:, -1]

    if not token.is_cuda:
        return step
    filled = fixed.layers[0].cumulative_length.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a warm-up run, which capture demands, and which writes to
        step()                       # one place behind the prompt: taken back below
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for layer in fixed.layers:
        layer.cumulative_length.copy_(filled)
    return lambda: (graph.replay(), logits)[1]

def draw_tokens(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, V] logits and [B] uniform numbers in [0, 1) -> [B] tokens and their log-probs.

    Inverts the cumulative distribution, in float64: float32 would round away the tail of a
    vocabulary of 150 000. Temperature 0 takes the most likely token.
    """
    logprobs = scaled_logprobs(logits, temperature or 1.0)
    if temperature:
        cumulative = logprobs.double().exp().cumsum(-1)
        target = noise[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    else:
        token = logprobs.argmax(-1, keepdim=True)
    return token[:, 0], logprobs.gather(1, token)[:, 0]

def scaled_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs of softmax(logits / temperature), in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits / temperature).log_softmax(-1)

HEAD_CHUNK = 1024  # tokens whose [tokens, vocabulary] logits exist at one time

def token_logprobs(policy: nn.Module, sequences: list[Tokens], starts: list[int],
                   temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each sequence's tokens from `starts` on, with gradient, and entropies without.

    Logits of whole batches are what runs out of memory first: 128 sequences of 64 tokens at Qwen's
    vocabulary of 151 936 are 5 GB a copy. So the hidden states are cut down to the positions that
    matter, and the head is applied in chunks, which the backward pass computes again. Padding is on
    the right and not masked: exact, as causal attention never looks right, and the fast kernel.

    Args: sequences: token ids, ragged.
        starts: index of the first token to score in each, >= 1 (the first token has no context).
        temperature: log-probs are those of softmax(logits / temperature), what was sampled from.
    Returns: two lists of tensors in nats, one of [len(sequence) - start] per sequence.
    """
    width, device = max(map(len, sequences)), policy.device
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
    spots = torch.tensor([row * width + t for row, (s, start) in enumerate(zip(sequences, starts))
                          for t in range(start, len(s))], dtype=torch.long, device=device)
    targets = ids.flatten()[spots].split(HEAD_CHUNK)
    hidden = hidden.flatten(0, 1)[spots - 1].split(HEAD_CHUNK)  # position t - 1 predicts token t
    head, again = policy.get_output_embeddings(), functools.partial(
        checkpoint, score_chunk, use_reentrant=False, preserve_rng_state=False)
    chunks = [(again if len(targets) > 1 else score_chunk)(head, h, y, temperature)
              for h, y in zip(hidden, targets)]
    lengths = [len(s) - start for s, start in zip(sequences, starts)]
    logprobs, entropies = (torch.cat(pieces).split(lengths) for pieces in zip(*chunks))
    return list(logprobs), list(entropies)

def score_chunk(head: nn.Module, hidden: Tensor, targets: Tensor,
                temperature: float) -> tuple[Tensor, Tensor]:
    """[N, H] hidden states and [N] targets -> [N] log-probs and [N] entropies (no gradient)."""
    logprobs = scaled_logprobs(head(hidden), temperature)
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
    """Inert: the rollout's gradient is exactly zero, and the update leaves it out."""
    supervised = rollout.prefix and prefix_loss in ("trsft", "sft")
    reinforced = rollout.advantage != 0 and (rollout.completion or prefix_loss == "luffy")
    return not (supervised or reinforced)

def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices cut into micro-batches of at most `budget` padded tokens (or one sequence).

    Sorted by length, longest first: neighbours need little padding, and if memory does not
    suffice, the first micro-batch says so.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches

def accumulate_gradients(policy: nn.Module, rollouts: list[Rollout], args: Namespace) -> float:
    """Add the gradient of the batch's loss to the parameters' .grad; returns the loss.

    The first pass over a rollout leaves its log-probs and entropies on it.
    """
    active = [r for r in rollouts if not is_inert(r, args.prefix_loss)]
    batches = micro_batches([len(r.prompt + r.prefix + r.completion) for r in active],
                            args.micro_tokens)
    score = getattr(policy, "token_logprobs", functools.partial(token_logprobs, policy))
    # FSDP averages gradients over the processes, hence the divisor is the mean of theirs. And each
    # pass of a sharded model is a collective operation, of which all processes need equally many.
    divisor = sum(gather(len(rollouts))) / WORLD * args.max_response
    total, clip = 0.0, args.clip if args.updates > 1 else None
    for b in range(max(gather(len(batches)))):
        if b >= len(batches):
            (score([[0, 0]], [1])[0][0].sum() * 0).backward()
            continue
        batch = [active[i] for i in batches[b]]
        with torch.autocast("cuda", torch.bfloat16, enabled=policy.device.type == "cuda"):
            logprobs, entropies = score([r.prompt + r.prefix + r.completion for r in batch],
                                        [len(r.prompt) for r in batch], args.temperature)
        loss = 0.0
        for r, new, entropy in zip(batch, logprobs, entropies):
            if not r.logprobs:
                r.logprobs, r.entropies = new.tolist(), entropy.tolist()
            prefix, own = new.tensor_split([len(r.prefix)])
            old = own.new_tensor(r.logprobs[len(r.prefix):])
            loss = loss + PREFIX_LOSSES[args.prefix_loss](prefix, r.advantage, args.alpha).sum()
            loss = loss + policy_gradient_loss(own, old, r.advantage, clip).sum()
        (loss / divisor).backward()
        total += loss.item() / divisor
    return total

# ==== Part 5. Data and reward: a row becomes a Problem.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB = {"gsm8k": ("openai/gsm8k", "main"), "openr1": ("Elliott/Openr1-Math-46k-8192", None)}

@dataclass
class Task:
    """All that the training loop knows of the data."""
    train: list[Problem]
    heldout: dict[str, list[Problem]]  # name of a held-out set -> its problems, the main one first
    score: Callable[[Problem, Tokens], float]
    in_order: bool = False             # a curriculum: not to be shuffled
    breaks: Iterable[int] = ()         # ids of paragraph breaks, for --snap-prefix

@functools.lru_cache(maxsize=4096)
def grade(response: str, answer: str) -> tuple[float, str]:
    """Math-Verify's verdict: (1.0 or 0.0, why the response could not be read, or "")."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # not an Exception, so it is named below
    # Its time limit in seconds is a signal, which only the main thread can receive.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        found = parse(response, parsing_timeout=limit)
        gold = parse("$" + answer + "$", parsing_timeout=limit)
        return float(verify(gold, found, timeout_seconds=limit)), "" if found else "no answer found"
    except (Exception, TimeoutException) as error:  # no response may stop the training
        return 0.0, brief(error)

def math_reward(response: str, answer: str) -> float:
    """1.0 if the response's final answer equals `answer`, else 0.0; never raises."""
    return grade(response, answer)[0]

def read_row(row: dict) -> tuple[str, list[str], str]:
    """(problem, solutions, answer) of a row in any of the three formats; KeyError for others.

    OpenR1: prompt (chat messages), target, reward_model. GSM8K: question, answer with "####".
    Plain: problem (or question), answer, perhaps solution, a string or a list.
    """
    if "reward_model" in row:
        problem = [m["content"] for m in row["prompt"] if m["role"] == "user"][-1]
        answer = row["reward_model"]["ground_truth"]
        solutions = [re.sub(r"</?think>\n?", "", m["content"]) for m in row.get("target") or []]
    elif "question" in row and "####" in str(row["answer"]):  # with calculator marks <<48/2=24>>
        problem = row["question"]
        solution, _, answer = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("####")
        answer = answer.strip().replace(",", "")
        solutions = [f"{solution.strip()}\n\\boxed{{{answer}}}"]
    else:
        problem, answer = row["problem" if "problem" in row else "question"], row["answer"]
        solutions = row.get("solution") or []
        solutions = solutions if isinstance(solutions, list) else [solutions]
    problem, answer, *solutions = ("" if x is None else str(x).strip()
                                   for x in (problem, answer, *solutions))
    return problem, solutions, answer

def load_rows(dataset: str, split: str = "train"):
    """Rows of `gsm8k`, `openr1` or a local file; InputError if they cannot be had."""
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    try:
        if dataset in HUB:
            return load_dataset(*HUB[dataset], split=split)
        return load_dataset(KINDS[Path(dataset).suffix], data_files=dataset, split="train")
    except Exception as error:  # the Hub, the network and the parsers all raise their own
        source = f"Hub data set {HUB[dataset][0]}" if dataset in HUB else f"file {dataset}"
        raise InputError(f"cannot read the {source} ({brief(error.__cause__ or error)}); a local "
                         "file works too: --dataset path/to/rows.jsonl") from error

def make_problems(rows: Iterable[dict], tokenizer, args: Namespace,
                  heldout: bool = False) -> list[Problem]:
    """Rows -> Problems. Unusable rows are dropped and counted; InputError if none is left.

    A row without a solution stays, and is never guided; of `heldout` rows none is read. Lengths are
    limited by args.max_prompt and args.max_response, in tokens.
    """
    problems, dropped = [], []
    for row in rows:
        try:
            problem, texts, answer = read_row(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"cannot read a row with columns {', '.join(row)}: expected problem, "
                             "answer (and solution), or GSM8K's or OpenR1's columns") from error
        prompt, texts = f"{problem}\n{INSTRUCTION}", [] if heldout else texts
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
        ) if tokenizer.chat_template else prompt + "\n\n"
        prompt_ids, *solutions = (tokenizer(text, add_special_tokens=False).input_ids
                                  for text in (prompt, *filter(None, texts)))
        short = [s + [tokenizer.eos_token_id] for s in solutions if len(s) < args.max_response]
        why = ("no problem or answer" if not problem or not answer else
               "empty solution" if texts and not solutions else
               "prompt too long" if len(prompt_ids) > args.max_prompt else
               "solution too long" if texts and not short else "")
        (dropped if why else problems).append(why or Problem(prompt_ids, short, answer))
    counts = ", ".join(f"{dropped.count(why)} {why}" for why in dict.fromkeys(dropped))
    if RANK == 0:
        print(f"{args.dataset}: {len(problems)} problems; dropped: {counts or 'none'}")
    if not problems:
        raise InputError(f"{args.dataset} has no usable row ({counts or 'it is empty'}); see "
                         "--max-prompt and --max-response, and the README on formats")
    return problems

def math_task(tokenizer, args: Namespace) -> Task:
    """Problems with Math-Verify as reward. Held out: GSM8K's test set, or a file's last rows."""
    rows, size = load_rows(args.dataset), args.eval_size
    if args.dataset == "gsm8k":
        cut, test = len(rows), itertools.islice(load_rows("gsm8k", "test"), size)
    else:
        size = min(size, len(rows) // 10)
        cut, test = len(rows) - size, itertools.islice(rows, len(rows) - size, None)
    train = make_problems(itertools.islice(rows, cut), tokenizer, args)
    heldout = make_problems(test, tokenizer, args, heldout=True) if size else []

    def score(problem: Problem, response: Tokens) -> float:
        return math_reward(tokenizer.decode(response, skip_special_tokens=True), problem.answer)

    breaks = frozenset(i for word, i in tokenizer.get_vocab().items()
                       if args.snap_prefix and "\n\n" in tokenizer.convert_tokens_to_string([word]))
    return Task(train, {"held out": heldout} if heldout else {}, score, breaks=breaks)

# ==== Part 6. The embedded experiment: clock chains, a world small enough for a CPU.
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

def clock_model(seed: int) -> tuple[nn.Module, object]:
    """An untrained model like Qwen2, of 98 752 parameters, and its word-level tokenizer.

    By Llama's class with attention biases, which is Qwen2 but for the bias of the output
    projection: beside a config of type qwen2, AutoTokenizer replaces any tokenizer by Qwen2's own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLOCK_WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(cleanup=False)  # spaces between words
    torch.manual_seed(seed)
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(CLOCK_WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.1, attention_bias=True, tie_word_embeddings=False, eos_token_id=1,
        pad_token_id=0))
    return policy, transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

def clock_problem(tokenizer, rng: random.Random, k: int, mark: str, worked: bool = True,
                  filler: float = 0.0, slip: float = 0.0, largest: int = 9) -> Problem:
    """One chain of k steps and its solution, as shown above.

    filler, slip: probability of an aside, of a wrong line, before a line. largest: hours, a step.
    """
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

def clock_task(tokenizer, args: Namespace) -> Task:
    """`clock`: 512 questions with k in 5..9, one expert solution each, and four held-out sets.

    `clock-corpus`: what the base is pretrained on, as expert solutions for --method sft, in order.
    Reward 1 for a response that ends in `# answer <eos>` and has exactly one `#`.
    """
    if not set(CLOCK_WORDS) <= tokenizer.get_vocab().keys():
        raise InputError("--dataset clock needs a --model of the embedded experiment, or none")

    def score(problem: Problem, response: Tokens) -> float:
        ending = tokenizer.convert_tokens_to_ids(["#", problem.answer, "<eos>"])
        return float(response[-3:] == ending and response.count(ending[0]) == 1)

    def problems(name: str, size: int, shortest: int, longest: int, mark: str) -> list[Problem]:
        rng = random.Random(f"{name} {args.seed}")
        return [clock_problem(tokenizer, rng, rng.randint(shortest, longest), mark, filler=0.3,
                              slip=0.1) for _ in range(size)]

    if args.dataset == "clock-corpus":
        rng, total = random.Random(f"corpus {args.seed}"), args.steps * args.prompts
        return Task([corpus_problem(tokenizer, rng, i / total) for i in range(total)], {}, score,
                    in_order=True)
    sets = {"in range (k 5-9)": (5, 9, "?"), "longer (k 10)": (10, 10, "?"),
            "textbook (k 2-4)": (2, 4, ":"), "direct (k 1)": (1, 1, "?")}
    return Task(problems("train", 512, 5, 9, "?"),
                {name: problems(name, args.eval_size, *kind) for name, kind in sets.items()
                 if args.eval_size}, score)

def corpus_problem(tokenizer, rng: random.Random, progress: float) -> Problem:
    """A text of the pretraining corpus, `progress` (0 to 1) of the way through it.

    Copying a change from the prompt comes first, from changes of every size, then the addition,
    from 1 up to 9 hours: a base that learns to add first tends never to copy. In the first half
    every other "?" is worked, or the skill leans on the ":" and nothing is left to unlock.
    """
    early, level = progress < 0.5, 9 if progress < 0.2 else min(9, 1 + int(20 * (progress - 0.2)))
    mark = "?" if rng.random() < (0.4 if early else 0.25) else ":"
    worked = mark == ":" or rng.random() < (0.5 if early else 0.005)
    k = 1 if not worked and (early or rng.random() < 0.8) else rng.randint(1, 10)
    return clock_problem(tokenizer, rng, k, mark, worked, filler=0.04, slip=0.01, largest=level)

# ==== Part 7. Processes and checkpoints
#
# Under torchrun every process samples its share of the prompts from a copy of its own, and FSDP
# keeps the fp32 weights, gradients and optimizer states in shards. One process uses none of that.
# Everything random comes from generators seeded with (seed, step), the order of the data too: so
# weights, optimizer state and two counters are a run's whole state, and a run that was killed and
# resumed equals one that was not, bit for bit.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
WHOLE = full_state.StateDictOptions(full_state_dict=True, cpu_offload=True)

def gather(value: object) -> list:
    """Every process's value, in the order of their ranks; all processes must call it."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

def leave() -> None:
    """End this process at once: gloo's threads may outlive its groups and abort a dying Python."""
    if WORLD > 1:
        sys.stdout.flush()
        os._exit(0)

def shard(policy: nn.Module, device: str) -> None:
    """FSDP2 in place, from the CPU: each decoder layer a unit, the rest another; bf16 on CUDA."""
    from torch.distributed import fsdp
    options = {"mesh": dist.init_device_mesh(device, (WORLD,))}
    if device == "cuda":
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*policy.base_model.layers, policy):
        fsdp.fully_shard(part, **options)
    policy.token_logprobs = functools.partial(token_logprobs, policy)
    fsdp.register_fsdp_forward_method(policy, "token_logprobs")

def make_sampler(policy: nn.Module, device: str) -> nn.Module:
    """What rollouts are drawn from: a copy of the policy, bf16 on CUDA; on one CPU the policy."""
    if device == "cpu" and WORLD == 1:
        return policy
    sampler = copy.deepcopy(policy).requires_grad_(False)
    for p in sampler.parameters() if device == "cuda" else ():
        p.data = p.data.to(torch.bfloat16)  # parameters only: RoPE's buffers must stay fp32
    return sampler.to(device)

@torch.no_grad()
def refresh(sampler: nn.Module, policy: nn.Module) -> None:
    """Copy the policy's weights into the sampler, one parameter at a time."""
    for mine, new in zip(sampler.parameters(), policy.parameters(), strict=True):
        if mine is not new:
            mine.copy_(new.full_tensor() if WORLD > 1 else new)

def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))

def save(policy: nn.Module, tokenizer, optimizer, progress: dict, out: Path) -> None:
    """Write <out>/checkpoint-<step>, whole or not at all; the newest two are kept.

    Under a temporary name, flushed to the disk, then renamed. All processes must call it.
    progress: the step, and how many updates in a row were skipped.
    """
    weights = full_state.get_model_state_dict(policy, options=WHOLE)
    state = full_state.get_optimizer_state_dict(policy, optimizer, options=WHOLE)
    final, temporary = out / f"checkpoint-{progress['step']}", out / ".unfinished"
    if RANK or final.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    torch.save({**progress, "optimizer": state}, temporary / "trainer.pt")
    for path in [*temporary.iterdir(), temporary]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.replace(temporary, final)
    for older in checkpoints(out)[:-2]:
        shutil.rmtree(older)

def publish(out: Path) -> None:
    """Copy the newest checkpoint's model into <out> itself, the weights last: then all is there."""
    for file in sorted(checkpoints(out)[-1].iterdir(), key=lambda file: "safetensors" in file.name):
        if file.name != "trainer.pt":
            shutil.copy(file, out / ".copy")
            os.replace(out / ".copy", out / file.name)

# ==== Part 8. The training loop
def batch_at(step: int, task: Task, args: Namespace) -> list[Problem]:
    """The prompts of a step, whatever the number of processes; every problem once an epoch."""
    n, places = len(task.train), range(step * args.prompts, (step + 1) * args.prompts)
    order = {epoch: range(n) if task.in_order else
             random.Random(f"order {args.seed} {epoch}").sample(range(n), n)
             for epoch in {i // n for i in places}}
    return [task.train[order[i // n][i % n]] for i in places]

def train_step(policy: nn.Module, sampler: nn.Module, optimizer, task: Task, args: Namespace,
               step: int) -> tuple[dict, list[list[Rollout]]]:
    """Rollouts, then the update: (metrics over all processes, this process's groups)."""
    seconds, drawn = {"sample": 0.0}, []

    def generate(requests: list[Tokens], limits: list[int]) -> list[Tokens]:
        started = time.perf_counter()
        completions, logprobs = sample(sampler, requests, limits, args.temperature,
                                       args.cuda_graphs, args.kv_tokens)
        drawn.extend(zip(completions, logprobs))
        seconds["sample"] += time.perf_counter() - started
        return completions

    # ---- Rollout phase
    started = time.perf_counter()
    rng = random.Random(f"{args.seed} {step} {RANK}")
    torch.manual_seed(rng.getrandbits(63))
    groups = sample_groups(batch_at(step, task, args)[RANK::WORLD], args.schedule, generate,
                           task.score, rng, args.speculate, args.max_response, task.breaks)
    rollouts = [r for group in groups for r in group]
    advantages = group_advantages(torch.tensor([[r.reward for r in group] for group in groups]))
    scores = {id(completion): logprobs for completion, logprobs in drawn}  # the very list object
    for r, advantage in zip(rollouts, advantages.flatten().tolist()):
        r.advantage, r.sampler_logprobs = advantage, scores.get(id(r.completion), [])
    seconds["score"] = time.perf_counter() - started - seconds["sample"]

    # ---- Learning phase
    started = time.perf_counter()
    decay = min(1, 2 * (1 - step / args.steps)) if args.decay else 1
    for parameters in optimizer.param_groups:
        parameters["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup)) * decay
    for _ in range(args.updates):
        for p in policy.parameters():  # zeros, not None: Adam moves on even if all is inert
            p.grad = torch.zeros_like(p)
        loss = accumulate_gradients(policy, rollouts, args)
        norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        norm = float(norm.full_tensor() if WORLD > 1 else norm)
        if not math.isfinite(norm):
            break
        optimizer.step()
        refresh(sampler, policy)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()  # or its time is counted as the next step's
    seconds["update"] = time.perf_counter() - started

    peak = (torch.cuda.max_memory_allocated() / 2**30 if policy.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
    metrics = rollout_statistics([r for part in gather(rollouts) for r in part], args,
                                 end_ids(policy))
    return metrics | {
        "tokens_generated": sum(gather(sum(len(completion) for completion, _ in drawn))),
        "loss": mean(gather(loss)), "grad_norm": mean([norm]), "peak_memory_gib": peak,
        **{f"seconds_{name}": s for name, s in seconds.items()}}, groups

def mean(values: Iterable[float]) -> float | None:
    """The mean, or None if there is none or it is not finite."""
    values = list(values)
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    return total / len(values) if values and math.isfinite(total) else None

def rollout_statistics(rollouts: list[Rollout], args: Namespace, ends: Tokens) -> dict:
    """What a step's rollouts, of all processes, say: a line of metrics.jsonl."""
    own = [r for r in rollouts if r.completion]
    trained = [r for r in rollouts if r.logprobs]
    p = [math.exp(x) for r in trained for x in r.logprobs[:len(r.prefix)]]
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
        "entropy": mean(x for r in trained for x in r.entropies[len(r.prefix):]),
        "logprob_gap": mean(abs(x - y) for r in trained for x, y in zip(
            r.logprobs[len(r.prefix):], r.sampler_logprobs)),
        "prefix_p": mean(p),
        "prefix_outside_share": mean(x < args.alpha for x in p),
        "prefix_weight": mean(1 / max(x, args.alpha, 1e-300) for x in p),
        "prefix_inverse_p": mean(1 / max(x, 1e-300) for x in p),
        "tokens_trained": sum(len(r.logprobs) for r in trained),
        "rollouts_skipped": len(rollouts) - len(trained)}

def evaluate(sampler: nn.Module, task: Task, args: Namespace, whole: bool) -> dict[str, float]:
    """Share of held-out problems solved, by one response each, sampled as in training and greedy.

    Unless `whole`, only the first held-out set, sampled: a cheap point of the learning curve.
    """
    found = {}
    for name, problems in list(task.heldout.items())[:None if whole else 1]:
        for temperature in (args.temperature, 0.0) if whole else (args.temperature,):
            torch.manual_seed(args.seed)
            mine = problems[RANK::WORLD]
            responses, _ = sample(sampler, [p.prompt_ids for p in mine],
                                  [args.max_response] * len(mine), temperature,
                                  args.cuda_graphs, args.kv_tokens)
            right = sum(gather(sum(map(task.score, mine, responses))))
            found[name if temperature else f"{name}, greedy"] = right / len(problems)
    return found

def show_group(group: list[Rollout], tokenizer) -> None:
    """Print a rollout of each micro-group, the expert's prefix set apart: the method at work."""
    left, right = ("\033[33m", "\033[0m ") if sys.stdout.isatty() else ("[", "] ")
    tqdm.write("prompt: " + tokenizer.decode(group[0].prompt))
    for m, r in sorted({r.micro_group: r for r in reversed(group)}.items()):
        prefix = left + tokenizer.decode(r.prefix) + right if r.prefix else ""
        tqdm.write(f"  micro-group {m + 1}, reward {r.reward:.0f}: {prefix}"
                   + tokenizer.decode(r.completion))

def train(args: Namespace) -> None:
    """The whole run: load or resume, then roll out, update, measure and save, step by step."""
    out, interrupted, bad, start = Path(args.out), [], 0, 0
    saved = checkpoints(out)[-1:] if args.resume else []
    origin = str(saved[0]) if saved else args.model
    policy, tokenizer = load_policy(origin) if origin else clock_model(args.seed)
    task = (clock_task if args.dataset in CLOCKS else math_task)(tokenizer, args)
    sampler = make_sampler(policy, args.device)  # before sharding: it is whole
    policy.train()
    if args.recompute:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    shard(policy, args.device) if WORLD > 1 else policy.to(args.device)
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, tuple(args.betas),
                                  weight_decay=args.weight_decay)
    if saved:
        state = torch.load(saved[0] / "trainer.pt", map_location="cpu", weights_only=True)
        full_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=WHOLE)
        start, bad = state["step"], state["bad"]
        if start > args.steps:
            raise InputError(f"the run in {out} is at step {start} already: give --steps beyond")
    elif args.resume and RANK == 0 and args.dataset != "clock-corpus":
        print(f"no checkpoint in {out}: from the beginning")
    record = open_log(out, start, policy, args)
    if start == 0 and task.heldout:
        record({"step": 0, "eval": evaluate(sampler, task, args, whole=True)})
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True) or signal.signal(
        signal.SIGINT, signal.default_int_handler))  # a second Ctrl-C stops at once
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=RANK > 0)
    for step in bar:
        began, done = time.perf_counter(), step + 1
        metrics, groups = train_step(policy, sampler, optimizer, task, args, step)
        bad = bad + 1 if metrics["grad_norm"] is None else 0
        if bad and RANK == 0:
            tqdm.write(f"step {done}: the loss or its gradient is not finite, update skipped")
        if task.heldout and (done == args.steps or done % args.eval_every == 0):
            metrics["eval"] = evaluate(sampler, task, args, whole=done == args.steps)
            if RANK == 0 and groups:
                show_group(groups[0], tokenizer)
        record({"step": done, **metrics, "updates_skipped_in_a_row": bad,
                "seconds": time.perf_counter() - began})
        bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("reward_unguided", "guided",
                         "response_length") if metrics[k] is not None})
        stop = any(gather(bool(interrupted) or bad == 3))
        if stop or done == args.steps or done % args.save_every == 0:
            save(policy, tokenizer, optimizer, {"step": done, "bad": bad % 3}, out)
        if stop:
            bar.close()
            if RANK == 0:
                print(f"stopped after step {done}: " + (
                    "three updates in a row were not finite; try a lower --lr" if bad == 3 else
                    "the same command goes on" if args.dataset == "clock-corpus" else
                    f"go on with python trapo.py --resume --out {out}"))
            raise SystemExit(1 if bad == 3 else 130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK == 0:
        publish(out)
        print_table(out)
    gather(0)  # the files are there

def open_log(out: Path, start: int, policy: nn.Module, args: Namespace) -> Callable[[dict], None]:
    """A function that appends a line to metrics.jsonl, which is cut back to the step resumed from.

    Beside it stands config.json, which is also the model's: the run's settings are its key "trapo".
    """
    policy.config.trapo = {k: v for k, v in vars(args).items()
                           if k not in ("schedule", "resume", "overwrite")}
    policy.config.trapo["thresholds"] = [str(t) for t in args.thresholds]  # JSON knows no inf
    gather(0)  # nobody writes before everybody has read
    if RANK:
        return lambda metrics: None
    for old in [*out.glob("model*.safetensors*"), *checkpoints(out)] if args.overwrite else ():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    path, temporary = out / "metrics.jsonl", out / ".metrics"
    lines = path.read_text().splitlines(True) if start and path.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(x for x in lines  # a kill may have torn the last line
                                 if x.endswith("}\n") and json.loads(x)["step"] <= start))
    os.replace(temporary, path)
    policy.config.save_pretrained(out)
    file, run = path.open("a", buffering=1), None  # a line is on the disk once written
    if args.wandb:
        import wandb
        run = wandb.init(project="trapo", name=out.name, config=policy.config.trapo)

    def record(metrics: dict) -> None:
        file.write(json.dumps(metrics) + "\n")
        if run:
            run.log(metrics, step=metrics["step"])
            if metrics["step"] == args.steps:
                run.finish()
    return record

def print_table(out: Path) -> None:
    """Held-out accuracy before and after training, from metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    before, after = (line.get("eval", {}) for line in (lines[:1] + lines[-1:] or [{}, {}]))
    for name in before:
        print(f"{name:30} before {before[name]:.3f}   after {after.get(name, math.nan):.3f}")
    print(f"model and metrics are in {out}")

# ==== Part 9. The command line
#
# A method is four settings; each row of Table 2 and each baseline is one line here, and takes the
# same path through the code above.
INF = math.inf
MICRO = {"sizes": [4, 2, 1, 1], "ratios": [0, 0.2, 0.5, 1], "thresholds": [-1, 0.5, 0.7, 0.9]}
METHODS = {
    "trapo": MICRO | {"prefix_loss": "trsft"},
    "micro": MICRO | {"prefix_loss": "none"},
    "naive": MICRO | {"prefix_loss": "sft"},
    "micro-luffy": MICRO | {"prefix_loss": "luffy"},
    "fixed-prefix": MICRO | {"thresholds": [-1, INF, INF, INF], "prefix_loss": "trsft"},
    "grpo": {"sizes": [8], "ratios": [0], "thresholds": [-1], "prefix_loss": "none"},
    "luffy": {"sizes": [7, 1], "ratios": [0, 1], "thresholds": [-1, INF], "prefix_loss": "luffy"},
    "sft": {"sizes": [1], "ratios": [1], "thresholds": [INF], "prefix_loss": "sft"},
}
MATH = {"lr": 5e-6, "steps": 200, "warmup": 5, "prompts": 32, "max_prompt": 1024,
        "max_response": 1024, "micro_tokens": 4096, "betas": [0.9, 0.95], "weight_decay": 0.0,
        "eval_every": 20, "eval_size": 200, "save_every": 50}
CLOCK = MATH | {"lr": 4e-4, "steps": 120, "prompts": 16, "max_prompt": 32, "max_response": 56,
                "micro_tokens": 1024, "eval_every": 25, "eval_size": 256}
CORPUS = CLOCK | {"method": "sft", "lr": 5e-3, "steps": 2500, "warmup": 20, "decay": True,
                  "prompts": 32, "betas": [0.9, 0.98], "save_every": 300}
CLOCKS = {"clock": CLOCK, "clock-corpus": CORPUS}
MAY_CHANGE = ("steps", "base_steps", "eval_every", "save_every", "device", "micro_tokens",
              "kv_tokens", "speculate", "cuda_graphs", "recompute", "wandb", "out")

class Parser(argparse.ArgumentParser):
    """argparse, whose errors are InputErrors: one line."""
    def error(self, message: str) -> None:
        raise InputError(message + f" (see python {self.prog} --help)")

def number(kind: type, low: float, high: float = INF) -> Callable[[str], float]:
    """A flag's type: a number from low to high."""
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value
    read.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return read

def make_parser() -> Parser:
    """Every flag in one line, with its unit."""
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12, 1e12)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    switch, either = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
    parser = Parser(description="TRAPO in one file. Without --model: the embedded experiment.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.set_defaults(**MATH, **METHODS["trapo"])
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="trapo", help="preset of the next four settings")
    add("--sizes", type=count, nargs="+", help="rollouts in each micro-group")
    add("--ratios", type=share, nargs="+", help="share of the expert solution given")
    add("--thresholds", type=number(float, -INF), nargs="+", help="guided if mean return is below")
    add("--prefix-loss", choices=PREFIX_LOSSES, help="loss on expert tokens")
    add("--alpha", type=share, default=0.1, help="edge of the trust region, a probability")
    add("--snap-prefix", **switch, help="cut prefixes at a paragraph break")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="local folder, Hub id or bare Qwen name; none: the embedded experiment")
    add("--dataset", help="gsm8k, openr1, or a .jsonl / .json / .parquet file")
    add("--max-prompt", type=count, help="longest prompt, tokens")
    add("--max-response", type=count, help="longest response, prefix and completion, tokens")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, help="training steps")
    add("--base-steps", type=count, default=2500, help="pretraining steps of the embedded base")
    add("--prompts", type=count, help="prompts per step, over all processes")
    add("--lr", type=positive, help="learning rate of AdamW, constant after the warm-up")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up")
    add("--decay", **switch, help="in the second half, lr falls linearly to 0")
    add("--betas", type=number(float, 0, 1 - 1e-9), nargs=2, help="AdamW's decay rates")
    add("--weight-decay", type=share, help="AdamW's weight decay")
    add("--max-grad-norm", type=positive, default=1.0, help="gradient clip, L2 norm")
    add("--updates", type=count, default=1, help="updates per batch of rollouts")
    add("--clip", type=share, default=0.2, help="PPO's epsilon, used if --updates > 1")
    add("--temperature", type=positive, default=1.0, help="sampling temperature of the rollouts")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="where to run")
    add("--micro-tokens", type=count, help="padded tokens in a micro-batch of the update")
    add("--kv-tokens", type=count, default=1 << 19, help="tokens in the sampler's cache")
    add("--speculate", **either, help="draw all micro-groups in one pass; default: on CUDA")
    add("--cuda-graphs", **either, help="decode by CUDA graph; default: on CUDA")
    add("--recompute", **switch, help="gradient checkpointing of the layers")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run; runs/<model>-<method>-seed<seed> by default")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything random")
    add("--eval-every", type=count, help="steps between evaluations")
    add("--eval-size", type=number(int, 0), help="held-out problems")
    add("--save-every", type=count, help="steps between checkpoints")
    add("--resume", **switch, help="go on from the newest checkpoint in --out")
    add("--overwrite", **switch, help="replace the run in --out")
    add("--wandb", **switch, help="log to Weights & Biases as well")
    return parser

def parse_args(argv: list[str] | None = None) -> Namespace:
    """Flags over the defaults of method and data set; with --resume, over the run's own settings.

    InputError for the first setting that cannot be used, before anything is loaded.
    """
    parser = make_parser()
    first = parser.parse_args(argv)
    embedded = not first.model or run_settings(first.model).get("dataset") in CLOCKS
    dataset = first.dataset or ("clock" if embedded else "gsm8k")
    cuda = first.device == "cuda"
    parser.set_defaults(**CLOCKS.get(dataset, MATH), dataset=dataset, speculate=cuda,
                        cuda_graphs=cuda)
    method = parser.parse_args(argv).method
    name = Path(first.model).name if first.model else dataset
    parser.set_defaults(**METHODS[method], out=f"runs/{name}-{method}-seed{first.seed}")
    before = run_settings(parser.parse_args(argv).out) if first.resume else {}
    parser.set_defaults(**before)
    args = parser.parse_args(argv)
    out, suffix = Path(args.out), Path(dataset).suffix
    changed = [k for k in before if k not in MAY_CHANGE and getattr(args, k) != before[k]]
    for wrong, message in (
            (args.resume and args.overwrite, "--resume and --overwrite exclude each other"),
            (out.exists() and not out.is_dir(), f"--out {out} is a file: give a folder"),
            (args.resume and list(out.glob("model*.safetensors*")) and not checkpoints(out),
             f"{out} is finished and has no checkpoint to resume: give another --out"),
            ((out / "config.json").exists() and not run_settings(args.out),
             f"{out} holds a model that is no run of this program: give another --out"),
            (changed, f"--resume cannot change {', '.join(changed)} of the run in {out}: leave the "
             "flag out, or start a new run with another --out"),
            (not len(args.sizes) == len(args.ratios) == len(args.thresholds),
             "--sizes, --ratios and --thresholds need equally many values"),
            (args.device == "cuda" and not torch.cuda.is_available(), "no CUDA: use --device cpu"),
            (dataset not in CLOCKS and not args.model, f"--dataset {dataset} needs a --model"),
            (args.wandb and not importlib.util.find_spec("wandb"),
             "--wandb needs the package: pip install wandb"),
            (dataset not in {**HUB, **CLOCKS} and not (suffix in KINDS and os.path.isfile(dataset)),
             f"no data set '{dataset}': give one of {', '.join(HUB)}, or the path of an existing "
             ".jsonl, .json or .parquet file"),
            (not (args.resume or args.overwrite) and (out / "config.json").exists(),
             f"{out} already holds a run: --resume it, --overwrite it, or give another --out")):
        if wrong:
            raise InputError(message)
    args.schedule = [MicroGroup(*x) for x in zip(args.sizes, args.ratios, args.thresholds)]
    return args

def run_settings(folder: str) -> dict:
    """The settings of the run in this folder, {} if there is none."""
    config = Path(folder) / "config.json"
    try:
        settings = json.loads(config.read_text()).get("trapo", {}) if config.exists() else {}
        return settings | {k: list(map(float, v)) for k, v in settings.items() if k == "thresholds"}
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read {config}: {brief(error)}") from error

def main(argv: list[str] | None = None) -> None:
    """Train; the embedded experiment first pretrains its base, unless that was done before."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries, without network
    try:
        args = parse_args(argv)
        if WORLD > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.dataset in CLOCKS:
            torch.set_num_threads(1)  # its matrices are so small that threads wait for each other
        if not args.model and args.dataset == "clock":
            base = Path(args.out).parent / f"clock-base-{args.base_steps}-seed{args.seed}"
            if not (base / "model.safetensors").exists():
                if RANK == 0:
                    print(f"pretraining the base, once for seed {args.seed}")
                train(parse_args(["--dataset=clock-corpus", f"--seed={args.seed}", f"--out={base}",
                                  f"--steps={args.base_steps}", f"--device={args.device}",
                                  "--resume"]))
            args.model = str(base)
        train(args)
    except (InputError, OSError, KeyboardInterrupt) as error:  # OSError: --out is not writable
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
    leave()
