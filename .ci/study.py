"""The study behind .github/results.md: its runs, and its tables and figures.

    python .ci/study.py run main --processes 2     goes on where it stopped; each run on one core
    python .ci/study.py show                       tables and figures, from study.jsonl alone
    python .ci/study.py starts                     how likely the bases are to work when asked

Runs leave their folders in runs/study, and a line each in .github/study.jsonl: what was asked, the
commit, and what it came to.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import torch

import trapo
from eval import COLOURS, NAMES, t_quantile

FOLDER, SUMMARY = HERE / "runs" / "study", HERE / ".github" / "study.jsonl"
METHODS = ("trapo", "grpo", "luffy", "micro", "micro-luffy", "fixed-prefix", "naive", "sft")
GRID = (1e-4, 2e-4, 4e-4, 1e-3)
STEPS = 160
HALF = 0.5  # of the unguided reward: the bar that a run is to pass

WRITING, LOCKS = threading.Lock(), defaultdict(threading.Lock)

# ==== The runs: a run is a dictionary of trapo.py's flags; "after" holds those of the run before it.
def sft_then_grpo(steps: int, **flags: object) -> dict:
    """`steps` of SFT, then as many of GRPO."""
    flags["steps"] = steps
    return {"method": "grpo", **flags, "after": {"method": "sft", **flags}}

def grid() -> Iterator[dict]:
    """The learning rates, for each method, on seeds that the comparison does not use."""
    for seed, lr in itertools.product((1, 2, 3), GRID):
        for method in METHODS:
            yield {"method": method, "lr": lr, "seed": seed, "steps": STEPS}
        yield sft_then_grpo(STEPS // 2, lr=lr, seed=seed)

def best_rate(method: str, after: bool = False) -> float:
    """The learning rate whose final held-out accuracy in range, sampled, is the best of the grid."""
    found = [line for line in read("grid") if line["flags"]["method"] == method
             and ("after" in line["flags"]) == after]
    scores = {lr: [line["accuracy"][0] for line in found if line["flags"]["lr"] == lr]
              for lr in GRID}
    if not all(len(values) == 3 for values in scores.values()):
        sys.exit(f"the grid of {method} is not finished: python .ci/study.py run grid")
    return max(GRID, key=lambda lr: sum(scores[lr]))

def main_comparison(rate: Callable[..., float] = best_rate) -> Iterator[dict]:
    """Nine methods at equal steps, and SFT, then GRPO at twice; seeds that chose nothing."""
    for seed in range(11, 19):
        for method in METHODS:
            yield {"method": method, "lr": rate(method), "seed": seed, "steps": STEPS}
        for steps in (STEPS // 2, STEPS):
            yield sft_then_grpo(steps, lr=rate("grpo", after=True), seed=seed)

def at_one_rate() -> Iterator[dict]:
    """The main comparison with all methods at the default learning rate, before any grid."""
    return main_comparison(lambda method, after=False: 4e-4)

def share_map() -> Iterator[dict]:
    """How often the base works on a question by itself, against what guidance is worth."""
    for seed, share in itertools.product(range(11, 15), (0, 0.0005, 0.001, 0.002, 0.005, 0.02)):
        for method in ("grpo", "micro", "luffy", "trapo"):
            yield {"method": method, "lr": best_rate(method), "seed": seed, "steps": STEPS,
                   "base-worked": share}

def alphas() -> Iterator[dict]:
    """The edge of the trust region, from SFT (0) to 1 - p (1)."""
    for seed, alpha in itertools.product(range(11, 15), (0, 0.01, 0.03, 0.1, 0.3, 1)):
        yield {"method": "trapo", "lr": best_rate("trapo"), "seed": seed, "steps": STEPS,
               "alpha": alpha}

PARTS = {"one-rate": at_one_rate, "grid": grid, "main": main_comparison, "map": share_map,
         "alpha": alphas}

def folder_of(flags: dict) -> Path:
    """A run's folder, by what it was asked."""
    words = [f"{key}{value}" for key, value in flags.items() if key != "after"]
    return FOLDER / ("-".join(words).replace("method", "") + "-after-sft" * ("after" in flags))

def run(part: str, flags: dict) -> None:
    """Train one run, and the one before it, unless that was done; add its line to the summary."""
    commit = version()
    stages = [flags["after"], flags] if "after" in flags else [flags]
    for stage in stages:
        train(stage)
    line = {"part": part, "flags": flags, "commit": commit, **summary(stages)}
    with WRITING, SUMMARY.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(folder_of(flags).name, line["accuracy"][0], flush=True)

def version() -> str:
    """The commit of trapo.py, with a + if the file has been changed since."""
    def git(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
    commit = git("log", "-1", "--format=%h", "--", "trapo.py").stdout.strip()
    return commit + "+" * git("diff", "--quiet", "HEAD", "--", "trapo.py").returncode

def train(flags: dict) -> None:
    """trapo.py with these flags, on one core, its output beside the folder; unless that was done:
    a run of SFT may be wanted for itself and as a first stage."""
    out = folder_of(flags)
    with WRITING:
        lock = LOCKS[out]
    with lock:
        if not (out / "model.safetensors").exists():
            train_in(out, flags)

def train_in(out: Path, flags: dict) -> None:
    """The command itself."""
    command = [sys.executable, "trapo.py", "--out", out, "--save-every", 1000, "--eval-every", 40]
    command += ["--resume"] if (out / "settings.json").exists() else []
    for key, value in flags.items():
        command += [f"--{key}", value] if key != "after" else []
    command += ["--model", folder_of(flags["after"])] if "after" in flags else []
    with (FOLDER / f"{out.name}.log").open("a") as log:
        subprocess.run(list(map(str, command)), cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                       stdout=log, stderr=log, check=True)

def summary(stages: list[dict]) -> dict:
    """What a run came to: held-out accuracies before and after, the way there, and the costs, of
    SFT, then GRPO over both stages; the unguided reward is known in the last stage alone."""
    lines = [json.loads(line) for flags in stages
             for line in (folder_of(flags) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"]]
    evals = [line["eval"] for line in lines if line.get("eval")]
    rewards = [line["reward_unguided"] for line in steps]
    first = sum(reward is None for reward in rewards)  # steps of SFT, which has no such rollouts
    means = [sum(rewards[i - 5:i]) / 5 for i in range(first + 5, len(steps) + 1)]
    half = next((i for i, mean in enumerate(means, first + 5) if mean >= HALF), None)
    tokens = list(itertools.accumulate(line["tokens_generated"] for line in steps))
    return {
        "before": [round(x, 3) for x in evals[0].values()],
        "accuracy": [round(x, 3) for x in evals[-1].values()],
        "half": half, "tokens_to_half": tokens[half - 1] if half else None,
        "tokens": tokens[-1], "trained": sum(line["tokens_trained"] for line in steps),
        "seconds": round(sum(value for line in steps for key, value in line.items()
                             if key.startswith("seconds_"))),
        "early": None if first else round(sum(rewards[:80]) / 80, 3),
        # Means of ten or twenty steps, in percent: a curve in few characters.
        "first": first, "reward": in_percent(rewards[first:], 10),
        **{key: in_percent([line[key] for line in steps[first:]], 20)
           for key in ("guided", "prefix_outside_share", "entropy")}}

def in_percent(values: list[float | None], size: int) -> list[int | None]:
    """Means of so many values, of those that there are."""
    blocks = [[x for x in values[i:i + size] if x is not None] for i in range(0, len(values), size)]
    return [round(100 * sum(block) / len(block)) if block else None for block in blocks]

def read(part: str) -> list[dict]:
    """The lines of a part."""
    lines = SUMMARY.read_text().splitlines() if SUMMARY.exists() else []
    return [line for line in map(json.loads, lines) if line["part"] == part]

# ==== What it says: tables in markdown, and figures, from the lines alone.
SETS = ("in range", "in range, greedy", "longer", "longer, greedy", "textbook", "textbook, greedy",
        "direct", "direct, greedy")  # the order of the accuracies

def name_of(flags: dict) -> str:
    """A method as people say it; SFT, then GRPO with the steps of both."""
    if "after" in flags:
        return f"SFT, then GRPO ({flags['steps']} + {flags['steps']})"
    return NAMES[flags["method"]]

def frame(part: str) -> pandas.DataFrame:
    """A part's runs, one a row: flags, accuracies by name, and the rest of the lines."""
    rows = [{"method": name_of(line["flags"]), "seed": line["flags"]["seed"],
             "lr": line["flags"]["lr"], **dict(zip(SETS, line["accuracy"])),
             "base, in range": line["before"][0], **line} for line in read(part)]
    return pandas.DataFrame(rows)

def table(found: pandas.DataFrame) -> str:
    """Markdown, with the index as first column."""
    rows = [["", *found.columns], ["---", *["---:"] * found.shape[1]],
            *found.reset_index().astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)

def interval(values: pandas.Series, digits: int = 2, scale: float = 1) -> str:
    """Mean and half of Student's 95 % interval, with the digits that it deserves."""
    values = values.dropna() * scale
    if len(values) < 2:
        return "-"
    half = t_quantile(len(values) - 1) * values.sem()
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"

def until(group: pandas.DataFrame, column: str, scale: float = 1) -> str:
    """Median (least to most) over the seeds of what came, or had not come by the end; of an even
    number the upper of the middle two."""
    if not group.reward.map(bool).any():
        return "-"  # SFT alone: no rollout of its own
    values = sorted((group[column] * scale).astype(float).fillna(math.inf))
    said = ["never" if math.isinf(x) else f"{x:.0f}" for x in values]
    return f"{said[len(said) // 2]} ({said[0]} to {said[-1]})"

def show_grid() -> None:
    """Accuracy in range at the end, by learning rate; the best is chosen."""
    found = frame("grid")
    if len(found):
        means = found.pivot_table(index="method", columns="lr", values="in range", sort=False)
        counts = found.pivot_table(index="method", columns="lr", values="in range", sort=False,
                                   aggfunc="count")
        print("\n## Learning rates (mean of seeds 1 to 3; number of runs where not 3)\n")
        texts = means.round(3).astype(str) + counts.map(lambda n: "" if n == 3 else f" (n={n:.0f})")
        print(table(texts))

def show_main(part: str) -> None:
    """Nine methods: what they reach, how soon, and at what cost; and differences by seed."""
    found = frame(part)
    if not len(found):
        return
    groups = found.groupby("method", sort=False)
    print(f"\n## Comparison ({part}): {STEPS} steps, {found.seed.nunique()} seeds\n")
    print(table(pandas.DataFrame({
        **{name: groups[name].agg(interval) for name in SETS},
        f"steps until {HALF}": groups.apply(until, "half"),
        "tokens until then, k": groups.apply(until, "tokens_to_half", 1e-3),
        "unguided reward, steps 1 to 80": groups.early.agg(interval),
        "generated, k": groups.tokens.agg(interval, digits=0, scale=1e-3),
        "trained, k": groups.trained.agg(interval, digits=0, scale=1e-3),
        "seconds": groups.seconds.agg(interval, digits=0),
        "runs": groups.size()}).T))
    print("\nTRAPO less the other, paired by seed:\n")
    by_seed = {name: found.pivot_table(index="seed", columns="method", values=name, sort=False)
               for name in ("in range", "longer", "early")}
    differences = {name: [interval(wide["TRAPO"] - wide[other]) if other in wide else "-"
                          for other in by_seed["in range"] if other != "TRAPO"]
                   for name, wide in by_seed.items()}
    others = [other for other in by_seed["in range"] if other != "TRAPO"]
    print(table(pandas.DataFrame(differences, index=others)))
    draw_dots(found)
    draw_curves(found)

def show_starts() -> None:
    """How likely each base in runs/study is to begin working, not to blurt "#", when asked."""
    for folder in sorted(FOLDER.glob("clock-base-*")):
        policy, tokenizer = trapo.load_policy(str(folder))
        settings = trapo.fill_in({"dataset": "clock",
                                  "seed": trapo.read_settings(str(folder))["seed"]})
        questions = next(iter(trapo.clock_task(tokenizer, settings).heldout.values()))
        words = tokenizer.convert_tokens_to_ids([*trapo.LETTERS, *trapo.FILLERS])
        with torch.no_grad():
            chances = [policy(torch.tensor([q.prompt_ids])).logits[0, -1].softmax(-1)[words].sum()
                       for q in questions]
        print(f"{folder.name}: {torch.stack(chances).mean():.5f}")

def colour_of(method: str) -> str:
    """One colour a method everywhere."""
    return COLOURS.get(method.partition(" (")[0], "#999999")

def new_figure(width: float, height: float):
    """An empty figure, to be saved beside this study's pages."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")

def save(figure, name: str) -> None:
    """Into .github."""
    figure.savefig(HERE / ".github" / f"{name}.png", dpi=160)

def draw_dots(found: pandas.DataFrame) -> None:
    """The main result: a dot a seed, methods in rows."""
    methods = found.groupby("method")["in range"].median().sort_values().index
    figure = new_figure(8, 3.6)
    panels = {"in range": "accuracy at the end", "early": "mean reward alone, steps 1 to 80"}
    for i, (column, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 2, i + 1, title=title, xlim=(-0.03, 1.03))
        for row, method in enumerate(methods):
            values = found[found.method == method][column].dropna()
            axis.plot(values, [row] * len(values), "o", c=colour_of(method), alpha=0.7, mec="black",
                      mew=0.5)
            axis.plot([values.median()] * 2, [row - 0.3, row + 0.3], c="black", lw=1.5)
        axis.set_yticks(range(len(methods)), methods if i == 0 else [""] * len(methods))
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("a dot: one seed; bar: median", fontsize=10)
    save(figure, "main")

def draw_curves(found: pandas.DataFrame) -> None:
    """Unguided reward over the steps: thin lines are seeds, the thick one is their median."""
    figure = new_figure(8, 4)
    axis = figure.add_subplot(xlabel="training step", ylabel="unguided reward", ylim=(0, 1))
    for method, runs in found.groupby("method", sort=False):
        curves = pandas.DataFrame([reward for reward in runs.reward if reward]) / 100
        steps = [runs["first"].iloc[0] + 10 * i + 5 for i in range(curves.shape[1])]
        if curves.empty:
            continue
        axis.plot(steps, curves.T, c=colour_of(method), lw=0.5, alpha=0.4)
        axis.plot(steps, curves.median(), "--" if "160" in method else "-", c=colour_of(method),
                  lw=2.2, label=method)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, "curves")

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run").add_argument
    add("part", choices=PARTS)
    add("--processes", type=int, default=1)
    commands.add_parser("show")
    commands.add_parser("starts")
    args = parser.parse_args()
    if args.command == "starts":
        return show_starts()
    if args.command == "show":
        show_grid()
        return show_main("main" if read("main") else "one-rate")
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = [line["flags"] for line in read(args.part)]
    wanted = [flags for flags in PARTS[args.part]() if flags not in done]
    print(f"{args.part}: {len(done)} runs are done, {len(wanted)} to go", flush=True)
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(lambda flags: run(args.part, flags), wanted))

if __name__ == "__main__":
    main()
