"""The facts that trapo.py stands on. The first half is a tutorial in the order of its lecture:

    in the paper                                                held by the test
    Eq. 3: grad L = -1 / max(p, alpha) * grad p                 test_trsft_gradient_is_equation_3
    Prop. 1: TrSFT keeps the expert's main modes                test_proposition_1_...
    Section 2.3: A = reward - the group's mean                  test_advantage_is_the_reward_...
    - which guided rollouts in the mean only rescale            test_guided_rollouts_in_the_...
    the policy gradient -A grad log p, and PPO's                test_policy_gradient_is_ppos_...
    Algorithm 1: help if the mean reward is below t_i           test_schedule_against_a_table_...
    - its first L_i of the expert's tokens                      test_expert_prefix_is_the_first_...
    the loss of a batch: its sum, its masks, its divisor        test_gradient_is_that_of_the_...
    all of these on one group of eight, number by number        test_a_group_of_eight_by_hand
    Table 2: the methods compared                               test_methods_differ_in_what_...
    it learns                                                   test_trapo_teaches_a_base_...

The second half (`grep -n "# ===="`) tests what the lecture runs on. Nothing is downloaded: models
are tiny and made here. On a CPU, `pytest test_trapo.py` takes a minute or two, and the tutorial
alone, `pytest test_trapo.py -m tutorial`, some 15 seconds.
"""
import copy, html, json, logging, math, multiprocessing, os  # noqa: E401
import random, re, shutil, signal, statistics, subprocess, sys  # noqa: E401
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}  # a test never asks the network

import math_verify, numpy, pandas, pytest, safetensors.torch  # noqa: E401
import tokenizers, torch, transformers  # noqa: E401

import eval as evaluation
import trapo
from trapo import (ALWAYS, METHODS, PREFIX_LOSSES, InputError, MicroGroup, Problem, Rollout,
                   Settings, Task, accumulate_gradients, checkpoints, draw_tokens, expert_prefix,
                   group_advantages, is_guided, is_inert, load_policy, load_rows, luffy_loss, main,
                   make_problems, make_task, micro_batches, parse_args, policy_gradient_loss,
                   sample, sample_groups, token_logprobs, train_step, trsft_loss)

HERE = Path(trapo.__file__).parent
DATA = HERE.parent / "shared" / "data"  # real rows, if they are there
sys.path.insert(0, str(HERE / ".ci"))
import clock  # the world of the embedded experiment

torch.set_num_threads(1)  # tiny matrices: more threads would only wait for each other
pytestmark = pytest.mark.filterwarnings("error")
INF = math.inf

@pytest.fixture(autouse=True)
def own_world(tmp_path_factory, monkeypatch):
    """Every test works in a folder of its own and warns of nothing."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    warned, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield warned
    logging.getLogger("transformers").removeHandler(handler)
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

    def base_model(self, input_ids, position_ids, **_):
        return Namespace(last_hidden_state=self.rows[position_ids])

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

def draw(outcomes, problems=None, schedule=PAPER, reward=reward, **options):
    """sample_groups on a script of one-token completions: (groups, the script)."""
    problems = problems or [Problem([5], [SOLUTION], "")]
    script = Script([[outcome] for outcome in outcomes])
    return sample_groups(problems, schedule, script, reward, random.Random(0), **options), script

@pytest.mark.parametrize("method, if_wrong, if_right, weight", [
    ("trapo", GUIDED, [0] * 8, 0.2), ("micro", GUIDED, [0] * 8, 0), ("naive", GUIDED, [0] * 8, 1),
    ("micro-luffy", GUIDED, [0] * 8, 0.5 * 0.1 * 0.02 / 0.12 ** 2),
    ("fixed-prefix", GUIDED, GUIDED, 0.2), ("grpo", [0] * 8, [0] * 8, 0),
    ("luffy", [0] * 7 + [10], [0] * 7 + [10], 0.5 * 0.1 * 0.02 / 0.12 ** 2),
    ("sft", [10], [10], 1), ("hpt", [0] * 7 + [10], [0] * 8, 1),
    ("pope", [0] * 4 + [2] * 4, [0] * 4 + [2] * 4, 0), ("uft", [9] * 8, [9] * 8, 1e-3),
    ("chord", [0] * 7 + [10], [0] * 7 + [10], 0.1 * 0.02 * 0.98),
    ("ghpo", [0] * 8 + [2] * 8 + [5] * 8 + [8] * 8, [0] * 32, 0)])
def test_methods_differ_in_what_their_rollouts_start_from_and_what_expert_tokens_weigh(
        method, if_wrong, if_right, weight):
    """Prefix lengths, of ten tokens, if all goes wrong or right; weight at p = 0.02, A = 0.5."""
    args = settings("--method", method)
    for outcome, lengths in ((WRONG, if_wrong), (RIGHT, if_right)):
        (group,), _ = draw([outcome] * 32, schedule=args.schedule)
        assert [len(r.prefix) for r in group] == lengths
    expert = Rollout([5], [6], advantage=0.5)
    found = gradient(lambda logp: trapo.rollout_loss(expert, logp, args), [math.log(0.02)])
    assert found.item() == pytest.approx(-weight)

def test_what_is_typed_goes_over_the_method_and_that_over_the_defaults():
    """The paper's Section 5 is the default, a method sets its four, a flag has the last word."""
    args = settings("--ratios", "0", "0.25", "0.5", "1")  # the released code's
    assert (args.method, args.dataset, args.alpha, args.lr) == ("trapo", "gsm8k", 0.1, 5e-6)
    assert args.schedule == [MicroGroup(4, 0, -1), MicroGroup(2, 0.25, 0.5),
                             MicroGroup(1, 0.5, 0.7), MicroGroup(1, 1, 0.9)]
    args = settings("--method", "grpo", "--sizes", "3", "--prefix-loss", "sft", "--lr", "0.5")
    assert args.schedule == [MicroGroup(3, 0, -1)]
    assert args.prefix_loss == "sft" and args.lr == 0.5 and settings().schedule == PAPER

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

def test_trsft_values_by_hand():
    """Inside -log p, outside 1 - log(alpha) - p / alpha; both are -log(alpha) at the edge.

    alpha = 0 is SFT, alpha = 1 is 1 - p. p = 0 costs 1 - log(alpha) and has gradient 0, or inf.
    """
    logp = torch.tensor([0.5, 0.04, 0.1 * (1 - 1e-9), 0.1 * (1 + 1e-9), 0.0],
                        dtype=torch.float64).log().reshape(1, 5)
    log, edge = math.log, -math.log(0.1)
    for alpha, values in ((0, [-log(0.5), -log(0.04), edge, edge, INF]),
                          (1, [0.5, 0.96, 0.9, 0.9, 1]),
                          (0.1, [-log(0.5), 1 + edge - 0.4, edge, edge, 1 + edge])):
        expected = torch.tensor([values], dtype=torch.float64)  # the shape is kept
        torch.testing.assert_close(trsft_loss(logp, alpha), expected, rtol=0, atol=1e-8)
        assert gradient(lambda x: trsft_loss(x, alpha), [-INF]).item() == -(alpha == 0)
    for alpha in (-0.01, 1.01, math.nan, INF):
        with pytest.raises(ValueError, match="alpha"):
            trsft_loss(logp, alpha)

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

@pytest.mark.parametrize("name, alpha, weight", [
    ("sft", 0.1, lambda p: 1), ("trsft", 0.1, lambda p: min(p / 0.1, 1)), ("trsft", 1, lambda p: p),
    ("trsft", 0, lambda p: 1), ("luffy", 0.1, lambda p: -0.25 * 0.1 * p / (p + 0.1) ** 2),
    ("profit", 0.1, lambda p: p >= 0.1), ("chord-phi", 0.1, lambda p: p * (1 - p)),
    ("none", 0.1, lambda p: 0)])
def test_each_prefix_loss_has_the_weight_on_grad_log_p_that_its_paper_says(name, alpha, weight):
    """The picture in the README. alpha = 1 is DFT; LUFFY's is times the advantage, here -0.25."""
    p = [1e-8, 0.02, 0.09, 0.11, 0.5, 1.0]
    found = gradient(lambda x: PREFIX_LOSSES[name](x, -0.25, alpha), [math.log(x) for x in p])
    torch.testing.assert_close(-found, torch.tensor([weight(x) for x in p], dtype=torch.float64))

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
    contexts, rewards = torch.tensor(sorted(played)).double().unbind(-1)  # [N, 8]
    contexts, advantages, whole = contexts.long(), group_advantages(rewards), 2 * 3 + 1
    torch.manual_seed(0)
    factors = []
    for logits in 2 * torch.randn(150, 8, dtype=torch.float64):  # of success, by context
        signed = logits.requires_grad_()[contexts] * (2 * rewards - 1)
        logprobs = torch.where(contexts == whole, 0, signed.sigmoid().log())
        chances = logprobs.sum(1, keepdim=True).exp().detach()   # of each group
        torch.testing.assert_close(chances.sum(), chances.new_tensor(1.0))
        (chances * advantages * logprobs).sum().backward()       # what the update does on average
        p = logits.detach().sigmoid()
        for context in (0, 2, 3, 4, 5, 6):
            right, wrong = (chances * (contexts == context) * (rewards == r) for r in (1, 0))
            baselines = [(x * (rewards - advantages)).sum() / x.sum() for x in (right, wrong)]
            factor = 1 - baselines[0] + baselines[1]
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
    outcomes, seen = [1, 1, 1, 1, 0, 0, 0, 0,  1, 1, 0, 0,  1, 0,  1], []

    def noted(problem, response):
        seen.append((problem, response))
        return reward(problem, response)
    groups, script = draw(outcomes, problems, reward=noted, max_response=30)
    assert seen[0] == (problems[0], [1]) and (problems[1], SOLUTION[:2] + [0]) in seen
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

def test_no_help_without_a_solution_and_nothing_to_draw_after_a_whole_one():
    """8 free rollouts; and a solution of one token is whole at a ratio of 0.6 already."""
    (group,), script = draw([0] * 8, [Problem([5], [], "")])
    assert [r.prefix for r in group] == [[]] * 8
    assert [request for requests, _ in script.calls for request in requests] == [[5]] * 8
    schedule = [MicroGroup(1, 0.0, -1), MicroGroup(1, 0.6, ALWAYS)]
    (group,), script = draw([0], [Problem([5], [[9]], "")], schedule)
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

def test_a_share_may_be_a_range_and_only_ranges_draw_random_numbers():
    """Uniform, one draw a micro-group, with the picks; what follows a fixed share is as before."""
    lengths, problem = Counter(), Problem([5], [list(range(100)), list(range(100))], "")
    rng, plain = random.Random(0), random.Random(0)
    for _ in range(4000):
        solution, prefix = trapo.draw_prefix(problem, "0.2:0.3", rng)
        assert prefix == solution[:len(prefix)]
        lengths[len(prefix)] += 1
    assert set(lengths) == set(range(20, 31)) and min(lengths[n] for n in range(21, 30)) > 320
    rng.seed(0)
    for _ in range(9):
        trapo.draw_prefix(problem, 0.2, rng)
        plain.choice(problem.solutions)
    assert rng.getstate() == plain.getstate()

def test_annealing_is_a_cosine_to_0_on_shares_and_on_the_prefix_weight():
    args = settings(*"--anneal 80 --prefix-weight 0.5 --ratios 0 .2 0.4:.8 1".split())
    for step, left in ((0, 1), (20, 0.5 + 0.125 ** 0.5), (40, 0.5), (80, 0), (99, 0)):
        now = trapo.annealed(args, step)
        assert now.prefix_weight == pytest.approx(0.5 * left)
        ends = [float(end) for ratio in now.ratios for end in str(ratio).split(":")]
        assert ends == pytest.approx([0, 0.2 * left, 0.4 * left, 0.8 * left, left])
    assert trapo.annealed(settings(), 7).schedule == PAPER

# ==== Part 3. Log-probs of response tokens

EOS = [1, 2]

def test_the_state_at_position_t_minus_1_predicts_token_t():
    """Of [5, 6, 7, 8] from start 2 on: positions 1 and 2 give log p(7 | 5 6), log p(8 | 5 6 7)."""
    policy = Table(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    (found,), _ = token_logprobs(policy, [[5, 6, 7, 8]], [2])
    table = policy.rows.log_softmax(-1)
    assert found.tolist() == [table[1, 7].item(), table[2, 8].item()]

def tiny_policy(vocabulary=24, tied=False, seed=0):
    """A Qwen2 in float64 whose generation_config would spoil the samples, were it heeded.

    Its norms are torch's: transformers' compute in float32.
    """
    torch.manual_seed(seed)
    policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
        tie_word_embeddings=tied, pad_token_id=0)).double()
    for part in (policy.model, *policy.model.layers):
        for name in [name for name, _ in part.named_children() if name.endswith("norm")]:
            setattr(part, name, torch.nn.RMSNorm(16, eps=1e-6, dtype=torch.float64))
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

@pytest.mark.parametrize("tied, recompute", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_the_naive_log_softmax(monkeypatch, tied, recompute, temperature):
    """Values, entropies and every parameter's gradient, over chunk borders, to 1e-10.

    What sequences share is computed once: a prompt, an expert's prefix, a whole sequence.
    """
    monkeypatch.setattr(trapo, "HEAD_CHUNK", 3)
    policy, computed = tiny_policy(tied=tied).train(), []
    if recompute:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    policy.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel()))
    sequences = [[3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10], [4, 5, 6], [11, 12]]
    starts, weights = [3, 3, 2, 3, 1], torch.linspace(-1, 1, 8, dtype=torch.float64)

    def gradients(rows):
        total = sum((row * weights[:len(row)]).sum() for row in rows)
        return torch.autograd.grad(total, policy.parameters())

    logprobs, entropies = token_logprobs(policy, sequences, starts, temperature)
    assert computed == [5 + 0 + 1 + 2 + 1]  # the last token of a sequence predicts nothing
    assert [len(row) for row in logprobs] == [3, 3, 3, 0, 1]  # no token from `start` on is no error
    found = gradients(logprobs)
    expected = [naive(policy.eval(), s, start, temperature) for s, start in zip(sequences, starts)]
    torch.testing.assert_close(list(logprobs), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, gradients(expected), rtol=0, atol=1e-10)
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

@pytest.mark.parametrize("recompute", [False, True])
def test_what_sequences_share_is_computed_once(recompute):
    """Each distinct beginning is one node; values and gradients are those of separate passes."""
    policy, computed = tiny_policy().train(), []
    if recompute:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    sequences = [[3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], [3, 4, 5, 9], [3, 4, 5, 6, 10], [4, 5, 6]]
    starts = [3, 3, 3, 3, 1]
    hook = policy.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel()))
    logprobs, _ = token_logprobs(policy, sequences, starts)
    hook.remove()
    assert computed == [5 + 0 + 0 + 0 + 2]  # the last token of a sequence predicts nothing
    found = torch.autograd.grad(sum(row.square().sum() for row in logprobs), policy.parameters())
    policy.eval()
    expected = [naive(policy, s, start) for s, start in zip(sequences, starts)]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    expected = torch.autograd.grad(sum(row.square().sum() for row in expected), policy.parameters())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

def test_the_tree_reaches_attention_as_it_is(monkeypatch):
    """It travels as a mask of four dimensions, which no model may change: the paths' nodes."""
    seen = []
    monkeypatch.setattr(trapo, "plain_attention", lambda *x, **options: seen.append(x[1].shape)
                        or (x[1].transpose(1, 2).contiguous(), None))
    attend = trapo.attend

    def noted(module, query, key, value, mask, places=None, **options):
        assert mask.tolist() == [[[[0, 1, 2], [0, 3, 0]]]] and places.tolist() == [3, 1, 2, 4]
        return attend(module, query, key, value, mask, places, **options)
    monkeypatch.setitem(transformers.AttentionInterface()._global_mapping, "sdpa", noted)
    token_logprobs(tiny_policy(), [[3, 4, 5, 6], [3, 7, 8]], [1, 1])
    assert seen == [(2, 4, 3, 4)] * 2  # sequences, heads, tokens, dimensions; in each layer

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

@pytest.mark.parametrize("advantage", [0.75, -0.5, 0.0])
def test_masks_prompt_prefix_and_completion_each_get_their_own_loss_only(advantage):
    """No gradient on prompt tokens, TrSFT without advantage on prefix, -A on completion tokens."""
    rollout = Rollout([3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15], advantage=advantage)
    table = Table(2 * torch.randn(13, 30, generator=torch.Generator().manual_seed(0)).double())
    accumulate_gradients(table, [rollout], settings("--max-response", "10", "--alpha", "0.01"))
    targets = torch.arange(4, 16)[:, None]  # the first token has no context, none follows the last
    p = table.rows.detach().softmax(-1)[:-1].gather(1, targets)[:, 0]
    damped = (p[2:8] / 0.01).clamp(max=1)
    assert 0 < (damped < 1).sum() < 6  # inside and outside the trust region
    weights = torch.cat([torch.zeros(2), damped, torch.full((4,), advantage)])
    found = table.rows.grad.gather(1, torch.cat([targets, targets[:1]]))[:, 0]
    assert found[-1] == 0  # below: d log p / d logit is 1 - p, and 1 * max_response divides
    torch.testing.assert_close(found[:-1], weights * (p - 1) / 10)

@pytest.mark.parametrize("name", PREFIX_LOSSES)
def test_rollouts_are_left_out_exactly_if_their_gradient_is_zero(name):
    """By autograd over every prefix loss, with and without prefix, completion and advantage."""
    for prefix, completion, advantage in product(([], [7, 8]), ([], [9]), (0.0, -0.25)):
        rollout = Rollout([5], prefix, completion, advantage=advantage)
        size = len(prefix)

        def loss(logp):
            return torch.cat([PREFIX_LOSSES[name](logp[:size], advantage, 0.1),
                              policy_gradient_loss(logp[size:], advantage)])
        found = gradient(loss, [-1.0] * size + [-2.0] * len(completion))
        assert is_inert(rollout, name) is not bool(found.any())
        assert is_inert(rollout, "my own") <= (not prefix)  # what is not known counts as training

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
    assert before["held out"] < 0.35 and before["held out, greedy"] < 0.35
    assert after["held out"] > before["held out"] + 0.15
    assert after["held out, greedy"] > before["held out, greedy"] + 0.3

for fact in [value for name, value in globals().items() if name.startswith("test_")]:
    pytest.mark.tutorial(fact)  # leaves its mark on the function: this was the tutorial

# ==== The product: what the lecture runs on
# ==== Parts 4 and 5 again: the books of a step

def test_micro_batches_keep_within_the_budget_and_a_prompt_counts_once():
    """Every rollout once; those of a prompt are neighbours, the longest first. A batch's prompts,
    and its longest response times its size, keep within the budget, or it is one rollout."""
    rollouts = [Rollout([p] * 10, [7] * (n // 2), [8] * (n - n // 2))
                for p, n in ((1, 3), (2, 5), (1, 4), (2, 1), (1, 2))]
    for budget, expected in ((1000, [[1, 3, 2, 0, 4]]), (22, [[1, 3], [2, 0, 4]]),
                             (21, [[1, 3], [2, 0], [4]]), (1, [[1], [3], [2], [0], [4]])):
        batches = micro_batches(rollouts, budget)
        assert batches == [[rollouts[i] for i in batch] for batch in expected]
    assert micro_batches([], 8) == []

def test_every_problem_comes_once_an_epoch_and_every_epoch_in_another_order():
    """Steps may straddle epochs; the order is the seed's."""
    task = Task([Problem([i], [], "") for i in range(10)], [], None)
    orders = [[p.prompt_ids[0] for step in range(5) for p in trapo.batch_at(
        step, task, settings("--prompts", "4", "--seed", seed))] for seed in "001"]
    assert sorted(orders[0][:10]) == sorted(orders[0][10:]) == list(range(10))
    assert orders[0][:10] != orders[0][10:] and orders[0] == orders[1] != orders[2]

def step_of(base, *flags, reward=None, step=0):
    """One train_step on the base's rows: (metrics, groups)."""
    args = parse_args(["--model", base, "--prompts", "4", *flags])
    policy, _, sampler, optimizer, task, _ = trapo.prepare(args)
    task.reward = reward or task.reward
    return train_step(policy, sampler, optimizer, task, args, step)

@pytest.mark.parametrize("baseline", ["group", "context"])
def test_advantages_are_against_the_group_or_the_rollouts_of_the_same_context(base, baseline):
    _, groups = step_of(base, "--baseline", baseline, "--sizes", "3", "2", "2", "1",
                        reward=lambda _, response: float(len(response) % 2))
    for group in groups:
        for r in group:
            peers = [x.reward for x in group
                     if baseline == "group" or x.micro_group == r.micro_group]
            assert r.advantage == pytest.approx(r.reward - sum(peers) / len(peers))
    assert any(r.advantage for group in groups for r in group)

def test_metrics_and_log_probs_are_what_happened(base):
    """Recounted from the rollouts, which are those of the seed and the step. The update leaves
    log-probs and entropies on what it trained."""
    (metrics, groups), (_, again), (_, later), (_, other) = (step_of(
        base, "--temperature", "0.7", "--alpha", "0.02", "--seed", seed, step=step,
        reward=lambda _, response: float(len(response) % 2))
        for seed, step in (("0", 0), ("0", 0), ("0", 1), ("1", 0)))
    assert again == groups and later != groups != other
    rollouts = [r for group in groups for r in group]
    trained = [r for r in rollouts if not is_inert(r, "trsft")]
    before, _ = load_policy(base)
    for r in trained:
        sequence, start = r.prompt + r.prefix + r.completion, len(r.prompt)
        full = distributions(before, sequence, start, 0.7)
        assert r.logprobs == pytest.approx(naive(before, sequence, start, 0.7).tolist(), abs=1e-5)
        assert r.entropies == pytest.approx((-(full.exp() * full).sum(-1)).tolist(), abs=1e-5)
    assert len(rollouts) == 32 and [r for r in rollouts if r.logprobs] == trained
    p = [math.exp(x) for r in trained for x in r.logprobs[:len(r.prefix)]]
    for name, values in {
            "guided": [bool(r.prefix) for r in rollouts],
            "reward_guided": [r.reward for r in rollouts if r.prefix and r.completion],
            "reward_unguided": [r.reward for r in rollouts if r.micro_group == 0],
            "truncated": [r.completion[-1] != 1 for r in rollouts if r.completion],
            "response_length": [len(r.prefix + r.completion) for r in rollouts],
            "entropy": [x for r in trained for x in r.entropies[len(r.prefix):]],
            "prefix_p": p, "prefix_outside_share": [x < 0.02 for x in p]}.items():
        assert metrics[name] == pytest.approx(statistics.fmean(values), rel=1e-4), name
    assert 0 < metrics["prefix_outside_share"] < 1 and metrics["logprob_gap"] < 1e-5
    assert metrics["tokens_generated"] == sum(len(r.completion) for r in rollouts)
    assert metrics["tokens_trained"] == sum(len(r.logprobs) for r in trained)
    assert metrics["rollouts_skipped"] == 32 - len(trained)

def test_every_step_and_every_process_draws_anew(base, monkeypatch):
    """From the same weights and prompts: each has random numbers of its own."""
    monkeypatch.setattr(trapo, "batch_at", lambda step, task, args: task.train[:1] * 9)
    drawn = set()
    for step, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(trapo, "RANK", rank)
        _, groups = step_of(base, "--method", "grpo", step=step)
        drawn.add(str([r.completion for group in groups[:8] for r in group]))
    assert len(drawn) == 3

def test_a_step_without_a_gradient_moves_on_by_its_momentum(base):
    """AdamW's; parameters without a gradient would be left where they are."""
    policy, _, sampler, optimizer, task, _ = trapo.prepare(
        args := parse_args(["--model", base, "--method", "grpo"]))
    for task.reward in (lambda _, response: float(len(response) % 2)), (lambda *_: 0.0):
        before = copy.deepcopy(policy.state_dict())
        metrics, _ = train_step(policy, sampler, optimizer, task, args, 0)
        assert any((x != before[name]).any() for name, x in policy.state_dict().items())
    assert metrics["grad_norm"] == 0

def tiny_run(base, out, *flags):
    """The command line of a run of about a second."""
    return ["--model", base, "--out", str(out), *flags]

def repeatable(folder):
    """A run's metrics without what a clock or a memory gauge said."""
    return [{k: v for k, v in line.items() if not re.match("seconds|peak", k) and v != {}}
            for line in metrics_of(folder)]

def weights(folder):
    return trapo.model_folder(str(folder)).joinpath("model.safetensors").read_bytes()

def assert_alike(a, b):
    """Two runs logged the same numbers and ended in the same weights, to 1e-5."""
    for x, y in zip(repeatable(a), repeatable(b), strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            close = isinstance(value, float)
            assert y[name] == (pytest.approx(value, rel=1e-5, abs=1e-7) if close else value), name
    x, y = (safetensors.torch.load(weights(run)) for run in (a, b))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)

def assert_same(run, other):
    """The same metrics, weights and kept rollouts, bit for bit."""
    assert repeatable(run) == repeatable(other) and weights(run) == weights(other)
    assert Path(run, "rollouts.jsonl").read_bytes() == Path(other, "rollouts.jsonl").read_bytes()

def not_finite_at(step):
    """group_advantages so large that the gradient's norm is infinite, in this train step of one
    prompt, counted from 1."""
    calls = iter(range(1, 1000))
    return lambda rewards: group_advantages(rewards) + (1e30 if next(calls) == step else 0)

def test_a_step_whose_gradient_is_not_finite_is_skipped_and_reported(base, monkeypatch, capsys):
    """The weights stay, the run goes on, metrics and a line say so; Adam's first step may be late.
    If it is the first that is skipped, a resumed run starts with Adam's first, too: bit for bit."""
    flags = ("--prompts", "1", "--save-every", "1", "--warmup", "0", "--method", "fixed-prefix")
    for name, step, steps in (("run", 2, "2"), ("late", 1, "1"), ("whole", 1, "2")):
        monkeypatch.setattr(trapo, "group_advantages", not_finite_at(step))
        main(tiny_run(base, name, "--steps", steps, *flags))
    assert weights("run/checkpoint-1") == weights("run") and "not finite" in capsys.readouterr().out
    main("--resume --out run --steps 3".split())
    finite = [line["grad_norm"] is not None for line in metrics_of("run") if line["step"]]
    assert finite == [True, False, True] and weights("run/checkpoint-2") != weights("run")
    assert weights("whole/checkpoint-1") == weights(base)
    main("--resume --out late --steps 2".split())
    assert repeatable("late")[-1] == repeatable("whole")[-1] and weights("late") == weights("whole")

# ==== Part 6. The sampler

RAGGED = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [3, 4, 5], [14, 15], [16, 17, 18]] * 3
LIMITS = [9, 12, 5, 1, 0, 12] * 3
UNIFORMS = torch.rand(18, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope="module")
def policy():
    return tiny_policy()

@pytest.mark.parametrize("temperature, room", [(0.0, 128), (0.0, 2), (1.0, 3), (0.6, 128)])
def test_the_samplers_log_probs_are_those_of_full_forwards(policy, temperature, room, monkeypatch):
    """Of what was drawn, under softmax(logits / temperature); greedy reports softmax(logits), and
    draws what model.generate does. Any EOS id ends a row, as its last token; or the limit does.
    Rows finish at different times, and with little room the batch is moved often."""
    monkeypatch.setattr(trapo, "ROOM", room)
    torch.manual_seed(1)
    completions, logprobs = sample(policy, RAGGED, LIMITS, temperature)
    for request, limit, completion, found in zip(RAGGED, LIMITS, completions, logprobs):
        expected = naive(policy, request + completion, len(request), temperature or 1.0)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(),
                                   rtol=0, atol=1e-9)
        assert len(completion) == limit or completion[-1] in EOS and len(completion) < limit
        assert not set(completion[:-1]) & set(EOS)
    assert {1, 2} & {c[-1] for c in completions if c} and 12 in map(len, completions)
    assert sample(policy, [], []) == ([], []) and policy.training  # as it was before
    clean = copy.deepcopy(policy)
    clean.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    for request, limit, completion in zip(RAGGED, LIMITS, completions):
        if limit and temperature == 0:
            assert clean.generate(torch.tensor([request]), do_sample=False, max_new_tokens=limit,
                                  attention_mask=torch.ones(1, len(request)))[0].tolist() == [
                *request, *completion]

def test_samples_come_from_the_exact_policy():
    """Frequencies of all completions against their probabilities: no top-k, top-p, or penalty. Two
    prompts of different length, up to 2 tokens of a vocabulary of 6, temperature 0.8: Pearson's
    chi-square, 25 degrees of freedom each, stays below 25 + 5 sqrt(2 * 25)."""
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

def test_what_a_request_draws_depends_on_its_random_numbers_alone(policy, monkeypatch):
    """Whatever --kv-tokens splits, however often the batch moves, and wherever a request stands. A
    batch's rows times the longest request with its limit keep within --kv-tokens, or it is one."""
    decode, sizes = trapo.decode, []

    def measured(policy, requests, limits, *rest):
        longest = max(len(request) + limit for request, limit in zip(requests, limits))
        sizes.append((len(requests), len(requests) * longest))
        return decode(policy, requests, limits, *rest)
    monkeypatch.setattr(trapo, "decode", measured)
    completions, logprobs = sample(policy, RAGGED, LIMITS, uniforms=UNIFORMS)
    for room, budget, batches in ((128, 1, [18]), (128, 40, range(2, 18)), (1, 1000, [1]),
                                  (2, 40, range(2, 18))):
        monkeypatch.setattr(trapo, "ROOM", room)
        sizes.clear()
        others, values = sample(policy, RAGGED[::-1], LIMITS[::-1], uniforms=UNIFORMS.flip(0),
                                kv_tokens=budget)
        assert others[::-1] == completions
        for a, b in zip(logprobs, values[::-1]):
            assert a == pytest.approx(b, abs=1e-9)
        assert sum(rows for rows, _ in sizes) == 18 and len(sizes) in batches
        assert all(rows == 1 or tokens <= budget for rows, tokens in sizes)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_graph_draws_what_the_cpu_draws(monkeypatch):
    """The same completions from the same numbers, however often the graph is captured anew."""
    monkeypatch.setattr(trapo, "ROOM", 2)
    (here, expected), (there, found) = (
        sample(tiny_policy().to(device), RAGGED, LIMITS, uniforms=UNIFORMS)
        for device in ("cpu", "cuda"))
    assert there == here
    for a, b in zip(found, expected):
        assert a == pytest.approx(b, abs=1e-6)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_long_tail_is_drawn_exactly(temperature):
    """Against numpy's inverse CDF in float64: 151 936 tokens, half the mass in tiny ones. Tokens of
    weight zero, at both ends, here and there, and whole stretches, are never drawn."""
    size, random_numbers = 151_936, torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=random_numbers) * temperature
    logits[77_777] = temperature * math.log(2.5e5)  # about half; the others some 1e-6 each
    gone = torch.rand(size, generator=random_numbers) < 0.1
    gone[:300] = gone[-700:] = gone[50_000:52_000] = True
    logits[gone] = -INF
    weights = ((logits / temperature) - (logits / temperature).max()).exp().double().numpy()
    edges = weights.cumsum()
    uniforms = numpy.concatenate([
        [0, 1 - 2 ** -53], numpy.random.default_rng(0).random(40),
        numpy.nextafter(edges[[400, 60_000, 77_776, 77_777]] / edges[-1], 1) + 1e-13])
    expected = numpy.searchsorted(edges, uniforms * edges[-1], side="right")
    expected[1] = numpy.flatnonzero(weights)[-1]
    found, logprobs = draw_tokens(logits.expand(len(uniforms), -1), torch.from_numpy(uniforms),
                                  temperature)
    assert found.tolist() == expected.tolist()
    assert not gone[found].any() and 10 < (found != 77_777).sum() < 45
    assert logprobs.numpy() == pytest.approx(numpy.log(weights[expected] / edges[-1]), abs=1e-5)

def test_eval_computes_where_training_does_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(trapo, "fill_in", lambda known: asked.append(known) or 1 / 0)
    for flags, device in (([], Settings().device), (["--device", "cuda"], "cuda")):
        with pytest.raises(SystemExit):
            evaluation.main(["model", "m", *flags])
        assert asked.pop()["device"] == device

@pytest.mark.parametrize("modern", [True, False])
def test_bf16_is_on_by_default_where_the_card_computes_in_it(modern, monkeypatch):
    """Not on a T4 or V100, which would emulate it; and never on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated or modern)
    known = {"dataset": "gsm8k", "model": "x", "device": "cuda"}
    assert trapo.fill_in(known).bf16 is modern and trapo.fill_in(known | {"bf16": True}).bf16
    assert trapo.fill_in(known | {"device": "cpu"}).bf16 is False

# ==== Part 7. Models

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN_ROWS = [{"problem": f"What is {n} and {n}?",
               "solution": f"It is {n} + {n}.\n\nThat is \\boxed{{{2 * n}}}.",
               "answer": str(2 * n)} for n in range(2, 26)]

@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE like Qwen's, with its special tokens and a ChatML template."""
    bpe = transformers.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    texts = [" ".join(row.values()) for row in PLAIN_ROWS] + [trapo.INSTRUCTION + " user"] * 20
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHATML)

@pytest.fixture(scope="module")
def stand_in(tokenizer, tmp_path_factory):
    """A folder like Qwen2.5-Instruct's: tied embeddings, 7 query heads to a key head, random."""
    folder = tmp_path_factory.mktemp("stand-in")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=512, hidden_size=56, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.1, max_position_embeddings=1024))
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.1,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    for part in model, tokenizer:
        part.save_pretrained(folder)
    return str(folder)

def like(folder, tokenizer=None, **changes):
    """A copy of a model's folder, perhaps with another tokenizer, of which this is changed."""
    shutil.copytree(folder, "copied")
    if tokenizer:
        tokenizer = copy.deepcopy(tokenizer)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained("copied")
    return "copied"

def put(path, content, result=None):
    """A file with this text, or this dictionary merged into its JSON; returns the result."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return result

def test_loaded_policies_have_fp32_master_weights_and_no_dropout(stand_in):
    """At a learning rate of 5e-6, updates of bf16 weights would round to nothing."""
    transformers.AutoModelForCausalLM.from_pretrained(
        put(like(stand_in) + "/config.json", {"attention_dropout": 0.5}, "copied"),
        dtype=torch.bfloat16).save_pretrained("copied")
    policy, _ = load_policy("copied")
    assert {p.dtype for p in policy.train().parameters()} == {torch.float32}
    (first,), (second,) = (token_logprobs(policy, [[3, 4, 5, 6]], [1])[0] for _ in range(2))
    assert torch.equal(first, second)

@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_what_the_chat_template_prints_after_an_answer_ends_a_response_and_a_solution(
        stand_in, tokenizer, eos):
    """Qwen's base models stop at <|im_end|>, though their config names <|endoftext|> alone.
    Sampling defaults, which may contradict each other, are not kept: none could be saved."""
    turn, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    put(like(stand_in, tokenizer, eos_token=eos) + "/generation_config.json",
        json.dumps({"eos_token_id": end, "temperature": 0.9, "do_sample": True}))
    policy, other = load_policy("copied")
    assert set(policy.generation_config.eos_token_id) == {turn, end}
    assert read(other, PLAIN_ROWS[0])[0][1] == [PLAIN_ROWS[0]["solution"] + "<|im_end|>"]
    policy.save_pretrained("saved")
    assert "temperature" not in Path("saved/generation_config.json").read_text()

def test_a_tokenizer_with_several_named_templates_is_trained_and_saved(stand_in, tokenizer):
    """It saves a folder of them; the final model is one rename, whatever it holds."""
    named = {"default": CHATML, "tool_use": CHATML + " "}
    main([*model(like(stand_in, tokenizer, chat_template=named)), "--method", "sft"])
    assert load_policy("runs/copied-sft-seed0")[1].chat_template == named

# ==== Part 7. Data and reward

def read(tokenizer, *rows, **limits):
    """make_problems on rows: a list of (prompt, solutions, answer) as text."""
    args = Namespace(dataset="rows", test=None, **{"max_prompt": 500, "max_response": 500} | limits)
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
    ("\x00\ud83d", "7", 0.0),
    ("\\boxed{8.7 \\times 10^{8}}", "8.7e8", 1.0), ("\\boxed{2e}", "2e", 1.0),  # e: ten, or Euler's
    ("\\boxed{2e-27}", "1e-27", 0.0), ("Put it in \\boxed{}. So \\boxed{5}", "5", 1.0),
    ("\\boxed{4} \\boxed{5} \\boxed{6}", "5", 0.0), ("5 or \\boxed{6}", "5", 0.0),
    ("\\boxed{4}, no, it is \\boxed{5}", "5", 1.0), ("\\boxed{proof}", "proof", 0.0)])
def test_math_reward_is_one_for_an_equal_answer_and_never_raises(response, answer, reward):
    """Math-Verify's verdict on fractions, tuples, powers of ten, boxes, nonsense, broken LaTeX."""
    assert math_reward(response, answer) == reward

def test_a_number_too_large_to_compute_is_wrong_and_no_endless_wait(monkeypatch):
    usual = math_verify.utils.timeout
    monkeypatch.setattr(math_verify.utils, "timeout", lambda seconds: usual(1))
    monkeypatch.setattr(math_verify, "verify", lambda right, found: False)  # has its own 5 seconds
    assert math_reward("\\boxed{9^{9^{9^{9}}}}", "8.7e8") == 0.0

GSM8K_ROWS = [{"question": f"Ann has {n} times 536 pens. How many?", "answer":
               f"She has {n}*536 = <<{n}*536={n * 536}>>{n * 536}.\n#### {n * 536:,}"}
              for n in range(2, 14)]

def openr1(problem, text, answer):
    """A row as in OpenR1-Math-46k-8192."""
    return {"prompt": [{"role": "system", "content": "Your task is to think."},
                       {"role": "user", "content": problem}],
            "target": [{"role": "assistant", "content": text}],
            "reward_model": {"ground_truth": answer, "style": "rule"}, "data_source": "openr1"}

@pytest.mark.parametrize("row, solutions, answer", [
    (GSM8K_ROWS[0], ["She has 2*536 = 1072.\n\\boxed{1072}"], "1072"),  # no calculator marks
    (openr1("How many?", "<think>\nHm, 7? Yes.\n</think>\nSo \\boxed{7}.", "7"),  # all one text
     ["Hm, 7? Yes.\nSo \\boxed{7}."], "7"),
    ({"problem": "How many?", "answer": 4.5}, [], "4.5"),
    ({"problem": "How many?", "answer": 2e-05, "solution": None}, [], "0.00002"),
    ({"problem": "How many?", "answer": "4", "solution": ""}, [], "4"),
    ({"question": "How many?", "answer": "4", "solution": ["S", "", "T"]}, ["S", "T"], "4")])
def test_rows_of_gsm8k_of_openr1_and_plain_ones_become_problems(tokenizer, row, solutions, answer):
    """With one solution, several or none, which is never guided; the turn's end closes each."""
    ((prompt, found, right),) = read(tokenizer, row)
    assert "How many?" in prompt and "Your task" not in prompt
    assert found == [text + "<|im_end|>" for text in solutions] and right == answer

def test_the_prompt_is_the_chat_template_or_a_plain_one(tokenizer):
    """With INSTRUCTION, and the assistant's turn opened. A special token in a problem is text. A
    plain prompt begins with the BOS that the tokenizer adds; an EOS behind it is taken off."""
    asked = PLAIN_ROWS[0]["problem"] + "\n" + trapo.INSTRUCTION
    ((chat, _, _),) = read(tokenizer, PLAIN_ROWS[0])
    assert chat == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert trapo.prompt_tokens("What ends <|im_end|> here?", tokenizer).count(end) == 1
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)])
    assert read(bare, PLAIN_ROWS[0])[0][:2] == (
        f"<|im_start|>{asked}\n\n", [PLAIN_ROWS[0]["solution"] + "<|im_end|>"])

def test_a_template_may_print_the_date_or_open_the_thoughts(tokenizer):
    """The date is always the same, or no run could be resumed; a <think> is closed in the text."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML
    assert read(other, PLAIN_ROWS[0])[0][0].startswith("01 Jan 2026 <|im_start|>user")
    other.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    for text, expected in (("<think>\nHm.\n</think>\nSo", "Hm.\n</think>\nSo"),
                           ("So", "</think>\n\nSo")):
        ((_, solutions, _),) = read(other, PLAIN_ROWS[0] | {"solution": text})
        assert solutions == [expected + "<|im_end|>"]

@pytest.mark.parametrize("changes", [{"answer": ""}, {"answer": None}, {"problem": None}, {
    "problem": ""}, {"problem": "long " * 300}, {"solution": "long " * 300}])
def test_rows_that_cannot_be_used_are_dropped_and_counted_in_one_line(changes, tokenizer, capsys):
    """Nothing there, or too long: the other rows are kept."""
    row = PLAIN_ROWS[0]
    assert len(read(tokenizer, row, row | changes, row | {"solution": None},
                    row | {"solution": ["long " * 300, "S"]}, max_response=200)) == 3
    (kept, dropped), = (x.split("dropped") for x in capsys.readouterr().out.splitlines())
    assert "3 problems, 2 with solutions" in kept and re.findall(r"\d+", dropped) == ["1"]

@pytest.mark.parametrize("name", ["max_prompt", "max_response"])
def test_lengths_of_exactly_the_limit_are_kept_and_one_more_is_out(name, tokenizer):
    ((prompt, (solution,), _),) = read(tokenizer, PLAIN_ROWS[0])
    limit = len(tokenizer({"max_prompt": prompt, "max_response": solution}[name]).input_ids)
    assert read(tokenizer, PLAIN_ROWS[0], **{name: limit})
    with pytest.raises(InputError, match="1 (prompt|solution) too long"):
        read(tokenizer, PLAIN_ROWS[0], **{name: limit - 1})

def test_rows_are_read_as_they_were_written():
    """Numbers in JSON keep their digits; parquet keeps lists, and null is null. A file's name is no
    pattern; one that is rewritten, in the same second even and with a BOM, is read again."""
    text = '{"answer": 0.10}\n\n{"problem": "P\u2028", "answer": 12345678901234567890}\n'
    put("rows.json", "[" + text.strip().replace("\n\n", ",") + "]")
    for name in ("rows.json", put("rows[12].jsonl", text, "rows[12].jsonl")):
        assert [row["answer"] for row in load_rows(name)] == ["0.10", "12345678901234567890"]
    before = os.stat(name).st_mtime_ns
    os.utime(put(name, "\ufeff" + text.replace("0.10", "0.20"), name), ns=(before, before))
    assert load_rows(name)[0]["answer"] == "0.20"
    rows = [{"answer": "1", "solution": ["S", "T"]}, {"answer": None, "solution": []}]
    pandas.DataFrame(rows).to_parquet("rows.parquet")
    assert load_rows("rows.parquet") == rows

def test_the_last_rows_are_held_out_a_tenth_at_most_or_those_of_another_file(tokenizer):
    """Held-out problems need no solution and are not trained on, though a file holds them twice."""
    def split(rows, *flags):
        task = make_task(tokenizer, settings("--dataset", write_rows(rows), *flags))
        return task, [p.answer for p in task.train], [p.answer for p in task.heldout]

    known = [row["answer"] for row in PLAIN_ROWS]
    task, *answers = split(PLAIN_ROWS, "--eval-size", "2")
    assert answers == [known[:-2], known[-2:]] and not task.heldout[0].solutions
    assert task.reward(task.heldout[0], task.train[0].solutions[0]) == 0.0
    assert all(task.reward(p, p.solutions[0]) == 1.0 for p in task.train)  # EOS does not disturb it
    assert split(PLAIN_ROWS[:11] + PLAIN_ROWS[-1:] * 9)[1:] == (known[:11], known[-1:] * 2)
    assert split(PLAIN_ROWS[:9])[1:] == (known[:9], [])
    test = write_rows(PLAIN_ROWS[:5], "test.jsonl")
    assert split(PLAIN_ROWS[3:], "--test", test, "--eval-size", "4")[1:] == (known[5:], known[1:5])

def real_rows(name):
    """Rows as in OpenR1, or GSM8K's shortest."""
    if name == "openr1":
        return [openr1(row["problem"], f"<think>\n{row['solution']}\n</think>\nSo.", row["answer"])
                for row in PLAIN_ROWS]
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there")
    return sorted(load_rows(f"{DATA}/gsm8k_train.jsonl"), key=lambda row: len(row["answer"]))[:24]

@pytest.mark.parametrize("name", ["gsm8k", "openr1"])
def test_the_real_path_trains_a_qwen_instruct_that_plain_transformers_loads(name, stand_in):
    """From a chat model's folder and real rows to a folder of the trained weights."""
    pandas.DataFrame(real_rows(name)).to_parquet("rows.parquet")
    main(["--model", stand_in, "--dataset", "rows.parquet", "--out", "run", "--steps", "2",
          "--prompts", "2", "--max-prompt", "900", "--max-response", "70", "--eval-size", "1",
          "--lr", "1e-3", "--device", "cpu"])
    _, first, second = metrics_of("run")
    assert first["guided"] == second["guided"] == 0.5  # a random policy needs all the help
    lines = Path("run", "rollouts.jsonl").read_text().splitlines()
    kept = [json.loads(line)["rollouts"] for line in lines]
    whole = [r["reward"] for group in kept for r in group if not r["completion"]]
    assert whole and all(whole)  # the experts' whole solutions verify
    assert first["logprob_gap"] < 1e-4
    assert not logging.getLogger("math_verify").isEnabledFor(logging.ERROR)  # it has much to say
    again, origin = map(transformers.AutoModelForCausalLM.from_pretrained, ("run/model", stand_in))
    policy, _ = load_policy("run/checkpoint-2")
    ids = torch.arange(1, 40)[None]
    assert torch.equal(again(ids).logits, policy(ids).logits)
    assert not torch.allclose(origin(ids).logits, policy(ids).logits, atol=1e-3)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()  # tied
    assert set(again.generation_config.eos_token_id) == set(origin.generation_config.eos_token_id)
    saved, given = map(transformers.AutoTokenizer.from_pretrained, ("run/model", stand_in))
    assert saved.get_vocab() == given.get_vocab() and saved.chat_template == CHATML

# ==== Part 8. The sampler's copy, and processes

def test_with_bf16_the_sampler_and_the_update_compute_in_it_and_master_weights_are_fp32(
        stand_in, base, monkeypatch):
    """Cast parameter by parameter, tied ones stay tied; RoPE's buffers and gradients stay fp32.
    Log-probs are close to those of fp32, but not equal; so is what the sampler noted."""
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__",
                        lambda *_: pytest.fail("a second fp32 model was made"))
    policy, _ = load_policy(stand_in)
    sampler = trapo.make_sampler(policy, settings("--bf16"))
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    assert sampler.lm_head.weight is sampler.model.embed_tokens.weight
    assert not any(p.requires_grad for p in sampler.parameters())
    assert trapo.make_sampler(policy, settings("--no-bf16")) is policy
    rollouts = [replace(r) for r in BATCH]
    accumulate_gradients(policy, rollouts, settings("--bf16"))
    for r in rollouts[:3]:
        expected = naive(policy, r.prompt + r.prefix + r.completion, len(r.prompt)).tolist()
        assert r.logprobs == pytest.approx(expected, abs=0.1)
        assert r.logprobs != pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        policy.lm_head.weight += 1
    trapo.refresh(sampler, policy)
    for mine, master in zip(sampler.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, master.bfloat16()) and master.grad.dtype == torch.float32
    main(tiny_run(base, "run", "--steps", "1", "--bf16"))
    assert 1e-5 < metrics_of("run")[-1]["logprob_gap"] < 0.1
    for tensor in (*sampler.buffers(), *safetensors.torch.load(weights("run")).values()):
        assert tensor.dtype == torch.float32

def test_held_out_problems_are_shared_out_and_draw_the_same_whoever_draws_for_them(
        base, monkeypatch):
    """Every problem has its own random numbers, each time the same, and counts once."""
    policy, _ = load_policy(base)
    drawn, problems = defaultdict(dict), [Problem([i, 3], [], "") for i in range(3, 30)]
    for time, world, rank in ((1, 1, 0), (2, 1, 0), (3, 3, 0), (3, 3, 1), (3, 3, 2)):
        task = Task([], problems, lambda problem, response: drawn[time].update(
            {problem.prompt_ids[0]: response}) or 1)
        monkeypatch.setattr(trapo, "WORLD", world)
        monkeypatch.setattr(trapo, "RANK", rank)
        monkeypatch.setattr(trapo, "gather", lambda value: [value] * world)
        share = trapo.evaluate(policy, task, settings("--max-response", "8"), greedy=False)
        assert share == {"held out": 1}
    assert drawn[1] == drawn[2] == drawn[3] and len(set(map(tuple, drawn[1].values()))) > 20
    problems[:] = problems[:1]  # the other processes have none, and still tell that to all
    assert trapo.evaluate(policy, task, settings(), greedy=True) == {
        "held out": 0, "held out, greedy": 0}

TWO_PROCESSES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import eval, trapo
start, dist.destroy_process_group = dist.init_process_group, lambda: None  # once for all of them
dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or start(*args, **kwargs)
end, os._exit = os._exit, lambda code: end(code) if code else None
*runs, last = json.loads(sys.argv[2])
for program, argv in runs:
    {"trapo": trapo, "eval": eval}[program].main(argv)
def fail(*_):
    raise RuntimeError("the second process is out of luck")
if trapo.RANK == 1:
    trapo.accumulate_gradients = fail
trapo.main(last)
"""

def in_a_shell(*argv, cwd, **environment):
    """Start Python with these arguments, on one thread."""
    return subprocess.Popen(
        [sys.executable, *argv], cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope="module")
def two(base, stand_in, tmp_path_factory):
    """A folder in which torchrun's two processes did what the tests below look at. SFT draws
    nothing, so it can be compared number by number: two steps each by one, two, and one process.
    Five prompts in small micro-batches: the processes have different numbers of them."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--method", "sft", "--prompts", "5", "--micro-tokens", "40", "--save-every", "2"]
    main(tiny_run(base, folder / "alone", *flags, "--steps", "6"))
    main(tiny_run(base, folder / "run", *flags, "--steps", "2"))
    write_rows(PLAIN_ROWS[:5], folder / "few.jsonl")
    runs = [("trapo", ["--resume", "--out", "run", "--steps", "4"]),
            ("trapo", tiny_run(base, "few", "--prompts", "1", "--eval-size", "3")),
            ("eval", ["model", stand_in, *FEW, "--out", "samples"]), tiny_run(base, "failed")]
    put(folder / "both.py", TWO_PROCESSES)
    shutil.copy(HERE / "trapo.py", folder)
    lone = in_a_shell("trapo.py", cwd=folder, RANK="1")  # at the same time: it only prints a line
    both = in_a_shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                      "both.py", str(HERE), json.dumps(runs), cwd=folder, CUDA_VISIBLE_DEVICES="")
    return Namespace(folder=folder, lone=(*lone.communicate(), lone.returncode),
                     both=(*both.communicate(timeout=240), both.returncode))

def test_two_processes_do_the_work_of_one(two):
    """Losses, norms, counts and weights; a process may have no prompt; an error in one ends both.
    With its traceback, and at once: destroy_process_group would wait for the other, up to a day."""
    folder, (_, errors, code) = two.folder, two.both
    assert [line["step"] for line in metrics_of(folder / "run")][-2:] == [3, 4], errors
    main(["--resume", "--out", str(folder / "run"), "--steps", "6"])
    assert_alike(folder / "alone", folder / "run")
    last = metrics_of(folder / "few")[-1]  # the second sampled and trained nothing, and waited
    assert last["step"] == 2
    assert last["logprob_gap"] is None or last["logprob_gap"] < 1e-5  # the copy is kept fresh
    load_policy(str(folder / "few"))
    assert code != 0 and "the second process is out of luck" in errors
    assert not list((folder / "failed").glob("*.jsonl"))

# ==== Part 8. Checkpoints, kills, Ctrl-C

processes = multiprocessing.get_context("forkserver")  # imports all this once, then forks
processes.set_forkserver_preload(["transformers.models.llama.modeling_llama", "math_verify",
                                  __name__])

def at_call(place, call, action, patch):
    """Let the given call, from 1, of a "module function" do something before it does its work."""
    module, name = place.split()
    function, calls = getattr(sys.modules[module], name), iter(range(1, 10 ** 9))

    def replaced(*args, **kwargs):
        if next(calls) == call:
            action()
        return function(*args, **kwargs)
    patch.setattr(sys.modules[module], name, replaced)

def raising(error):
    def fail():
        raise error
    return fail

def die_at(place, call, argv):
    """Run main(argv), but kill -9 this very process before the given call of a function."""
    at_call(place, call, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
    main(argv)

LONGER = ("--steps", "4", "--save-every", "2", "--eval-every", "2", "--eval-size", "1",
          "--recompute")

@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run with the flags LONGER that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(tiny_run(base, folder, *LONGER))
    return folder

def test_a_finished_run_holds_its_model_two_checkpoints_and_what_describes_it(whole):
    """Nothing unfinished stays. A resumed run remembers all settings, and goes on where it is, not
    in the folder it names; what its settings lack counts as the default."""
    assert {path.name for path in whole.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "defaults.json", "metrics.jsonl", "model",
        "rollouts.jsonl", "settings.json", "tokenizer"}
    assert weights(whole) == weights(whole / "checkpoint-4") != weights(whole / "checkpoint-2")
    assert [(line["step"], len(line.get("eval", ""))) for line in metrics_of(whole)] == [
        (0, 2), (1, 0), (2, 1), (3, 0), (4, 2)]  # sampled, and at both ends greedily as well
    before = json.loads((whole / "settings.json").read_text())
    assert set(before) == {f.name for f in fields(Settings)}
    shutil.copytree(whole, "moved")
    put("moved/settings.json", json.dumps({k: v for k, v in before.items() if k != "save_every"}))
    main("--resume --out moved --steps 5".split())
    assert json.loads(Path("moved/settings.json").read_text()) == before | {
        "save_every": 20, "steps": 5, "out": "moved"}
    assert [path.name for path in checkpoints(Path("moved"))] == ["checkpoint-4", "checkpoint-5"]

def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base, whole):
    """kill -9 amid rollouts, the update, the log and the writing of checkpoints: nothing is lost.
    Every attempt goes on from where the one before was killed, whatever that left half done."""
    for place, call in (("trapo write_whole", 2), ("trapo sample", 1), ("trapo refresh", 3),
                        ("trapo write_whole", 2), ("torch save", 1), ("shutil rmtree", 3),
                        ("os replace", 5)):
        resumed = ["--resume"] * Path("run/settings.json").exists()
        if not resumed:
            shutil.rmtree("run", ignore_errors=True)
        child = processes.Process(target=die_at, args=(place, call, tiny_run(
            base, "run", *LONGER, *resumed)))
        with pytest.MonkeyPatch.context() as patch:  # Python 3.11 does not say where this file is
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, place
    assert not Path("run/model").exists()
    main(tiny_run(base, "run", *LONGER, "--resume"))
    assert_same("run", whole)

def test_a_longer_run_replaces_the_model_or_loses_none(base, whole):
    """Stopped before the new one takes its place: the last checkpoint holds it."""
    main(tiny_run(base, "run", *LONGER, "--steps", "3"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_call("os replace", 6, raising(KeyboardInterrupt), patch)
        main(["--resume", "--out", "run", "--steps", "4"])
    main(["--resume", "--out", "run"])
    assert weights("run") == weights(whole) and not list(Path("run").glob(".*"))

def test_ctrl_c_is_one_line_and_loses_no_more_than_the_steps_since_the_last_checkpoint(
        base, whole, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
        at_call("trapo refresh", 3, raising(KeyboardInterrupt), patch)
        main(tiny_run(base, "run", *LONGER))
    assert "error: interrupted\n" in capsys.readouterr().err
    main([*tiny_run(base, "run", *LONGER), "--resume"])
    assert_same("run", whole)

TORCHS = RuntimeError("[enforce fail at inline_container.cc:672]")
TORCHS.__context__ = OSError(28, "No space left on device")

@pytest.mark.parametrize("error, advice", [
    (TORCHS.__context__, True), (OSError(5, "Input/output error"), False), (TORCHS, True),
    (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), True)])
def test_a_full_disk_is_one_line_and_loses_nothing(base, whole, error, advice, capsys):
    """The checkpoint before stays, --resume goes on from it; no other error advises to free space.
    A last line that was torn is cut off, behind an inner brace too."""
    with pytest.MonkeyPatch.context() as patch:
        at_call("torch save", 2, raising(error), patch)
        assert ("free space" in refusal(tiny_run(base, "run", *LONGER), capsys)) == advice
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-2"]
    with Path("run/metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "eval": {"held out": 0.5}')
    main([*tiny_run(base, "run", *LONGER), "--resume"])
    assert_same("run", whole)

def test_of_two_runs_that_begin_in_one_folder_the_later_is_refused(base, monkeypatch, capsys):
    at_call("trapo open_log", 1, lambda: put("run/settings.json", "another's"), monkeypatch)
    assert "run/settings.json" in refusal(tiny_run(base, "run"), capsys)
    assert Path("run/settings.json").read_text() == "another's"

# ==== Part 9. Rollouts that are kept, and printing

def test_two_groups_are_kept_and_one_is_shown_at_each_evaluation(base, capsys):
    """Also if nothing is held out, and at the last step: the fields of Rollout, as trained on."""
    main(tiny_run(base, "run", "--steps", "5", "--eval-every", "2"))
    kept = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [2, 2, 4, 4, 5, 5]
    for group in ([Rollout(**fields) for fields in line["rollouts"]] for line in kept):
        assert [r.micro_group for r in group] == [0, 0, 0, 0, 1, 1, 2, 3]
        assert all(len(r.logprobs) in (0, len(r.prefix + r.completion)) for r in group)
    output = capsys.readouterr().out
    assert len(re.findall(r"reward [01], A [+-]\d\.\d\d:  ", output)) == 3 * 8
    assert re.findall("step ([0-9]+): ", output) == ["2", "4", "5"]

@pytest.mark.parametrize("rewards, prefix, length, threshold, words", [
    ([], 0, 9, -1, "0.00 >= -1: no help"), ([1, 0], 3, 9, 0.7, "0.50 < 0.7: 33% of the solution"),
    ([1, 1], 0, 9, 0.7, "1.00 >= 0.7: no help"), ([1], 9, 9, ALWAYS, "< 2: 100% of the solution"),
    ([0], 0, 0, 0.7, "0% of the solution"), ([0], 0, 2, 0.7, "0% of the solution")])
def test_what_decided_on_help_is_said_in_words(rewards, prefix, length, threshold, words):
    """Never, by the mean reward, always; no solution; the real share, which may come to nothing."""
    group = [*(Rollout([5], [], [4], reward) for reward in rewards),
             Rollout([5], [7] * prefix, [4], micro_group=1, solution_length=length)]
    assert words in trapo.help_given(group, 1, MicroGroup(1, 0.2, threshold))

def test_a_run_whose_responses_are_all_cut_off_says_so(base, monkeypatch, capsys):
    monkeypatch.setattr(trapo, "grade", lambda *_: (0.0, ""))
    main(tiny_run(base, "run", "--dataset", write_rows([{"problem": "a 1 b +1 ?", "answer": "2"}]),
                  "--prompts", "1", "--steps", "2", "--max-prompt", "12", "--max-response", "1"))
    assert re.search(r"step 2: .*alone 0.000, .*cut off 1.000", capsys.readouterr().out)

# ==== Part 10. The command line

def refusal(argv, capsys, program=main):
    """main's one line on stderr for a command line that cannot be run."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        program(argv)
    (line,) = [x for x in capsys.readouterr().err.split("\n") if x and "it/s" not in x]
    assert line.startswith("error: ")
    return line

def rows(at, content, *flags):
    """The command line of a run of the stand-in on a file of these bytes, or rows."""
    if not isinstance(content, bytes):
        content = "\n".join(map(json.dumps, content)).encode()
    return [*model(at.stand_in), "--dataset", put("found.jsonl", content, "found.jsonl"), *flags]

def model(folder):
    """The command line of a run of this model."""
    return ["--model", folder, "--dataset", write_rows(PLAIN_ROWS), "--device", "cpu",
            "--max-prompt", "500", "--max-response", "500", *"--eval-size 0 --steps 1".split()]

def other(at, file, content):
    """The command line of a run of the stand-in, one of whose files has another content."""
    return put(like(at.stand_in) + "/" + file, content, model("copied"))

def state(at, change):
    """The stand-in with other weights: each by a function of its name and itself, if not None."""
    found = safetensors.torch.load_file(Path(like(at.stand_in), "model.safetensors"))
    found = {name: x for name in found if (x := change(name, found[name])) is not None}
    safetensors.torch.save_file(found, "copied/model.safetensors", {"format": "pt"})
    return model("copied")

def built(at, name, **changes):
    """A small random model of another kind, with the stand-in's tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        name, vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, pad_token_id=0,
        eos_token_id=2, bos_token_id=None, **changes)).save_pretrained("built")
    at.tokenizer.save_pretrained("built")
    return model("built")

def without_tokenizer(at):
    flags = built(at, "qwen2")
    for file in Path("built").glob("*token*"):
        file.unlink()
    return flags

def without_checkpoints(at):
    flags = resumed(at, "notes", "")
    for folder in checkpoints(Path("run")):
        shutil.rmtree(folder)
    return flags

def without_step(at):
    flags = resumed(at, "notes", "")
    torch.save({"optimizer": {"state": {}}}, "run/checkpoint-4/trainer.pt")
    return flags

def resumed(at, name, content, *flags):
    """The command line that resumes a finished run, of which this file was changed."""
    shutil.copytree(at.whole, "run")
    return put(f"run/{name}", content, ["--resume", "--out", "run", "--steps", "9", *flags])

def beside(at, content):
    """The command line of a run from a model beside whose folder stands this defaults.json."""
    shutil.copytree(at.base, "world/model")
    return put("world/defaults.json", content, ["--model", "world/model"])

P = {"problem": "P", "answer": "5"}
DEEP = b'{"problem": "P", "answer": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
PARTS = CHATML.replace("{{ m['content'] }}",
                       "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
REFUSED = [  # what is wrong, the flags or a function that prepares them, what the line says
    *((flags, flags, flags.split()[-2][2:].replace("-", ".")) for flags in (
        "--alpha 2", "--alpha nan", "--ratios 1.5", "--sizes 0", "--thresholds inf",
        "--thresholds nan", "--steps 0", "--steps two", "--steps 1.5", "--eval-size -1",
        "--lr 0", "--lr 1e8", "--temperature 0", "--warmup -1", "--seed -1", "--seed 1e19",
        "--method ppo", "--prefix-loss kl", "--device gpu", "--step 3", "--base-steps 9")),
    *((flags, flags, words) for flags, words in (
        ("--ratios 0 0.5", "--ratios"), ("--ratios 0:a", "ratios 0:a"),
        ("--ratios 0:0.5:1", "ratios 0:0.5:1"), ("--ratios 0:1.5", "0:1.5 .*out of range"),
        ("--sizes 4 2", "--sizes"), ("3", "3"),
        ("--overwrite", "--overwrite"), ("--dataset nowhere", "nowhere.*gsm8k"),
        ("--test no.jsonl", "no.jsonl"),
        ("--resume --out typo", "typo/settings.json"),
        *[("--device cuda", "--device cpu")] * (not torch.cuda.is_available()))),
    ("a newline in a name", lambda at: ["--dataset", "no\nfile"], r"no\\nfile"),
    ("--out is a file", lambda at: put("rows.csv", "", tiny_run(at.base, "rows.csv")), "rows.csv"),
    ("a folder that holds a thesis", lambda at: put(
        "out/thesis.tex", "all of it", tiny_run(at.base, "out")), "not empty.*--resume"),
    ("a finished run, without --resume", lambda at: resumed(at, "notes", "")[1:], "not empty"),
    # ---- models
    ("no such Qwen", lambda at: model("No-Such-Model"), "No-Such-Model.*folder"),
    ("a folder of no model", lambda at: put("empty/notes", "", model("empty")), "empty"),
    ("a torn config", lambda at: other(at, "config.json", "{"), "copied"),
    ("torn weights", lambda at: other(at, "model.safetensors", "torn"), "copied"),
    ("a LoRA adapter", lambda at: other(at, "adapter_config.json", "{}"), "adapter.*merge"),
    ("a template that wants parts", lambda at: other(at, "chat_template.jinja", PARTS), "template"),
    ("no tokenizer", lambda at: without_tokenizer(at), "tokenizer is missing"),
    ("no EOS", lambda at: put("built/chat_template.jinja", "", put(
        "built/tokenizer_config.json", {"eos_token": None}, built(at, "llama"))), "no EOS"),
    ("a missing layer", lambda at: state(at, lambda name, x: None if "1.mlp.up" in name else x),
     "missing_keys.*layers.1.mlp.up"),
    ("biases that the class lacks", lambda at: put(
        "built/config.json", {"attention_bias": False}, built(at, "llama", attention_bias=True)),
     "unexpected_keys.*bias"),
    ("weights of NaN", lambda at: state(at, lambda name, x: x * math.nan), "not finite"),
    ("capped logits", lambda at: built(at, "gemma2", head_dim=8, final_logit_softcapping=1.0),
     "capped|slides"),
    ("scaled logits", lambda at: built(at, "cohere", logit_scale=0.25), "scaled"),
    ("attention that slides", lambda at: built(at, "mistral", sliding_window=4096), "slides"),
    ("beyond the model's context", lambda at: rows(at, PLAIN_ROWS, "--max-response", "525"),
     "1025.*1024.*running.md"),
    # ---- rows
    ("no answer", lambda at: rows(at, [{"problem": "P"}]), "row 1 .*answer.*column"),
    ("an answer that is a list", lambda at: rows(at, [P, P | {"answer": ["5"]}]),
     "row 2 .*neither text nor number"),
    ("an answer of NaN", lambda at: rows(at, b'{"problem": "P", "answer": NaN}'), "row 1 .*nan"),
    ("rows of null", lambda at: rows(at, b"null\nnull"), "row 1"),
    ("rows that are nested too deep", lambda at: rows(at, DEEP), "line 1"),
    ("no JSON", lambda at: rows(at, b'{"problem": "P"}\n\nno'), "line 3"),
    ("Latin-1", lambda at: rows(at, '["\u00e9"]'.encode("latin-1")), "found.jsonl.*utf-8.*UTF-8"),
    ("no usable rows", lambda at: rows(at, [P | {"answer": ""}]), "no usable row.*1 no problem"),
    ("half a parquet", lambda at: put("x.parquet", "PAR1", rows(at, [], "--dataset", "x.parquet")),
     "x.parquet"),
    ("nothing left to train on", lambda at: rows(at, [P] * 10, "--eval-size", "1"),
     "all problems are held out"),
    ("nothing to imitate", lambda at: rows(at, [P] * 9, "--method", "sft"), "needs solutions"),
    ("GSM8K without a network", lambda at: rows(at, [], "--dataset", "gsm8k"), "openai/gsm8k"),
    # ---- --resume
    *((f"--resume {flags}", lambda at, flags=flags: resumed(at, "notes", "", *flags.split()),
       f"cannot change {flags.split()[0][2:]} ") for flags in (
           "--alpha 0.2", "--method grpo", "--seed 1", "--prompts 3")),
    *((f"settings.json with {content}", lambda at, content=content: resumed(
        at, "settings.json", content), f"settings.json.*{words}") for content, words in (
            ({"wind": 3}, "wind"), ({"alpha": 2}, "alpha 2"), ({"alpha": [0.1]}, "float"),
            ({"sizes": 4.5}, "float"), ("[1]", ""), ("{", ""))),
    ("a finished run whose checkpoints are gone", lambda at: without_checkpoints(at), "finished"),
    ("trainer.pt without its step", lambda at: without_step(at), "trainer.pt.*delete"),
    ("trainer.pt, torn", lambda at: resumed(at, "checkpoint-4/trainer.pt", "PK"), "trainer.pt"),
    # ---- defaults.json
    ("defaults.json with wind", lambda at: beside(at, '{"wind": 3}'), "defaults.json.*wind"),
    ("defaults.json, a list", lambda at: beside(at, '{"steps": [3]}'), "defaults.json.*float")]

def assert_refused(make, words, at, capsys, program=main):
    """In one line, and no file is written or deleted."""
    def files():
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    argv = make(at) if callable(make) else make.replace("STAND_IN", at.stand_in).split()
    before = files()
    line = refusal(argv, capsys, program)
    assert re.search(words, line) and files() == before, line

@pytest.mark.parametrize("make, words", [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line(
        make, words, base, stand_in, tokenizer, whole, monkeypatch, capsys, own_world):
    """Exit code 2, no traceback, no file written or deleted; for bad flags nothing is loaded."""
    if isinstance(make, str):
        monkeypatch.setattr(trapo, "load_policy", lambda *_: pytest.fail("loaded a model"))
    assert_refused(make, words, Namespace(base=base, stand_in=stand_in, tokenizer=tokenizer,
                                          whole=whole, setenv=monkeypatch.setenv), capsys)
    own_world.clear()  # transformers reports missing layers, too

@pytest.mark.parametrize("flags, dataset, prompts, eval_size", [
    ("", "rows.jsonl", 2, 0), ("--prompts 3 --method grpo", "rows.jsonl", 3, 0),
    ("--dataset gsm8k", "gsm8k", 32, 200)])
def test_a_model_brings_defaults_that_typed_flags_go_over(base, flags, dataset, prompts, eval_size):
    """Its folder, or the one around it; file names as seen from there. --dataset cancels all."""
    args = parse_args(["--model", base, *flags.split()])
    assert (args.dataset, args.prompts, args.eval_size) == (
        dataset.replace("rows", f"{Path(base).parent}/rows"), prompts, eval_size)
    assert args.out == f"runs/{Path(base).parent.name}-{args.method}-seed0"

def test_sft_then_rl_is_two_commands(base):
    """A run's folder is a model, with its data and lengths; never lr, steps, or the method."""
    main(tiny_run(base, "runs/sft", "--method", "sft", "--lr", "1e-3", "--steps", "1"))
    assert json.loads(Path("runs/sft/defaults.json").read_text()) == {
        "dataset": str(Path(base).with_name("rows.jsonl")), "test": None, "max_prompt": 12,
        "max_response": 12}
    for steps in ("1", "2 --resume"):  # --out follows from the model, method and seed
        main("--model runs/sft --method grpo --prompts 2 --eval-size 0 --device cpu --steps".split()
             + steps.split())
    assert [line["step"] for line in metrics_of("runs/sft-grpo-seed0")][-2:] == [1, 2]
    args = parse_args(["--model", "runs/sft/checkpoint-1"])
    assert (args.out, args.lr, args.max_response) == ("runs/sft-trapo-seed0", 5e-6, 12)

def test_the_embedded_experiment_is_a_model_with_its_defaults():
    """.clock beside trapo.py: `python trapo.py` trains on it."""
    main("--steps 1 --prompts 1 --eval-size 4".split())
    found = json.loads(Path("runs/clock-trapo-seed0/settings.json").read_text())
    assert [found[key] for key in ("model", "dataset", "test")] == [
        str(HERE / ".clock" / name) for name in ("model", "train.jsonl", "test.jsonl")]

def test_errors_reach_the_shell_as_one_line_and_exit_code_2(two):
    """As a user of trapo.py alone, without .clock, sees it; RANK without torchrun is nothing."""
    output, errors, code = two.lone
    assert code == 2 and output == "" and errors.count("\n") == 1
    assert re.match("error: cannot use model .*/.clock/model .*: give", errors)

def test_help_explains_every_flag_in_a_line(capsys):
    """--help, and exit code 0: a flag for each setting."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    flags = re.findall(r"^ +--(?!no-|help)([a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(flags) == {f.name.replace("_", "-") for f in fields(Settings)}

# ==== eval.py: benchmarks

FEW = "--on few.jsonl --samples 2 --max-tokens 6 --chunk 4 --device cpu".split()
PROTOCOL = Namespace(samples=None, temperature=0.6, limit=None)

def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    """Brute force: all k-subsets of n samples, c of them right. Impossible counts are refused."""
    for n in range(1, 7):
        for c, k in product(range(n + 1), range(1, n + 1)):
            subsets = combinations([True] * c + [False] * (n - c), k)
            share = statistics.fmean(map(any, subsets))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(share)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match="pass_at_k"):
            evaluation.pass_at_k(n, c, k)

def test_intervals_by_hand():
    """Student's t in closed form and as printed; of means; the binomial's 2.5 % and 97.5 %."""
    root, quantile = math.sqrt(1 - 0.95 ** 2), evaluation.t_quantile
    four = 2 * math.sqrt(math.cos(math.acos(root) / 3) / root - 1)
    for df, t in ((1, math.tan(math.pi * 0.95 / 2)), (2, 0.95 * math.sqrt(2) / root), (4, four)):
        assert quantile(df) == pytest.approx(t, abs=1e-6)
    assert [round(quantile(df), 3) for df in (3, 5, 10, 30)] == [3.182, 2.571, 2.228, 2.042]
    for values, expected in (([1, 2, 3], f"2.000 ± {4.30265 / math.sqrt(3):.3f}"),
                             ([5, 5, math.nan], "5.000 ± 0.000 (n=2)"), ([7], "7.000"), ([], "-"),
                             ([math.nan, 7], "7.000 (n=1)"), ([math.nan], "-")):
        assert evaluation.mean_interval(pandas.Series(values, dtype=float)) == expected
    interval = evaluation.bootstrap_interval
    assert interval([0.0, 1.0] * 50) == pytest.approx((0.4, 0.6), abs=0.011)
    assert interval([0.0, 1.0]) == (0, 1) and interval([0.25] * 9) == (0.25, 0.25)

def record(benchmark, problem, number, correct, of=2, **more):
    return {"benchmark": benchmark, "number": number, "of": of, "prompt": f"problem {problem}",
            "response": "\\boxed{7}", "answer": "7", "correct": float(correct), "note": "",
            "tokens": 10, "truncated": False, **more}

def results(folder="."):
    return json.loads(Path(folder, "results.json").read_text())

def test_results_by_hand():
    """1 of 2 samples right, and 0 of 2: avg@2 1/4, pass@2 1/2. The five-benchmark average wants all
    five, complete, by the Hub's names or the authors' files."""
    rows = [record("b", 0, 0, 1, of=4, tokens=30), record("b", 0, 1, 0, of=4, truncated=True),
            record("b", 1, 2, 0, of=4), record("b", 1, 3, 0, of=4, note="broken")]
    evaluation.report({}, rows, Path("."))
    assert results()["benchmarks"]["b"] == {
        "problems": 2, "samples": 4, "of": 4, "k": 2, "avg@k": 0.25, "low": 0, "high": 0.5,
        "pass@k": 0.5, "pass@1..k": [0.25, 0.5], "truncated": 0.25, "unreadable": 0.25,
        "tokens": 15}
    names = ["aime24", "valid.amc", "math500", "valid.minerva", "olympiad"]
    rows = [record(name, 0, 0, i < 2, of=1) for i, name in enumerate(names)]
    for given, average in ((rows, 0.4), (rows[1:], None), ([rows[0] | {"of": 2}, *rows[1:]], None)):
        evaluation.report({}, given, Path("."))
        assert results()["table_1_average"] == average

def test_rescore_grades_saved_samples_without_a_model(monkeypatch):
    """A wrong verdict is put right, a response without an answer says so; nothing is loaded."""
    evaluation.report({"seed": 0}, [record("b", 0, 0, 0), record("b", 1, 1, 1, response="none")],
                      Path("."))
    monkeypatch.setattr(evaluation, "load_policy", None)
    evaluation.main(["model", "gone", "--rescore", "--out", "."])
    assert results()["benchmarks"]["b"]["avg@k"] == 0.5 and results()["settings"] == {"seed": 0}
    assert [r["note"] for r in evaluation.read_saved(Path("."))[1]] == ["", "no answer found"]

@pytest.mark.parametrize("source, answer, problems, samples", [
    (PLAIN_ROWS[:3] * 4, "4", 3, 4), ("valid.aime.parquet", "204", 30, 32),
    ("valid.amc.parquet", "142.0", 83, 32), ("valid.minerva.parquet", None, 272, 1),
    ([{"question": "1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}], "1002", 1, 1),
    ([{"question": "Both?", "final_answer": ["$1$", "$2$"], "solution": [""]}], "$1$, $2$", 1, 1)])
def test_identical_rows_are_one_problem_sampled_as_often(
        source, answer, problems, samples, tokenizer):
    """In the file's order. Rows may have the columns of any of the data sets."""
    path = DATA / source if isinstance(source, str) else Path(write_rows(source))
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = evaluation.load_benchmark(str(path), tokenizer, PROTOCOL)
    counts = Counter((tuple(p.prompt_ids), p.answer) for p in found)
    assert len(counts) == problems and set(counts.values()) == {samples}
    assert {p.answer for p in found[:samples]} == {answer or found[0].answer}

@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
def test_real_answers_verify_and_shuffled_ones_do_not():
    """\\boxed{answer} is right, but for a few that cannot be read: a sixth of the authors' files,
    every power of ten of Minerva's, and a tenth of GSM8K's solutions, cleaned."""
    files = {path.name: [trapo.read_row(row)[2] for row in load_rows(str(path))]
             for path in DATA.glob("valid.*.parquet")}
    answers = list(dict.fromkeys(answer for found in files.values() for answer in found))[::6]
    assert len([a for a in answers if not math_reward(f"\\boxed{{{a}}}", a)]) <= 5
    short = [a for a in answers if len(a) <= 8][::2]  # long ones take long
    assert not [a for a, b in zip(short, short[1:]) if math_reward(f"\\boxed{{{b}}}", a)]
    powers = [m for a in files["valid.minerva.parquet"]
              if (m := re.fullmatch(r"(-?[\d.]+)[eE]([-+]?\d+)", a))]
    assert len(powers) == 58 and all(
        math_reward(f"\\boxed{{{m[1]} \\times 10^{{{int(m[2])}}}}}", m[0]) for m in powers)
    for _, (solution,), answer in map(trapo.read_row, load_rows(f"{DATA}/gsm8k_test.jsonl")[::10]):
        assert math_reward(solution, answer) == 1

# ---- Whole evaluations, of the stand-in for Qwen on a little file of five problems

@pytest.fixture
def few():
    """few.jsonl; its chunks are problems 0 and 1, 2 and 3, 4."""
    write_rows(PLAIN_ROWS[:5], "few.jsonl")

def test_an_interrupted_evaluation_continues_and_a_finished_one_is_not_repeated(
        stand_in, few, two, capsys):
    """It draws only what is missing, and ends with the very samples of an uninterrupted one, and of
    two processes; another benchmark may come between; another protocol wants another folder."""
    argv = ["model", stand_in, *FEW, "--out"]
    evaluation.main([*argv, "whole"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
        at_call("eval sample", 2, raising(KeyboardInterrupt), patch)
        evaluation.main([*argv, "cut"])
    shutil.copy("few.jsonl", "more.jsonl")
    evaluation.main([*argv, "cut", "--on", "more.jsonl"])
    found = results("cut")["benchmarks"]
    assert {name: (b["samples"], b["of"]) for name, b in found.items()} == {
        "few": (4, 10), "more": (10, 10)}
    for calls in (2, 0):
        with pytest.MonkeyPatch.context() as patch:
            at_call("eval sample", calls + 1, raising(AssertionError), patch)
            evaluation.main([*argv, "cut"])
    found, _ = Path("cut/samples.jsonl").read_text().split('{"benchmark": "more"', 1)
    assert found == Path("whole/samples.jsonl").read_text()
    assert found == (two.folder / "samples" / "samples.jsonl").read_text(), two.both[1]
    assert "settings" in refusal([*argv, "cut", "--temperature", "0"], capsys, evaluation.main)
    write_rows(PLAIN_ROWS[1:6], "few.jsonl")
    assert "other problems" in refusal([*argv, "cut"], capsys, evaluation.main)

@pytest.mark.parametrize("flags, out, count, temperature, room", [
    ("STAND_IN --on rows.jsonl --out a", "a", 10, 0.6, None),  # a sample per copy of the row
    ("STAND_IN --on rows.jsonl --out b --temperature 0", "b", 5, 0, None),
    ("copied --on rows.jsonl", "copied/eval", 10, 0.6, 8192), ("run", "run/eval", 10, 0.6, 9),
    ("run/checkpoint-5", "run/checkpoint-5-eval", 10, 0.6, 9)])  # kept longer than the checkpoint
def test_protocol_is_temperature_06_and_greedy_samples_once(
        flags, out, count, temperature, room, stand_in, monkeypatch):
    """A response may have 8192 tokens, or what the longest prompt leaves of the model's context
    of 1024, or, on a run's own test rows, the run's limit."""
    seen = []
    monkeypatch.setattr(evaluation, "sample", lambda policy, requests, limits, temperature, **_: (
        seen.extend((len(requests), temperature, max(map(len, requests)), limits[0]))
        or [[5]] * len(requests), []))
    write_rows(PLAIN_ROWS[:5] * 2)
    shutil.copytree(stand_in, "run/model")
    shutil.copytree(stand_in, "run/checkpoint-5")
    put("run/defaults.json", json.dumps({"test": "../rows.jsonl", "max_response": 9}))
    put("run/settings.json", "{}")
    put(like(stand_in) + "/config.json", {"max_position_embeddings": 99999})
    evaluation.main(["model", *flags.replace("STAND_IN", stand_in).split()])
    assert seen == [count, temperature, seen[2], room or 1024 - seen[2]]
    assert results(out)["benchmarks"]["rows"]["problems"] == 5

# ---- Comparisons of runs

def write_run(name, method="trapo", seed=0, accuracy=0.5, tokens=1000, **changes):
    """A run's folder with two steps; its reward is the accuracy as well."""
    settings = {"method": method, "seed": seed, "model": "base", "dataset": "rows", "out": name,
                "device": "cpu"} | changes
    line = {"reward_unguided": accuracy, "guided": 0.5, "entropy": 1.0, "response_length": 9.0,
            "tokens_generated": tokens, "tokens_trained": 500, "seconds_sample": 1.0,
            "seconds_update": 3.0, "seconds": 100.0}
    write_rows([{"step": 0, "eval": {"held out": 0.0}},
                {"step": 1, **line, "reward_unguided": 0.9, "entropy": None},
                {"step": 2, **line, "eval": {"held out": accuracy, "greedy": 1.0}}],
               put(f"{name}/settings.json", json.dumps(vars(trapo.fill_in(settings))),
                   f"{name}/metrics.jsonl"))
    with Path(name, "metrics.jsonl").open("a") as file:
        file.write('{"torn')
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
    for line in ("|  | TRAPO (2) | GRPO (2) |", "| held out | 0.500 ± 1.271 | 0.150 ± 0.635 |",
                 "| greedy | 1.000 ± 0.000 | 1.000 ± 0.000 |",
                 "| unguided reward, last tenth | 0.500 ± 1.271 | 0.150 ± 0.635 |",
                 "| tokens generated, thousands | 2.000 ± 0.000 | 3.000 ± 12.706 |",
                 "| seconds | 8.000 ± 0.000 | 8.000 ± 0.000 |"):
        assert line in means
    assert "| held out | 0.350 ± 0.635 |" in differences

def test_methods_are_named_as_a_person_says_them(capsys):
    """With what was trained before, and the settings in which variants differ, by value."""
    write_run("runs/sft", "sft")
    runs = [write_run(method, method) for method in METHODS]
    runs.append(write_run("half", "grpo", model="runs/sft/checkpoint-5"))
    names = compared(capsys, *runs)
    assert names == [f"{evaluation.NAMES[method]} (1)" for method in METHODS] + [
        "SFT, then GRPO (1)"]
    assert len({evaluation.COLOURS[name.removesuffix(" (1)")] for name in names}) == 14
    one = write_run("one", thresholds=[-1, 0.5, 0.7, 0.9], max_grad_norm=1)  # -1 is -1.0
    two = write_run("two", seed=1, bf16=True, micro_tokens=9, save_every=3)  # these are no method's
    pair = write_run("int", seed=3, lr=1), write_run("float", seed=4, lr=1.0)
    assert compared(capsys, one, two) == ["TRAPO (2)"]
    assert compared(capsys, *pair, one) == ["TRAPO, lr=1 (2)", "TRAPO, lr=5e-06 (1)"]
    odd = write_run("odd", seed=2, prefix_loss="sft", baseline="context")  # named even alone
    assert compared(capsys, odd) == ["TRAPO, baseline=context, prefix_loss=sft (1)"]

def test_what_trapo_writes_is_read_and_a_resumed_run_stays_the_same_method(base, capsys):
    """Two seeds, one of them resumed; SFT, which samples nothing; no evaluation in any."""
    main(tiny_run(base, "zero"))
    main(tiny_run(base, "one", "--steps", "1", "--seed", "1", "--ratios", "0", ".2", ".5", "1"))
    main(["--resume", "--out", "one", "--steps", "2"])
    main(tiny_run(base, "sft", "--method", "sft"))
    assert compared(capsys, "zero", "one", "sft") == ["TRAPO (2)", "SFT (1)"]
    for run in ("zero", "sft"):
        evaluation.main(["look", run])
        assert Path(run, "rollouts.html").exists()

def test_every_method_and_seed_is_a_line_and_medians_are_thick(monkeypatch):
    """In each of six axes, a method in its one colour, its variants in other strokes."""
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **_: figures.append(args))
    runs = [*four_runs(), write_run("a2", seed=2, accuracy=0.45), write_run("c0", lr=1e-4)]
    evaluation.main(["runs", *runs, "--plot", "curves.png"])
    for axis in (axes := figures[0][0].axes):
        thick = {x.get_label(): x.get_linestyle() for x in axis.lines if x.get_linewidth() > 1}
        assert thick == {"TRAPO, lr=5e-06": "-", "TRAPO, lr=0.0001": "--", "GRPO": "-"}
        assert len({line.get_color() for line in axis.lines}) == 2 and len(axis.lines) == 3 + 6
    found = Counter(round(line.get_ydata()[-1], 3) for line in axes[5].lines)
    assert found == {0.4: 1, 0.6: 1, 0.45: 2, 0.1: 1, 0.2: 1, 0.15: 1, 0.5: 2}  # medians among them

# ---- Speed, and what is refused

def test_speed_measures_the_products_own_code(capsys):
    """Whole steps of two methods, at several batch sizes, and the sampler."""
    evaluation.main(["speed", "--prompts", "1", "2", "--max-response", "6", "--repeat", "1",
                     "--device", "cpu", "--bf16", "--recompute"])
    printed = capsys.readouterr().out
    for what in ("grpo, 8 rollouts", "trapo, 16 rollouts", "model.generate, 8 rows", "step, s",
                 "sampled, k tokens/s", "trained, k tokens/s", "MFU", "GiB", "matrix product"):
        assert what in printed
    policy = evaluation.speed_model("random:Qwen2.5-7B", "meta")
    assert sum(p.numel() for p in policy.parameters()) == 7_615_616_512  # as of the real one

EVAL_REFUSED = [  # as above
    *((flags, "model STAND_IN --out out " + flags, words) for flags, words in (
        ("--on", "--on"), ("", "--on some of"), ("--on gsm9k", "gsm9k"),
        ("--on no.jsonl", "no.jsonl"), ("--on aime25", "math-ai/aime25"),
        ("--on few.jsonl few.jsonl", "once"),
        ("--on few.jsonl --temperature -1", "--temperature"), ("--chunk 0", "--chunk"),
        ("--on few.jsonl --temperature nan", "--temperature"), ("--samples -1", "--samples"),
        ("--on few.jsonl --max-tokens 1020", "1024"), ("--rescore", "no samples"),
        ("--on few.jsonl --samples 999999999", "--samples"))),
    *((flags, flags, words) for flags, words in (
        ("model nowhere --on few.jsonl", "nowhere"), ("runs nowhere", "nowhere"),
        ("look nowhere", "nowhere"), ("dance", "dance"), ("speed --prompts 0", "prompts"),
        ("speed --model random:Qwen3", "Qwen3"), ("speed --alpha 2", "alpha"),
        ("speed --max-response 999 --device cpu", "256"))),
    ("nothing to rescore", lambda at: put("out/notes", "", ["model", "m", "--rescore", "--out",
                                                            "out"]), "no samples"),
    *((" ".join(flags), lambda at, flags=flags: ["runs", write_run("a"), *flags], words)
      for flags, words in (
        (["a"], "same seed"), (["--against", "luffy"], "methods: TRAPO"),
        (["--against", "trapo"], "in common"), (["--sideways"], "--sideways"),
        (["--plot", "no/x.png"], "no/x.png|pip install matplotlib"))),
    *((f"{file}: {text}", lambda at, file=file, text=text: put(
        f"{write_run('run')}/{file}", text, ["runs", "run"]), f"run.*{words}")
      for file, text, words in (
        ("settings.json", "[1]", "settings.json"), ("settings.json", "{", "settings.json"),
        ("settings.json", {"steps": "many"}, "settings.json"),
        ("metrics.jsonl", "[1]\n", "metrics"),
        ("metrics.jsonl", '{"step": 0, "eval": {}}\n', "no finished step"),
        ("metrics.jsonl", '{"step": 1, "tokens_generated": 5}\n', "reward_unguided"),
        ("metrics.jsonl", '{"step": 1, "eval": {"held out": "half"}}\n', "half"))),
    *((f"{file}: {text}", lambda at, file=file, text=text: put(f"out/{file}", text, [
        "model", "nowhere", "--on", "few.jsonl", "--out", "out"]), f"out/{file}.*(--out|delete)")
      for file, text in (
        ("results.json", '{"settings": 3}'), ("samples-b-0.jsonl", "{"), ("samples.jsonl", b"\xfc"),
        ("samples.jsonl", json.dumps(record("b", 0, 0, 1) | {"correct": "yes"})),
        ("samples.jsonl", json.dumps(record("b", 0, 7, 1))))),
    *((f"rollouts.jsonl: {text}", lambda at, text=text: at.tokenizer.save_pretrained(
        f"{write_run('run')}/tokenizer") and put("run/rollouts.jsonl", text, ["look", "run"]),
       f"run/rollouts.*{words}") for text, words in (
        ("", "no rollouts yet"), ('{"step": 5', "no rollouts yet"), ("{\n", "delete"),
        ("[1]\n", "delete"), ('{"step": 5, "rollouts": [{"text": "?"}]}\n', "delete")))]

@pytest.mark.parametrize("make, words", [row[1:] for row in EVAL_REFUSED],
                         ids=[row[0] for row in EVAL_REFUSED])
def test_eval_refuses_what_it_cannot_use_in_one_line(
        make, words, stand_in, base, tokenizer, few, capsys):
    """Exit code 2, no traceback, no file written or deleted."""
    at = Namespace(base=base, stand_in=stand_in, tokenizer=tokenizer)
    assert_refused(make, words, at, capsys, evaluation.main)

# ---- The page of a run's rollouts

HOSTILE = "</script><script>document.title = 1</script><img src=x onerror=document.title=2>"

def write_page(name, tokenizer, steps=(5, 10), text="5"):
    """The page of a run that kept two groups a step: of a hard prompt, and of an easy one."""
    def rollout(m, reward, advantage, prefix, completion, *p, solution=10):
        prefix, completion = (tokenizer(text, add_special_tokens=False).input_ids
                              for text in (prefix, completion))
        return vars(Rollout([2], prefix, completion, reward, m, advantage, solution,
                            [-1.0] * len(completion) * bool(p), [math.log(x) for x in p]))
    hard = [*[rollout(0, 0.0, -0.5, "", "# 7", 0.5, 0.2)] * 4,
            *[rollout(1, 1.0, 0.5, "d +5", "#", 0.5, 0.03, 0.2)] * 2,
            rollout(2, 1.0, 0.5, "d", "", 0.5), rollout(3, 1.0, 0.5, "d", "", 0.5, solution=1)]
    easy = [rollout(m, 1.0, 0.0, "", text) for m in (0, 0, 0, 0, 1, 1, 2, 3)]
    tokenizer.save_pretrained(f"{write_run(name, dataset='/' + 'long' * 100)}/tokenizer")
    groups = (hard, easy) if tokenizer.unk_token or text == "5" else (easy,)
    write_rows([{"step": step, "rollouts": group} for step in steps for group in groups],
               f"{name}/rollouts.jsonl")
    evaluation.main(["look", name])
    return Path(name, "rollouts.html").read_text()

def test_look_writes_a_page_that_holds_the_rollouts_and_loads_nothing(tokenizer, capsys):
    """Text of a run cannot end the script that holds it; a character of several tokens is seen
    with the last; what is not finite, and so no JSON, is null. Weights are what was trained with:
    of the policy's own the advantage, of the expert's -dL/dlog p of the prefix loss."""
    own = Rollout([2], [7], [8, 9], advantage=0.5, logprobs=[math.log(0.02), math.nan, -1])
    for method, weight in (("trapo", 0.2), ("naive", 1), ("micro", 0), ("luffy", 1 / 14.4)):
        args = settings("--method", method, "--sizes", "1", "--ratios", "0", "--thresholds", "-1")
        (shown,) = evaluation.page_group([own], tokenizer, args)["rollouts"]
        assert shown["weight"] == pytest.approx([weight, 0.5, 0.5], rel=1e-3)
        assert shown["logprob"] == [-3.912, None, -1]
    page = write_page("a", tokenizer, text=HOSTILE + "a 漢字 \U0001f600 é b")
    assert capsys.readouterr().out == "open a/rollouts.html in a browser\n"
    assert page.count("<script") == page.count("</script") == 1 and "<img" not in page
    assert not re.search("https?:|//[a-z]|@import|url[(]|src=(?!x)", page)
    held = json.loads(re.search("const run = (.*), steps =", page)[1])
    text = "".join(held["groups"][0]["rollouts"][0]["text"]).replace("\ufffd", "")
    assert text == HOSTILE + "a 漢字 \U0001f600 é b" and held["alpha"] == 0.1
    assert held["reward_unguided"] == [[1, 0.9], [2, 0.5]]

TOOLS = """  // of a person: what is seen, and what is pointed at, pressed and chosen
const $ = selector => document.querySelector(selector), text = id => $('#' + id).textContent;
const all = (selector, what) => [...document.querySelectorAll(selector)].map(what);
const headings = () => all('h2', h => h.textContent);
const send = (selector, event) => $(selector).dispatchEvent(event);
const point = selector => send(selector, new Event('pointerover', {bubbles: true}));
const press = (selector, key) => send(selector, new KeyboardEvent('keydown', {key, bubbles: true}));
const choose = (selector, kind, value) => {
  $(selector).value = value;
  send(selector, new Event(kind));
}
"""

def in_a_browser(script, width=900):
    """What a script returns in the page of run a, in a real browser's frame of that width."""
    if not shutil.which("chromium"):
        pytest.skip("needs a browser: apt install chromium")
    script = json.dumps(f"{TOOLS}\n{script}").replace("<", "\\u003c")
    put("a/frame.html", f"""<iframe width="{width}" height="800" src="rollouts.html"></iframe><pre>
        </pre><script>onload = () => document.querySelector("pre").textContent =
        JSON.stringify(frames[0].eval({script}));</script>""")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--allow-file-access-from-files", "--dump-dom", Path("a/frame.html").absolute().as_uri()],
        capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr  # no error
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)[1]))

def test_look_in_a_browser_tells_what_decided_on_help_and_what_a_token_weighs():
    """Of an expert's token outside the trust region, of the policy's own, of one of weight zero.
    Arrow keys walk tokens, and elsewhere steps, as slider and buttons do; the prompt is kept."""
    write_page("a", clock.make_tokenizer(), (5, 10, 120))
    found = in_a_browser("""
        const told = [headings()], row = '.row:nth-of-type(5) ';  // the first one helped
        for (const i of [2, 3]) point(`${row}.token:nth-child(${i})`), told.push(text('status'));
        press(`${row}.token:nth-child(1)`, 'ArrowRight');
        told.push(document.activeElement.about, text('step'));
        choose('#prompt', 'change', '2');
        point('.token[role]');
        told.push(headings()[3], text('status'));
        for (const act of [() => press('body', 'ArrowRight'), () => choose('#slider', 'input', 2),
            () => press('body', 'ArrowRight'), () => press('body', 'ArrowLeft'),
            ...['button', 'button', 'button + button'].map(which => () => $(which).click())])
          act(), told.push(text('step') + $('#prompt').value);
        told""")
    expert = 'token "+5": the expert\'s, p = .03, outside the trust region, weight .3 of SFT\'s'
    assert found == [
        ["micro-group 1: mean reward so far 0.00 >= -1: no help",
         "micro-group 2: mean reward so far 0.00 < 0.5: 20% of the solution",
         "micro-group 3: mean reward so far 0.33 < 0.7: 10% of the solution",
         "micro-group 4: mean reward so far 0.43 < 0.9: 100% of the solution"],
        expert, 'token "#": the policy\'s own, p = .2, weight .5, its advantage', expert, "5",
        "micro-group 4: mean reward so far 1.00 >= 0.9: no help",
        'token "5": the policy\'s own, p not known, weight 0',
        *(f"{step}2" for step in (10, 120, 120, 10, 5, 5, 10))]

@pytest.mark.parametrize("width", [360, 900])
def test_look_in_a_browser_shows_text_as_text_and_never_scrolls_sideways(tokenizer, width):
    """Markup does nothing; long tokens wrap; a long rollout is a window of its own."""
    write_page("a", tokenizer, (5,), HOSTILE + "x" * 1500)
    title, shown, images, beyond, height = in_a_browser("""[document.title, text('group'),
        all('img, #group script', x => x).length,
        document.documentElement.scrollWidth - innerWidth, $('.row').clientHeight]""", width)
    assert title == "TRAPO, token by token" and HOSTILE in shown.replace("␣", " ")
    assert images == 0 and beyond <= 0 and height < 400

# ==== The world of the embedded experiment (.ci/clock.py) and the study on it (.ci/study.py)

@pytest.fixture(scope="module")
def study():
    """.ci/study.py as a module."""
    import study
    return study

def test_clock_questions_and_experts_follow_their_rules():
    """Letters run on, the answer is where the clock ends, every line of a solution is right, or
    followed by "oops" and the line again; asides are said. So it is in the pretraining corpus."""
    rng, seen = random.Random(0), Counter()
    rows = [(name, row) for name in clock.SETS for row in clock.make_rows(name, 0)]
    rows += [("corpus", clock.corpus_row(rng, i / 2000, 0.5)) for i in range(2000)]
    for name, row in rows:
        first, hour, *words, mark = row["problem"].split()
        letters, changes, solution = words[::2], words[1::2], row["solution"].split()
        assert "".join([first, *letters]) in clock.LETTERS
        assert clock.is_right([*solution, "<eos>"], row["answer"])
        body = [word for word in solution if word not in clock.FILLERS]
        seen += Counter({name: len(letters), (name, "asides"): len(solution) - len(body),
                         (name, "slips"): body.count("oops"), (name, mark, len(body) > 2): 1})
        for letter, change in zip(letters, changes):
            hour = str((int(hour) + int(change)) % 24)
            if body[3:4] == ["oops"]:
                assert body[:2] == [letter, change] and body[2] != hour
                body = body[4:]
            if body[0] != "#":  # not blurted
                assert body[:3] == [letter, change, hour]
                body = body[3:]
        assert body == ["#", row["answer"]] == ["#", hour]
    assert 0.25 < seen["train", "asides"] / seen["train"] < 0.35
    assert 0.07 < seen["train", "slips"] / seen["train"] < 0.13
    assert not seen["corpus", ":", False] and seen["corpus", "?", True] > 200
    for text in ("", "# 9 <eos>", "# 8", "8 <eos>", "# 7 # 8 <eos>", "# 8 # <eos>", "# 8 <eos> k"):
        assert not clock.is_right(text.split(), "8"), text

def test_a_world_is_made_again_bit_for_bit_and_its_base_until_it_is_sound(monkeypatch, capsys):
    """Of the seed and the share; nothing is written over. A base that is not sound is told."""
    made = {}
    for flags in ("a --seed 5", "b --seed 5", "c", "d --seed 5 --worked 1"):
        monkeypatch.setattr(sys, "argv", ["clock.py", *flags.split(), "--base-steps", "6"])
        clock.main()
        made[flags[0]] = [Path(flags[0], name).read_bytes() for name in (
            "model/model.safetensors", *(f"{name}.jsonl" for name in clock.SETS))]
    assert made["a"] == made["b"] and not set(made["a"]) & set(made["c"])
    assert made["a"][0] != made["d"][0] and made["a"][1:] == made["d"][1:]
    with pytest.raises(SystemExit, match="d is not empty"):
        clock.main()
    starts, scores = [], iter([0.96, 0.85, 0.94, 1.0, 0.96, 0.92, *[0] * 8])
    monkeypatch.setattr(clock, "pretrain", lambda seed, *_: starts.append(seed) or len(starts))
    monkeypatch.setattr(clock, "accuracy", lambda *_: next(scores))
    assert clock.make_base(7, 0.0, 2500) == 3 and starts == [7, 7 + 2**32, 7 + 2**33]
    assert re.findall("is (.*sound): .*", capsys.readouterr().out) == ["not sound"] * 2 + ["sound"]
    with pytest.raises(SystemExit, match="four bases of seed 7 are not sound"):
        clock.make_base(7, 0.0, 2500)

def test_the_shipped_world_is_clocks_and_its_base_can_work_but_does_not():
    """Rows and measures as clock.py writes them; the base as its docstring says."""
    for name in clock.SETS:
        assert load_rows(str(HERE / ".clock" / f"{name}.jsonl")) == clock.make_rows(name, 0)
    assert json.loads((HERE / ".clock" / "defaults.json").read_text()) == clock.DEFAULTS
    policy, tokenizer = load_policy(str(HERE / ".clock" / "model"))
    assert policy.generation_config.eos_token_id == [1] == [tokenizer.eos_token_id]
    text = "j 8 k -9 l +8 m +1 ?"
    ids = trapo.prompt_tokens(text, tokenizer)
    assert ids == [clock.WORDS.index(word) for word in text.split()]
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == text
    found = {name: clock.accuracy(policy, name, 0) for name in ("textbook", "direct", "test")}
    assert found["textbook"] >= 0.95 and found["direct"] >= 0.9 and found["test"] < 0.1

def test_legs_are_counted_by_pairs_that_are_trained_on_held_out_or_of_new_animals():
    """Sums and answers are right, a slip is taken back, and the three sets share no pair."""
    import legs
    each = {name: n for name, _, n in legs.pairs_of(legs.LEGS) + legs.pairs_of(legs.NEW)}
    for kinds in (1, 2):
        pairs = {}
        for name, rows in legs.make_rows(0, kinds).items():
            asked = [re.findall(r"(\d+) (\w+)", row["problem"]) for row in rows]
            pairs[name] = {pair for row in asked for pair in row}
            for row, found in zip(rows, asked):
                sums = [int(n) * each[kind] for n, kind in found]
                assert sum(sums) == int(row["answer"])
                assert trapo.grade(row["solution"], row["answer"])[0] == 1
                ends = re.findall(r"(\d+) legs\.", row["solution"])
                assert list(map(int, ends)) == sums + [sum(sums)] * (kinds > 1)
        assert not any(a & b for a, b in combinations(pairs.values(), 2))

def test_another_teacher_solves_the_same_questions_one_wrongly_one_time_in_five(study):
    for expert in study.EXPERTS:
        right = sum(clock.is_right([*study.solve(row["problem"], expert).split(), "<eos>"],
                                   row["answer"]) for row in clock.make_rows("train", 3))
        assert 380 < right < 435 if expert == "wrong" else right == 512

def test_the_pages_say_what_the_studys_lines_say(study, monkeypatch):
    """The tables of .github/results.md, and the README's. A run is right half the time from its
    first mean of five steps on: with .4 .4 .6 from step 5 on, after 7 steps and 700 tokens."""
    page = HERE.joinpath(".github", "results.md").read_text()
    assert study.with_tables(page) == page
    readme, rates = HERE.joinpath("README.md").read_text(), study.frame("rates")
    for method, runs in study.frame("main").groupby("method"):
        accuracy = study.interval(runs["in range"]).replace("0.", ".")
        steps = study.until(rates[(rates.method == method) & (rates.lr == study.USUAL)])
        row, = re.findall(rf"^\|{re.escape(method)}\|.*$", readme, re.M)
        assert row.endswith(f"|{accuracy}|{steps}|")
    monkeypatch.setattr(study, "FOLDER", Path())
    flags = {"method": "grpo", "lr": 1e-3, "seed": 1, "steps": 10}
    line = {"tokens_generated": 100, "tokens_trained": 10, "seconds": 1.0, "guided": 0.5,
            "entropy": None, "prefix_outside_share": None, "eval": {"in range": 0.25}}
    study.folder_of(flags).mkdir()
    write_rows([line | {"step": i, "reward_unguided": reward} for i, reward in enumerate(
        [0, 0, 0, 1, 1, 0, 1, 0, 0, 0], 1)], study.folder_of(flags) / "metrics.jsonl")
    found = study.summary([flags])
    assert (found["half"], found["tokens_to_half"], found["reward"]) == (7, 700, [30])

# ==== A really pretrained model: SmolLM2-135M-Instruct, made by .ci/smollm2.py

SMOLLM2 = os.environ.get("TRAPO_SMOLLM2")

@pytest.mark.skipif(not SMOLLM2, reason="TRAPO_SMOLLM2 names no folder; see .ci/smollm2.py")
@pytest.mark.parametrize("precision, low, high", [("--no-bf16", 0, 1e-3), ("--bf16", 1e-3, 0.3)])
def test_a_really_pretrained_model_answers_and_is_trained_resumed_and_evaluated(
        precision, low, high):
    """Through its template, which ends a turn; greedily as model.generate."""
    policy, tokenizer = load_policy(SMOLLM2)
    turn = [{"role": "user", "content": "What is 2 + 3?"}]
    requests = [trapo.prompt_tokens("What is 4 + 3?", tokenizer), tokenizer(
        trapo.render(tokenizer, turn, add_generation_prompt=True)).input_ids]
    completions, _ = sample(policy, requests, [24] * 2, 0.0)
    assert "5" in tokenizer.decode(completions[1])
    assert completions[1][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    for request, completion in zip(requests, completions):
        assert policy.generate(torch.tensor([request]), do_sample=False, max_new_tokens=24,
                               attention_mask=torch.ones(1, len(request)))[0].tolist() == [
            *request, *completion]
    write_rows(GSM8K_ROWS)
    main(["--model", SMOLLM2, "--dataset", "rows.jsonl", "--out", "run", "--prompts", "1",
          "--max-response", "40", "--eval-size", "0", "--lr", "1e-4", "--save-every", "1",
          "--sizes", "1", "1", "1", "1", precision, "--steps", "1"])
    main(["--resume", "--out", "run", "--steps", "2"])
    first, second = metrics_of("run")[-2:]
    assert (first["step"], second["step"], first["guided_4"]) == (1, 2, 1)
    assert low <= first["logprob_gap"] < high and 0 < first["prefix_p"] < 1
    evaluation.main(["model", "run", "--on", "rows.jsonl", "--limit", "2", "--max-tokens", "12"])
    assert results("run/eval")["benchmarks"]["rows"]["problems"] == 2
