"""The settings: three sources, the later ones winning, and errors that name the field."""

from __future__ import annotations

import hashlib

import pytest

from openline.config import (
    Config,
    ConfigError,
    KeySettings,
    LimitSettings,
    ServerSettings,
    StoreSettings,
    load,
    parse_upstream,
)

TOML = """
[server]
host = "0.0.0.0"
port = 9000
allowed_origins = ["https://app.example"]

[limits]
ping_seconds = 5

[store]
url = "none"

[[upstreams]]
name = "local"
kind = "chat"
url = "http://127.0.0.1:8000/v1"
aliases = { "gpt-5" = "qwen3-coder" }

[[keys]]
owner = "team-a"
sha256 = "%s"
""" % ("a" * 64)


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file."""
    path = tmp_path / "openline.toml"

    def write_file(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def problem(path=None, environ=None, flags=None):
    """The message of the error that this configuration raises."""
    with pytest.raises(ConfigError) as raised:
        load(path, environ or {}, flags or {})
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_nothing_configured_is_the_defaults():
    """Without any source every setting has its default: loopback, port 8484, no keys."""
    assert load(None, {}, {}) == Config()
    assert (Config().server.host, Config().server.port, Config().keys) == ("127.0.0.1", 8484, ())


def test_a_file_is_read(write):
    """Every section of the file arrives in its struct."""
    config = load(write(TOML), {}, {})
    assert config.server == ServerSettings(host="0.0.0.0", port=9000, allowed_origins=("https://app.example",))
    assert config.limits == LimitSettings(ping_seconds=5)
    assert config.store.url == "none"
    (upstream,) = config.upstreams
    assert (upstream.label, upstream.aliases) == ("local", {"gpt-5": "qwen3-coder"})
    assert config.keys == (KeySettings(owner="team-a", sha256="a" * 64),)


def test_the_environment_wins_over_the_file_and_flags_over_both(write):
    """TOML, then environment, then flags; what a later source leaves out stays."""
    path = write(TOML)
    environ = {"OPENLINE_PORT": "9001", "OPENLINE_PING_SECONDS": "7.5", "OPENLINE_WEBSOCKET": "false"}
    config = load(path, environ, {"port": None})
    assert (config.server.port, config.limits.ping_seconds, config.server.websocket) == (9001, 7.5, False)
    assert config.server.host == "0.0.0.0"
    config = load(path, environ, {"port": 9002, "host": "::1"})
    assert (config.server.port, config.server.host) == (9002, "::1")
    assert config.server.allowed_origins == ("https://app.example",)


@pytest.mark.parametrize("settings", [ServerSettings, LimitSettings])
def test_every_option_has_an_environment_variable(settings):
    """Each field of `[server]` and `[limits]` is read from `OPENLINE_` and its name.

    Source: design, "Commands and configuration".
    """
    section = "server" if settings is ServerSettings else "limits"
    for field in settings.__struct_fields__:
        default = getattr(settings(), field)
        match default:
            case bool():
                text, value = ("0", False) if default else ("1", True)
            case int() | float():
                text, value = "3", 3
            case tuple():
                text, value = "https://a.example https://b.example", ("https://a.example", "https://b.example")
            case _:
                text, value = "x", "x"
        environ = {f"OPENLINE_{field.upper()}": text, "OPENLINE_TLS_CERT": "x", "OPENLINE_TLS_KEY": "x"}
        assert getattr(getattr(load(None, environ, {}), section), field) == value, field


def test_upstreams_and_store_come_from_the_environment_and_flags(write):
    """SPECs replace the file's upstreams; several stand apart by spaces in the environment."""
    path = write(TOML)
    environ = {"OPENLINE_UPSTREAM": "chat:http://a/v1 responses:https://b/v1", "OPENLINE_STORE": "sqlite:x.db"}
    config = load(path, environ, {})
    assert [(upstream.kind, upstream.url) for upstream in config.upstreams] == [
        ("chat", "http://a/v1"),
        ("responses", "https://b/v1"),
    ]
    assert config.store.url == "sqlite:x.db"
    config = load(path, environ, {"upstream": ["scripted:"], "store": "sqlite::memory:"})
    assert [(upstream.kind, upstream.url) for upstream in config.upstreams] == [("scripted", "")]
    assert config.store.url == "sqlite::memory:"


def test_a_stores_other_settings_stay_when_another_store_is_named(write):
    """`--store` and `OPENLINE_STORE` say where; how long things are kept comes from the file, or its own variable."""
    path = write("[store]\nurl = 'none'\nretain_days = 7\npool_connections_max = 3")
    config = load(path, {"OPENLINE_STORE": "sqlite:x.db"}, {"store": "postgresql://db/x"})
    assert config.store == StoreSettings(url="postgresql://db/x", retain_days=7, pool_connections_max=3)
    environ = {"OPENLINE_RETAIN_DAYS": "0", "OPENLINE_POOL_CONNECTIONS_MAX": "4", "OPENLINE_URL": "sqlite:y.db"}
    assert load(path, environ, {}).store == StoreSettings(url="none", retain_days=0, pool_connections_max=4)
    assert StoreSettings().retain_days == 30


def test_one_key_comes_from_the_environment(write):
    """`OPENLINE_API_KEY` is one more key, of owner `default`, kept as the hash of the whole of it.

    Source: design, "Commands and configuration"; guarantees, "Keys".
    """
    expected = KeySettings(owner="default", sha256=hashlib.sha256(b"sk-secret").hexdigest())
    assert load(None, {"OPENLINE_API_KEY": "sk-secret"}, {}).keys == (expected,)
    assert [key.owner for key in load(write(TOML), {"OPENLINE_API_KEY": "sk-secret"}, {}).keys] == ["team-a", "default"]
    assert load(None, {"OPENLINE_API_KEY": ""}, {}).keys == ()
    assert "sk-secret" not in repr(load(None, {"OPENLINE_API_KEY": "sk-secret"}, {}))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nport = 'x'", "server.port"),
        ("[server]\nport = 70000", "server.port"),
        ("[server]\nprot = 1", "prot"),
        ("[sever]\nport = 1", "sever"),
        ("[server]\nwebsocket = 'perhaps'", "server.websocket"),
        ("server = 3", "server"),
        ("[limits]\nping_seconds = 0", "limits.ping_seconds"),
        ("[limits]\nlanes_named_max = -1", "limits.lanes_named_max"),
        ("[[upstreams]]\nkind = 'telepathy'", "upstreams[0].kind"),
        ("[[upstreams]]\nkind = 'gguf'", "upstreams[0].url"),
        ("[[upstreams]]\nkind = 'gguf'\nurl = 'tiny'\nslots = 0", "upstreams[0].slots"),
        ("[[upstreams]]\nkind = 'gguf'\nurl = 'tiny'\ncontext_tokens = 0", "upstreams[0].context_tokens"),
        ("[[upstreams]]\nurl = 'localhost:8000'", "upstreams[0].url"),
        ("[[upstreams]]\nkind = 'scripted'\n[[upstreams]]\nurl = ''", "upstreams[1].url"),
        ("[[upstreams]]\nurl = 'http://key@host/v1'", "upstreams[0].url"),
        ("[[upstreams]]\nurl = 'http://[/v1'", "upstreams[0].url"),
        ("[[keys]]\nowner = 'a'\nsha256 = 'short'", "keys[0].sha256"),
        ("[[keys]]\nowner = ''\nsha256 = '%s'" % ("a" * 64), "keys[0].owner"),
        ("keys = 3", "keys"),
        ("store = 'none'", "store"),
        ("[store]\nretain_days = -1", "store.retain_days"),
        ("[store]\nretain_days = 0.5", "store.retain_days"),
        ("[store]\nretain_days = 99999999", "store.retain_days"),
        ("[store]\npool_connections_max = 0", "store.pool_connections_max"),
        ("[server]\ntls_cert = 'c.pem'", "server.tls_cert"),
    ],
    ids=str,
)
@pytest.mark.parametrize("environ", [{}, {"OPENLINE_API_KEY": "k", "OPENLINE_HOST": "127.0.0.1"}], ids=["file", "both"])
def test_an_unusable_value_is_named(write, environ, text, named):
    """One clear line that names the field, whatever else is configured."""
    assert named in problem(write(text), environ)


def test_an_unusable_file_is_named(write, tmp_path):
    """A file that is not there, is no TOML or no text is named, with what is wrong."""
    assert "nowhere.toml" in problem(tmp_path / "nowhere.toml")
    for broken in ("[server", b"\xff\xfe", "a = 1\na = 2"):
        assert "openline.toml is not TOML" in problem(write(broken))


def test_an_unusable_environment_is_named():
    """A variable's value is checked like the file's."""
    assert "server.port" in problem(environ={"OPENLINE_PORT": "many"})
    assert "limits.ping_seconds" in problem(environ={"OPENLINE_PING_SECONDS": "nan"})
    assert "chat:URL" in problem(environ={"OPENLINE_UPSTREAM": "http://localhost:8000/v1"})


@pytest.mark.parametrize(
    ("spec", "kind", "url"),
    [
        ("chat:http://127.0.0.1:8000/v1", "chat", "http://127.0.0.1:8000/v1"),
        ("chat:http://127.0.0.1:8000/v1/", "chat", "http://127.0.0.1:8000/v1"),
        ("responses:https://api.example/v1", "responses", "https://api.example/v1"),
        ("gguf:tiny", "gguf", "tiny"),
        ("gguf:~/models/a:b.gguf", "gguf", "~/models/a:b.gguf"),
        ("scripted:", "scripted", ""),
        ("scripted:C:/talks/one.jsonl", "scripted", "C:/talks/one.jsonl"),
    ],
)
def test_a_spec_is_a_kind_and_an_address(spec, kind, url):
    """What `--upstream` takes."""
    settings = parse_upstream(spec)
    assert (settings.kind, settings.url) == (kind, url)


@pytest.mark.parametrize("spec", ["", "chat", "http://localhost:8000/v1", "telepathy:x", ":x"])
def test_another_spec_is_refused_with_what_was_expected(spec):
    """The message says what came and which forms there are."""
    with pytest.raises(ConfigError, match="expected chat:URL, responses:URL") as raised:
        parse_upstream(spec)
    assert f"'{spec}'" in str(raised.value)
