"""Evaluation in one file: benchmarks with honest statistics, training runs compared, and speed.

    python eval.py model runs/x --on gsm8k math500 my.jsonl               accuracy of a model
    python eval.py runs runs/a runs/b --against grpo --plot curves.png    training runs compared
    python eval.py speed --model random:Qwen2.5-0.5B                      speed of this machine

The sampler, the reward, the update and the loading of models and rows are trapo.py's. Words: avg@k
is the share of right answers among k samples of every problem; pass@k the chance that at least one
of k samples is right.
"""
import argparse, datetime, hashlib, json, math, os, random, re  # noqa: E401
import resource, statistics, sys, time  # noqa: E401
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
import numpy
import pandas
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
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

    Not the samples: those of one problem are alike. Seeded: the same values, the same interval.
    """
    means = numpy.random.default_rng(0).choice(values, (4000, len(values))).mean(1)
    return tuple(numpy.percentile(means, (2.5, 97.5)).tolist())

def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with df >= 1 degrees of freedom: 12.71, 4.30, 3.18..."""
    def outside(t: float) -> float:  # P(|T| > t)
        return mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
    return float(mpmath.findroot(lambda t: outside(t) - 0.05, (1.9, 13), solver="ridder"))

def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width of Student's 95 % interval); nan where there are too few values."""
    if len(values) < 2:
        return (values or [math.nan])[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), t_quantile(len(values) - 1) * error

# ==== Part 2. Benchmarks, and how often the paper's protocol samples each problem.
BENCHMARKS = {  # short name: data set on the Hub, its configuration, its split, samples a problem
    "gsm8k": ("openai/gsm8k", "main", "test", 1),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 1),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", 32),
    "aime25": ("math-ai/aime25", None, "test", 32),
    "amc": ("AI-MO/aimo-validation-amc", None, "train", 32),  # the paper's 83 problems
    "minerva": ("math-ai/minervamath", None, "test", 1),
    "olympiad": ("math-ai/olympiadbench", None, "test", 1),
}
TABLE_1 = {"aime24": "valid.aime", "amc": "valid.amc", "math500": "valid.math",  # the paper's five,
           "minerva": "valid.minerva", "olympiad": "valid.olympiad_bench"}  # and the authors' files
CLOCK = "clock: "  # begins the names of the embedded experiment's held-out sets

@dataclass
class Benchmark:
    """Problems, how often each is sampled, and the reward, if it is not Math-Verify."""
    name: str
    problems: list[Problem]
    samples: int
    score: Callable[[Problem, Tokens], float] | None = None

def load_benchmark(name: str, tokenizer) -> Benchmark:
    """A benchmark by its short name, or a file. InputError if it cannot be had or has no answers.

    Identical rows are one problem, sampled as often as it stands there: the authors' files hold
    each problem of AIME and AMC 32 times.
    """
    rows, samples = [], None
    if name in BENCHMARKS:
        from datasets import load_dataset
        hub, config, split, samples = BENCHMARKS[name]
        try:
            rows = load_dataset(hub, config, split=split)
        except Exception as error:  # the Hub, the network and the parsers all raise their own
            raise InputError(f"cannot read the Hub data set {hub} ({brief(error)}); a local file "
                             "works too: --on path/to/rows.jsonl") from error
    elif os.path.isfile(name) and name.endswith((".parquet", ".jsonl", ".json")):
        rows = trapo.load_rows(name)
    else:
        raise InputError(f"no benchmark '{name}': give some of {', '.join(BENCHMARKS)}, or the "
                         "path of an existing .parquet, .jsonl or .json file")
    columns = ("prompt", "problem", "question", "answer", "reward_model")  # not the solutions
    plain = [{key: row[key] for key in columns if key in row}
             | ({"answer": ", ".join(row["final_answer"])} if row.get("final_answer") else {})
             for row in rows]  # OlympiadBench lists its answers
    distinct = {json.dumps(row, sort_keys=True): row for row in plain}
    problems = trapo.make_problems(distinct.values(), tokenizer, Namespace(
        dataset=name, max_prompt=math.inf, max_response=math.inf))  # none is too long to count
    return Benchmark(name if name in BENCHMARKS else Path(name).stem, problems,
                     samples or len(plain) // len(distinct))

def load_benchmarks(args: Namespace, tokenizer, run: dict) -> list[Benchmark]:
    """What --on names; for the embedded experiment's model (settings: run) its held-out sets."""
    if not run.get("dataset", "").startswith("clock"):
        found = [load_benchmark(name, tokenizer) for name in args.on]
    elif args.on:
        raise InputError("the embedded experiment's model knows only its clock: leave --on out")
    else:
        task = trapo.clock_task(tokenizer, Namespace(dataset="clock", seed=run["seed"],
                                                     eval_size=args.limit or 256))
        found = [Benchmark(CLOCK + x, held, 1, task.score) for x, held in task.heldout.items()]
    if len({b.name for b in found}) < max(1, len(found)):
        raise InputError(f"give each benchmark once: --on some of {', '.join(BENCHMARKS)} or files")
    for b in found:
        b.problems = b.problems[:args.limit]
        b.samples = args.samples or (b.samples if args.temperature else 1)  # greedy: all the same
    return found

# ==== Part 3. Sampling and grading. Samples are drawn and saved in chunks: a few problems, all of
# their samples. A chunk's random numbers depend on its place alone, so neither an interruption nor
# the number of processes changes what is drawn.

def sample_chunk(sampler: nn.Module, tokenizer, benchmark: Benchmark, first: int, size: int,
                 args: Namespace) -> list[dict]:
    """Draw all samples of the problems first, ..., first + size - 1: a record each, not graded."""
    k = benchmark.samples
    chunk = [p for p in benchmark.problems[first:first + size] for _ in range(k)]
    torch.manual_seed(random.Random(f"{args.seed} {benchmark.name} {first}").getrandbits(63))
    drawn, _ = sample(sampler, [p.prompt_ids for p in chunk], [args.max_tokens] * len(chunk),
                      args.temperature, static=args.device == "cuda", kv_tokens=args.kv_tokens)

    def text(ids: Tokens) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [{"benchmark": benchmark.name, "problem": first + i // k, "of": len(benchmark.problems),
             "sample": i % k, "prompt": text(problem.prompt_ids), "response": text(ids),
             "answer": problem.answer, "tokens": len(ids),
             "truncated": ids[-1] not in trapo.end_ids(sampler), "note": "",
             "correct": benchmark.score(problem, ids) if benchmark.score else None}
            for i, (problem, ids) in enumerate(zip(chunk, drawn))]

def grade_record(record: dict) -> None:
    """Set `correct`, 1.0 or 0.0, and `note`: why Math-Verify cannot read the response, or ""."""
    if not record["benchmark"].startswith(CLOCK):  # those were graded by their tokens
        record["correct"], record["note"] = trapo.grade(record["response"], record["answer"])

def write(path: Path, lines: list[dict], **style: int) -> None:
    """Write JSON, a line each. A crash leaves the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(line, **style) + "\n" for line in lines))
    os.replace(temporary, path)

def run_benchmark(sampler: nn.Module, tokenizer, benchmark: Benchmark, records: list[dict],
                  path: Path, args: Namespace) -> None:
    """Draw the chunks that `records` lacks, grade them, and add them to it and to the file.

    Under torchrun each process draws its share; the first collects, grades and writes.
    """
    size, n = max(1, args.chunk // benchmark.samples), len(benchmark.problems)
    mine = [r for r in records if r["benchmark"] == benchmark.name]
    answers = [p.answer for p in benchmark.problems]
    if any((r["of"], r["answer"]) != (n, answers[r["problem"] % n]) for r in mine):
        raise InputError(f"{path} holds samples of other problems by the name {benchmark.name}: "
                         "give another --out, or --overwrite it")
    right, done = [r["correct"] for r in mine], [{r["problem"] for r in mine}]
    if WORLD > 1:
        dist.broadcast_object_list(done)
    todo = [first for first in range(0, n, size) if first not in done[0]]
    with tqdm(total=n, initial=len(done[0]), desc=benchmark.name, disable=RANK > 0) as bar:
        for turn in range(0, len(todo), WORLD):
            new = [r for first in todo[turn:turn + WORLD][RANK:RANK + 1]
                   for r in sample_chunk(sampler, tokenizer, benchmark, first, size, args)]
            chunks = [new] * WORLD if RANK == 0 else None
            if WORLD > 1:
                dist.gather_object(new, chunks)
            for record in [r for chunk in chunks or () for r in chunk]:
                grade_record(record)
                records.append(record)
                right.append(record["correct"])
                bar.update((record["sample"] + 1) // benchmark.samples)
                bar.set_postfix(accuracy=f"{statistics.fmean(right):.3f}", refresh=False)
            if RANK == 0:
                write(path, records)

def report(settings: dict, records: list[dict], out: Path) -> None:
    """Write results.json and print it. All shares lie in [0, 1]; `tokens` is the mean length."""
    found, frame = {}, pandas.DataFrame(records)
    for name, mine in frame.groupby("benchmark", sort=False):
        right = mine.groupby("problem").correct.agg(list)
        n, k = len(right), len(mine) // len(right)
        passes = [statistics.fmean(pass_at_k(k, int(sum(x)), i) for x in right)
                  for i in range(1, k + 1)]
        low, high = bootstrap_interval(right.map(statistics.fmean).tolist())
        found[name] = {"problems": n, "of": int(mine.of.max()), "k": k, "avg@k": passes[0],
                       "low": low, "high": high, "pass@k": passes[-1], "pass@1..k": passes,
                       "truncated": mine.truncated.mean(), "unreadable": (mine.note != "").mean(),
                       "tokens": mine.tokens.mean()}
    five = [found.get(name, found.get(file)) for name, file in TABLE_1.items()]
    average = (statistics.fmean(b["avg@k"] for b in five)
               if all(b and b["problems"] == b["of"] for b in five) else None)
    write(out / "results.json", [{"settings": settings, "benchmarks": found,
                                  "table_1_average": average}], indent=1)
    shares = ("avg@k", "low", "high", "pass@k", "truncated", "unreadable")
    print(pandas.DataFrame(found).T.drop(columns="pass@1..k").to_string(formatters={
        "tokens": "{:.0f}".format, **dict.fromkeys(shares, "{:.1%}".format)}))
    print(f"low to high: 95 % interval of avg@k; every sample is in {out}/samples.jsonl")
    if average is not None:
        print(f"average of the paper's five benchmarks: {average:.1%}")

def evaluate(args: Namespace) -> None:
    """`eval.py model`: sample what is missing, grade it, report. With --rescore: only grade."""
    if not 0 <= args.temperature < math.inf:
        raise InputError("--temperature must be at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA here: use --device cpu")
    folder = Path(args.model)
    out = Path(args.out or (folder / "eval" if folder.is_dir() else f"runs/eval-{folder.name}"))
    path, saved = out / "samples.jsonl", out / "results.json"
    old = json.loads(saved.read_text()) if saved.exists() and not args.overwrite else {}
    records = [json.loads(line) for line in path.open()] if old else []
    if args.rescore:
        if not records:
            raise InputError(f"no samples to grade in {out}: evaluate first, or give --out")
        for record in tqdm(records, desc="grading"):
            grade_record(record)
        write(path, records)
        return report(old["settings"], records, out)
    policy, tokenizer = load_policy(args.model)
    run = getattr(policy.config, "trapo", {})
    args.max_tokens = args.max_tokens or run.get("max_response", 8192)
    weights = b"".join(p.detach().flatten()[:16].numpy().tobytes() for p in policy.parameters())
    same = ("temperature", "samples", "max_tokens", "limit", "seed", "chunk")
    settings = {"model": hashlib.sha256(weights).hexdigest()} | {k: getattr(args, k) for k in same}
    changed = [key for key in settings if old and old["settings"][key] != settings[key]]
    if changed:
        raise InputError(f"{out} holds an evaluation with another {' and '.join(changed)}: give "
                         "another --out, or --overwrite it")
    benchmarks = load_benchmarks(args, tokenizer, run)
    if RANK == 0 and not old:
        out.mkdir(parents=True, exist_ok=True)
        write(path, [])
        write(saved, [{"settings": settings}])
    sampler = make_sampler(policy, args.device)
    for benchmark in benchmarks:
        run_benchmark(sampler, tokenizer, benchmark, records, path, args)
    if RANK == 0:
        report(settings, records, out)

# ==== Part 4. Comparing training runs. Runs that differ in nothing but the seed are one method.
NOT_METHOD = ["seed", "out", "device", "wandb", "save_every", "eval_every"]
PANELS = {"reward_unguided": "unguided reward", "accuracy": "held-out accuracy",
          "guided": "share of rollouts guided", "entropy": "entropy, nats",
          "response_length": "response length, tokens", "total": "tokens generated, thousands"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
           "#888888")  # Okabe and Ito's, with grey for their yellow

def read_run(folder: str) -> tuple[dict, pandas.DataFrame]:
    """A run's settings, and its metrics.jsonl as a table by step; InputError if there are none."""
    try:
        settings = json.loads((Path(folder) / "config.json").read_text())["trapo"]
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # not one cut short
        metrics = pandas.DataFrame([{"eval": None} | row for row in rows]).set_index("step")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a training run ({brief(error)})") from error
    if metrics.index[-1] < 1:
        raise InputError(f"{folder}/metrics.jsonl has no finished step")
    if metrics.index[-1] < settings["steps"]:
        print(f"note: {folder} stands at step {metrics.index[-1]} of {settings['steps']}")
    return settings, metrics

def name_methods(runs: tuple[dict, ...]) -> list[str]:
    """Settings of runs -> names of their methods: the preset, and what tells its variants apart."""
    frame = pandas.DataFrame(runs).astype(str).drop(columns=NOT_METHOD, errors="ignore")
    frame["model"] = [re.sub(rf"(?<!\d){run['seed']}$", "*", Path(str(run["model"])).name)
                      for run in runs]  # each seed has a base of its own
    names = frame.method.copy()
    for _, same in frame.groupby("method"):
        for key in same.columns[same.nunique() > 1]:
            names[same.index] += f" {key}=" + same[key]
    return names.tolist()

def measures(metrics: pandas.DataFrame) -> dict[str, float]:
    """What a run came to. Its seconds are those of training, without the evaluations."""
    steps, evals = metrics.loc[1:], metrics["eval"].dropna()
    rewards = steps.reward_unguided.astype(float).tail(max(1, len(steps) // 10))
    return {**(evals.iloc[-1] if len(evals) else {}), "unguided reward, last tenth": rewards.mean(),
            "tokens generated (k)": steps.tokens_generated.sum() / 1000,
            "tokens trained (k)": steps.tokens_trained.sum() / 1000,
            "seconds": (steps.seconds_sample + steps.seconds_score + steps.seconds_update).sum()}

def cell(values: pandas.Series) -> str:
    """Values over seeds -> "mean ± half-width", the mean alone for one seed, or "-" for none."""
    mean, half = mean_interval(values.dropna().tolist())
    digits = 3 if abs(mean) < 10 else 1
    return "-" if math.isnan(mean) else f"{mean:.{digits}f}" + (
        "" if math.isnan(half) else f" ± {half:.{digits}f}")

def show(title: str, values: pandas.DataFrame, markdown: bool) -> None:
    """Print a table of measures by methods, from values indexed by method and seed."""
    groups = values.groupby("method", sort=False)
    table = groups.agg(cell).T.set_axis([f"{m} ({n})" for m, n in groups.size().items()], axis=1)
    rows = [["", *table], ["---"] + ["---:"] * len(table.T), *table.reset_index().values]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows) if markdown else table.to_string()
    print(f"\n{title} ± 95 % interval (number of seeds)\n\n{lines}")

def compare(args: Namespace) -> None:
    """`eval.py runs`: a table of the methods, their paired differences, and a plot."""
    settings, metrics = zip(*map(read_run, args.folders))
    keys = list(zip(name_methods(settings), (s["seed"] for s in settings)))
    if len(set(keys)) < len(keys):
        raise InputError("two of the runs have the same settings and the same seed")
    index = pandas.MultiIndex.from_tuples(keys, names=("method", "seed"))
    found = pandas.DataFrame(map(measures, metrics), index=index)
    show("mean", found, args.markdown)
    if args.against:
        if args.against not in dict(keys):
            raise InputError(f"--against: '{args.against}' is none of {', '.join(dict(keys))}")
        base = found.loc[args.against]
        others = found.drop(args.against, level="method").query("seed in @base.index")
        if others.empty:
            raise InputError(f"--against: no run of another method has a seed of {args.against}")
        others = others.sub(base, level="seed")
        show(f"difference to {args.against} at the same seed", others, args.markdown)
    if args.plot:
        plot(keys, metrics, args.plot)

def curve(metrics: pandas.DataFrame, key: str) -> pandas.Series:
    """A panel's values by step; noisy ones are running means over 1/15 of the run."""
    if key == "accuracy":
        return metrics["eval"].dropna().map(lambda found: next(iter(found.values())))
    if key == "total":
        return metrics.tokens_generated.loc[1:].cumsum() / 1000
    window = max(1, len(metrics) // 15)
    return metrics[key].loc[1:].astype(float).rolling(window, min_periods=1).mean()

def plot(keys: list[tuple[str, int]], metrics: tuple[pandas.DataFrame, ...], path: str) -> None:
    """Draw PANELS: a line a method, the mean over its seeds, in a band from the least to the most.

    Colours, dashes and markers all differ, for every eye.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    figure = matplotlib.figure.Figure(figsize=(10, 5.4), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for i, method in enumerate(dict(keys)):
            seeds = pandas.concat([curve(m, key) for (name, _), m in zip(keys, metrics)
                                   if name == method], axis=1, join="inner")
            axis.plot(seeds.mean(axis=1), label=method, color=COLOURS[i % 8],
                      linestyle=("-", "--", "-.", ":")[i % 4], marker="osD^vPX*"[i % 8],
                      markersize=4, markevery=max(1, len(seeds) // 8))
            axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), alpha=0.15,
                              color=COLOURS[i % 8], linewidth=0)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
    figure.supxlabel("training step (bands: least to most over seeds; noisy curves: running means)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw into {path} ({brief(error)})") from error
    print(f"curves are in {path}")

# ==== Part 5. Speed and memory of the product's own code, on random prompts, random experts, and a
# coin for a reward. No response ends before its limit, so that the work is known.
SHAPES = {  # width, MLP, layers, heads, key-value heads, vocabulary, tied embeddings
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # FLOP/s, bf16, dense
STEPS = {"trapo, sequential": ("--method", "trapo", "--no-speculate"),
         "trapo, speculative": ("--method", "trapo", "--speculate"), "grpo": ("--method", "grpo")}

def speed_model(name: str | None, device: str) -> nn.Module:
    """The embedded experiment's model, one of SHAPES with random weights, or a saved one."""
    if not name:
        policy, _ = trapo.clock_model(0)
    elif not name.startswith("random:"):
        policy, _ = load_policy(name)
    elif name[7:] in SHAPES:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings")
        with torch.device(device):
            policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
                **dict(zip(keys, SHAPES[name[7:]])), max_position_embeddings=32768,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    else:
        raise InputError(f"--model random: knows {', '.join(SHAPES)}, not '{name[7:]}'")
    policy.generation_config.eos_token_id = None
    return policy.to(device)

def measure(what: str, amount: float, unit: str, repeat: int, work: Callable[[], object]) -> float:
    """Time work() after a warm-up; print seconds, the rate of `amount` units, and peak memory.

    Returns: the median rate; nan if the memory of the device did not suffice.
    """
    cuda, seconds = torch.cuda.is_available(), []
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
        print(f"{what:28} out of memory")
        return math.nan
    peak = (torch.cuda.max_memory_allocated() / 2**30 if cuda else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
    middle, low, high = statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])
    print(f"{what:28} {middle:8.4g} s ({low:.4g} to {high:.4g}), {amount / middle:9.4g} {unit}, "
          f"peak {peak:.2f} GiB", flush=True)
    return amount / middle

def plain_logprobs(policy: nn.Module, sequences: list[Tokens],
                   starts: list[int]) -> tuple[list[Tensor], None]:
    """What token_logprobs replaces: the logits of the whole batch at one time."""
    ids = torch.tensor(sequences, device=policy.device)
    logits = policy(input_ids=ids, use_cache=False).logits[:, starts[0] - 1:-1].float()
    return list(logits.log_softmax(-1).gather(2, ids[:, starts[0]:, None])), None

def speed(args: Namespace, rest: list[str]) -> None:
    """`eval.py speed`: matrix product, sampling, log-probs, and whole steps of three methods.

    Model FLOPs of an update: 6 a weight and token, the head's only for response tokens; neither
    attention's products nor what is computed twice.
    """
    rest += ["--overwrite", *(("--model", args.model) if args.model else ())]
    settings, rng = trapo.parse_args(rest), random.Random(0)
    cuda, new, prompt = settings.device == "cuda", settings.max_response, args.prompt_tokens
    policy = speed_model(args.model, settings.device)
    sampler, vocabulary = make_sampler(policy, settings.device), policy.config.vocab_size
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    square = torch.randn(n, n, device=settings.device).to(dtype)
    reference = measure("matrix product", 2 * n**3, "FLOP/s", args.repeat, lambda: square @ square)

    def ids(length: int) -> Tokens:
        return [rng.randrange(vocabulary) for _ in range(length)]

    def ours() -> None:
        sample(sampler, requests, [new] * batch, 1.0, settings.cuda_graphs, settings.kv_tokens)

    def theirs() -> None:  # transformers' own loop, told to sample from the exact policy
        sampler.eval().generate(
            torch.tensor(requests, device=sampler.device), max_new_tokens=new, do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0, pad_token_id=0)

    def update(score: Callable) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logprobs, _ = score(policy, [r + ids(new) for r in requests], [prompt] * batch)
        torch.cat(logprobs).sum().backward()

    for batch in args.batches:
        requests = [ids(prompt) for _ in range(batch)]
        for what, work in (("sample", ours), ("model.generate", theirs),
                           ("token_logprobs", lambda: update(trapo.token_logprobs)),
                           ("plain log_softmax", lambda: update(plain_logprobs))):
            if cuda or what[:5] != "plain" or 16 * batch * new * vocabulary < 2**33:  # bytes
                measure(f"{what}, batch {batch}", batch * new, "tokens/s", args.repeat, work)
    optimizer, coin = torch.optim.AdamW(policy.train().parameters()), random.Random(0)
    task = trapo.Task([Problem(ids(prompt), [ids(new)], "") for _ in range(settings.prompts)], {},
                      lambda problem, response: float(coin.random() < 0.4))
    head = policy.get_output_embeddings().weight.numel()
    matrices = 1 if policy.config.tie_word_embeddings else 2  # the head, and a table to look up in
    body = sum(p.numel() for p in policy.parameters()) - matrices * head
    for what, flags in STEPS.items():
        settings, lines = trapo.parse_args([*rest, *flags]), []
        measure(f"step of {what}", settings.prompts, "prompts/s", args.repeat, lambda: lines.append(
            trapo.train_step(policy, sampler, optimizer, task, settings, len(lines))[0]))
        if len(lines) <= args.repeat:  # out of memory
            continue
        steps = pandas.DataFrame(lines[1:])
        rollouts = settings.prompts * sum(settings.sizes) - steps.rollouts_skipped
        tokens, seconds = steps.tokens_trained, steps.seconds_update
        flops = (6 * (body * (tokens + prompt * rollouts) + head * tokens) / seconds).median()
        card = torch.cuda.get_device_name() if cuda else ""
        mfu = [f", MFU {flops / peak:.1%}" for key, peak in PEAKS.items() if key in card]
        print(f"  sampling {steps.seconds_sample.median():.4g} s "
              f"({steps.tokens_generated.median():g} tokens), "
              f"update {seconds.median():.4g} s ({tokens.median():g} tokens), "
              f"{(tokens / seconds).median():.4g} tokens/s, {flops:.3g} FLOP/s, "
              f"{flops / reference:.1%} of the matrix product" + "".join(mfu[:1]))

# ==== Part 6. The command line.

def make_parser() -> Parser:
    """Three subcommands; every flag in one line, with its unit."""
    def count(text: str) -> int:
        if not (text.isdecimal() and int(text)):
            raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
        return int(text)

    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = Parser(description="Benchmarks, comparisons of training runs, and speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("model", help="accuracy of a model", **style).add_argument
    add("model", help="a run's folder, another local model, a Hub id or a bare Qwen name")
    add("--on", nargs="+", default=[], help=f"any of {', '.join(BENCHMARKS)}, or files")
    add("--samples", type=count, help="samples a problem; default: AIME and AMC 32, others 1")
    add("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy")
    add("--max-tokens", type=count, help="of a response; default: the run's own limit, else 8192")
    add("--limit", type=count, help="only the first so many problems of each benchmark")
    add("--seed", type=int, default=0, help="of sampling")
    add("--chunk", type=count, default=256, help="responses sampled, then saved, at a time")
    add("--kv-tokens", type=count, default=1 << 19, help="tokens in the sampler's cache")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="folder of the results; default: <model>/eval")
    add("--overwrite", action="store_true", help="forget the evaluation in --out")
    add("--rescore", action="store_true", help="grade the saved samples again, generate nothing")
    add = commands.add_parser("runs", help="training runs compared", **style).add_argument
    add("folders", nargs="+", help="folders of training runs")
    add("--against", help="also the differences to this method, paired by seed")
    add("--plot", help="draw learning curves into this file")
    add("--markdown", action="store_true", help="tables in markdown")
    add = commands.add_parser("speed", help="speed and memory of this machine; further flags are "
                              "trapo.py's: --prompts, --max-response, ...", **style).add_argument
    add("--model", help="random:NAME of " + ", ".join(SHAPES) + "; or as trapo.py's --model")
    add("--batches", type=count, nargs="+", default=[8, 32, 128], help="rows sampled at a time")
    add("--prompt-tokens", type=count, default=64, help="length of the prompts, tokens")
    add("--repeat", type=count, default=5, help="repetitions of each measurement")
    return parser

def main(argv: list[str] | None = None) -> None:
    """Run a subcommand. Input that cannot be used: one line, exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        args, rest = make_parser().parse_known_args(argv)
        if args.command == "speed" and WORLD == 1:
            return speed(args, rest)
        if rest or (WORLD > 1 and args.command != "model"):
            raise InputError(f"cannot use {' '.join(rest) or 'torchrun'} with {args.command}")
        if WORLD > 1:  # the processes exchange text only; one may be hours later than another
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        {"model": evaluate, "runs": compare}[args.command](args)
    except InputError as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues an evaluation") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
