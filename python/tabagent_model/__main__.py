"""On the terminal: `tabagent-model generate "a question"`, `serve`, `doctor`, `build-backend`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from . import Model, TabAgentModelError, _native
from .backends import _build
from .serve import listen

if TYPE_CHECKING:
    from .hardware import Cpu, Gpu, Machine, Memory


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
    examine = commands.add_parser("doctor", help="say what this installation runs on")
    examine.add_argument("model", nargs="?", help="a GGUF file: say also what it would take here")
    build = commands.add_parser("build-backend", help="compile what computes on this machine's GPU")
    _build.add_arguments(build)
    asked = parser.parse_args()
    try:
        if asked.command == "doctor":
            doctor(asked.model)
        elif asked.command == "serve":
            return listen.run(asked)
        elif asked.command == "build-backend":
            return _build.run(asked)
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


def doctor(model: str | None = None) -> None:
    from . import hardware

    core, machine = _native.core, hardware.detect()
    usable = [name for name, _ in core.cpu_modules(str(_native.LIBRARIES))]
    how = "named by TABAGENT_CPU_VARIANT" if "TABAGENT_CPU_VARIANT" in os.environ else "tried"
    facts = {
        "tabagent_model": core.__version__,
        "llama.cpp": core.LLAMA_CPP_VERSION,
        "processor": processor(machine.cpu),
        "CPU variant": core.get_cpu_variant(),
        "CPU modules": ", ".join(usable),
        "CPU module in use": f"{machine.cpu.module} ({how})",
        "memory": memory(machine.memory),
    }
    if dead := _native.dead_modules():
        facts["died in a trial"] = ", ".join(dead)
    if slow := hardware.why_slow():
        facts["slow"] = slow
    for number, gpu in enumerate(machine.gpus):
        facts[f"GPU {number}"] = gpu_line(gpu)
    for backend in _native.gpu_backends():
        verdict = backend.refused or f"in use for {', '.join(backend.devices)}"
        facts[f"{backend.kind} backend"] = f"{backend.library}: {verdict}"
    if machine.reason:
        facts["no GPU in use"] = machine.reason
    for name, fact in facts.items():
        print(f"{name:18} {fact}")
    print(attention_table())
    print(layouts_table())
    if model is not None:
        print(placement_table(model, machine))


def processor(cpu: Cpu) -> str:
    told = [cpu.name, f"{cpu.physical_cores} cores", f"{cpu.usable_cores} usable"]
    if cpu.quota is not None:
        told.append(f"a quota of {cpu.quota:g}")
    return ", ".join(told)


def memory(memory: Memory) -> str:
    from .hardware import shown

    told = f"{shown(memory.available)} of {shown(memory.total)} available"
    return told if memory.limit is None else f"{told}, limited to {shown(memory.limit)}"


def gpu_line(gpu: Gpu) -> str:
    from .hardware import shown

    told = [gpu.name or "unknown", f"{shown(gpu.free)} of {shown(gpu.total)} free"]
    if gpu.compute_capability is not None:
        told.append("SM {}.{}".format(*gpu.compute_capability))
    if gpu.driver is not None:
        told.append(f"driver {gpu.driver}")
    if gpu.is_unmatched:
        told.append("unmatched: others are like it")
    told.append(f"llama.cpp's {gpu.device}" if gpu.device else "llama.cpp cannot use it")
    return ", ".join(told)


def placement_table(model: str, machine: Machine) -> str:
    """What a model would take on this machine, and all the ways to load it, best first."""
    from . import placement

    rungs = placement.rungs_of(model, machine=machine)
    lines = [f"\n{model}", *(f"  {rung.told}" for rung in rungs)]
    chosen = next((rung for rung in rungs if rung.fits), rungs[0])
    return "\n".join([*lines, *(f"  {line}" for line in str(chosen.estimate).splitlines())])


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


def layouts_table() -> str:
    """What was measured on this machine of weights in a file, and of the same laid out anew."""
    from . import _layouts

    if not (measured := _layouts.measured()):
        return "layouts            not measured yet; the first load of a model does"
    lines = ["layouts            of 1 MiB of weights here: µs for a token read + written"]
    for work, times in sorted(measured.items()):
        gain = _layouts.cost(times.in_file) / _layouts.cost(times.anew)
        in_file, anew = (f"{read:.1f} + {write:.0f}" for read, write in times)
        lines.append(
            f"  {work.type}, threads {work.n_threads}: as in the file {in_file},"
            f" laid out anew {anew}, {gain:.2f} times as fast"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
