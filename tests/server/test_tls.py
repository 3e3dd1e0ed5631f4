"""TLS of its own, by `--tls-cert` and `--tls-key`."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from openline.config import ConfigError
from openline.server.runner import uvicorn_config
from server.running import Socket, make_config

FOLDER = Path(__file__).parent / "tls"
CERT, KEY = str(FOLDER / "localhost.pem"), str(FOLDER / "localhost.key")


@pytest.fixture
def trusting():
    """A client's TLS settings that trust the tests' certificate and nothing else."""
    return ssl.create_default_context(cafile=CERT)


async def test_both_transports_speak_tls(start, trusting):
    """With a certificate the one port speaks `https` and `wss`, and a client that checks it is satisfied."""
    server = await start(server={"tls_cert": CERT, "tls_key": KEY})
    url = f"wss://{server.address}/v1/responses"
    async with connect(url, ssl=trusting, compression=None, ping_interval=None, proxy=None) as connection:
        await Socket(connection).completed()
    async with server.http.post(
        f"https://{server.address}/v1/responses", json={"model": "scripted-text", "input": "x"}, ssl=trusting
    ) as answer:
        assert (await answer.json())["status"] == "completed"


@pytest.mark.parametrize(("cert", "key"), [("nowhere.pem", KEY), (CERT, "nowhere.key"), (KEY, CERT), (CERT, CERT)])
async def test_unusable_tls_files_are_named(tmp_path, cert, key):
    """Files that cannot be read, or are not what they should be, are an error of the configuration by their names."""
    config = make_config(tmp_path / "openline.db", server={"tls_cert": cert, "tls_key": key})
    with pytest.raises(ConfigError, match=r"server\.tls_cert") as raised:
        uvicorn_config(config, lambda: None)
    assert cert in str(raised.value)
    assert key in str(raised.value)
