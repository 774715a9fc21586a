"""After `import bitnet`, from_pretrained builds our layers, whatever is imported when, how often and by whom."""

import subprocess
import sys

import pytest

CHECK = """
from transformers.quantizers import auto
config = auto.AutoQuantizationConfig.from_dict({"quant_method": "bitnet"})
ours = [type(config).__module__, type(auto.AutoHfQuantizer.from_config(config)).__module__]
assert ours == ["bitnet.convert.hub.config", "bitnet.convert.hub.quantizer"], ours
"""

WAYS = {
    "a spec is asked for and not used": """
import bitnet
for _ in range(2):
    assert importlib.util.find_spec("transformers.modeling_utils").name == "transformers.modeling_utils"
    assert importlib.util.find_spec("transformers.quantizers.auto").loader
import transformers.modeling_utils
""",
    "modules run again": """
import transformers.modeling_utils
import bitnet
importlib.reload(transformers.quantizers.auto)
importlib.util.find_spec("transformers.modeling_utils")
importlib.reload(transformers.modeling_utils)
""",
    "another thread is importing transformers": """
import time
loader = threading.Thread(target=lambda: importlib.import_module("transformers.quantizers.auto"))
loader.start()
while "transformers.quantizers.auto" not in sys.modules:
    time.sleep(0.001)
import bitnet
loader.join()
""",
    "threads import this while another imports transformers": """
names = ["transformers.modeling_utils", "bitnet", "bitnet", "bitnet"]
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_our_layers_are_registered_when(way: str) -> None:
    code = f"import importlib, importlib.util, sys, threading\n{WAYS[way]}{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr  # of a thread
