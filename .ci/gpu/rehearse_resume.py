"""Save and resume on the pretended device: the optimizer's state comes back, to its place."""
import copy
import tempfile
from pathlib import Path

import pretend_gpu
import torch
from torch.utils._pytree import tree_map
import transformers
from rehearse_sample import make

import trapo

transformers.utils.logging.disable_progress_bar()

def step(policy, optimizer):
    for p in policy.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()

class Tokenizer:  # nor is the policy's folder what is looked at
    def save_pretrained(self, folder):
        pass

policy = make("qwen2", torch.float32).requires_grad_(True)
folder = Path(tempfile.mkdtemp(), "checkpoint-1")
with pretend_gpu.World():
    policy.to("cuda").save_pretrained = Path.mkdir
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    step(policy, optimizer)
    trapo.save(policy, Tokenizer(), folder, {"step": 1, "optimizer": tree_map(
        lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, optimizer.state_dict())})
    again = copy.deepcopy(policy)
    again.zero_grad()  # a model that was loaded has none
    optimizer_again = torch.optim.AdamW(again.parameters(), 1e-2, weight_decay=0.0)
    saved = torch.load(folder / "trainer.pt", "cpu", weights_only=True)  # as in trapo.prepare
    optimizer_again.load_state_dict(saved["optimizer"])
    places = {value.device.type for state in optimizer_again.state.values()
              for value in state.values()}
    step(policy, optimizer)
    step(again, optimizer_again)
    equal = all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))
    moments = all(states["exp_avg"].device.type == "cuda"
                  for states in optimizer_again.state.values())
print(f"optimizer's state loaded to {places}; moments on the device: "
      f"{moments}; the next step is the same: {equal}")
good = moments and equal
print("PASS" if good else "FAIL", "rehearse_resume")
raise SystemExit(not good)
