"""The study behind .github/results.md: its runs, and its tables and figures.

    python .ci/study.py run --processes 2     all of it, or one part; goes on where it stopped
    python .ci/study.py show                  results.md's tables, and the figures, from its lines

A run takes one core for up to a minute. It leaves its folder in runs/study, beside its world's (by
.ci/clock.py), and a line in .github/study.jsonl: what was asked, the commit, what it came to.
"""
import argparse, contextlib, fcntl, functools, itertools, json  # noqa: E401
import math, os, random, re, shutil, subprocess, sys  # noqa: E401
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas
import torch
import transformers

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / ".ci")]

import clock
import legs
import trapo
from eval import COLOURS, NAMES, pass_at_k, t_quantile

FOLDER, SUMMARY = HERE / "runs" / "study", HERE / ".github" / "study.jsonl"
METHODS = ("trapo", "grpo", "luffy", "micro", "micro-luffy", "fixed-prefix", "naive", "sft")
GRID = (1e-4, 2e-4, USUAL := 4e-4, FAST := 1e-3)  # trapo.py's own, and the fastest
STEPS = 160
HALF = 0.5  # of the unguided reward: the bar that a run is to pass
NEVER = 180  # where figures put what did not come in time
MANY, FEW = range(11, 19), range(11, 15)  # seeds
SHARES = (0, 0.0005, 0.001, 0.002, 0.005, 0.02)
ALPHAS = (0, 0.01, 0.03, 0.1, 0.3, 1)
SAMPLES, REACHES = 64, (1, 2, 4, 8, 16, 32, 64)  # pass@k of 128 problems
OURS = ("after", "base-worked", "expert", "legs", "again", "random")  # flags that are not trapo.py's

# ==== What is asked: dictionaries of trapo.py's flags. "base-worked" is clock.py's --worked,
# "expert" another teacher, "after" holds the flags of the run before, and "legs" says that it is
# SmolLM2's run on .ci/legs.py's rows, not one on the clock. What has "measure" trains
# nothing: it measures a model of run "of".
def flags_of(method: str, seed: int, **others: object) -> dict:
    """A run's flags, without those that are the default: one run has one name."""
    usual = {"alpha": 0.1, "base-worked": 0, "expert": "usual"}
    flags = {"method": method, "lr": others.pop("lr", None) or best_rate(method), "seed": seed,
             "steps": STEPS, **others}
    return {key: value for key, value in flags.items() if usual.get(key) != value}

def compared(seed: int, lr: float | None = None, stages=(STEPS // 2, STEPS)) -> Iterator[dict]:
    """All methods, each at its best rate or at `lr`; SFT, then GRPO with so many steps each."""
    for method in METHODS:
        yield flags_of(method, seed, lr=lr)
    for steps in stages:
        flags = flags_of("grpo", seed, lr=lr or best_rate("grpo", after=True), steps=steps)
        yield {**flags, "after": {**flags, "method": "sft"}}

def grid() -> Iterator[dict]:
    """The learning rates, for each method, on seeds that the comparison does not use."""
    for seed, lr in itertools.product((1, 2, 3), GRID):
        yield from compared(seed, lr, (STEPS // 2,))

@functools.cache
def best_rate(method: str, after: bool = False) -> float:
    """The learning rate whose final accuracy in range, sampled, is the best of the grid."""
    found = [line for line in read("grid") if line["flags"]["method"] == method
             and ("after" in line["flags"]) == after]
    return best_of(method, found, GRID)

def best_of(name: str, found: list[dict], grid: tuple[float, ...]) -> float:
    """The best rate of a grid, from its lines."""
    scores = {lr: [line["accuracy"][0] for line in found if line["flags"]["lr"] == lr]
              for lr in grid}
    if not all(len(values) == 3 for values in scores.values()):
        sys.exit(f"the grid of {name} is not finished: python .ci/study.py run grid 'field grid'")
    return max(grid, key=lambda lr: sum(scores[lr]))

def main_comparison() -> Iterator[dict]:
    """Nine methods at equal steps, and SFT, then GRPO at twice; seeds that chose nothing."""
    for seed in MANY:
        yield from compared(seed)

def at_one_rate() -> Iterator[dict]:
    """The comparison with all methods at one rate, and at another: speed depends on the rate."""
    for lr, seed in itertools.product((USUAL, FAST), MANY):
        yield from compared(seed, lr)

def share_map() -> Iterator[dict]:
    """How often the base works on a question by itself, against what guidance is worth."""
    for seed, share in itertools.product(FEW, SHARES):
        for method in ("grpo", "micro", "luffy", "trapo"):
            yield flags_of(method, seed, lr=USUAL, **{"base-worked": share})

def alphas() -> Iterator[dict]:
    """The edge of the trust region, from SFT (0) to 1 - p (1)."""
    for seed, alpha in itertools.product(FEW, ALPHAS):
        yield flags_of("trapo", seed, lr=USUAL, alpha=alpha)

def experts() -> Iterator[dict]:
    """Other teachers of the same questions."""
    for seed, expert in itertools.product(FEW, EXPERTS):
        for method in ("trapo", "luffy", "naive", "sft"):
            yield flags_of(method, seed, lr=USUAL, expert=expert)

def trsft_alone() -> Iterator[dict]:
    """What TrSFT does by itself: SFT's runs with the other loss, no rollout, no reward."""
    for seed in MANY:
        yield flags_of("sft", seed, lr=USUAL, **{"prefix-loss": "trsft"})

def starts() -> Iterator[dict]:
    """How likely each base of the map is to begin working, not to blurt, when asked."""
    for seed, share in [*itertools.product(MANY, [0]), *itertools.product(FEW, SHARES[1:])]:
        flags = flags_of("trapo", seed, lr=USUAL, **{"base-worked": share})
        yield {"measure": "start", "of": flags}

def reaches() -> Iterator[dict]:
    """pass@k of the base and of what four methods make of it."""
    for seed in MANY:
        yield {"measure": "reach of its base", "of": flags_of("trapo", seed)}
        for method in ("grpo", "sft", "trapo"):
            yield {"measure": "reach", "of": flags_of(method, seed)}
    for flags in trsft_alone():
        yield {"measure": "reach", "of": flags}

# The field: rival methods, and rival losses on TRAPO's schedule. UFT anneals over 300 of 500 steps.
RIVALS = {"UFT": {"method": "uft", "anneal": 96}, "POPE": {"method": "pope"},
          "HPT": {"method": "hpt"}, "CHORD-phi": {"method": "trapo", "prefix-loss": "chord-phi"},
          "ProFit": {"method": "trapo", "prefix-loss": "profit"}}

def rivals(seed: int, lr: float | None = None) -> Iterator[dict]:
    """Rivals at their best rates or at `lr`; and GRPO and TRAPO after SFT at its own best rate: 80
    steps of 16 solutions and 150 of 128 rollouts make 160 of 128 in all."""
    for name, flags in RIVALS.items():
        yield flags_of(**flags, seed=seed, lr=lr or rival_rate(name))
    for method in ("grpo", "trapo"):
        name = f"SFT, then {NAMES[method]} (80 + 150)"
        yield {**flags_of(method, seed, lr=lr or rival_rate(name), steps=150),
               "after": flags_of("sft", seed, steps=80)}

def field_grid() -> Iterator[dict]:
    """Their learning rates, on the grid's seeds: the two that were best for all with rollouts, but
    the naive mix. TRAPO again, as bases of one seed differ between machines."""
    for seed, lr in itertools.product((1, 2, 3), GRID[2:]):
        yield from rivals(seed, lr)
    for seed, lr in itertools.product((1, 2, 3), GRID[2:]):
        yield flags_of("trapo", seed, lr=lr, again=1)

@functools.cache
def rival_rate(name: str) -> float:
    """Their best learning rate, as best_rate."""
    return best_of(name, [line for line in read("field grid") if name_of(line["flags"]) == name],
                   GRID[2:])

def field() -> Iterator[dict]:
    """TRAPO and its rivals at equal solutions and rollouts, on fresh seeds."""
    for seed in range(21, 29):
        yield flags_of("trapo", seed)
        yield flags_of("luffy", seed)
        yield from rivals(seed)

# The pretrained model: 1280 rollouts or solutions a run, but for SFT on as many problems as TRAPO
# has prompts. Rates by held-out accuracy on seed 100.
LEGS_RATES = {"trapo": 3e-5, "grpo": 3e-5, "sft": 1e-4}

def on_legs(method: str, seed: int, lr: float | None = None, **others: object) -> dict:
    """A run's flags."""
    lr = lr or LEGS_RATES.get(method, LEGS_RATES["trapo"])
    return {"legs": 1, "method": method, "lr": lr, "seed": seed, **others}

def legs_methods(seed: int, methods: tuple[str, ...]) -> Iterator[dict]:
    """One seed's runs."""
    for method in methods:
        yield on_legs(method, seed)
    if "sft" in methods:
        yield on_legs("sft", seed, prompts=32)
        yield {**on_legs("grpo", seed, steps=30),
               "after": on_legs("sft", seed, prompts=16, steps=20)}

def legs_comparison() -> Iterator[dict]:
    """The base, TRAPO, its baselines, and rivals, three seeds; and SFT of random weights."""
    for seed in (1, 2, 3):
        yield {"measure": "legs of its base", "of": on_legs("trapo", seed)}
        yield from legs_methods(seed, ("trapo", "grpo", "sft"))
    for seed in (1, 2, 3):
        yield from legs_methods(seed, ("luffy", "micro", "pope", "hpt"))
    for lr in (LEGS_RATES["sft"], 1e-3):  # does it need what the model was trained on before?
        yield on_legs("sft", 1, lr, prompts=32, random=1)

PARTS = {"grid": grid, "main": main_comparison, "map": share_map, "alpha": alphas,
         "expert": experts, "trsft": trsft_alone, "starts": starts, "reach": reaches,
         "rates": at_one_rate, "field grid": field_grid, "field": field,
         "legs": legs_comparison}

# ==== Other teachers, who solve the same questions: the chances of an aside, and of a wrong line
# that is corrected, before each line; and that one is not corrected, so that the answer is wrong.
EXPERTS = {"usual": (0.3, 0.1, 0), "clean": (0, 0, 0), "noisy": (0.6, 0.2, 0),
           "wrong": (0.3, 0.1, 0.2)}

def solve(problem: str, expert: str) -> str:
    """This expert's solution of a problem such as `j 8 k -9 l +8 ?`."""
    words, (filler, slip, wrong) = problem.split(), EXPERTS[expert]
    rng, lines, hour = random.Random(f"{words}"), [], int(words[1])
    steps = list(zip(words[2:-1:2], words[3:-1:2]))
    fault = rng.randrange(len(steps)) if rng.random() < wrong else None
    for i, (name, change) in enumerate(steps):
        hour = (hour + int(change) + (rng.randint(1, 23) if i == fault else 0)) % 24
        if rng.random() < filler:
            lines.append(rng.choice(clock.FILLERS))
        if rng.random() < slip:
            lines += [name, change, str((hour + rng.randint(1, 23)) % 24), "oops"]
        lines += [name, change, str(hour)]
    return " ".join([*lines, "#", str(hour)])

# ==== The work: worlds, runs, and what they came to.
def key_of(flags: dict) -> tuple:
    """What makes a world: the seed, and the share of worked quiz questions."""
    return flags["seed"], flags.get("base-worked", 0)

def folder_of(flags: dict) -> Path:
    """A run's folder, by what it was asked."""
    words = [f"{key}{value}" for key, value in flags.items() if key != "after"]
    return FOLDER / ("-".join(words).replace("method", "") + "-after-sft" * ("after" in flags))

@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with a folder that is to be made: several runs may want one world, or one of SFT."""
    with open(f"{folder}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

def call(folder: Path, program: list, flags: dict) -> None:
    """A program of this repository, on one core, its output in the folder's log."""
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value)]
    with open(f"{folder}.log", "a") as log:
        subprocess.run([sys.executable, *map(str, program + words)], cwd=HERE, stdout=log,
                       stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

def world_of(flags: dict) -> Path:
    """The folder of a run's problems and base, made now unless it was."""
    seed, worked = key_of(flags)
    world, asked = FOLDER / f"clock-seed{seed}-worked{worked}", {"seed": seed, "worked": worked}
    if "legs" in flags:
        world, asked = FOLDER / f"legs-seed{seed}", {"seed": seed}
    with locked(world):
        if not (world / "defaults.json").exists():
            call(world, [f".ci/{world.name.split('-')[0]}.py", world], asked)
    return world

def with_random_weights(model: Path) -> Path:
    """A model of the same shape, made now unless it was."""
    folder = model.with_name("random")
    if not folder.exists():
        config = transformers.AutoConfig.from_pretrained(model)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder

def model_of(flags: dict) -> Path:
    """The model that a run made, after the run before it; trained now unless it was."""
    world, out = world_of(flags), folder_of(flags)
    start = model_of(flags["after"]) if "after" in flags else world / "model"
    rows = world / "train.jsonl"
    if "random" in flags:
        start = with_random_weights(start)
    if "expert" in flags:
        rows = Path(f"{out}.jsonl")
        clock.write_rows(rows, [{**row, "solution": solve(row["problem"], flags["expert"])}
                                for row in clock.make_rows("train", flags["seed"])])
    with locked(out):
        if not (out / "model").exists():
            shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
            usual = (legs if "legs" in flags else clock).DEFAULTS | {"eval_every": 40}
            call(out, ["trapo.py"] + ["--bf16"] * ("legs" in flags), usual | {
                "model": start, "dataset": rows, "test": world / "test.jsonl", "out": out,
                "save_every": 1000,
                **{key: value for key, value in flags.items() if key not in OURS}})
            for checkpoint in trapo.checkpoints(out):  # 1.6 GB each of SmolLM2
                shutil.rmtree(checkpoint)
    return out / "model"

def run(flags: dict) -> bool:
    """Train one run, or measure, and add a line; False, and the others go on, if it fails."""
    try:
        line = result_of(flags)
    except (subprocess.CalledProcessError, trapo.InputError) as error:
        print(f"failed: {flags}: {error}; see its .log in {FOLDER}", flush=True)
        return False
    text = json.dumps({"flags": flags, "commit": version(), **line}, separators=(",", ":"))
    with SUMMARY.open("a") as file:
        file.write(text + "\n")
    print(text[:150], flush=True)
    return True

def result_of(flags: dict) -> dict:
    """What a run came to; or a measure of its model, or of its base."""
    what, asked = flags.get("measure"), flags.get("of", flags)
    of_base = what in ("start", "reach of its base", "legs of its base")
    model = world_of(asked) / "model" if of_base else model_of(asked)
    policy, tokenizer = trapo.load_policy(str(model))
    if what == "start":
        return {"start": round(chance_to_start(policy, tokenizer, asked["seed"]), 6),
                "before": accuracies(policy, tokenizer, asked["seed"])}
    stages = [asked["after"], asked] if "after" in asked else [asked]
    if "legs" in asked:
        return {"accuracy": counts_of_legs(policy, tokenizer, asked["seed"]),
                "of base's answers": of_bases_answers(policy, tokenizer, world_of(asked)),
                **({} if what else summary(stages))}
    if what:
        return reach(policy, tokenizer, asked["seed"])
    return {"accuracy": accuracies(policy, tokenizer, asked["seed"]), **summary(stages)}

def version() -> str:
    """The commit of trapo.py, with a + if the file has been changed since."""
    git = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    commit = git("git log -1 --format=%h -- trapo.py".split()).stdout.strip()
    return commit + "+" * git("git diff --quiet HEAD -- trapo.py".split()).returncode

def summary(stages: list[dict]) -> dict:
    """A run's way, and its costs, of SFT, then GRPO over both stages; the unguided reward is known
    in the last stage alone."""
    lines = [json.loads(line) for flags in stages
             for line in (folder_of(flags) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"]]
    rewards = [line["reward_unguided"] for line in steps]
    # After the last step without: SFT has no such rollouts, nor UFT before its shares are near 0.
    first = max((i for i, reward in enumerate(rewards, 1) if reward is None), default=0)
    size = 4 if "legs" in stages[-1] else 10
    means = [sum(rewards[i - 5:i]) / 5 for i in range(first + 5, len(steps) + 1)]
    half = next((i for i, mean in enumerate(means, first + 5) if mean >= HALF), None)
    tokens = list(itertools.accumulate(line["tokens_generated"] for line in steps))
    return {
        "half": half, "tokens_to_half": tokens[half - 1] if half else None,
        "tokens": tokens[-1], "trained": sum(line["tokens_trained"] for line in steps),
        "seconds": round(sum(value for line in steps for key, value in line.items()
                             if key.startswith("seconds_"))),
        "early": None if first else round(sum(rewards[:80]) / len(rewards[:80]), 3),
        # Means of ten or twenty steps (SmolLM2: four, eight), in percent: curves in few characters.
        "first": first, "reward": in_percent(rewards[first:], size),
        **{key: in_percent([line[key] for line in steps[first:]], 2 * size)
           for key in ("guided", "entropy")},
        "outside": in_percent([line["prefix_outside_share"] for line in steps[first:]], 2 * size)}

def in_percent(values: list[float | None], size: int) -> list[int | None]:
    """Means of so many values, of those that there are."""
    blocks = [[x for x in values[i:i + size] if x is not None] for i in range(0, len(values), size)]
    return [round(100 * sum(block) / len(block)) if block else None for block in blocks]

def respond(policy, tokenizer, rows: list[dict], seed: int, temperature: float,
            longest: int = clock.DEFAULTS["max_response"]) -> list[tuple]:
    """To each row a response, and whether it is right; as trapo.py evaluates."""
    requests = [trapo.prompt_tokens(row["problem"], tokenizer) for row in rows]
    numbers = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(rows), longest, dtype=torch.float64, generator=numbers)
    responses, _ = trapo.sample(policy, requests, [longest] * len(rows), temperature,
                                uniforms=uniforms)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [(response, trapo.grade(text, row["answer"])[0] > 0)
            for response, text, row in zip(responses, texts, rows)]

def accuracies(policy: torch.nn.Module, tokenizer, seed: int) -> list[float]:
    """Of the held-out sets, in the order of SETS: sampled and greedy."""
    found = []
    for name, temperature in itertools.product(("test", "longer", "textbook", "direct"), (1, 0)):
        responses = respond(policy, tokenizer, clock.make_rows(name, seed), seed, temperature)
        found.append(round(sum(right for _, right in responses) / len(responses), 3))
    return found

def counts_of_legs(policy: torch.nn.Module, tokenizer, seed: int) -> list[float]:
    """Accuracies on held-out pairs, and on new animals: three samples a question, and greedy."""
    sets, found = legs.make_rows(seed, 1), []
    policy = trapo.make_sampler(policy, trapo.Settings(device="cpu", bf16=True))
    for name, (temperature, times) in itertools.product(("test", "new"), ((1, 3), (0, 1))):
        responses = respond(policy, tokenizer, sets[name] * times, seed, temperature,
                            legs.DEFAULTS["max_response"])
        found.append(round(sum(right for _, right in responses) / len(responses), 3))
    return found

THINGS = """apple bridge candle desert engine forest garden hammer island jacket kettle lemon mirror
    needle ocean pencil queen river saddle teacher umbrella village window yard zoo bakery camera
    doctor elbow farmer guitar hotel insect judge kitchen library market nurse office painter
    quarter road school train uncle violin winter year station bottle""".split()
ASKED = ("What is a {}?", "Write one sentence about a {}.", "Why do people like the word {}?",
         "Tell me something about a {} and a friend.")

@torch.no_grad()
def of_bases_answers(policy: torch.nn.Module, tokenizer, world: Path) -> float:
    """Mean log-prob, in nats, that the policy gives to a token of what the base answers greedily
    (up to 24 tokens) to 200 questions about other things; with the base, the file is made."""
    path = world / "answers.json"
    if not path.exists():
        requests = [tokenizer(trapo.render(tokenizer, [{
            "role": "user", "content": text.format(thing)}], add_generation_prompt=True)).input_ids
            for thing in THINGS for text in ASKED]
        base, _ = trapo.load_policy(str(world / "model"))
        answers, _ = trapo.sample(base, requests, [24] * len(requests), 0.0)
        path.write_text(json.dumps(list(zip(requests, answers))))
    values, pairs = [], json.loads(path.read_text())
    for some in (pairs[i:i + 20] for i in range(0, len(pairs), 20)):
        values += trapo.token_logprobs(policy, [request + answer for request, answer in some],
                                       [len(request) for request, _ in some])[0]
    return round(torch.cat(values).mean().item(), 4)

def reach(policy: torch.nn.Module, tokenizer, seed: int) -> dict:
    """pass@k: of any right response, and of those that do more than blurt."""
    rows = [row for row in clock.make_rows("test", seed)[:128] for _ in range(SAMPLES)]
    responses, found = respond(policy, tokenizer, rows, seed, 1), {}
    for name, shortest in ("pass", 0), ("worked", 4):  # a blurt is `# answer <eos>`
        right = [right and len(response) >= shortest for response, right in responses]
        counts = [sum(right[i:i + SAMPLES]) for i in range(0, len(right), SAMPLES)]
        found[name] = [round(sum(pass_at_k(SAMPLES, c, k) for c in counts) / len(counts), 4)
                       for k in REACHES]
    return found

@torch.no_grad()
def chance_to_start(policy: torch.nn.Module, tokenizer, seed: int) -> float:
    """That the first token is a line's name or an aside, not "#": mean over the questions."""
    words = tokenizer.convert_tokens_to_ids([*clock.LETTERS, *clock.FILLERS])
    asked = tokenizer([row["problem"] for row in clock.make_rows("test", seed)]).input_ids
    chances = [policy(torch.tensor([ids])).logits[0, -1].softmax(-1)[words].sum() for ids in asked]
    return float(sum(chances) / len(chances))

def read(part: str) -> list[dict]:
    """The lines of a part that are there, in its order."""
    lines = SUMMARY.read_text().splitlines() if SUMMARY.exists() else []
    lines = list(map(json.loads, lines))
    return [line for flags in PARTS[part]() for line in lines if line["flags"] == flags]

# ==== What it says: tables in markdown, and figures, from the lines alone.
SETS = ("in range", "in range, greedy", "longer", "longer, greedy", "textbook", "textbook, greedy",
        "direct", "direct, greedy")  # the order of the accuracies

def name_of(flags: dict) -> str:
    """A method as people say it; SFT, then GRPO with the steps of both."""
    if "after" in flags:
        stages = flags["after"], flags
        return (", then ".join(NAMES[stage["method"]] for stage in stages)
                + f" ({' + '.join(str(stage['steps']) for stage in stages)})")
    if "prefix-loss" in flags:
        losses = {"trsft": "TrSFT alone", "chord-phi": "CHORD-phi", "profit": "ProFit"}
        return losses[flags["prefix-loss"]]
    return NAMES[flags["method"]]

def frame(part: str) -> pandas.DataFrame:
    """A part's runs, one a row: flags, accuracies by name, and the rest of the lines."""
    rows = [{"method": name_of(line["flags"]), "alpha": 0.1, "base-worked": 0, "expert": "usual",
             **line["flags"], **dict(zip(SETS, line["accuracy"])), **line} for line in read(part)]
    start = {key_of(line["flags"]["of"]): line["start"] for line in read("starts")}
    return pandas.DataFrame([row | {"method": name_of(row["flags"]),
                                    "start": start.get(key_of(row["flags"])),
                                    "all_steps": row["first"] + len(row["reward"]) * 10}
                             for row in rows])

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
    mean = round(values.mean(), digits) + 0  # not -0
    return f"{mean:.{digits}f} ± {half:.{digits}f}"

def until(group: pandas.DataFrame, column: str = "half", total: str = "all_steps",
          scale: float = 1) -> str:
    """Median (least to most) over the seeds of what came, or is more than the run's total; of an
    even number the upper of the middle two."""
    if not group.reward.map(bool).any():
        return "-"  # SFT alone: no rollout of its own
    pairs = sorted(zip(group[column].fillna(math.inf) * scale, group[total] * scale))
    said = [f"> {most:.0f}" if math.isinf(x) else f"{x:.0f}" for x, most in pairs]
    return f"{said[len(said) // 2]} ({said[0]} to {said[-1]})"

def spread(values: pandas.Series) -> str:
    """Median (least to most), for what is two heaps: seeds that learn, and seeds that do not."""
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"

def grid_tables(part: str = "grid") -> str:
    """Accuracy in range at the end, by learning rate, of which the best is chosen; and speed."""
    cells = {lr: runs.groupby("method", sort=False).apply(
        lambda group: f"{group['in range'].mean():.3f}; {until(group)}")
        for lr, runs in frame(part).groupby("lr", sort=False)}
    return table(pandas.DataFrame(cells))

def main_tables(part: str = "main") -> str:
    """Methods: what they reach, how soon, and at what cost; and differences by seed."""
    found = frame(part)
    groups = found.groupby("method", sort=False)
    columns = {
        "learning rate": groups.lr.first(),
        **{name: groups[name].agg(interval) for name in SETS},
        "seeds with in range > 0.5": groups["in range"].agg(
            lambda values: f"{(values > HALF).sum()} of {len(values)}"),
        f"steps until {HALF}": groups.apply(until),
        "tokens until then, k": groups.apply(until, "tokens_to_half", "tokens", 1e-3),
        "unguided reward, steps 1 to 80": groups.early.agg(interval),
        "generated, k": groups.tokens.agg(interval, digits=0, scale=1e-3),
        "trained, k": groups.trained.agg(interval, digits=0, scale=1e-3),
        "seconds": groups.seconds.agg(interval, digits=0)}
    rows = pandas.DataFrame(columns).T
    if part == "main":
        before = pandas.DataFrame([dict(zip(SETS, line["before"])) for line in read("starts")
                                   if "base-worked" not in line["flags"]["of"]])
        rows.insert(0, "base", [interval(before[name]) if name in before else ""
                                for name in rows.index])
    return f"{table(rows)}\n\nTRAPO less the other, paired by seed:\n\n{table(paired(found))}"

def paired(found: pandas.DataFrame) -> pandas.DataFrame:
    """TRAPO less each other method; and on how many seeds it is the sooner one, or the later."""
    others, columns = [name for name in found.method.unique() if name != "TRAPO"], {}
    for name in ("in range", "longer", "early"):
        wide = found.pivot(index="seed", columns="method", values=name)
        columns[name] = [interval(wide["TRAPO"] - wide[other]) for other in others]
    for name, title in ("half", "steps"), ("tokens_to_half", "tokens"):
        wide = found.pivot(index="seed", columns="method", values=name).astype(float)
        wide = wide.fillna(math.inf)
        columns[f"{title} until {HALF}"] = [
            f"{(wide['TRAPO'] < wide[other]).sum()} sooner, {(wide['TRAPO'] > wide[other]).sum()} "
            "later" if other != "SFT" else "-" for other in others]
    return pandas.DataFrame(columns, index=others)

def rates_tables() -> str:
    """Accuracy and speed with all methods at one rate; and whether TRAPO is the sooner one."""
    columns = {}
    for lr, found in frame("rates").groupby("lr"):
        groups = found.groupby("method", sort=False)
        columns[f"in range, {lr:g}"] = groups["in range"].agg(interval)
        columns[f"steps until {HALF}, {lr:g}"] = groups.apply(until)
        columns[f"TRAPO is, {lr:g}"] = paired(found)[f"steps until {HALF}"]
    return table(pandas.DataFrame(columns).fillna("").loc[list(groups.groups)])

def map_tables() -> str:
    """Accuracy and speed by the share of worked questions, and by the base's measured chance."""
    found = frame("map")
    columns = {"chance to start": found.groupby("base-worked").start.agg(
        lambda x: f"{x.min():.4f} to {x.max():.4f}")}
    for method, runs in found.groupby("method", sort=False):
        shares = runs.groupby("base-worked")
        columns[method] = shares["in range"].agg(spread)
        columns[f"{method}, steps"] = shares.apply(until)
    return table(pandas.DataFrame(columns))

def alpha_tables() -> str:
    """What the edge of the trust region does."""
    groups = frame("alpha").groupby("alpha")
    columns = {**{name: groups[name].agg(spread) for name in SETS[:4]},
               f"steps until {HALF}": groups.apply(until)}
    for key, title in ("outside", "outside"), ("entropy", "entropy, nats"):
        for when, at in ("first 20 steps", 0), ("last 20", -1):
            columns[f"{title}, {when}"] = groups[key].agg(
                lambda lists: interval(lists.str[at], scale=0.01))
    return table(pandas.DataFrame(columns))

def expert_tables() -> str:
    """Accuracy in range by method and teacher, sampled and greedy, and speed."""
    found, parts = frame("expert"), []
    for name in ("in range", "in range, greedy", f"steps until {HALF}"):
        wide = {expert: runs.groupby("method", sort=False).apply(
            lambda group: spread(group[name]) if name in SETS else until(group))
            for expert, runs in found.groupby("expert", sort=False)}
        parts.append(f"{name}:\n\n{table(pandas.DataFrame(wide)[list(EXPERTS)])}")
    return "\n\n".join(parts)

def trsft_tables() -> str:
    """TrSFT alone, SFT and TRAPO at one rate."""
    rates = frame("rates")
    usual = rates[(rates.lr == USUAL) & rates.method.isin(("SFT", "TRAPO"))]
    found = pandas.concat([frame("trsft"), usual])
    rows = {}
    for name in SETS:
        wide = found.pivot(index="seed", columns="method", values=name)
        wide["TRAPO less TrSFT alone"] = wide["TRAPO"] - wide["TrSFT alone"]
        rows[name] = wide[["SFT", "TrSFT alone", "TRAPO", "TRAPO less TrSFT alone"]].agg(interval)
    return table(pandas.DataFrame(rows).T)

def reach_tables() -> str:
    """pass@k of the base and the methods: of any right answer, and of worked ones alone."""
    parts = []
    for key, title in ("pass", "any right answer"), ("worked", "right, and more than a blurt"):
        rows = [{"method": name_of(line["flags"]["of"]) if line["flags"]["measure"] == "reach"
                 else "base", **dict(zip(REACHES, line[key]))} for line in read("reach")]
        cells = pandas.DataFrame(rows).groupby("method", sort=False).agg(interval)
        if key == "pass":
            cells.loc["a guess of 24"] = [f"{1 - (23 / 24) ** k:.2f}" for k in REACHES]
        parts.append(f"{title}:\n\n{table(cells)}")
    return "\n\n".join(parts)

def legs_frame() -> pandas.DataFrame:
    """The pretrained model's runs, one a row."""
    sets = ("held-out pairs", "held-out pairs, greedy", "new animals", "new animals, greedy")
    rows = []
    for line in read("legs"):
        flags = line["flags"].get("of", line["flags"])
        name = NAMES[flags["method"]]
        if "measure" in line["flags"]:
            name, flags = "base", {"seed": flags["seed"]}
        elif "after" in flags:
            name = f"SFT, then {name} (20 + 30)"
        elif flags["method"] == "sft":
            name = f"SFT ({flags.get('prompts', 4)} a step)"
        if "random" in flags:
            name += f", random weights, {flags['lr']:g}"
        rows.append({"reward": [], **flags, **line, **dict(zip(sets, line["accuracy"])),
                     "method": name, "log-prob of the base's answers": line["of base's answers"]})
    return pandas.DataFrame(rows)

def few(values: pandas.Series, digits: int = 2, scale: float = 1) -> str:
    """The interval of three or more seeds, else each seed's value."""
    values = values.dropna() * scale
    if len(values) > 2:
        return interval(values, digits)
    return ", ".join(f"{value:.{digits}f}" for value in values) or "-"

def legs_tables() -> str:
    """The pretrained model: what the methods reach, at what cost, and what is lost; by seed."""
    found = legs_frame()
    groups, most = found.groupby("method", sort=False), found.assign(all_steps=40)
    columns = {
        "learning rate": groups.lr.first(), "seeds": groups.size(),
        **{name: groups[name].agg(few) for name in found if name.startswith(("held", "new"))},
        f"steps until {HALF}": most.groupby("method", sort=False).apply(until),
        "generated, k": groups.tokens.agg(few, digits=0, scale=1e-3),
        "trained, k": groups.trained.agg(few, digits=0, scale=1e-3),
        "minutes": groups.seconds.agg(few, digits=0, scale=1 / 60),
        "log-prob of the base's answers": groups["log-prob of the base's answers"].agg(few)}
    less = {}
    for name in ("held-out pairs", "held-out pairs, greedy", "new animals", "new animals, greedy"):
        wide = found.pivot(index="seed", columns="method", values=name)
        others = [method for method in groups.groups if method not in ("base", "TRAPO")]
        less[name] = (-wide.sub(wide["TRAPO"], axis=0))[others].agg(few)
    rows = pandas.DataFrame(columns).T.fillna("")
    return f"{table(rows)}\n\nTRAPO less the other:\n\n{table(pandas.DataFrame(less))}"

TABLES = {"grid": grid_tables, "main": main_tables, "rates": rates_tables, "map": map_tables,
          "alpha": alpha_tables, "expert": expert_tables, "trsft": trsft_tables,
          "reach": reach_tables, "field grid": functools.partial(grid_tables, "field grid"),
          "field": functools.partial(main_tables, "field"), "legs": legs_tables}

def with_tables(page: str) -> str:
    """The page with what stands between `<!-- part -->` and `<!-- end -->` made anew."""
    for part, tables in TABLES.items():
        text = tables() if read(part) else "Not measured yet."
        page, count = re.subn(rf"(?s)(<!-- {part} -->\n\n).*?(\n\n<!-- end -->)",
                              lambda found: found[1] + text + found[2], page)
        assert count == 1, f"the page has no place for {part}"
    return page

def colour_of(method: str) -> str:
    """One colour a method everywhere."""
    return COLOURS.get(method.partition(" (")[0], "#999999")

def new_figure(width: float, height: float):
    """An empty figure."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")

def draw_dots():
    """The main result, a dot a seed, methods in rows: accuracy, and speed at two equal rates."""
    best, rates = frame("main"), frame("rates")
    methods = best.groupby("method")["in range"].mean().sort_values().index
    figure = new_figure(8.6, 3.8)
    panels = {"in range": "accuracy at the end, best learning rate",
              "early": "mean reward alone, steps 1 to 80"}
    for i, (column, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 2, i + 1, xlim=(-0.03, 1.03), ylim=(-0.6, len(methods) - 0.4))
        axis.set_title(title, fontsize=11)
        for row, method in enumerate(methods):
            if column == "in range":
                draw_row(axis, row, best[best.method == method][column], colour_of(method),
                         mark="s")
                continue
            if not best[best.method == method][column].count():
                axis.text(0.5, row, "SFT has no rollouts", color="grey", ha="center", va="center",
                          fontsize=8)
            for lr, place, fill in (USUAL, 0.17, colour_of(method)), (FAST, -0.17, "none"):
                values = rates[(rates.method == method) & (rates.lr == lr)][column].dropna()
                draw_row(axis, row + place, values, fill, colour_of(method))
        axis.set_yticks(range(len(methods)), methods if i == 0 else [""] * len(methods))
        axis.grid(axis="x", alpha=0.3)
    axis.plot([], [], "o", c="grey", label=f"learning rate {USUAL:g}")
    axis.plot([], [], "o", mfc="none", mec="grey", label=f"learning rate {FAST:g}")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=9, frameon=False, ncols=2,
                  loc="outside lower right", title="a mark: one seed; bar: median")
    return figure

def draw_row(axis, row: float, values: pandas.Series, fill: str, edge: str = "black",
             mark: str = "o") -> None:
    """Marks, and a bar at their median."""
    axis.plot(values, [row] * len(values), mark, mfc=fill, mec=edge, alpha=0.7, ms=5, mew=0.8)
    axis.plot([values.median()] * 2, [row - 0.25, row + 0.25], c="black", lw=1.5)

def draw_curves():
    """Unguided reward over the steps: thin lines are seeds, the thick one is their median."""
    figure = new_figure(8.6, 3.8)
    for i, (lr, rows) in enumerate(frame("rates").groupby("lr")):
        axis = figure.add_subplot(1, 2, i + 1, title=f"learning rate {lr:g}", ylim=(0, 1),
                                  xlabel="training step")
        for method, runs in rows[rows["all_steps"] == STEPS].groupby("method", sort=False):
            curves = pandas.DataFrame([reward for reward in runs.reward if reward]) / 100
            steps = [runs["first"].iloc[0] + 10 * i + 5 for i in range(curves.shape[1])]
            if steps:
                axis.plot(steps, curves.T, c=colour_of(method), lw=0.5, alpha=0.4)
                over = {"TRAPO": 5, "fixed prefixes": 6}.get(method, 3)  # these two run together
                axis.plot(steps, curves.median(), "--" if over == 6 else "-", lw=2.2,
                          c=colour_of(method), label=method, zorder=over)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward alone, training questions")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  fontsize=9, frameon=False)
    return figure

def draw_map():
    """Against the base's chance to start: a dot a run, and a line through the shares' middles."""
    found, figure = frame("map"), new_figure(8, 3.6)
    panels = {"in range": "accuracy at the end; mean",
              "half": "steps until half is right alone; upper median"}
    for i, (column, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 2, i + 1, xscale="log")
        axis.set_title(title, fontsize=11)
        for method, runs in found.groupby("method", sort=False):
            values = runs.assign(y=runs[column].fillna(NEVER))
            axis.plot(values.start, values.y, "o", c=colour_of(method), alpha=0.4, ms=4)
            shares = values.groupby("base-worked")
            middle = shares[["start", "y"]].quantile(0.5, interpolation="higher")
            if column == "in range":  # the median of two heaps would hide one of them
                middle["y"] = shares["y"].mean()
            axis.plot(middle.start, middle.y, c=colour_of(method), lw=2, label=method)
        axis.grid(alpha=0.3)
    ticks = range(0, STEPS + 1, 40)
    axis.set_yticks([*ticks, NEVER], [*ticks, "later"])
    figure.supxlabel("base's chance to begin working when asked (a dot: one seed)", fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    return figure

def draw_alphas():
    """Accuracy by alpha; the expert's tokens outside the trust region, and entropy, over time."""
    from matplotlib import colormaps
    found, figure, shades = frame("alpha"), new_figure(9, 3.2), colormaps["viridis"]
    axis = figure.add_subplot(1, 3, 1, title="accuracy at the end", xlabel="alpha", ylim=(0, 1.03))
    for name, mark, stroke in ("in range", "o", "-"), ("longer", "s", "--"):
        places = found.alpha.map(ALPHAS.index)
        middle = found.groupby(places)[name].median()
        axis.plot(places, found[name], mark, c=colour_of("TRAPO"), alpha=0.4, ms=4)
        axis.plot(middle, stroke, c=colour_of("TRAPO"), lw=2, label=name)
    axis.set_xticks(range(len(ALPHAS)), ALPHAS)
    axis.legend(frameon=False, loc="lower right")
    panels = {"outside": "expert's tokens with p < alpha, share", "entropy": "entropy, nats"}
    for i, (column, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, 3, i + 2, title=title, xlabel="training step")
        for place, (alpha, runs) in enumerate(found.groupby("alpha")):
            middle = pandas.DataFrame(list(runs[column])).astype(float).median() / 100
            axis.plot(10 + 20 * middle.index, middle, c=shades(place / len(ALPHAS)), lw=2,
                      label=f"{alpha:g}")
    figure.axes[1].legend(title="alpha", frameon=False, loc="center", bbox_to_anchor=(0.5, 0.6),
                          ncols=2)
    for axis in figure.axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    return figure

def draw_legs():
    """Reward alone over rollouts and solutions so far: thin lines are seeds, the thick one their
    mean."""
    figure, found = new_figure(7, 3), legs_frame()
    axis = figure.add_subplot(ylim=(0, 1), xlabel="rollouts and expert solutions so far",
                              ylabel="reward alone")
    for method, runs in found.groupby("method", sort=False):
        if not runs.reward.map(bool).any():
            continue  # no rollouts of its own
        curves = pandas.DataFrame([pandas.Series(reward) for reward in runs.reward]).T / 100
        before = 16 * runs["first"].iloc[0]  # solutions
        places = [before + 32 * (4 * i + 2) for i in curves.index]
        colour = colour_of(method)
        axis.plot(places, curves, c=colour, lw=0.6, alpha=0.5)
        axis.plot(places, curves.mean(axis=1), c=colour, lw=2.4, label=method)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

def draw_losses():
    """What a token of probability p weighs on grad log p in each prefix loss, by autograd."""
    figure = new_figure(7, 3)
    axis = figure.add_subplot(xscale="log", xlabel="p, the policy's probability of the token",
                              ylabel="weight on ∇ log p", xlim=(1e-3, 1))
    logp = torch.linspace(-7, 0, 1001, requires_grad=True)
    for name, loss, alpha, colour, style in (
            ("SFT", "sft", 0, "SFT", "-"), ("DFT: TrSFT, α = 1", "trsft", 1, "GRPO", "--"),
            ("ProFit, α = 0.1", "profit", 0.1, "fixed prefixes", ":"),
            ("CHORD-φ", "chord-phi", 0, "SFT, then GRPO", "-."),
            ("LUFFY, A = 1", "luffy", 0, "LUFFY", "-"),
            ("TrSFT, α = 0.1", "trsft", 0.1, "TRAPO", "-")):
        losses = trapo.PREFIX_LOSSES[loss](logp, 1.0, alpha)
        weight, = torch.autograd.grad(-losses.sum(), logp)
        axis.plot(logp.detach().exp(), weight, style, c=COLOURS[colour], label=name,
                  lw=3 if colour == "TRAPO" else 1.8)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

FIGURES = {"main": draw_dots, "curves": draw_curves, "map": draw_map, "alpha": draw_alphas,
           "losses": draw_losses, "legs": draw_legs}

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("parts", nargs="*", help=f"to run, of {', '.join(PARTS)}; none: all")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, a core each")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {unknown}")
    if args.command == "show":
        page = HERE / ".github" / "results.md"
        page.write_text(with_tables(page.read_text()))
        for name, draw in FIGURES.items():
            draw().savefig(HERE / ".github" / f"{name}.png", dpi=160)
        return
    failed = 0
    for part in args.parts or PARTS:
        FOLDER.mkdir(parents=True, exist_ok=True)
        done = [line["flags"] for line in read(part)]
        wanted = [flags for flags in PARTS[part]() if flags not in done]
        print(f"{part}: {len(done)} runs are done, {len(wanted)} to go", flush=True)
        with ProcessPoolExecutor(args.processes, None, torch.set_num_threads, (1,)) as pool:
            failed += list(pool.map(run, wanted)).count(False)
    sys.exit(failed > 0)

if __name__ == "__main__":
    main()
