"""Who may import whom, so that the house keeps its floors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tabagent_model

# What begins with a point lies in the same folder.
MAY_IMPORT = {
    "errors": set(),
    "results": set(),
    "params": {"errors"},
    "metrics": set(),
    "schema/_json": set(),
    "schema/_json_schema": {"._json"},
    "schema/_kinds": {"._json", "._json_schema"},
    "schema/_pydantic": {"._kinds", "errors"},
    "schema/_hints": {"._kinds", "._pydantic", "errors"},
    "schema/__init__": {"._hints", "._json", "._json_schema", "._kinds", "errors"},
    "schema/_docstring": set(),
    "tools": {
        *("_prompt", "errors", "schema._docstring", "schema._hints", "schema._json"),
        "schema._kinds",
    },
    "tool_loop": {  # the model and results for type checkers only
        *("_prompt", "errors", "model", "params", "results", "tools"),
    },
    "pin": {"_courier"},
    "_cache": {"errors"},
    "_trial": {"_core"},
    "backends/_note": {"_cache", "_core"},
    "backends/__init__": {"._note", "_cache", "_core", "_trial", "errors"},
    "_native": {"_cache", "_core", "_trial", "backends", "errors"},
    "backends/_tools": {"_core", "errors"},
    "backends/_build": {
        *("._note", "._tools", "_core", "_native", "_trial", "backends", "errors"),
    },
    "_attention": {"_cache", "_native"},
    "_layouts": {"_cache", "_native"},
    "_log": {"_core", "_courier"},
    "_courier": {"_core", "errors", "results", "schema"},  # two of them for type checkers only
    "_prompt": {"errors"},
    "_options": {"_prompt", "errors", "schema", "tools"},
    "stream": {"_courier", "errors", "results", "schema"},  # the schema for type checkers only
    "_crowd": {"_courier", "errors", "results", "stream"},
    "hardware": {"_native", "backends", "errors"},  # the backends for type checkers only
    "placement/_estimate": {
        *("_attention", "_core", "_layouts", "errors", "hardware", "params"),
    },
    "placement/__init__": {"._estimate", "_core", "errors", "hardware", "params"},
    "advice": {"errors", "hardware", "params"},
    "placement/_ledger": {  # placement for type checkers only
        *("._estimate", "_core", "_courier", "_native", "errors", "hardware", "placement"),
    },
    "placement/_climb": {
        *("._estimate", "._ledger", "_core", "_courier", "_native", "errors", "hardware"),
        *("params", "placement"),
    },
    "isolation/frames": {"_core", "_courier", "errors", "results"},  # _core for type checkers only
    "isolation/spawn": {"_courier", "errors"},
    "isolation/memory": {  # the child and frames for type checkers only
        *(".child", ".frames", "_core", "errors", "hardware", "placement._estimate"),
        "placement._ledger",
    },
    "isolation/child": {
        *(".frames", ".memory", ".spawn", "_core", "errors", "params", "placement._ledger"),
    },
    "isolation/verdicts": {"_cache", "_native", "errors", "params", "recovery"},
    "isolation/respawn": {
        *(".child", ".frames", ".spawn", ".verdicts", "_courier", "errors", "params"),
    },
    "isolation/remote": {
        *(".child", ".frames", ".memory", ".respawn", ".verdicts", "_core", "_courier"),
        *("errors", "hardware", "params", "placement._ledger"),
    },
    "_loading": {
        *("_core", "_courier", "_log", "errors", "isolation", "params", "placement"),
        *("placement._ledger", "stream"),
    },
    "isolation/worker": {
        *(".frames", ".memory", "_core", "_courier", "_loading", "errors", "params"),
        *("placement._ledger", "stream"),
    },
    "_session_file": {"_base", "_core", "errors"},  # the base for type checkers only
    "chat": {  # the base for type checkers only
        *("_base", "_courier", "_options", "_prompt", "_session_file", "errors", "params"),
        *("results", "stream"),
    },
    "recovery": {  # all but the errors for type checkers only
        *("_prompt", "errors", "model", "params", "results"),
    },
    "_base": {
        *("_core", "_courier", "_crowd", "_loading", "_options", "_prompt", "chat", "errors"),
        *("isolation.remote", "metrics", "params", "recovery", "results"),
    },
    "model": {
        *("_base", "_core", "_courier", "_loading", "_log", "_prompt", "chat", "errors"),
        *("params", "pin", "results", "serve.transport", "stream", "tool_loop"),
    },
    "manager/_pool": {"errors", "params"},
    "manager/_snapshots": {  # both for type checkers only
        *("_base", "_session_file", "chat", "errors"),
    },
    "manager/_needs": {
        *("._pool", "_base", "_loading", "errors", "hardware", "isolation.remote", "params"),
        # hardware, the base and the share for type checkers only
        *("placement", "placement._estimate", "placement._ledger"),
    },
    "manager/_keeper": {
        *("._needs", "._pool", "._snapshots", "_base", "_courier", "_loading", "errors"),
        *("model", "params"),
    },
    "manager/__init__": {
        *("._keeper", "._needs", "._pool", "._snapshots", "_prompt", "errors", "model"),
        *("params", "stream"),
    },
    "bench/_machine": {"_core", "hardware", "model"},
    "bench/_report": {"._machine"},
    "bench/_files": {"errors", "hardware", "model", "results"},
    "bench/_spike3": {
        *("._files", "._machine", "._report", "errors", "hardware", "manager", "model", "params"),
    },
    "bench/_throughput": {
        *("._files", "._machine", "._report", "._spike3", "hardware", "model", "params"),
        "results",
    },
    "bench/__init__": {
        *("._files", "._machine", "._report", "._spike3", "._throughput", "errors"),
    },
    "testing": {"_core", "_courier", "errors", "params", "results"},
    "_package": {"errors"},
    "compat": {
        *("_core", "_package", "_prompt", "errors", "model", "params", "serve._request"),
        "serve._shapes",
    },
    "serve/models": {"errors", "manager", "manager._keeper", "model"},
    "serve/service": {  # the control and the manager for type checkers only
        *(".control", ".models", "_prompt", "errors", "manager", "model", "params", "results"),
        "stream",
    },
    "serve/_request": {"_prompt", "errors", "manager", "params"},
    "serve/progress": {".service", "errors"},  # the service for type checkers only
    "serve/_shapes": {".progress", "_core", "results"},  # the progress for type checkers only
    "serve/openai": {
        *("._request", "._shapes", ".progress", ".service", "errors", "manager._keeper"),
        "results",
    },
    "serve/__init__": {".config", ".http", ".models", ".service", "_package"},
    "serve/config": {"errors", "params"},
    "serve/anthropic": {"._request", "._shapes", ".openai", ".service", "results"},
    "serve/responses": {"._request", "._shapes", ".openai", ".service", "results"},
    "serve/llama_server": {"._request", ".openai", ".service"},
    "serve/control": {"._request", ".openai", ".service", "manager", "manager._keeper"},
    "serve/openapi": {"_core"},
    "serve/guard": {"._shapes", ".config", ".openai"},
    "serve/sse": {".config", ".guard"},
    "serve/wire": {".config", ".openai", ".sse"},
    "serve/http": {
        *(".anthropic", ".config", ".control", ".guard", ".llama_server", ".openai", ".openapi"),
        *(".responses", ".service", ".sse", "errors", "hardware", "metrics"),
    },
    "serve/listen": {
        *(".config", ".http", ".service", ".wire", "_package", "errors", "manager"),
        *("manager._keeper", "model", "params"),
    },
    "serve/transport": {".openai", ".service", "_package", "model"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_imports_only_from_the_floors_below(name: str):
    text = (Path(tabagent_model.__file__).parent / f"{name}.py").read_text()
    top = ".." if "/" in name else "."
    found = set()
    for dots, module, names in re.findall(
        r"^\s*from (\.+)([\w.]*) import (.+)", text, re.MULTILINE
    ):
        floor = "" if dots == top else "."
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
