"""Each Python example of the documentation runs as it stands, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/gpu.md",
    "docs/guide.md",
    "docs/memory.md",
    "docs/models.md",
    "docs/openai.md",
    "docs/server.md",
]
EXAMPLES = [
    pytest.param(example, id=f"{page}-{number}")
    for page in PAGES
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL), 1
    )
]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_examples(page):
    assert any(each.id.startswith(page) for each in EXAMPLES)


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(example, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip()
