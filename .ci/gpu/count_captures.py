"""How many graphs a sampling phase records, and what they cost, by arithmetic (no torch).

trapo.decode's rule is replayed on lengths as they occur (log-normal, mean 250, at most 1024), with
a model of an H100 that decodes Qwen2.5-0.5B in bf16. All figures are the model's, none measured.
"""
import math
import random
import statistics

KV = 12_288  # bytes of a token in the cache
RULES = {  # name: (share of living rows at which the others leave, room for new tokens)
    "as it was: a quarter finished": (0.75, lambda used: max(32, used // 2)),
    "as it is: half finished": (0.5, lambda used: max(16, used // 2)),
    "half finished, room for 256": (0.5, lambda used: max(256, used // 2)),
    "two thirds finished": (0.33, lambda used: max(16, used // 2))}
CASES = {  # name: (rows, most tokens, mean, width of the prompts)
    "trapo, 32 prompts": (352, 1024, 250, 150),
    "grpo, 32 prompts": (256, 1024, 250, 150),
    "long responses": (352, 1024, 900, 150),
    "evaluation": (200, 1024, 250, 150),
    "embedded": (176, 56, 24, 30)}

def draw_lengths(rng, rows, most, mean, sigma=0.6):
    mu = math.log(mean) - sigma**2 / 2
    return [max(1, min(most, round(rng.lognormvariate(mu, sigma)))) for _ in range(rows)]

def seconds_of_step(rows, width):
    """1 GB of weights, or 1200 kernels of a graph; the cache; drawing; one transfer."""
    weights, kernels = 1e9 / 2.6e12, 1200 * 1.8e-6
    cache, drawing = rows * width * KV / 1.6e12, rows * 151_936 * 36 / 2.6e12 + 30 * 3e-6
    return max(kernels, weights) + cache + drawing + 60e-6

def phase(lengths, width, most, share, room_of):
    """(captures, seconds of decoding, most bytes of the cache)."""
    alive, used, size, captures, seconds, cache = lengths, width, 0, 0, 0.0, 0
    for t in range(most + 1):
        living = [length for length in alive if length > t]
        if not living:
            break
        if used >= size or len(living) <= share * len(alive):
            alive, captures = living, captures + 1
            room = min(max(1, most - t), room_of(used))
            size = used + room + -(used + room) % 16
            cache = max(cache, len(alive) * size * KV)
        used += 1
        seconds += seconds_of_step(len(alive), size)
    return captures, seconds, cache

for case, (rows, most, mean, width) in CASES.items():
    print(f"{case}: {rows} rows, mean {mean} of at most {most} tokens")
    for rule, options in RULES.items():
        rng = random.Random(0)
        runs = [phase(draw_lengths(rng, rows, most, mean), width, most, *options)
                for _ in range(20)]
        captures, seconds, cache = map(statistics.mean, zip(*runs))
        print(f"    {rule:30} {captures:4.1f} captures, {seconds:.2f} s, with captures of .07 s "
              f"{seconds + 0.07 * captures:.2f}, of .15 s {seconds + 0.15 * captures:.2f}; "
              f"cache {cache / 2**30:.2f} GiB")
