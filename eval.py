"""Evaluation in one file: honest benchmarks, training runs compared and looked at, and speed.

    python eval.py model runs/x --on gsm8k math500 my.jsonl               accuracy of a model
    python eval.py runs runs/a runs/b --against grpo --plot curves.png    training runs compared
    python eval.py look runs/x                                            its rollouts, as a page
    python eval.py speed --model random:Qwen2.5-0.5B                      speed of this machine

Sampler, reward, update and the loading of models and rows are trapo.py's. avg@k is the share of
right answers among k samples of every problem; pass@k the chance that one of k at least is right.
"""
import functools, hashlib, json, math, os, random, statistics, time  # noqa: E401
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy
import pandas
import torch
import transformers
from torch.utils.benchmark import Timer
from tqdm import tqdm

import trapo
from trapo import (RANK, WORLD, InputError, Parser, Problem, Rollout, Settings, Tokens,
                   as_input_error, load_policy, make_sampler, sample)

# ==== Part 1. Statistics. An accuracy without its interval is half a result: on the 30 problems of
# AIME two models 10 points apart may well be equally good.
def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones.

    The unbiased estimator of pass@k (Chen et al. 2021), in exact integers.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of [n] values, one a problem: samples of one problem are alike."""
    rng = numpy.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    return tuple(numpy.percentile(means, (2.5, 97.5)).tolist())

@functools.cache
def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with df >= 1 degrees of freedom: 12.71, 4.30, 3.18..."""
    angle = numpy.linspace(0, math.pi / 2, 1_000_001)  # a grid over t = sqrt(df) tan(angle)
    density = numpy.cos(angle) ** (df - 1)
    share = (density[1:] + density[:-1]).cumsum()      # of |T| up to each angle, by trapezoids
    return math.sqrt(df) * math.tan(numpy.interp(0.95, share / share[-1], angle[1:]))

def mean_interval(values: pandas.Series) -> str:
    """"mean ± half of Student's 95 % interval", and "n=..." if some are missing; of none "-"."""
    n, mean = values.count(), values.mean()
    half = f" ± {t_quantile(n - 1) * values.sem():.3f}" if n > 1 else ""
    return f"{mean:.3f}{half}" + (f" (n={n})" if n < len(values) else "") if n else "-"

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
    """The problems of a Hub benchmark or of a file, each as often as it is to be sampled. Identical
    rows are one problem, by default sampled as often as it stands there: the authors' files hold
    each problem of AIME and AMC 32 times."""
    from datasets import load_dataset
    hub, config, split, samples, _ = BENCHMARKS.get(name, [None] * 5)
    if not (hub or Path(name).is_file()):
        raise InputError(f"no benchmark '{name}': --on takes some of {', '.join(BENCHMARKS)}, or "
                         "existing files")
    with as_input_error(f"read {hub}", "give its rows as a file: --on rows.jsonl"):
        rows = load_dataset(hub, config, split=split).to_list() if hub else trapo.load_rows(name)
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("final_answer"), list):  # OlympiadBench's
            row["answer"] = ", ".join(map(str, row["final_answer"]))
    problems = trapo.make_problems(rows, tokenizer, Settings(dataset=name, max_prompt=1 << 30),
                                   heldout=True)
    distinct = list({(tuple(p.prompt_ids), p.answer): p for p in problems}.values())
    protocol = samples or len(problems) // len(distinct)
    k = args.samples or (protocol if args.temperature else 1)  # greedy samples are all the same
    return [p for p in distinct[:args.limit or None] for _ in range(k)]

def load_benchmarks(args: Namespace, tokenizer, defaults: dict) -> dict[str, list[Problem]]:
    """{name: problems} of --on, or of the test set that the model's folder names."""
    names = args.on or [defaults.get("test", {"gsm8k": "gsm8k"}.get(defaults.get("dataset")))]
    if names == [None] or len({Path(name).stem for name in names}) < len(names):
        raise InputError(f"give each benchmark once: --on some of {', '.join(BENCHMARKS)} or files")
    return {Path(name).stem: load_benchmark(name, tokenizer, args) for name in names}

# ==== Part 3. Sampling and grading. Samples are drawn in chunks. A chunk's random numbers depend on
# its place alone, and it is saved in a file of its own, whole or not at all: so neither an
# interruption nor the number of processes changes what is drawn.
SAMPLE = {"benchmark": str, "number": int, "of": int, "answer": str, "prompt": str, "response": str,
          "correct": float, "note": str, "tokens": int, "truncated": bool}

def run_benchmark(name: str, problems: list[Problem], saved: list[dict], out: Path,
                  sampler: torch.nn.Module, tokenizer, args: Namespace) -> None:
    """Draw, grade and save a sample of each of `problems`: this process's chunks, unless saved."""
    asked = [{"benchmark": name, "number": i, "of": len(problems), "answer": p.answer,
              "prompt": tokenizer.decode(p.prompt_ids)} for i, p in enumerate(problems)]
    saved = [r for r in saved if r["benchmark"] == name]
    if any(r["of"] != len(asked) or not asked[r["number"]].items() <= r.items() for r in saved):
        raise InputError(f"{out} holds samples of other problems called {name}: give another --out")
    done, eos_ids = {r["number"] for r in saved}, sampler.generation_config.eos_token_id
    chunks = range(0, len(problems), args.chunk)[RANK::WORLD]
    for first in tqdm([first for first in chunks if first not in done], name, disable=RANK > 0):
        chunk = problems[first:first + args.chunk]
        seed = random.Random(f"{args.seed} {name} {first}").getrandbits(63)
        uniforms = torch.rand(len(chunk), args.max_tokens, dtype=torch.float64,
                              generator=torch.Generator().manual_seed(seed))
        responses, _ = sample(sampler, [p.prompt_ids for p in chunk],
                              [args.max_tokens] * len(chunk), args.temperature, uniforms=uniforms)
        records = []
        for question, problem, ids in zip(asked[first:], chunk, responses):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            correct, note = trapo.grade(text, problem.answer)
            records.append({**question, "response": text, "correct": correct, "note": note,
                            "tokens": len(ids), "truncated": ids[-1] not in eos_ids})
        write(out / f"samples-{name}-{first}.jsonl", records)

def write(path: Path, lines: list[dict], **style: int) -> None:
    """Write JSON, a line each, whole or not at all."""
    trapo.write_whole(path, "".join(json.dumps(line, **style) + "\n" for line in lines))

def read_saved(out: Path) -> tuple[dict | None, list[dict]]:
    """The settings of the evaluation in a folder, None if there is none, and its samples."""
    results, found = out / "results.json", {}
    with as_input_error(f"read {results}", "give another --out"):
        old = dict(json.loads(results.read_text())["settings"]) if results.exists() else None
    for path in out.glob("samples*.jsonl"):
        with as_input_error(f"read {path}", "delete it, and its samples are drawn again"):
            for r in map(json.loads, path.read_text().splitlines()):
                if {key: type(r.get(key)) for key in SAMPLE} != SAMPLE or r["number"] >= r["of"]:
                    raise ValueError("a line is no sample")
                found[r["benchmark"], r["number"]] = r
    return old, [found[key] for key in sorted(found)]

def report(settings: dict, records: list[dict], out: Path) -> None:
    """Write samples.jsonl in place of the chunks, and results.json; print the latter's table."""
    if RANK:
        return
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
    if unreadable := {r["answer"] for r in records if r["note"] == trapo.UNREADABLE}:
        print(f"{len(unreadable)} answers cannot be read, and so are never right: {unreadable}")
    if average is not None:
        print(f"average of the paper's five benchmarks: {average:.1%}")

def evaluate(args: Namespace) -> None:
    """`eval.py model`: sample what is missing, grade it, report. With --rescore: only grade."""
    folder = Path(args.model)
    home = f"{folder}-" if (folder.parent / "settings.json").exists() else f"{folder}/"  # kept
    out = Path(args.out or (f"{home}eval" if folder.is_dir() else f"runs/eval-{folder.name}"))
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature}: give a number from 0 on")
    settings = trapo.fill_in({"device": args.device, "model": args.model, "dataset": "gsm8k"})
    trapo.check_settings(settings)
    trapo.start_processes("gloo", settings.device)
    out.mkdir(parents=True, exist_ok=True)
    old, records = read_saved(out)
    if args.rescore and not records:
        raise InputError(f"no samples to grade in {out}: evaluate first, or give --out")
    trapo.gather(0)  # nobody writes before all have read
    if args.rescore:
        for r in tqdm(records, "grading"):
            r["correct"], r["note"] = trapo.grade(r["response"], r["answer"])
        return report(old or {}, records, out)
    defaults = trapo.read_defaults(trapo.model_folder(args.model))
    policy, tokenizer = load_policy(args.model)
    benchmarks = load_benchmarks(args, tokenizer, defaults)
    longest = max(len(p.prompt_ids) for problems in benchmarks.values() for p in problems)
    room = (getattr(policy.config, "max_position_embeddings", None) or math.inf) - longest
    args.max_tokens = args.max_tokens or max(1, defaults.get("max_response", min(8192, room)))
    trapo.check_context(policy, longest + args.max_tokens)
    weights = b"".join(p.detach().flatten()[:16].numpy().tobytes() for p in policy.parameters())
    protocol = {key: getattr(args, key) for key in
                ("temperature", "samples", "max_tokens", "limit", "seed", "chunk")}
    protocol |= {"bf16": settings.bf16, "weights": hashlib.sha256(weights).hexdigest()}
    if (old is not None or records) and old != protocol:
        raise InputError(f"{out} holds samples of other weights or settings: another --out")
    if RANK == 0 and old is None:
        write(out / "results.json", [{"settings": protocol}])
    sampler = make_sampler(policy, settings)
    for name, problems in benchmarks.items():
        run_benchmark(name, problems, records, out, sampler, tokenizer, args)
    trapo.gather(0)  # all is drawn
    report(protocol, [] if RANK else read_saved(out)[1], out)

# ==== Part 4. Training runs. Those that differ in nothing but the seed, and in what does not matter
# to what is learned, are one method, with one name and one colour everywhere.
METHOD = {*vars(trapo.Recipe()), "model", "dataset", "test", "eval_size"} - {"method", "seed"}
NAMES = {"trapo": "TRAPO", "grpo": "GRPO", "luffy": "LUFFY", "sft": "SFT", "naive": "naive SFT mix",
         "micro": "micro-groups alone", "micro-luffy": "micro-groups, LUFFY's loss",
         "fixed-prefix": "fixed prefixes", "uft": "UFT", "pope": "POPE", "hpt": "HPT",
         "chord": "CHORD", "ghpo": "GHPO"}
COLOURS = dict(zip(["SFT, then GRPO", *NAMES.values()], (  # Okabe and Ito's, then Tol's
    "#E69F00 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #000000 #7A4B00 #999999 #117733 #882255 "
    "#44AA99 #AA4499 #DDCC77").split()))
CURVES = {"reward_unguided": "unguided reward", "guided": "share of rollouts guided",
          "entropy": "entropy, nats", "response_length": "response length, tokens"}

def run_settings(folder: str) -> dict:
    """The settings of the run in a folder or around a model; {} if there is none."""
    for path in Path(folder, "settings.json"), Path(folder).parent / "settings.json":
        if path.exists():
            with as_input_error(f"use {path}", "restore it, or leave that run out"):
                return vars(Settings(**json.loads(path.read_text())))
    return {}

def read_run(folder: str) -> tuple[dict, dict[str, float], pandas.DataFrame]:
    """A run's settings, what it came to, and its curves: what is drawn, by step.

    Seconds are without the evaluations; noisy curves are running means over 1/15 of the run.
    """
    settings, path = run_settings(folder), Path(folder, "metrics.jsonl")
    with as_input_error(f"use {path}", "give the folder of another run, or repeat it"):
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
        rows = {row["step"]: {"eval": None} | row for row in rows}
        if not settings or max(rows, default=0) < 1:
            raise ValueError("no finished step" if settings else "no settings.json beside it")
        metrics = pandas.DataFrame.from_dict(rows, orient="index").sort_index()
        evals = pandas.DataFrame(metrics.pop("eval").dropna().to_dict()).T.astype(float)
        steps = metrics.loc[1:].astype(float)
        curves = steps[list(CURVES)].rename(columns=CURVES)
        curves = curves.rolling(max(1, len(steps) // 15), min_periods=1).mean()
        curves["tokens generated, thousands"] = steps["tokens_generated"].cumsum() / 1000
        accuracy = evals.iloc[:, :1].rename(columns=lambda name: "held-out accuracy")
        last_tenth = steps["reward_unguided"].tail(max(1, len(steps) // 10))
        final = {**dict(*evals.tail(1).to_dict("records")), "steps": len(steps),
                 "unguided reward, last tenth": last_tenth.mean(),
                 "tokens generated, thousands": steps["tokens_generated"].sum() / 1000,
                 "tokens trained, thousands": steps["tokens_trained"].sum() / 1000,
                 "seconds": steps.filter(like="seconds_").sum(axis=None)}
    return settings, final, curves.join(accuracy, how="outer")

def name_methods(runs: list[dict]) -> list[str]:
    """Settings of runs -> names of their methods, with what tells variants of a method apart: what
    differs among them, or from the preset, by value: -1 is -1.0."""
    names, runs = [], [dict(run) for run in runs]
    for run in runs:
        first = run_settings(str(run["model"]))  # of the run that this one goes on from
        stages = [first["method"], run["method"]] if first else [run["method"]]
        names.append(", then ".join(NAMES.get(stage, stage) for stage in stages))
        for key in "model", "dataset", "test":
            run[key] = Path(str(run[key])).name.partition(f"seed{run['seed']}")[0]
    variants = list(names)
    for name in set(names):
        same = [i for i in range(len(runs)) if names[i] == name]
        preset = {"prefix_weight": 1.0, "anneal": 0, "baseline": "group"}
        preset |= trapo.METHODS.get(runs[same[0]]["method"], {})
        for key in sorted(METHOD):
            values = [runs[i].get(key) for i in same]
            if any(value != preset.get(key, values[0]) for value in values):
                for i, value in zip(same, values):
                    variants[i] += f", {key}={values[values.index(value)]}"  # equal: one text
    return variants

def show(title: str, values: pandas.DataFrame, markdown: bool) -> None:
    """Print a table of measures by methods, from values indexed by method and seed."""
    table = values.groupby("method", sort=False).agg(mean_interval).T
    table.columns = [f"{method} ({len(values.loc[method])})" for method in table]
    rows = [["", *table], ["---"] + ["---:"] * len(table.T), *table.reset_index().values]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows) if markdown else table.to_string()
    print(f"\n{title} ± 95 % interval (number of seeds)\n\n{lines}")

def compare(args: Namespace) -> None:
    """`eval.py runs`: a table of the methods, their paired differences, and a plot."""
    settings, finals, curves = zip(*map(read_run, args.folders))
    keys = list(zip(name_methods(settings), (s["seed"] for s in settings)))
    if len(set(keys)) < len(keys):
        raise InputError("two of the runs have the same settings and the same seed: give only one")
    index = pandas.MultiIndex.from_tuples(keys, names=("method", "seed"))
    found = pandas.DataFrame(finals, index=index)
    show("mean", found, args.markdown)
    if args.against:
        wanted = NAMES.get(args.against, args.against).lower()
        other = next((method for method, _ in keys if method.lower() == wanted), None)
        pairs = [(m, s) for m, s in keys if m != other and (other, s) in keys]
        if not pairs:
            raise InputError(f"--against {args.against}: no such method, or no seed in common; "
                             f"methods: {'; '.join(dict(keys))}")
        base = found.loc[[(other, seed) for _, seed in pairs]].values
        show(f"paired difference to {other}", found.loc[pairs] - base, args.markdown)
    if args.plot:
        figure = draw(pandas.concat(curves, keys=keys, names=index.names))
        with as_input_error(f"draw into {args.plot}", "give a file such as curves.png"):
            figure.savefig(args.plot, dpi=200)

def draw(frame: pandas.DataFrame):
    """A figure of each column: thin lines are seeds, the thick line of a method their median."""
    with as_input_error("draw", "pip install matplotlib"):
        from matplotlib.figure import Figure
    figure, drawn = Figure(figsize=(8, 5.4), layout="constrained"), Counter()
    axes = [figure.add_subplot(2, 3, i + 1, title=title) for i, title in enumerate(frame)]
    for method in frame.index.unique("method"):
        known = [name for name in COLOURS if method.startswith(name)]
        colour = COLOURS[max(known, key=len)] if known else "#999999"
        style = ["-", "--", ":", "-."][drawn[colour] % 4]  # variants of a method
        drawn[colour] += 1
        for axis, title in zip(axes, frame):
            seeds = frame.loc[method][title].unstack("seed")
            for seed in seeds:
                axis.plot(seeds[seed].dropna(), c=colour, lw=0.6, alpha=0.5)
            axis.plot(seeds.dropna().median(axis=1), style, c=colour, lw=2, label=method, zorder=3)
    figure.supxlabel("training step (thick: median of the seeds; noisy curves: running means)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure

# ==== Part 5. A page to look at: the groups that a run kept, token by token.
PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>TRAPO, token by token</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; scroll-padding: 4rem; --expert: #f0b000; --above: #3b86d8; }
body { margin: auto; padding: 1rem; max-width: 54rem; overflow-wrap: anywhere; --below: #e0526e;
  color: color-mix(in srgb, CanvasText 72%, Canvas); font: .9rem/1.5 system-ui, sans-serif; }
h1, h2, p, figure { margin: .6rem 0; font-size: 1em; }
h1, h2 { margin: 1.1rem 0 .3rem; color: CanvasText; } h1 { font-size: 1.3em; }
figure { display: grid; grid-template: auto 1fr / 1.2rem 1fr; row-gap: .4rem; align-items: end; }
svg { width: 100%; height: 6rem; grid-row: span 2; border-block: 1px solid #8886; scale: 1 -1; }
path { fill: none; stroke: CanvasText; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
#guided { stroke: #b98900; stroke-dasharray: 6 4; } #reward_unguided { stroke: var(--above); }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; } #slider { flex: 1; }
.row { display: flex; flex-flow: wrap; align-items: baseline; border-top: 1px solid #8884; }
.text { flex: 1 1 18rem; max-height: 16rem; overflow: auto; white-space: pre-wrap;
  padding-right: 1em; font: .92em/1.9 ui-monospace, Menlo, Consolas, monospace; }
.token { margin-right: 1px; padding-bottom: 1px; unicode-bidi: isolate; color: CanvasText;
  background: color-mix(in srgb, var(--hue) calc(50% * var(--share)), transparent); }
.token:hover, .token:focus { outline: 2px solid; }
.inside { border-bottom: 2px solid #b98900; } .outside { border-bottom: 2px dotted #b98900; }
#status { position: sticky; bottom: 0; padding: 9px 0; background: Canvas; border-top: 1px solid; }
</style>
<h1>TRAPO, token by token</h1><p id="about"></p>
<figure>1<svg id="curves" role="img" preserveAspectRatio="none"><path id="now"/>
  <path id="guided"/><path id="reward_unguided"/></svg><span>0</span>
  <figcaption id="caption" style="grid-column: span 2"></figcaption></figure>
<form><button type="button" onclick="show(-1)" aria-label="previous step">←</button>
  <button type="button" onclick="show(1)" aria-label="next step">→</button>
  <label for="slider">step <output id="step"></output></label>
  <input type="range" id="slider" value="0" oninput="show(0)">
  <label>prompt <select id="prompt" onchange="show(0)"></select></label></form>
<p id="legend"></p><main id="group"></main><p id="status" role="status"></p>
<script>  // what a run says becomes textContent, never HTML
const run = RUN, steps = Object.values(Object.groupBy(run.groups, group => group.step));
const $ = id => document.getElementById(id), trace = (id, d) => $(id).setAttribute("d", d);
const add = (to, tag, more) => Object.assign(to.appendChild(document.createElement(tag)), more);
const number = x => String(+x?.toPrecision(2)).replace(/^(-?)0\./, "$1.").replace("-", "−");
const seen = text => text.replace(/\n/g, "⏎\n").replace(/^ +$/, "␣") || "∅";
function token(line, text, expert, logprob, weight) {
  const p = Math.exp(logprob ?? NaN), hue = expert ? "expert" : weight > 0 ? "above" : "below";
  const trusted = expert && run.prefix_loss === "trsft" && !isNaN(p);
  const side = !trusted ? "" : p >= run.alpha ? "inside" : "outside";
  const about = `token "${seen(text).trim()}": the ${expert ? "expert's" : "policy's own"}, p `
    + (isNaN(p) ? "not known" : `= ${number(p)}`) + (side && `, ${side} the trust region`)
    + `, weight ${number(weight)}` + (expert ? " of SFT's" : weight ? ", its advantage" : "");
  return add(line, "span", {textContent: seen(text), className: `token ${side}`, about,
    style: `--hue: var(--${hue}); --share: ${weight && .15 + .85 * Math.abs(weight)}`});
}
function show(by) {  // the kept step so many further on, and the chosen one of its prompts
  $("slider").valueAsNumber += by;
  const groups = steps[$("slider").value], step = groups[0].step;
  const {prompt, help, rollouts} = groups[$("prompt").selectedIndex] ?? groups[0];
  const at = points => points.filter(([x]) => x === step).map(([, y]) => number(y))[0] ?? "none";
  $("step").textContent = $("slider").ariaValueText = step;
  $("caption").textContent = $("curves").ariaLabel = `Step ${step}: unguided reward (solid) `
    + `${at(run.reward_unguided)}, share guided (dashed) ${at(run.guided)}; running means`;
  $("status").textContent = "Point at a token, or Tab to a line and walk it with ← and →.";
  trace("now", `M${step} 0V1`);
  $("group").replaceChildren();
  add($("group"), "p", {className: "text", textContent: prompt});
  help.forEach((text, m) => {
    add($("group"), "h2", {textContent: `micro-group ${m + 1}: ${text}`});
    for (const r of rollouts.filter(r => r.micro_group === m)) {
      const row = add($("group"), "div", {className: "row"}), sign = r.advantage > 0 ? "+" : "";
      const line = add(row, "div", {className: "text", role: "listbox", ariaLabel: "rollout"});
      r.text.forEach((text, i) => Object.assign(token(line, text, i < r.expert, r.logprob[i],
        r.weight[i]), {role: "option", tabIndex: i && -1}));  // Tab stops once a line
      row.append(`reward ${number(r.reward)}, A ${sign}${number(r.advantage)}`);
    }
  });
}
document.onkeydown = event => {  // on a token along its line, elsewhere along the steps
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key], on = event.target;
  if (!by || event.altKey || on.matches("input, select")) return;
  on.about ? (by < 0 ? on.previousSibling : on.nextSibling)?.focus() : show(by);
};
for (const kind of ["pointerover", "focusin"]) $("group").addEventListener(kind, event =>
  $("status").textContent = event.target.about ?? $("status").textContent);
for (const [t, ...is] of [["the expert's, p ≥ α", 1, 0, 1], ["p < α: outside the trust region",
  1, -99, .1], ["the policy's own, A > 0", 0, 0, .5], ["A < 0", 0, 0, -.5], ["A = 0", 0, 0, 0]])
  $("legend").append(token($("legend"), t, ...is), " ");
for (const i in steps[0]) add($("prompt"), "option", {textContent: +i + 1});
for (const id of ["reward_unguided", "guided"]) trace(id, run[id].join("L").replace(/^./, "M$&"));
$("about").textContent = `${run.method} on ${run.dataset}, seed ${run.seed}, α = ${run.alpha}`;
$("curves").setAttribute("viewBox", `0 0 ${run.guided.at(-1)[0]} 1`);
$("slider").max = steps.length - 1;
show(0);
</script>"""

def page_group(rollouts: list[Rollout], tokenizer, settings: Settings) -> dict:
    """A group as the page shows it: every token's text, log-prob, and weight in the update,
    -dL/dlog p: the advantage, or what the prefix loss gives an expert's token."""
    def finite(values: list[float]) -> list[float | None]:
        return [float(f"{x:.4g}") if x is not None and math.isfinite(x) else None for x in values]

    shown = []
    for r in rollouts:
        ids = r.prefix + r.completion
        contexts = [ids[max(0, i - 3):i] for i in range(len(ids))]
        texts = [(tokenizer.decode(before), tokenizer.decode([*before, token]))
                 for before, token in zip(contexts, ids)]
        # A character may take several tokens, and is seen with the last: then the text changes.
        text = [both[len(os.path.commonprefix((old, both))):] for old, both in texts]
        logprobs = torch.tensor(r.logprobs, dtype=torch.float64, requires_grad=True)
        weights = torch.zeros(len(ids))
        if r.logprobs:
            weights, = torch.autograd.grad(-trapo.rollout_loss(r, logprobs, settings), logprobs)
        shown.append({"micro_group": r.micro_group, "reward": r.reward, "advantage": r.advantage,
                      "expert": len(r.prefix), "text": text, "weight": finite(weights.tolist()),
                      "logprob": finite(r.logprobs or [None] * len(r.prefix) + r.sampler_logprobs)})
    return {"prompt": tokenizer.decode(rollouts[0].prompt), "rollouts": shown,
            "help": [trapo.help_given(rollouts, m, micro_group)
                     for m, micro_group in enumerate(settings.schedule)]}

def look(args: Namespace) -> None:
    """`eval.py look`: write rollouts.html, which holds all that it shows and loads nothing."""
    settings, _, curves = read_run(args.folder)
    path, page = Path(args.folder, "rollouts.jsonl"), Path(args.folder, "rollouts.html")
    with as_input_error(f"show {path}", "delete the lines that are damaged"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(args.folder, "tokenizer"))
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be torn
        groups = []
        for line in map(json.loads, lines):
            rollouts = [Rollout(**r) for r in line["rollouts"]]
            then = trapo.annealed(Settings(**settings), line["step"] - 1)
            groups.append({"step": line["step"]} | page_group(rollouts, tokenizer, then))
    if not groups:
        raise InputError(f"{path}: the run kept no rollouts yet: it does when it evaluates")
    run = {key: list(curves[name].dropna().items()) for key, name in CURVES.items()}
    run |= {key: settings[key] for key in ("method", "seed", "alpha", "prefix_loss")}
    run |= {"groups": groups, "dataset": os.path.relpath(str(settings["dataset"] or "?"))}
    trapo.write_whole(page, PAGE.replace("RUN", json.dumps(run).replace("<", "\\u003c"), 1))
    print(f"open {page} in a browser")

# ==== Part 6. Speed and memory of trapo.py's own training steps, on random prompts and experts and
# with a coin for a reward. No response ends before its limit, so that the work is known.
SHAPES = {  # width, MLP, layers, heads, key-value heads, vocabulary, tied embeddings
    "random:Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "random:Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "random:Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False)}

def speed_model(name: str | None, device: str) -> torch.nn.Module:
    """The embedded experiment's model, one of SHAPES with random weights, or a saved one."""
    if name in SHAPES:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings")
        with torch.device(device):
            policy = transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**dict(zip(keys, SHAPES[name]))))
    else:
        policy, _ = load_policy(name or str(trapo.EMBEDDED))
    policy.generation_config.eos_token_id = None
    return policy.to(device)

def spread(values: pandas.Series) -> str:
    """"median (least to most)": a range, not an interval."""
    return f"{values.median():.3g} ({values.min():.3g} to {values.max():.3g})"

def sampling_rates(sampler: torch.nn.Module, requests: list[Tokens], settings: Settings,
                   repeat: int) -> dict[str, str]:
    """Thousand tokens a second of `sample`, and of model.generate beside it."""
    rows, new, rates = len(requests), settings.max_response, {}

    def generate() -> None:  # transformers' own loop, told to sample from the exact policy
        ids = torch.tensor(requests, device=sampler.device)
        sampler.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, repetition_penalty=1.0, pad_token_id=0).tolist()

    ours = functools.partial(sample, sampler, requests, [new] * rows, kv_tokens=settings.kv_tokens)
    for name, work in (("sample", ours), ("model.generate", generate)):
        seconds = []
        for _ in range(repeat + 1):  # the first warms up
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        rates[f"{name}, {rows} rows"] = spread(rows * new / pandas.Series(seconds[1:]) / 1000)
    return rates

def speed(args: Namespace) -> None:
    """`eval.py speed`: the sampler, and whole steps of two methods, at several batch sizes.

    Model FLOPs of an update: 6 a weight and token, of a prompt once, the head's only for response
    tokens; no attention, nothing that is computed twice. MFU: their rate over a matrix product's.
    """
    flags = args.rest + (["--model", args.model] if args.model else [])
    settings = trapo.parse_args([*flags, f"--prompts={min(args.prompts)}"])
    rng, prompt = numpy.random.default_rng(0), 64
    device, new, rates, rows = settings.device, settings.max_response, {}, {}
    policy = speed_model(args.model, device)
    trapo.check_context(policy, prompt + new)
    sampler, optimizer = make_sampler(policy, settings), torch.optim.AdamW(policy.parameters())
    if settings.recompute:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    head = policy.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.base_model.parameters()) - head  # embedding: a look-up
    n = 8192 if device == "cuda" else 1024
    square = torch.randn(n, n, device=device).to(torch.bfloat16 if settings.bf16 else torch.float32)
    peak = 2 * n**3 / Timer("x @ x", globals={"x": square}).blocked_autorange().median
    for prompts in args.prompts:
        ids = rng.integers(1, policy.config.vocab_size, size=(8 * prompts, prompt + new)).tolist()
        task = trapo.Task([Problem(row[:prompt], [row[prompt:]], "") for row in ids[:prompts]], [],
                          lambda problem, response: float(rng.random() < 0.4))
        for method in ("grpo", "trapo"):
            settings = trapo.parse_args(flags + f"--prompts={prompts} --method={method}".split())
            steps = pandas.DataFrame(
                trapo.train_step(policy.train(), sampler, optimizer, task, settings, i)[0]
                for i in tqdm(range(args.repeat + 1), method, leave=False)).loc[1:]  # 0: warm-up
            rollouts, tokens = prompts * sum(settings.sizes), steps.tokens_trained
            read = tokens + prompt * (rollouts - steps.rollouts_skipped) / sum(settings.sizes)
            rows[f"{method}, {rollouts} rollouts"] = pandas.DataFrame({
                "sampled, k tokens/s": steps.tokens_generated / steps.seconds_sample / 1000,
                "trained, k tokens/s": tokens / steps.seconds_update / 1000,
                "MFU, %": 600 * (body * read + head * tokens) / steps.seconds_update / peak,
                "GPU's peak so far, GiB": steps.peak_memory_gib,
                "step, s": steps.filter(like="seconds_").sum(axis=1)}).apply(spread)
        rates |= sampling_rates(sampler, [row[:prompt] for row in ids], settings, args.repeat)
    print(pandas.Series(rates, name="k tokens/s").to_frame().to_string() + "\n")
    print(pandas.DataFrame(rows).T.to_string() + "\n")
    print(f"median (least to most) of {args.repeat} repetitions; prompts of {prompt}, responses of "
          f"{new} tokens; matrix product: {peak:.3g} FLOP/s")

# ==== Part 7. The command line.
def count(text: str) -> int:
    """A number from 1 to 100 000: argparse reports a ValueError as one of the flag."""
    if not 1 <= int(text) <= 100_000:
        raise ValueError
    return int(text)

def main(argv: list[str] | None = None) -> None:
    """Run a subcommand. Input that cannot be used: one line, exit code 2."""
    parser = Parser(description="Benchmarks, training runs compared, and speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("model", help="accuracy of a model").add_argument
    add("model", help="a run's folder or checkpoint, another local model, a Hub id")
    add("--on", nargs="+", default=[], help=f"any of {', '.join(BENCHMARKS)}, or files")
    add("--samples", type=count, help="samples a problem; default: AIME and AMC 32, others 1")
    add("--temperature", type=float, default=0.6, help="of sampling, 0.6; 0 is greedy")
    add("--max-tokens", type=count, help="of a response; default: the run's, or 8192 if they fit")
    add("--limit", type=count, help="only the first so many problems of each benchmark")
    add("--seed", type=int, default=0, help="of sampling, 0")
    add("--chunk", type=count, default=256, help="responses sampled, then saved, at a time, 256")
    add("--out", help="folder of the results; default: <model>/eval")
    add("--device", choices=trapo.CHOICES["device"], default=Settings().device,
        help="where to compute; default: cuda if there is one")
    add("--rescore", action="store_true", help="grade the saved samples again, generate nothing")
    add = commands.add_parser("runs", help="training runs compared").add_argument
    add("folders", nargs="+", help="folders of training runs")
    add("--against", help="also the differences to this method, paired by seed")
    add("--plot", help="draw learning curves into this file")
    add("--markdown", action="store_true", help="tables in markdown")
    commands.add_parser("look", help="a run's rollouts, as a page").add_argument("folder")
    add = commands.add_parser("speed", help="speed; takes trapo.py's flags too").add_argument
    add("--model", help=f"{', '.join(SHAPES)}; or as trapo.py's --model")
    add("--prompts", type=count, nargs="+", default=[1, 4, 16], help="of a step, 8 rollouts each")
    add("--repeat", type=count, default=5, help="steps measured, after one to warm up; 5")
    with trapo.one_line_errors():  # an evaluation that was cut short goes on by the same command
        args, args.rest = parser.parse_known_args(argv)
        if args.rest and args.command != "speed":
            raise InputError(f"{args.command} knows no {' '.join(args.rest)}")
        {"model": evaluate, "runs": compare, "look": look, "speed": speed}[args.command](args)

if __name__ == "__main__":
    main()
