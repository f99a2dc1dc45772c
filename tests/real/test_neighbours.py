"""Other packages in the same process change nothing for us, nor we for them, in either order."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

OURS = """
from tabagent_model import Model
model = Model.load(n_ctx=256)
alone = model.generate("Once upon a time", max_tokens=8, temperature=0)
"""
AGAIN = """
assert model.generate("Once upon a time", max_tokens=8, temperature=0) == alone
print(alone)
"""
NEIGHBOURS = {
    "numpy": "import numpy; numpy.ones((64, 64)) @ numpy.ones((64, 64))",
    "torch": "import torch; torch.ones(64, 64) @ torch.ones(64, 64)",
    "llama_cpp": "import llama_cpp; llama_cpp.llama_backend_init()",
    # Its own llama.cpp loads and serves our model file.
    "xllamacpp": """
import xllamacpp
from pathlib import Path
import importlib.util
package = Path(importlib.util.find_spec("tabagent_model").origin).parent
params = xllamacpp.CommonParams()
params.model.path = str(package / "assets" / "tiny-chat.gguf")
params.n_ctx = 256
params.warmup = False
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": "Once", "max_tokens": 4, "temperature": 0})
assert "choices" in answer or answer.get("content") is not None, answer
""",
}

pytestmark = pytest.mark.model


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_both_work_in_one_process(name, order):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    theirs = NEIGHBOURS[name]
    program = OURS + theirs + AGAIN if order == "ours first" else theirs + OURS + AGAIN
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].strip()
