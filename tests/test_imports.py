"""Who may import whom, so that the house keeps its floors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tabagent_model

MAY_IMPORT = {
    "errors": set(),
    "results": set(),
    "params": {"errors"},
    "metrics": set(),
    "_json": set(),
    "_json_schema": {"_json"},
    "_kinds": {"_json", "_json_schema"},
    "_pydantic": {"_kinds", "errors"},
    "_hints": {"_kinds", "_pydantic", "errors"},
    "schema": {"_hints", "_json", "_json_schema", "_kinds", "errors"},
    "_docstring": set(),
    "tools": {"_docstring", "_hints", "_json", "_kinds", "_prompt", "errors"},
    "tool_loop": {
        *("_prompt", "errors", "params", "tools"),
        *("model", "results"),  # for type checkers only
    },
    "pin": {"_courier"},
    "_cache": set(),
    "_native": {"_cache", "_core", "errors"},
    "_attention": {"_cache", "_native", "errors"},
    "_log": {"_core"},
    "_courier": {"errors", "results", "schema"},  # the schema for type checkers only
    "_prompt": {"errors"},
    "_options": {"_prompt", "errors", "schema", "tools"},
    "stream": {"_courier", "errors", "results", "schema"},  # the schema for type checkers only
    "_crowd": {"_courier", "errors", "results", "stream"},
    "hardware": {"_native", "errors"},
    "_estimate": {"_attention", "_core", "errors", "hardware", "params"},
    "placement": {"_core", "_estimate", "errors", "hardware", "params"},
    "advice": {"errors", "hardware", "params"},
    "_ledger": {
        *("_core", "_courier", "_estimate", "errors", "hardware"),
        *("placement",),  # for type checkers only
    },
    "_climb": {
        *("_core", "_courier", "_estimate", "_ledger", "_native", "errors", "hardware"),
        *("params", "placement"),
    },
    "_frames": {"errors", "results"},
    "_spawn": {"errors"},
    "_child": {"_core", "_frames", "_spawn", "errors", "params"},
    "_verdicts": {"_cache", "_native", "errors", "params"},
    "_respawn": {"_child", "_frames", "_spawn", "_verdicts", "errors", "params"},
    "_remote": {
        *("_child", "_core", "_courier", "_frames", "_respawn"),
        *("_verdicts", "errors", "params"),
    },
    "_loading": {
        *("_climb", "_core", "_courier", "_ledger", "_log", "_remote"),
        *("errors", "params", "stream"),
    },
    "worker": {"_core", "_frames", "_loading", "errors", "params", "stream"},
    "_session_file": {"_core", "errors", "model"},  # the model for type checkers only
    "chat": {
        *("_courier", "_options", "_prompt", "_session_file", "errors"),
        *("model", "params", "results", "stream"),  # the model for type checkers only
    },
    "model": {
        *("_core", "_courier", "_crowd", "_loading", "_log", "_options", "_prompt", "_remote"),
        *("chat", "errors", "metrics", "params", "pin", "results", "stream", "tool_loop"),
        "serve.transport",
    },
    "_pool": {"errors", "params"},
    "_snapshots": {"_session_file", "chat", "errors", "model"},  # both for type checkers only
    "_keeper": {"_loading", "_pool", "_snapshots", "errors", "model", "params"},
    "manager": {"_keeper", "_pool", "_prompt", "_snapshots", "errors", "model", "params"},
    "testing": {"errors", "params", "results"},
    "_package": {"errors"},
    "compat": {
        *("_core", "_package", "_prompt", "errors", "model", "params"),
        *("serve._request", "serve._shapes"),
    },
    "serve/service": {"_prompt", "errors", "model", "params", "results", "stream"},
    "serve/_request": {"_prompt", "errors", "params", "serve.service"},  # for type checkers only
    "serve/_shapes": {"_core", "results"},
    "serve/openai": {"errors", "results", "serve._request", "serve._shapes", "serve.service"},
    "serve/__init__": {"_package", "model", "serve.config", "serve.http", "serve.service"},
    "serve/config": {"errors", "params"},
    "serve/anthropic": {"results", "serve._request", "serve.openai", "serve.service"},
    "serve/responses": {"results", "serve._request", "serve.openai", "serve.service"},
    "serve/llama_server": {"serve._request", "serve.openai", "serve.service"},
    "serve/openapi": {"_core"},
    "serve/guard": {"serve.config", "serve.openai"},
    "serve/sse": {"serve.config", "serve.guard"},
    "serve/wire": {"serve.config", "serve.openai", "serve.sse"},
    "serve/http": {
        *("metrics", "serve.anthropic", "serve.config", "serve.guard", "serve.llama_server"),
        *("serve.openai", "serve.openapi", "serve.responses", "serve.service"),
        "serve.sse",
    },
    "serve/listen": {
        *("_package", "errors", "model", "params"),
        *("serve.config", "serve.http", "serve.service", "serve.wire"),
    },
    "serve/transport": {"_package", "model", "serve.openai", "serve.service"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_imports_only_from_the_floors_below(name: str):
    text = (Path(tabagent_model.__file__).parent / f"{name}.py").read_text()
    home = "." if "/" not in name else ".."
    found = set()
    for dots, module, names in re.findall(
        r"^\s*from (\.+)([\w.]*) import (.+)", text, re.MULTILINE
    ):
        floor = "" if dots == home else "serve."
        modules = [module] if module else [part.split()[0] for part in names.split(",")]
        found |= {floor + each for each in modules}
    assert found <= MAY_IMPORT[name]


def test_importing_takes_nothing_along_that_is_not_needed_yet():
    heavy = ["asyncio", "concurrent.futures", "difflib", "json", "numpy", "subprocess"]
    heavy += [f"tabagent_model.{name}" for name in ("schema", "tools", "tool_loop")]
    program = f"import sys, tabagent_model; print([m for m in {heavy} if m in sys.modules])"
    # -I: without the startup files of the environment, which may import anything.
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
