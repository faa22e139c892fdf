"""The facts that trapo.py stands on. The first half is a tutorial in the order of its lecture:

    in the paper                                                held by the test
    Eq. 3: grad L = -1 / max(p, alpha) * grad p                 test_trsft_gradient_is_equation_3
    Prop. 1: TrSFT keeps the expert's main modes                test_proposition_1_...
    Section 2.3: A = reward - the group's mean                  test_advantage_is_the_reward_...
    - which guided rollouts in the mean only rescale            test_guided_rollouts_in_the_...
    the policy gradient -A grad log p, and PPO's                test_policy_gradient_is_ppos_...
    Algorithm 1: help if the mean reward is below t_i           test_schedule_against_a_table_...
    - its first L_i of the expert's tokens                      test_expert_prefix_is_the_first_...
    - or all drawn at once, from the same distribution          test_speculation_has_exactly_...
    the loss of a batch: its sum, its masks, its divisor        test_gradient_is_that_of_the_...
    all of these on one group of eight, number by number        test_a_group_of_eight_by_hand
    Table 2: the methods compared                               test_methods_differ_in_what_...
    it learns                                                   test_trapo_teaches_a_base_...

The second half (`grep -n "# ===="`) tests what the lecture runs on. Nothing is downloaded: models
are tiny and made here. On a CPU, `pytest test_trapo.py` takes a minute or two, and the tutorial
alone, `pytest test_trapo.py -m tutorial`, some 15 seconds.
"""
import copy
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import urllib.request
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import fields, replace
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}  # a test never asks the network

import numpy
import pandas
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import trapo
from trapo import (ALWAYS, METHODS, PREFIX_LOSSES, InputError, MicroGroup, Problem, Rollout,
                   Settings, Task, accumulate_gradients, checkpoints, draw_tokens, expert_prefix,
                   group_advantages, is_guided, is_inert, load_policy, load_rows, luffy_loss, main,
                   make_problems, make_task, micro_batches, parse_args, policy_gradient_loss,
                   sample, sample_groups, token_logprobs, train_step, trsft_loss)

HERE = Path(trapo.__file__).parent
sys.path.insert(0, str(HERE / ".ci"))
import clock  # the world of the embedded experiment

torch.set_num_threads(1)  # tiny matrices: more threads would only wait for each other
pytestmark = pytest.mark.filterwarnings("error")
INF = math.inf

@pytest.fixture(autouse=True)
def own_world(tmp_path_factory, monkeypatch):
    """Every test works in a folder of its own, gets its signals back, and warns of nothing."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    warned, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield warned
    logging.getLogger("transformers").removeHandler(handler)
    for number, handling in before.items():
        signal.signal(number, handling)
    assert not warned

def settings(*flags, **changes):
    """The settings of a command line, and changes that it would not allow."""
    argv = ["--model", "m", "--device", "cpu", *flags, "--out", "unused"]
    return replace(parse_args(argv), **changes)

def gradient(function, *inputs):
    """d sum(function) / d first input, in float64."""
    x = torch.tensor(inputs[0], dtype=torch.float64, requires_grad=True)
    total = function(x, *inputs[1:]).sum()
    return torch.autograd.grad(total, x)[0] if total.requires_grad else torch.zeros_like(x)

# ==== The tutorial: one group of eight, from its rewards to its gradient

PAPER = [MicroGroup(4, 0.0, -1), MicroGroup(2, 0.2, 0.5), MicroGroup(1, 0.5, 0.7),
         MicroGroup(1, 1.0, 0.9)]

class Script:
    """A `generate` that gives each request the next completion, and notes what it was asked.

    The log-prob that comes with a completion is -1, -2, -3, ..., as a mark of its own.
    """
    def __init__(self, completions):
        self.completions, self.calls, self.drawn = iter(completions), [], 0

    def __call__(self, requests, limits):
        self.calls.append((requests, limits))
        pairs = []
        for _ in requests:
            self.drawn += 1
            pairs.append((next(self.completions), [-float(self.drawn)]))
        return pairs

class Table(torch.nn.Module):
    """A policy whose logits at place t are its parameters, row t: gradients can be read off."""
    def __init__(self, rows):
        super().__init__()
        self.rows, self.device = torch.nn.Parameter(rows), torch.device("cpu")

    def base_model(self, input_ids, use_cache=False):
        rows, length = input_ids.shape
        return Namespace(last_hidden_state=self.rows[:length].expand(rows, -1, -1))

    def get_output_embeddings(self):
        return torch.nn.Identity()

def test_a_group_of_eight_by_hand():
    """One prompt, the paper's schedule, alpha = 0.1, at most 4 response tokens.

    Right is what ends in R. The policy's next token has, whatever came before, the probability
    0.5 for A, 0.04 for B (less than alpha), 0.21 for C, 0.2 for R, and 0.05 for W.
    """
    A, B, C, R, W = range(5)
    p = torch.tensor([0.5, 0.04, 0.21, 0.2, 0.05], dtype=torch.float64)
    script = Script([[W], [W], [W], [R], [W], [W], [C, R]])
    (group,) = sample_groups([Problem([0], [[A, B, C, R]], "")], PAPER, script,
                             lambda _, response: float(response[-1] == R), random.Random(0),
                             max_response=4)
    rewards = [r.reward for r in group]
    for r, advantage in zip(group, group_advantages(torch.tensor(rewards)).tolist()):
        r.advantage = advantage
    found = [(r.micro_group + 1, r.prefix, r.completion, r.reward, r.advantage) for r in group]
    assert found == [
        (1, [], [W], 0, -0.375),              # the first four try alone
        (1, [], [W], 0, -0.375),
        (1, [], [W], 0, -0.375),
        (1, [], [R], 1, 0.625),
        (2, [A], [W], 0, -0.375),             # mean reward 1/4 < 0.5: 0.2 of 4 tokens is 1
        (2, [A], [W], 0, -0.375),
        (3, [A, B], [C, R], 1, 0.625),        # mean reward 1/6 < 0.7: half is 2 tokens
        (4, [A, B, C, R], [], 1, 0.625)]      # mean reward 2/7 < 0.9: all; 3 right of 8 is 0.375

    log, alpha = math.log, 0.1
    wrong = 0.375 * log(0.05)                 # the policy's W: -A log p
    inside = -log(0.5)                        # the expert's A: -log p
    outside = 1 - log(alpha) - 0.04 / alpha   # the expert's B: p < alpha
    losses = [
        wrong,
        wrong,
        wrong,
        -0.625 * log(0.2),
        inside + wrong,
        inside + wrong,
        inside + outside - 0.625 * (log(0.21) + log(0.2)),
        inside + outside - log(0.21) - log(0.2)]
    policy = Table(p.log().repeat(5, 1))      # a row for each of at most 5 places
    total = accumulate_gradients(policy, group, settings("--max-response", "4"))
    assert total == pytest.approx(sum(losses) / (8 * 4), rel=1e-12)

    # Now the gradient. Each token drawn or given weighs on its log-prob with -A or, of an expert,
    # -min(p / alpha, 1); and d log p(c) / d logit(j) is (1 if j = c else 0) - p(j).
    weights = torch.tensor([
        -4,                                   # A, given four times
        -0.4 * 2,                             # B, given twice, weighs p / alpha
        -1 - 0.625,                           # C, given once and drawn once
        -1 - 0.625 * 2,                       # R
        0.375 * 5], dtype=torch.float64)      # W
    torch.testing.assert_close(policy.rows.grad.sum(0), (weights - weights.sum() * p) / (8 * 4))

# ==== Settings: a method is four of them

WRONG, RIGHT = 0, 1                                     # tokens that decide a response's reward
SOLUTION = [10, 11, 12, 13, 14, 15, 16, 17, 18, RIGHT]  # ten tokens; the last plays the EOS
GUIDED = [0, 0, 0, 0, 2, 2, 5, 10]                      # prefix lengths if all goes wrong

def reward(problem, response):
    """A response is as good as its last token says."""
    return float(response[-1] == RIGHT)

def draw(outcomes, problems=None, schedule=PAPER, **options):
    """sample_groups on a script of one-token completions: (groups, the script)."""
    problems = problems or [Problem([5], [SOLUTION], "")]
    script = Script([[outcome] for outcome in outcomes])
    return sample_groups(problems, schedule, script, reward, random.Random(0), **options), script

@pytest.mark.parametrize("method, if_wrong, if_right, weight", [
    ("trapo", GUIDED, [0] * 8, 0.2), ("micro", GUIDED, [0] * 8, 0), ("naive", GUIDED, [0] * 8, 1),
    ("micro-luffy", GUIDED, [0] * 8, 0.5 * 0.1 * 0.02 / 0.12 ** 2),
    ("fixed-prefix", GUIDED, GUIDED, 0.2), ("grpo", [0] * 8, [0] * 8, 0),
    ("luffy", [0] * 7 + [10], [0] * 7 + [10], 0.5 * 0.1 * 0.02 / 0.12 ** 2),
    ("sft", [10], [10], 1)])
def test_methods_differ_in_what_their_rollouts_start_from_and_what_expert_tokens_weigh(
        method, if_wrong, if_right, weight):
    """Prefix lengths, of ten tokens, if all goes wrong or right; weight at p = 0.02, A = 0.5."""
    args = settings("--method", method)
    for outcome, lengths in ((WRONG, if_wrong), (RIGHT, if_right)):
        (group,), _ = draw([outcome] * 8, schedule=args.schedule)
        assert [len(r.prefix) for r in group] == lengths
    loss = PREFIX_LOSSES[args.prefix_loss]
    found = gradient(lambda logp: loss(logp, 0.5, args.alpha), [math.log(0.02)])
    assert found.item() == pytest.approx(-weight) and len(METHODS) == 8

def test_what_is_typed_goes_over_the_method_and_that_over_the_defaults():
    """The paper's Section 5 is the default, a method sets its four, a flag has the last word."""
    args = settings("--model", "Qwen2.5-0.5B-Instruct")
    assert (args.method, args.dataset, args.alpha, args.lr) == ("trapo", "gsm8k", 0.1, 5e-6)
    assert args.schedule == PAPER and args.temperature == 1 and args.max_prompt == 1024
    args = settings("--ratios", "0", "0.25", "0.5", "1")  # the released code's
    assert args.schedule == [MicroGroup(4, 0, -1), MicroGroup(2, 0.25, 0.5),
                             MicroGroup(1, 0.5, 0.7), MicroGroup(1, 1, 0.9)]
    args = settings("--method", "grpo", "--sizes", "3", "1", "--ratios", "0", "1", "--thresholds",
                    "-1", "2", "--prefix-loss", "sft", "--lr", "0.5")
    assert args.schedule == [MicroGroup(3, 0, -1), MicroGroup(1, 1, ALWAYS)]
    assert args.prefix_loss == "sft" and args.lr == 0.5 and args.alpha == 0.1

# ==== Part 1. The losses

@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_trsft_gradient_is_equation_3(alpha):
    """grad L = -1 / max(p, alpha) * grad p, by autograd and by finite differences."""
    p = [0.001, 0.05, 0.0999, 0.1001, 0.3, 0.499, 0.501, 0.9, 0.999]
    expected = torch.tensor([-1 / max(x, alpha) for x in p], dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda p: trsft_loss(p.log(), alpha), p), expected)
    p, h = torch.tensor(p, dtype=torch.float64), 1e-6
    slope = (trsft_loss((p + h).log(), alpha) - trsft_loss((p - h).log(), alpha)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=0)

def test_trsft_weight_on_the_log_probability_is_p_over_alpha_at_most_one():
    """In terms of log p the expert's rare tokens are damped; alpha = 1 is DFT, of weight p."""
    p = [1e-8, 0.02, 0.05, 0.2, 1.0]
    for alpha, expected in ((0.1, [1e-7, 0.2, 0.5, 1, 1]), (1.0, p), (0.0, [1.0] * 5)):
        weights = -gradient(lambda logp: trsft_loss(logp, alpha), [math.log(x) for x in p])
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))

@pytest.mark.parametrize("p, sft, trsft, norm", [
    (0.5, 1, 1, 0.51), (0.1, 1, 1, 0.91), (0.01, 1, 0.1, 1.00), (0.001, 1, 0.01, 1.01)])
def test_an_unlikely_token_pulls_as_hard_as_any_in_sft_and_little_in_trsft(p, sft, trsft, norm):
    """Weights on grad log p; and the norm of SFT's gradient in a softmax's logits, which is
    sqrt((1 - p)^2 + the sum of the others' squares): near 1 where p is small, and no more.

    Here 45 other tokens share what is left of the probability.
    """
    logits = [math.log(p)] + [math.log((1 - p) / 45)] * 45
    found = {alpha: gradient(lambda x: trsft_loss(x.log_softmax(-1)[0], alpha), logits)
             for alpha in (0.0, 0.1)}
    assert found[0.0].norm().item() == pytest.approx(math.hypot(1 - p, (1 - p) / 45 ** 0.5))
    assert found[0.0].norm().item() == pytest.approx(norm, abs=0.005)
    weights = {alpha: x[0].item() / (p - 1) for alpha, x in found.items()}  # d log p is 1 - p
    assert weights == {0.0: pytest.approx(sft), 0.1: pytest.approx(trsft)}

def test_trsft_is_continuous_at_the_edge_of_the_trust_region():
    """Both pieces have the value -log(alpha) at p = alpha."""
    for alpha in (0.01, 0.1, 0.7, 1.0):
        sides = torch.tensor([alpha * (1 - 1e-9), alpha, alpha * (1 + 1e-9)], dtype=torch.float64)
        expected = torch.full_like(sides, -math.log(alpha))
        torch.testing.assert_close(trsft_loss(sides.log(), alpha), expected, rtol=0, atol=1e-8)

def test_trsft_values_by_hand():
    """Inside -log p, outside 1 - log(alpha) - p / alpha; alpha = 0 is SFT, alpha = 1 is 1 - p."""
    logp = torch.tensor([0.5, 0.04], dtype=torch.float64).log().reshape(1, 2)
    for alpha, values in ((0, [-math.log(0.5), -math.log(0.04)]), (1, [0.5, 0.96]),
                          (0.1, [-math.log(0.5), 1 - math.log(0.1) - 0.4])):
        expected = torch.tensor([values], dtype=torch.float64)  # the shape is kept
        torch.testing.assert_close(trsft_loss(logp, alpha), expected)

def test_trsft_survives_an_expert_token_of_probability_zero():
    """log p = -inf costs 1 - log(alpha) and has gradient 0; SFT (alpha = 0) costs inf, no NaN."""
    for logp in (-INF, -1e4):
        value = trsft_loss(torch.tensor(logp, dtype=torch.float64), 0.1)
        assert value.item() == pytest.approx(1 - math.log(0.1), rel=1e-12)
        assert gradient(lambda x: trsft_loss(x, 0.1), [logp]).item() == 0
        assert trsft_loss(torch.tensor(logp), 0.0).item() == -logp
        assert gradient(lambda x: trsft_loss(x, 0.0), [logp]).item() == -1

@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, INF])
def test_alpha_is_a_probability(alpha):
    """Anything outside [0, 1] is a ValueError."""
    with pytest.raises(ValueError, match="alpha"):
        trsft_loss(torch.zeros(1), alpha)

def proposition_1(expert, alpha):
    """p*(c) = p_E(c) / lambda for the tokens with p_E(c) > alpha * lambda, which sum to 1.

    The rest gets 0, with one exception that the paper passes over: lambda may have to make one
    token's p_E equal to alpha * lambda, where the loss is flat; that token takes what is left.
    """
    ordered, order = expert.sort(descending=True)
    best, kept = torch.zeros_like(expert), torch.tensor(0.0, dtype=expert.dtype)
    for k, p in enumerate(ordered):  # kept: the mass of the k likeliest tokens, which are in
        if p <= alpha * (kept + p):  # the next one is too rare to follow them entirely
            lam = torch.maximum(kept, p / alpha)
            best[order[:k]], best[order[k]] = ordered[:k] / lam, 1 - kept / lam
            return best
        kept = kept + p
    return expert

def test_proposition_1_trsft_keeps_the_experts_main_modes_and_sft_copies_all():
    """Gradient descent on a categorical's logits meets the closed form; at alpha 0, p_E itself."""
    torch.manual_seed(0)
    alphas = (0.0, 0.1, 0.2, 0.4)  # at 0.4 this p_E has the exception described above
    expert = torch.distributions.Dirichlet(torch.full((12,), 0.6, dtype=torch.float64)).sample()
    logits = torch.zeros(len(alphas), 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(800):
        logprobs = logits.log_softmax(-1)
        loss = sum((expert * trsft_loss(row, alpha)).sum() for row, alpha in zip(logprobs, alphas))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for alpha, found in zip(alphas, logits.detach().softmax(-1)):
        torch.testing.assert_close(found, proposition_1(expert, alpha), rtol=0, atol=3e-4)
    assert torch.equal(proposition_1(expert, 0.0), expert)
    kept = [int((proposition_1(expert, alpha) > 0).sum()) for alpha in alphas]
    assert kept == sorted(kept, reverse=True) and (kept[0], kept[-1]) == (12, 2)  # mode-seeking

def test_luffy_gradient_is_the_advantage_times_the_shaped_ratio():
    """L = -A p / (p + gamma), so dL / dlog p = -A gamma p / (p + gamma)^2; A broadcasts."""
    p = torch.tensor([[0.01, 0.1, 0.5], [0.9, 0.2, 1.0]], dtype=torch.float64)
    advantages = torch.tensor([[0.75], [-0.25]], dtype=torch.float64)
    torch.testing.assert_close(luffy_loss(p.log(), advantages), -advantages * p / (p + 0.1))
    for gamma in (0.1, 0.3):
        found = gradient(luffy_loss, p.log().tolist(), advantages, gamma)
        torch.testing.assert_close(found, -advantages * gamma * p / (p + gamma) ** 2)

def test_policy_gradient_is_ppos_on_the_policys_own_samples():
    """-A log p and PPO's -min(ratio A, clipped ratio A) have the gradient -A where p = p_old."""
    def ppo(new, old, advantages):
        ratio = (new - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    logp, advantages = [-0.1, -2.0, -5.0], torch.tensor([0.625, -0.375, 0.0], dtype=torch.float64)
    old = torch.tensor(logp, dtype=torch.float64)
    torch.testing.assert_close(gradient(policy_gradient_loss, logp, advantages), -advantages)
    torch.testing.assert_close(gradient(ppo, logp, old, advantages), -advantages)

def test_advantage_is_the_reward_minus_the_groups_mean():
    """Group by group, and not divided by the standard deviation."""
    rewards = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1.]])
    expected = torch.tensor([[0.75, *[-0.25] * 6, 0.75], [0.0] * 8])
    assert torch.equal(group_advantages(rewards), expected)
    assert torch.equal(group_advantages(rewards.view(2, 1, 8)), expected.view(2, 1, 8))

def test_guided_rollouts_in_the_baseline_only_rescale_each_contexts_gradient():
    """E[(r - b) grad log pi] = (1 - E[b | r = 1] + E[b | r = 0]) grad P in each of its contexts.

    By enumeration of TRAPO's groups, for 150 random success rates P of the contexts: micro-groups
    with and without help. The whole solution is a context, too, but nothing is drawn from it.
    """
    played = {tuple((2 * r.micro_group + bool(r.prefix), r.reward) for r in draw(pattern)[0][0])
              for pattern in product((WRONG, RIGHT), repeat=8)}
    contexts, rewards = torch.tensor(sorted(played), dtype=torch.float64).unbind(-1)  # [N, 8]
    contexts, advantages = contexts.long(), group_advantages(rewards)
    baseline, whole = rewards - advantages, 2 * 3 + 1
    torch.manual_seed(0)
    factors = []
    for logits in 2 * torch.randn(150, 8, dtype=torch.float64):  # of success, by context
        logits.requires_grad_()
        signs = 2 * rewards - 1
        logprobs = torch.where(contexts == whole, 0, (signs * logits[contexts]).sigmoid().log())
        chances = logprobs.sum(1, keepdim=True).exp().detach()   # of each group
        torch.testing.assert_close(chances.sum(), chances.new_tensor(1.0))
        (chances * advantages * logprobs).sum().backward()       # what the update does on average
        p = logits.detach().sigmoid()
        for context in (0, 2, 3, 4, 5, 6):
            right, wrong = (chances * (contexts == context) * (rewards == r) for r in (1, 0))
            factor = 1 - (right * baseline).sum() / right.sum() + (
                wrong * baseline).sum() / wrong.sum()
            ascent = factor * (right + wrong).sum() * (p * (1 - p))[context]  # d p = p (1 - p)
            torch.testing.assert_close(logits.grad[context], ascent)
            factors.append(factor.item())
        assert logits.grad[whole] == 0
    assert 0.75 < min(factors) < max(factors) < 1

# ==== Part 2. Adaptive guidance

@pytest.mark.parametrize("rewards, threshold, guided", [
    ([], -1, False), ([], 0.5, True), ([0, 0, 0, 0], -1, False), ([0, 0, 0, 0], 0.5, True),
    ([1, 0, 0, 0], 0.5, True), ([1, 1, 0, 0], 0.5, False), ([1, 1, 1, 0], 0.5, False),
    ([1, 1, 0, 0, 1, 1], 0.7, True), ([1, 1, 1, 0, 1, 1], 0.7, False),
    ([1, 1, 1, 1, 1, 1, 0], 0.9, True), ([1, 1, 1, 1, 1, 1, 1], 0.9, False),
    ([1, 1, 1, 1], ALWAYS, True)])
def test_help_comes_if_the_mean_reward_so_far_is_below_the_threshold(rewards, threshold, guided):
    """Strictly below: 2 right of 4 get no help at 0.5. -1 is never."""
    assert is_guided([float(r) for r in rewards], MicroGroup(1, 0.5, threshold)) is guided

@pytest.mark.parametrize("length, ratio, cut", [
    (10, 0.0, 0), (10, 0.2, 2), (10, 0.5, 5), (10, 1.0, 10), (7, 0.2, 1), (8, 0.2, 2), (9, 0.5, 4),
    (1, 0.2, 0), (1, 1.0, 1), (3, 1.0, 3)])
def test_expert_prefix_is_the_first_share_of_the_solution_rounded(length, ratio, cut):
    """round(ratio * length) tokens; at ratio 1 all of them, EOS included."""
    solution = list(range(100, 100 + length))
    assert expert_prefix(solution, ratio) == solution[:cut]

@pytest.mark.parametrize("four, two, one, prefixes", [
    # right or wrong; then means of the 4    the 6  the 7
    ("0000", "00", "0", [2, 2, 5, 10]),  # 0      0      0
    ("0000", "11", "1", [2, 2, 5, 10]),  # 0      .33    .43
    ("1000", "11", "1", [2, 2, 5, 10]),  # .25    .5     .57
    ("1100", "00", "0", [0, 0, 5, 10]),  # .5     .33    .29
    ("0110", "11", "1", [0, 0, 5, 10]),  # .5     .67    .71
    ("1110", "11", "1", [0, 0, 0, 10]),  # .75    .83    .86
    ("1111", "00", "1", [0, 0, 5, 10]),  # 1      .67    .71
    ("1111", "11", "0", [0, 0, 0, 10]),  # 1      1      .86
    ("1111", "11", "1", [0, 0, 0, 0])])  # 1      1      1
def test_schedule_against_a_table_written_by_hand(four, two, one, prefixes):
    """How much of a ten-token solution rollouts 5 to 8 start from, given what came before."""
    (group,), _ = draw(map(int, four + two + one + "1"))
    assert [len(r.prefix) for r in group] == [0, 0, 0, 0, *prefixes]
    assert [r.micro_group for r in group] == [0, 0, 0, 0, 1, 1, 2, 3]
    assert "".join(f"{r.reward:.0f}" for r in group) == four + two + one + "1"

def test_a_micro_group_is_one_generate_call_over_all_problems():
    """Requests are prompt + prefix; prefix and completion together stay within the response limit.

    The first problem is solved at once, the second never: from call 2 on, only it is helped.
    """
    problems = [Problem([5], [SOLUTION], ""), Problem([6, 7], [SOLUTION], "")]
    outcomes = [1, 1, 1, 1, 0, 0, 0, 0,  1, 1, 0, 0,  1, 0,  1]
    groups, script = draw(outcomes, problems, max_response=30)
    hard = [6, 7]
    assert script.calls == [
        ([[5]] * 4 + [hard] * 4, [30] * 8),
        ([[5]] * 2 + [hard + SOLUTION[:2]] * 2, [30, 30, 28, 28]),
        ([[5], hard + SOLUTION[:5]], [30, 25]),
        ([[5]], [30])]  # the second problem's whole solution is not generated from
    found = [[(r.prompt, r.prefix, r.completion, r.sampler_logprobs, r.reward, r.micro_group)
              for r in group] for group in groups]
    assert found[0] == [([5], [], [1], [-n], 1, m) for n, m in zip(  # n: place in the script
        (1, 2, 3, 4, 9, 10, 13, 15), (0, 0, 0, 0, 1, 1, 2, 3))]
    assert found[1] == [*((hard, [], [0], [-n], 0, 0) for n in (5, 6, 7, 8)),
                        *((hard, SOLUTION[:2], [0], [-n], 0, 1) for n in (11, 12)),
                        (hard, SOLUTION[:5], [0], [-14], 0, 2),
                        (hard, SOLUTION, [], [], 1, 3)]  # rewarded all the same

def test_what_is_rewarded_is_prefix_and_completion_together():
    """The reward sees the whole response, and not the prompt."""
    seen = []
    sample_groups([Problem([5], [SOLUTION], "")], PAPER, Script([[0]] * 7),
                  lambda problem, response: seen.append(response) or 0.0, random.Random(0))
    assert seen == [[0]] * 4 + [SOLUTION[:2] + [0]] * 2 + [SOLUTION[:5] + [0]] + [SOLUTION]

@pytest.mark.parametrize("speculate", [False, True])
def test_no_help_without_a_solution_and_nothing_to_draw_after_a_whole_one(speculate):
    """8 free rollouts; and a solution of one token is whole at a ratio of 0.6 already."""
    (group,), script = draw([0] * 8, [Problem([5], [], "")], speculate=speculate)
    assert [r.prefix for r in group] == [[]] * 8
    assert [request for requests, _ in script.calls for request in requests] == [[5]] * 8
    schedule = [MicroGroup(1, 0.0, -1), MicroGroup(1, 0.6, ALWAYS)]
    (group,), script = draw([0], [Problem([5], [[9]], "")], schedule, speculate=speculate)
    assert [(r.prefix, r.completion) for r in group] == [([], [0]), ([9], [])]

def test_each_guided_micro_group_picks_one_of_several_solutions():
    """One and the same for its rollouts; another micro-group may pick another."""
    first, second = [20] * 10, [30] * 10
    picks = set()
    for seed in range(40):
        (group,) = sample_groups([Problem([5], [first, second], "")], PAPER, Script([[0]] * 7),
                                 reward, random.Random(seed))
        assert group[4].prefix == group[5].prefix
        picks.add((group[4].prefix[0], group[6].prefix[0], group[7].prefix[0]))
    assert picks == set(product((20, 30), repeat=3))

def law(speculate):
    """The exact distribution of a small schedule's group: {rollouts: probability}.

    Every request is right with a probability of its own (the more prefix, the likelier), and all
    2^8 patterns of outcomes are played. The sequential walk asks 5 of them and leaves 3 unseen.
    """
    schedule = [MicroGroup(2, 0.0, -1), MicroGroup(2, 0.3, 0.6), MicroGroup(1, 0.6, 0.8)]
    probabilities = defaultdict(Fraction)
    for pattern in product((WRONG, RIGHT), repeat=8):
        unseen, weights = list(pattern), []

        def generate(requests, limits):
            outcomes = [unseen.pop(0) for _ in requests]
            chances = [Fraction(len(request), 12) for request in requests]
            weights.extend(c if o == RIGHT else 1 - c for o, c in zip(outcomes, chances))
            return [([o], [float(len(request))]) for o, request in zip(outcomes, requests)]

        (group,) = sample_groups([Problem([5, 6], [SOLUTION], "")], schedule, generate, reward,
                                 random.Random(0), speculate=speculate)
        assert all(r.sampler_logprobs == [len(r.prompt + r.prefix)] for r in group)
        kept = tuple((len(r.prefix), r.completion[0], r.reward, r.micro_group) for r in group)
        probabilities[kept] += math.prod(weights) * Fraction(1, 2 ** len(unseen))
        assert len(unseen) == (0 if speculate else 3)
    return dict(probabilities)

def test_speculation_has_exactly_the_distribution_of_the_sequential_walk():
    """By enumeration, in fractions: not one group is a hair more or less likely."""
    assert sum(law(True).values()) == 1
    assert law(True) == law(False)

def test_speculation_asks_eleven_requests_a_prompt_in_one_call():
    """8 free ones, 2 + 1 guided ones; the whole solution needs none, free branches included."""
    problems = [Problem([5], [SOLUTION], ""), Problem([6], [SOLUTION], "")]
    groups, script = draw([0] * 22, problems, speculate=True, max_response=12)
    ((requests, limits),) = script.calls
    asked = Counter((*request, limit) for request, limit in zip(requests, limits))
    assert asked == {(p, *SOLUTION[:n], 12 - n): count
                     for p in (5, 6) for n, count in ((0, 8), (2, 2), (5, 1))}
    assert [[len(r.prefix) for r in group] for group in groups] == [GUIDED] * 2

@pytest.mark.parametrize("method, requests", [("grpo", 8), ("luffy", 7), ("sft", 0),
                                              ("fixed-prefix", 7)])
def test_speculation_draws_nothing_that_no_threshold_can_choose(method, requests):
    """A threshold of -1 or ALWAYS leaves one branch only (and sft generates nothing at all)."""
    _, script = draw([0] * 8, schedule=settings("--method", method).schedule, speculate=True)
    assert script.drawn == requests

def test_speculation_relies_on_rewards_from_0_to_1():
    """A reward of -1 decides on help that no reward in [0, 1] could: nothing was drawn for it."""
    schedule = [MicroGroup(1, 0.0, -1), MicroGroup(1, 0.5, 0.0)]
    for speculate in (False, True):
        generate = Script([[0]] * 2)

        def walk():
            return sample_groups([Problem([5], [SOLUTION], "")], schedule, generate,
                                 lambda *_: -1.0, random.Random(0), speculate=speculate)
        if speculate:
            with pytest.raises(ValueError, match=r"rewards in \[0, 1\]"):
                walk()
        else:
            assert [len(r.prefix) for r in walk()[0]] == [0, 5]

# ==== Part 3. Log-probs of response tokens

EOS = [1, 2]

def test_the_state_at_position_t_minus_1_predicts_token_t():
    """Of [5, 6, 7, 8] from start 2 on: positions 1 and 2 give log p(7 | 5 6), log p(8 | 5 6 7)."""
    policy = Table(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    (found,), _ = token_logprobs(policy, [[5, 6, 7, 8]], [2])
    table = policy.rows.log_softmax(-1)
    assert found.tolist() == [table[1, 7].item(), table[2, 8].item()]

def tiny_policy(vocabulary=24, tied=False, seed=0):
    """A Qwen2 in float64 whose generation_config would spoil the samples, were it heeded."""
    torch.manual_seed(seed)
    policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
        tie_word_embeddings=tied, pad_token_id=0)).double()
    policy.generation_config = transformers.GenerationConfig(
        eos_token_id=EOS, pad_token_id=0, do_sample=True, top_k=2, top_p=0.5, temperature=0.3,
        repetition_penalty=3.0)
    return policy

def distributions(policy, sequence, start, temperature=1.0):
    """[N, V] log-probs of the N tokens from `start` on: the naive way, a full forward pass."""
    logits = policy(torch.tensor([sequence])).logits[0, start - 1:-1]
    return (logits / temperature).log_softmax(-1)

def naive(policy, sequence, start, temperature=1.0):
    """[N] log-probs of the tokens themselves."""
    targets = torch.tensor(sequence[start:])
    return distributions(policy, sequence, start, temperature).gather(1, targets[:, None])[:, 0]

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_the_naive_log_softmax(monkeypatch, tied, temperature):
    """Values, entropies and every parameter's gradient, over chunk borders, to 1e-10."""
    monkeypatch.setattr(trapo, "HEAD_CHUNK", 3)
    policy = tiny_policy(tied=tied)
    sequences = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18], [19, 20, 21]]
    starts, weights = [2, 1, 5, 3], torch.linspace(-1, 1, 8, dtype=torch.float64)

    def gradients(rows):
        policy.zero_grad()
        sum((row * weights[:len(row)]).sum() for row in rows).backward()
        return [p.grad.clone() for p in policy.parameters()]

    logprobs, entropies = token_logprobs(policy, sequences, starts, temperature)
    expected = [naive(policy, s, start, temperature) for s, start in zip(sequences, starts)]
    assert [len(row) for row in logprobs] == [4, 1, 3, 0]  # no token from `start` on is no error
    torch.testing.assert_close(list(logprobs), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(logprobs), gradients(expected), rtol=0, atol=1e-10)
    for s, start, entropy in zip(sequences, starts, entropies):
        full = distributions(policy, s, start, temperature).detach()
        assert not entropy.requires_grad
        torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), rtol=0, atol=1e-10)

def test_the_head_sees_response_positions_only_and_a_chunk_at_a_time(monkeypatch):
    """So peak memory does not grow with batch x length x vocabulary."""
    monkeypatch.setattr(trapo, "HEAD_CHUNK", 3)
    policy, rows = tiny_policy(), []
    policy.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
    logprobs, _ = token_logprobs(policy, [[3] * 9, [4] * 6], [5, 1])
    assert sum(rows) == 4 + 5 and max(rows) <= 3
    sum(row.sum() for row in logprobs).backward()  # computes them again, chunk by chunk
    assert sum(rows) == 2 * (4 + 5) and max(rows) <= 3

# ==== Part 4. The update

# The prefix losses once more, written differently: trsft as in the authors' code, whose value is
# another but whose gradient is the same.
PREFIX_TERMS = {
    "trsft": lambda logp, a, alpha: -logp.exp() / logp.exp().detach().clamp(min=alpha),
    "sft": lambda logp, a, alpha: -logp,
    "luffy": lambda logp, a, alpha: -a * logp.exp() / (logp.exp() + 0.1),
    "none": lambda logp, a, alpha: 0 * logp}
BATCH = [Rollout([3, 4, 5], [], [6, 7, 8, 1], 1.0, 0, advantage=0.625),
         Rollout([3, 4, 5], [], [9, 10], 0.0, 0, advantage=-0.375),
         Rollout([11], [12, 13, 14], [15, 16, 17, 18, 19], 0.0, 1, advantage=-0.25),
         Rollout([11], [12, 13, 14, 15, 16, 17], [], 1.0, 3, advantage=0.75),
         Rollout([20, 21], [22, 23, 3, 4], [5, 6], 1.0, 2),  # inert without prefix loss
         Rollout([20, 21], [], [7, 8, 9], 1.0, 0),           # inert
         Rollout([12, 13, 14, 15, 16, 17, 18], [], [19], 0.0, 0, advantage=-0.5)]

def batch_gradient(policy, batch, args):
    """What accumulate_gradients adds, of every parameter."""
    policy.zero_grad()
    accumulate_gradients(policy, [replace(r) for r in batch], args)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]

def reference_gradient(policy, batch, args):
    """The loss as Part 4 writes it: one rollout at a time, nothing left out, nothing padded."""
    total = 0.0
    for r in batch:
        sequence, split = r.prompt + r.prefix + r.completion, len(r.prefix)
        logp = naive(policy, sequence, len(r.prompt), args.temperature)
        total += PREFIX_TERMS[args.prefix_loss](logp[:split], r.advantage, args.alpha).sum()
        total += (-r.advantage * logp[split:]).sum()
    policy.zero_grad()
    (total / (len(batch) * args.max_response)).backward()
    return [p.grad.clone() for p in policy.parameters()]

@pytest.mark.parametrize("method", ["trapo", "naive", "micro-luffy", "micro"])
@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_gradient_is_that_of_the_loss_however_it_is_computed(monkeypatch, method, temperature):
    """Whatever the micro-batch budget, the order, or what is left out as inert, to 1e-10."""
    policy = tiny_policy()
    args = settings("--method", method, "--temperature", temperature, "--max-response", "13")
    expected = reference_gradient(policy, BATCH, args)
    for budget, batch in ((1, BATCH), (12, BATCH), (30, BATCH[::-1]), (10_000, BATCH),
                          (20, random.Random(0).sample(BATCH, len(BATCH)))):
        args.micro_tokens = budget
        torch.testing.assert_close(batch_gradient(policy, batch, args), expected,
                                   rtol=0, atol=1e-10)
    monkeypatch.setattr(trapo, "is_inert", lambda *_: False)
    torch.testing.assert_close(batch_gradient(policy, BATCH, args), expected, rtol=0, atol=1e-10)

def token_weights(rollout, advantage):
    """The gradient on each token's log-prob, first to last, read off a Table; and the log-probs."""
    sequence = rollout.prompt + rollout.prefix + rollout.completion
    rows = torch.randn(len(sequence), 30, generator=torch.Generator().manual_seed(0)).double() * 2
    table, args = Table(rows), settings("--max-response", "10", "--alpha", "0.01")
    accumulate_gradients(table, [replace(rollout, advantage=advantage)], args)
    logp = table.rows.detach().log_softmax(-1)[:-1].gather(1, torch.tensor(sequence[1:])[:, None])
    assert table.rows.grad[-1].abs().max() == 0  # no token comes after the last
    pulls = table.rows.grad[:-1].gather(1, torch.tensor(sequence[1:])[:, None])
    return (pulls / (1 - logp.exp()))[:, 0] * 10, logp[:, 0]  # times the divisor 1 * max_response

def test_masks_prompt_prefix_and_completion_each_get_their_own_loss_only():
    """No gradient on prompt tokens, TrSFT without advantage on prefix, -A on completion tokens."""
    rollout = Rollout([3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15], 1.0, 1)
    for advantage in (0.75, -0.5, 0.0):
        weights, logp = token_weights(rollout, advantage)
        prompt, prefix, completion = weights.split([2, 6, 4])  # the first token has no context
        assert torch.equal(prompt, torch.zeros_like(prompt))
        damped = (logp[2:8].exp() / 0.01).clamp(max=1)
        assert 0 < (damped < 1).sum() < 6  # inside and outside the trust region
        torch.testing.assert_close(prefix, -damped)
        torch.testing.assert_close(completion, torch.full_like(completion, -advantage))

@pytest.mark.parametrize("name", PREFIX_LOSSES)
def test_rollouts_are_left_out_exactly_if_their_gradient_is_zero(name):
    """By autograd over every prefix loss, with and without prefix, completion and advantage."""
    for prefix, completion, advantage in product(([], [7, 8]), ([], [9]), (0.0, -0.25)):
        rollout = Rollout([5], prefix, completion, advantage=advantage)
        size = len(prefix)

        def loss(logp):
            return torch.cat([PREFIX_LOSSES[name](logp[:size], advantage, 0.1),
                              policy_gradient_loss(logp[size:], advantage)])
        found = gradient(loss, [-3.0] * size + [-2.0] * len(completion))
        assert is_inert(rollout, name) is not bool(found.any())

def test_a_prefix_loss_that_is_not_known_counts_as_one_that_trains():
    """So that adding one is a line in PREFIX_LOSSES; a batch of inert ones costs no pass."""
    guided, free = BATCH[4:6]
    assert not is_inert(guided, "my own") and is_inert(free, "my own")
    nothing = Table(torch.zeros(0, 30))  # would fail if it were asked anything
    assert accumulate_gradients(nothing, [free, guided], settings("--method", "micro")) == 0.0

# ==== Part 5. One step, and the loop

def write_rows(rows, path="rows.jsonl"):
    """A row a line; returns the path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def save_model(folder, layers=3):
    """The clock's model, untrained, as a folder to start short runs from."""
    model = clock.make_model(0)
    model.config.num_hidden_layers = layers
    del model.model.layers[layers:]
    for part in model, clock.make_tokenizer():
        part.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with 24 rows of one or two hours beside it, and measures of a run of a second."""
    folder, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    rows = [clock.make_row(rng, rng.randint(1, 2), "?") for _ in range(24)]
    write_rows(rows, folder / "rows.jsonl")
    (folder / "defaults.json").write_text(json.dumps({
        "dataset": "rows.jsonl", "max_prompt": 12, "max_response": 12, "prompts": 2, "steps": 2,
        "eval_size": 0, "device": "cpu"}))
    return save_model(folder / "model")

def test_updates_are_adamw_by_hand(base):
    """betas 0.9 and 0.95, no weight decay, the learning rate warmed up; the gradient clipped."""
    args = parse_args(["--model", base, "--method", "sft", "--lr", "0.01", "--warmup", "2",
                       "--max-grad-norm", "0.5"])
    policy, _, sampler, optimizer, task, _ = trapo.prepare(args)
    expected = [p.detach().double() for p in policy.parameters()]
    first = second = [torch.zeros_like(p) for p in expected]
    for t in (1, 2, 3):
        metrics, _ = train_step(policy, sampler, optimizer, task, args, t - 1)
        gradients = [p.grad.double() for p in policy.parameters()]
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        assert metrics["grad_norm"] > norm == pytest.approx(0.5, rel=1e-4)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients)]
        second = [0.95 * v + 0.05 * g * g for v, g in zip(second, gradients)]
        rate = 0.01 * min(1, t / 2)
        for p, m, v in zip(expected, first, second):
            p -= rate * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
    for p, found in zip(expected, policy.parameters()):
        torch.testing.assert_close(found.detach().double(), p, rtol=1e-4, atol=1e-6)

def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]

def test_trapo_teaches_a_base_that_blurts_to_work():
    """The whole loop in small, SFT and then TRAPO: held-out accuracy rises clearly.

    A clock is moved three times, by 1 or 2 hours. SFT makes the base: it works in the textbook
    (":") and blurts in the quiz ("?"), where TRAPO's expert works with asides.
    """
    rng = random.Random(0)

    def chain(mark, worked, filler=0.0):
        k = rng.randint(1, 3) if mark == ":" else 3
        return clock.make_row(rng, k, mark, worked, filler, largest=2)
    write_rows([chain(":", True) if rng.random() < 0.7 else chain("?", rng.random() < 0.1)
                for _ in range(2000)], "corpus.jsonl")
    write_rows([chain("?", True, 0.3) for _ in range(128)], "train.jsonl")
    write_rows([chain("?", True) for _ in range(128)], "test.jsonl")
    limits = ["--max-prompt", "32", "--max-response", "32", "--device", "cpu"]
    main(["--model", save_model("new", layers=2), "--dataset", "corpus.jsonl", "--method", "sft",
          "--steps", "200", "--lr", "1e-2", "--eval-size", "0", "--out", "base", *limits])
    main(["--model", "base", "--dataset", "train.jsonl", "--test", "test.jsonl", "--steps", "12",
          "--prompts", "16", "--lr", "3e-3", "--out", "trained", *limits])
    before, after = (metrics_of("trained")[i]["eval"] for i in (0, -1))
    assert before["held out"] < 0.25 and before["held out, greedy"] < 0.25
    assert after["held out"] > before["held out"] + 0.15
    assert after["held out, greedy"] > before["held out, greedy"] + 0.3

for fact in [value for name, value in globals().items() if name.startswith("test_")]:
    pytest.mark.tutorial(fact)  # leaves its mark on the function: this was the tutorial

