"""`tabagent-model serve`: a socket, the models behind it, and an orderly end.

It listens before the first model is loaded, so that `/health` can tell how far that is; the others
are loaded when somebody wants them. SIGTERM or Ctrl-C lets answers that are under way end within
the grace period, and a second Ctrl-C does not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._package import package
from ..errors import InvalidRequestError, ServerStartError
from ..manager import AsyncModelManager
from ..model import inspect
from ..params import ModelConfig, checked_whole
from .config import ServerConfig
from .service import Service

if TYPE_CHECKING:
    import uvicorn

    from ..manager._keeper import ModelEvent
    from .http import Door

log = logging.getLogger("tabagent_model.serve")
KEYS_VARIABLE = "TABAGENT_API_KEYS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="a GGUF file, or NAME=FILE; the first answers"
        " those who name none, and is loaded at the start; without any, the bundled tiny"
        " model")  # fmt: skip
    add("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    add("--port", type=int, default=8080, help="0 takes a free one (%(default)s)")
    add("--api-key-file", type=Path, metavar="FILE", help="a key in each line; also from the"
        f" environment variable {KEYS_VARIABLE}, with blanks between them")  # fmt: skip
    add("--insecure", action="store_true", help="let everybody in who reaches the address")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="a name under which this server is reached")  # fmt: skip
    add("--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="another page or browser extension that may ask")  # fmt: skip
    add("--no-page", action="store_true", help="no page to chat with at `/`")
    add("--tls-cert", type=Path, metavar="FILE")
    add("--tls-key", type=Path, metavar="FILE")
    for name, default, meaning in _NUMBERS:
        kind = type(default)
        add(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=meaning)
    for option, _, meaning in _MODEL_NUMBERS:
        add(option, type=int, metavar="N", help=meaning)
    add("--models-dir", type=Path, metavar="FOLDER", help="all GGUF files in it, by their names")
    add("--max-loaded", type=int, default=3, metavar="N",
        help="models that are loaded at the same time (%(default)s)")  # fmt: skip
    add("--max-memory-mb", type=int, metavar="N", help="what they may take together")
    add("--keep-alive", "--ttl", default="-1", metavar="TIME", help="how long a model stays that is"
        " not used, as in 90s, 5m or 1h30m; -1 is for ever (%(default)s)")  # fmt: skip
    add("--in-process", action="store_true", help="no worker process of its own for each model")
    add("--quiet", action="store_true", help="no line for each request")


_DEFAULTS = ServerConfig()
_NUMBERS = (
    ("stream_batch", _DEFAULTS.stream_batch, "pieces that are sent together at most (%(default)s)"),
    ("max_body_mb", _DEFAULTS.max_body_mb, "the largest body (%(default)s)"),
    ("max_connections", _DEFAULTS.max_connections, "open at the same time (%(default)s)"),
    ("request_timeout_s", _DEFAULTS.request_timeout_s, "for a whole answer (%(default)g)"),
    ("grace_s", _DEFAULTS.grace_s, "for answers under way, at the end (%(default)g)"),
)
_MODEL_NUMBERS = (
    ("--n-ctx", "n_ctx", "tokens that one request can hold"),
    ("--parallel", "max_parallel", "requests that run together"),
    ("--queue-size", "queue_size", "requests that may wait"),
    ("--threads", "n_threads", "processor cores to compute with"),
    ("--gpu-layers", "gpu_layers", "layers that go to a GPU"),
)


def run(asked: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit status."""
    package("uvicorn", "tabagent-model[server]")
    package("httptools", "tabagent-model[server]")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    log.setLevel(logging.WARNING if asked.quiet else logging.INFO)
    config = ServerConfig(
        api_keys=api_keys(asked.api_key_file, os.environ),
        allowed_hosts=[*asked.allow_host, *_own_name(asked.host)],
        allowed_origins=asked.allow_origin,
        has_page=not asked.no_page,
        **{name: getattr(asked, name) for name, _, _ in _NUMBERS},
    )
    check_safety(asked.host, config, asked.insecure)
    manager = manager_of(asked)
    listener = bind(asked.host, asked.port)
    return serve(manager, config, listener, asked.tls_cert, asked.tls_key)


def serve(
    manager: AsyncModelManager,
    config: ServerConfig,
    listener: socket.socket,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> int:
    """Load the default and answer for all models on a socket that listens; the exit status."""
    from .http import Door

    door = Door(config)
    failed: list[Exception] = []

    async def load() -> None:
        try:
            await _load(door, manager)
        except Exception as error:
            failed.append(error)
            server.should_exit = True

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        _announce(listener, server.config.is_ssl)  # from now on a signal is heard
        loading = asyncio.ensure_future(load())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await manager.close()

    door.app.router.lifespan_context = lifespan
    server = server_of(door, tls_cert, tls_key)
    try:
        server.config.load()
    except OSError as error:  # ssl's errors are such, too
        message = f"no TLS with `{tls_cert}` and `{tls_key}`: {error}"
        raise ServerStartError(message, hint="give both, as PEM files") from None
    server.run(sockets=[listener])
    if failed:
        raise failed[0]
    return 0


def server_of(
    door: Door, tls_cert: Path | None = None, tls_key: Path | None = None
) -> uvicorn.Server:
    """A uvicorn whose connections have limits, and which ends well after a signal."""
    import uvicorn

    from .wire import connection_of

    config = door.config

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own dies of the signal at the end, and an orderly end is a success."""
            is_main = threading.current_thread() is threading.main_thread()
            numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if door.service is not None:
                door.service.end_watches()
            await super().shutdown(sockets)
            if (cancelled := self.server_state.tasks) and not self.force_exit:
                await asyncio.wait(cancelled, timeout=2)  # they tell their clients why they end

    settings = uvicorn.Config(
        door.app,
        http=connection_of(config),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(config.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(config.grace_s),
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    return Server(settings)


async def _load(door: Door, manager: AsyncModelManager) -> None:
    """The default, so that what is wrong with it is known at the start."""

    def tell(event: ModelEvent) -> None:
        if event.step == "load":
            door.progress = event.progress

    stop = manager.watch(tell)
    try:
        await manager.load_model()
    finally:
        stop()
    door.service = Service(manager)
    gc.collect()
    gc.freeze()  # all of this stays, so the collector need not look at it again and again;
    gc.set_threshold(5_000)  # and answers under way are many objects with hardly any garbage


def manager_of(asked: argparse.Namespace) -> AsyncModelManager:
    """A manager that knows what is to be served; nothing is loaded yet."""
    models = models_of(asked)
    given = {
        "max_loaded": asked.max_loaded,
        "max_bytes": None if asked.max_memory_mb is None else asked.max_memory_mb * 2**20,
        "keep_alive": asked.keep_alive,
        "queue_size": asked.queue_size,
    }
    fields: Any = {name: value for name, value in given.items() if value is not None}
    manager = AsyncModelManager(on_event=_log_event, **fields)
    for name, config in models.items():
        manager.register_model(name, config)
    return manager


def _log_event(event: ModelEvent) -> None:
    if event.error is not None:
        log.warning("`%s` could not be loaded: %.500r", event.model, str(event.error))
    elif event.progress == 1.0 and event.step in ("load", "unload"):
        log.info("`%s` is %sed after %.1f s", event.model, event.step, event.seconds)


def models_of(asked: argparse.Namespace) -> dict[str, ModelConfig]:
    """What is to be served, by name; a file's own name if no other is given.

    Those that were named one by one are looked at; what lies in a folder may be anything.
    """
    given = vars(asked)
    fields = {field: given[option[2:].replace("-", "_")] for option, field, _ in _MODEL_NUMBERS}
    fields = {name: value for name, value in fields.items() if value is not None}
    fields["isolation"] = "none" if asked.in_process else "process"
    found = [] if asked.models_dir is None else files_in(asked.models_dir)
    bundled = [None] if asked.models_dir is None else []
    models: dict[str, ModelConfig] = {}
    for model in [*(asked.models or bundled), *found]:
        name, path = (None, model) if not isinstance(model, str) else _named(model)
        config = ModelConfig(path, **fields)
        name = name or _SHARD.sub("", Path(config.path).stem)
        if name in models:
            message = f"two models are called `{name}`"
            raise InvalidRequestError(message, hint="give one of them as NAME=FILE", name="models")
        models[name] = config
    for config in list(models.values())[: len(models) - len(found)]:
        inspect(config.path)
    return models


def files_in(folder: Path) -> list[Path]:
    """The model files in a folder and those below it; of one in several files the first."""
    files = sorted(folder.rglob("*.gguf"), key=lambda path: path.name)
    shards = ((path, _SHARD.search(path.stem)) for path in files)
    firsts = [path for path, shard in shards if shard is None or int(shard[1]) == 1]
    models = [path for path in firsts if not path.name.startswith("mmproj")]
    if not models:
        message = f"there is no model in `{folder}`"
        raise InvalidRequestError(message, hint="put GGUF files there", name="models_dir")
    return models


_SHARD = re.compile(r"-([0-9]{5})-of-[0-9]{5}$")


def _named(given: str) -> tuple[str | None, str]:
    name, equals, path = given.partition("=")
    is_named = equals and "/" not in name and not Path(given).exists()
    return (name, path) if is_named else (None, given)


def api_keys(file: Path | None, environment: Mapping[str, str]) -> list[str]:
    """From the file and the environment. A place for keys that holds none is a mistake, and to go
    on without one would open the server to everybody."""
    keys = []
    if file is not None:
        try:
            found = file.read_text(encoding="ascii").split()
        except (OSError, UnicodeError) as error:
            message = f"the keys in `{file}` cannot be read: {error}"
            raise InvalidRequestError(message, name="api_key_file") from None
        if not found:
            raise InvalidRequestError(f"there is no key in `{file}`", name="api_key_file")
        keys += found
    if (given := environment.get(KEYS_VARIABLE)) is not None:
        if not given.split():
            raise InvalidRequestError(f"{KEYS_VARIABLE} is set and empty", name=KEYS_VARIABLE)
        keys += given.split()
    return keys


def check_safety(host: str, config: ServerConfig, is_insecure: bool) -> None:
    """Nobody is let in from outside without a key, unless that is said in so many words."""
    if config.api_keys or is_insecure:
        return
    if not _is_loopback(host):
        message = f"on `{host}` others can reach this server, and there is no key"
        hint = f"set {KEYS_VARIABLE}, or use --api-key-file; --insecure lets everybody in"
        raise ServerStartError(message, hint=hint)
    if "*" in config.allowed_origins:
        message = "with `*` every web page may ask, and there is no key"
        raise ServerStartError(message, hint="name the origins, or set a key, or use --insecure")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; what is in the way is told by name."""
    checked_whole("port", port, 0, 65_535)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)  # who comes before the loop runs is not turned away
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        hint = "choose another with --port; 0 takes a free one"
        message = f"cannot listen on `{host}` port {port}: {why}"
        raise ServerStartError(message, hint=hint) from None
    return listener


_BACKLOG = 2048


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_name(host: str) -> list[str]:
    """Whoever listens on a name is known by it."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return [host]
    return [] if _is_loopback(host) else [socket.gethostname()]


def _announce(listener: socket.socket, is_tls: bool) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{'https' if is_tls else 'http'}://{host}:{port}", file=sys.stderr, flush=True)
