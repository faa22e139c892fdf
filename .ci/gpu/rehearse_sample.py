"""Graphs draw what plain decoding draws, token for token: rehearse_sample.py [KINDS [DTYPES]].

In float32 plain decoding is the CPU's, in bfloat16 the pretended device's without graphs, whose
kernels are the same. Buffers are so small that they are rebuilt every few tokens.
"""
import copy
import gc
import random
import sys

import pretend_gpu
import torch
import transformers as t

import trapo

torch.set_num_threads(1)
ROPE = {
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 12.8,
                 "original_max_position_embeddings": 40}}
KINDS = {  # of models: class, config, what differs from SHAPE
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": 16}),
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
    "smollm2": (t.LlamaForCausalLM, t.LlamaConfig, {
        "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96,
        "tie_word_embeddings": True}),
    "gemma": (t.GemmaForCausalLM, t.GemmaConfig, {"head_dim": 16}),
    "mistral": (t.MistralForCausalLM, t.MistralConfig, {"sliding_window": None}),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config, {"sliding_window": None}),
    "granite": (t.GraniteForCausalLM, t.GraniteConfig, {}),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config, {})}
for name, options in ROPE.items():
    rope = {"rope_theta": 10000.0, "rope_type": name, **options}
    short = {"max_position_embeddings": 48} if name == "dynamic" else {}
    KINDS[f"llama-{name}"] = t.LlamaForCausalLM, t.LlamaConfig, {"rope_parameters": rope, **short}
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": [1, 2]}

def make(kind, dtype):
    """A random model, whose parameters alone are cast, as in make_sampler."""
    torch.manual_seed(0)
    model, config, changes = KINDS[kind]
    policy = model(config(**SHAPE | changes)).eval().requires_grad_(False)
    policy.generation_config = t.GenerationConfig(eos_token_id=[1, 2], pad_token_id=0)
    for p in policy.parameters():
        p.data = p.data.to(dtype)
    return policy

def make_requests(rng, prompts, copies, lengths, limits):
    """(requests, limits, random numbers): `copies` of each prompt, in random order."""
    distinct = [[rng.randrange(3, 300) for _ in range(rng.choice(lengths))] for _ in range(prompts)]
    requests = distinct * copies
    rng.shuffle(requests)
    limits = [rng.choice(limits) for _ in requests]
    uniforms = torch.rand(len(requests), max(limits), dtype=torch.float64,
                          generator=torch.Generator().manual_seed(3))
    return requests, limits, uniforms

def draw(module, policy, inputs, device="cuda", graphs=True, **options):
    """sample of a copy of the policy: (completions, log-probs)."""
    requests, limits, uniforms = inputs
    record = module.DecodeBatch.record
    if not graphs:
        module.DecodeBatch.record = pretend_gpu.no_graph  # the same batches
    try:
        if device == "cpu":
            return module.sample(copy.deepcopy(policy), requests, limits, uniforms=uniforms,
                                 **options)
        with pretend_gpu.World():
            return module.sample(copy.deepcopy(policy).to("cuda"), requests, limits,
                                 uniforms=uniforms, **options)
    finally:
        module.DecodeBatch.record = record

def compare(kind, dtype, rng):
    policy = make(kind, dtype)
    inputs = make_requests(rng, 6, 5, [1, 3, 7, 20], [0, 1, 5, 30, 60, 60, 60])
    expected = draw(trapo, policy, inputs, "cpu" if dtype == torch.float32 else "cuda", False,
                    kv_tokens=1000)
    for counter in pretend_gpu.TRAFFIC, pretend_gpu.WHERE, pretend_gpu.STATS:
        counter.clear()
    found = draw(trapo, policy, inputs, kv_tokens=1000)
    gc.collect()
    pairs = list(zip(*expected, *found))
    same = sum(a == b for a, _, b, _ in pairs)
    gap = max((abs(x - y) for a, p, b, q in pairs if a == b for x, y in zip(p, q)), default=0)
    print(f"{kind:14} {str(dtype)[6:]:8} same {same}/{len(pairs)}, log-probs within {gap:.0e}, "
          f"{sum(map(len, found[0]))} tokens; {dict(pretend_gpu.STATS)}, graphs left "
          f"{len(pretend_gpu.CUDAGraph.living)}; {dict(pretend_gpu.TRAFFIC)}", flush=True)
    return same == len(pairs) and gap < 1e-4

if __name__ == "__main__":
    kinds, dtypes = (sys.argv[1:] + ["qwen2,llama,qwen3", "float32,bfloat16"][len(sys.argv) - 1:])
    trapo.ROOM = 3
    rng = random.Random(1)
    good = []
    for kind in kinds.split(","):
        for dtype in dtypes.split(","):
            good.append(compare(kind, getattr(torch, dtype), rng))
    raise SystemExit(not all(good))
