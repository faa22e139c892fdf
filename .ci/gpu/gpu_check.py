"""What only a card can tell of trapo.py; run by .ci/gpu.sh, whose header says how.

A question a function: what may fail first, then figures. Each prints PASS or FAIL lines with time
stamps, and the page is written anew after each, so that a run that is cut short leaves what it has.
Flags other than --pretend are those of a real run, for which the rest of the time is used. Models
are random, of Qwen2.5-0.5B's shape; `--pretend` (rehearse.sh check) takes tiny ones.
"""
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path

PRETEND = "--pretend" in sys.argv
if PRETEND:
    import pretend_gpu
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import trapo

BEGAN, LIMIT = time.perf_counter(), float(os.environ.get("LIMIT", 520))
FLAGS = [flag for flag in sys.argv[1:] if flag != "--pretend"]
TEMPORARY = Path(tempfile.mkdtemp())
PAGE = TEMPORARY / "gpu.md" if PRETEND else ROOT / ".github" / "gpu.md"
KERNELS = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cuDNN", 4: "another"}
SHAPE = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "tie_word_embeddings": True, "max_position_embeddings": 32_768}
if PRETEND:
    SHAPE |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4}
BF16 = torch.cuda.is_bf16_supported(False)  # as trapo.py's default
DTYPE = torch.bfloat16 if BF16 else torch.float32
verdicts: list[tuple[str, str, str]] = []  # (PASS, FAIL, SKIP, AIM MET or MISSED; what; detail)
figures: list[tuple[str, str]] = []

# ---- Saying it

def elapsed():
    return time.perf_counter() - BEGAN

def say(*words):
    print(f"[{elapsed():6.1f} s]", *words, flush=True)

def verdict(good, what, detail=""):
    word = good if isinstance(good, str) else "PASS" if good else "FAIL"
    verdicts.append((word, what, " ".join(detail.replace("|", "/").split())))
    say(word, what, detail)

def aim(good, what, detail):
    """What an H100 should reach: said of such a card only, and no failure."""
    if not PRETEND and "H100" in card():
        verdict("AIM MET" if good else "AIM MISSED", what, detail)

def figure(what, value):
    figures.append((what, value))
    say(f"{what}: {value}")

def write_page():
    """.github/gpu.md: the card, what held, and the figures."""
    commit = os.environ.get("COMMIT", "unknown")
    words = [f"# On a card: {card()}", "", "[Back to the README](../README.md)", "",
             f"Written by `bash .ci/gpu.sh` at commit {commit} on {datetime.date.today()}: torch "
             f"{torch.__version__}, transformers {transformers.__version__}, {elapsed():.0f} s in "
             "all. The model is random, of Qwen2.5-0.5B's shape; one measurement each.", "",
             "| | what | |", "|---|---|---|"]
    words += [f"| {word} | {what} | {detail} |" for word, what, detail in verdicts]
    words += ["", "| figure | |", "|---|---|"]
    words += [f"| {what} | {value} |" for what, value in figures]
    PAGE.write_text("\n".join(words) + "\n")

def card():
    return "none, a pretended one" if PRETEND else (
        f"{torch.cuda.get_device_name()}, {memory_gib():.0f} GiB")

def memory_gib():
    return torch.cuda.get_device_properties(0).total_memory / 2**30

class TooLong(Exception):
    """A question took longer than it may."""

def ask(question, seconds):
    """Ask it, if there is time: an exception or too long a time is a FAIL, and the next goes on."""
    name = question.__doc__.split("\n")[0].rstrip(".")
    left = LIMIT - elapsed()
    if left < seconds / 3:
        verdict("SKIP", name, f"{left:.0f} s are left")
        return

    def stop(*_):
        raise TooLong(f"{seconds} s are over")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(min(seconds, left)) if not PRETEND else 0)
    say("----", name)
    try:
        question()
    except Exception as error:
        verdict(False, name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        traceback.print_exc(limit=-4)
    finally:
        signal.alarm(0)
        gc.collect()
        torch.cuda.empty_cache()
        write_page()

# ---- What the questions share

def timed(work, repeat=1):
    """(seconds of one, the last result)."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeat):
        result = work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeat, result

def make_policy(**changes):
    """fp32 weights on the device, and no EOS."""
    torch.manual_seed(0)
    with torch.device("cpu" if PRETEND else "cuda"):
        policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE | changes))
    policy.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return policy.to("cuda")

def settings(**changes):
    return trapo.Settings(**{**trapo.METHODS["trapo"], "device": "cuda", "bf16": BF16,
                             **changes})

def tokens(rng, least, most):
    return [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(rng.randint(least, most))]

def no_graph(batch):
    """In place of DecodeBatch.record: the same batches, computed plainly."""
    return types.SimpleNamespace(replay=lambda: setattr(batch, "logits", batch.forward()))

@contextlib.contextmanager
def recording(record):
    """DecodeBatch.record replaced for a while."""
    before = trapo.DecodeBatch.record
    trapo.DecodeBatch.record = record
    try:
        yield
    finally:
        trapo.DecodeBatch.record = before

@contextlib.contextmanager
def counted_captures():
    """The seconds of each capture, as a list that fills."""
    seconds, record = [], trapo.DecodeBatch.record

    def noted(self):
        spent, graph = timed(lambda: record(self))
        seconds.append(spent)
        return graph
    with recording(noted):
        yield seconds

# ---- What may fail

def random_heads(rows, heads, length, **options):
    return torch.randn(rows, heads, length, 64, device="cuda", dtype=DTYPE, **options)

def plain_attention(q, k, v, bias):
    """In fp32, the scores as a matrix."""
    copies = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(copies, 1).float() for x in (k, v))
    return (q.float() @ k.transpose(2, 3) / math.sqrt(64) + bias.float()).softmax(-1) @ v

def left_padded(rng, rows, length):
    """[rows, 1, 1, length]: -inf at up to half of the places, from the left."""
    starts = torch.tensor([rng.randint(0, length // 2) for _ in range(rows)], device="cuda")
    places = torch.arange(length, device="cuda")
    return torch.where(places < starts[:, None], -math.inf, 0.0).to(DTYPE)[:, None, None]

def attention():
    """Attention: kernels, masks, and what a new shape costs."""
    rng = random.Random(0)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        name, kernels, new, gap = f"cuDNN {'on' if cudnn else 'off'}", set(), [], 0.0
        for _ in range(4):
            rows, length = (2, 33) if PRETEND else (rng.randint(5, 14), rng.randint(200, 900))
            q, k, v = (random_heads(rows, heads, length, requires_grad=True)
                       for heads in (14, 2, 2))
            causal = {"is_causal": True, "enable_gqa": True}
            forward, out = timed(lambda: scaled_dot_product_attention(q, k, v, **causal))
            backward, _ = timed(lambda: out.float().sum().backward())
            if not PRETEND:
                choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True)
                kernels.add(f"update {KERNELS[choice]}")
            rows, length = (5, 48) if PRETEND else (rng.randint(20, 300), 16 * rng.randint(10, 40))
            q, (k, v) = random_heads(rows, 2, 7), (random_heads(rows, 2, length) for _ in "kv")
            bias = left_padded(rng, rows, length)
            decode, out = timed(lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias))
            gap = max(gap, (out.float() - plain_attention(q, k, v, bias)).abs().max().item())
            if not PRETEND:
                choice = torch._fused_sdp_choice(q, k, v, bias, 0.0, False)
                kernels.add(f"decoding {KERNELS[choice]}")
            new.append((forward, backward, decode))
        verdict(gap < 0.05, f"attention, {name}: decoding heeds its mask", f"error {gap:.3f}")
        medians = [1e3 * statistics.median(x) for x in zip(*new)]
        figure(f"attention of a new shape, {name}: update forward, backward, decoding, ms",
               f"{', '.join(f'{x:.1f}' for x in medians)} ({', '.join(sorted(kernels))})")
    verdict(PRETEND or max(medians) < 30, "without cuDNN, a new shape costs less than 30 ms")
    verdict(PRETEND or not any("math" in x for x in kernels), f"no math kernel in {DTYPE}")
    q, k, v = (torch.randn(2, heads, 512, 64, device="cuda") for heads in (14, 2, 2))
    if not PRETEND:
        choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True)
        figure("kernel of the update with --no-bf16 and grouped heads", KERNELS[choice])

def graphs():
    """Graphs draw what plain decoding draws, token for token."""
    rng, rows, new = random.Random(0), *((12, 12) if PRETEND else (96, 96))
    prompts = [tokens(rng, 3, 60) for _ in range(rows // 8 + 1)]
    requests = [prompts[i % len(prompts)] for i in range(rows)]
    limits = [rng.choice([new // 8, new // 3, new]) for _ in requests]
    uniforms = torch.rand(rows, new, dtype=torch.float64)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for name, changes in (("default", {}), ("dynamic", {"rope_parameters": dynamic,
                                                        "max_position_embeddings": 64})):
        policy = trapo.make_sampler(make_policy(**changes), settings())
        draw = functools.partial(trapo.sample, policy, requests, limits, uniforms=uniforms)
        with recording(no_graph):
            plain_seconds, (plain, logprobs) = timed(draw)
        with counted_captures() as captures:
            seconds, (found, found_logprobs) = timed(draw)
        same = sum(a == b for a, b in zip(plain, found))
        gap = max(abs(x - y) for a, b, p, q in zip(plain, found, logprobs, found_logprobs)
                  if a == b for x, y in zip(p, q))
        verdict(same == rows and gap < 1e-3 and bool(captures) is (name == "default"),
                f"graphs against plain decoding, RoPE {name}",
                f"same {same}/{rows}, log-probs within {gap:.0e}, {len(captures)} captures of "
                f"{sum(captures):.2f} s; {plain_seconds:.2f} s plain, {seconds:.2f} s with graphs")

def steps():
    """Three whole steps of 32 x 8 rollouts: realistic ones, then everything as long as allowed."""
    prompts, new, micro = (4, 16, 300) if PRETEND else (32, 1024, 4096)
    micro = micro if memory_gib() > 20 else 1024
    args = settings(prompts=prompts, max_response=new, micro_tokens=micro, lr=1e-6)
    policy = make_policy()
    sampler = trapo.make_sampler(policy, args)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0)
    rng = random.Random(1)
    ends = rng.sample(range(3, SHAPE["vocab_size"]), SHAPE["vocab_size"] // (new // 4))
    body = sum(p.numel() for p in policy.base_model.parameters())
    head, most = policy.get_output_embeddings().weight.numel(), 0.0
    for step in range(3):
        longest = step == 2
        if longest and elapsed() > 0.4 * LIMIT:
            verdict("SKIP", "a step of longest sequences", "this card is slow")
            break
        lengths = (new, new) if longest else (6, 12) if PRETEND else (60, 150)
        problems = [trapo.Problem(tokens(rng, *lengths), [tokens(rng, new // 16, new // 4)], "")
                    for _ in range(prompts)]
        task = trapo.Task(problems, [], lambda problem, response: float(rng.random() < 0.4))
        for model in policy, sampler:
            model.generation_config.eos_token_id = None if longest else ends
        torch.cuda.reset_peak_memory_stats()
        with counted_captures() as captures:
            metrics, groups = trapo.train_step(policy, sampler, optimizer, task, args, 0)
        trained = [r for group in groups for r in group if r.logprobs]
        read = metrics["tokens_trained"] + sum(len(problem.prompt_ids) for problem in problems)
        flops = 6 * ((body - head) * read + head * metrics["tokens_trained"])
        drawing, updating = metrics["seconds_sample"], metrics["seconds_update"]
        rate, share = metrics["tokens_generated"] / drawing / 1e3, flops / updating / peak()
        whole, most = drawing + updating, max(most, metrics["peak_memory_gib"])
        name = ("warm-up", "realistic", "longest")[step]
        figure(f"step, {name}: {sum(map(len, groups))} rollouts of mean "
               f"{metrics['response_length']:.0f} tokens, seconds",
               f"{whole:.2f}: sampling {drawing:.2f} (of it {len(captures)} captures "
               f"{sum(captures):.2f}), update {updating:.2f}")
        figure(f"step, {name}: sampling of the whole phase, k tokens/s", f"{rate:.1f}")
        figure(f"step, {name}: update, k tokens/s (a prompt counts once); share of the matrix peak",
               f"{read / updating / 1e3:.1f}; {share:.1%}")
        if name == "realistic":
            aim(rate >= 30, "sampling a whole phase, at least 30 k tokens/s", f"{rate:.1f}")
            aim(whole <= 8, "a step in at most 8 s", f"{whole:.2f} s")
            aim(share >= 0.2, "the update at 20 % of the matrix peak or more", f"{share:.1%}")
        figure(f"step, {name}: peak memory, GiB (reserved)",
               f"{metrics['peak_memory_gib']:.1f} "
               f"({torch.cuda.max_memory_reserved() / 2**30:.1f})")
        verdict(metrics["grad_norm"] is not None and bool(trained), f"step, {name}: finite")
        verdict(metrics["logprob_gap"] < 0.05, f"step, {name}: sampler and policy agree",
                f"mean gap {metrics['logprob_gap']:.4f} nats")
    same = all(torch.equal(a, b.to(a.dtype))
               for a, b in zip(sampler.parameters(), policy.parameters()))
    verdict(same, "the sampler has the new weights")
    verdict(most < 20, "the steps' peak is below 20 GiB", f"{most:.1f} GiB")

def run_command(command, seconds):
    """A command's result, or what it said until its time was over."""
    seconds = max(10, min(seconds, LIMIT - elapsed()))
    return subprocess.run(["timeout", "-s", "TERM", "-k", "20", str(seconds), *command], cwd=ROOT,
                          capture_output=True, text=True)

def suite():
    """The repository's own tests that need a card."""
    done = run_command([sys.executable, "-m", "pytest", "-q", "test_trapo.py", "-k", "cuda"], 120)
    last = ((done.stdout + done.stderr).strip().splitlines() or ["nothing was said"])[-1]
    verdict("passed" in last and "failed" not in last, "pytest -k cuda", last[:150])

def nccl():
    """Captures beside nccl, whose watchdog polls work of its own; on one card, one process."""
    import torch.distributed as dist
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "RANK": "0",
                   "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("nccl")
    dist.all_reduce(torch.ones(1, device="cuda"))  # work that the watchdog still polls
    rng = random.Random(2)
    sampler = trapo.make_sampler(make_policy(), settings())
    drawn, _ = trapo.sample(sampler, [tokens(rng, 10, 10)] * 8, [6] * 8)
    verdict(len(drawn) == 8, "captures beside nccl's watchdog")
    dist.destroy_process_group()

# ---- Figures

@functools.cache
def peak():
    """Measured FLOP/s of a large product of matrices."""
    n = 64 if PRETEND else 8192
    square = torch.randn(n, n, device="cuda").to(DTYPE)
    seconds = min(timed(lambda: square @ square, 5)[0] for _ in range(4))
    figure(f"matrix peak, {DTYPE}, TFLOP/s", f"{2 * n**3 / seconds / 1e12:.3g}")
    return 2 * n**3 / seconds

def token_times(sampler, requests):
    """Milliseconds of a token of all rows: the forward pass, and drawing it."""
    with torch.inference_mode():
        logits, batch = trapo.prefill(sampler, requests, 64)
        uniforms = torch.rand(len(requests), dtype=torch.float64).to("cuda")
        forward, _ = timed(lambda: batch.graph.replay(), 10)
        drawing, _ = timed(
            lambda: torch.stack(trapo.draw_tokens(logits, uniforms, 1.0)).tolist(), 10)
    return f"{1e3 * forward:.2f}, {1e3 * drawing:.2f}"

def sampling():
    """Sampling by rows, beside model.generate."""
    rng, new = random.Random(3), 8 if PRETEND else 256
    sampler = trapo.make_sampler(make_policy(), settings())
    prompt = tokens(rng, 100, 100)
    for rows in (2, 4) if PRETEND else (8, 32, 128, 352):
        requests = [prompt[i:] for i in range(8)] * (rows // 8) or [prompt] * rows
        seconds, _ = timed(lambda: trapo.sample(sampler, requests, [new] * rows), 2)
        rate = rows * new / seconds / 1e3
        figure(f"sample, {rows} rows x {new} tokens, k tokens/s", f"{rate:.1f}")
        figure(f"a token of {rows} rows, ms: forward, drawing", token_times(sampler, requests))
    rows, new = (2, 8) if PRETEND else (128, 128)
    ids = torch.tensor([prompt] * rows).to("cuda")

    def generate():
        return sampler.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                repetition_penalty=1.0).tolist()
    ours = functools.partial(trapo.sample, sampler, [prompt] * rows, [new] * rows)
    for name, work in ("model.generate", generate), ("sample", ours):
        work()
        seconds, _ = timed(work)
        figure(f"{name}, {rows} rows of one prompt x {new} tokens, k tokens/s",
               f"{rows * new / seconds / 1e3:.1f}")

GRADING = """
import random, time, trapo
texts = []
for i in range(352):
    a, b = random.randint(2, 99), random.randint(2, 99)
    texts.append((f"We have {a} boxes of {b} each, so ${a} \\\\times {b} = {a * b}$. " * 8
                  + f"The answer is \\\\boxed{{{a * b + i % 2}}}.", str(a * b)))
trapo.grade(*texts[0])
began = time.perf_counter()
for text, answer in texts:
    trapo.grade(text, answer)
print(time.perf_counter() - began)
"""

def rest():
    """Grading, and the embedded experiment on the card and beside it."""
    done = run_command([sys.executable, "-c", GRADING], 60)
    spent = f"{float(done.stdout):.2f}" if done.returncode == 0 else done.stderr.strip()[-80:]
    figure("Math-Verify of 352 responses of some 250 tokens, in one thread, s", spent)
    if not trapo.EMBEDDED.is_dir():
        verdict("SKIP", "the embedded experiment", "its model is not there")
        return
    for device in ("cpu",) if PRETEND else ("cpu", "cuda"):
        out = TEMPORARY / device
        done = run_command([sys.executable, "trapo.py", "--out", str(out), "--steps", "6",
                            "--eval-size", "16", "--device", device], 90)
        spent = [sum(value for key, value in line.items() if key.startswith("seconds_"))
                 for line in read_metrics(out)[2:]]
        verdict(done.returncode == 0, f"the embedded experiment, --device {device}",
                f"a step {statistics.median(spent):.2f} s" if spent else done.stderr.strip()[-100:])

def read_metrics(out):
    path = out / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if line.get("step")]

def real_run():
    """A real run, for as many steps as the time allows."""
    out = TEMPORARY / "real"
    done = run_command([sys.executable, "trapo.py", *FLAGS, "--out", str(out)],
                       LIMIT - elapsed() - 30)
    lines = [line for line in read_metrics(out) if "seconds_sample" in line]
    said = "" if lines else f": {done.stderr.strip()[-100:]}"
    verdict(bool(lines), f"trapo.py {' '.join(FLAGS)}", f"{len(lines)} steps{said}")
    for key in ("seconds_sample", "seconds_update", "peak_memory_gib", "logprob_gap",
                "reward_unguided", "reward_guided", "completion_length"):
        values = [line[key] for line in lines if line[key] is not None]
        if values:
            figure(f"real run, {key}: first three steps, last three",
                   "; ".join(", ".join(f"{x:.3g}" for x in part)
                             for part in (values[:3], values[-3:])))

def main():
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; without one: bash .ci/gpu/rehearse.sh check")
    warnings.filterwarnings("ignore")
    say(f"{card()}; torch {torch.__version__}, transformers {transformers.__version__}")
    ask(attention, 90)
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch has it: trapo.py is to switch it off
    ask(graphs, 90)
    verdict(not torch.backends.cuda.cudnn_sdp_enabled(), "trapo.py switches cuDNN's attention off")
    ask(steps, 240)
    if not PRETEND:
        ask(suite, 120)
        ask(nccl, 60)
    ask(sampling, 90)
    ask(rest, 180)
    if FLAGS:
        ask(real_run, 300)
    write_page()
    say("summary:", dict(Counter(word for word, *_ in verdicts)))
    for word, what, detail in verdicts:
        if word != "PASS":
            print("   ", word, what, detail)
    print(PAGE.read_text() if PRETEND else f"the page is {PAGE}")
    raise SystemExit(any(word == "FAIL" for word, *_ in verdicts))

if __name__ == "__main__":
    with pretend_gpu.World() if PRETEND else contextlib.nullcontext():
        main()
