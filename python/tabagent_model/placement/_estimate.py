"""How much memory a model will take, from its file's header alone.

What is exact: the weights, and the keys and values of ordinary attention. What is a formula,
fitted to what llama.cpp reserves (`tests/real/test_estimate.py` compares): the buffers it computes
in, and what the vocabulary takes. What is too much rather than too little: hybrid models, for which
every layer is counted as if it had attention and a state, and latent attention.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .. import _core
from ..errors import InvalidRequestError
from ..hardware import MIB, Gpu, Machine, shown

if TYPE_CHECKING:
    from ..params import ModelConfig

ROWS = 512
PLAIN_ROWS = 128
"""Rows that llama.cpp computes in one go, at most; on a CPU without flash attention."""
BYTES_PER_WORD = 160
"""Of a token, and of a merge: llama.cpp keeps both as text in several tables."""
BYTES_OF_BOOKKEEPING = 12 * MIB
"""Graphs, threads and what else comes with a context, whatever its size."""

KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Share:
    """What one model takes on one device, in bytes."""

    device: str
    """`cpu`, or llama.cpp's name of a GPU."""
    weights: int = 0
    """Of its own: copied there, or laid out anew."""
    mapped: int = 0
    """Pages of the model file. They are shared with others who opened it, and the kernel takes them
    back when it needs them."""
    kv: int = 0
    """Keys and values of all sequences, and the states of recurrent layers."""
    compute: int = 0
    other: int = 0
    """The vocabulary and the bookkeeping."""
    draft: int = 0
    """All that a smaller model takes that guesses ahead for this one, but its file's pages."""
    cache: int = 0
    """The prompt cache: in an estimate how large it may grow, in the ledger how large it is."""

    @property
    def needed(self) -> int:
        """What must be free for it to be loaded: all but the mapped pages and the prompt cache."""
        return self.weights + self.kv + self.compute + self.other + self.draft

    @property
    def own(self) -> int:
        """What comes back when it is unloaded."""
        return self.needed + self.cache


@dataclass(frozen=True)
class Estimate:
    """A model as it would be loaded, and what it takes on each device, the CPU first."""

    gpu_layers: int
    n_ctx: int
    max_parallel: int
    flash_attn: str
    kv_type: str
    is_repacked: bool
    """Weights on the CPU are laid out anew, where it has another layout for them."""
    shares: tuple[Share, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Where layers lie."""
        return tuple(s.device for s in self.shares if s.device != "cpu") or ("cpu",)

    @property
    def needed(self) -> int:
        return sum(share.needed for share in self.shares)

    @property
    def needs(self) -> dict[str, int]:
        """What must be free on each device."""
        return {share.device: share.needed for share in self.shares}

    def on(self, device: str) -> Share:
        found = (share for share in self.shares if share.device == device)
        return next(found, Share(device))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.gpu_layers} layers on a GPU, {self.max_parallel} x {self.n_ctx} tokens in"
            f" {self.kv_type}, flash attention {self.flash_attn}"
        ]
        for share in self.shares:
            parts = {
                "weights": share.weights,
                "mapped": share.mapped,
                "keys and values": share.kv,
                "compute": share.compute,
                "other": share.other,
                "draft model": share.draft,
                "prompt cache up to": share.cache,
            }
            told = ", ".join(f"{name} {shown(size)}" for name, size in parts.items() if size)
            lines.append(f"{share.device}: needs {shown(share.needed)} ({told})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Wish:
    """What one try to load a model asks for; the estimate settles what is still open."""

    gpu_layers: int
    n_ctx: int
    kv_type: str
    gpus: tuple[Gpu, ...] = ()
    """Those to use, in the order of llama.cpp."""


class Header:
    """What a model file says about itself, read once for all rungs of a ladder."""

    def __init__(self, path: str) -> None:
        self.file = _core.ModelFile(path)
        self.facts, self.sizes = self.file.description(), self.file.sizes()

    @property
    def n_layers(self) -> int:
        """All that can go to a GPU: the layers, and the output as one more."""
        return len(self.sizes["layers"]) + 1


def estimate_of(
    header: Header, config: ModelConfig, machine: Machine, wish: Wish, *, may_measure: bool = False
) -> Estimate:
    """What loading the file so would take on that machine."""
    return _Estimating(header, config, machine, wish).settle(may_measure)


class _Estimating:
    def __init__(self, header: Header, config: ModelConfig, machine: Machine, wish: Wish) -> None:
        self.config, self.machine, self.wish = config, machine, wish
        self.file, self.facts, self.sizes = header.file, header.facts, header.sizes
        self.layers = self.sizes["layers"]
        self.gpu_layers = min(wish.gpu_layers, len(self.layers) + 1) if wish.gpus else 0
        self.splits = self._splits()

    def settle(self, may_measure: bool) -> Estimate:
        is_repacked = self._is_repacked(may_measure)
        weights = self._weights(is_repacked)
        free = self._free_for_context(weights)
        flash_attn, kv_type = self._attention(free, may_measure)
        settings = self._settings(flash_attn, kv_type)
        n_ctx, _ = self.file.fit(settings)
        max_parallel, _, cache = self.file.plan(settings, free)
        estimate = Estimate(
            self.gpu_layers, n_ctx, max_parallel, flash_attn, kv_type, is_repacked, ()
        )
        shares = []
        for at, share in enumerate(weights):
            is_cpu = at == 0
            shares.append(
                replace(
                    share,
                    kv=self._kv(at, estimate),
                    compute=self._compute(at, estimate),
                    other=self._vocabulary() if is_cpu else 0,
                    cache=cache if is_cpu else 0,
                )
            )
        return replace(estimate, shares=tuple(shares))

    # Where what lies: 0 is the CPU, 1 the first GPU of the wish, …

    def _place(self, layer: int) -> int:
        """Of a layer; the output is the one behind the last. llama.cpp fills GPUs from the end."""
        begin = len(self.layers) + 1 - self.gpu_layers
        if layer < begin:
            return 0
        return 1 + bisect_right(self.splits, (layer - begin) / self.gpu_layers)

    def _splits(self) -> list[float]:
        """Where the part of each GPU ends, but for the last one's."""
        gpus = self.wish.gpus
        shares = list(self.config.tensor_split)[: len(gpus)]
        if not any(shares):
            shares = [float(gpu.free or 0) for gpu in gpus]
        if not any(shares):
            shares = [1.0] * len(gpus)
        shares += [0.0] * (len(gpus) - len(shares))
        return [end / sum(shares) for end in accumulate(shares)][:-1]

    def _parts(self, place: int) -> list[Mapping[str, Any]]:
        parts = [part for at, part in enumerate(self.layers) if self._place(at) == place]
        if self._place(len(self.layers)) == place:
            parts.append(self.sizes["output"])
        return [self.sizes["input"], *parts] if place == 0 else parts

    # What it takes

    def _weights(self, is_repacked: bool) -> list[Share]:
        shares = [self._cpu_weights(is_repacked)]
        for at, gpu in enumerate(self.wish.gpus if self.gpu_layers else (), start=1):
            taken = sum(part["bytes"] for part in self._parts(at))
            shares.append(Share(gpu.device or "gpu", weights=taken))
        return shares

    def _cpu_weights(self, is_repacked: bool) -> Share:
        parts = self._parts(0)
        layouts = self.machine.cpu.layouts if is_repacked else {}
        sizes = self._relaid_sizes() if is_repacked else {}
        anew = sum(size * layouts[kind] for kind, size in sizes.items())
        moved = sum(sizes.values())
        mapped = sum(part["bytes"] for part in parts)
        if self.sizes["output"] in parts:
            mapped -= self.sizes["shared_bytes"]  # the embedding, counted twice
            is_anew = any(kind in layouts for kind in self.sizes["output"]["matrices"])
            moved -= self.sizes["shared_bytes"] if is_anew else 0
        if self.config.use_mmap:
            return Share("cpu", weights=int(anew), mapped=mapped - moved)
        return Share("cpu", weights=int(anew) + mapped - moved)

    def _relaid_sizes(self) -> dict[str, int]:
        """Bytes on the CPU for which it has another layout, by their types."""
        sizes: Counter[str] = Counter()
        for part in self._parts(0):
            sizes.update(part["matrices"])
        return {kind: size for kind, size in sizes.items() if kind in self.machine.cpu.layouts}

    def _is_repacked(self, may_measure: bool) -> bool:
        """As it is loaded then: what was measured is of this machine, and others have the rule."""
        from .. import _layouts

        if isinstance(self.config.repack, bool):
            return self.config.repack
        cpu = self.machine.cpu
        built_in = not (cpu.keeps_k_quants and "_K" in self.facts["quantization"])
        sizes = self._relaid_sizes()
        if not sizes or cpu.name != _this_processor():
            return built_in
        _, n_threads = self.file.fit(self._settings("auto", "auto"))
        return _layouts.choose(
            sizes, n_threads, built_in, may_measure=may_measure, module=cpu.module
        )

    def _free_for_context(self, weights: list[Share]) -> int | None:
        """What is left when the weights are there: on the CPU, or where it is tightest."""
        left = []
        for share in weights:
            free = self.machine.free_on(share.device)
            if free is not None:
                left.append(max(0, free - share.weights))
        return min(left, default=None)

    def _settings(self, flash_attn: str, kv_type: str) -> dict[str, Any]:
        config = self.config
        return {
            "n_ctx": self.wish.n_ctx,
            "n_batch": config.n_batch,
            "n_threads": config.n_threads,
            "n_seq_max": config.max_parallel,
            "prompt_cache_mb": config.prompt_cache_mb,
            "flash_attn": flash_attn,
            "kv_type": kv_type,
        }

    def _attention(self, free: int | None, may_measure: bool) -> tuple[str, str]:
        """As the context will choose it (`rust/src/context/attention.rs`)."""
        from .. import _attention

        wished = (self.config.flash_attn, self.wish.kv_type)
        settings = self._settings(*wished)
        found = self.file.attention(settings, self.gpu_layers, free)
        if found is None:
            return wished[0], "f16" if wished[1] == "auto" else wished[1]
        work, choices, built_in = found
        module = self.machine.cpu.module
        return _attention.choose(work, choices, built_in, may_measure=may_measure, module=module)

    def _kv(self, place: int, estimate: Estimate) -> int:
        cells = _padded(estimate.n_ctx) * estimate.max_parallel
        values = (part["kv_values"] for part in self._parts(place))
        states = self.sizes["state_bytes_per_sequence"] * estimate.max_parallel
        share = len(self._parts(place)) / (len(self.layers) + 2)
        return int(sum(values) * KV_BYTES[estimate.kv_type] * cells + states * share)

    def _compute(self, place: int, estimate: Estimate) -> int:
        """The buffer for one pass of `n_batch` rows.

        What lives at the same time is counted, as numbers of 4 bytes: the residual stream and what
        is made of it in the widest place of a layer. That is its feed-forward part, or attention
        with all its scores, which only flash attention does without.
        """
        facts, sizes = self.facts, self.sizes
        cells = _padded(estimate.n_ctx)
        is_flash = estimate.flash_attn != "off"
        most = ROWS if is_flash or estimate.gpu_layers else max(PLAIN_ROWS, estimate.max_parallel)
        rows = min(self.config.n_batch, most, cells * estimate.max_parallel)
        width: int = facts["n_embd"]
        heads: int = facts["n_head"]
        query: int = heads * sizes["head_dim_k"]
        keys: int = facts["n_head_kv"] * (sizes["head_dim_k"] + sizes["head_dim_v"])
        scores = 0 if is_flash else cells * heads
        attention = 3 * width + 3 * query + keys + scores
        forward: int = 5 * width + 3 * sizes["n_ff"]
        mask = cells * (2 if is_flash else 4)
        logits: int = 4 * facts["n_vocab"] * estimate.max_parallel
        if place == 0 and self.gpu_layers > len(self.layers):
            return rows * (mask + 4 * width) + logits  # what goes to the GPU, and what comes back
        return max(rows * 4 * max(attention, forward), logits) + rows * mask

    def _vocabulary(self) -> int:
        has_words = self.facts["tokenizer"] != "none"
        words: int = self.facts["n_vocab"] + self.sizes["n_merges"] if has_words else 0
        return words * BYTES_PER_WORD + BYTES_OF_BOOKKEEPING


@functools.cache
def _this_processor() -> str:
    name: str = _core.detect_cpu()["brand"]
    return name


def _padded(n_ctx: int) -> int:
    return -(-n_ctx // 256) * 256


def checked_machine(machine: object) -> Machine:
    if not isinstance(machine, Machine):
        message = f"`machine` must be a Machine, got a {type(machine).__name__}"
        hint = "make one with `hardware.detect()` or `Machine.from_dict()`"
        raise InvalidRequestError(message, hint=hint, name="machine")
    return machine
