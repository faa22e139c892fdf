"""Evaluation in one file: benchmarks with honest statistics, training runs compared, and speed.

    python eval.py model runs/x --on gsm8k math500 my.jsonl               accuracy of a model
    python eval.py runs runs/a runs/b --against grpo --plot curves.png    training runs compared
    python eval.py speed --model random:Qwen2.5-0.5B                      speed of this machine

The sampler, the reward, the update and the loading of models and rows are trapo.py's. Words: avg@k
is the share of right answers among k samples of every problem; pass@k the chance that at least one
of k samples is right.
"""
import hashlib, json, math, os, random, resource, statistics, sys, time  # noqa: E401
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import mpmath
import numpy
import pandas
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import trapo
from trapo import (RANK, WORLD, InputError, Parser, Problem, Tokens, brief, load_policy,
                   make_sampler, sample)

# ==== Part 1. Statistics. An accuracy without its interval is half a result: on the 30 problems of
# AIME two models 10 points apart may well be equally good.
def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones.

    The unbiased estimator of pass@k (Chen et al. 2021), in exact integers. ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of [n] values, one a problem, by resampling the problems.

    Not the samples: those of one problem are alike. Of equal values (none right, say) it has no
    width: the bootstrap cannot imagine what it has not seen.
    """
    rng = numpy.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    return tuple(numpy.percentile(means, (2.5, 97.5)).tolist())

def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with df >= 1 degrees of freedom: 12.71, 4.30, 3.18..."""
    def outside(t: float) -> float:  # P(|T| > t)
        return mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
    return float(mpmath.findroot(lambda t: outside(t) - 0.05, (1.9, 13), solver="ridder"))

def mean_interval(values: pandas.Series) -> str:
    """"mean ± half of Student's 95 % interval"; of one value "mean", of none "-"."""
    n, mean = values.count(), values.mean()
    return (f"{mean:.3f} ± {t_quantile(n - 1) * values.sem():.3f}" if n > 1 else
            f"{mean:.3f}" if n else "-")

# ==== Part 2. Benchmarks, and how often the paper's protocol samples each problem.
BENCHMARKS = {  # Hub data set, configuration, split, samples a problem, authors' file if in Table 1
    "gsm8k": ("openai/gsm8k", "main", "test", 1, None),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 1, "valid.math"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", 32, "valid.aime"),
    "aime25": ("math-ai/aime25", None, "test", 32, None),
    "amc": ("AI-MO/aimo-validation-amc", None, "train", 32, "valid.amc"),
    "minerva": ("math-ai/minervamath", None, "test", 1, "valid.minerva"),
    "olympiad": ("math-ai/olympiadbench", None, "test", 1, "valid.olympiad_bench")}

def load_benchmark(name: str, tokenizer, args: Namespace) -> list[Problem]:
    """The problems of a Hub benchmark or of a file, each as often as it is to be sampled.

    Identical rows are one problem, by default sampled as often as it stands there: the authors'
    files hold each problem of AIME and AMC 32 times. InputError if there are none with answers.
    """
    from datasets import load_dataset
    hub, config, split, samples, _ = BENCHMARKS.get(name, [None] * 5)
    try:
        rows = load_dataset(hub, config, split=split) if hub else trapo.load_rows(name)
    except Exception as error:  # the Hub, the network and the parsers all raise their own
        raise InputError(f"cannot read {hub or name} ({brief(error)}): --on takes some of "
                         f"{', '.join(BENCHMARKS)}, or files") from error
    answered = ({**row, "answer": ", ".join(row["final_answer"])}  # as OlympiadBench lists them
                if isinstance(row.get("final_answer"), list) else row for row in rows)
    problems = trapo.make_problems(answered, tokenizer, Namespace(
        dataset=name, max_prompt=math.inf, max_response=math.inf), heldout=True)
    distinct = list({(tuple(p.prompt_ids), p.answer): p for p in problems}.values())
    protocol = samples or len(problems) // len(distinct)
    k = args.samples or (protocol if args.temperature else 1)  # greedy samples are all the same
    return [p for p in distinct[:args.limit or None] for _ in range(k)]

def load_benchmarks(args: Namespace, tokenizer, run: dict) -> tuple[dict, Callable]:
    """What --on names; for the embedded experiment's model (settings: run) its held-out sets.

    Returns: name -> problems; (problem, ids, text) -> (reward, why the response is unreadable).
    """
    if run.get("dataset") in trapo.CLOCKS:
        if args.on:
            raise InputError("the embedded experiment's model knows only its clock: leave --on out")
        task = trapo.clock_task(tokenizer, Namespace(dataset="clock", seed=run["seed"],
                                                     eval_size=args.limit or 256))
        return ({f"clock: {name}": problems * (args.samples or 1) for name, problems in
                 task.heldout.items()}, lambda problem, ids, text: (task.score(problem, ids), ""))
    found = {Path(name).stem: load_benchmark(name, tokenizer, args) for name in args.on}
    if len(found) < max(1, len(args.on)):
        raise InputError(f"give each benchmark once: --on some of {', '.join(BENCHMARKS)} or files")
    return found, lambda problem, ids, text: trapo.grade(text, problem.answer)

# ==== Part 3. Sampling and grading. Samples are drawn in chunks. A chunk's random numbers depend on
# its place alone, and it is saved in a file of its own, whole or not at all: so neither an
# interruption nor the number of processes changes what is drawn.
def run_benchmark(name: str, problems: list[Problem], saved: list[dict], out: Path,
                  sampler: torch.nn.Module, tokenizer, grade: Callable, args: Namespace) -> None:
    """Draw, grade and save a sample of each of `problems`: this process's chunks, unless saved."""
    asked = [{"benchmark": name, "number": i, "of": len(problems), "answer": p.answer,
              "prompt": tokenizer.decode(p.prompt_ids)} for i, p in enumerate(problems)]
    saved = [r for r in saved if r["benchmark"] == name]
    if any(r["of"] != len(asked) or not asked[r["number"]].items() <= r.items() for r in saved):
        raise InputError(f"{out} holds samples of other problems called {name}: give another --out")
    done, right = {r["number"] for r in saved}, [r["correct"] for r in saved]
    mine = range(0, len(problems), args.chunk)[RANK::WORLD]
    bar = tqdm([first for first in mine if first not in done], name, disable=RANK > 0)
    for first in bar:
        chunk = problems[first:first + args.chunk]
        torch.manual_seed(random.Random(f"{args.seed} {name} {first}").getrandbits(63))
        drawn, _ = sample(sampler, [p.prompt_ids for p in chunk], [args.max_tokens] * len(chunk),
                          args.temperature, static=sampler.device.type == "cuda")
        records = []
        for question, problem, ids in zip(asked[first:], chunk, drawn):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            correct, note = grade(problem, ids, text)
            records.append({**question, "response": text, "correct": correct, "note": note,
                            "tokens": len(ids), "truncated": ids[-1] not in trapo.end_ids(sampler)})
        write(out / f"samples-{name}-{first}.jsonl", records)
        right += [r["correct"] for r in records]
        bar.set_postfix(accuracy=f"{statistics.fmean(right):.3f}")

def write(path: Path, lines: list[dict], **style: int) -> None:
    """Write JSON, a line each. A crash leaves the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(line, **style) + "\n" for line in lines))
    os.replace(temporary, path)

def read_samples(out: Path) -> list[dict]:
    """All samples saved in a folder, in order, whichever process drew them."""
    records = [json.loads(line) for path in out.glob("samples*.jsonl") for line in path.open()]
    found = {(r["benchmark"], r["number"]): r for r in records}
    return [found[key] for key in sorted(found)]

def report(settings: dict, records: list[dict], out: Path) -> None:
    """Write samples.jsonl in place of the chunks, and results.json; print the latter's table."""
    found = {}
    for name, mine in pandas.DataFrame(records).groupby("benchmark"):
        counts = mine.groupby(["prompt", "answer"]).correct.agg(["size", "sum"]).astype(int).values
        passes = [statistics.fmean(pass_at_k(n, c, k) for n, c in counts.tolist())
                  for k in range(1, counts[:, 0].min() + 1)]
        low, high = bootstrap_interval(counts[:, 1] / counts[:, 0])
        found[name] = {"problems": len(counts), "samples": len(mine), "of": int(mine.of.max()),
                       "k": len(passes), "avg@k": passes[0], "low": low, "high": high,
                       "pass@k": passes[-1], "truncated": mine.truncated.mean(),
                       "unreadable": (mine.note != "").mean(),
                       "tokens": round(mine.tokens.mean()), "pass@1..k": passes}
    five = [found.get(name, found.get(file)) for name, (*_, file) in BENCHMARKS.items() if file]
    average = (statistics.fmean(b["avg@k"] for b in five)
               if all(b and b["samples"] == b["of"] for b in five) and not settings.get("limit")
               else None)
    write(out / "samples.jsonl", records)
    write(out / "results.json", [{"settings": settings, "benchmarks": found,
                                  "table_1_average": average}], indent=1)
    for chunk in out.glob("samples-*.jsonl"):
        chunk.unlink()
    print(pandas.DataFrame(found).drop("pass@1..k").T.to_string(float_format="{:.1%}".format))
    print(f"low to high: 95 % interval of avg@k; every sample is in {out}/samples.jsonl")
    if average is not None:
        print(f"average of the paper's five benchmarks: {average:.1%}")

def evaluate(args: Namespace) -> None:
    """`eval.py model`: sample what is missing, grade it, report. With --rescore: only grade."""
    folder, cuda = Path(args.model), torch.cuda.is_available()
    out = Path(args.out or (folder / "eval" if folder.is_dir() else f"runs/eval-{folder.name}"))
    old = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    records = read_samples(out)
    if args.rescore:
        if not records:
            raise InputError(f"no samples to grade in {out}: evaluate first, or give --out")
        for r in tqdm(records, "grading"):
            if not r["benchmark"].startswith("clock: "):  # those were graded by their tokens
                r["correct"], r["note"] = trapo.grade(r["response"], r["answer"])
        return report(old.get("settings"), records, out)
    policy, tokenizer = load_policy(args.model)
    run = getattr(policy.config, "trapo", {})
    args.max_tokens = args.max_tokens or run.get("max_response", 8192)
    benchmarks, grade = load_benchmarks(args, tokenizer, run)
    weights = b"".join(p.detach().flatten()[:16].numpy().tobytes() for p in policy.parameters())
    settings = {k: getattr(args, k) for k in ("temperature", "samples", "max_tokens", "limit",
                "seed", "chunk")} | {"weights": hashlib.sha256(weights).hexdigest()}
    if (old or records) and old.get("settings") != settings:
        raise InputError(f"{out} holds samples of other weights or settings: give another --out")
    if RANK == 0 and not old:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "results.json", [{"settings": settings}])
    if WORLD > 1:  # nobody draws before all have read; at the end one may wait hours for another
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    sampler = make_sampler(policy, "cuda" if cuda else "cpu")
    for name, problems in benchmarks.items():
        run_benchmark(name, problems, records, out, sampler, tokenizer, grade, args)
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        report(settings, read_samples(out), out)

# ==== Part 4. Training runs. Those that differ only in the seed, and in its base, are one method.
NOT_METHOD = ["seed", "out", "device", "wandb", "save_every", "eval_every"]
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's

def read_run(folder: str) -> tuple[dict, dict[str, float], pandas.DataFrame]:
    """A run's settings, what it came to, and its curves: what plot draws, by step.

    Seconds are those of training, without the evaluations; noisy curves are running means over 1/15
    of the run. InputError if there is no finished step.
    """
    try:
        settings = json.loads(Path(folder, "config.json").read_text())["trapo"]
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()
                if line.endswith("\n")]  # not one cut short
        metrics = pandas.DataFrame([{"eval": None} | row for row in rows]).set_index("step")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a training run ({brief(error)})") from error
    if metrics.index[-1] < 1:
        raise InputError(f"{folder}/metrics.jsonl has no finished step")
    steps, evals = metrics.loc[1:], metrics["eval"].dropna()
    noisy = steps[["reward_unguided", "guided", "entropy", "response_length"]].astype(float)
    noisy.columns = ["unguided reward", "share of rollouts guided", "entropy, nats",
                     "response length, tokens"]
    generated = (steps.tokens_generated.cumsum() / 1000).rename("tokens generated, thousands")
    accuracy = evals.map(lambda found: next(iter(found.values()))).astype(float)
    accuracy = accuracy.rename("held-out accuracy")
    final = {**(evals.iloc[-1] if len(evals) else {}), "steps": len(steps),
             "unguided reward, last tenth": noisy.iloc[-max(1, len(steps) // 10):, 0].mean(),
             generated.name: generated.iloc[-1],
             "tokens trained, thousands": steps.tokens_trained.sum() / 1000,
             "seconds": steps[["seconds_sample", "seconds_score", "seconds_update"]].sum(axis=None)}
    smooth = noisy.rolling(max(1, len(steps) // 15), min_periods=1).mean()
    return settings, final, smooth.join(generated).join(accuracy, how="outer")

def name_methods(runs: list[dict]) -> list[str]:
    """Settings of runs -> names of their methods: the preset, and what tells its variants apart."""
    frame = pandas.DataFrame(runs).map(str).drop(columns=NOT_METHOD, errors="ignore")
    frame["model"] = [Path(str(r["model"])).name.replace(f"seed{r['seed']}", "*") for r in runs]
    names = frame.method.copy()
    for _, same in frame.groupby("method"):
        for key in same.columns[same.nunique() > 1]:
            names[same.index] += f" {key}=" + same[key]
    return names.tolist()

def show(title: str, values: pandas.DataFrame, markdown: bool) -> None:
    """Print a table of measures by methods, from values indexed by method and seed."""
    groups = values.groupby("method", sort=False)
    table = groups.agg(mean_interval).T.rename(columns=lambda m: f"{m} ({len(values.loc[m])})")
    rows = [["", *table], ["---"] + ["---:"] * len(table.T), *table.reset_index().values]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows) if markdown else table.to_string()
    print(f"\n{title} ± 95 % interval (number of seeds)\n\n{lines}")

def compare(args: Namespace) -> None:
    """`eval.py runs`: a table of the methods, their paired differences, and a plot."""
    settings, finals, curves = zip(*map(read_run, args.folders))
    keys = list(zip(name_methods(settings), (s["seed"] for s in settings)))
    if len(set(keys)) < len(keys):
        raise InputError("two of the runs have the same settings and the same seed")
    index = pandas.MultiIndex.from_tuples(keys, names=("method", "seed"))
    found = pandas.DataFrame(finals, index=index)
    show("mean", found, args.markdown)
    if args.against:
        pairs = [(m, s) for m, s in keys if m != args.against and (args.against, s) in keys]
        if not pairs:
            raise InputError(f"--against: no seed in common; methods: {', '.join(dict(keys))}")
        base = found.loc[[(args.against, seed) for _, seed in pairs]].values
        show(f"paired difference to {args.against}", found.loc[pairs] - base, args.markdown)
    if args.plot:
        plot(pandas.concat(curves, keys=keys, names=index.names), args.plot)

def plot(frame: pandas.DataFrame, path: str) -> None:
    """Draw each column: a line a method, its seeds' mean, in a band from the least to the most."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for axis, title in zip(figure.subplots(2, 3).flat, frame):
        for i, method in enumerate(frame.index.unique("method")):
            seeds = frame.loc[method][title].unstack("seed").dropna()
            axis.plot(seeds.mean(axis=1), label=method, color=COLOURS[i % 7], markersize=4,
                      marker="osD^vPX*"[i % 8], markevery=max(1, len(seeds) // 8))
            axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), alpha=0.15,
                              color=COLOURS[i % 7], linewidth=0)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
    figure.supxlabel("training step (bands: least to most over seeds; noisy curves: running means)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw into {path} ({brief(error)})") from error

# ==== Part 5. Speed and memory of trapo.py's own training steps, on random prompts and experts and
# with a coin for a reward. No response ends before its limit, so that the work is known.
SHAPES = {  # width, MLP, layers, heads, key-value heads, vocabulary, tied embeddings
    "random:Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "random:Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "random:Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False)}

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # FLOP/s, bf16, dense

def speed_model(name: str | None, device: str) -> torch.nn.Module:
    """The embedded experiment's model, one of SHAPES with random weights, or a saved one."""
    if name in SHAPES:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings")
        with torch.device(device):
            policy = transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**dict(zip(keys, SHAPES[name]))))
    else:
        policy, _ = load_policy(name) if name else trapo.clock_model(0)
    policy.generation_config.eos_token_id = None
    return policy.to(device)

def measure(work: Callable[[], object], amount: int, repeat: int, cuda: bool) -> dict[str, str]:
    """Time work() after a warm-up: its rate in `amount` a second, seconds, and peak memory."""
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    try:
        for _ in range(repeat + 1):
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return {"k tokens/s": "out of memory"}
    peak = (torch.cuda.max_memory_allocated() / 2**30 if cuda else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
    seconds = pandas.Series(seconds[1:])
    return {"k tokens/s": f"{amount / seconds.median() / 1000:.3g}", "peak, GiB": f"{peak:.2f}",
            "seconds": f"{seconds.median():.3g} ({seconds.min():.3g} to {seconds.max():.3g})"}

def measure_parts(policy: torch.nn.Module, sampler: torch.nn.Module, ids: list[Tokens], prompt: int,
                  settings: Namespace, repeat: int) -> dict[str, dict]:
    """`sample` beside model.generate, and token_logprobs beside whole logits, on rows of `ids`."""
    cuda, rows, new = settings.device == "cuda", len(ids), settings.max_response
    requests = [row[:prompt] for row in ids]

    def generate() -> None:  # transformers' own loop, told to sample from the exact policy
        sampler.eval().generate(
            torch.tensor(requests, device=sampler.device), max_new_tokens=new, do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0, pad_token_id=0)

    def plain_logprobs() -> Tensor:  # the logits of the whole batch at one time
        batch = torch.tensor(ids, device=policy.device)
        logits = policy(input_ids=batch, use_cache=False).logits[:, prompt - 1:-1].float()
        return logits.log_softmax(-1).gather(2, batch[:, prompt:, None])

    def update(logprobs: Callable[[], Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logprobs().sum().backward()

    parts = {"sample": lambda: sample(sampler, requests, [new] * rows, 1.0, settings.cuda_graphs,
                                      settings.kv_tokens),
             "model.generate": generate,
             "token_logprobs": lambda: update(lambda: torch.stack(trapo.token_logprobs(
                 policy, ids, [prompt] * rows)[0])),
             "plain log_softmax": lambda: update(plain_logprobs)}
    if not cuda and 16 * rows * new * policy.config.vocab_size > 2**33:  # bytes: too many here
        del parts["plain log_softmax"]
    return {f"{name}, {rows} rows": measure(work, rows * new, repeat, cuda)
            for name, work in parts.items()}

def speed(args: Namespace) -> None:
    """`eval.py speed`: parts, and whole steps of three methods, at several batch sizes.

    Model FLOPs of an update: 6 a weight and token, the head's only for response tokens; neither
    attention's products nor what is computed twice. MFU: their rate over a matrix product's.
    """
    flags = [*args.rest, "--overwrite"] + (["--model", args.model] if args.model else [])
    settings = trapo.parse_args([*flags, f"--prompts={min(args.prompts)}"])
    rng, prompt = numpy.random.default_rng(0), 64
    device, new, parts, rows = settings.device, settings.max_response, {}, {}
    policy = speed_model(args.model, device)
    sampler, optimizer = make_sampler(policy, device), torch.optim.AdamW(policy.parameters())
    if settings.recompute:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    head = policy.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.base_model.parameters()) - head  # embedding: a look-up
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    square = torch.randn(n, n, device=device).to(dtype)
    peak = 2 * n**3 / Timer("x @ x", globals={"x": square}).blocked_autorange().median
    for prompts in args.prompts:
        ids = rng.integers(1, policy.config.vocab_size, size=(8 * prompts, prompt + new)).tolist()
        task = trapo.Task([Problem(row[:prompt], [row[prompt:]], "") for row in ids[:prompts]], {},
                          lambda problem, response: float(rng.random() < 0.4))
        for method in ("grpo", "trapo --no-speculate", "trapo --speculate"):
            settings = trapo.parse_args(flags + f"--prompts={prompts} --method={method}".split())
            steps = pandas.DataFrame(
                trapo.train_step(policy.train(), sampler, optimizer, task, settings, i)[0]
                for i in tqdm(range(args.repeat + 1), method, leave=False)).loc[1:]  # 0: warm-up
            rollouts, tokens = prompts * sum(settings.sizes), steps.tokens_trained
            read = tokens + prompt * (rollouts - steps.rollouts_skipped)
            flops = 6 * settings.updates * (body * read + head * tokens)
            rows[f"{method}, {rollouts} rollouts"] = pandas.DataFrame({
                "sampled, k tokens/s": steps.tokens_generated / steps.seconds_sample / 1000,
                "trained, k tokens/s": tokens / steps.seconds_update / 1000,
                "MFU, %": 100 * flops / steps.seconds_update / peak,
                "step, s": steps.filter(like="seconds_").sum(axis=1),
            }).apply(lambda x: f"{x.median():.3g} ({x.min():.3g} to {x.max():.3g})")
        parts |= measure_parts(policy, sampler, ids, prompt, settings, args.repeat)
    for table in (parts, rows):
        print(pandas.DataFrame(table).T.to_string() + "\n")
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    known = [f"; data sheet: {flops:.3g} FLOP/s" for name, flops in PEAKS.items() if name in card]
    print(f"median (least to most) of {args.repeat} repetitions; prompts of {prompt}, responses of "
          f"{new} tokens; matrix product: {peak:.3g} FLOP/s" + "".join(known[:1]))

# ==== Part 6. The command line.
def main(argv: list[str] | None = None) -> None:
    """Run a subcommand. Input that cannot be used: one line, exit code 2."""
    count, parser = trapo.number(int, 1), Parser()
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("model", help="accuracy of a model").add_argument
    add("model", help="a run's folder, another local model, a Hub id or a bare Qwen name")
    add("--on", nargs="+", default=[], help=f"any of {', '.join(BENCHMARKS)}, or files")
    add("--samples", type=count, help="samples a problem; default: AIME and AMC 32, others 1")
    add("--temperature", type=trapo.number(float, 0, 1e9), default=0.6,
        help="of sampling, 0.6; 0 is greedy")
    add("--max-tokens", type=count, help="of a response; default: the run's own limit, else 8192")
    add("--limit", type=count, help="only the first so many problems of each benchmark")
    add("--seed", type=int, default=0, help="of sampling, 0")
    add("--chunk", type=count, default=256, help="responses sampled, then saved, at a time, 256")
    add("--out", help="folder of the results; default: <model>/eval")
    add("--rescore", action="store_true", help="grade the saved samples again, generate nothing")
    add = commands.add_parser("runs", help="training runs compared").add_argument
    add("folders", nargs="+", help="folders of training runs")
    add("--against", help="also the differences to this method, paired by seed")
    add("--plot", help="draw learning curves into this file")
    add("--markdown", action="store_true", help="tables in markdown")
    add = commands.add_parser("speed", help="speed; takes trapo.py's flags too").add_argument
    add("--model", help=f"{', '.join(SHAPES)}; or as trapo.py's --model")
    add("--prompts", type=int, nargs="+", default=[1, 4, 16], help="of a step, 8 rollouts each")
    add("--repeat", type=count, default=5, help="steps measured, after one to warm up; 5")
    transformers.utils.logging.disable_progress_bar()
    try:
        args, args.rest = parser.parse_known_args(argv)
        if args.rest and args.command != "speed":
            raise InputError(f"{args.command} knows no {' '.join(args.rest)}")
        {"model": evaluate, "runs": compare, "speed": speed}[args.command](args)
    except (InputError, OSError) as error:  # OSError: --out cannot be written
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues an evaluation") from None

if __name__ == "__main__":
    main()
    trapo.leave()
