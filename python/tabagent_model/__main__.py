"""On the terminal: `tabagent-model generate "a question"`, `serve`, and `doctor`."""

from __future__ import annotations

import argparse
import os
import sys

from . import Model, TabAgentModelError, _native
from .serve import listen


def main() -> int:
    parser = argparse.ArgumentParser(prog="tabagent-model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer a question, as the words come")
    generate.add_argument("prompt", help="what to ask; `-` reads it from standard input")
    generate.add_argument("--model", help="a GGUF file instead of the bundled tiny model")
    generate.add_argument("--max-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0)
    serve = commands.add_parser("serve", help="answer others by HTTP, as OpenAI's servers do")
    listen.add_arguments(serve)
    commands.add_parser("doctor", help="say what this installation runs on")
    asked = parser.parse_args()
    try:
        if asked.command == "doctor":
            doctor()
        elif asked.command == "serve":
            return listen.run(asked)
        else:
            prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
            answer(asked.model, prompt, asked.max_tokens, asked.temperature)
    except TabAgentModelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def answer(path: str | None, prompt: str, max_tokens: int, temperature: float) -> None:
    with Model.load(path) as model:
        with model.stream_chat(prompt, max_tokens=max_tokens, temperature=temperature) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        metrics = pieces.result.metrics
        if sys.stderr.isatty():
            print(
                f"[{metrics.generated_tokens} tokens, {metrics.tokens_per_second:.0f} per second,"
                f" the first after {metrics.time_to_first_token_ms:.0f} ms]",
                file=sys.stderr,
            )


def doctor() -> None:
    core = _native.core
    cpu = core.detect_cpu()
    usable = [name for name, _ in core.cpu_modules(str(_native.LIBRARIES))]
    how = "named by TABAGENT_CPU_VARIANT" if "TABAGENT_CPU_VARIANT" in os.environ else "tried"
    facts = {
        "tabagent_model": core.__version__,
        "llama.cpp": core.LLAMA_CPP_VERSION,
        "processor": f"{cpu['brand']}, {cpu['physical_cores']} cores, {cpu['usable_cores']} usable",
        "CPU variant": core.get_cpu_variant(),
        "CPU modules": ", ".join(usable),
        "CPU module in use": f"{_native.start()} ({how})",
    }
    if dead := _native.dead_modules():
        facts["died in a trial"] = ", ".join(dead)
    for name, fact in facts.items():
        print(f"{name:18} {fact}")
    print(attention_table())


def attention_table() -> str:
    """What was measured on this machine, and what is chosen where both settings are automatic."""
    from . import _attention

    if not (measured := _attention.measured()):
        return "attention          not measured yet; the first load of a model does"
    lines = ["attention          on this machine, of a layer: µs for a token read + written"]
    for work, times in sorted(measured.items()):
        choices = list(times)
        own, best = choices[0], _attention.fastest(times, choices, work.n_ctx)
        gain = _attention.cost(times[own], work.n_ctx) / _attention.cost(times[best], work.n_ctx)
        seen = (f"{'+'.join(c)} {read:.1f} + {write:.0f}" for c, (read, write) in times.items())
        lines += [
            f"  heads of {work.head_dim} x {work.n_head}/{work.n_head_kv}, n_ctx {work.n_ctx},"
            f" threads {work.n_threads}: {'+'.join(best)},"
            f" {gain:.2f} times as fast as {'+'.join(own)}",
            f"    {', '.join(seen)}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
