"""The facts that trapo.py stands on, in the order of its parts: a second way to read it.

Every test states one fact of the method in its name. Nothing is downloaded: the models are tiny and
made here. `pytest test_trapo.py` takes some minutes on a CPU.
"""
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface is imported: a test never asks the network

import datasets
import pandas
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import trapo
from trapo import (METHODS, InputError, MicroGroup, Problem, Rollout, Task, accumulate_gradients,
                   checkpoints, clock_model, clock_task, expert_prefix, group_advantages, is_guided,
                   is_inert, load_policy, load_rows, luffy_loss, main, make_problems, math_reward,
                   math_task, micro_batches, parse_args, policy_gradient_loss, sample,
                   sample_groups, token_logprobs, train_step, trsft_loss)

torch.set_num_threads(1)  # tiny matrices: more threads would only wait for each other
HERE = Path(trapo.__file__).parent
GSM8K = HERE.parent / "shared" / "data" / "gsm8k_train.jsonl"
INF = math.inf


@pytest.fixture(autouse=True)
def own_world(tmp_path_factory, monkeypatch):
    """Every test works in a folder of its own, and gets its Ctrl-C back afterwards."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
    yield
    signal.signal(signal.SIGINT, before)


def settings(*flags, **changes):
    """The settings of a command line, and changes that it would not allow."""
    args = parse_args([*flags, "--out", "unused"])
    return Namespace(**{**vars(args), **changes})


def gradient(function, *inputs):
    """d sum(function) / d first input, in float64."""
    x = torch.tensor(inputs[0], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(x, *inputs[1:]).sum(), x)[0]


# ==== Part 1. The losses =========================================================================

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


def test_policy_gradient_on_policy_is_minus_the_advantage():
    """With old = logprobs.detach() the ratio is 1 and the gradient -A, whether clipped or not."""
    advantages = torch.tensor([0.625, -0.375, 0.0], dtype=torch.float64)
    for clip in (None, 0.2):
        found = gradient(lambda new: policy_gradient_loss(new, new.detach(), advantages, clip),
                         [-0.1, -2.0, -5.0])
        torch.testing.assert_close(found, -advantages)


@pytest.mark.parametrize("ratio, advantage, clipped", [
    (1.5, 1.0, True), (1.5, -1.0, False), (0.5, 1.0, False), (0.5, -1.0, True), (1.1, 1.0, False)])
def test_ppo_clip_stops_only_moves_that_went_far_enough(ratio, advantage, clipped):
    """Gradient -ratio * A, but 0 once the ratio has left [0.8, 1.2] the way that A pushes it."""
    old = torch.tensor([-3.0], dtype=torch.float64)
    new, advantages = [-3.0 + math.log(ratio)], torch.tensor([advantage], dtype=torch.float64)
    free = gradient(policy_gradient_loss, new, old, advantages)
    assert free.item() == pytest.approx(-ratio * advantage)
    found = gradient(policy_gradient_loss, new, old, advantages, 0.2)
    assert found.item() == (0 if clipped else free.item())


def test_advantage_is_the_reward_minus_the_groups_mean():
    """Group by group, and not divided by the standard deviation."""
    rewards = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1.]])
    expected = torch.tensor([[0.75, *[-0.25] * 6, 0.75], [0.0] * 8])
    assert torch.equal(group_advantages(rewards), expected)
    assert torch.equal(group_advantages(rewards.view(2, 1, 8)), expected.view(2, 1, 8))


# ==== Part 2. Adaptive guidance ==================================================================

PAPER = [MicroGroup(4, 0.0, -1), MicroGroup(2, 0.2, 0.5), MicroGroup(1, 0.5, 0.7),
         MicroGroup(1, 1.0, 0.9)]
WRONG, RIGHT = 0, 1                                    # tokens that decide a response's reward
SOLUTION = [10, 11, 12, 13, 14, 15, 16, 17, 18, RIGHT]  # ten tokens; the last plays the EOS


def score(problem, response):
    """A response is as good as its last token says."""
    return float(response[-1] == RIGHT)


class Script:
    """A `generate` that gives each request the next outcome, and writes down what it was asked."""
    def __init__(self, outcomes):
        self.outcomes, self.calls = iter(outcomes), []

    def __call__(self, requests, limits):
        self.calls.append((requests, limits))
        return [[next(self.outcomes)] for _ in requests]


def draw(outcomes, problems=None, schedule=PAPER, **options):
    """sample_groups on a script: (groups, the script)."""
    problems = problems or [Problem([5], [SOLUTION], "")]
    script = Script(outcomes)
    return sample_groups(problems, schedule, script, score, random.Random(0), **options), script


@pytest.mark.parametrize("returns, threshold, guided", [
    ([], -1, False), ([], 0.5, True), ([0, 0, 0, 0], -1, False), ([0, 0, 0, 0], 0.5, True),
    ([1, 0, 0, 0], 0.5, True), ([1, 1, 0, 0], 0.5, False), ([1, 1, 1, 0], 0.5, False),
    ([1, 1, 0, 0, 1, 1], 0.7, True), ([1, 1, 1, 0, 1, 1], 0.7, False),
    ([1, 1, 1, 1, 1, 1, 0], 0.9, True), ([1, 1, 1, 1, 1, 1, 1], 0.9, False),
    ([1, 1, 1, 1], INF, True), ([0, 0, 0, 0], -INF, False)])
def test_help_comes_if_the_mean_return_so_far_is_below_the_threshold(returns, threshold, guided):
    """Strictly below: 2 right of 4 get no help at 0.5. -1 is never, inf is always."""
    assert is_guided([float(r) for r in returns], MicroGroup(1, 0.5, threshold)) is guided


@pytest.mark.parametrize("length, ratio, cut", [
    (10, 0.0, 0), (10, 0.2, 2), (10, 0.5, 5), (10, 1.0, 10), (7, 0.2, 1), (8, 0.2, 2), (9, 0.5, 4),
    (1, 0.2, 0), (1, 1.0, 1), (3, 1.0, 3)])
def test_expert_prefix_is_the_first_share_of_the_solution_rounded(length, ratio, cut):
    """round(ratio * length) tokens; at ratio 1 all of them, EOS included."""
    solution = list(range(100, 100 + length))
    assert expert_prefix(solution, ratio) == solution[:cut]


def test_snapped_prefix_moves_on_to_the_next_paragraph_break_if_near():
    """The released code's cut: behind a break within 30 % of the length after the cut."""
    text = [0, 7, 0, 7, 0, 0, 0, 0, 0, 7]  # 7 ends a paragraph
    breaks = frozenset([7])
    assert expert_prefix(text, 0.2, breaks) == text[:4]  # moved behind the break
    assert expert_prefix(text, 0.5, breaks) == text[:5]  # the next break is 5 tokens off: too far
    assert expert_prefix(text, 0.0, breaks) == []        # no help stays no help
    assert expert_prefix(text, 1.0, breaks) == text


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
        ([[5]], [30])]  # the second problem's complete solution is not generated from
    assert groups[0] == [Rollout([5], [], [1], 1.0, m) for m in (0, 0, 0, 0, 1, 1, 2, 3)]
    assert groups[1] == [*[Rollout(hard, [], [0], 0.0, 0)] * 4,
                         *[Rollout(hard, SOLUTION[:2], [0], 0.0, 1)] * 2,
                         Rollout(hard, SOLUTION[:5], [0], 0.0, 2),
                         Rollout(hard, SOLUTION, [], 1.0, 3)]  # scored all the same


def test_what_is_scored_is_prefix_and_completion_together():
    """The score sees the whole response, and not the prompt."""
    seen = []
    sample_groups([Problem([5], [SOLUTION], "")], PAPER, Script([0] * 7),
                  lambda problem, response: seen.append(response) or 0.0, random.Random(0))
    assert seen == [[0]] * 4 + [SOLUTION[:2] + [0]] * 2 + [SOLUTION[:5] + [0]] + [SOLUTION]


@pytest.mark.parametrize("speculate", [False, True])
def test_a_problem_without_a_solution_is_never_guided(speculate):
    """However badly it goes: 8 free rollouts, and 8 requests, speculating or not."""
    (group,), script = draw([0] * 8, [Problem([5], [], "")], speculate=speculate)
    assert [r.prefix for r in group] == [[]] * 8
    assert [request for requests, _ in script.calls for request in requests] == [[5]] * 8


def test_each_guided_micro_group_picks_one_of_several_solutions():
    """One and the same for its rollouts; another micro-group may pick another."""
    first, second = [20] * 10, [30] * 10
    picks = set()
    for seed in range(40):
        (group,) = sample_groups([Problem([5], [first, second], "")], PAPER, Script([0] * 7), score,
                                 random.Random(seed))
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
            return [[o] for o in outcomes]

        (group,) = sample_groups([Problem([5, 6], [SOLUTION], "")], schedule, generate, score,
                                 random.Random(0), speculate)
        kept = tuple((len(r.prefix), r.completion[0], r.reward, r.micro_group) for r in group)
        probabilities[kept] += math.prod(weights) * Fraction(1, 2 ** len(unseen))
        assert len(unseen) == (0 if speculate else 3)
    return dict(probabilities)


def test_speculation_has_exactly_the_distribution_of_the_sequential_walk():
    """By enumeration, in fractions: not one group is a hair more or less likely."""
    assert sum(law(True).values()) == 1
    assert law(True) == law(False)


def test_speculation_asks_eleven_requests_a_prompt_in_one_call():
    """8 free ones, 2 + 1 guided ones; the complete solution needs none, free branches included."""
    problems = [Problem([5], [SOLUTION], ""), Problem([6], [SOLUTION], "")]
    groups, script = draw([0] * 22, problems, speculate=True)
    ((requests, limits),) = script.calls
    assert len(requests) == len(limits) == 22
    assert Counter(map(tuple, requests)) == {
        (p, *SOLUTION[:n]): count for p in (5, 6) for n, count in ((0, 8), (2, 2), (5, 1))}
    assert [[len(r.prefix) for r in group] for group in groups] == [[0, 0, 0, 0, 2, 2, 5, 10]] * 2


@pytest.mark.parametrize("method, requests", [("grpo", 8), ("luffy", 7), ("sft", 0),
                                              ("fixed-prefix", 7)])
def test_speculation_draws_nothing_that_no_threshold_can_choose(method, requests):
    """A threshold of -1 or inf leaves one branch only (and sft generates nothing at all)."""
    _, script = draw([0] * 8, schedule=settings("--method", method).schedule, speculate=True)
    assert sum(len(asked) for asked, _ in script.calls) == requests


# ==== Part 3. The policy =========================================================================

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


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


RAGGED = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [3, 4, 5], [14, 15], [16, 17, 18]] * 3
LIMITS = [9, 12, 5, 1, 0, 12] * 3


def distributions(policy, sequence, start, temperature=1.0):
    """[N, V] log-probs of the N tokens from `start` on: the naive way, a full forward pass."""
    logits = policy(torch.tensor([sequence])).logits[0, start - 1:-1]
    return (logits / temperature).log_softmax(-1)


def naive(policy, sequence, start, temperature=1.0):
    """[N] log-probs of the tokens themselves."""
    targets = torch.tensor(sequence[start:])
    return distributions(policy, sequence, start, temperature).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("static", [False, True])
def test_greedy_sampling_equals_generate(policy, static):
    """Temperature 0: the tokens of model.generate, request by request, whatever the padding."""
    clean = copy.deepcopy(policy)
    clean.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    expected = [clean.generate(torch.tensor([r]), attention_mask=torch.ones(1, len(r)),
                               do_sample=False, max_new_tokens=n)[0, len(r):].tolist() if n else []
                for r, n in zip(RAGGED, LIMITS)]
    assert sample(policy, RAGGED, LIMITS, 0.0, static)[0] == expected
    assert any(c[-1:] in ([1], [2]) for c in expected) and any(len(c) == 12 for c in expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_the_samplers_log_probs_are_those_of_full_forwards(policy, temperature):
    """Of what was drawn, under softmax(logits / temperature); greedy reports softmax(logits)."""
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
    for completion, scores, limit in zip(completions, logprobs, LIMITS * 8):
        assert len(scores) == len(completion) <= limit
        assert not set(completion[:-1]) & set(EOS)
        assert len(completion) == limit or completion[-1] in EOS
        endings[completion[-1] if completion and completion[-1] in EOS else "limit"] += 1
    assert len(endings) == 3 and min(endings.values()) > 2  # both EOS ids and the limit occur


def test_what_a_request_draws_depends_on_neither_batch_nor_cache(policy):
    """Equal tokens and log-probs whatever --kv-tokens splits, and with a static cache."""
    results = []
    for options in ({}, {"kv_tokens": 1}, {"kv_tokens": 40}, {"static": True},
                    {"static": True, "kv_tokens": 40}):
        torch.manual_seed(7)
        results.append(sample(policy, RAGGED, LIMITS, 1.0, **options))
    completions, logprobs = results[0]
    for others, scores in results[1:]:
        assert others == completions
        for a, b in zip(logprobs, scores):
            assert a == pytest.approx(b, abs=1e-9)


def test_sampling_leaves_the_policy_as_it_was(policy):
    """Train or eval mode, no gradients; and nothing to draw is no error."""
    for mode in (True, False):
        policy.train(mode)
        assert sample(policy, [[3, 4]], [0]) == ([[]], [[]])
        sample(policy, [[3, 4]], [3])
        assert policy.training is mode
    assert sample(policy, [], []) == ([], [])
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())


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
    assert [len(row) for row in logprobs] == [4, 1, 3, 0]  # nothing to score is no error
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


SMALL = dict(vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
             pad_token_id=0, eos_token_id=2, bos_token_id=None)
SCALED = [transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0),
          transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
          transformers.CohereConfig(**SMALL, logit_scale=0.25),
          transformers.MistralConfig(**SMALL, sliding_window=4)]


@pytest.mark.parametrize("config", SCALED, ids=lambda config: config.model_type)
def test_a_model_that_token_logprobs_or_sample_would_get_wrong_is_refused(config, tokenizer):
    """Logits capped or scaled, attention that slides: load_policy compares, and says so."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("scaled")
    tokenizer.save_pretrained("scaled")
    with pytest.raises(InputError, match="logits"):
        load_policy("scaled")


def test_loaded_policies_have_fp32_master_weights_and_all_eos_ids(stand_in):
    """At a learning rate of 5e-6, updates of bf16 weights would round to nothing."""
    half = transformers.AutoModelForCausalLM.from_pretrained(stand_in, dtype=torch.bfloat16)
    half.save_pretrained("half")
    transformers.AutoTokenizer.from_pretrained(stand_in).save_pretrained("half")
    policy, tokenizer = load_policy("half")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(policy.generation_config.eos_token_id) == set(ends)


# ==== Part 4. The update =========================================================================

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
    accumulate_gradients(policy, [replace(r, logprobs=[]) for r in batch], args)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]


def reference_gradient(policy, batch, args):
    """The loss as the issue writes it: one rollout at a time, nothing skipped, nothing padded."""
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
    """Whatever the micro-batch budget, the order, or the skipping of inert rollouts, to 1e-10."""
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


def test_inert_rollouts_are_those_without_advantage_or_prefix_loss():
    """And they cost nothing: a batch of them never reaches the policy."""
    whole, guided, free = BATCH[3:6]
    for kind, supervised in (("trsft", True), ("sft", True), ("luffy", False), ("none", False)):
        assert is_inert(free, kind) and not is_inert(replace(free, advantage=-0.25), kind)
        assert is_inert(guided, kind) is not supervised
        assert not is_inert(replace(guided, advantage=0.5), kind)
        assert is_inert(whole, kind) is (kind == "none")  # no token of its own
    nothing = Table(torch.zeros(0, 30))
    assert accumulate_gradients(nothing, [free, guided], settings("--method", "micro")) == 0.0


class Table(torch.nn.Module):
    """A policy whose logits at place t are its parameters, row t: gradients can be read off."""
    def __init__(self, rows):
        super().__init__()
        self.rows, self.device = torch.nn.Parameter(rows), torch.device("cpu")

    def base_model(self, input_ids, use_cache=False):
        return Namespace(last_hidden_state=self.rows[None, :input_ids.shape[1]])

    def get_output_embeddings(self):
        return torch.nn.Identity()


def token_weights(rollout, advantage, old=None, **changes):
    """The gradient on each token's log-prob, first to last, read off a Table; and the log-probs."""
    sequence = rollout.prompt + rollout.prefix + rollout.completion
    rows = torch.randn(len(sequence), 30, generator=torch.Generator().manual_seed(0)).double() * 2
    table, args = Table(rows), settings("--max-response", "10", "--alpha", "0.01", **changes)
    rollout = replace(rollout, advantage=advantage, logprobs=[] if old is None else old.tolist())
    accumulate_gradients(table, [rollout], args)
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
        clipped = (logp[2:8].exp() / 0.01).clamp(max=1)
        assert 0 < (clipped < 1).sum() < 6  # inside and outside the trust region
        torch.testing.assert_close(prefix, -clipped)
        torch.testing.assert_close(completion, torch.full_like(completion, -advantage))


def test_with_several_updates_completions_are_clipped_and_prefixes_are_not():
    """The ratio to the first pass's log-probs stops a completion token; TrSFT knows no ratio."""
    rollout = Rollout([3], [4, 5], [6, 7, 8], 1.0, 1)
    _, logp = token_weights(rollout, 1.0)
    old = logp - torch.tensor([2.0, 2, 1.5, 1.1, 0.5], dtype=torch.float64).log()
    plain, _ = token_weights(rollout, 1.0, old)
    torch.testing.assert_close(plain[2:], -torch.tensor([1.5, 1.1, 0.5], dtype=torch.float64))
    clipped, _ = token_weights(rollout, 1.0, old, updates=2, clip=0.2)
    torch.testing.assert_close(clipped[2:], -torch.tensor([0, 1.1, 0.5], dtype=torch.float64))
    assert torch.equal(plain[:2], clipped[:2]) and (clipped[:2] < 0).all()


def test_the_first_pass_remembers_the_log_probs_that_later_ones_compare_with():
    """They are left on the rollout once, and then kept."""
    policy, rollouts = tiny_policy(), [replace(r, logprobs=[]) for r in BATCH[:3]]
    accumulate_gradients(policy, rollouts, settings())
    first = [list(r.logprobs) for r in rollouts]
    for r in rollouts:
        expected = naive(policy, r.prompt + r.prefix + r.completion, len(r.prompt))
        assert r.logprobs == pytest.approx(expected.tolist(), abs=1e-12)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    accumulate_gradients(policy, rollouts, settings(updates=2))
    assert [r.logprobs for r in rollouts] == first


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


# ==== Part 5. Data and reward ====================================================================

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


def read(tokenizer, *rows, **limits):
    """make_problems on rows: a list of (prompt, solutions, answer) as text."""
    args = Namespace(dataset="rows", **{"max_prompt": 500, "max_response": 500, **limits})
    return [(tokenizer.decode(p.prompt_ids), [tokenizer.decode(s) for s in p.solutions], p.answer)
            for p in make_problems(rows, tokenizer, args)]


@pytest.mark.parametrize("response, answer, reward", [
    ("So \\boxed{72}", "72", 1.0), ("So \\boxed{71}", "72", 0.0), ("The answer is 72.", "72", 1.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0), ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
    ("\\boxed{(1, 2)}", "(1,2)", 1.0), ("\\boxed{x^2+1}", "1+x^2", 1.0), ("colourless", "72", 0.0),
    ("", "72", 0.0), ("\\boxed{72}", "", 0.0), ("\\boxed{{{72", "72", 0.0),
    ("}}}\\frac{\\sqrt", "72", 0.0), ("\\boxed{\\frac{1}{0}}", "72", 0.0), ("\x00\ud83d", "7", 0.0),
    ("\\boxed{9^{9^{9^9}}}", "72", 0.0)])
def test_math_reward_is_one_for_an_equal_answer_and_never_raises(response, answer, reward):
    """Math-Verify's verdict on fractions, tuples, nonsense, broken LaTeX, and towers of powers."""
    assert math_reward(response, answer) == reward


def test_math_reward_works_from_a_thread():
    """Where Math-Verify's own time limit, a signal, cannot be set."""
    verdicts = []
    texts = ["\\boxed{1234}", "\\boxed{4321}", "\\boxed{{{"]
    worker = threading.Thread(target=lambda: verdicts.extend(math_reward(t, "1234") for t in texts))
    worker.start()
    worker.join()
    assert verdicts == [1.0, 0.0, 0.0]


def test_gsm8k_solutions_are_cleaned_and_end_in_a_box(tokenizer):
    """Calculator marks go, "#### 1,072" becomes \\boxed{1072}, and EOS ends the solution."""
    row = {"question": "How many?", "answer": "He has 2*536 = <<2*536=1072>>1072.\n#### 1,072"}
    ((prompt, solutions, answer),) = read(tokenizer, row)
    assert "How many?" in prompt
    assert solutions == ["He has 2*536 = 1072.\n\\boxed{1072}<|im_end|>"] and answer == "1072"


def openr1(problem, text, answer):
    """A row as in OpenR1-Math-46k-8192."""
    return {"prompt": [{"role": "system", "content": "Your task is to think."},
                       {"role": "user", "content": problem}],
            "target": [{"role": "assistant", "content": text}],
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "data_source": "openr1", "ability": "math", "extra_info": {"index": 1}}


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
            {"problem": "P", "answer": "4", "solution": ["S", "", "T"]}]
    found = read(tokenizer, *rows)
    assert [solutions for _, solutions, _ in found] == [
        [], [], ["S<|im_end|>"], ["S<|im_end|>", "T<|im_end|>"]]
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


def test_rows_that_cannot_be_used_are_dropped_and_counted_in_one_line(tokenizer, capsys):
    """No answer, an empty solution, a prompt or a solution over its limit in tokens."""
    good, bare = PLAIN_ROWS[0], {"problem": "P", "answer": "4"}
    rows = [good, bare, {**good, "answer": ""}, {**good, "answer": None}, {**good, "problem": " "},
            {**good, "solution": "  "}, {**good, "problem": "long " * 300},
            {**good, "solution": "long " * 300}, {**good, "solution": ["long " * 300, "S"]}]
    assert len(read(tokenizer, *rows, max_response=200)) == 3
    (line,) = capsys.readouterr().out.splitlines()
    kept, dropped = line.split("dropped")
    assert "3 problems" in kept and sum(map(int, re.findall(r"\d+", dropped))) == 6


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_are_read_by_their_ending(suffix):
    """.jsonl, .json and .parquet, through the datasets library."""
    rows = datasets.Dataset.from_list(PLAIN_ROWS)
    path = f"rows{suffix}"
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path, lines=suffix == ".jsonl")
    assert [dict(row) for row in load_rows(path)] == PLAIN_ROWS


def test_math_tasks_hold_out_the_files_last_rows_and_score_by_math_verify(tokenizer):
    """Held-out problems are not trained on; special tokens do not disturb the score."""
    datasets.Dataset.from_list(PLAIN_ROWS).to_json("rows.jsonl")
    args = settings("--model", "m", "--dataset", "rows.jsonl", "--eval-size", "2", "--snap-prefix")
    task = math_task(tokenizer, args)
    ((heldout),) = task.heldout.values()
    assert [p.answer for p in task.train + heldout] == [r["answer"] for r in PLAIN_ROWS]
    assert len(heldout) == 2 and not heldout[0].solutions  # none is needed, nor filtered by
    assert task.score(heldout[0], task.train[0].solutions[0]) == 0.0
    for problem in task.train:
        assert task.score(problem, problem.solutions[0]) == 1.0
    assert task.breaks and all("\n\n" in tokenizer.decode([i]) for i in task.breaks)
    assert not math_task(tokenizer, Namespace(**{**vars(args), "snap_prefix": False})).breaks


# ==== Part 6. The embedded experiment ============================================================

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
        assert task.score(p, solution) == 1.0
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


def test_clock_score_wants_one_answer_at_the_very_end(clock):
    """`# answer <eos>`, and no other `#`: guessing twice, or talking on, is wrong."""
    tokenizer, task = clock
    p = Problem([], [], "8")
    for text, reward in (("# 8 <eos>", 1), ("k -9 23 # 8 <eos>", 1), ("# 9 <eos>", 0), ("# 8", 0),
                         ("8 <eos>", 0), ("# 7 # 8 <eos>", 0), ("# 8 # <eos>", 0), ("", 0),
                         ("# 8 <eos> k", 0), ("# 8 <eos> # 8 <eos>", 0)):
        assert task.score(p, tokenizer.convert_tokens_to_ids(text.split())) == reward, text


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
    assert all(task.score(p, p.solutions[0]) == 1.0 for p in task.train)


def test_clock_words_survive_saving_and_loading(clock):
    """What load_policy gives back reads and writes the same words, with spaces between them."""
    model, tokenizer = clock_model(0)
    model.save_pretrained("clock")
    tokenizer.save_pretrained("clock")
    loaded, again = load_policy("clock")
    text = "j 8 k -9 l +8 m +1 ?"
    ids = again(text, add_special_tokens=False).input_ids
    assert ids == tokenizer.convert_tokens_to_ids(text.split())
    assert again.decode(ids) == text
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


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

    def score(problem, response):
        return float(response[-3:] == problem.solutions[0][-3:] and response.count(4) == 1)

    rng = random.Random(f"{args.dataset} {args.seed}")
    if args.dataset == "clock-corpus":
        return Task([chain(rng.randint(1, 4), ":", True) if rng.random() < 0.7 else
                     chain(4, "?", rng.random() < 0.1) for _ in range(args.steps * args.prompts)],
                    {}, score, in_order=True)
    return Task([chain(4, "?", True, 0.3) for _ in range(256)],
                {"quiz": [chain(4, "?", True) for _ in range(128)]}, score)


def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]


def test_trapo_teaches_a_base_that_blurts_to_work(monkeypatch):
    """The whole loop, pretraining and post-training, in small: held-out accuracy rises clearly."""
    monkeypatch.setattr(trapo, "clock_task", little_world)
    main("--dataset clock-corpus --steps 300 --prompts 32 --lr 1e-2 --out base".split())
    main("--model base --steps 20 --lr 2e-3 --max-response 36 --out trained".split())
    before, after = (metrics_of("trained")[i]["eval"] for i in (0, -1))
    assert before["quiz"] < 0.25 and before["quiz, greedy"] < 0.25
    assert after["quiz"] > before["quiz"] + 0.15
    assert after["quiz, greedy"] > before["quiz, greedy"] + 0.3


# ==== Part 7. Checkpoints ========================================================================

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded experiment's model, untrained, as a folder to start short runs from."""
    folder = tmp_path_factory.mktemp("base")
    for part in clock_model(0):
        part.save_pretrained(folder)
    return str(folder)


def tiny_run(base, out, *flags):
    """The command line of a run of about a second."""
    return ["--model", base, "--dataset", "clock", "--prompts", "2", "--max-response", "20",
            "--eval-size", "0", "--out", str(out), *flags]


def repeatable(folder):
    """A run's metrics without what a clock or a memory gauge said."""
    return [{k: v for k, v in line.items() if not re.match("seconds|peak", k)}
            for line in metrics_of(folder)]


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


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


def die_after(calls, argv, function=None):
    """Run main(argv), but kill -9 this very process at the given function call of the training.

    Args: function: count only the calls of this one.
    Returns: the number of function calls from the first training step on.
    """
    count = 0

    def tick(frame, event, _):
        nonlocal count
        count += not function or (event == "call" and frame.f_code is function.__code__)
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_step(*args):
        sys.setprofile(tick)
        return train_step(*args)

    trapo.train_step = counted_step
    try:
        main(argv)
    finally:
        sys.setprofile(None)
        trapo.train_step = train_step
    return count


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base):
    """kill -9 at random moments, and amid the writing of a checkpoint: same metrics and weights."""
    flags = ("--steps", "5", "--save-every", "2", "--eval-size", "1", "--updates", "2")
    calls = die_after(INF, tiny_run(base, "whole", *flags))
    rng, processes = random.Random(0), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.models.llama", "test_trapo"])  # import once
    moments = [(int(calls * rng.uniform(0.1, 0.14)), None), (1, torch.save),
               (int(calls * rng.uniform(0.25, 0.35)), None), (2, torch.save)]
    argv = tiny_run(base, "killed", *flags)
    for moment, function in moments:
        child = processes.Process(target=die_after, args=(moment, argv, function))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        argv = [*tiny_run(base, "killed", *flags), "--resume"]
    assert checkpoints(Path("killed")) and not Path("killed/model.safetensors").exists()
    main(argv)
    assert repeatable("killed") == repeatable("whole")
    assert weights("killed") == weights("whole") != weights(base)


def test_ctrl_c_saves_and_says_how_to_resume(base):
    """Exit code 130, a checkpoint of the last step, and a command that goes on from there."""
    command = [sys.executable, str(HERE / "trapo.py"), *tiny_run(base, "run", "--steps", "100000")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = Path("run/metrics.jsonl")
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert run.poll() is None, "the run ended by itself"
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate()
    last = metrics_of("run")[-1]["step"]
    assert run.returncode == 130 and "--resume --out run" in output
    assert [path.name for path in checkpoints(Path("run"))] == [f"checkpoint-{last}"]
    main(tiny_run(base, "run", "--resume", "--steps", str(last + 1)))
    assert [line["step"] for line in metrics_of("run")][-last - 1:] == list(range(1, last + 2))


def test_overwrite_starts_the_run_in_out_anew(base):
    """Old metrics and checkpoints are gone, and the result is that of a fresh folder."""
    main(tiny_run(base, "run", "--steps", "4", "--save-every", "1", "--seed", "5"))
    main(tiny_run(base, "run", "--steps", "2", "--save-every", "1", "--overwrite"))
    main(tiny_run(base, "fresh", "--steps", "2", "--save-every", "1"))
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]
    assert repeatable("run") == repeatable("fresh") and weights("run") == weights("fresh")


# ==== Part 8. The training loop ==================================================================

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


def test_without_a_model_the_embedded_experiment_makes_its_base_once(capsys):
    """All methods of a seed start from the same base, and a table compares before and after."""
    flags = ["--base-steps", "2", "--steps", "1", "--prompts", "2", "--eval-size", "2"]
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
    assert "micro-group 4" in output and "reward" in output  # the rollouts shown


def test_sft_then_rl_is_two_commands(base):
    """A run's folder is a model, which remembers the data it was made with."""
    main(tiny_run(base, "runs/sft", "--method", "sft", "--steps", "1"))
    args = settings("--method", "grpo", "--model", "runs/sft")
    assert args.dataset == "clock" and args.lr == settings().lr
    main("--method grpo --model runs/sft --steps 1 --prompts 2 --eval-size 0".split())
    assert weights("runs/sft-grpo-seed0") == weights("runs/sft") != weights(base)  # no reward yet


def step_of(policy, task, *flags, step=0):
    """One train_step of plain SGD: (metrics, groups, optimizer)."""
    args = settings("--prompts", "4", "--max-response", "24", *flags)
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.lr)
    return *train_step(policy, policy, optimizer, task, args, step), optimizer


@pytest.mark.parametrize("temperature", ["1.0", "0.01"])
def test_metrics_count_what_happened(clock, temperature):
    """Recounted from the rollouts. At a low temperature many are equal, and all count."""
    def mean(values):
        return pytest.approx(statistics.fmean(values))

    policy, _ = clock_model(1)
    task = Task(clock[1].train, {}, lambda _, response: float(len(response) % 2))
    metrics, groups, _ = step_of(policy, task, "--temperature", temperature)
    rollouts = [r for group in groups for r in group]
    own = [r for r in rollouts if r.completion]
    assert len(groups) == 4 and len(rollouts) == 32
    assert metrics["guided"] == mean(bool(r.prefix) for r in rollouts)
    assert metrics["reward_unguided"] == mean(r.reward for group in groups for r in group[:4])
    assert metrics["reward_guided"] == mean(r.reward for r in rollouts if r.prefix)
    assert metrics["tokens_generated"] == sum(len(r.completion) for r in rollouts)
    assert metrics["truncated"] == mean(r.completion[-1] != 1 for r in own)
    assert metrics["logprob_gap"] < 1e-5 and 0 < metrics["entropy"] < math.log(90)
    lengths = [len(r.prefix + r.completion) for r in rollouts]
    assert metrics["response_length"] == mean(lengths)
    for group in groups:
        for r in group:
            assert r.advantage == pytest.approx(r.reward - statistics.fmean(x.reward for x in group))
    kept = [not is_inert(r, "trsft") for r in rollouts]
    assert metrics["rollouts_skipped"] == 32 - sum(kept)
    assert metrics["tokens_trained"] == sum(n for n, keep in zip(lengths, kept) if keep)


def test_metrics_on_prefix_tokens_are_those_of_the_trust_region(clock):
    """Mean p, share outside (p < alpha), mean weight 1 / max(p, alpha), mean 1 / p, by hand."""
    policy, _ = clock_model(1)
    before, _ = clock_model(1)
    metrics, groups, _ = step_of(policy, clock[1], "--alpha", "0.02")
    p = torch.cat([naive(before, r.prompt + r.prefix, len(r.prompt)).exp().double()
                   for group in groups for r in group if r.prefix])
    assert 0 < metrics["prefix_outside_share"] < 1
    for name, values in (("p", p), ("outside_share", (p < 0.02).double()), ("inverse_p", 1 / p),
                         ("weight", 1 / p.clamp(min=0.02))):
        assert metrics[f"prefix_{name}"] == pytest.approx(values.mean().item(), rel=1e-4)


def test_the_learning_rate_warms_up_and_then_stays(clock):
    """Linearly over --warmup steps; --decay, for the base, lets it fall to 0."""
    def rate(step, *flags):
        policy, _ = clock_model(0)
        _, _, optimizer = step_of(policy, clock[1], "--method", "sft", "--lr", "0.1", "--warmup",
                                  "4", "--steps", "10", *flags, step=step)
        return optimizer.param_groups[0]["lr"]
    assert [rate(step) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])
    assert rate(4) >= rate(6, "--decay") > rate(9, "--decay") > 0 and rate(9, "--decay") < 0.03


def test_sft_moves_the_policy_towards_its_expert_and_clips_the_gradient(clock):
    """A step of SGD lowers the loss; its length is at most lr * --max-grad-norm."""
    policy, _ = clock_model(1)
    start = [p.detach().clone() for p in policy.parameters()]
    losses = [step_of(policy, clock[1], "--method", "sft", "--lr", "1", "--warmup", "0",
                      "--max-grad-norm", "0.01")[0]["loss"]]
    moved = sum(((p - q) ** 2).sum() for p, q in zip(policy.parameters(), start)).sqrt().item()
    assert moved == pytest.approx(0.01, rel=1e-3)
    for _ in range(3):
        losses.append(step_of(policy, clock[1], "--method", "sft", "--lr", "1", "--warmup", "0")[0]
                      ["loss"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def not_finite_at(*steps):
    """group_advantages that turns to NaN in the given train steps, counted from 1."""
    calls = iter(range(1, 1000))

    def advantages(rewards):
        return group_advantages(rewards) * (math.nan if next(calls) in steps else 1)
    return advantages


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_reported(base, monkeypatch, capsys):
    """The weights stay as they were, the run goes on, the metrics say so."""
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2, 3))
    main(tiny_run(base, "run", "--steps", "4", "--save-every", "1", "--max-response", "40"))
    skipped = [line["step"] for line in metrics_of("run")[-4:] if line["grad_norm"] is None]
    assert skipped == [2, 3]
    assert weights("run/checkpoint-3") != weights("run/checkpoint-4")
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2))
    main(tiny_run(base, "other", "--steps", "2", "--save-every", "1"))
    assert weights("other/checkpoint-1") == weights("other/checkpoint-2")
    output = capsys.readouterr()
    assert "not finite" in output.out + output.err


def test_three_steps_not_finite_in_a_row_stop_the_run(base, monkeypatch, capsys):
    """With exit code 1, a message, and the good weights saved."""
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2, 3, 4))
    with pytest.raises(SystemExit) as stop:
        main(tiny_run(base, "run", "--steps", "9"))
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().out
    assert metrics_of("run")[-1]["step"] == 4
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(2, 3))
    main(tiny_run(base, "resumed", "--steps", "3"))
    monkeypatch.setattr(trapo, "group_advantages", not_finite_at(1))
    with pytest.raises(SystemExit):  # the third in a row, though the process is another
        main("--resume --out resumed --steps 9".split())
    policy, _ = load_policy(str(checkpoints(Path("run"))[-1]))
    assert all(p.isfinite().all() for p in policy.parameters())


def test_no_held_out_problems_means_no_evaluation(base):
    """--eval-size 0."""
    main(tiny_run(base, "run", "--steps", "1", "--eval-size", "0"))
    assert not any(line.get("eval") for line in metrics_of("run"))


def gsm8k_rows():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is missing")
    rows = [json.loads(line) for line in GSM8K.open()]
    return sorted(rows, key=lambda row: len(row["answer"]))[:24]


def openr1_rows():
    text = "<think>\n{solution}\n</think>\nSo it is."
    return [openr1(row["problem"], text.format(**row), row["answer"]) for row in PLAIN_ROWS]


@pytest.mark.parametrize("make_rows, file", [
    (gsm8k_rows, "rows.jsonl"), (openr1_rows, "rows.parquet")])
def test_the_real_path_trains_a_qwen_instruct_that_plain_transformers_loads(
        make_rows, file, stand_in, monkeypatch):
    """From a chat model's folder and real rows to a folder of the trained weights, bit for bit."""
    rows, trained = datasets.Dataset.from_list(make_rows()), []
    rows.to_parquet(file) if file.endswith("parquet") else rows.to_json(file)
    monkeypatch.setattr(trapo, "load_policy",
                        lambda name: trained.append(load_policy(name)) or trained[-1])
    main(["--model", stand_in, "--dataset", file, "--out", "run", "--steps", "2", "--prompts", "2",
          "--max-response", "70", "--eval-size", "1", "--lr", "1e-3"])
    steps = metrics_of("run")[1:]
    assert [line["guided"] for line in steps] == [0.5, 0.5]  # a random policy needs all the help
    assert all(line["tokens_trained"] > 0 and line["logprob_gap"] < 1e-4 for line in steps)
    assert steps[0]["reward_guided"] >= 0.25  # the experts' complete solutions verify
    ((policy, _),), ids = trained, torch.arange(1, 40)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained("run").eval()
    origin = transformers.AutoModelForCausalLM.from_pretrained(stand_in).eval()
    with torch.no_grad():
        logits = policy.eval()(ids).logits
        assert torch.equal(again(ids).logits, logits)
        assert not torch.allclose(origin(ids).logits, logits, atol=1e-3)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()  # tied
    assert set(again.generation_config.eos_token_id) == set(origin.generation_config.eos_token_id)
    assert again.generation_config.top_k == 20  # how others sample it is not ours to change
    saved, given = map(transformers.AutoTokenizer.from_pretrained, ("run", stand_in))
    text = "<|im_start|>user\nWhat is 2+2?\n\n<|im_end|>"
    assert saved(text).input_ids == given(text).input_ids and saved.chat_template == CHATML


# ==== Part 9. The command line ===================================================================

@pytest.mark.parametrize("method, sizes, ratios, thresholds, prefix_loss", [
    ("trapo", [4, 2, 1, 1], [0, 0.2, 0.5, 1], [-1, 0.5, 0.7, 0.9], "trsft"),
    ("micro", [4, 2, 1, 1], [0, 0.2, 0.5, 1], [-1, 0.5, 0.7, 0.9], "none"),
    ("naive", [4, 2, 1, 1], [0, 0.2, 0.5, 1], [-1, 0.5, 0.7, 0.9], "sft"),
    ("micro-luffy", [4, 2, 1, 1], [0, 0.2, 0.5, 1], [-1, 0.5, 0.7, 0.9], "luffy"),
    ("fixed-prefix", [4, 2, 1, 1], [0, 0.2, 0.5, 1], [-1, INF, INF, INF], "trsft"),
    ("grpo", [8], [0], [-1], "none"),
    ("luffy", [7, 1], [0, 1], [-1, INF], "luffy"),
    ("sft", [1], [1], [INF], "sft")])
def test_presets_are_the_rows_of_table_2(method, sizes, ratios, thresholds, prefix_loss):
    """Four settings each, and nothing else: no method has code of its own."""
    assert METHODS[method] == {"sizes": sizes, "ratios": ratios, "thresholds": thresholds,
                               "prefix_loss": prefix_loss}
    args = settings("--method", method)
    assert args.schedule == [MicroGroup(*row) for row in zip(sizes, ratios, thresholds)]
    assert args.prefix_loss == prefix_loss and len(METHODS) == 8


def test_a_preset_is_a_default_for_four_flags():
    """Each can be given by itself; trapo is the default method, 0.1 the default alpha."""
    args = settings("--ratios", "0", "0.25", "0.5", "1")
    assert args.schedule == [MicroGroup(4, 0, -1), MicroGroup(2, 0.25, 0.5),
                             MicroGroup(1, 0.5, 0.7), MicroGroup(1, 1, 0.9)]
    assert args.prefix_loss == "trsft"
    args = settings("--method", "grpo", "--sizes", "3", "1", "--ratios", "0", "1",
                    "--thresholds", "-1", "inf", "--prefix-loss", "sft")
    assert args.schedule == [MicroGroup(3, 0, -1), MicroGroup(1, 1, INF)]
    assert args.prefix_loss == "sft" and args.alpha == 0.1


def test_with_a_model_the_defaults_are_the_papers():
    """Where it gives them; sizes are those of one GPU."""
    args = settings("--model", "Qwen2.5-0.5B-Instruct")
    assert args.dataset == "gsm8k" and args.lr == 5e-6 and args.temperature == 1.0
    assert (args.prompts, args.max_prompt, args.max_response, args.steps) == (32, 1024, 1024, 200)
    assert args.max_grad_norm == 1.0 and args.updates == 1 and not args.snap_prefix


def refusal(argv, capsys):
    """main's one line on stderr for a command line that cannot be run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv if isinstance(argv, list) else argv.split())
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("flags, named", [
    ("--alpha 2", "--alpha"), ("--alpha -0.1", "--alpha"), ("--alpha nan", "--alpha"),
    ("--ratios 0 0.2 0.5 1.5", "--ratios"), ("--ratios 0 -0.2 0.5 1", "--ratios"),
    ("--ratios 0 0.5", "--ratios"), ("--sizes 4 2", "--sizes"), ("--sizes 4 2 1 0", "--sizes"),
    ("--thresholds -1 nan 0.7 0.9", "--thresholds"), ("--thresholds -1", "--thresholds"),
    ("--steps 0", "--steps"), ("--steps two", "--steps"), ("--steps 1.5", "--steps"),
    ("--prompts -1", "--prompts"), ("--max-response 0", "--max-response"), ("--lr 0", "--lr"),
    ("--lr inf", "--lr"), ("--lr nan", "--lr"), ("--betas 0.9 1", "--betas"),
    ("--betas 0.9", "--betas"), ("--weight-decay -1", "--weight-decay"),
    ("--max-grad-norm 0", "--max-grad-norm"), ("--clip -1", "--clip"), ("--updates 0", "--updates"),
    ("--temperature 0", "--temperature"), ("--warmup -1", "--warmup"), ("--eval-size -1",
     "--eval-size"), ("--save-every 0", "--save-every"), ("--micro-tokens 0", "--micro-tokens"),
    ("--method ppo", "--method"), ("--prefix-loss kl", "--prefix-loss"), ("--sede 3", "--sede"),
    ("--model m --dataset nowhere", "nowhere"), ("--model m --dataset no.jsonl", "no.jsonl"),
    ("--model m --dataset rows.csv", "rows.csv"), ("--dataset gsm8k", "--model")])
def test_bad_settings_are_refused_in_one_line_before_anything_is_loaded(
        flags, named, capsys, monkeypatch):
    """Exit code 2, one line that names the flag, no traceback."""
    for loader in ("load_policy", "clock_model", "load_rows"):
        monkeypatch.setattr(trapo, loader, lambda *_: pytest.fail("loaded something"))
    Path("rows.csv").write_text("problem,answer")
    assert named in refusal(flags, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    """And the line says what to do."""
    assert "--device cpu" in refusal("--device cuda", capsys)


def test_a_model_that_cannot_be_had_is_refused_in_one_line(capsys, stand_in):
    """It says what was tried and how to give a folder; a bare name is one of Qwen's."""
    Path("rows.jsonl").write_text(json.dumps(PLAIN_ROWS[0]))
    flags = ["--dataset", "rows.jsonl", "--model"]
    line = refusal([*flags, "No-Such-Model"], capsys)
    assert "Qwen/No-Such-Model" in line and "folder" in line
    assert "someone/no-such-model" in refusal([*flags, "someone/no-such-model"], capsys)
    Path("empty").mkdir()
    assert "empty" in refusal([*flags, "empty"], capsys)
    load_policy(stand_in)[1].save_pretrained("broken")
    Path("broken/config.json").write_bytes((Path(stand_in) / "config.json").read_bytes())
    Path("broken/model.safetensors").write_bytes(weights(stand_in)[:1000])  # cut off
    assert "broken" in refusal([*flags, "broken"], capsys)
    Path("broken/config.json").write_text('{"model_type": ')
    assert "broken" in refusal([*flags, "broken"], capsys)
    assert "clock" in refusal(["--dataset", "clock", "--model", stand_in], capsys)


@pytest.mark.parametrize("text, words", [
    ('{"problem": "P", "text": "T"}', ["problem, text", "answer"]),  # found and expected columns
    ("", ["rows.jsonl"]), ("no JSON", ["rows.jsonl"]),
    ('{"problem": "P", "answer": ""}', ["usable"]),
    (json.dumps({**PLAIN_ROWS[0], "problem": "long " * 999}), ["usable", "--max-prompt"])])
def test_data_that_cannot_be_used_are_refused_in_one_line(text, words, capsys, stand_in):
    """Missing columns, an empty file, no JSON, and rows of which none is usable."""
    Path("rows.jsonl").write_text(text)
    line = refusal(["--model", stand_in, "--dataset", "rows.jsonl"], capsys)
    assert all(word in line for word in words), line


def test_without_network_hub_data_are_refused_in_one_line(capsys, stand_in):
    """It says what was tried, and that a local file works too."""
    for name, hub in (("gsm8k", "openai/gsm8k"), ("openr1", "Elliott/Openr1-Math-46k-8192")):
        line = refusal(["--model", stand_in, "--dataset", name], capsys)
        assert hub in line and ".jsonl" in line


def test_a_folder_that_holds_a_run_is_not_touched(base, capsys):
    """Unless --resume or --overwrite; and --resume goes on with the settings of that run."""
    main(tiny_run(base, "run", "--steps", "1"))
    before = weights("run")
    line = refusal(tiny_run(base, "run", "--steps", "1"), capsys)
    assert "--resume" in line and "--overwrite" in line
    for flags in (["--alpha", "0.2"], ["--method", "grpo"], ["--seed", "1"]):
        line = refusal(tiny_run(base, "run", "--resume", "--steps", "2", *flags), capsys)
        assert flags[0].strip("-") in line or "prefix_loss" in line
    assert weights("run") == before
    main(["--resume", "--out", "run", "--steps", "2"])  # the rest is known from config.json
    assert metrics_of("run")[-1]["step"] == 2 and weights("run") != before
    assert "--steps" in refusal("--resume --out run --steps 1", capsys)
    assert "--overwrite" in refusal("--resume --overwrite --out run", capsys)


def test_what_is_no_run_or_cannot_be_resumed_is_never_overwritten(base, capsys):
    """A plain model's folder, and a finished run whose checkpoints were deleted to save space."""
    Path("plain").mkdir()
    for file in Path(base).iterdir():
        (Path("plain") / file.name).write_bytes(file.read_bytes())
    for flag in ("--resume", "--overwrite"):
        assert "plain" in refusal(tiny_run(base, "plain", "--steps", "1", flag), capsys)
    assert weights("plain") == weights(base) and not Path("plain/metrics.jsonl").exists()
    main(tiny_run(base, "run", "--steps", "1"))
    before = weights("run"), Path("run/metrics.jsonl").read_text()
    Path("run/checkpoint-1").rename("elsewhere")
    assert "checkpoint" in refusal("--resume --out run --steps 2", capsys)
    assert (weights("run"), Path("run/metrics.jsonl").read_text()) == before


def test_a_torn_line_of_metrics_does_not_stop_a_resume(base):
    """A kill may cut a line anywhere, behind an inner brace too."""
    main(tiny_run(base, "run", "--steps", "1"))
    with Path("run/metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "eval": {"held out": 0.5}')
    main("--resume --out run --steps 3".split())
    assert [line["step"] for line in metrics_of("run")][-3:] == [1, 2, 3]


def test_resume_knows_the_default_out_folder_too(base, capsys):
    """Without --out it follows from model, method and seed; settings are checked all the same."""
    flags = tiny_run(base, "x", "--steps", "1")
    del flags[flags.index("--out"):flags.index("--out") + 2]
    main([*flags, "--alpha", "0.3"])
    (out,) = Path("runs").iterdir()
    main([*flags, "--resume", "--steps", "2"])
    assert json.loads((out / "config.json").read_text())["trapo"]["alpha"] == 0.3
    assert "alpha" in refusal([*flags, "--resume", "--alpha", "0.5"], capsys)


def test_errors_reach_the_shell_as_one_line_and_exit_code_2():
    """The same as a user sees it: no traceback, nothing on stdout."""
    run = subprocess.run([sys.executable, str(HERE / "trapo.py"), "--alpha", "2"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ")


def test_help_explains_every_flag_in_a_line(capsys):
    """--help, and exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("--method", "--sizes", "--ratios", "--thresholds", "--prefix-loss", "--alpha",
                 "--snap-prefix", "--speculate", "--resume", "--overwrite", "--steps", "--lr"):
        assert re.search(rf"^ +{flag}\b", text, re.MULTILINE), flag


# ==== Part 7 again: several processes (torchrun, gloo on the CPU) ================================

def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    """Run a script in two processes, as a user would; it must end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments],
        cwd=HERE, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def sft_run(out: Path, steps: int) -> list[str]:
    """A run that draws nothing, so that it can be compared number by number.

    Five prompts on two processes, in small micro-batches: the ranks have different numbers of them.
    """
    base = out.parent / "base"
    if not base.exists():
        policy, tokenizer = clock_model(0)
        policy.save_pretrained(base)
        tokenizer.save_pretrained(base)
    return ["--model", str(base), "--dataset", "clock", "--method", "sft", "--prompts", "5",
            "--micro-tokens", "70", "--eval-size", "0", "--save-every", "2", "--device", "cpu",
            "--steps", str(steps), "--out", str(out)]


def same_run(a: Path, b: Path) -> None:
    """Two runs logged the same numbers and ended in the same weights, to 1e-5."""
    for x, y in zip(metrics_of(a), metrics_of(b), strict=True):
        for name in x.keys() - {"peak_memory_gib"}:
            if not name.startswith("seconds"):
                expected = None if x[name] is None else pytest.approx(x[name], rel=1e-5, abs=1e-7)
                assert y[name] == expected, (x["step"], name)
    x, y = (safetensors.torch.load_file(run / "model.safetensors") for run in (a, b))
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=1e-5)


def test_two_processes_do_the_work_of_one_and_either_resumes_the_other(tmp_path):
    """Same losses, gradient norms, counts and weights, over two steps each of two, one, two."""
    main(sft_run(tmp_path / "alone", 6))
    run = tmp_path / "run"
    done = torchrun("trapo.py", *sft_run(run, 2))
    assert done.returncode == 0, done.stderr
    assert [m["step"] for m in metrics_of(run)] == [1, 2]  # one line a step: one process writes
    main(["--resume", "--out", str(run), "--steps", "4"])
    done = torchrun("trapo.py", "--resume", "--out", str(run), "--steps", "6")
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "alone", run)


def test_embedded_experiment_runs_when_a_process_has_no_prompt(tmp_path):
    """One prompt for two processes: the second samples nothing, trains nothing, and waits."""
    done = torchrun("trapo.py", "--out", str(tmp_path / "run"), "--base-steps", "2", "--steps", "2",
                    "--prompts", "1", "--eval-size", "3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    last = metrics_of(tmp_path / "run")[-1]
    assert last["logprob_gap"] is None or last["logprob_gap"] < 1e-5  # the copy is kept fresh
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_an_error_in_one_process_ends_the_run_with_that_error(tmp_path):
    """No hang: the second process fails in its update while the first waits for it."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import trapo\n"
        "def fail(*_): raise RuntimeError('the second process is out of luck')\n"
        "if trapo.RANK == 1: trapo.accumulate_gradients = fail\n"
        "trapo.main()\n")
    done = torchrun(str(script), str(HERE), *sft_run(tmp_path / "run", 2))
    assert done.returncode != 0
    assert "the second process is out of luck" in done.stderr


# ==== eval.py: benchmarks, comparisons of runs, speed ============================================
from itertools import combinations

import eval as evaluation
from eval import bootstrap_interval, load_benchmark, mean_interval, pass_at_k, t_quantile

DATA = Path(trapo.__file__).parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no evaluation files in {DATA}")


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


@pytest.mark.parametrize("df, printed", [
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042),
    (100, 1.984), (10 ** 6, 1.960)])
def test_students_t_is_that_of_the_printed_tables(df, printed):
    """The column of 97.5 %, to the third decimal."""
    assert t_quantile(df) == pytest.approx(printed, abs=5e-4)


def test_mean_interval_by_hand():
    """1, 2, 3: standard deviation 1, standard error 1 / sqrt(3), two degrees of freedom."""
    for values, expected in (([1, 2, 3], f"2.000 ± {4.30265 / math.sqrt(3):.3f}"),
                             ([5, 5, math.nan], "5.000 ± 0.000"), ([7], "7.000"), ([], "-")):
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


@needs_data
@pytest.mark.parametrize("name, problems, samples", [("aime", 30, 32), ("amc", 83, 32),
                                                     ("minerva", 272, 1)])
def test_identical_rows_of_the_authors_files_are_one_problem(name, problems, samples, tokenizer):
    """32 rows of an AIME or AMC problem are one problem, sampled 32 times, in the file's order."""
    path = str(DATA / f"valid.{name}.parquet")
    found = load_benchmark(path, tokenizer, PROTOCOL)
    counts = Counter((tuple(p.prompt_ids), p.answer) for p in found)
    assert len(counts) == problems and set(counts.values()) == {samples}
    first = [trapo.read_row(row)[2] for row in load_rows(path)][::samples][:3]
    assert [p.answer for p in found[::samples][:3]] == first


@pytest.mark.parametrize("row, answer", [
    ({"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}, "1002"),
    ({"question": "Where?", "answer": "(1,2)"}, "(1,2)"),
    ({"question": "Both?", "final_answer": ["$1$", "$2$"], "solution": [""]}, "$1$, $2$"),
    ({"problem": "How many?", "answer": 142.0, "solution": ""}, "142.0")])
def test_benchmarks_may_have_the_columns_of_any_of_the_data_sets(row, answer, tokenizer):
    """GSM8K, Minerva, OlympiadBench, AMC; a row's solution does not matter."""
    Path("rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    found = load_benchmark("rows.jsonl", tokenizer, PROTOCOL)
    assert [p.answer for p in found] == [answer, answer]


@needs_data
def test_the_real_answers_verify_and_shuffled_ones_do_not():
    """In the five files every \\boxed{answer} is right, but for at most two malformed ones."""
    rows = [row for path in sorted(DATA.glob("valid.*.parquet")) for row in load_rows(str(path))]
    answers = list(dict.fromkeys(trapo.read_row(row)[2] for row in rows))
    assert len(answers) > 1000
    assert len([a for a in answers if not math_reward(f"\\boxed{{{a}}}", a)]) <= 2
    short = [a for a in answers if len(a) <= 8][::8]  # long ones take long
    assert not [a for a, b in zip(short, short[1:]) if math_reward(f"\\boxed{{{b}}}", a)]


@needs_data
def test_all_solutions_of_gsm8ks_test_set_verify():
    """The cleaned solution, which ends in \\boxed{answer}, earns the reward: 1319 times."""
    rows = [trapo.read_row(json.loads(line)) for line in (DATA / "gsm8k_test.jsonl").open()]
    assert [math_reward(solutions[0], answer) for _, solutions, answer in rows] == [1.0] * 1319


def test_a_response_that_breaks_the_parser_is_wrong_and_says_so(monkeypatch):
    """It is recorded as unreadable, and the evaluation goes on."""
    broken = record("b", 0, 0, 1, response="\\boxed{no number here, said the parser}")
    evaluation.report({}, [broken], Path("."))
    monkeypatch.setattr("math_verify.parse", lambda *_, **__: [][0])
    evaluation.main(["model", "gone", "--rescore", "--out", "."])
    (broken,) = evaluation.read_samples(Path("."))
    assert (broken["correct"], broken["note"]) == (0.0, "list index out of range")


# ---- Whole evaluations, of the stand-in for Qwen on a little file of five problems

FEW = ("--on", "few.jsonl", "--samples", "2", "--max-tokens", "6", "--chunk", "4")


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


def test_an_interrupted_evaluation_continues_and_a_finished_one_is_not_repeated(
        stand_in, few, monkeypatch):
    """It draws only what is missing, and ends with the very samples of an uninterrupted one."""
    evaluation.main(["model", stand_in, *FEW, "--out", "whole"])
    count_calls(monkeypatch, stop_at=2)
    with pytest.raises(SystemExit, match="continues"):
        evaluation.main(["model", stand_in, *FEW, "--out", "cut"])
    assert len(evaluation.read_samples(Path("cut"))) == 4
    for expected in ([4, 2], []):
        calls = count_calls(monkeypatch)
        evaluation.main(["model", stand_in, *FEW, "--out", "cut"])
        assert calls == expected
        for name in ("samples.jsonl", "results.json"):
            assert Path("cut", name).read_text() == Path("whole", name).read_text()
    texts = [json.loads(line)["response"] for line in Path("cut/samples.jsonl").open()]
    assert len(set(texts)) > 5  # every sample has random numbers of its own


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


def test_an_evaluation_cut_short_is_neither_complete_nor_lost(stand_in, few, monkeypatch):
    """A later evaluation of something else keeps its samples, and reports how many there are."""
    count_calls(monkeypatch, stop_at=2)
    with pytest.raises(SystemExit, match="continues"):
        evaluation.main(["model", stand_in, *FEW, "--out", "here"])
    Path("more.jsonl").write_text(Path("few.jsonl").read_text())
    evaluation.main(["model", stand_in, *FEW, "--out", "here", "--on", "more.jsonl"])
    found = json.loads(Path("here/results.json").read_text())["benchmarks"]
    assert {name: (b["samples"], b["of"]) for name, b in found.items()} == {
        "few": (4, 10), "more": (10, 10)}
    calls = count_calls(monkeypatch)
    evaluation.main(["model", stand_in, *FEW, "--out", "here"])
    assert calls == [4, 2]


def test_protocol_is_temperature_06_and_greedy_samples_once(stand_in, few, monkeypatch):
    """Without flags: temperature 0.6, a sample per copy of the row; greedy: one."""
    seen = []

    def scripted(policy, requests, limits, temperature, **options):
        seen.append((len(requests), limits[0], temperature))
        return [[5]] * len(requests), []
    monkeypatch.setattr(evaluation, "sample", scripted)
    Path("twice.jsonl").write_text(Path("few.jsonl").read_text() * 2)
    for flags in ((), ("--temperature", "0")):
        evaluation.main(["model", stand_in, "--on", "twice.jsonl", "--out", f"out{flags}", *flags])
    assert seen == [(10, 8192, 0.6), (5, 8192, 0)]


def test_two_processes_give_what_one_gives(stand_in, few):
    """Under torchrun the chunks are shared; the samples are the same, though not greedy."""
    flags = ["model", stand_in, *FEW, "--out"]
    evaluation.main([*flags, "one"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", evaluation.__file__, *flags, "two"], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=170)
    for name in ("samples.jsonl", "results.json"):
        assert Path("one", name).read_text() == Path("two", name).read_text()


def test_rescore_grades_saved_samples_without_a_model(monkeypatch):
    """A wrong verdict in the file is put right; nothing is loaded, nothing is drawn."""
    evaluation.report({"seed": 0}, [record("b", 0, 0, 0), record("b", 1, 1, 1)], Path("."))
    monkeypatch.setattr(evaluation, "load_policy", None)
    evaluation.main(["model", "gone", "--rescore", "--out", "."])
    results = json.loads(Path("results.json").read_text())
    assert results["benchmarks"]["b"]["avg@k"] == 1 and results["settings"] == {"seed": 0}


def test_the_embedded_model_is_evaluated_on_its_own_held_out_problems(monkeypatch):
    """The four sets of its seed; the reward is the experiment's."""
    policy, tokenizer = clock_model(0)
    policy.config.trapo = {"dataset": "clock", "seed": 3, "max_response": 9}
    policy.save_pretrained("run")
    tokenizer.save_pretrained("run")
    seven = tokenizer.convert_tokens_to_ids(["#", "7", "<eos>"])
    monkeypatch.setattr(evaluation, "sample", lambda policy, requests, limits, *_, **__: (
        [seven if limit == 9 else [] for limit in limits], []))
    evaluation.main(["model", "run", "--limit", "40"])
    heldout = clock_task(tokenizer, Namespace(dataset="clock", seed=3, eval_size=40)).heldout
    found = json.loads(Path("run/eval/results.json").read_text())["benchmarks"]
    assert {name: b["avg@k"] for name, b in found.items()} == {
        f"clock: {name}": statistics.fmean(p.answer == "7" for p in problems)
        for name, problems in heldout.items()}


# ---- Comparisons of runs

def write_run(name, method, seed, accuracy, tokens=1000, steps=2, **changes):
    """A run's folder with two steps; its reward is the accuracy as well."""
    settings = {"method": method, "seed": seed, "model": f"runs/base-seed{seed}", "steps": steps,
                "out": name, "lr": 1e-3, **changes}
    line = {"reward_unguided": accuracy, "guided": 0.5, "entropy": 1.0, "response_length": 9.0,
            "tokens_generated": tokens, "tokens_trained": 500, "seconds_sample": 1.0,
            "seconds_score": 0.5, "seconds_update": 2.5}
    lines = [{"step": 0, "eval": {"held out": 0.0}}, {"step": 1, **line, "reward_unguided": None},
             {"step": 2, **line, "eval": {"held out": accuracy, "greedy": 1.0}}]
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps({"trapo": settings}))
    Path(name, "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"cut')
    return name


def four_runs():
    return [write_run("a0", "trapo", 0, 0.4), write_run("a1", "trapo", 1, 0.6),
            write_run("b0", "grpo", 0, 0.1, tokens=2000), write_run("b1", "grpo", 1, 0.2)]


def test_runs_are_compared_with_students_interval_and_paired_by_seed(capsys):
    """.4 and .6 give .5 +- 12.706 x .1; the differences .3 and .4 give .35 +- 12.706 x .05."""
    evaluation.main(["runs", *four_runs(), "--against", "grpo", "--markdown"])
    means, differences = capsys.readouterr().out.split("difference to grpo")
    assert "|  | trapo (2) | grpo (2) |" in means
    assert "| held out | 0.500 ± 1.271 | 0.150 ± 0.635 |" in means
    assert "| greedy | 1.000 ± 0.000 | 1.000 ± 0.000 |" in means
    assert "| unguided reward, last tenth | 0.500 ± 1.271 | 0.150 ± 0.635 |" in means
    assert "| tokens generated, thousands | 2.000 ± 0.000 | 3.000 ± 12.706 |" in means
    assert "| seconds | 8.000 ± 0.000 | 8.000 ± 0.000 |" in means
    assert "|  | trapo (2) |" in differences
    assert "| held out | 0.350 ± 0.635 |" in differences


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(capsys):
    """The name of a method gets the settings in which its variants differ; bases do not count."""
    runs = [*four_runs(), write_run("c0", "trapo", 0, 0.3, lr=1e-4)]
    evaluation.main(["runs", *runs, "--against", "trapo lr=0.001", "--markdown"])
    means, differences = capsys.readouterr().out.split("difference to")
    assert "|  | trapo lr=0.001 (2) | grpo (2) | trapo lr=0.0001 (1) |" in means
    assert "| held out | 0.500 ± 1.271 | 0.150 ± 0.635 | 0.300 |" in means
    assert "| held out | -0.350 ± 0.635 | -0.100 |" in differences


def test_curves_are_drawn_into_a_file():
    """A PNG of some size."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    evaluation.main(["runs", *four_runs(), "--plot", "curves.png"])
    picture = Path("curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


# ---- Speed, and what is refused

def test_speed_measures_the_products_own_code(capsys):
    """Whole steps of three methods, at several batch sizes, with their parts."""
    evaluation.main(["speed", "--prompts", "1", "2", "--max-response", "6", "--repeat", "1",
                     "--device", "cpu"])
    printed = capsys.readouterr().out
    for what in ("grpo, 8 rollouts", "trapo --no-speculate, 16 rollouts",
                 "trapo --speculate, 16 rollouts", "sampled, k tokens/s", "trained, k tokens/s",
                 "step, s", "MFU", "GiB", "matrix product"):
        assert what in printed


@pytest.mark.parametrize("name, parameters", [
    ("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-1.5B", 1_543_714_304), ("Qwen2.5-7B", 7_615_616_512)])
def test_random_models_have_the_size_of_the_real_ones(name, parameters):
    """The numbers of parameters that the real checkpoints have."""
    policy = evaluation.speed_model(f"random:{name}", "meta")
    assert sum(p.numel() for p in policy.parameters()) == parameters


def refused(argv, capsys):
    """The one line that is printed before the program ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(list(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ")
    assert not [line for line in lines[:-1] if "s/s" not in line]  # progress bars: examples/s
    return lines[-1]


def test_bad_input_is_refused_in_one_line(stand_in, few, capsys, monkeypatch):
    """No such model, benchmark, column, run, method, flag: said in one line, exit code 2."""
    Path("bare.jsonl").write_text('{"problem": "1 + 1?"}\n')
    for name in ("empty", "begun"):
        write_run(name, "trapo", 0, 0.5)
    Path("empty/metrics.jsonl").unlink()
    Path("begun/metrics.jsonl").write_text('{"step": 0, "eval": {}}\n')
    a0, _, b0, _ = four_runs()
    model = ("model", stand_in, "--out", "out")
    for argv, word in (
            (("model", "nowhere", "--on", "few.jsonl"), "nowhere"), (model, "--on"),
            ((*model, "--on", "gsm9k"), "gsm9k"), ((*model, "--on", "none.jsonl"), "none.jsonl"),
            ((*model, "--on", "bare.jsonl"), "answer"),
            ((*model, "--on", "aime25"), "math-ai/aime25"),
            ((*model, "--on", "few.jsonl", "few.jsonl"), "once"),
            ((*model, "--on", "few.jsonl", "--temperature", "-1"), "--temperature"),
            ((*model, "--on", "few.jsonl", "--samples", "-1"), "--samples"),
            ((*model, "--rescore"), "no samples"), (("runs", "nowhere"), "nowhere"),
            (("runs", "empty"), "metrics.jsonl"), (("runs", "begun"), "no finished step"),
            (("runs", a0, a0), "same seed"), (("runs", a0, "--against", "luffy"), "methods: trapo"),
            (("runs", a0, "--against", "trapo"), "in common"),
            (("runs", a0, b0, "--sideways"), "--sideways"), (("dance",), "dance"),
            (("speed", "--model", "random:Qwen3"), "Qwen3"),
            (("speed", "--prompts", "0"), "prompts")):
        assert word in refused(argv, capsys), argv
    if importlib.util.find_spec("matplotlib"):
        assert "no/x.png" in refused(("runs", a0, "--plot", "no/x.png"), capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(("runs", a0, "--plot", "x.png"), capsys)
