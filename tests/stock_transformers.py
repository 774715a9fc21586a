"""What transformers makes of checkpoints without this package: test_hf.py runs this in a process of its own.

python stock_transformers.py JOBS RESULTS, where JOBS is a JSON object {name: {"load": directory, "save": directory
or null}} and RESULTS becomes {name: the error as text, or the logits of IDS, the classes of all modules and what
went into each low-bit layer}.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from tiny import IDS
from transformers import AutoModelForCausalLM

jobs = json.loads(Path(sys.argv[1]).read_text())
results: dict[str, object] = {}
for name, job in jobs.items():
    try:
        model = AutoModelForCausalLM.from_pretrained(job["load"]).eval()
        classes = {layer: type(module).__name__ for layer, module in model.named_modules()}
        inputs: dict[str, torch.Tensor] = {}
        for layer, module in model.named_modules():
            if classes[layer] in ("BitLinear", "AutoBitLinear"):
                keep = partial(lambda inputs, layer, _, args: inputs.update({layer: args[0]}), inputs, layer)
                module.register_forward_pre_hook(keep)
        with torch.no_grad():
            logits = model(IDS).logits
        results[name] = logits, classes, inputs
        if job["save"]:
            model.save_pretrained(job["save"])
    except Exception as error:  # a refusal is a result
        results[name] = f"{type(error).__name__}: {error}"
assert not [module for module in sys.modules if module.split(".")[0] == "bitnet"]
torch.save(results, sys.argv[2])
