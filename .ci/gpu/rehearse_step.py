"""Two whole steps and an evaluation on the pretended device, beside the same on the CPU; with the
argument `traffic`, the transfers of the last step and the evaluation."""
import contextlib
import random
import sys

import pretend_gpu
import torch
from rehearse_sample import make

import trapo

trapo.ROOM, trapo.HEAD_CHUNK = 4, 64

def make_task():
    rng = random.Random(0)

    def ids(least, most):
        return [rng.randrange(3, 300) for _ in range(rng.randint(least, most))]
    problems = [trapo.Problem(ids(3, 12), [ids(5, 15) + [1]], "") for _ in range(4)]
    return trapo.Task(problems, [trapo.Problem([5, 6, 7], [], "")] * 3,
                      lambda problem, response: float(sum(response) % 3 == 0))

def run(device, **options):
    """([metrics and completions of each step], accuracy, facts about the models)."""
    args = trapo.Settings(**{**trapo.METHODS["trapo"], "device": device, "max_response": 24,
                             "prompts": 4, "micro_tokens": 200, "lr": 1e-3, **options})
    policy, task, steps = make("qwen2", torch.float32).requires_grad_(True), make_task(), []
    with pretend_gpu.World() if device == "cuda" else contextlib.nullcontext():
        sampler = trapo.make_sampler(policy, args)
        policy.train()
        if args.recompute:
            policy.activation_checkpointing_enable({"use_reentrant": False})
        policy.to(device)
        optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0)
        for step in range(2):
            pretend_gpu.WHERE.clear()
            metrics, groups = trapo.train_step(policy, sampler, optimizer, task, args, step)
            steps.append((metrics, [r.completion for group in groups for r in group]))
        accuracy = trapo.evaluate(sampler, task, args, greedy=True)
        facts = {
            "tied": [model.get_output_embeddings().weight is model.get_input_embeddings().weight
                     for model in (policy, sampler)],
            "policy": {(p.dtype, p.device.type) for p in policy.parameters()},
            "sampler": {(p.dtype, p.device.type) for p in sampler.parameters()},
            "its buffers": {(b.dtype, b.device.type) for b in sampler.buffers()}}
        if "traffic" in sys.argv:
            pretend_gpu.show_traffic()
    return steps, accuracy, facts

good = []
for options in ({"bf16": False}, {"bf16": True}, {"bf16": True, "recompute": True}):
    steps, accuracy, facts = run("cuda", **options)
    expected, expected_accuracy, _ = run("cpu", **options)
    print(options, facts, flush=True)
    for (a, drawn), (b, drawn_there) in zip(steps, expected):
        same = sum(x == y for x, y in zip(drawn, drawn_there))
        shown = [f"{key} {a[key]:.6g}, on the CPU {b[key]:.6g}"
                 for key in ("loss", "grad_norm", "logprob_gap")]
        print(f"   same completions {same}/{len(drawn)}; {'; '.join(shown)}", flush=True)
        exact = same == len(drawn) and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
        good.append(exact if not options["bf16"] else a["logprob_gap"] < 0.05)
    print(f"   evaluation {accuracy}, on the CPU {expected_accuracy}", flush=True)
print("PASS" if all(good) else "FAIL", "rehearse_step")
raise SystemExit(not all(good))
