"""Would the rehearsal see a bug? Six of them are planted into trapo.py's sampler, one by one."""
import random
import sys
import types
from pathlib import Path

import pretend_gpu
import torch
from rehearse_sample import draw, make, make_requests

import trapo

SOURCE = Path(trapo.__file__).read_text()
BUGS = {  # name: (what is replaced, by what), ...
    "cache's length not set back after the warm-up": [
        ("            layer.cumulative_length.copy_(filled)", "            pass")],
    "position of another tensor": [
        ("        self.position += 1", "        self.position = self.position + 1")],
    "token of another tensor": [
        ("        self.token.copy_(tokens[:, None])",
         "        self.token = tokens[:, None].long()")],
    "bias of another tensor": [
        ("        self.bias[:, self.used] = 0",
         "        self.bias = self.bias.clone()\n        self.bias[:, self.used] = 0")],
    "logits copied at the capture, not at the replay": [
        ("            self.logits = self.forward()\n",
         "            self.logits = self.forward()\n        self.logits = self.logits.clone()\n")],
    "cache freed while the graph is kept": [
        ("        share = 0.5",
         "        layer = batch.cache.layers[0]\n        if t == 1:\n"
         "            layer.keys = layer.keys.clone()\n        share = 0.5")]}

def load(*changes):
    """trapo.py, changed, as a module of its own."""
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, (old, source.count(old))
        source = source.replace(old, new)
    module = types.ModuleType("planted")
    module.__file__ = trapo.__file__
    sys.modules["planted"] = module
    exec(compile(source, trapo.__file__, "exec"), vars(module))
    module.ROOM = 3
    return module

policy = make("qwen2", torch.float32)
inputs = make_requests(random.Random(1), 4, 3, [1, 3, 7], [1, 5, 16, 16])
expected, _ = draw(load(), policy, inputs, "cpu")
missed = [] if draw(load(), policy, inputs)[0] == expected else ["the program as it is"]
for name, changes in BUGS.items():
    try:
        noticed = "the tokens differ" if draw(load(*changes), policy, inputs)[0] != expected else ""
    except Exception as error:
        noticed = f"{type(error).__name__}: {str(error)[:60]}"
    print(f"{name}: {noticed or 'NOT NOTICED'}", flush=True)
    missed += [] if noticed else [name]
if "traffic" in sys.argv:
    pretend_gpu.show_traffic()
print("PASS" if not missed else "FAIL", "rehearse_planted_bugs", *missed)
raise SystemExit(bool(missed))
