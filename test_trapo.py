"""The facts that trapo.py stands on. The first half is a tutorial in the order of its lecture:

    in the paper                                                held by the test
    Eq. 3: grad L = -1 / max(p, alpha) * grad p                 test_trsft_gradient_is_equation_3
    Prop. 1: TrSFT keeps the expert's main modes                test_proposition_1_...
    Section 2.3: A = reward - the group's mean                  test_advantage_is_the_reward_...
    the policy gradient -A grad log p, and PPO's                test_policy_gradient_is_ppos_...
    Algorithm 1: help if the mean return so far is below t_i    test_schedule_against_a_table_...
    - its first L_i of the expert's tokens                      test_expert_prefix_is_the_first_...
    - or all drawn at once, from the same distribution          test_speculation_has_exactly_...
    the loss of a batch: its sum, its masks, its divisor        test_gradient_is_that_of_the_...
    all of these on one group of eight, number by number        test_a_group_of_eight_by_hand
    Table 2: the methods compared                               test_methods_differ_in_what_...
    it learns                                                   test_trapo_teaches_a_base_...

The second half (`grep -n "# ===="`) tests what the lecture runs on. Nothing is downloaded: models
are tiny and made here. `pytest test_trapo.py` takes a minute or two on a CPU.
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
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface is imported: a test never asks the network

import datasets
import numpy
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import trapo
from trapo import (ALWAYS, METHODS, PREFIX_LOSSES, InputError, MicroGroup, Problem, Rollout,
                   Settings, Task, accumulate_gradients, checkpoints, clock_model, clock_task,
                   draw_tokens, expert_prefix, group_advantages, is_guided, is_inert, load_policy,
                   load_rows, luffy_loss, main, make_problems, math_task, micro_batches, parse_args,
                   policy_gradient_loss, sample, sample_groups, token_logprobs, train_step,
                   trsft_loss)

torch.set_num_threads(1)  # tiny matrices: more threads would only wait for each other
pytestmark = pytest.mark.filterwarnings("error")
HERE = Path(trapo.__file__).parent
INF = math.inf

@pytest.fixture(autouse=True)
def own_world(tmp_path_factory, monkeypatch):
    """Every test works in a folder of its own, gets its signals back, and warns of nothing."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
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
    return replace(parse_args(["--device", "cpu", *flags, "--out", "unused"]), **changes)

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
        (2, [A], [W], 0, -0.375),             # mean return 1/4 < 0.5: 0.2 of 4 tokens is 1
        (2, [A], [W], 0, -0.375),
        (3, [A, B], [C, R], 1, 0.625),        # mean return 1/6 < 0.7: half is 2 tokens
        (4, [A, B, C, R], [], 1, 0.625)]      # mean return 2/7 < 0.9: all; 3 right of 8 is 0.375

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
    """In terms of log p the expert's rare tokens are damped: weight min(p / alpha, 1)."""
    p = [1e-8, 0.02, 0.05, 0.2, 1.0]
    weights = -gradient(lambda logp: trsft_loss(logp, 0.1), [math.log(x) for x in p])
    torch.testing.assert_close(weights, torch.tensor([1e-7, 0.2, 0.5, 1, 1], dtype=torch.float64))

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

# ==== Part 2. Adaptive guidance

@pytest.mark.parametrize("returns, threshold, guided", [
    ([], -1, False), ([], 0.5, True), ([0, 0, 0, 0], -1, False), ([0, 0, 0, 0], 0.5, True),
    ([1, 0, 0, 0], 0.5, True), ([1, 1, 0, 0], 0.5, False), ([1, 1, 1, 0], 0.5, False),
    ([1, 1, 0, 0, 1, 1], 0.7, True), ([1, 1, 1, 0, 1, 1], 0.7, False),
    ([1, 1, 1, 1, 1, 1, 0], 0.9, True), ([1, 1, 1, 1, 1, 1, 1], 0.9, False),
    ([1, 1, 1, 1], ALWAYS, True)])
def test_help_comes_if_the_mean_return_so_far_is_below_the_threshold(returns, threshold, guided):
    """Strictly below: 2 right of 4 get no help at 0.5. -1 is never."""
    assert is_guided([float(r) for r in returns], MicroGroup(1, 0.5, threshold)) is guided

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
    marks = [[1, 2, 3, 4, 9, 10, 13, 15], [5, 6, 7, 8, 11, 12, 14]]  # places in the script
    easy = [Rollout([5], [], [1], 1.0, m) for m in (0, 0, 0, 0, 1, 1, 2, 3)]
    helped = [*[Rollout(hard, [], [0], 0.0, 0)] * 4,
              *[Rollout(hard, SOLUTION[:2], [0], 0.0, 1)] * 2,
              Rollout(hard, SOLUTION[:5], [0], 0.0, 2)]
    assert groups[0] == [replace(r, sampler_logprobs=[-n]) for r, n in zip(easy, marks[0])]
    assert groups[1][:7] == [replace(r, sampler_logprobs=[-n]) for r, n in zip(helped, marks[1])]
    assert groups[1][7:] == [Rollout(hard, SOLUTION, [], 1.0, 3)]  # rewarded all the same

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

# ==== Part 3. Log-probs of response tokens

EOS = [1, 2]

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

def save_clock_model(folder):
    """The embedded experiment's model, untrained, as a folder to start short runs from."""
    for part in clock_model(0):
        part.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_clock_model(tmp_path_factory.mktemp("base"))

def test_updates_are_adamw_by_hand(base):
    """betas 0.9 and 0.95, no weight decay, the learning rate warmed up; the gradient clipped."""
    args = settings("--model", base, "--dataset", "clock", "--method", "sft", "--prompts", "2",
                    "--lr", "0.01", "--warmup", "2", "--max-grad-norm", "0.5", "--eval-size", "0")
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

def little_world(tokenizer, args):
    """Clock chains in small: four steps of 1 or 2 hours, learnt in seconds.

    The base learns to work in the textbook (":") and to blurt in the quiz ("?"), as the real one.
    """
    def chain(k, mark, worked, filler=0.0):
        hour = rng.randrange(24)
        first, *letters = trapo.LETTERS[rng.randrange(16):][:k + 1]
        prompt, lines = [first, str(hour)], []
        for letter in letters:
            change = rng.choice(("-2", "-1", "+1", "+2"))
            prompt += [letter, change]
            hour = (hour + int(change)) % 24
            lines += [rng.choice(trapo.FILLERS)] if rng.random() < filler else []
            lines += [letter, change, str(hour)]
        ids = tokenizer.convert_tokens_to_ids
        solution = ids([*(lines if worked else []), "#", str(hour), "<eos>"])
        return Problem(ids([*prompt, mark]), [solution], str(hour))

    def reward(problem, response):
        return float(response[-3:] == problem.solutions[0][-3:] and response.count(4) == 1)

    rng = random.Random(f"{args.dataset} {args.seed}")
    if args.dataset == "clock-corpus":
        return Task([chain(rng.randint(1, 4), ":", True) if rng.random() < 0.7 else
                     chain(4, "?", rng.random() < 0.1) for _ in range(args.steps * args.prompts)],
                    {}, reward, in_order=True)
    return Task([chain(4, "?", True, 0.3) for _ in range(256)],
                {"quiz": [chain(4, "?", True) for _ in range(128)]}, reward)

def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

def test_trapo_teaches_a_base_that_blurts_to_work(monkeypatch):
    """The whole loop, pretraining and post-training, in small: held-out accuracy rises clearly."""
    monkeypatch.setattr(trapo, "clock_task", little_world)
    main("--dataset clock-corpus --steps 260 --lr 1e-2 --out base --device cpu".split())
    main("--model base --steps 18 --lr 2e-3 --max-response 36 --out trained --device cpu".split())
    before, after = (metrics_of("trained")[i]["eval"] for i in (0, -1))
    assert before["quiz"] < 0.25 and before["quiz, greedy"] < 0.25
    assert after["quiz"] > before["quiz"] + 0.15
    assert after["quiz, greedy"] > before["quiz, greedy"] + 0.3

# ==== The product: what the lecture runs on
# ==== Parts 4 and 5 again: the books of a step

def test_micro_batches_keep_within_the_budget_of_padded_tokens():
    """Every index once; a batch's longest times its size within the budget, or one sequence."""
    lengths = [5, 17, 3, 8, 8, 40, 1, 2]
    for budget in (1, 16, 24, 1000):
        batches = micro_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    assert len(micro_batches(lengths, 1000)) == 1 and len(micro_batches([4, 4, 4], 8)) == 2
    assert micro_batches([], 8) == []

def test_the_update_leaves_log_probs_and_entropies_on_what_it_trained():
    """Of prefix and completion, at the policy before the update; nothing on what it left out."""
    policy, rollouts = tiny_policy(), [replace(r) for r in BATCH]
    accumulate_gradients(policy, rollouts, settings("--method", "micro"))
    for r in rollouts[:3]:
        sequence, start = r.prompt + r.prefix + r.completion, len(r.prompt)
        full = distributions(policy, sequence, start)
        entropies = -(full.exp() * full).sum(-1)
        assert r.logprobs == pytest.approx(naive(policy, sequence, start).tolist(), abs=1e-12)
        assert r.entropies == pytest.approx(entropies.tolist(), abs=1e-12)
    assert [bool(r.logprobs) for r in rollouts] == [True, True, True, False, False, False, True]

def test_every_problem_comes_once_an_epoch_and_every_epoch_in_another_order():
    """Steps may straddle epochs; the order is the seed's; a curriculum keeps its own."""
    task = Task([Problem([i], [], "") for i in range(10)], {}, None)

    def epochs(seed, task=task):
        args = settings("--prompts", "4", "--seed", seed)
        drawn = [p.prompt_ids[0] for step in range(5) for p in trapo.batch_at(step, task, args)]
        return drawn[:10], drawn[10:]
    first, second = epochs("0")
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and epochs("0") == (first, second) != epochs("1")
    assert epochs("0", replace(task, in_order=True)) == (list(range(10)), list(range(10)))

def test_the_learning_rate_warms_up_and_then_stays():
    """Linearly over --warmup steps; in the base's pretraining it falls to 0 in the second half."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def rate(step, **changes):
        args = settings("--lr", "0.1", "--warmup", "4", "--steps", "10", **changes)
        trapo.set_learning_rate(optimizer, step, args)
        return optimizer.param_groups[0]["lr"]
    assert [rate(step) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])
    assert [rate(step, decay=True) for step in (4, 6, 9)] == pytest.approx([0.1, 0.08, 0.02])
    assert settings("--dataset", "clock-corpus").decay and not settings().decay

def step_of(policy, task, *flags, step=0):
    """One train_step of plain SGD: (metrics, groups)."""
    args = settings("--prompts", "4", "--max-response", "24", *flags)
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.lr)
    return train_step(policy, policy, optimizer, task, args, step)

def test_rollouts_are_those_of_the_seed_and_the_step(clock):
    """The same again if both are the same, whatever was drawn before; else others."""
    task = replace(clock[1], train=clock[1].train[:1])

    def drawn(step, seed):
        _, groups = step_of(clock_model(1)[0], task, "--prompts", "1", "--seed", seed, step=step)
        return [r.completion for r in groups[0]]
    first = drawn(0, "0")
    assert drawn(0, "0") == first
    assert drawn(1, "0") != first != drawn(0, "1")

@pytest.mark.parametrize("temperature", ["1.0", "0.01"])
def test_metrics_count_what_happened(clock, temperature):
    """Recounted from the rollouts. At a low temperature many are equal, and all count."""
    def mean(values):
        return pytest.approx(statistics.fmean(values))

    policy, _ = clock_model(1)
    task = Task(clock[1].train, {}, lambda _, response: len(response) % 2)
    metrics, groups = step_of(policy, task, "--temperature", temperature)
    rollouts = [r for group in groups for r in group]
    own = [r for r in rollouts if r.completion]
    assert len(groups) == 4 and len(rollouts) == 32
    assert metrics["guided"] == mean(bool(r.prefix) for r in rollouts)
    assert metrics["reward_guided"] == mean(r.reward for r in rollouts if r.prefix)
    assert metrics["tokens_generated"] == sum(len(r.completion) for r in rollouts)
    assert metrics["truncated"] == mean(r.completion[-1] != 1 for r in own)
    assert metrics["logprob_gap"] < 1e-5 and 0 < metrics["entropy"] < math.log(90)
    lengths = [len(r.prefix + r.completion) for r in rollouts]
    assert metrics["response_length"] == mean(lengths)
    for group in groups:
        baseline = statistics.fmean(r.reward for r in group)
        assert all(r.advantage == pytest.approx(r.reward - baseline) for r in group)
    kept = [not is_inert(r, "trsft") for r in rollouts]
    assert metrics["rollouts_skipped"] == 32 - sum(kept)
    assert metrics["tokens_trained"] == sum(n for n, keep in zip(lengths, kept) if keep)

def test_the_unguided_reward_is_that_of_the_first_micro_group_alone():
    """Later rollouts are unguided only where the first ones went well: they would flatter."""
    well = [Rollout([3], [], [4], 1.0, m) for m in (0, 0, 0, 0, 1, 1, 2, 3)]
    badly = [*[Rollout([3], [], [4], 0.0, 0)] * 4,
             *[Rollout([3], [5], [4], 0.5, m) for m in (1, 2)]]
    policy, spent = tiny_policy(), Counter(tokens_generated=0)

    def found(rollouts):
        return trapo.step_metrics(policy, rollouts, 0.0, 1.0, spent, settings())
    metrics = found(well + badly)
    assert metrics["reward_unguided"] == 4 / 8 and metrics["reward_guided"] == 0.5
    assert [metrics[f"guided_{m + 1}"] for m in range(4)] == [0, 1 / 3, 1 / 2, 0]
    assert found(badly[4:])["reward_unguided"] is None

def test_metrics_on_prefix_tokens_are_those_of_the_trust_region(clock):
    """Mean p, share outside (p < alpha), mean weight 1 / max(p, alpha), mean 1 / p, by hand."""
    policy, _ = clock_model(1)
    before, _ = clock_model(1)
    metrics, groups = step_of(policy, clock[1], "--alpha", "0.02")
    p = torch.cat([naive(before, r.prompt + r.prefix, len(r.prompt)).exp().double()
                   for group in groups for r in group if r.prefix])
    assert 0 < metrics["prefix_outside_share"] < 1
    for name, values in (("p", p), ("outside_share", (p < 0.02).double()), ("inverse_p", 1 / p),
                         ("weight", 1 / p.clamp(min=0.02))):
        assert metrics[f"prefix_{name}"] == pytest.approx(values.mean().item(), rel=1e-4)

def tiny_run(base, out, *flags):
    """The command line of a run of about a second."""
    return ["--model", base, "--dataset", "clock", "--prompts", "2", "--max-response", "12",
            "--eval-size", "0", "--device", "cpu", "--out", str(out), *flags]

def repeatable(folder):
    """A run's metrics without what a clock or a memory gauge said."""
    return [{k: v for k, v in line.items() if not re.match("seconds|peak", k)}
            for line in metrics_of(folder)]

def assert_alike(a, b):
    """Two runs logged the same numbers and ended in the same weights, to 1e-5."""
    for x, y in zip(repeatable(a), repeatable(b), strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            close = isinstance(value, float)
            assert y[name] == (pytest.approx(value, rel=1e-5, abs=1e-7) if close else value), name
    x, y = (safetensors.torch.load_file(f"{run}/model.safetensors") for run in (a, b))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)

def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()

@pytest.mark.parametrize("method, guided", [
    ("trapo", [0, 1, 1, 1]), ("micro", [0, 1, 1, 1]), ("naive", [0, 1, 1, 1]),
    ("micro-luffy", [0, 1, 1, 1]), ("fixed-prefix", [0, 1, 1, 1]), ("grpo", [0]), ("luffy", [0, 1]),
    ("sft", [1])])
def test_each_preset_runs(base, method, guided):
    """Two steps of each; a base that never succeeds gets all the help that its method knows."""
    main(tiny_run(base, "run", "--method", method, "--steps", "2"))
    steps = metrics_of("run")[-2:]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert [line[f"guided_{m + 1}"] for m in range(len(guided))] == guided
        assert line["reward_unguided"] in (0, None) and math.isfinite(line["grad_norm"])
        assert (line["prefix_p"] is None) == (method == "grpo")
        assert (line["tokens_generated"] == 0) == (method == "sft")
    assert (weights("run") == weights(base)) == (method == "grpo")  # no reward, no gradient

def test_speed_flags_change_no_result(base):
    """Speculation draws other rollouts; recomputation and the cache's size change nothing."""
    main(tiny_run(base, "plain", "--steps", "2"))
    main(tiny_run(base, "slim", "--steps", "2", "--recompute", "--kv-tokens", "60"))
    args = parse_args(tiny_run(base, "other", "--recompute"))
    assert trapo.prepare(args)[0].is_activation_checkpointing
    assert_alike("plain", "slim")
    main(tiny_run(base, "ahead", "--steps", "1", "--speculate"))
    plain, ahead = (metrics_of(run)[0]["tokens_generated"] for run in ("plain", "ahead"))
    assert ahead > plain

def not_finite_at(*steps):
    """group_advantages that turns to NaN in the given train steps, counted from 1."""
    calls = iter(range(1, 1000))

    def advantages(rewards):
        return group_advantages(rewards) * (math.nan if next(calls) in steps else 1)
    return advantages

def test_a_step_whose_gradient_is_not_finite_is_skipped_and_reported(base, monkeypatch, capsys):
    """The weights stay as they were, the run goes on, the metrics say so."""
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2))
    main(tiny_run(base, "run", "--steps", "3", "--save-every", "1", "--prompts", "1"))
    assert [line["grad_norm"] is None for line in metrics_of("run")[-3:]] == [False, True, False]
    assert weights("run/checkpoint-2") != weights("run/checkpoint-3")
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2))
    main(tiny_run(base, "other", "--steps", "2", "--save-every", "1", "--prompts", "1"))
    assert weights("other/checkpoint-1") == weights("other/checkpoint-2")

def test_three_steps_not_finite_in_a_row_stop_the_run(base, monkeypatch, capsys):
    """With exit code 1 and the good weights saved; the advice, a lower --lr, can be followed."""
    flags = ("--prompts", "1", "--save-every", "1")
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2, 3, 4))
    with pytest.raises(SystemExit) as stop:
        main(tiny_run(base, "run", "--steps", "9", *flags))
    (advice,) = re.findall("python trapo.py (--resume.*) <lower>", capsys.readouterr().out)
    assert stop.value.code == 1 and metrics_of("run")[-1]["step"] == 4
    policy, _ = load_policy(str(checkpoints(Path("run"))[-1]))
    assert all(p.isfinite().all() for p in policy.parameters())
    main([*advice.split(), "1e-5", "--steps", "5"])
    assert metrics_of("run")[-1]["step"] == 5

def test_adam_starts_late_in_a_resumed_run_as_well(base, monkeypatch):
    """If no update was made before the resume, the first one is Adam's first: bit for bit."""
    flags = ("--prompts", "1", "--warmup", "0", "--method", "fixed-prefix")
    for name, steps in (("run", "1"), ("whole", "2")):
        monkeypatch.setattr(trapo, "group_advantages", not_finite_at(1))
        main(tiny_run(base, name, "--steps", steps, *flags))
    main("--resume --out run --steps 2".split())
    assert [line["grad_norm"] is None for line in metrics_of("whole")] == [True, False]
    assert repeatable("run") == repeatable("whole") and weights("run") == weights("whole")

# ==== Part 6. The sampler

RAGGED = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [3, 4, 5], [14, 15], [16, 17, 18]] * 3
LIMITS = [9, 12, 5, 1, 0, 12] * 3

@pytest.fixture(scope="module")
def policy():
    return tiny_policy()

@pytest.mark.parametrize("room", [128, 2])
def test_greedy_sampling_equals_generate(policy, room, monkeypatch):
    """Temperature 0: the tokens of model.generate, request by request, whatever the padding.

    Rows finish at different times, and with room for 2 tokens the buffers are outgrown often.
    """
    monkeypatch.setattr(trapo, "ROOM", room)
    clean = copy.deepcopy(policy)
    clean.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    expected = [clean.generate(torch.tensor([r]), attention_mask=torch.ones(1, len(r)),
                               do_sample=False, max_new_tokens=n)[0, len(r):].tolist() if n else []
                for r, n in zip(RAGGED, LIMITS)]
    assert sample(policy, RAGGED, LIMITS, 0.0)[0] == expected
    assert any(c[-1:] in ([1], [2]) for c in expected) and any(len(c) == 12 for c in expected)

@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_the_samplers_log_probs_are_those_of_full_forwards(policy, temperature, monkeypatch):
    """Of what was drawn, under softmax(logits / temperature); greedy reports softmax(logits)."""
    monkeypatch.setattr(trapo, "ROOM", 3)
    torch.manual_seed(1)
    completions, logprobs = sample(policy, RAGGED, LIMITS, temperature)
    for request, completion, found in zip(RAGGED, completions, logprobs):
        expected = naive(policy, request + completion, len(request), temperature or 1.0)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(),
                                   rtol=0, atol=1e-9)

def test_samples_come_from_the_exact_policy():
    """Frequencies of all completions against their probabilities: no top-k, top-p, or penalty.

    Two prompts of different length, up to 2 tokens of a vocabulary of 6, temperature 0.8:
    Pearson's chi-square, 25 degrees of freedom each, stays below 25 + 5 sqrt(2 * 25).
    """
    policy, n = tiny_policy(vocabulary=6, seed=3), 4000
    torch.manual_seed(0)
    completions, _ = sample(policy, [[3]] * n + [[4, 5, 3]] * n, [2] * (2 * n), 0.8)
    for request, drawn in (([3], completions[:n]), ([4, 5, 3], completions[n:])):
        counts, chi_square = Counter(map(tuple, drawn)), 0.0
        possible = [(a,) for a in EOS] + [(a, b) for a in (0, 3, 4, 5) for b in range(6)]
        assert set(counts) <= set(possible)
        for completion in possible:
            logp = naive(policy, request + list(completion), len(request), 0.8).sum()
            expected = n * logp.exp().item()
            chi_square += (counts[completion] - expected) ** 2 / expected
        assert chi_square < 25 + 5 * math.sqrt(50)

def test_any_eos_id_ends_a_row_and_limits_hold(policy):
    """The EOS is part of the completion, and its last token; else the limit is reached exactly."""
    torch.manual_seed(0)
    completions, logprobs = sample(policy, RAGGED * 8, LIMITS * 8)
    endings = Counter()
    for completion, values, limit in zip(completions, logprobs, LIMITS * 8):
        assert len(values) == len(completion) <= limit
        assert not set(completion[:-1]) & set(EOS)
        assert len(completion) == limit or completion[-1] in EOS
        endings[completion[-1] if completion and completion[-1] in EOS else "limit"] += 1
    assert len(endings) == 3 and min(endings.values()) > 2  # both EOS ids and the limit occur

def test_what_a_request_draws_depends_on_neither_batch_nor_cache(policy, monkeypatch):
    """Equal tokens and log-probs whatever --kv-tokens splits, and however often buffers move."""
    results = []
    for room, options in ((128, {}), (128, {"kv_tokens": 1}), (128, {"kv_tokens": 40}), (1, {}),
                          (2, {"kv_tokens": 40})):
        monkeypatch.setattr(trapo, "ROOM", room)
        torch.manual_seed(7)
        results.append(sample(policy, RAGGED, LIMITS, 1.0, **options))
    completions, logprobs = results[0]
    for others, values in results[1:]:
        assert others == completions
        for a, b in zip(logprobs, values):
            assert a == pytest.approx(b, abs=1e-9)

@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_a_batchs_cache_keeps_within_kv_tokens(policy, budget, monkeypatch):
    """Its rows times the longest request with its limit; or it is a single request."""
    decode, sizes = trapo.decode, []

    def measured(policy, requests, limits, *rest):
        longest = max(len(request) + limit for request, limit in zip(requests, limits))
        sizes.append((len(requests), len(requests) * longest))
        return decode(policy, requests, limits, *rest)
    monkeypatch.setattr(trapo, "decode", measured)
    sample(policy, RAGGED, LIMITS, kv_tokens=budget)
    assert sum(rows for rows, _ in sizes) == len(RAGGED)
    assert all(rows == 1 or tokens <= budget for rows, tokens in sizes)
    assert len(sizes) == (1 if budget == 1000 else len(RAGGED) if budget == 1 else len(sizes))

def test_a_noise_of_ones_own_decides_what_is_drawn(policy):
    """Row by row: the same numbers give the same completion wherever the request stands."""
    noise = torch.rand(len(RAGGED), max(LIMITS), dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))
    completions, _ = sample(policy, RAGGED, LIMITS, 1.0, noise=noise)
    again, _ = sample(policy, RAGGED[::-1], LIMITS[::-1], 1.0, noise=noise.flip(0))
    assert again == completions[::-1]

@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_graph_draws_what_the_cpu_draws(monkeypatch):
    """The same completions from the same numbers, however often the graph is captured anew."""
    monkeypatch.setattr(trapo, "ROOM", 2)
    noise = torch.rand(len(RAGGED), max(LIMITS), dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))
    (here, expected), (there, found) = (
        sample(tiny_policy().to(device), RAGGED, LIMITS, 1.0, noise=noise)
        for device in ("cpu", "cuda"))
    assert there == here
    for a, b in zip(found, expected):
        assert a == pytest.approx(b, abs=1e-6)

def test_sampling_leaves_the_policy_as_it_was(policy):
    """Train or eval mode, no gradients; and nothing to draw is no error."""
    for mode in (True, False):
        policy.train(mode)
        assert sample(policy, [[3, 4]], [0]) == ([[]], [[]])
        sample(policy, [[3, 4]], [3])
        assert policy.training is mode
    assert sample(policy, [], []) == ([], [])
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())

def test_tokens_drawn_by_hand():
    """Probabilities 1/2, 0, 1/4, 1/4 cut the numbers in [0, 1) at 0.5 and 0.75."""
    noise = torch.tensor([0, 0.25, 0.5 - 2 ** -53, 0.5, 0.75 - 2 ** -53, 0.75, 1 - 2 ** -53],
                         dtype=torch.float64)
    logits = torch.tensor([math.log(2), -INF, 0, 0]).repeat(len(noise), 1)
    tokens, logprobs = draw_tokens(logits, noise, 1.0)
    assert tokens.tolist() == [0, 0, 0, 2, 2, 3, 3]
    expected = [math.log(x) for x in (0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25)]
    assert logprobs.tolist() == pytest.approx(expected)
    assert draw_tokens(logits, noise, 0.0)[0].tolist() == [0] * 7

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_long_tail_is_drawn_exactly(temperature):
    """Against numpy's inverse CDF in float64: 151 936 tokens, half the mass in tiny ones.

    Tokens of weight zero, at both ends, here and there, and whole stretches, are never drawn.
    """
    size, random_numbers = 151_936, torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=random_numbers) * temperature
    logits[77_777] = temperature * math.log(2.5e5)  # about half; the others some 1e-6 each
    gone = torch.rand(size, generator=random_numbers) < 0.1
    gone[:300] = gone[-700:] = gone[50_000:52_000] = True
    logits[gone] = -INF
    weights = ((logits / temperature) - (logits / temperature).max()).exp().double().numpy()
    edges = weights.cumsum()
    noise = numpy.concatenate([
        [0, 1 - 2 ** -53], numpy.random.default_rng(0).random(40),
        numpy.nextafter(edges[[400, 60_000, 77_776, 77_777]] / edges[-1], 1) + 1e-13])
    expected = numpy.searchsorted(edges, noise * edges[-1], side="right")
    expected[1] = numpy.flatnonzero(weights)[-1]
    found, logprobs = draw_tokens(logits.expand(len(noise), -1), torch.from_numpy(noise),
                                  temperature)
    assert found.tolist() == expected.tolist()
    assert not gone[found].any() and 10 < (found != 77_777).sum() < 45
    assert logprobs.numpy() == pytest.approx(numpy.log(weights[expected] / edges[-1]), abs=1e-5)

# ==== Part 7. Models

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN_ROWS = [{"problem": f"What is {n} and {n}?",
               "solution": f"It is {n} + {n}.\n\nThat is \\boxed{{{2 * n}}}.",
               "answer": str(2 * n)} for n in range(2, 26)]

@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE like Qwen's, with its special tokens and a ChatML template."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    qwen = transformers.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(bpe, part, getattr(qwen, part))
    bpe.train_from_iterator(
        [f"{trapo.INSTRUCTION} user assistant"] * 20 + [" ".join(r.values()) for r in PLAIN_ROWS],
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast

@pytest.fixture(scope="module")
def stand_in(tokenizer, tmp_path_factory):
    """A folder like Qwen2.5-Instruct's: tied embeddings, 7 query heads to a key head, random."""
    folder = tmp_path_factory.mktemp("stand-in")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=512, hidden_size=56, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.1, max_position_embeddings=1024))
    im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.1,
        eos_token_id=[im_end, end_of_text], pad_token_id=end_of_text)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

def like(folder, copied="copied", **files):
    """A copy of a model's folder; each of its files may be changed: a dictionary is merged in."""
    Path(copied).mkdir()
    for path in Path(folder).iterdir():
        (Path(copied) / path.name).write_bytes(path.read_bytes())
    for name, changes in files.items():
        path = Path(copied) / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copied

def with_tokenizer(folder, tokenizer, **changes):
    """A copy of a model's folder with another tokenizer."""
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(like(folder))
    return "copied"

SMALL = dict(vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
             pad_token_id=0, eos_token_id=2, bos_token_id=None)
SCALED = [transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0),
          transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
          transformers.CohereConfig(**SMALL, logit_scale=0.25),
          transformers.MistralConfig(**SMALL, sliding_window=4096)]

@pytest.mark.parametrize("config", SCALED, ids=lambda config: config.model_type)
def test_a_model_that_token_logprobs_or_sample_would_get_wrong_is_refused(config, tokenizer):
    """Logits capped or scaled, attention that slides: load_policy compares, and says so."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("scaled")
    tokenizer.save_pretrained("scaled")
    with pytest.raises(InputError, match="attention slides|capped, scaled"):
        load_policy("scaled")

def test_loaded_policies_have_fp32_master_weights(stand_in):
    """At a learning rate of 5e-6, updates of bf16 weights would round to nothing."""
    half = transformers.AutoModelForCausalLM.from_pretrained(stand_in, dtype=torch.bfloat16)
    half.save_pretrained("half")
    transformers.AutoTokenizer.from_pretrained(stand_in).save_pretrained("half")
    policy, _ = load_policy("half")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}

def test_what_the_chat_template_prints_after_an_answer_ends_a_response_too(stand_in, tokenizer):
    """Qwen's base models stop at <|im_end|>, though their config names <|endoftext|> alone."""
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(load_policy(stand_in)[0].generation_config.eos_token_id) == set(ends)
    other = copy.deepcopy(tokenizer)
    base = with_tokenizer(stand_in, other, eos_token="<|endoftext|>")
    Path(base, "generation_config.json").write_text(json.dumps({"eos_token_id": ends[1]}))
    assert set(load_policy(base)[0].generation_config.eos_token_id) == set(ends)

def test_dropout_is_set_to_zero(stand_in):
    """Or log-probs would differ between two passes in train mode."""
    policy, _ = load_policy(like(stand_in, config={"attention_dropout": 0.5}))
    policy.train()
    (first,), _ = token_logprobs(policy, [[3, 4, 5, 6]], [1])
    (second,), _ = token_logprobs(policy, [[3, 4, 5, 6]], [1])
    assert torch.equal(first, second)

def test_a_contradictory_generation_config_does_not_stop_the_first_checkpoint(stand_in, own_world):
    """Sampling defaults without do_sample are tolerated at load, but refused when saved."""
    folder = like(stand_in)
    Path(folder, "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    policy, _ = load_policy(folder)
    own_world.clear()  # transformers says what is wrong with the file
    policy.save_pretrained("saved")
    saved = json.loads(Path("saved/generation_config.json").read_text())
    assert saved.keys() >= {"eos_token_id"} and not saved.keys() & {"temperature", "top_p"}

def test_a_plain_prompt_begins_with_the_bos_that_the_tokenizer_adds(tokenizer):
    """As Llama's do; an EOS behind it, which some tokenizers add, is taken off."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token))
            for token in ("<|im_start|>", "<|im_end|>")])
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")
    ((prompt, (solution,), _),) = read(bare, PLAIN_ROWS[0])
    assert prompt == f"<|im_start|>{PLAIN_ROWS[0]['problem']}\n{trapo.INSTRUCTION}\n\n"
    assert solution == PLAIN_ROWS[0]["solution"] + "<|im_end|>"

def without_eos(*_):  # not with a config of Qwen2, for which transformers would supply an EOS
    _, words = clock_model(0)
    return with_tokenizer(save_clock_model("clock"), words, eos_token=None)

def without_a_layer(folder, _):
    state = safetensors.torch.load_file(Path(like(folder)) / "model.safetensors")
    kept = {name: x.clone() for name, x in state.items() if "layers.1.mlp.up" not in name}
    safetensors.torch.save_file(kept, "copied/model.safetensors", {"format": "pt"})
    return "copied"

def with_nan(folder, _):
    state = safetensors.torch.load_file(Path(like(folder)) / "model.safetensors")
    next(iter(state.values())).view(-1)[3] = math.nan
    safetensors.torch.save_file(state, "copied/model.safetensors", {"format": "pt"})
    return "copied"

def with_a_broken_template(folder, tokenizer):
    return with_tokenizer(folder, copy.deepcopy(tokenizer), chat_template="{% for m in %}")

def cut_off(folder, _):
    Path(like(folder), "model.safetensors").write_bytes(weights(folder)[:1000])
    return "copied"

def torn_config(folder, _):
    Path(like(folder), "config.json").write_text('{"model_type": ')
    return "copied"

def empty(folder, _):
    Path("empty").mkdir()
    return "empty"

@pytest.mark.parametrize("spoil, words", [
    (without_eos, ["EOS"]), (without_a_layer, ["lacks", "layers.1.mlp.up"]),
    (with_nan, ["not finite"]), (with_a_broken_template, ["copied"]), (cut_off, ["copied"]),
    (torn_config, ["copied"]), (empty, ["empty"])])
def test_a_model_that_is_not_whole_is_refused_in_one_line(
        spoil, words, stand_in, tokenizer, capsys, own_world):
    """Before it is trained on what is missing; by a line that says what is wrong."""
    Path("rows.jsonl").write_text(json.dumps(PLAIN_ROWS[0]))
    argv = ["--dataset", "rows.jsonl", "--model", spoil(stand_in, tokenizer), "--device", "cpu"]
    line = refusal(argv, capsys)
    assert all(word in line for word in words), line
    own_world.clear()  # transformers reports a missing layer, too

def test_a_model_that_cannot_be_had_is_refused_in_one_line(stand_in, capsys):
    """It says what was tried and how to give a folder; a bare name is one of Qwen's."""
    Path("rows.jsonl").write_text(json.dumps(PLAIN_ROWS[0]))
    flags = ["--dataset", "rows.jsonl", "--model"]
    line = refusal([*flags, "No-Such-Model"], capsys)
    assert "Qwen/No-Such-Model" in line and "folder" in line
    assert "someone/no-such-model" in refusal([*flags, "someone/no-such-model"], capsys)

def test_prompt_and_response_must_fit_into_the_models_context(stand_in, capsys):
    """1024 tokens here; with one more, a line says so."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN_ROWS))
    flags = ["--model", stand_in, "--dataset", "rows.jsonl", "--steps", "1", "--prompts", "1",
             "--eval-size", "0", "--device", "cpu", "--method", "sft", "--max-response", "224"]
    line = refusal([*flags, "--max-prompt", "801"], capsys)
    assert all(word in line for word in ("1024", "1025", "running.md")), line
    main([*flags, "--max-prompt", "800"])

# ==== Part 7. Data and reward

def read(tokenizer, *rows, **limits):
    """make_problems on rows: a list of (prompt, solutions, answer) as text."""
    args = Namespace(dataset="rows", **{"max_prompt": 500, "max_response": 500, **limits})
    return [(tokenizer.decode(p.prompt_ids), [tokenizer.decode(s) for s in p.solutions], p.answer)
            for p in make_problems(rows, tokenizer, args)]

def math_reward(response, answer):
    """1.0 or 0.0: grade's verdict without its note."""
    return trapo.grade(response, answer)[0]

@pytest.mark.parametrize("response, answer, reward", [
    ("So \\boxed{72}", "72", 1.0), ("So \\boxed{71}", "72", 0.0), ("The answer is 72.", "72", 1.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0), ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
    ("\\boxed{(1, 2)}", "(1,2)", 1.0), ("\\boxed{x^2+1}", "1+x^2", 1.0), ("colourless", "72", 0.0),
    ("", "72", 0.0), ("\\boxed{72}", "", 0.0), ("\\boxed{{{72", "72", 0.0),
    ("}}}\\frac{\\sqrt", "72", 0.0), ("\\boxed{\\frac{1}{0}}", "72", 0.0),
    ("\x00\ud83d", "7", 0.0)])
def test_math_reward_is_one_for_an_equal_answer_and_never_raises(response, answer, reward):
    """Math-Verify's verdict on fractions, tuples, nonsense and broken LaTeX."""
    assert math_reward(response, answer) == reward

GSM8K_ROWS = [{"question": f"Ann has {n} times 536 pens. How many?", "answer":
               f"She has {n}*536 = <<{n}*536={n * 536}>>{n * 536}.\n#### {n * 536:,}"}
              for n in range(2, 14)]

def openr1(problem, text, answer):
    """A row as in OpenR1-Math-46k-8192."""
    return {"prompt": [{"role": "system", "content": "Your task is to think."},
                       {"role": "user", "content": problem}],
            "target": [{"role": "assistant", "content": text}],
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "data_source": "openr1", "ability": "math", "extra_info": {"index": 1}}

def test_gsm8k_solutions_are_cleaned_and_end_in_a_box(tokenizer):
    """Calculator marks go, "#### 1,072" becomes \\boxed{1072}, and EOS ends the solution."""
    ((prompt, solutions, answer),) = read(tokenizer, GSM8K_ROWS[0])
    assert "How many?" in prompt
    assert solutions == ["She has 2*536 = 1072.\n\\boxed{1072}<|im_end|>"] and answer == "1072"

def test_openr1_rows_lose_their_think_tags_and_keep_the_thoughts(tokenizer):
    """The problem is the user's message; thoughts and answer stay one text."""
    row = openr1("How many?", "<think>\nHm, 7? Yes.\n</think>\nSo \\boxed{7}.", "7")
    ((prompt, solutions, answer),) = read(tokenizer, row)
    assert "How many?" in prompt and "Your task" not in prompt
    assert solutions == ["Hm, 7? Yes.\nSo \\boxed{7}.<|im_end|>"] and answer == "7"

def test_plain_rows_may_have_one_solution_several_or_none(tokenizer):
    """A string, a list, or nothing: a row without a solution is kept, and never guided."""
    rows = [{"problem": "P", "answer": 4}, {"problem": "P", "answer": "4", "solution": None},
            {"problem": "P", "answer": "4", "solution": "S"},
            {"problem": "P", "answer": "4", "solution": ["S", "", "T"]},
            {"question": "P", "answer": "4", "solution": []},
            {"problem": "P", "answer": "4", "solution": ""}]
    found = read(tokenizer, *rows)
    assert [solutions for _, solutions, _ in found] == [
        [], [], ["S<|im_end|>"], ["S<|im_end|>", "T<|im_end|>"], [], []]
    assert {answer for _, _, answer in found} == {"4"}

def test_the_prompt_is_the_chat_template_or_a_plain_one(tokenizer):
    """With the usual instruction, and the assistant's turn opened."""
    ((chat, _, _),) = read(tokenizer, PLAIN_ROWS[0])
    asked = PLAIN_ROWS[0]["problem"] + "\n" + trapo.INSTRUCTION
    assert chat == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert "reason step by step" in asked and "\\boxed{}" in asked
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    ((plain, solutions, _),) = read(bare, PLAIN_ROWS[0])
    assert plain.strip() == asked and solutions[0].endswith("<|endoftext|>")

@pytest.mark.parametrize("changes", [
    {"answer": ""}, {"answer": None}, {"problem": ""}, {"problem": None},
    {"problem": "long " * 300}, {"solution": "long " * 300}])
def test_rows_that_cannot_be_used_are_dropped_and_counted_in_one_line(changes, tokenizer, capsys):
    """Nothing there, or too long: the other rows are kept."""
    row = PLAIN_ROWS[0]
    assert len(read(tokenizer, row, row | changes, {"problem": "P", "answer": 4.5},
                    row | {"solution": ["long " * 300, "S"]}, max_response=200)) == 3
    (line,) = capsys.readouterr().out.splitlines()
    kept, dropped = line.split("dropped")
    assert "3 problems" in kept and sum(map(int, re.findall(r"\d+", dropped))) == 1

def test_lengths_of_exactly_the_limit_are_kept(tokenizer):
    """A prompt of max_prompt tokens, a solution of max_response with its EOS; one more is out."""
    row = PLAIN_ROWS[0]
    ((prompt, (solution,), _),) = read(tokenizer, row)
    limits = {"max_prompt": len(tokenizer(prompt).input_ids),
              "max_response": len(tokenizer(solution).input_ids)}
    assert len(read(tokenizer, row, **limits)) == 1
    for name in limits:
        with pytest.raises(InputError, match="1 (prompt|solution) too long"):
            read(tokenizer, row, **{**limits, name: limits[name] - 1})

@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_are_read_by_their_ending(suffix):
    """.jsonl, .json and .parquet, through the datasets library."""
    rows = datasets.Dataset.from_list(PLAIN_ROWS)
    path = f"rows{suffix}"
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path, lines=suffix == ".jsonl")
    assert [dict(row) for row in load_rows(path)] == PLAIN_ROWS

def write_rows(rows, path="rows.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))

def task_of(tokenizer, rows, *flags):
    """math_task on a file of these rows."""
    write_rows(rows)
    return math_task(tokenizer, settings("--model", "m", "--dataset", "rows.jsonl", *flags))

def test_math_tasks_hold_out_the_files_last_rows_and_reward_by_math_verify(tokenizer):
    """Held-out problems are not trained on; special tokens do not disturb the reward."""
    task = task_of(tokenizer, PLAIN_ROWS, "--eval-size", "2")
    ((heldout),) = task.heldout.values()
    assert [p.answer for p in task.train + heldout] == [r["answer"] for r in PLAIN_ROWS]
    assert len(heldout) == 2 and not heldout[0].solutions  # none is needed, nor filtered by
    assert task.reward(heldout[0], task.train[0].solutions[0]) == 0.0
    for problem in task.train:
        assert task.reward(problem, problem.solutions[0]) == 1.0

def test_rows_are_held_out_by_problem_and_a_tenth_at_most(tokenizer, capsys):
    """A problem that a file holds twice is not trained on and held out; nine rows hold out none.

    The line that counts them says how many have solutions, without which nobody is guided.
    """
    task = task_of(tokenizer, [*PLAIN_ROWS[:11], *PLAIN_ROWS[-1:] * 9])
    assert [len(problems) for problems in task.heldout.values()] == [2]
    assert [p.answer for p in task.train] == [row["answer"] for row in PLAIN_ROWS[:11]]
    task = task_of(tokenizer, PLAIN_ROWS[:9])
    assert len(task.train) == 9 and not task.heldout
    assert "9 problems (9 with solutions)" in capsys.readouterr().out

@pytest.mark.parametrize("text, words", [
    (b'{"problem": "P", "text": "T"}', ["column", "answer"]),  # the column that is missing
    (b'{"problem": "P", "answer": ["5"]}', ["neither text nor number"]),
    (b"", ["rows.jsonl", "empty"]), (b"no JSON", ["rows.jsonl"]),
    (b'{"problem": "P", "answer": ""}', ["usable"]),
    (json.dumps(PLAIN_ROWS[0] | {"problem": "long " * 999}).encode(), ["prompt too long"])])
def test_data_that_cannot_be_used_are_refused_in_one_line(text, words, stand_in, capsys):
    """Missing columns, an empty file, no JSON, and rows that are of no use."""
    Path("rows.jsonl").write_bytes(text)
    line = refusal(["--model", stand_in, "--dataset", "rows.jsonl", "--max-prompt", "500",
                    "--max-response", "500", "--device", "cpu"], capsys)
    assert all(word in line for word in words), line

def test_without_network_hub_data_are_refused_in_one_line(stand_in, capsys):
    """It says what was tried, and that a local file works too."""
    for name, hub in (("gsm8k", "openai/gsm8k"), ("openr1", "Elliott/Openr1-Math-46k-8192")):
        line = refusal(["--model", stand_in, "--dataset", name, "--max-prompt", "500",
                        "--max-response", "500"], capsys)
        assert hub in line and ".jsonl" in line

def real_gsm8k_rows():
    path = HERE.parent / "shared" / "data" / "gsm8k_train.jsonl"
    if not path.exists():
        return GSM8K_ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: len(row["answer"]))[:24]

def openr1_rows():
    text = "<think>\n{solution}\n</think>\nSo it is."
    return [openr1(row["problem"], text.format(**row), row["answer"]) for row in PLAIN_ROWS]

@pytest.mark.parametrize("make_rows, file", [
    (lambda: GSM8K_ROWS, "rows.jsonl"), (real_gsm8k_rows, "rows.json"),
    (openr1_rows, "rows.parquet")])
def test_the_real_path_trains_a_qwen_instruct_that_plain_transformers_loads(
        make_rows, file, stand_in, monkeypatch):
    """From a chat model's folder and real rows to a folder of the trained weights, bit for bit."""
    rows, trained = datasets.Dataset.from_list(make_rows()), []
    rows.to_parquet(file) if file.endswith("parquet") else rows.to_json(file)
    monkeypatch.setattr(trapo, "load_policy",
                        lambda name: trained.append(load_policy(name)) or trained[-1])
    main(["--model", stand_in, "--dataset", file, "--out", "run", "--steps", "2", "--prompts", "2",
          "--max-prompt", "900", "--max-response", "70", "--eval-size", "1", "--lr", "1e-3",
          "--device", "cpu"])
    steps = metrics_of("run")[1:]
    assert [line["guided"] for line in steps] == [0.5, 0.5]  # a random policy needs all the help
    assert all(line["tokens_trained"] > 0 and line["logprob_gap"] < 1e-4 for line in steps)
    assert steps[0]["reward_guided"] >= 0.25  # the experts' whole solutions verify
    ((policy, _),), ids = trained, torch.arange(1, 40)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained("run").eval()
    origin = transformers.AutoModelForCausalLM.from_pretrained(stand_in).eval()
    with torch.no_grad():
        logits = policy.eval()(ids).logits
        assert torch.equal(again(ids).logits, logits)
        assert not torch.allclose(origin(ids).logits, logits, atol=1e-3)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()  # tied
    assert set(again.generation_config.eos_token_id) == set(origin.generation_config.eos_token_id)
    saved, given = map(transformers.AutoTokenizer.from_pretrained, ("run", stand_in))
    text = "<|im_start|>user\nWhat is 2+2?\n\n<|im_end|>"
    assert saved(text).input_ids == given(text).input_ids and saved.chat_template == CHATML

# ==== Part 8. The clock world

def walk(words):
    """Solve a clock chain by hand: (letters, hours after each step, the prompt's last word)."""
    hour, hours, letters = int(words[1]), [], [words[0]]
    for letter, change in zip(words[2:-1:2], words[3:-1:2]):
        hour = (hour + int(change)) % 24
        letters, hours = [*letters, letter], [*hours, hour]
    return letters, hours, words[-1]

@pytest.fixture(scope="module")
def clock():
    """(tokenizer, task) of the embedded experiment at seed 0."""
    _, tokenizer = clock_model(0)
    return tokenizer, clock_task(tokenizer, settings("--eval-size", "50"))

def test_clock_questions_follow_their_rules(clock):
    """Letters run on, steps are of 1 to 9 hours, and the answer is where the clock ends."""
    tokenizer, task = clock
    sets = {"train": (task.train, range(5, 10), "?")}
    kinds = [(range(5, 10), "?"), (range(10, 11), "?"), (range(2, 5), ":"), (range(1, 2), "?")]
    sets |= {name: (problems, *kind)
             for (name, problems), kind in zip(task.heldout.items(), kinds, strict=True)}
    for problems, lengths, mark in sets.values():
        for p in problems:
            words = tokenizer.convert_ids_to_tokens(p.prompt_ids)
            letters, hours, last = walk(words)
            assert "".join(letters) in trapo.LETTERS and last == mark
            assert len(hours) in lengths and str(hours[-1]) == p.answer
            assert all(re.fullmatch(r"[+-][1-9]", change) for change in words[3:-1:2])

def test_clock_experts_work_ramble_and_correct_their_slips(clock):
    """Solutions verify; every line is right, or followed by "oops" and the line again."""
    tokenizer, task = clock
    seen = Counter()
    for p in task.train:
        (solution,) = p.solutions
        assert task.reward(p, solution) == 1.0
        words = tokenizer.convert_ids_to_tokens(solution)
        letters, hours, _ = walk(tokenizer.convert_ids_to_tokens(p.prompt_ids))
        body, ending = words[:words.index("#")], words[words.index("#"):]
        assert ending == ["#", p.answer, "<eos>"]
        body = [w for w in body if w not in trapo.FILLERS]
        seen["fillers"] += len(words) - len(body) - 3
        for letter, hour in zip(letters[1:], hours):
            line, body = body[:3], body[3:]
            if body[:1] == ["oops"]:
                seen["slips"] += 1
                assert line[0] == letter and line[2] != str(hour)
                line, body = body[1:4], body[4:]
            assert (line[0], line[2]) == (letter, str(hour))
        assert not body
    steps = sum(len(p.prompt_ids) - 3 for p in task.train) / 2
    assert 0.25 < seen["fillers"] / steps < 0.35 and 0.07 < seen["slips"] / steps < 0.13

def test_clock_reward_wants_one_answer_at_the_very_end(clock):
    """`# answer <eos>`, and no other `#`: guessing twice, or talking on, is wrong."""
    tokenizer, task = clock
    p = Problem([], [], "8")
    for text, reward in (("# 8 <eos>", 1), ("k -9 23 # 8 <eos>", 1), ("# 9 <eos>", 0), ("# 8", 0),
                         ("8 <eos>", 0), ("# 7 # 8 <eos>", 0), ("# 8 # <eos>", 0), ("", 0),
                         ("# 8 <eos> k", 0), ("# 8 <eos> # 8 <eos>", 0)):
        assert task.reward(p, tokenizer.convert_tokens_to_ids(text.split())) == reward, text

def test_clock_data_depend_on_the_seed_alone(clock):
    """The same seed, the same problems; another seed, others; held-out ones are not trained on."""
    tokenizer, task = clock
    again, other = (clock_task(tokenizer, settings("--eval-size", "50", "--seed", seed))
                    for seed in "01")
    assert again.train == task.train and again.heldout == task.heldout
    assert other.train != task.train and len(task.train) == 512
    asked = {tuple(p.prompt_ids) for p in task.train}
    overlap = [p for p in task.heldout[next(iter(task.heldout))] if tuple(p.prompt_ids) in asked]
    assert not overlap

def test_the_pretraining_corpus_is_right_as_well(clock):
    """Textbook and quiz alike: what the base cannot do, it was not taught wrongly."""
    tokenizer, _ = clock
    args = settings("--dataset", "clock-corpus", "--steps", "20", "--prompts", "32")
    task = clock_task(tokenizer, args)
    assert len(task.train) == 20 * 32 and task.in_order and not task.heldout
    marks = Counter(tokenizer.convert_ids_to_tokens(p.prompt_ids)[-1] for p in task.train)
    assert set(marks) == {":", "?"} and min(marks.values()) > 60
    assert all(task.reward(p, p.solutions[0]) == 1.0 for p in task.train)

def test_clock_words_survive_saving_and_loading(base, clock):
    """What load_policy gives back reads and writes the same words, with spaces between them."""
    tokenizer, _ = clock
    loaded, again = load_policy(base)
    text = "j 8 k -9 l +8 m +1 ?"
    ids = again(text, add_special_tokens=False).input_ids
    assert ids == tokenizer.convert_tokens_to_ids(text.split())
    assert again.decode(ids) == text
    model, _ = clock_model(0)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))

# ==== Part 9. The sampler's copy

def test_the_samplers_copy_is_in_bf16_and_the_master_weights_are_not(stand_in, monkeypatch):
    """Cast parameter by parameter, tied ones stay tied; RoPE's buffers stay fp32."""
    def whole_copy(*_):
        pytest.fail("a second fp32 model was made")
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", whole_copy)
    policy, _ = load_policy(stand_in)
    sampler = trapo.make_sampler(policy, settings("--bf16"))
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {b.dtype for b in sampler.buffers()} == {torch.float32}
    assert sampler.lm_head.weight is sampler.model.embed_tokens.weight
    assert not any(p.requires_grad for p in sampler.parameters())
    assert trapo.make_sampler(policy, settings("--no-bf16")) is policy
    with torch.no_grad():
        policy.lm_head.weight += 1
    trapo.refresh(sampler, policy)
    for mine, master in zip(sampler.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, master.bfloat16())

def test_with_bf16_the_update_computes_in_it_and_collects_gradients_in_fp32(base):
    """Log-probs close to those of fp32, but not equal to them; so is what the sampler noted."""
    policy, _ = load_policy(base)
    rollouts = [replace(r) for r in BATCH]
    accumulate_gradients(policy, rollouts, settings("--bf16"))
    for r in rollouts[:3]:
        expected = naive(policy, r.prompt + r.prefix + r.completion, len(r.prompt)).tolist()
        assert r.logprobs == pytest.approx(expected, abs=0.1)
        assert r.logprobs != pytest.approx(expected, abs=1e-5)
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}
    gaps = {}
    for flag in ("--bf16", "--no-bf16"):
        main(tiny_run(base, flag[2:], "--steps", "1", flag))
        gaps[flag] = metrics_of(flag[2:])[-1]["logprob_gap"]
    assert gaps["--no-bf16"] < 1e-5 < gaps["--bf16"] < 0.1
    saved = safetensors.torch.load_file("bf16/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}

# ==== Part 9. Checkpoints, kills, signals

def test_the_newest_two_checkpoints_are_kept_and_each_is_a_model_folder(base):
    """Nothing unfinished stays behind; trainer state lies beside model and tokenizer."""
    main(tiny_run(base, "run", "--steps", "5", "--save-every", "2"))
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-4", "checkpoint-5"]
    for folder in ("run", "run/checkpoint-4", "run/checkpoint-5"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
    assert weights("run") == weights("run/checkpoint-5") != weights("run/checkpoint-4")
    assert not [path for path in Path("run").iterdir() if path.name.startswith(".")]
    assert [line["step"] for line in metrics_of("run")][-5:] == [1, 2, 3, 4, 5]

processes = multiprocessing.get_context("forkserver")  # imports all this once, then forks
processes.set_forkserver_preload(["transformers.models.llama.modeling_llama", __name__])

def in_a_process(function, *args):
    """Start function(*args) in a process of its own."""
    process = processes.Process(target=function, args=args)
    with pytest.MonkeyPatch.context() as patch:  # it must find this file: Python 3.11 does not say
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process.start()
    return process

def at_call(place, call, action, patch):
    """Let the given call of a function do something before it does its work.

    Args: place: "module function".   call: its number, from 1.   action: without arguments.
        patch: a MonkeyPatch.
    """
    module, name = place.split()
    module = {"trapo": trapo, "torch": torch, "os": os, "shutil": trapo.shutil}[module]
    function, calls = getattr(module, name), iter(range(1, 10 ** 9))

    def replaced(*args, **kwargs):
        if next(calls) == call:
            action()
        return function(*args, **kwargs)
    patch.setattr(module, name, replaced)

def die_at(place, call, argv):
    """Run main(argv), but kill -9 this very process before the given call of a function."""
    at_call(place, call, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
    main(argv)

LONGER = ("--steps", "4", "--save-every", "2", "--eval-every", "2", "--eval-size", "1")

@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run with the flags LONGER that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(tiny_run(base, folder, *LONGER))
    return folder

def assert_same(run, other):
    """The same metrics, weights and kept rollouts, bit for bit."""
    assert repeatable(run) == repeatable(other) and weights(run) == weights(other)
    assert Path(run, "rollouts.jsonl").read_bytes() == Path(other, "rollouts.jsonl").read_bytes()

def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base, whole):
    """kill -9 amid rollouts, the update, the log and the writing of checkpoints: nothing is lost.

    Every attempt goes on from where the one before was killed, whatever that left half done.
    """
    argv = tiny_run(base, "killed", *LONGER)
    for place, call in (("trapo sample", 1), ("trapo write_whole", 2), ("torch save", 1),
                        ("trapo refresh", 3), ("os replace", 4),
                        ("trapo step_metrics", 2), ("shutil rmtree", 1), ("shutil copy", 2)):
        resumed = ["--resume"] * Path("killed/settings.json").exists()
        child = in_a_process(die_at, place, call, [*argv, *resumed])
        child.join()
        assert child.exitcode == -signal.SIGKILL, place
    assert not Path("killed/model.safetensors").exists()
    main([*argv, "--resume"])
    assert_same("killed", whole)
    assert weights("killed") != weights(base)

@pytest.mark.parametrize("place, call, number", [
    ("trapo sample", 10, signal.SIGTERM), ("trapo refresh", 2, signal.SIGINT),
    ("trapo evaluate", 2, signal.SIGTERM), ("trapo save", 1, signal.SIGINT)])
def test_ctrl_c_and_sigterm_finish_the_step_and_save_it(
        base, whole, place, call, number, monkeypatch, capsys):
    """Exit code 130 and a command that goes on from there; what is passed on twice counts once."""
    def interrupt():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)  # by torchrun, to whom the terminal sent it too
    at_call(place, call, interrupt, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(tiny_run(base, "run", *LONGER))
    last = metrics_of("run")[-1]["step"]
    assert stop.value.code == 130 and 0 < last < 4
    assert checkpoints(Path("run"))[-1].name == f"checkpoint-{last}"
    (command,) = re.findall("python trapo.py (--resume.*)", capsys.readouterr().out)
    main(command.split())
    assert_same("run", whole)

def test_a_second_ctrl_c_after_a_second_ends_the_program_at_once(base, monkeypatch, capsys):
    """Exit code 130, nothing saved; and Ctrl-C is what it was before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(trapo, "time", Namespace(monotonic=lambda: next(clock),
                                                 perf_counter=trapo.time.perf_counter))

    def interrupted(*_):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(trapo, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(tiny_run(base, "run", "--steps", "2"))
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not checkpoints(Path("run"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_a_ctrl_c_between_the_base_and_the_run_is_not_lost(monkeypatch, capsys):
    """The base's training caught signals; what comes before the first step ends the program."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at_call("trapo evaluate", 1, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    with pytest.raises(SystemExit, match="130"):
        main("--base-steps 2 --steps 1 --eval-size 1 --device cpu --out runs/a".split())
    assert "interrupted" in capsys.readouterr().err and not checkpoints(Path("runs/a"))

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("file write failed")])
def test_a_full_disk_is_one_line_and_loses_nothing(base, error, monkeypatch, capsys):
    """Each library raises its own; the checkpoint before stays, and --resume goes on from it."""
    flags = ("--steps", "3", "--save-every", "1")
    main(tiny_run(base, "whole", *flags))
    calls, written = iter(range(1, 10)), torch.save

    def full(state, path):
        if next(calls) == 2:
            Path(path).write_bytes(b"half")
            raise error
        written(state, path)
    monkeypatch.setattr(torch, "save", full)
    line = refusal(tiny_run(base, "run", *flags), capsys)
    assert "run" in line and "free space" in line and "--resume" in line
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-1"]
    main([*tiny_run(base, "run", *flags), "--resume"])
    assert_same("run", "whole")

def test_overwrite_starts_the_run_in_out_anew(base):
    """Old metrics and checkpoints are gone, and the result is that of a fresh folder."""
    main(tiny_run(base, "run", "--steps", "3", "--save-every", "1", "--seed", "5"))
    main(tiny_run(base, "run", "--steps", "2", "--save-every", "1", "--overwrite"))
    main(tiny_run(base, "fresh", "--steps", "2", "--save-every", "1"))
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]
    assert_same("run", "fresh")

def test_a_torn_line_of_metrics_does_not_stop_a_resume(base):
    """A kill may cut a line anywhere, behind an inner brace too."""
    main(tiny_run(base, "run", "--steps", "1"))
    with Path("run/metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "eval": {"held out": 0.5}')
    main("--resume --out run --steps 3".split())
    assert [line["step"] for line in metrics_of("run")][-3:] == [1, 2, 3]

def test_a_run_that_was_moved_goes_on_where_it_is(base):
    """Not in the folder that its settings name."""
    main(tiny_run(base, "run", "--steps", "1"))
    Path("run").rename("moved")
    main("--resume --out moved --steps 2".split())
    assert metrics_of("moved")[-1]["step"] == 2 and not Path("run").exists()

def test_a_resumed_run_remembers_its_settings_value_by_value_and_type_by_type(base):
    """Else eval.py would take it for a run of another method."""
    main(tiny_run(base, "run", "--steps", "1", "--thresholds", "-1", "0.5", "0.7", "2"))
    first = Path("run/settings.json").read_text()
    for steps in ("2", "3"):
        main(["--resume", "--out", "run", "--steps", steps])
        again = Path("run/settings.json").read_text()
        assert again.replace(f'"steps": {steps}', '"steps": 1') == first
    assert set(json.loads(first)) == {f.name for f in fields(Settings)}
    assert "trapo" not in json.loads(Path("run/config.json").read_text())

# ==== Part 9. Several runs and several processes

def test_two_runs_into_one_folder_are_refused_in_one_line(base, capsys):
    """The folder is locked while a run writes to it, and free afterwards."""
    with trapo.locked(Path("run")):
        assert "run" in refusal(tiny_run(base, "run", "--steps", "1"), capsys)
    assert not list(Path("run").iterdir())
    main(tiny_run(base, "run", "--steps", "1"))

def test_two_first_runs_of_a_seed_at_once_make_one_sound_base():
    """The second waits for the first's base, and both start from it."""
    flags = ("--base-steps 40 --steps 1 --prompts 1 --max-response 9 --eval-size 1 --device cpu "
             "--out").split()
    runs = [in_a_process(main, [*flags, f"runs/{name}"]) for name in "ab"]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert [line["step"] for line in metrics_of("runs/clock-base-40-0-seed0")] == [*range(1, 41)]
    assert_same("runs/a", "runs/b")
    main([*flags, "apart/c"])
    assert weights("apart/c") == weights("runs/a")

def test_a_base_that_is_not_sound_is_pretrained_again_from_another_seed(monkeypatch, capsys):
    """The seeds are fixed, so it is the same base another time; it starts from other weights."""
    monkeypatch.setitem(trapo.CORPUS, "steps", 3)  # else 2500 steps make a base be looked at
    verdicts = iter(["textbook: 0.1 < 0.95", "textbook: 0.2 < 0.95", "", "", "never asked"])
    monkeypatch.setattr(trapo, "base_fault", lambda folder, args: next(verdicts))
    argv = "--base-steps 3 --steps 1 --prompts 1 --eval-size 0 --max-response 9 --device cpu --out"
    main([*argv.split(), "runs/a"])
    output = capsys.readouterr().out
    assert output.count("pretraining the base") == 3 and output.count("not sound (textbook") == 2
    bases = sorted(path.name for path in Path("runs").iterdir() if path.name != "a")
    assert bases == ["clock-base-3-0-seed0", *(f"clock-base-3-0-seed0-again{i}" for i in (1, 2))]
    assert len({str(weights(f"runs/{name}")) for name in bases}) == 3
    assert json.loads(Path("runs/a/settings.json").read_text())["model"] == f"runs/{bases[2]}"
    main([*argv.replace("--base-steps 3", "--base-steps 2").split(), "runs/b"])  # cut short
    assert next(verdicts) == "" and "not sound" not in capsys.readouterr().out

def test_an_untrained_base_is_not_sound(base):
    """It can neither work nor blurt, and the fault names both."""
    fault = trapo.base_fault(Path(base), settings())
    assert re.fullmatch(r"textbook .*: 0\.\d+ < 0\.95, direct .*: 0\.\d+ < 0\.9", fault)

def test_the_bases_own_folder_is_no_folder_for_a_run(capsys):
    """Where a run would wait for itself."""
    line = refusal("--base-steps 7 --out x/clock-base-7-0-seed0 --device cpu", capsys)
    assert "clock-base-7-0-seed0" in line and "another --out" in line

def test_held_out_draws_do_not_depend_on_the_number_of_processes(clock, monkeypatch):
    """Every problem has its own random numbers, whichever process draws for it."""
    policy, _ = clock_model(1)
    args, drawn = settings("--max-response", "8"), {}

    def reward(problem, response):
        drawn[tuple(problem.prompt_ids)] = response
        return float(len(response) % 2)
    task = Task([], clock[1].heldout, reward)
    monkeypatch.setattr(trapo, "gather", lambda value: [value])
    share = trapo.evaluate(policy, task, args, whole=False)
    alone, name = drawn.copy(), next(iter(task.heldout))
    assert share == {name: statistics.fmean(len(x) % 2 for x in alone.values())}
    assert len(set(map(tuple, alone.values()))) > 40  # of 50
    drawn.clear()
    monkeypatch.setattr(trapo, "WORLD", 3)
    for rank in range(3):
        monkeypatch.setattr(trapo, "RANK", rank)
        trapo.evaluate(policy, task, args, whole=False)
    assert drawn == alone

def sft_run(base, out, steps):
    """A run that draws nothing, so that it can be compared number by number.

    Five prompts on two processes, in small micro-batches: the ranks have different numbers of them.
    """
    return ["--model", base, "--dataset", "clock", "--method", "sft", "--prompts", "5",
            "--micro-tokens", "70", "--eval-size", "0", "--save-every", "2", "--device", "cpu",
            "--steps", str(steps), "--out", str(out)]

TWO_PROCESSES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import trapo
start, dist.destroy_process_group = dist.init_process_group, lambda: None  # once for all three runs
dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or start(*args, **kwargs)
for argv in json.loads(sys.argv[2]):
    trapo.main(argv)
def fail(*_):
    raise RuntimeError("the second process is out of luck")
if trapo.RANK == 1:
    trapo.accumulate_gradients = fail
trapo.main(json.loads(sys.argv[3]))
"""

@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torchrun here")
def test_two_processes_do_the_work_of_one(base):
    """Losses, norms, counts and weights; a process may have no prompt; one's error ends both.

    Two steps each by one, two, and one process, resumed, against six by one.
    """
    here = Path.cwd()
    main(sft_run(base, "alone", 6))
    main(sft_run(base, "run", 2))
    embedded = ["--out", str(here / "runs/few"), "--base-steps", "2", "--steps", "2", "--prompts",
                "1", "--max-response", "20", "--eval-size", "3", "--device", "cpu"]
    resumed = ["--resume", "--out", str(here / "run"), "--steps", "4"]
    Path("both.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "both.py", str(HERE), json.dumps([resumed, embedded]),
         json.dumps(sft_run(base, here / "failed", 2))],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert [line["step"] for line in metrics_of("run")] == [1, 2, 3, 4], done.stderr
    main(["--resume", "--out", "run", "--steps", "6"])
    assert_alike("alone", "run")

    last = metrics_of("runs/few")[-1]  # the second process sampled and trained nothing, and waited
    assert last["step"] == 2
    assert last["logprob_gap"] is None or last["logprob_gap"] < 1e-5  # the copy is kept fresh
    transformers.AutoModelForCausalLM.from_pretrained("runs/few")
    assert done.returncode != 0 and "the second process is out of luck" in done.stderr

# ==== Part 10. Rollouts that are kept, and printing

def kept_rollouts(folder):
    """The lines of a run's rollouts.jsonl."""
    return [json.loads(line) for line in Path(folder, "rollouts.jsonl").read_text().splitlines()]

@pytest.mark.parametrize("method", ["trapo", "naive", "micro", "luffy", "sft"])
def test_kept_tokens_carry_the_weight_they_were_trained_with(method):
    """-dL/dlog p: for own tokens the advantage, for the expert's the share of SFT's weight."""
    policy, tokenizer = clock_model(1)
    args = settings("--method", method)
    rollouts = [Rollout([30, 40, 2], [9, 50, 60], [10, 51], reward=1.0, advantage=0.75,
                        sampler_logprobs=[-1.0, -2.0]),
                Rollout([30, 40, 2], [], [10, 51, 1], sampler_logprobs=[-1.0, -2.0, -3.0])]
    accumulate_gradients(policy, rollouts, args)
    first, inert = trapo.as_record(rollouts, tokenizer, args)["rollouts"]
    assert "".join(first["text"]) == tokenizer.decode([9, 50, 60, 10, 51]) and first["expert"] == 3
    p = torch.tensor(first["logprob"][:3]).exp()
    share = {"trapo": (p / 0.1).clamp(max=1), "naive": p / p, "sft": p / p, "micro": 0 * p,
             "luffy": 0.75 * 0.1 * p / (p + 0.1) ** 2}[method]  # -A p / (p + gamma), derived
    assert first["weight"] == pytest.approx([*share.tolist(), 0.75, 0.75], rel=2e-3)
    assert inert["weight"] == [0, 0, 0] and inert["logprob"] == [-1, -2, -3]  # the sampler's

def test_a_character_of_several_tokens_is_seen_with_the_last(tokenizer):
    """Byte-level tokens cut it anywhere; the kept text is whole nevertheless."""
    text = "a 漢字 \U0001f600 é b"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)  # this tokenizer knows no such character
    rollout = Rollout([5], [], ids, sampler_logprobs=[-1.0] * len(ids))
    (kept,) = trapo.as_record([rollout], tokenizer, settings())["rollouts"]
    assert "".join(kept["text"]).replace("\ufffd", "").endswith(text[-3:])
    assert all(letter in "".join(kept["text"]) for letter in text)

def test_two_groups_are_kept_at_each_evaluation_and_at_the_last_step(base, monkeypatch):
    """As the loop trained on them; and never more than the file may hold."""
    main(tiny_run(base, "run", "--steps", "5", "--eval-every", "2", "--eval-size", "1"))
    kept = kept_rollouts("run")
    assert [line["step"] for line in kept] == [2, 2, 4, 4, 5, 5]
    for line in kept:
        rewards = [r["reward"] for r in line["rollouts"]]
        assert [r["micro_group"] for r in line["rollouts"]] == [1, 1, 1, 1, 2, 2, 3, 4]
        assert [r["advantage"] for r in line["rollouts"]] == pytest.approx(
            [reward - statistics.mean(rewards) for reward in rewards])
        assert all(len(r["text"]) == len(r["logprob"]) == len(r["weight"]) >= r["expert"]
                   for r in line["rollouts"])
    monkeypatch.setattr(trapo, "KEPT", len(json.dumps(kept[0])) + 100)
    main(tiny_run(base, "less", "--steps", "5", "--eval-every", "2", "--eval-size", "1"))
    assert kept_rollouts("less") == kept[:1]

def test_a_model_that_has_gone_wrong_is_kept_as_valid_json(clock):
    """Log-probs that are not finite are null: NaN is no JSON, and a browser would refuse it."""
    tokenizer, _ = clock
    rollout = Rollout([5], [6], [7, 8], sampler_logprobs=[math.nan, -INF])
    (kept,) = trapo.as_record([rollout], tokenizer, settings())["rollouts"]
    assert kept["logprob"] == [None, None, None]

def test_the_last_lines_of_a_run_tell_what_happened(capsys):
    """Success alone and help, in the first and the last tenth; and what was lost on the way."""
    rows = [{"step": 0, "eval": {"quiz": 0.05, "textbook": 0.98}}]
    rows += [{"step": i, "reward_unguided": i / 20, "guided": 1 / i} for i in range(1, 20)]
    rows += [{"step": 20, "reward_unguided": None, "guided": 0.05,
              "eval": {"quiz": 0.95, "textbook": 0.5}}]
    Path("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trapo.tell(Path())
    output = capsys.readouterr().out
    assert re.search(r"quiz +before 0.050   after 0.950", output)
    assert "solved 7.5% of training problems in the first 2 steps, 95.0% in the last 2" in output
    assert "in 75.0% of its rollouts in the first 2 steps, 5.1% in the last 2" in output
    assert "Lost, by more than 5 points: textbook, from 98.0% to 50.0%." in output

def test_what_a_step_takes_is_foretold_from_its_first_tokens(monkeypatch, capsys):
    """One token of eight rollouts takes 2 s, nine take 10 s: so a token 1 s, the prompt 2 s."""
    ticks = iter([0.0, 2.0, 2.0, 12.0])
    monkeypatch.setattr(trapo.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(trapo, "sample", lambda *args, **kwargs: None)
    args = settings(prompts=3, max_response=100)
    trapo.foretell(None, Task([Problem([5] * 50, [], "")], {}, None), args)
    sampling, update = 100 * 1, 8 * (50 + 100) * 3 * 2 / 50  # seconds; backward costs twice forward
    assert f"up to {3 * (sampling + update) / 60:.1f} minutes" in capsys.readouterr().out

def test_without_a_model_the_embedded_experiment_makes_its_base_once(capsys):
    """All methods of a seed start from the same base, and a table compares before and after."""
    flags = ["--base-steps", "2", "--steps", "1", "--prompts", "1", "--eval-size", "1",
             "--max-response", "20", "--device", "cpu"]
    main([*flags, "--out", "runs/a"])
    (made,) = (path for path in Path("runs").iterdir() if path.name != "a")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    main([*flags, "--method", "grpo", "--out", "runs/b"])
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    start, end = (metrics_of("runs/a")[i]["eval"] for i in (0, -1))
    assert start == metrics_of("runs/b")[0]["eval"]
    assert start.keys() == end.keys() and len(start) == 8  # four sets, sampled and greedy
    output = capsys.readouterr().out
    for name in ("in range (k 5-9)", "longer (k 10)", "textbook (k 2-4)", "direct (k 1)"):
        assert output.count(name + ", greedy") == 2
    assert len(re.findall(r"reward [01], .*[+-]\d\.\d\d:  ", output)) == 8 + 8  # the groups shown
    assert "micro-group 4: 100% of the solution, as the mean return so far is 0.00" in output

def test_evaluations_come_every_so_many_steps_and_whole_ones_at_both_ends(base):
    """All sets, sampled and greedy, before and after; in between a point of the curve."""
    main(tiny_run(base, "run", "--steps", "3", "--eval-every", "2", "--eval-size", "1"))
    sizes = {line["step"]: len(line["eval"]) for line in metrics_of("run") if "eval" in line}
    assert sizes == {0: 8, 2: 1, 3: 8}

def test_sft_then_rl_is_two_commands(base):
    """A run's folder is a model, beside which stands the data it was made with."""
    main(tiny_run(base, "runs/sft", "--method", "sft", "--steps", "1"))
    args = settings("--method", "grpo", "--model", "runs/sft/checkpoint-1")
    assert args.dataset == "clock" and args.lr == settings().lr
    main("--method grpo --model runs/sft --steps 1 --prompts 2 --eval-size 0 --device cpu".split())
    assert weights("runs/sft-grpo-seed0") == weights("runs/sft") != weights(base)  # no reward yet

def test_no_held_out_problems_means_no_evaluation(base):
    """--eval-size 0."""
    main(tiny_run(base, "run", "--steps", "1", "--eval-size", "0", "--eval-every", "1"))
    assert not any(line.get("eval") for line in metrics_of("run"))

# ==== Part 11. The command line

def refusal(argv, capture):
    """main's one line on stderr for a command line that cannot be run."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv if isinstance(argv, list) else argv.split(" "))
    lines = [line for line in capture.readouterr().err.split("\n") if line and "it/s" not in line]
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]

@pytest.mark.parametrize("flags, named", [
    ("--alpha 2", "--alpha"), ("--alpha -0.1", "--alpha"), ("--alpha nan", "--alpha"),
    ("--ratios 0 0.2 0.5 1.5", "--ratios"), ("--ratios 0 -0.2 0.5 1", "--ratios"),
    ("--ratios 0 0.5", "--ratios"), ("--sizes 4 2", "--sizes"), ("--sizes 4 2 1 0", "--sizes"),
    ("--thresholds -1 nan 0.7 0.9", "--thresholds"), ("--thresholds -1", "--thresholds"),
    ("--thresholds -1 inf 0.7 0.9", "--thresholds"),
    ("--steps 0", "--steps"), ("--steps two", "--steps"), ("--steps 1.5", "--steps"),
    ("--base-steps 0", "--base-steps"), ("--prompts -1", "--prompts"), ("--lr 0", "--lr"),
    ("--max-response 0", "--max-response"), ("--max-prompt 0", "--max-prompt"),
    ("--lr inf", "--lr"), ("--lr nan", "--lr"), ("--max-grad-norm 0", "--max-grad-norm"),
    ("--temperature 0", "--temperature"), ("--warmup -1", "--warmup"), ("--eval-size -1",
     "--eval-size"), ("--eval-every 0", "--eval-every"), ("--save-every 0", "--save-every"),
    ("--micro-tokens 0", "--micro-tokens"), ("--kv-tokens 0", "--kv-tokens"),
    ("--seed -1", "--seed"), ("--method ppo", "--method"), ("--prefix-loss kl", "--prefix-loss"),
    ("--device gpu", "--device"), ("--sede 3", "--sede"), ("--step 3", "--step"), ("3", "3"),
    ("--model m --dataset nowhere", "nowhere"), ("--model m --dataset no.jsonl", "no.jsonl"),
    ("--model m --dataset rows.csv", "rows.csv"), ("--dataset gsm8k", "--model"),
    ("--out rows.csv", "rows.csv"), ("--resume --out typo", "typo"), ("--out ", "empty"),
    pytest.param("--device cuda", "--device cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a CUDA device"))])
def test_bad_settings_are_refused_in_one_line_before_anything_is_loaded(
        flags, named, capsys, monkeypatch):
    """Exit code 2, one line that names the flag, no traceback."""
    for loader in ("load_policy", "clock_model", "load_rows"):
        monkeypatch.setattr(trapo, loader, lambda *_: pytest.fail("loaded something"))
    Path("rows.csv").write_text("problem,answer")
    assert named in refusal(flags, capsys)
    assert [path.name for path in Path().iterdir()] == ["rows.csv"]

def test_a_folder_that_holds_a_run_is_not_touched(base, capsys):
    """Unless --resume or --overwrite; and --resume goes on with the settings of that run."""
    main(tiny_run(base, "run", "--steps", "1"))
    before = weights("run")
    line = refusal(tiny_run(base, "run", "--steps", "1"), capsys)
    assert "--resume" in line and "--overwrite" in line
    for flags in (["--alpha", "0.2"], ["--method", "grpo"], ["--seed", "1"]):
        line = refusal(tiny_run(base, "run", "--resume", "--steps", "2", *flags), capsys)
        assert flags[0].strip("-") in line and "prompts" not in line
    assert weights("run") == before
    main("--resume --out run --steps 2 --lr 1e-5 --warmup 5".split())  # the rest is known
    assert metrics_of("run")[-1]["step"] == 2 and weights("run") != before
    assert json.loads(Path("run/settings.json").read_text())["lr"] == 1e-5
    assert "overwrite" in refusal("--resume --overwrite --out run", capsys)

def test_what_is_no_run_or_cannot_be_resumed_is_never_overwritten(base, capsys):
    """A plain model's folder, and a finished run whose checkpoints were deleted to save space."""
    like(base, "plain")
    for flag in ("--resume", "--overwrite"):
        assert "plain" in refusal(tiny_run(base, "plain", "--steps", "1", flag), capsys)
    assert weights("plain") == weights(base) and not Path("plain/metrics.jsonl").exists()
    main(tiny_run(base, "run", "--steps", "1"))
    before = weights("run"), Path("run/metrics.jsonl").read_text()
    Path("run/checkpoint-1").rename("elsewhere")
    assert "checkpoint" in refusal("--resume --out run --steps 2", capsys)
    assert (weights("run"), Path("run/metrics.jsonl").read_text()) == before

def test_overwrite_never_deletes_the_model_it_starts_from(base, capsys):
    """A --model that is --out, or lies in it."""
    main(tiny_run(base, "run", "--steps", "1"))
    for model in ("run", "run/checkpoint-1", "run/../run/checkpoint-1"):
        line = refusal(tiny_run(model, "run", "--overwrite", "--steps", "1"), capsys)
        assert "--out" in line and model in line
    assert weights("run") == weights("run/checkpoint-1")

def test_settings_that_a_kill_or_a_full_disk_spoiled_are_refused_in_one_line(base, capsys):
    """Empty, no JSON, or not settings: --resume cannot go on, but --overwrite starts anew."""
    main(tiny_run(base, "run", "--steps", "1"))
    for text, word in (("", "settings"), ("[1]", "settings"), ('{"wind": 3}', "wind"),
                       ('{"alpha": "much"}', "alpha"), ('{"method": "nope"}', "nope")):
        Path("run/settings.json").write_text(text)
        assert word in refusal("--resume --out run --steps 2", capsys), text
    main(tiny_run(base, "run", "--steps", "1", "--overwrite"))

@pytest.mark.parametrize("changed", [
    {"alpha": "much"}, {"sizes": 4}, {"sizes": [4.5, 2, 1, 1]}, {"seed": True}, {"betas": [0.9, 2]},
    {"prefix_loss": "kl"}, {"device": "abacus"}, {"bf16": "x"}, {"method": "ppo"}, {"dataset": 5}])
def test_settings_of_a_wrong_kind_are_refused_in_one_line(changed, base, capsys):
    """Whoever edits settings.json by hand is told before anything is loaded."""
    Path("run").mkdir()
    good = json.loads(json.dumps(vars(settings(*tiny_run(base, "run")))))
    Path("run/settings.json").write_text(json.dumps(good | changed))
    assert refusal("--resume --out run", capsys)
    assert [path.name for path in Path("run").iterdir()] == ["settings.json"]

def test_a_folder_of_another_program_is_left_alone(base, capsys):
    """Checkpoints or metrics that this program did not write are neither deleted nor replaced."""
    for file in ("hf/checkpoint-500/model.safetensors", "notes/metrics.jsonl"):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text("precious")
        out = file.split("/")[0]
        assert out in refusal(tiny_run(base, out, "--steps", "1"), capsys)
        assert Path(file).read_text() == "precious"
    assert "empty" in refusal(["--out", ""], capsys)

def test_overwrite_leaves_nothing_of_the_old_model(base):
    """A chat template, say, that the new model's tokenizer would be loaded with."""
    main(tiny_run(base, "run", "--steps", "1"))
    Path("run/chat_template.jinja").write_text("OLD")
    main(tiny_run(base, "run", "--steps", "1", "--overwrite"))
    assert not load_policy("run")[1].chat_template

def test_an_overwrite_that_is_cut_short_never_mixes_two_runs(base, monkeypatch):
    """Killed before the new settings are there: the old run's checkpoints are gone already."""
    def cut_short(path, text):
        raise KeyboardInterrupt

    main(tiny_run(base, "run", "--steps", "1"))
    monkeypatch.setattr(trapo, "write_whole", cut_short)
    with pytest.raises(SystemExit):
        main(tiny_run(base, "run", "--steps", "1", "--overwrite", "--alpha", "0.3"))
    assert json.loads(Path("run/settings.json").read_text())["alpha"] == 0.1
    assert not checkpoints(Path("run"))

def test_a_file_name_is_no_pattern(tokenizer):
    """data[12].jsonl is that file, not data1.jsonl; a damaged last row says what is the matter."""
    for name, rows in (("data[12].jsonl", PLAIN_ROWS[:3]), ("data1.jsonl", PLAIN_ROWS[:1])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_rows("data[12].jsonl")) == 3

def test_metrics_that_were_lost_or_damaged_are_noticed(base, capsys):
    """A resume says so, or stops in one line, and does not touch the checkpoints."""
    main(tiny_run(base, "run", "--steps", "2"))
    Path("run/metrics.jsonl").write_text('{"stop": 1}\n')
    assert "metrics.jsonl" in refusal(tiny_run(base, "run", "--resume", "--steps", "3"), capsys)
    Path("run/metrics.jsonl").write_text("")
    main(tiny_run(base, "run", "--resume", "--steps", "3"))
    assert "lacks" in capsys.readouterr().out and metrics_of("run")[-1]["step"] == 3

def test_resume_knows_the_default_out_folder_too(base, capsys):
    """Without --out it follows from model, method and seed; settings are checked all the same."""
    flags = tiny_run(base, "x", "--steps", "1")
    del flags[flags.index("--out"):flags.index("--out") + 2]
    main([*flags, "--alpha", "0.3"])
    (out,) = Path("runs").iterdir()
    main([*flags, "--resume", "--steps", "2"])
    assert json.loads((out / "settings.json").read_text())["alpha"] == 0.3
    assert "alpha" in refusal([*flags, "--resume", "--alpha", "0.5"], capsys)

def test_errors_reach_the_shell_as_one_line_and_exit_code_2():
    """The same as a user sees it: no traceback, nothing on stdout."""
    run = subprocess.run([sys.executable, str(HERE / "trapo.py"), "--alpha", "2"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ")

def test_help_explains_every_flag_in_a_line(capsys):
    """--help, and exit code 0: a flag for each setting, but for those that presets alone set."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flags = {f.name for f in fields(Settings)} - {"betas", "decay"}
    assert set(re.findall(r"^ +--(?!no-)([a-z0-9-]+)", text, re.MULTILINE)) - {"help"} == {
        name.replace("_", "-") for name in flags}
    assert len(flags) <= 32
# ==== eval.py: benchmarks, comparisons of runs, speed

from itertools import combinations

import pandas

import eval as evaluation
from eval import bootstrap_interval, load_benchmark, mean_interval, pass_at_k, t_quantile

DATA = HERE.parent / "shared" / "data"  # the authors' files; without them, rows of our own

def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    """Brute force: all k-subsets of n samples, c of them right."""
    for n in range(1, 7):
        for c, k in product(range(n + 1), range(1, n + 1)):
            subsets = combinations([True] * c + [False] * (n - c), k)
            assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(any, subsets)))

@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    """No more right samples than samples, no more draws than samples, at least one draw."""
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)

def test_students_t_has_its_closed_forms_and_is_that_of_the_printed_tables():
    """1, 2 and 4 degrees of freedom to 1e-6; the column of 97.5 % to the third decimal."""
    p = 0.95
    root = math.sqrt(1 - p * p)
    four = 2 * math.sqrt(math.cos(math.acos(root) / 3) / root - 1)
    for df, t in ((1, math.tan(math.pi * p / 2)), (2, p * math.sqrt(2) / root), (4, four)):
        assert t_quantile(df) == pytest.approx(t, abs=1e-6)
    for df, printed in ((3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (10 ** 5, 1.960)):
        assert t_quantile(df) == pytest.approx(printed, abs=5e-4)

def test_mean_interval_by_hand():
    """1, 2, 3: standard deviation 1, standard error 1 / sqrt(3), two degrees of freedom."""
    for values, expected in (([1, 2, 3], f"2.000 ± {4.30265 / math.sqrt(3):.3f}"),
                             ([5, 5, math.nan], "5.000 ± 0.000 (n=2)"), ([7], "7.000"), ([], "-"),
                             ([math.nan, 7], "7.000 (n=1)"), ([math.nan], "-")):
        assert mean_interval(pandas.Series(values, dtype=float)) == expected

def test_bootstrap_interval_by_hand():
    """50 of 100 right: the binomial distribution's 2.5 % and 97.5 % lie at 40 and 60."""
    assert bootstrap_interval([0.0, 1.0] * 50) == pytest.approx((0.4, 0.6), abs=0.011)
    assert bootstrap_interval([0.0, 1.0]) == (0, 1)  # a quarter each: both wrong, both right
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)

def record(benchmark, problem, number, correct, of=2, **more):
    return {"benchmark": benchmark, "number": number, "of": of, "prompt": f"problem {problem}",
            "response": "\\boxed{7}", "answer": "7", "correct": float(correct), "note": "",
            "tokens": 10, "truncated": False, **more}

def test_results_by_hand():
    """1 of 2 samples right, and 0 of 2: avg@2 1/4, pass@2 1/2, and means from 0 to 1/2."""
    rows = [record("b", 0, 0, 1, of=4, tokens=30), record("b", 0, 1, 0, of=4, truncated=True),
            record("b", 1, 2, 0, of=4), record("b", 1, 3, 0, of=4, note="broken")]
    evaluation.report({}, rows, Path("."))
    found = json.loads(Path("results.json").read_text())["benchmarks"]["b"]
    assert found == {"problems": 2, "samples": 4, "of": 4, "k": 2, "avg@k": 0.25, "low": 0,
                     "high": 0.5, "pass@k": 0.5, "pass@1..k": [0.25, 0.5], "truncated": 0.25,
                     "unreadable": 0.25, "tokens": 15}

def test_the_five_benchmark_average_wants_all_five_complete():
    """The mean of the five avg@k, from the Hub's benchmarks or the authors' files; else nothing."""
    names = ["aime24", "valid.amc", "math500", "valid.minerva", "olympiad"]
    rows = [record(name, 0, 0, i < 2, of=1) for i, name in enumerate(names)]
    half = [rows[0] | {"of": 2}, *rows[1:]]
    for given, expected in ((rows, 0.4), (rows[1:], None), (half, None)):
        evaluation.report({}, given, Path("."))
        assert json.loads(Path("results.json").read_text())["table_1_average"] == expected

PROTOCOL = Namespace(samples=None, temperature=0.6, limit=None)

def test_identical_rows_are_one_problem(tokenizer):
    """32 rows of an AIME or AMC problem are one problem, sampled 32 times, in the file's order."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN_ROWS[:3]) * 4)
    files = {"rows.jsonl": (3, 4), str(DATA / "valid.aime.parquet"): (30, 32),
             str(DATA / "valid.amc.parquet"): (83, 32),
             str(DATA / "valid.minerva.parquet"): (272, 1)}
    for path, (problems, samples) in files.items():
        if Path(path).exists():
            found = load_benchmark(path, tokenizer, PROTOCOL)
            counts = Counter((tuple(p.prompt_ids), p.answer) for p in found)
            assert len(counts) == problems and set(counts.values()) == {samples}
            first = load_rows(path)[0]
            assert found[0].answer == found[samples - 1].answer == trapo.read_row(first)[2]

@pytest.mark.parametrize("row, answer", [
    ({"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}, "1002"),
    ({"question": "Where?", "answer": "(1,2)"}, "(1,2)"),
    ({"question": "Both?", "final_answer": ["$1$", "$2$"], "solution": [""]}, "$1$, $2$"),
    ({"problem": "How many?", "answer": 142.0, "solution": ""}, "142.0")])
def test_benchmarks_may_have_the_columns_of_any_of_the_data_sets(row, answer, tokenizer):
    """GSM8K, Minerva, OlympiadBench, AMC; a row's solution does not matter."""
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    assert [p.answer for p in load_benchmark("rows.jsonl", tokenizer, PROTOCOL)] == [answer]

def test_real_answers_verify_and_shuffled_ones_do_not():
    """\\boxed{answer} is right; a sixth of the five files, which hold two malformed ones."""
    rows = [row for path in sorted(DATA.glob("valid.*.parquet")) for row in load_rows(str(path))]
    answers = list(dict.fromkeys(trapo.read_row(row)[2] for row in rows))[::6] or [
        "204", "\\frac{3}{4}", "x^2-1", "(1,2)", "[0,1)", "\\sqrt{2}", "2\\pi", "1.6e-10", "(1,3)"]
    assert len([a for a in answers if not math_reward(f"\\boxed{{{a}}}", a)]) <= 2
    short = [a for a in answers if len(a) <= 8]  # long ones take long
    short = short[::2] if rows else short
    assert not [a for a, b in zip(short, short[1:]) if math_reward(f"\\boxed{{{b}}}", a)]

def test_all_solutions_of_gsm8ks_test_set_verify():
    """The cleaned solution, which ends in \\boxed{answer}, earns the reward: 1319 times."""
    path = DATA / "gsm8k_test.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else GSM8K_ROWS
    rewards = [math_reward(solutions[0], answer)
               for _, solutions, answer in map(trapo.read_row, rows)]
    assert rewards == [1.0] * len(rewards)

def test_a_response_without_an_answer_is_wrong_and_says_so():
    """It is recorded as unreadable."""
    evaluation.report({}, [record("b", 0, 0, 1, response="colourless")], Path("."))
    evaluation.main(["model", "gone", "--rescore", "--out", "."])
    (unreadable,) = evaluation.read_saved(Path("."))[1]
    assert (unreadable["correct"], unreadable["note"]) == (0.0, "no answer found")

# ---- Whole evaluations, of the stand-in for Qwen on a little file of five problems

FEW = "--on few.jsonl --samples 2 --max-tokens 6 --chunk 4 --device cpu".split()

@pytest.fixture
def few():
    """few.jsonl; its chunks are problems 0 and 1, 2 and 3, 4."""
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

def count_calls(monkeypatch, stop_at=None):
    """Count what is drawn; Ctrl-C at the given call."""
    calls = []

    def counted(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return sample(*args, **options)
    monkeypatch.setattr(evaluation, "sample", counted)
    return calls

def interrupted(argv, capsys):
    """Run until the Ctrl-C, which ends the program in one line."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err.splitlines()[-1]

def test_an_interrupted_evaluation_continues_and_a_finished_one_is_not_repeated(
        stand_in, few, monkeypatch, capsys):
    """It draws only what is missing, and ends with the very samples of an uninterrupted one."""
    evaluation.main(["model", stand_in, *FEW, "--out", "whole"])
    count_calls(monkeypatch, stop_at=2)
    interrupted(["model", stand_in, *FEW, "--out", "cut"], capsys)
    assert len(evaluation.read_saved(Path("cut"))[1]) == 4
    for expected in ([4, 2], []):
        calls = count_calls(monkeypatch)
        evaluation.main(["model", stand_in, *FEW, "--out", "cut"])
        assert calls == expected
        for name in ("samples.jsonl", "results.json"):
            assert Path("cut", name).read_text() == Path("whole", name).read_text()

def test_another_benchmark_joins_the_results_and_other_settings_are_refused(stand_in, few, capsys):
    """One folder holds one protocol: another temperature or file wants another folder."""
    args = ["model", stand_in, *FEW, "--out", "here", "--limit", "2"]
    evaluation.main(args)
    Path("more.jsonl").write_text(Path("few.jsonl").read_text())
    evaluation.main([*args, "--on", "more.jsonl"])
    assert list(json.loads(Path("here/results.json").read_text())["benchmarks"]) == ["few", "more"]
    assert "settings" in refused([*args, "--temperature", "0"], capsys)
    Path("few.jsonl").write_text(Path("few.jsonl").read_text().replace('"0"', '"1"'))
    assert "other problems" in refused(args, capsys)

def test_an_evaluation_cut_short_is_neither_complete_nor_lost(stand_in, few, monkeypatch, capsys):
    """A later evaluation of something else keeps its samples, and reports how many there are."""
    count_calls(monkeypatch, stop_at=2)
    interrupted(["model", stand_in, *FEW, "--out", "here"], capsys)
    Path("more.jsonl").write_text(Path("few.jsonl").read_text())
    evaluation.main(["model", stand_in, *FEW, "--out", "here", "--on", "more.jsonl"])
    found = json.loads(Path("here/results.json").read_text())["benchmarks"]
    assert {name: (b["samples"], b["of"]) for name, b in found.items()} == {
        "few": (4, 10), "more": (10, 10)}
    calls = count_calls(monkeypatch)
    evaluation.main(["model", stand_in, *FEW, "--out", "here"])
    assert calls == [4, 2]

def test_protocol_is_temperature_06_and_greedy_samples_once(stand_in, few, monkeypatch):
    """Without flags: temperature 0.6, a sample per copy of the row; greedy: one.

    A response may have 8192 tokens, or what the longest prompt leaves of the model's context.
    """
    seen = []

    def scripted(policy, requests, limits, temperature, **options):
        seen.append((len(requests), temperature))
        assert len(set(limits)) == 1 and max(map(len, requests)) + limits[0] == context
        return [[5]] * len(requests), []
    monkeypatch.setattr(evaluation, "sample", scripted)
    Path("twice.jsonl").write_text(Path("few.jsonl").read_text() * 2)
    context = 1024
    for flags in ((), ("--temperature", "0")):
        evaluation.main(["model", stand_in, "--on", "twice.jsonl", "--out", f"out{flags}", *flags])
    assert seen == [(10, 0.6), (5, 0)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(stand_in)
    longest = max(len(p.prompt_ids) for p in load_benchmark("few.jsonl", tokenizer, PROTOCOL))
    context = longest + 8192
    evaluation.main(["model", like(stand_in, config={"max_position_embeddings": 99999}),
                     "--on", "few.jsonl"])

def test_responses_beyond_the_models_context_are_refused(stand_in, few, capsys):
    """1024 tokens in all; as in training, where nobody would notice."""
    flags = ["model", stand_in, "--on", "few.jsonl", "--out", "out", "--max-tokens", "1020"]
    assert "1024" in refused(flags, capsys) and not Path("out").exists()

def test_every_sample_has_random_numbers_of_its_own_and_processes_share_the_chunks(
        tokenizer, monkeypatch):
    """Rows of noise differ, by --seed too; with two processes each draws every second chunk."""
    seen, noise = [], {}

    def scripted(policy, requests, *_, noise, **__):
        seen.extend((request[0], tuple(row)) for request, row in zip(requests, noise.tolist()))
        return [[5]] * len(requests), []
    monkeypatch.setattr(evaluation, "sample", scripted)
    problems = [Problem([i], [], "1") for i in range(10, 15)]
    policy = Namespace(generation_config=Namespace(eos_token_id=[5]))
    for seed, rank, world in ((0, 0, 1), (1, 0, 1), (0, 0, 2), (0, 1, 2)):
        monkeypatch.setattr(evaluation, "RANK", rank)
        monkeypatch.setattr(evaluation, "WORLD", world)
        seen.clear()
        args = Namespace(seed=seed, chunk=2, max_tokens=3, temperature=1.0)
        evaluation.run_benchmark("b", problems, [], Path("."), policy, tokenizer,
                                 lambda *_: (1.0, ""), args)
        noise[seed, rank, world] = dict(seen)
    assert len({*noise[0, 0, 1].values(), *noise[1, 0, 1].values()}) == 10
    assert noise[0, 0, 2].keys() == {10, 11, 14} and noise[0, 1, 2].keys() == {12, 13}
    assert noise[0, 0, 2] | noise[0, 1, 2] == noise[0, 0, 1]

def test_two_processes_give_what_one_gives(stand_in, few):
    """Under torchrun the chunks are shared; the samples are the same, though not greedy."""
    flags = ["model", stand_in, *FEW, "--out"]
    evaluation.main([*flags, "one"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", evaluation.__file__, *flags, "two"], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=170)
    for name in ("samples.jsonl", "results.json"):
        assert Path("one", name).read_text() == Path("two", name).read_text()

def test_two_evaluations_into_one_folder_are_refused(stand_in, few, capsys):
    """As two training runs are."""
    with trapo.locked(Path("out")):
        assert "out" in refused(["model", stand_in, *FEW, "--out", "out"], capsys)

def test_rescore_grades_saved_samples_without_a_model(monkeypatch):
    """A wrong verdict in the file is put right; nothing is loaded, nothing is drawn."""
    evaluation.report({"seed": 0}, [record("b", 0, 0, 0), record("b", 1, 1, 1)], Path("."))
    monkeypatch.setattr(evaluation, "load_policy", None)
    evaluation.main(["model", "gone", "--rescore", "--out", "."])
    results = json.loads(Path("results.json").read_text())
    assert results["benchmarks"]["b"]["avg@k"] == 1 and results["settings"] == {"seed": 0}

@pytest.mark.parametrize("model, results", [
    ("run", "run/eval"), ("run/checkpoint-5", "run/checkpoint-5-eval")])
def test_a_run_or_a_checkpoint_is_evaluated_with_the_runs_settings(model, results, monkeypatch):
    """Its own four held-out sets, its limit, its reward; results outlive an old checkpoint."""
    save_clock_model(Path(model))
    write_settings("run", dataset="clock", seed=3, max_response=9)
    seven = clock_model(0)[1].convert_tokens_to_ids(["#", "7", "<eos>"])
    monkeypatch.setattr(evaluation, "sample", lambda policy, requests, limits, *_, **__: (
        [seven if limit == 9 else [] for limit in limits], []))
    evaluation.main(["model", model, "--limit", "40"])
    heldout = clock_task(clock_model(0)[1], Settings(dataset="clock", seed=3, eval_size=40)).heldout
    found = json.loads(Path(results, "results.json").read_text())["benchmarks"]
    assert {name: b["avg@k"] for name, b in found.items()} == {
        f"clock: {name}": statistics.fmean(p.answer == "7" for p in problems)
        for name, problems in heldout.items()}

# ---- Comparisons of runs

def write_settings(name, method="trapo", seed=0, **changes):
    """A run's settings.json; its base is one of its seed."""
    settings = trapo.fill_in({"method": method, "seed": seed, "model": f"runs/base-seed{seed}",
                              "dataset": "clock", "out": name, "device": "cpu"} | changes)
    Path(name).mkdir(parents=True, exist_ok=True)
    Path(name, "settings.json").write_text(json.dumps(vars(settings)))

def write_run(name, method, seed, accuracy, tokens=1000, **changes):
    """A run's folder with two steps; its reward is the accuracy as well."""
    write_settings(name, method, seed, **changes)
    line = {"reward_unguided": accuracy, "guided": 0.5, "entropy": 1.0, "response_length": 9.0,
            "tokens_generated": tokens, "tokens_trained": 500, "seconds_sample": 1.0,
            "seconds_reward": 0.5, "seconds_update": 2.5, "seconds": 100.0}
    lines = [{"step": 0, "eval": {"held out": 0.0}},
             {"step": 1, **line, "reward_unguided": 0.9, "entropy": None},
             {"step": 2, **line, "eval": {"held out": accuracy, "greedy": 1.0}}]
    Path(name, "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"cut')
    return name

def four_runs():
    return [write_run("a0", "trapo", 0, 0.4), write_run("a1", "trapo", 1, 0.6),
            write_run("b0", "grpo", 0, 0.1, tokens=2000), write_run("b1", "grpo", 1, 0.2)]

def compared(capsys, *argv):
    """The columns of the first table that `eval.py runs` prints: method and number of seeds."""
    capsys.readouterr()
    evaluation.main(["runs", *argv, "--markdown"])
    (header,) = re.findall(r"^\|  \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    return header.split(" | ")

def test_runs_are_compared_with_students_interval_and_paired_by_seed(capsys):
    """.4 and .6 give .5 +- 12.706 x .1; the differences .3 and .4 give .35 +- 12.706 x .05."""
    evaluation.main(["runs", *four_runs(), "--against", "grpo", "--markdown"])
    means, differences = capsys.readouterr().out.split("difference to GRPO")
    assert "|  | TRAPO (2) | GRPO (2) |" in means
    assert "| held out | 0.500 ± 1.271 | 0.150 ± 0.635 |" in means
    assert "| greedy | 1.000 ± 0.000 | 1.000 ± 0.000 |" in means
    assert "| unguided reward, last tenth | 0.500 ± 1.271 | 0.150 ± 0.635 |" in means
    assert "| tokens generated, thousands | 2.000 ± 0.000 | 3.000 ± 12.706 |" in means
    assert "| seconds | 8.000 ± 0.000 | 8.000 ± 0.000 |" in means
    assert "|  | TRAPO (2) |" in differences
    assert "| held out | 0.350 ± 0.635 |" in differences

def test_runs_that_differ_in_more_than_the_seed_are_told_apart(capsys):
    """The name of a method gets the settings in which its variants differ; bases do not count."""
    runs = [*four_runs(), write_run("c0", "trapo", 0, 0.3, lr=1e-4)]
    evaluation.main(["runs", *runs, "--against", "TRAPO, lr=0.0004", "--markdown"])
    means, differences = capsys.readouterr().out.split("difference to")
    assert "|  | TRAPO, lr=0.0004 (2) | GRPO (2) | TRAPO, lr=0.0001 (1) |" in means
    assert "| held out | 0.500 ± 1.271 | 0.150 ± 0.635 | 0.300 |" in means
    assert "| held out | -0.350 ± 0.635 | -0.100 |" in differences

def test_settings_are_compared_by_value_and_those_that_do_not_matter_not_at_all(capsys):
    """-1 is -1.0, in a list too; a machine, or how often is saved, makes no other method."""
    one = write_run("one", "trapo", 0, 0.4, thresholds=[-1, 0.5, 0.7, 0.9], max_grad_norm=1)
    two = write_run("two", "trapo", 1, 0.5, bf16=True, micro_tokens=9, save_every=3, base_steps=7)
    assert compared(capsys, one, two) == ["TRAPO (2)"]
    pair = write_run("int", "trapo", 3, 0.5, lr=1), write_run("float", "trapo", 4, 0.5, lr=1.0)
    assert compared(capsys, *pair, one) == ["TRAPO, lr=1 (2)", "TRAPO, lr=0.0004 (1)"]
    odd = write_run("odd", "trapo", 2, 0.5, prefix_loss="sft")  # named even where it is alone
    assert compared(capsys, odd) == ["TRAPO, prefix_loss=sft (1)"]

def test_methods_are_named_as_a_person_says_them(capsys):
    """And what was trained before, if that was a run and not the common base."""
    write_settings("runs/base-seed0", "sft", dataset="clock-corpus", model=None)
    write_settings("sft-seed0", "sft")
    runs = [write_run(method, method, 0, 0.5) for method in METHODS]
    runs.append(write_run("both", "grpo", 0, 0.5, model="sft-seed0"))
    runs.append(write_run("half", "grpo", 1, 0.5, model="sft-seed0/checkpoint-5"))
    names = compared(capsys, *runs[:-1])
    assert names == [f"{name} (1)" for name in (
        "TRAPO", "micro-groups alone", "naive SFT mix", "micro-groups, LUFFY's loss",
        "fixed prefixes", "GRPO", "LUFFY", "SFT", "SFT, then GRPO")]
    assert compared(capsys, runs[-1]) == ["SFT, then GRPO (1)"]
    assert len(set(evaluation.COLOURS.values())) == 9 == len(
        {name.removesuffix(" (1)") for name in names} & evaluation.COLOURS.keys())

def test_what_trapo_writes_is_read_and_a_resumed_run_stays_the_same_method(base, capsys):
    """Two seeds, one of them resumed; SFT, which samples nothing; no evaluation in any."""
    main(tiny_run(base, "zero", "--steps", "2"))
    main(tiny_run(base, "one", "--steps", "1", "--seed", "1", "--thresholds", "-1", ".5", ".7",
                  ".9"))
    main(["--resume", "--out", "one", "--steps", "2"])
    main(tiny_run(base, "sft", "--steps", "2", "--method", "sft"))
    assert compared(capsys, "zero", "one", "sft") == ["TRAPO (2)", "SFT (1)"]

def drawn(monkeypatch, *argv):
    """The axes of the figure that --plot draws, by title."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, *_, **__: figures.append(figure))
    evaluation.main(["runs", *argv, "--plot", "curves.png"])
    return {axis.get_title(): axis for axis in figures[0].axes}

def test_every_method_and_seed_is_a_line_and_medians_are_thick(monkeypatch):
    """In each of six axes: a labelled line a method, the median of its seeds in the same colour."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    third = [write_run("a2", "trapo", 2, 0.45)]
    axes = drawn(monkeypatch, *four_runs(), *third)
    assert axes.keys() == {*evaluation.CURVES.values(), "tokens generated, thousands",
                           "held-out accuracy"}
    for axis in axes.values():
        thick = {line.get_label(): line for line in axis.lines if line.get_linewidth() > 1}
        assert thick.keys() == {"TRAPO", "GRPO"} and len(axis.lines) == 2 + 3 + 2
        for name, seeds in (("TRAPO", 3), ("GRPO", 2)):
            same = [line for line in axis.lines if line.get_color() == evaluation.COLOURS[name]]
            assert thick[name] in same and len(same) == 1 + seeds
    found = Counter(round(line.get_ydata()[-1], 3) for line in axes["held-out accuracy"].lines)
    assert found == {0.4: 1, 0.6: 1, 0.45: 2, 0.1: 1, 0.2: 1, 0.15: 1}  # two of them medians

def test_a_method_has_one_colour_everywhere_and_its_variants_other_strokes(monkeypatch):
    """Whatever is drawn beside it, and whatever its settings are."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    write_settings("sft-seed0", "sft")
    both = write_run("both", "grpo", 0, 0.5, model="sft-seed0")
    runs, other = four_runs(), write_run("c0", "trapo", 0, 0.3, lr=1e-4)
    found = defaultdict(set)
    for argv in ((*runs, other), (runs[2], other, both), (other,)):
        lines = [line for line in drawn(monkeypatch, *argv)["unguided reward"].lines
                 if line.get_linewidth() > 1]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)
        for line in lines:
            found[line.get_label().split(", lr")[0]].add(line.get_color())
    assert found == {name: {evaluation.COLOURS[name]}
                     for name in ("TRAPO", "GRPO", "SFT, then GRPO")}

# ---- Speed, and what is refused

def test_speed_measures_the_products_own_code(capsys):
    """Whole steps of three methods, at several batch sizes, and the sampler."""
    evaluation.main(["speed", "--prompts", "1", "2", "--max-response", "6", "--repeat", "1",
                     "--device", "cpu", "--bf16", "--recompute"])
    printed = capsys.readouterr().out
    for what in ("grpo, 8 rollouts", "trapo --no-speculate, 16 rollouts", "model.generate, 8 rows",
                 "trapo --speculate, 16 rollouts", "sampled, k tokens/s", "trained, k tokens/s",
                 "step, s", "MFU", "GiB", "matrix product"):
        assert what in printed

@pytest.mark.parametrize("name, parameters", [
    ("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-1.5B", 1_543_714_304), ("Qwen2.5-7B", 7_615_616_512)])
def test_random_models_have_the_size_of_the_real_ones(name, parameters):
    """The numbers of parameters that the real checkpoints have."""
    policy = evaluation.speed_model(f"random:{name}", "meta")
    assert sum(p.numel() for p in policy.parameters()) == parameters

def help_of(command, capsys):
    """What --help prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out

def refused(argv, capsys):
    """The one line that is printed before the program ends with exit code 2.

    It advises no flag that eval.py does not have.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(list(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ")
    assert not [line for line in lines[:-1] if "/s" not in line]  # progress bars: examples/s
    if argv[0] in ("model", "runs"):
        flags = "".join(help_of(command, capsys) for command in ("model", "runs", "speed"))
        advised = set(re.findall(r"--[a-z][a-z-]+", lines[-1])) - {*argv}
        assert advised <= set(re.findall(r"--[a-z][a-z-]+", flags)), lines[-1]
    return lines[-1]

def test_help_is_a_screen_a_subcommand(capsys, monkeypatch):
    """At most 30 lines of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    for command in ("model", "runs", "look", "speed"):
        assert len(help_of(command, capsys).splitlines()) <= 30

def test_bad_input_is_refused_in_one_line(stand_in, few, capsys, monkeypatch):
    """No such model, benchmark, column, run, method, flag: said in one line, exit code 2."""
    Path("bare.jsonl").write_text('{"problem": "1 + 1?"}\n')
    Path("empty.jsonl").touch()
    a0, _, b0, _ = four_runs()
    model = ("model", stand_in, "--out", "out")
    for argv, word in (
            (("model", "nowhere", "--on", "few.jsonl"), "nowhere"), (model, "--on"),
            ((*model, "--on", "gsm9k"), "gsm9k"), ((*model, "--on", "none.jsonl"), "none.jsonl"),
            ((*model, "--on", "few.csv"), "few.csv"), ((*model, "--on", "bare.jsonl"), "answer"),
            ((*model, "--on", "empty.jsonl"), "empty"),
            ((*model, "--on", "aime25"), "math-ai/aime25"),
            ((*model, "--on", "few.jsonl", "few.jsonl"), "once"),
            ((*model, "--on", "few.jsonl", "--temperature", "-1"), "--temperature"),
            ((*model, "--on", "few.jsonl", "--temperature", "nan"), "--temperature"),
            ((*model, "--on", "few.jsonl", "--samples", "-1"), "--samples"),
            ((*model, "--on", "few.jsonl", "--chunk", "0"), "--chunk"),
            (("model", stand_in, *FEW, "--out", "few.jsonl"), "few.jsonl"),
            ((*model, "--rescore"), "no samples"), (("runs", "nowhere"), "nowhere"),
            (("runs", a0, a0), "same seed"), (("runs", a0, "--against", "luffy"), "methods: TRAPO"),
            (("runs", a0, "--against", "trapo"), "in common"),
            (("runs", a0, b0, "--sideways"), "--sideways"), (("dance",), "dance"),
            (("speed", "--model", "random:Qwen3"), "Qwen3"),
            (("speed", "--prompts", "0"), "prompts"), (("speed", "--alpha", "2"), "alpha"),
            (("speed", "--max-response", "999", "--device", "cpu"), "256")):
        assert word in refused(argv, capsys), argv
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(("runs", a0, "--plot", "x.png"), capsys)

def test_a_picture_that_cannot_be_written_is_refused(capsys):
    """No such folder, no such kind of picture."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    run = write_run("a", "trapo", 0, 0.5)
    for path in ("no/x.png", "x.jsonl"):
        assert path in refused(("runs", run, "--plot", path), capsys)

@pytest.mark.parametrize("file, text, word", [
    ("settings.json", "", "settings.json"), ("settings.json", "[1]", "settings.json"),
    ("settings.json", '{"method": "trapo", "seed": 0, "dataset": ["clock"], "max_response": 9}',
     "settings.json"),
    ("settings.json", '{"method": "trapo", "seed": "0", "dataset": "clock", "max_response": 9}',
     "settings.json"),
    ("settings.json", None, "no settings.json"), ("metrics.jsonl", None, "No such file"),
    ("metrics.jsonl", "", "no finished step"), ("metrics.jsonl", "{\n", "metrics.jsonl"),
    ("metrics.jsonl", '{"step": 0, "eval": {}}\n', "no finished step"),
    ("metrics.jsonl", '{"step": 1, "tokens_generated": 5}\n', "reward_unguided"),
    ("metrics.jsonl", '[1, 2]\n', "metrics.jsonl"),
    ("metrics.jsonl", '{"step": "1", "tokens_generated": 5}\n', "metrics.jsonl"),
    ("metrics.jsonl", '{"step": 1, "eval": {"held out": "half"}}\n', "half"),
    ("metrics.jsonl", '{"step": 1, "note": "Où"}\n', "metrics.jsonl")])
def test_damaged_runs_are_refused_in_one_line(file, text, word, capsys):
    """Cut short, of another form, without a column, in another encoding, or not there."""
    path = Path(write_run("damaged", "trapo", 0, 0.5), file)
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    line = refused(("runs", "damaged"), capsys)
    assert "damaged" in line and word in line and re.search(r"leave|folder", line)

@pytest.mark.parametrize("file, text", [
    ("results.json", ""), ("results.json", "[1]"), ("results.json", "{}"),
    ("results.json", '{"settings": 3}'), ("samples-b-0.jsonl", '{"benchmark": "b"'),
    ("samples-b-0.jsonl", '{"benchmark": "b"}'), ("samples-b-0.jsonl", "[]"),
    ("samples.jsonl", json.dumps(record("b", 0, 0, 1) | {"correct": "yes"})),
    ("samples.jsonl", json.dumps(record("b", 0, 7, 1))), ("samples.jsonl", '"Où"')])
@pytest.mark.parametrize("flags", [["--rescore"], ["--on", "few.jsonl"]])
def test_damaged_results_and_samples_are_refused_in_one_line(file, text, flags, few, capsys):
    """With the file's name and a remedy, and before a model is loaded."""
    Path("out").mkdir()
    Path("out", file).write_bytes(text.encode("latin-1"))
    line = refused(("model", "nowhere", "--out", "out", *flags), capsys)
    assert f"out/{file}" in line and ("--out" in line or "delete" in line)

def test_a_full_disk_is_said_in_one_line(stand_in, few, capsys, monkeypatch):
    """With the file that could not be written; what was saved before is kept."""
    def full(path, text):
        if path.name == "samples-few-4.jsonl":
            raise OSError(28, "No space left on device")
        whole(path, text)
    whole = trapo.write_whole
    monkeypatch.setattr(trapo, "write_whole", full)
    line = refused(("model", stand_in, *FEW, "--out", "out"), capsys)
    assert "samples-few-4.jsonl" in line and "No space left" in line
    assert len(evaluation.read_saved(Path("out"))[1]) == 4

# ---- The page of a run's rollouts

HOSTILE = "</script><script>document.title = 1</script><img src=x onerror=document.title=2>"

def write_rollouts(name, steps=(5, 10), text=" 7"):
    """A run that kept two groups a step: of a hard prompt, and of an easy one, all right."""
    def rollout(m, expert, reward, advantage, text, probabilities, weight):
        return {"micro_group": m, "reward": reward, "advantage": advantage, "expert": expert,
                "text": text, "logprob": [p and math.log(p) for p in probabilities],
                "weight": weight}

    wrong = rollout(1, 0, 0.0, -0.5, ["#", text], [0.5, 0.2], [-0.5, -0.5])
    helped = rollout(2, 2, 1.0, 0.5, ["d", " +5", "\n"], [0.5, 0.03, 0.2], [1.0, 0.3, 0.5])
    given = [rollout(m, 1, 1.0, 0.5, ["d"], [0.5], [1.0]) for m in (3, 4)]
    easy = [rollout(m, 0, 1.0, 0.0, [" "], [None], [0.0]) for m in (1, 1, 1, 1, 2, 2, 3, 4)]
    groups = [{"step": step, "prompt": prompt, "rollouts": rollouts} for step in steps for
              prompt, rollouts in (("hard", [wrong] * 4 + [helped] * 2 + given), (text, easy))]
    Path(write_run(name, "trapo", 0, 0.5), "rollouts.jsonl").write_text(
        "".join(json.dumps(group) + "\n" for group in groups) + '{"cut')
    return groups

def looked_at(name):
    """The page that `eval.py look` writes."""
    evaluation.main(["look", name])
    return Path(name, "rollouts.html").read_text()

def test_look_writes_a_page_that_holds_the_rollouts_and_loads_nothing(capsys):
    """Text of a run cannot end the script that holds it; the last line may be torn."""
    groups = write_rollouts("a", text=HOSTILE)
    page = looked_at("a")
    assert capsys.readouterr().out == "open a/rollouts.html in a browser\n"
    assert page.count("<script") == page.count("</script") == 1 and "<img" not in page
    assert not re.search("https?:|//[a-z]|@import|url[(]|src=(?!x)", page)
    held = json.loads(re.search("const run = (.*), steps =", page)[1])
    assert held["groups"] == groups and held["alpha"] == 0.1 and held["sizes"] == [4, 2, 1, 1]
    assert held["reward_unguided"] == [[1, 0.9], [2, 0.5]]

@pytest.mark.parametrize("text, word", [
    (None, "no rollouts yet"), ("", "no rollouts yet"), ('{"step": 5', "no rollouts yet"),
    ("{\n", "delete"), ("[1]\n", "delete"), ("{}\n", "delete"), ('{"step": 5}\n', "delete"),
    ('{"step": 5, "rollouts": [{"text": ["a"], "logprob": [], "weight": [1], "expert": 0}]}\n',
     "no group"), ("Où\n", "delete")])
def test_look_refuses_what_it_cannot_show_in_one_line(text, word, capsys):
    """No rollouts, damaged ones, no run, and a page that cannot be written."""
    path = Path(write_run("a", "trapo", 0, 0.5), "rollouts.jsonl")
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    line = refused(("look", "a"), capsys)
    assert word in line and "a/rollouts.jsonl" in line and not Path("a/rollouts.html").exists()
    assert "nowhere" in refused(("look", "nowhere"), capsys)
    write_rollouts("a")
    Path("a/rollouts.html").mkdir()
    assert "cannot write a/rollouts.html" in refused(("look", "a"), capsys)

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """(command, path, ...) -> what a real browser answers: the WebDriver protocol over HTTP."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]
    wanted = {"goog:loggingPrefs": {"browser": "ALL"},
              "goog:chromeOptions": {"binary": chromium, "args": flags}}
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as process:
        started = next(line for line in process.stdout if "successfully on port" in line)
        root = f"http://127.0.0.1:{re.search('port ([0-9]+)', started)[1]}/session"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def call(path, method="POST", **body):
            data = json.dumps(body).encode() if method == "POST" else None
            with direct.open(urllib.request.Request(root + path, data, method=method)) as answer:
                return json.load(answer)["value"]

        session = "/" + call("", capabilities={"alwaysMatch": wanted})["sessionId"]
        try:
            yield lambda path, **body: call(session + path, **body)
        finally:
            call(session, "DELETE")
            process.terminate()

class Page:
    """A page of the disk in a browser window of that width."""
    def __init__(self, browser, path, width=900, dark=False):
        self.browser = browser
        for command, params in (
                ("setDeviceMetricsOverride", {"width": width, "height": 800, "mobile": False,
                                              "deviceScaleFactor": 1}),
                ("setEmulatedMedia", {"features": [{
                    "name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})):
            browser("/goog/cdp/execute", cmd=f"Emulation.{command}", params=params)
        browser("/url", url=Path(path).absolute().as_uri())

    def run(self, script):
        return self.browser("/execute/sync", script=script, args=[])

    def text(self, name):
        return self.run(f"return document.getElementById('{name}').textContent")

    def element(self, selector):
        return self.browser("/element", using="css selector", value=selector)

    def press(self, selector, key):
        (name,) = self.element(selector).values()
        self.browser(f"/element/{name}/value", text=key)

    def point_at(self, selector):
        move = {"type": "pointerMove", "origin": self.element(selector), "x": 0, "y": 0}
        self.browser("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def errors(self):
        return self.browser("/se/log", type="browser")

ARROW_LEFT, ARROW_RIGHT = "\ue012", "\ue014"

def test_look_in_a_browser_tells_what_decided_on_help_and_what_a_token_weighs(browser):
    """By pointer and by keyboard: p and weight of an expert's token outside the trust region."""
    write_rollouts("a")
    looked_at("a")
    page = Page(browser, "a/rollouts.html")
    headings = "return [...document.querySelectorAll('h2')].map(h => h.textContent)"
    assert page.run(headings) == [
        "micro-group 1: no help",
        "micro-group 2: mean return so far 0 < .5, so it gets 20 % of the solution",
        "micro-group 3: mean return so far .33 < .7, so it gets 50 % of the solution",
        "micro-group 4: mean return so far .43 < .9, so it gets 100 % of the solution"]
    row = ".row:nth-of-type(5) "  # the first one helped
    told = 'token "+5": the expert\'s, p = .03, outside the trust region, weight .3 of SFT\'s'
    page.point_at(row + ".token:nth-child(2)")
    assert page.text("status") == told
    page.point_at(row + ".token:nth-child(3)")
    assert page.text("status") == (
        'token "⏎": the policy\'s own, p = .2, weight .5, its advantage')
    page.press(row + ".token:nth-child(1)", ARROW_RIGHT)  # walks on to the second
    assert page.text("status") == told and page.text("step") == "5"
    page.press("#prompt", "2")
    assert page.run(headings)[3] == "micro-group 4: mean return so far 1 is not < .9: no help"
    page.point_at(".token[role]")
    assert page.text("status") == 'token "␣": the policy\'s own, p not known, weight 0'
    assert page.errors() == []

def test_look_in_a_browser_steps_by_keys_and_buttons(browser):
    """The slider, the page and the buttons; at an end they stay there. The prompt is kept."""
    write_rollouts("a", (5, 10, 120))
    looked_at("a")
    page = Page(browser, "a/rollouts.html")
    page.press("#prompt", "2")
    for selector, key, step in (("#slider", ARROW_RIGHT, "10"), ("body", ARROW_RIGHT, "120"),
                                ("body", ARROW_RIGHT, "120"), ("#slider", ARROW_LEFT, "10"),
                                ("button", " ", "5"), ("button", " ", "5"),
                                ("button + button", " ", "10")):
        page.press(selector, key)
        assert page.text("step") == step and page.text("caption").startswith(f"Step {step}:")
        assert page.run("return document.getElementById('prompt').value") == "2"
    assert page.errors() == []

@pytest.mark.parametrize("width", [360, 900])
def test_look_in_a_browser_shows_text_as_text_and_never_scrolls_sideways(browser, width):
    """Markup does nothing; long tokens wrap; a long rollout is a window of its own."""
    groups = write_rollouts("a", text=HOSTILE + "x" * 400)
    write_settings("a", dataset=f"/{'long' * 100}.jsonl")
    long = groups[0]["rollouts"][0]
    for key in ("text", "logprob", "weight"):
        long[key] = long[key] * 400
    with Path("a/rollouts.jsonl").open("w") as file:
        file.writelines(json.dumps(group) + "\n" for group in groups)
    looked_at("a")
    page = Page(browser, "a/rollouts.html", width)
    assert page.run("return document.title") == "TRAPO, token by token"
    assert HOSTILE in page.text("group")
    assert page.run("return document.querySelectorAll('img, #group script').length") == 0
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("return document.querySelector('.row').clientHeight") < 400
    assert page.errors() == []

@pytest.mark.parametrize("dark", [False, True])
def test_look_in_a_browser_has_enough_contrast_in_light_and_dark(browser, dark):
    """WCAG's ratio of every text to what is behind it: at least 4.5."""
    def channels(colour):  # "rgb(1, 2, 3)" or "color(srgb 0.1 0.2 0.3 / 0.5)"
        numbers = [float(x) for x in re.findall("[0-9.e-]+", colour.removeprefix("color(srgb"))]
        return [x / 255 for x in numbers[:3]] + numbers[3:] if "rgb(" in colour else numbers

    def luminance(rgb):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
        return sum(x * weight for x, weight in zip(linear, (0.2126, 0.7152, 0.0722)))

    write_rollouts("a")
    looked_at("a")
    page = Page(browser, "a/rollouts.html", dark=dark)
    *pairs, (_, behind) = page.run(
        "return [...document.querySelectorAll('.token, h1, h2, p, label, .row, #status')].map("
        "e => getComputedStyle(e)).map(style => [style.color, style.backgroundColor])")
    behind = channels(behind)
    assert (luminance(behind) < 0.1) == dark and len(pairs) > 20
    for text, fill in pairs:
        *fill, share = (*channels(fill.replace("rgba", "rgb")), 1)[:4]
        fill = [share * x + (1 - share) * y for x, y in zip(fill, behind)]
        low, high = sorted((luminance(channels(text)[:3]), luminance(fill)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, fill)


# ==== The study: .ci/study.py, its other teachers, and what the pages say of it ==================

@pytest.fixture(scope="module")
def study():
    """.ci/study.py as a module."""
    spec = importlib.util.spec_from_file_location("study", HERE / ".ci" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_teacher_solves_the_same_questions(study, monkeypatch):
    _, tokenizer = clock_model(0)
    args = trapo.fill_in({"dataset": "clock", "seed": 3})
    usual = clock_task(tokenizer, args)
    rewards = {}
    for expert in "clean", "noisy", "wrong":
        with monkeypatch.context() as patch:
            patch.setattr(trapo, "clock_problem", trapo.clock_problem)
            study.teach_by(expert)
            other = clock_task(tokenizer, args)
        assert [(p.prompt_ids, p.answer) for p in other.train] == [
            (p.prompt_ids, p.answer) for p in usual.train]
        assert {name: [(p.prompt_ids, p.answer) for p in problems]
                for name, problems in other.heldout.items()} == {
            name: [(p.prompt_ids, p.answer) for p in problems]
            for name, problems in usual.heldout.items()}
        rewards[expert] = statistics.mean(other.reward(p, p.solutions[0]) for p in other.train)
    assert rewards["clean"] == rewards["noisy"] == 1 and 0.75 < rewards["wrong"] < 0.85


def test_a_clean_teacher_writes_what_the_world_calls_worked(study):
    _, tokenizer = clock_model(0)
    for seed in range(20):
        problem = trapo.clock_problem(tokenizer, random.Random(seed), 7, "?")
        prompt = tokenizer.convert_ids_to_tokens(problem.prompt_ids)
        words = study.solve(prompt, random.Random(0), *study.EXPERTS["clean"])
        assert tokenizer.convert_tokens_to_ids(words) == problem.solutions[0]


def test_a_run_is_counted_as_right_half_the_time_from_the_first_mean_of_five_steps(study, tmp_path,
                                                                                  monkeypatch):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    flags = {"method": "grpo", "lr": 1e-3, "seed": 1, "steps": 10}
    rewards = [0, 0, 0, 1, 1, 0, 1, 0, 0, 0]  # means of five from step 5 on: .4 .4 .6 ...
    lines = [{"step": i, "reward_unguided": reward, "tokens_generated": 100, "tokens_trained": 10,
              "seconds": 1.0, "guided": 0.5, "entropy": None, "prefix_outside_share": None}
             for i, reward in enumerate(rewards, 1)]
    lines[-1]["eval"] = {"in range": 0.25}
    folder = study.folder_of(flags)
    folder.mkdir()
    folder.joinpath("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = study.summary([flags])
    assert (found["half"], found["tokens_to_half"], found["accuracy"]) == (7, 700, [0.25])
    assert found["reward"] == [30] and found["guided"] == [50] and found["entropy"] == [None]


def test_the_pages_tables_are_those_of_the_studys_lines(study):
    page = HERE.joinpath(".github", "results.md").read_text()
    assert study.with_tables(page) == page


def test_the_readme_says_what_the_studys_lines_say(study):
    readme = HERE.joinpath("README.md").read_text()
    rates = study.frame("rates")
    for method, runs in study.frame("main").groupby("method"):
        accuracy = study.interval(runs["in range"]).replace("0.", ".")
        steps = study.until(rates[(rates.method == method) & (rates.lr == study.USUAL)])
        row, = re.findall(rf"^\|{re.escape(method)}\|.*$", readme, re.M)
        assert row.endswith(f"|{accuracy}|{steps}|")


# ==== A really pretrained model: SmolLM2-135M-Instruct, made by .ci/smollm2.py ===================

SMOLLM2 = os.environ.get("TRAPO_SMOLLM2")
with_smollm2 = pytest.mark.skipif(
    not SMOLLM2, reason="TRAPO_SMOLLM2 names no folder (python .ci/smollm2.py makes one)")
SHORT_GSM8K = [
    {"question": f"Tom has {n} apples and buys {m} more. How many apples does Tom have?",
     "answer": f"Tom has {n} + {m} = <<{n}+{m}={n + m}>>{n + m} apples.\n#### {n + m}"}
    for n, m in zip(range(2, 14), (3, 5, 4, 7, 6, 9, 8, 2, 5, 3, 7, 4))]


@pytest.fixture(scope="module")
def smollm2():
    """The model and its tokenizer, as load_policy gives them."""
    return load_policy(SMOLLM2)


@with_smollm2
def test_a_real_chat_model_answers_through_its_template_and_stops(smollm2):
    """The template is the model's, <|im_end|> ends the response, and 2 + 3 is 5."""
    policy, tokenizer = smollm2
    prompt = trapo.prompt_tokens("What is 2 + 3? Answer with a number.", tokenizer)
    text = tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>") and text.endswith("<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in policy.generation_config.eos_token_id
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}],
                                          tokenize=True, add_generation_prompt=True,
                                          return_dict=False)
    (answer,), _ = sample(policy, [plain], [24], 0.0)
    assert "5" in tokenizer.decode(answer) and answer[-1] in policy.generation_config.eos_token_id


@with_smollm2
def test_on_a_real_model_greedy_sampling_and_log_probs_are_transformers_own(smollm2):
    """Tokens of model.generate on ragged prompts, and log-probs of its own logits."""
    policy, tokenizer = smollm2
    requests = [trapo.prompt_tokens(row["question"], tokenizer) for row in SHORT_GSM8K[:3]]
    requests[1] = requests[1][-20:]  # ragged
    completions, logprobs = sample(policy, requests, [12] * 3, 0.0)
    for request, completion, drawn in zip(requests, completions, logprobs):
        ids = torch.tensor([request])
        expected = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12)[0, len(request):].tolist()
        assert completion == expected
        with torch.no_grad():
            logits = policy(torch.tensor([request + completion])).logits[0, len(request) - 1:-1]
            (ours,), _ = token_logprobs(policy, [request + completion], [len(request)])
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(drawn), own, rtol=0, atol=1e-4)


@with_smollm2
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_two_steps_on_a_real_model_are_saved_loaded_evaluated_and_resumed(precision):
    """From weights to a result on GSM8K's rows: trapo trains, transformers loads, eval.py measures.

    The master weights and what is saved are fp32, whatever the precision of the computation.
    """
    datasets.Dataset.from_list(SHORT_GSM8K).to_json("rows.jsonl")
    flags = ["--model", SMOLLM2, "--dataset", "rows.jsonl", "--out", "run", "--prompts", "1",
             "--max-response", "40", "--eval-size", "0", "--lr", "1e-4", "--save-every", "1",
             "--micro-tokens", "1024", "--sizes", "1", "1", "1", "1", precision]
    main([*flags, "--steps", "1"])
    main([*flags, "--steps", "2", "--resume"])
    first, second = metrics_of("run")
    assert (first["step"], second["step"]) == (1, 2)
    gap = first["logprob_gap"]
    assert gap < 1e-3 if precision == "--no-bf16" else 1e-3 < gap < 0.3
    assert first["guided_4"] == 1 and 0 < first["prefix_p"] < 1 and first["grad_norm"] > 0
    trained = transformers.AutoModelForCausalLM.from_pretrained("run")
    origin = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not torch.equal(trained.lm_head.weight, origin.lm_head.weight)
    assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()
    evaluation.main(["model", "run", "--on", "rows.jsonl", "--limit", "2", "--max-tokens", "12"])
    results = json.loads(Path("run/eval/results.json").read_text())
    assert results["benchmarks"]["rows"]["problems"] == 2
