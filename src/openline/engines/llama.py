"""llama.cpp in this process: the one place that touches `xllamacpp`, which has no types.

Its server listens on a loopback port with a key of its own, so that nobody else on this machine, and
no web page, talks to the model behind our back. Its threads are C++ and do not need the interpreter.

Source: xllamacpp, README, "Usage"; llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

import importlib
import mmap
import os
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Final, Protocol
from urllib.request import ProxyHandler, Request, build_opener

import msgspec

_READY_SECONDS_MAX: Final = 30.0  # for one answer of a loaded model; usually it takes milliseconds
_ERRORS_ONLY: Final = 1
_STDERR: Final = 2
_SAID_BYTES_MAX: Final = 64 * 1024
_SAID_SECONDS_MAX: Final = 0.5
# Of the lines about one fault, the one that says what it is: "… error loading model: …", "gguf_init_…: …"; and what it
# is about where the line does not tell.
_FAULTS: Final = tuple(
    (re.compile(pattern), about)
    for pattern, about in (
        (r"error loading model: (?!llama_model_loader: failed to load model from)(.+)", ""),
        (r"gguf_init_from_\w+: (.+)", ""),
        (r"common_chat_templates_init: error: (.+)", "its chat template cannot be read: "),
        (r" E +(?:\w+ +)?[\w:() ]+: (.+)", ""),
    )
)


class LlamaFailed(Exception):  # noqa: N818 - what happened to the model
    """The model cannot be served; the message says why, in llama.cpp's words where it said any."""


class NotInstalled(LlamaFailed):
    """The extra `local` is not installed, or does not run here."""


class Options(msgspec.Struct, frozen=True):
    """What to serve, and how.

    Attributes:
        path: of the GGUF file.
        alias: the name it is served by.
        context_tokens: the context that its slots share; above what it was trained with it gets that.
        slots: how many conversations it keeps in its KV cache.
        gpu_layers: how many layers go to the GPU; -1 is as many as fit.
        threads: of the CPU; None is llama.cpp's own choice, all cores.
        seed: of its sampling, where a request names none; None is another one each time.
    """

    path: str
    alias: str
    context_tokens: int
    slots: int
    gpu_layers: int = -1
    threads: int | None = None
    seed: int | None = None


class _Native(Protocol):
    """`xllamacpp.Server`: it runs as long as somebody refers to it."""

    @property
    def listening_address(self) -> str: ...


class Llama:
    """A loaded model and its server.

    Loading blocks, and nothing else runs meanwhile: xllamacpp keeps the interpreter's lock until the model
    is there, so that a thread would change nothing. Ctrl-C ends the process even then.

    Raises:
        NotInstalled: `xllamacpp` is not there.
        LlamaFailed: the file cannot be read, is no model, or does not fit.
    """

    def __init__(self, options: Options) -> None:
        self.key = secrets.token_hex(24)
        native = _started(_parameters(options, self.key))
        self.url: str = native.listening_address
        try:
            # Also because of a race in it: stopped before its loop runs, it never ends.
            self._get("/slots")
        except OSError as error:
            raise LlamaFailed(f"its server does not answer: {error}") from None
        self._native: _Native | None = native

    def __repr__(self) -> str:
        return f"<Llama {self.url if self._native else 'stopped'}>"

    def stop(self) -> None:
        """Free the model; what still generates is cut."""
        self._native = None

    def _get(self, path: str) -> bytes:
        request = Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})  # noqa: S310 - our own URL
        opener = build_opener(ProxyHandler({}))
        with opener.open(request, timeout=_READY_SECONDS_MAX) as answer:
            return bytes(answer.read())


def is_installed() -> bool:
    """Whether the extra `local` is there and runs on this machine."""
    try:
        _module()
    except NotInstalled:
        return False
    return True


def _module() -> Any:
    try:
        return importlib.import_module("xllamacpp")
    except (ImportError, OSError) as error:  # OSError: a wheel for another system
        raise NotInstalled(f"llama.cpp is not installed here ({error})") from None


def _parameters(options: Options, key: str) -> Any:
    """`CommonParams` of the server; what is not set here is llama.cpp's own default.

    The slots share one KV buffer, so that a long conversation may have all of it. Nothing is moved out of
    them behind our back: which conversation has which slot is decided by `slots.py`.
    """
    parameters = _module().CommonParams()
    parameters.model.path = options.path
    values: Mapping[str, object] = {
        "model_alias": {options.alias},
        "n_ctx": options.context_tokens,
        "n_parallel": options.slots,
        "n_gpu_layers": options.gpu_layers,
        "kv_unified": True,
        "cache_prompt": True,
        "cache_ram_mib": 0,
        "port": 0,
        "api_keys": [key],
        "cors_origins": "",
        "ui": False,
        "verbosity": _ERRORS_ONLY,
    }
    for name, value in values.items():
        setattr(parameters, name, value)
    if options.threads is not None:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    if options.seed is not None:
        parameters.sampling.seed = options.seed
    return parameters


def _started(parameters: Any) -> _Native:
    with tempfile.TemporaryFile() as said, _interruptible(), _stderr_into(said):
        try:
            return _module().Server(parameters)
        except RuntimeError as error:  # its own words are "please check the input params"
            raise LlamaFailed(_reason(_all_said(said)) or str(error)) from None


def _all_said(said: IO[bytes]) -> str:
    """What llama.cpp wrote about a failure: it does so in a thread of its own, up to this last line."""
    text = ""
    deadline = time.monotonic() + _SAID_SECONDS_MAX
    while "exiting due to" not in text and time.monotonic() < deadline:
        text = _written(said).decode(errors="replace")
        time.sleep(0.001)
    return text


def _written(file: IO[bytes]) -> bytes:
    """How a file begins by now; read without its position, at which somebody may write meanwhile."""
    if not os.fstat(file.fileno()).st_size:
        return b""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as written:
        return written[:_SAID_BYTES_MAX]


def _reason(said: str) -> str:
    """The one line that says what was wrong; empty if none does."""
    for pattern, about in _FAULTS:
        if found := pattern.search(said):
            return about + found[1].strip().rstrip(".")
    return ""


@contextmanager
def _stderr_into(sink: IO[bytes]) -> Generator[None]:
    """Catch what C++ writes to standard error: the reason of a failure stands there only."""
    kept = os.dup(_STDERR)
    os.dup2(sink.fileno(), _STDERR)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)


@contextmanager
def _interruptible() -> Generator[None]:
    """Let Ctrl-C end the process at once: Python's own handler would only run when the model is loaded."""
    before = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread() and callable(before)
    if is_ours:  # neither ignored, as in the background, nor set by somebody else
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)
