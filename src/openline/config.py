"""Settings: frozen structs, filled from TOML, then the environment, then flags.

Every bound has its unit in its name and stands next to the reason for its number.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
_PRINTABLE: Final = r"^[^\x00-\x1f\x7f]*\Z"  # it stands in log lines
EngineKind = Literal["chat", "responses", "responses+ws", "gguf", "scripted"]
ServerKind = Literal["generic", "vllm", "sglang", "llama.cpp", "ollama", "lmstudio", "openai", "mistral", "groq"]
ModelFamily = Literal["generic", "qwen", "gemma", "gpt-oss", "minimax", "mistral"]
SystemRole = Literal["system", "developer", "user"]
MaxTokensField = Literal["max_tokens", "max_completion_tokens"]
ReasoningField = Literal["reasoning", "reasoning_content", ""]


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")  # RFC 6761 §6.3


class ConfigError(Exception):
    """The configuration cannot be used; the message names the field and what was expected."""


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[server]`: where and how it listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8484
    websocket: bool = True
    deflate: bool = False
    allowed_origins: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[limits]`: every bound of a running server."""

    message_bytes_max: Count = 64 * 1024 * 1024  # OpenAI's Codex backend refuses at 16 MiB; images need room
    lanes_named_max: Count = 32  # WebSocket mode guide
    responses_active_max: Count = 16  # WebSocket mode guide
    creates_queued_max: Count = 64
    creates_queued_bytes_max: Count = 128 * 1024 * 1024
    connections_per_owner_max: Count = 20_000
    connection_seconds_max: Seconds = 3600.0  # WebSocket mode guide; clients rotate at 50 to 55 minutes
    age_grace_seconds_max: Seconds = 300.0  # what runs at that age may still end
    drain_seconds_max: Seconds = 30.0  # the same when the server is told to stop; five more to be read and closed
    keepalive_seconds: Seconds = 45.0  # proxies cut after 60 seconds without data
    steers_pending_max: Count = 16
    steers_pending_bytes_max: Count = 16 * 1024 * 1024
    ping_seconds: Seconds = 20.0
    pong_seconds_max: Seconds = 60.0
    send_buffer_bytes_max: Count = 2 * 1024 * 1024
    created_wait_seconds_max: Seconds = 0.25  # Agents SDKs take a silent start for a lost frame


class ResumeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[resume]`: what of a turn is kept in memory for those who come back."""

    seconds: Seconds = 300.0  # OpenAI keeps unstored background responses for ten minutes
    bytes_max: Count = 64 * 1024 * 1024
    background_active_max: Count = 256
    detached_active_max: Count = (
        256  # of turns with a key that run without readers; one more, and the oldest is stopped
    )
    lease_seconds: Seconds = 15.0  # a process that has not said for so long that its turns run has stopped
    # For a turn of another process; longer than a lease and its sweep, and shorter than proxies stand silence.
    claim_wait_seconds_max: Seconds = 30.0


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[store]`: where responses with `store: true` are kept.

    Attributes:
        url: empty is one file in the user's data directory.
        sealing_key_file: the key of what clients hold for us; empty is beside the store's file.
        retain_days: after so long without use a turn or a conversation is deleted; 0 keeps them for ever.
        pool_connections_max: to a PostgreSQL server, of each process.
    """

    url: str = ""
    sealing_key_file: str = ""
    retain_days: Annotated[int, Meta(ge=0, le=36_500)] = 30  # OpenAI keeps responses for 30 days
    pool_connections_max: Count = 10  # a server has 100 unless told otherwise, and often several clients


class UpstreamSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[upstreams]]`: one model server.

    Attributes:
        kind: which engine speaks to it.
        url: its API's root, ending in `/v1`; for `gguf`, the model file's path, or `tiny` for the one that comes with
            Openline; for `scripted`, a transcript's path or empty.
        name: its name in logs and errors; the host and port, or the file's name, if left empty.
        api_key_env: the environment variable that holds its key.
        ca_file: a CA bundle to trust instead of the system's.
        models: patterns of the model names that go to it.
        aliases: the name a client asks for → the name that this upstream knows.
        profile: which kind of server it is; recognised at the first contact if it is not said.
        family: which family its models are of; recognised by their names if it is not said.
        late_system_role: the role that system and developer messages get where they do not lead. This and the
            next two come from the profile if they are not said.
        max_tokens_field: the name it knows `max_output_tokens` by.
        reasoning_field: the name under which it reads an assistant's earlier reasoning; empty leaves it out.
        warmup: whether `generate: false` sends the prefix there in the background, with one token of output,
            to fill its cache; `auto` does so on this machine only, where nobody is paid for it.
        connect_seconds_max: until it has accepted a connection; also for its list of models, and for the words of a refusal.
        first_event_seconds_max: from there until the first bytes of its answer's body.
        idle_seconds_max: between two reads of it.
        end_seconds_max: from the last token until the end of the stream; the answer is whole without it.
        answer_seconds_max: for the whole answer, looked at with every read.
        event_bytes_max: of one event, or of an answer that is no stream.
        answer_bytes_max: of the whole stream, as it comes from the network.
        retries_max: how often a request is sent again that certainly does not run there.
        retry_after_seconds_max: the longest `Retry-After` that is sat out for that; 0 passes each on to the client.
        context_tokens: for `gguf`: the context that its slots share, but never more than the model was trained with.
            Turns that do not fit in it together run one after another.
        slots: for `gguf`: how many conversations stay in its KV cache, and how many turns run at once.
        gpu_layers: for `gguf`: how many layers go to the GPU; -1 is as many as fit.
    """

    kind: EngineKind = "chat"
    url: Annotated[str, Meta(pattern=_PRINTABLE)] = ""
    name: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)] = ""
    api_key_env: str = "OPENLINE_UPSTREAM_API_KEY"
    ca_file: str = ""
    models: tuple[str, ...] = ("*",)
    aliases: dict[str, str] = {}
    profile: ServerKind | None = None
    family: ModelFamily | None = None
    late_system_role: SystemRole | None = None
    max_tokens_field: MaxTokensField | None = None
    reasoning_field: ReasoningField | None = None
    warmup: Literal["auto", "prefill", "none"] = "auto"
    connect_seconds_max: Seconds = 10.0
    first_event_seconds_max: Seconds = 600.0  # a long prompt on a small machine prefills for minutes
    idle_seconds_max: Seconds = 300.0
    end_seconds_max: Seconds = 5.0  # only counts of tokens follow the last of them, and they are there already
    answer_seconds_max: Seconds = 14_400.0  # 128 000 tokens at 10 a second take three and a half hours
    event_bytes_max: Count = 16 * 1024 * 1024
    answer_bytes_max: Count = 256 * 1024 * 1024  # 128 000 tokens with 20 logprobs each
    retries_max: Annotated[int, Meta(ge=0, le=5)] = 1
    retry_after_seconds_max: Annotated[float, Meta(ge=0)] = 2.0  # agents on a socket have no retry of their own
    context_tokens: Count = 32_768  # an agent's instructions and tools take 10 000; each costs memory, 64 KB and more
    slots: Annotated[int, Meta(ge=1, le=256)] = 4
    sockets_max: Count = 1024  # responses+ws: one for each conversation; a server may refuse more than it has room for
    socket_idle_seconds: Seconds = 900.0  # responses+ws: an agent's tool may run for minutes
    gpu_layers: Annotated[int, Meta(ge=-1)] = -1
    first_delta_seconds: Annotated[float, Meta(ge=0)] = 0.0  # scripted: time before the first delta
    delta_seconds: Annotated[float, Meta(ge=0)] = 0.0  # scripted: time between deltas

    @property
    def label(self) -> str:
        """What people call this upstream."""
        if self.kind == "gguf":
            return self.name or Path(self.url).stem
        return self.name or urlsplit(self.url).netloc or self.kind

    @property
    def prefills(self) -> bool:
        """Whether warm-ups reach it."""
        return self.warmup == "prefill" or (self.warmup == "auto" and is_loopback(urlsplit(self.url).hostname or ""))

    @property
    def api_key(self) -> str:
        """Its key, read when it is needed; empty if it has none."""
        return os.environ.get(self.api_key_env, "").strip()


class KeySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[keys]]`: a client's key, as the hash of the whole of it."""

    owner: Annotated[str, Meta(min_length=1, max_length=128, pattern=_PRINTABLE)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration."""

    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    resume: ResumeSettings = ResumeSettings()
    store: StoreSettings = StoreSettings()
    upstreams: tuple[UpstreamSettings, ...] = ()
    keys: tuple[KeySettings, ...] = ()


_ENV_PREFIX: Final = "OPENLINE_"
# Sections whose fields each have an environment variable: OPENLINE_HOST, OPENLINE_PING_SECONDS, …
_ENV_SECTIONS: Final = {"server": ServerSettings, "limits": LimitSettings, "store": StoreSettings}
_ENV_NOT: Final = frozenset({"url"})  # the store's: it has its flag's name, OPENLINE_STORE
_ENV_LISTS: Final = frozenset({"allowed_origins"})  # several, apart by blanks
_SPEC_KINDS: Final = ("chat", "responses", "responses+ws", "gguf", "scripted")
_URL_KINDS: Final = frozenset({"chat", "responses", "responses+ws"})


def load(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """The configuration out of its three sources, the later ones winning.

    Args:
        path: a TOML file, if any.
        environ: the process's environment: `OPENLINE_HOST`, `OPENLINE_UPSTREAM`, `OPENLINE_STORE`, …
        flags: `upstream` (a list of SPECs), `store`, and fields of `[server]` by name; None is not given.

    Raises:
        ConfigError: a source cannot be read, or a value is not what was expected.
    """
    tables: dict[str, Any] = _read_toml(path) if path else {}
    for section, settings in _ENV_SECTIONS.items():
        for field in settings.__struct_fields__:
            value = environ.get(f"{_ENV_PREFIX}{field.upper()}")
            if value is not None and field not in _ENV_NOT:
                _table(tables, section)[field] = value.split() if field in _ENV_LISTS else value
    specs = flags.get("upstream") or environ.get("OPENLINE_UPSTREAM", "").split()
    if specs:
        tables["upstreams"] = [msgspec.to_builtins(parse_upstream(spec)) for spec in specs]
    store = flags.get("store") or environ.get("OPENLINE_STORE")
    if store:
        _table(tables, "store")["url"] = store
    for field in ServerSettings.__struct_fields__:
        if flags.get(field) is not None:
            _table(tables, "server")[field] = flags[field]
    api_key = environ.get("OPENLINE_API_KEY", "").strip()
    if api_key:
        key = {"owner": "default", "sha256": hashlib.sha256(api_key.encode()).hexdigest()}
        configured: Any = tables.get("keys", [])
        if not isinstance(configured, list):
            raise ConfigError("keys: expected [[keys]], a list of tables.")
        tables["keys"] = [*configured, key]
    config = _convert(tables)
    _check(config)
    _check_upstream_keys(config, environ)
    return config


def parse_upstream(spec: str) -> UpstreamSettings:
    """An upstream from its SPEC: `chat:URL`, `responses:URL`, `responses+ws:URL`, `gguf:PATH`, `scripted:` or `scripted:PATH`.

    Raises:
        ConfigError: the SPEC is not of that form.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in _SPEC_KINDS:
        expected = "expected chat:URL, responses:URL, responses+ws:URL, gguf:PATH or scripted:"
        raise ConfigError(f"--upstream is '{spec}': {expected}.")
    return UpstreamSettings(kind=kind, url=rest.rstrip("/") if kind in _URL_KINDS else rest)


def _table(tables: dict[str, Any], section: str) -> dict[str, Any]:
    table: Any = tables.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section}: expected [{section}], a table.")
    return cast("dict[str, Any]", table)


def _split(url: str) -> SplitResult:
    """A URL's parts; none of them where it cannot be read."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which only now is read
        return parts
    except ValueError:
        return SplitResult("", "", "", "", "")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}.") from None


def _convert(tables: dict[str, Any]) -> Config:
    try:
        # Not strict, because the environment has only text: "8484" is a port.
        config = msgspec.convert(tables, Config, strict=False)
        upstreams = tuple(msgspec.structs.replace(each, url=each.url.rstrip("/")) for each in config.upstreams)
        return msgspec.structs.replace(config, upstreams=upstreams)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`").replace("[...]", "")
        raise ConfigError(f"{field + ': ' if field else ''}{text}.") from None


def _check_upstream_keys(config: Config, environ: Mapping[str, str]) -> None:
    """One key must not go to several servers: it is meant for one of them, and the others would learn it."""
    default = UpstreamSettings().api_key_env
    sharing = [
        upstream.label
        for upstream in config.upstreams
        if upstream.kind in _URL_KINDS and upstream.api_key_env == default
    ]
    if environ.get(default) and len(sharing) > 1:
        remedy = 'give each upstream its own api_key_env in the file, or "" to one without a key'
        raise ConfigError(f"{default} is set and would go to {len(sharing)} upstreams, {', '.join(sharing)}: {remedy}.")


def _check(config: Config) -> None:
    server = config.server
    if bool(server.tls_cert) != bool(server.tls_key):
        raise ConfigError("server.tls_cert and server.tls_key: expected both or neither.")
    for index, upstream in enumerate(config.upstreams):
        parts = _split(upstream.url)
        if "@" in parts.netloc:
            raise ConfigError(
                f"upstreams[{index}].url has a name or password in it: put the key into api_key_env instead."
            )
        if upstream.kind == "gguf" and not upstream.url:
            raise ConfigError(f"upstreams[{index}].url is empty: expected the path of a GGUF model file, or 'tiny'.")
        if upstream.kind in _URL_KINDS and (parts.scheme not in {"http", "https"} or not parts.netloc):
            expected = "expected http://HOST:PORT/v1 or https://HOST/v1"
            raise ConfigError(f"upstreams[{index}].url is '{upstream.url}': {expected}.")
