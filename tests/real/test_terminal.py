"""`python -m tabagent_model` on a terminal: results on stdout, everything else on stderr."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tabagent_model import ModelConfig, _native

pytestmark = pytest.mark.model


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tabagent_model", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_bundled_model_answers_a_question():
    ran = run("generate", "What is the capital of France?")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Paris" in ran.stdout


def test_a_dash_reads_the_question_from_standard_input():
    asked = "What is the capital of Italy?"
    assert run("generate", "-", stdin=asked).stdout == run("generate", asked).stdout


def test_a_bad_file_is_one_message_and_exit_code_1(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html></html>")
    ran = run("generate", "Hello", "--model", str(path))
    assert (ran.returncode, ran.stdout) == (1, "")
    first, *_, hint = ran.stderr.splitlines()
    assert first.startswith(f"InvalidFormatError: `{path}` is not a GGUF model: ")
    assert hint == "hint: give the path of a `.gguf` file, downloaded in full"


def test_the_doctor_names_the_module_in_use():
    ran = run("doctor")
    assert (ran.returncode, ran.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if line[0] == "t")
    assert facts["tabagent_model"] == _native.core.__version__
    assert f"CPU module in use  {_native.start()} (" in ran.stdout


def test_the_doctor_says_what_a_model_would_take(tmp_path):
    path = str(ModelConfig().path)
    ran = run("doctor", path)
    assert (ran.returncode, ran.stderr) == (0, "")
    told = ran.stdout[ran.stdout.index(path) :].splitlines()
    assert told[1].startswith("  ")
    assert any(line.startswith("  cpu: needs ") for line in told)
    assert run("doctor", str(tmp_path / "none.gguf")).returncode == 1
