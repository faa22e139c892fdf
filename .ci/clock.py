"""The clock world: problems, and a tiny pretrained base, as ordinary files for trapo.py.

    python .ci/clock.py .clock                 what the repository ships, by the line below
    python .ci/clock.py runs/seven --seed 7    other problems and another base, for the study
    python trapo.py --model runs/seven/model   trains on it, as runs/seven/defaults.json says

A 24-hour clock shows h; k times some hours (1-9) are added or taken away, each step on a line
named by a letter. A tiny Qwen2 is "pretrained" from scratch on a textbook (problems that end in
":" and worked lines) and a quiz (problems that end in "?" and blurted answers): it knows how to
work, but does not when asked. The expert works, but rambles, takes wrong turns and corrects them,
as R1's traces do. Chance is 4 %.

    problem  j 8 k -9 l +8 m +1 ?          direct   # 8
    worked   k -9 23 l +8 7 m +1 8 # 8
    expert   k -9 23 let's l +8 14 oops l +8 7 m +1 8 # 8

Shipped: seed 0, attempt 1, textbook .973, direct .992 greedily; other machines round otherwise.
"""
import argparse, json, random, sys  # noqa: E401
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trapo

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FILLERS = ("let's hmm so now then well okay next wait right and first see think slowly "
           "indeed").split()
WORDS = ["<pad>", "<eos>", "?", ":", "#", "oops", *LETTERS, *map(str, range(24)),
         *(f"{sign}{n}" for sign in "+-" for n in range(1, 10)), *FILLERS]
# A turn is its first line: the instruction that trapo.py puts below a problem is left out.
TEMPLATE = ("{% for turn in messages %}{{ turn.content.split('\\n')[0] }}"
            "{% if turn.role == 'assistant' %} <eos>{% endif %}{% endfor %}")

SETS = {  # what its random numbers are called, rows, smallest and largest k, mark
    "train": ("train", 512, 5, 9, "?"), "test": ("in range (k 5-9)", 256, 5, 9, "?"),
    "longer": ("longer (k 10)", 256, 10, 10, "?"),
    "textbook": ("textbook (k 2-4)", 256, 2, 4, ":"), "direct": ("direct (k 1)", 256, 1, 1, "?")}
DEFAULTS = {"dataset": "train.jsonl", "test": "test.jsonl", "max_prompt": 32, "max_response": 56,
            "micro_tokens": 1024, "steps": 80, "prompts": 16, "lr": 4e-4, "eval_every": 20,
            "eval_size": 256, "device": "cpu"}
STEPS, TEXTS = 2500, 32  # of the pretraining, and texts in a step
SOUND = {"textbook": 0.95, "direct": 0.9}  # what a base must reach, greedily

# ==== Problems
def make_row(rng: random.Random, k: int, mark: str, worked: bool = True, filler: float = 0.0,
             slip: float = 0.0, largest: int = 9) -> dict:
    """One chain of k steps of 1 to `largest` hours and its solution, as shown above.
    filler, slip: probability of an aside, and of a wrong line, before each line."""
    hour, letter = rng.randrange(24), rng.randrange(16)
    problem, lines = [LETTERS[letter], str(hour)], []
    for name in LETTERS[letter + 1:letter + 1 + k]:
        change = rng.choice((-1, 1)) * rng.randint(1, largest)
        hour = (hour + change) % 24
        problem += [name, f"{change:+d}"]
        if rng.random() < filler:
            lines.append(rng.choice(FILLERS))
        if rng.random() < slip:
            lines += [name, f"{change:+d}", str((hour + rng.randint(1, 23)) % 24), "oops"]
        lines += [name, f"{change:+d}", str(hour)]
    solution = [*(lines if worked else []), "#", str(hour)]
    return {"problem": " ".join([*problem, mark]), "solution": " ".join(solution),
            "answer": str(hour)}

def make_rows(name: str, seed: int) -> list[dict]:
    """The rows of one of SETS, with the expert's solutions."""
    called, size, shortest, longest, mark = SETS[name]
    rng = random.Random(f"{called} {seed}")
    return [make_row(rng, rng.randint(shortest, longest), mark, filler=0.3, slip=0.1)
            for _ in range(size)]

def corpus_row(rng: random.Random, progress: float, share_worked: float = 0.0) -> dict:
    """A text of the pretraining corpus, `progress` (0 to 1) of the way through it.

    Copying a change from the problem comes first, from changes of every size, then the addition,
    from 1 up to 9 hours: a base that learns to add first tends never to copy. In the first half
    every other "?" is worked, or the skill leans on the ":" and nothing is left to unlock.
    """
    early, level = progress < 0.5, 9 if progress < 0.2 else min(9, 1 + int(20 * (progress - 0.2)))
    mark = "?" if rng.random() < (0.4 if early else 0.25) else ":"
    worked = mark == ":" or rng.random() < (0.5 if early else share_worked)
    k = 1 if not worked and (early or rng.random() < 0.8) else rng.randint(1, 10)
    return make_row(rng, k, mark, worked, filler=0.04, slip=0.01, largest=level)

def is_right(words: list[str], answer: str) -> bool:
    """Does a response end in `# answer <eos>`, and name no other answer?"""
    return words[-3:] == ["#", answer, "<eos>"] and words.count("#") == 1

# ==== The base
def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for every word, and a chat template that renders a problem as it stands."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.decoder = tokenizers.decoders.WordPiece(cleanup=False)  # spaces between words
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)

def make_model(seed: int) -> transformers.PreTrainedModel:
    """An untrained model like Qwen2, of 98 752 parameters. By Llama's class: beside a config of
    type qwen2, AutoTokenizer replaces any tokenizer by Qwen2's own."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.1, attention_bias=True, tie_word_embeddings=False, eos_token_id=[1],
        bos_token_id=None, pad_token_id=0))

def pretrain(seed: int, share_worked: float, steps: int) -> transformers.PreTrainedModel:
    """SFT on the corpus, in its order: trapo.py's update, with every text an expert's prefix."""
    policy, ids = make_model(seed), make_tokenizer().convert_tokens_to_ids
    args = trapo.Settings(method="sft", prefix_loss="sft", bf16=False, device="cpu",
                          max_response=DEFAULTS["max_response"],
                          micro_tokens=DEFAULTS["micro_tokens"])
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(f"textbook and quiz {seed}")
    for step in tqdm(range(steps), "pretraining the base"):
        rows = [corpus_row(rng, (step * TEXTS + i) / (steps * TEXTS), share_worked)
                for i in range(TEXTS)]
        rollouts = [trapo.Rollout(ids(row["problem"].split()),
                                  ids([*row["solution"].split(), "<eos>"])) for row in rows]
        optimizer.zero_grad()
        trapo.accumulate_gradients(policy, rollouts, args)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:  # a warm-up, and a fall in the second half
            group["lr"] = 5e-3 * (min(1, (step + 1) / 20) * min(1, 2 * (1 - step / steps)))
        optimizer.step()
    return policy

def accuracy(policy: torch.nn.Module, name: str, seed: int) -> float:
    """The share of one of SETS that is solved greedily."""
    rows, tokenizer = make_rows(name, seed), make_tokenizer()
    requests = tokenizer([row["problem"] for row in rows]).input_ids
    responses, _ = trapo.sample(policy, requests, [DEFAULTS["max_response"]] * len(rows), 0.0)
    return sum(is_right(tokenizer.convert_ids_to_tokens(ids), row["answer"])
               for ids, row in zip(responses, rows)) / len(rows)

def make_base(seed: int, share_worked: float, steps: int) -> transformers.PreTrainedModel:
    """The first base of four that is sound: it must know how to work and how to blurt. Each has
    another start and corpus. One that was cut short is taken as it is."""
    for attempt in range(4):
        policy = pretrain(seed + attempt * 2**32, share_worked, steps)
        if steps < STEPS:
            print(f"a base of {steps} steps: too few to be sound")
            return policy
        scores = {name: accuracy(policy, name, seed) for name in SOUND}
        sound = all(scores[name] >= least for name, least in SOUND.items())
        print(f"the base of seed {seed}, attempt {attempt + 1}, is {'not ' * (not sound)}sound:",
              ", ".join(f"{name} {scores[name]:.3f} (bar {SOUND[name]})" for name in SOUND))
        if sound:
            return policy
    sys.exit(f"four bases of seed {seed} are not sound: give another --seed")

# ==== The folder
def write_rows(path: Path, rows: list[dict]) -> None:
    """A row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and the base")
    parser.add_argument("--worked", type=float, default=0.0,
                        help="share of the base's late quiz questions that are worked")
    parser.add_argument("--base-steps", type=int, default=STEPS, help="of the base's pretraining")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if any(asked.out.iterdir()):
        sys.exit(f"{asked.out} is not empty: give another folder")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # its matrices are so small that threads wait for each other
    for part in make_base(asked.seed, asked.worked, asked.base_steps), make_tokenizer():
        part.save_pretrained(asked.out / "model")
    for name in SETS:
        write_rows(asked.out / f"{name}.jsonl", make_rows(name, asked.seed))
    defaults = json.dumps(DEFAULTS, indent=1) + "\n"
    (asked.out / "defaults.json").write_text(defaults)  # last: all is there
    print(f"made {asked.out}: model, {', '.join(f'{name}.jsonl' for name in SETS)}")

if __name__ == "__main__":
    main()
