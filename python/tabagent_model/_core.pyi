"""The native core: llama.cpp behind plain values.

Everything here is callable from any thread; whatever takes time lets go of the GIL.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypedDict, final, type_check_only

from typing_extensions import Self

__all__ = [
    "ENGINE",
    "LLAMA_CPP_VERSION",
    "ChatParser",
    "ChatPrompt",
    "Event",
    "ModelFile",
    "PyContext",
    "PyModel",
    "Wire",
    "__version__",
    "_inject",
    "cpu_modules",
    "detect_cpu",
    "detect_gpus",
    "get_cpu_variant",
    "get_optimal_binary",
    "inspect_gguf",
    "keep_last_line",
    "kernels",
    "list_devices",
    "load_gpu_backend",
    "measure_attention",
    "measure_layouts",
    "memory_info",
    "probe_cpu_module",
    "probe_gpu_backend",
    "process_rss_mb",
    "put_log",
    "start",
    "stop_log",
    "take_log",
    "weight_layouts",
]
__version__: str
LLAMA_CPP_VERSION: str
ENGINE: str
"""What a backend must have been built from to be loaded: crate, commit and backend API."""

@final
class PyModel:
    """Weights and vocabulary of one GGUF file."""

    def __init__(self) -> None: ...
    def load(
        self,
        model_path: str | None = None,
        *,
        dll_path: str | None = None,
        gpu_layers: int = 0,
        mlock: bool = False,
        mmap: bool = True,
        main_gpu: int = 0,
        vocab_only: bool = False,
        split_mode: Literal["none", "layer", "row"] = "layer",
        progress: Callable[[float], bool | None] | None = None,
        library_path: str | None = None,
        n_gpu_layers: int | None = None,
        use_mlock: bool | None = None,
        repack: bool | None = None,
        tensor_split: Sequence[float] | None = None,
        file: ModelFile | None = None,
    ) -> None:
        """Read a model file. `progress` gets 0.0 to 1.0; returning False stops the load.

        `repack` lays weights out anew for the CPU; None: by the built-in rule. `tensor_split` says
        how much of the model each GPU gets, in any unit; None: by their free memory. `file` is the
        header of this file, where it was just read, so that it need not be read again.

        `dll_path` and `library_path` are accepted for old callers and ignored: the package brings
        its own llama.cpp.
        """
    def unload(self, timeout: float = 5.0) -> UnloadReport:
        """End running requests, free contexts, then weights. A second call does nothing."""
    @property
    def is_loaded(self) -> bool: ...
    @property
    def path(self) -> str: ...
    @property
    def gpu_layers(self) -> int:
        """How many layers really lie on a GPU."""
    @property
    def device(self) -> str:
        """`cpu`, or the name of the GPU that holds layers."""
    @property
    def is_repacked(self) -> bool:
        """Weights may lie in another layout than the file's, where the CPU has one for them."""
    @property
    def load_time_ms(self) -> float: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def n_params(self) -> int: ...
    def vocab_size(self) -> int: ...
    def context_train_size(self) -> int: ...
    def embedding_dim(self) -> int: ...
    def layer_count(self) -> int: ...
    def token_bos(self) -> int:
        """The id of the begin-of-text token, -1 if the model has none; so for the other two."""
    def token_eos(self) -> int: ...
    def token_nl(self) -> int: ...
    def is_eog(self, token: int) -> bool: ...
    def metadata(self) -> dict[str, str]: ...
    def model_info(self) -> dict[str, Any]:
        """The same as `inspect_gguf` of its file."""
    def chat_template(self) -> str | None: ...
    def render_chat(
        self,
        messages: str,
        add_generation_prompt: bool = True,
        template: str | None = None,
        options_json: str | None = None,
    ) -> ChatPrompt:
        """A conversation, as JSON text of messages in OpenAI's shape, in the model's own template.

        `template` is the text of another one, or the name of another one of the model's. A template
        that fails, or uses more time, memory or recursion than a template needs, is refused with
        TemplateError.

        `options_json` is the text of an object with any of `tools` (in OpenAI's shape),
        `tool_choice` ("auto", "none" or "required"), `parallel_tool_calls`, `enable_thinking`,
        `reasoning_format`, `chat_template_kwargs` and `continue_final_message`.
        """
    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Text to ids. Control tokens written in `text` stay plain text unless `special`."""
    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str: ...
    def token_to_bytes(self, token: int, special: bool = False) -> bytes: ...
    def create_context(
        self,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_threads: int = 0,
        *,
        n_seq_max: int = 0,
        queue_size: int = 1024,
        prompt_cache_mb: int = ...,
        flash_attn: Literal["auto", "on", "off"] = "auto",
        kv_type: Literal["auto", "f16", "bf16", "f32", "q8_0"] = "auto",
        offload_kqv: bool = True,
        warmup: bool = True,
    ) -> PyContext:
        """A llama.cpp context with an owner thread of its own.

        Each of its `n_seq_max` sequences (0: as many as the memory suggests, at most 8) has room
        for `n_ctx` tokens, at most what the model was trained with. `n_threads=0` means the
        physical cores this process may use, at most 8. `auto` for `flash_attn` or `kv_type` means
        what was measured to be the fastest on this CPU, and on a GPU what llama.cpp chooses.
        """
    def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 100, **sampling: Any
    ) -> str: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

@final
class ChatPrompt:
    """A conversation as the model reads it."""

    @property
    def text(self) -> str: ...
    @property
    def stops(self) -> list[str]:
        """Strings that end an answer, as the template demands it."""
    @property
    def preserved_tokens(self) -> list[int]:
        """Control tokens that are part of an answer's text."""
    @property
    def constraint(self) -> dict[str, Any] | None:
        """What keeps tool calls in their form: `syntax`, `text`, `lazy`, `triggers` (each with
        `type`, `value` and perhaps `token`), and `prefix`: what of it stands in the prompt already.
        """
    @property
    def thinking(self) -> tuple[str, str] | None:
        """The tags around what the model thinks."""
    @property
    def is_thinking(self) -> bool:
        """The prompt ends between these tags."""
    @property
    def is_plain(self) -> bool:
        """An answer is content and nothing else."""
    def parser(self, patience: int = 50) -> ChatParser:
        """Reads one answer. It reads the whole of it each time, so it does so again only when
        `patience` times as long has passed as the last time took, and at the end."""
    def tokens(self, after: str | None = None, limit: int | None = None) -> list[int] | None:
        """The ids of the prompt, or of what follows after this beginning; None if it has another.

        The template's control text becomes control tokens; the same text in a message does not.
        What cannot have fewer than `limit` ids is refused at once.
        """

@final
class ChatParser:
    """Answer → content, reasoning and tool calls, while it is being written."""

    def feed(self, text: str) -> list[tuple[Any, ...]]:
        """More of the answer. What comes back is certain; what may still change is held back.

        Each is ("content", text), ("reasoning", text), or ("tool_call", index, id, name, a piece of
        the arguments), with the id and the name in the first piece of each call only.
        """
    def finish(self, is_complete: bool = True) -> tuple[list[tuple[Any, ...]], Message]:
        """The rest, and all of it: the deltas together are the message. `is_complete`: the model
        ended the answer itself."""

@type_check_only
class Message(TypedDict):
    """An answer as its template means it."""

    content: str
    reasoning: str
    tool_calls: list[dict[str, str]]
    """Each with `id`, `name` and `arguments`, which is JSON text."""
    error: str | None
    """Why the parts are not what the model meant, if they are not."""

@final
class ModelFile:
    """A model file's header, and what a context of the model would come to.

    `settings` are those of `create_context` that decide about memory, by their names; `free` is the
    main memory that may be used, None if nobody knows.
    """

    def __new__(cls, path: str) -> Self: ...
    def description(self) -> dict[str, Any]:
        """The same as `inspect_gguf`."""
    def sizes(self) -> dict[str, Any]:
        """What its memory is made of: `input`, `layers` and `output`, each with bytes, matrices
        (the bytes of those that can be laid out anew, by type) and kv_values (of a token)."""
    def attention(
        self, settings: dict[str, Any], gpu_layers: int, free: int | None
    ) -> tuple[tuple[int, int, int, int, int], list[tuple[str, str]], tuple[str, str]] | None:
        """What is open about attention: what it depends on, the choices, and the one to take
        without a measurement. None: nothing is, or it is llama.cpp's to choose."""
    def plan(self, settings: dict[str, Any], free: int | None) -> tuple[int, int, int]:
        """The number of sequences, their bytes, and those of the prompt cache at most."""
    def fit(self, settings: dict[str, Any]) -> tuple[int, int]:
        """Tokens of a sequence, and threads."""

@type_check_only
class UnloadReport(TypedDict):
    """What came back: the process's resident memory around the unload."""

    was_loaded: bool
    rss_before_mb: float | None
    rss_after_mb: float | None
    freed_mb: float | None

@final
class PyContext:
    """One llama.cpp context, its owner thread, and the requests that run in it together."""

    def submit(
        self,
        request_id: int,
        prompt: str | Sequence[int],
        params: Mapping[str, Any],
        chat: ChatPrompt | None = None,
        patience: int = 50,
    ) -> None:
        """Hand a request to the owner thread. The answer to a `chat` is read as its template means
        it, once whenever `patience` times as long has passed as that took the last time.

        `params` has the fields of GenerationConfig; a missing one has its default, an unknown one
        is refused. What is wrong with the request is raised here, before it is queued.

        Instead of one of its four constraints there may be `constraint`, a mapping of `syntax`
        (`json_schema`, `regex`, `lark` or `gbnf`) and `text`, and maybe of `after`, a text behind
        which it begins, or of `lazy` and `triggers`: then it begins when one of them comes, a
        mapping of `type` (`word`, `pattern`, `pattern_full` or `token`) and `value` or `token`.
        `preserved_tokens` are ids of control tokens that are written out in the answer's text.
        """
    def abort(self, request_id: int) -> None:
        """Ask for the end of a request; its last event says `cancelled`. Unknown ids are fine."""
    def next_events(self) -> list[Event]:
        """Sleep until a step has produced something. An empty list means that it is closed."""
    def tell_through(self, wire: Wire) -> None:
        """From now on, events that are text and tokens only go through `wire` as soon as they are
        there, and not to `next_events`. Not on Windows."""
    def check_thread(self) -> None:
        """Raise ModelBusyError in a logits hook, which must not wait for its own model."""
    def close(self) -> None:
        """End every request with a last event, free the context, wake `next_events`."""
    @property
    def is_closed(self) -> bool: ...
    @property
    def n_ctx(self) -> int:
        """How many tokens one sequence can hold."""
    @property
    def n_batch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def flash_attn(self) -> Literal["auto", "on", "off"]:
        """As it computes; `auto` where llama.cpp decides."""
    @property
    def kv_type(self) -> Literal["f16", "bf16", "f32", "q8_0"]: ...
    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str: ...
    def token_to_text(self, token: int) -> str: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 512,
        *,
        callback: Callable[[str], bool | None] | None = None,
        **sampling: Any,
    ) -> str:
        """Submit one request and wait for its text. `callback` gets the pieces; False stops."""
    def _inject_panic(self) -> None:
        """For tests: the next step that computes something panics."""
    def _inject_hang(self) -> None:
        """For tests: the next step that computes something never ends."""
    def pulse(self) -> tuple[int, bool]:
        """A number that grows as long as the engine gets on, and whether it has work to do."""
    def metrics(self) -> dict[str, Any]:
        """Counters, and for each `…_s` a distribution with `count`, `sum` and `buckets`."""
    def memory(self) -> list[dict[str, Any]]:
        """What llama.cpp allocated for it and for the weights, of each kind of memory: device,
        in_ram, is_mapped (pages of the file), and bytes of weights, context and compute."""
    def slots(self) -> list[dict[str, int | None]]:
        """Of each slot: request_id, held_tokens, prompt_tokens, cached_tokens, generated_tokens."""
    def unpin(self, request_id: int) -> None:
        """What a request with `pin` has put into the prompt cache may go from now on."""
    def export_state(self, tokens: Sequence[int]) -> bytes | None:
        """What is computed of the longest beginning of `tokens` that a slot holds."""
    def import_state(self, data: bytes, tokens: Sequence[int]) -> int:
        """Put an exported state into the prompt cache; how many of `tokens` it holds, 0 if there
        is no room for it. A state of another model or of other settings is refused."""

@final
class Wire:
    """A worker's end of the socket to its parent, for threads of Python and of the engine. Not on
    Windows."""

    def __new__(cls, socket: int) -> Self:
        """Over a socket that somebody else owns and closes."""
    def send(self, parts: list[bytes]) -> None:
        """All parts, and nothing of anybody else between them."""

@final
class Event:
    """News of one request. Every request gets exactly one event with `is_last`."""

    @property
    def request_id(self) -> int: ...
    @property
    def text(self) -> str:
        """Whole characters only; empty while one is incomplete or a stop string may begin."""
    @property
    def tokens(self) -> list[int]:
        """The ids sampled since the last event, without the end-of-generation token."""
    @property
    def is_last(self) -> bool: ...
    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled", "error"] | None: ...
    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
    @property
    def error(self) -> Exception | None:
        """An exception of tabagent_model.errors, when `finish_reason` is `error`."""
    @property
    def stats(self) -> dict[str, float] | None:
        """With the last event: prompt_tokens, cached_tokens, dropped_tokens, generated_tokens,
        seed, n_ctx, and in milliseconds from submit: queue_ms, prompt_ms, first_token_ms,
        decode_ms, total_ms; between one token and the next gap_p50_ms and gap_p99_ms."""
    @property
    def read(self) -> tuple[list[tuple[Any, ...]], dict[str, Any] | None] | None:
        """If a chat was submitted: what is new of its answer as the template means it, as of
        `ChatParser.feed`; and with the last event all of it, as of `ChatParser.finish`."""
    @property
    def logprobs(self) -> list[tuple[tuple[int, str, float], list[tuple[int, str, float]]]]:
        """If they were asked for: for each token its id, text and logprob, and those of the
        likeliest in its place."""

def inspect_gguf(path: str) -> dict[str, Any]:
    """Check a model file without loading it, and describe it."""

def start(folder: str, module: str) -> None:
    """Load the CPU module `module` from `folder` and start llama.cpp; once per process."""

def cpu_modules(folder: str) -> list[tuple[str, int]]:
    """The CPU modules in `folder` that this machine can run, best first, with their scores."""

def probe_cpu_module(folder: str, module: str) -> None:
    """Multiply a matrix of each weight type on that module; for a throw-away child process."""

def load_gpu_backend(library: str | PathLike[str]) -> list[str]:
    """Load one more backend for good, and name the devices that it brought. `start` comes first,
    and the library must have been built from what `ENGINE` names."""

def probe_gpu_backend(library: str | PathLike[str]) -> None:
    """Load it and multiply on each of its devices; for a throw-away child process."""

def measure_attention(
    head_dim: int, n_head: int, n_head_kv: int, n_ctx: int, n_threads: int
) -> dict[tuple[str, str], tuple[float, float]] | None:
    """Time one layer on the CPU, in about a second at most. None: the machine was busy.

    By `flash_attn` and `kv_type`: microseconds for a token of a prompt, and for one of the answer.
    """

def measure_layouts(
    types: list[str], n_threads: int
) -> dict[str, tuple[tuple[float, float], tuple[float, float]]] | None:
    """Time products on the CPU in less than half a second. None: the machine was busy.

    By the type of the weights, as they lie in a file and laid out anew: microseconds of a mebibyte
    of them for a token of a prompt, and for one of the answer. Types with no other layout are left
    out.
    """

def take_log() -> list[tuple[Literal["debug", "info", "warning", "error"], str]]:
    """Sleep until llama.cpp has logged something, and take it. An empty list: shutting down."""

def put_log(level: str, line: str) -> None:
    """Add a line, of another process, to what `take_log` gives."""

def keep_last_line(descriptor: int) -> None:
    """From now on the first 1024 bytes of this file are the last line, filled up with zeros."""

def stop_log() -> None: ...
def get_cpu_variant() -> str: ...
def get_optimal_binary(
    binary_name: str | None = None,
    *,
    base_path: str = "BitNet/Release",
    platform: str | None = None,
    must_exist: bool = False,
) -> str: ...
def detect_cpu() -> dict[str, Any]: ...
def detect_gpus() -> dict[str, Any]:
    """NVML's `gpus`, the `driver`, and the `reason` why there are none. Unknown is None."""

def list_devices() -> list[dict[str, Any]]:
    """What llama.cpp can compute on, in its own order; nothing before `start`."""

def memory_info() -> dict[str, int | None]:
    """Bytes: total, available and limit (of the cgroup) for us; resident and private are ours."""

def kernels() -> str | None: ...
def weight_layouts() -> tuple[dict[str, float], bool]:
    """The types of weights that the CPU module lays out anew, each with what a byte of it becomes;
    and whether K-quants stay as they are all the same."""

def process_rss_mb() -> float | None: ...
def _inject(fault: str) -> None:
    """For tests: `throw` throws a C++ exception, `panic` panics."""
