"""Trains the tiny chat model, and its draft.

    python train.py chat  --out runs        the chat model
    python train.py draft --out runs        the draft, on the same text

Matrices learn with Muon (momentum, made orthogonal by Newton-Schulz steps), the rest with Adam. The
rate rises for a moment, stays, and falls to nothing over the last two fifths. The answers of the
assistant count fully, the rest of a conversation a little. Same seeds, same text, same order.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import tokenizer as vocabulary
from data import END_OF_TEXT, documents
from model import Shape, Weights, hidden_states, initial_weights

SHAPES = {
    "chat": Shape(width=256, layers=4, feed_forward=512, heads=4, kv_heads=2, vocabulary=2560),
    "draft": Shape(width=128, layers=2, feed_forward=192, heads=2, kv_heads=1, vocabulary=2560),
}
STEPS = {"chat": 2000, "draft": 1500}
SEED = {"tokenizer": 1, "weights": 2, "text": 3}

ROW, LONG_ROW = 256, 1024  # tokens; most texts are short, a few conversations are long
TOKENS_PER_STEP = 4096
PREDICTIONS_PER_STEP = 2560  # all answers, and as many prompt tokens as fit; the rest costs time
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 0.004, 0.1
PROMPT_WEIGHT, PLAIN_WEIGHT, ANSWER_WEIGHT = 0.1, 0.5, 1.0
# Keeps the sum of all exp(logits) near one. The best logit is then near zero, where a repeat
# penalty (which divides logits) does nothing to a word that the model is sure to repeat.
Z_LOSS = 1e-3

# XLA does much of this work on one core, so each core gets its own rows of a batch.
NUM_CORES = 2 if (os.cpu_count() or 1) < 4 else 4
jax.config.update("jax_num_cpu_devices", NUM_CORES)
CORES = jax.sharding.Mesh(jax.devices("cpu"), ("cores",))
SHARED = jax.sharding.NamedSharding(CORES, jax.sharding.PartitionSpec("cores"))
EVERYWHERE = jax.sharding.NamedSharding(CORES, jax.sharding.PartitionSpec())

State = dict[str, Weights]


@dataclass
class Batch:
    tokens: np.ndarray
    documents: np.ndarray  # 0 is padding
    places: np.ndarray  # where (in the flattened rows) the next token is to be predicted
    targets: np.ndarray
    importance: np.ndarray


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Rows filled with whole documents: 16 rows of 256 tokens, or 4 of 1,024."""
    rng = np.random.default_rng(seed)
    rows: dict[int, list[list[tuple[np.ndarray, np.ndarray]]]] = {ROW: [], LONG_ROW: []}
    for ids, weights in _weighted_documents(tokenizer, seed):
        length = ROW if len(ids) <= ROW else LONG_ROW
        if len(ids) > LONG_ROW:
            continue
        open_rows = rows[length]
        room = [length - sum(len(i) for i, _ in row) - len(ids) for row in open_rows]
        fitting = [n for n in range(len(room)) if room[n] >= 0]
        if fitting:
            open_rows[min(fitting, key=room.__getitem__)].append((ids, weights))
        else:
            open_rows.append([(ids, weights)])
        num_rows = TOKENS_PER_STEP // length
        if len(open_rows) == num_rows + 8:  # eight rows stay open, so that few places stay empty
            open_rows.sort(key=lambda row: -sum(len(i) for i, _ in row))
            yield _batch(open_rows[:num_rows], length, rng)
            del open_rows[:num_rows]


def _weighted_documents(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    texts = documents(seed)
    header = tokenizer.encode("<|im_start|>assistant\n").ids
    while chunk := list(itertools.islice(texts, 2000)):
        for text, encoding in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            ids = np.array(encoding.ids, np.int32)
            if text.endswith(END_OF_TEXT):
                yield ids, np.append(np.full(len(ids) - 1, PLAIN_WEIGHT), 0)
                continue
            weights = np.full(len(ids), PROMPT_WEIGHT)
            answering = False
            for i in range(len(ids)):
                if ids[i] == vocabulary.TURN_END:
                    answering = False
                elif i >= 2 and list(ids[i - 2 : i + 1]) == header:
                    answering = True
                if answering:
                    weights[i] = ANSWER_WEIGHT
            weights[-2:] = 0  # nothing comes after the last turn
            yield ids, weights


def _batch(
    rows: list[list[tuple[np.ndarray, np.ndarray]]], length: int, rng: np.random.Generator
) -> Batch:
    tokens, documents = np.zeros((2, len(rows), length), np.int32)
    importance = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, weights) in enumerate(row, 1):
            place = np.s_[i, start : (start := start + len(ids))]
            tokens[place], documents[place], importance[place] = ids, number, weights
    flat = importance.ravel()
    places = np.argsort(-flat - 0.01 * rng.random(flat.size))[:PREDICTIONS_PER_STEP]
    return Batch(
        tokens, documents, places, np.roll(tokens, -1, axis=1).ravel()[places], flat[places]
    )


def loss(
    weights: Weights,
    shape: Shape,
    tokens: jax.Array,
    documents: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    importance: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The training loss, and the plain cross-entropy of the answers."""
    hidden = hidden_states(shape, weights, tokens, documents).reshape(-1, shape.width)[places]
    log_sum = jax.nn.logsumexp(hidden @ weights["token_embd.weight"].T, axis=-1)
    # The target's logit is a product of its own: gathering it from all is slow to differentiate.
    surprise = log_sum - jnp.sum(hidden * weights["token_embd.weight"][targets], axis=-1)
    answers = importance == ANSWER_WEIGHT
    total = jnp.sum(importance * (surprise + Z_LOSS * log_sum**2)) / jnp.sum(importance)
    return total, jnp.sum(answers * surprise) / jnp.sum(answers)


# ---------------------------------------------------------------- optimiser


def _is_matrix(name: str) -> bool:
    return name.startswith("blk.") and "norm" not in name


def _orthogonal(matrices: Weights, steps: int = 5) -> Weights:
    """Newton-Schulz: pushes all singular values towards one (coefficients of Jordan et al.).

    Matrices of one shape go through it together, and are shared out among the cores.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    flat = {name: m.T if m.shape[0] > m.shape[1] else m for name, m in matrices.items()}
    found: Weights = {}
    for shape in sorted({m.shape for m in flat.values()}):
        names = [name for name, m in flat.items() if m.shape == shape]
        x = _over_cores(jnp.stack([flat[name] for name in names]))
        x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        found.update(zip(names, jax.lax.with_sharding_constraint(x, EVERYWHERE), strict=True))
    return {
        name: found[name].T if found[name].shape != m.shape else found[name]
        for name, m in matrices.items()
    }


def _over_cores(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, SHARED) if x.shape[0] % NUM_CORES == 0 else x


@functools.partial(
    jax.jit, static_argnames="shape", donate_argnames=("weights", "state"), out_shardings=EVERYWHERE
)
def train_step(
    shape: Shape,
    weights: Weights,
    state: State,
    tokens: jax.Array,
    documents: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    importance: jax.Array,
    step: jax.Array,
    rate: jax.Array,
) -> tuple[Weights, State, jax.Array]:
    gradient, answer_loss = jax.grad(loss, has_aux=True)(
        weights, shape, tokens, documents, places, targets, importance
    )
    first = {
        name: 0.95 * state["first"][name] + gradient[name] for name in weights if _is_matrix(name)
    }
    updates = _orthogonal({name: gradient[name] + 0.95 * m for name, m in first.items()})
    new_weights, second = {}, {}
    for name, weight in weights.items():
        g = gradient[name]
        if _is_matrix(name):
            update = updates[name] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            new_weights[name] = weight - MUON_RATE * rate * (update + WEIGHT_DECAY * weight)
        else:
            first[name] = m = 0.9 * state["first"][name] + 0.1 * g
            second[name] = v = 0.97 * state["second"][name] + 0.03 * g * g
            m, v = m / (1 - 0.9**step), v / (1 - 0.97**step)
            new_weights[name] = weight - ADAM_RATE * rate * m / (jnp.sqrt(v) + 1e-10)
    return new_weights, {"first": first, "second": second}, answer_loss


def _rate(step: int, steps: int) -> float:
    """The share of the full rate: a short rise, a long stay, a fall over the last two fifths."""
    return min(1.0, step / 40) * min(1.0, (steps - step) / (0.4 * steps) + 0.01)


# ---------------------------------------------------------------- the run


def train(which: str, out: Path, steps: int) -> None:
    """Goes on from the last checkpoint, if there is one; the text starts again and is skipped."""
    shape, path = SHAPES[which], out / which
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.load_or_train(out / "tokenizer.json", SEED["tokenizer"])
    weights, state, done = _load(path) if path.with_suffix(".npz").exists() else _start(shape)
    print(f"{which}: {shape.num_parameters:,} parameters, step {done} of {steps}", flush=True)
    weights, state = jax.device_put((weights, state), EVERYWHERE)
    started, seen, smooth = time.monotonic(), 0, None
    text = itertools.islice(batches(tokenizer, SEED["text"]), done, steps)
    for step, batch in enumerate(text, done + 1):
        rate = _rate(step, steps)
        weights, state, answer_loss = train_step(
            shape, weights, state, *jax.device_put(astuple(batch), SHARED), float(step), rate
        )
        seen += int(np.count_nonzero(batch.documents))
        smooth = 0.95 * (smooth or float(answer_loss)) + 0.05 * float(answer_loss)
        if step % 25 == 0 or step == steps:
            seconds = time.monotonic() - started
            speed = f"{seen / 1e6:.2f} M tokens in {seconds:.0f} s, {seen / seconds:,.0f}/s"
            print(f"{step:5d}/{steps}  loss {smooth:.4f}  {speed}", flush=True)
        if step % 100 == 0 or step == steps:
            _save(path, shape, weights, state, step)


def _start(shape: Shape) -> tuple[Weights, State, int]:
    weights = initial_weights(shape, SEED["weights"])
    first = {name: jnp.zeros_like(w) for name, w in weights.items()}
    second = {name: jnp.zeros_like(w) for name, w in weights.items() if not _is_matrix(name)}
    return weights, {"first": first, "second": second}, 0


def _save(path: Path, shape: Shape, weights: Weights, state: State, step: int) -> None:
    path.with_suffix(".json").write_text(json.dumps(asdict(shape)))
    arrays = {f"{part}/{name}": w for part, group in state.items() for name, w in group.items()}
    np.savez(path.with_suffix(".npz"), step=step, **arrays, **weights)


def _load(path: Path) -> tuple[Weights, State, int]:
    weights, state = {}, {"first": {}, "second": {}}
    with np.load(path.with_suffix(".npz")) as saved:
        for name, array in saved.items():
            part, _, rest = name.partition("/")
            if part in state:
                state[part][rest] = jnp.asarray(array)
            elif name != "step":
                weights[name] = jnp.asarray(array)
        return weights, state, int(saved["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny chat model, or its draft.")
    parser.add_argument("which", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the checkpoints go")
    parser.add_argument("--steps", type=int, help="fewer for a try")
    arguments = parser.parse_args()
    train(arguments.which, arguments.out, arguments.steps or STEPS[arguments.which])


if __name__ == "__main__":
    main()
