"""How many tokens a prompt has, asked of the upstream that would read it; never a guess of ours.

Every one is given what a turn would send, so far as its endpoint takes it.

Source: Responses API reference, "Get input token counts"; llama.cpp, tools/server/README.md, "Token Counting"; vLLM,
entrypoints/serve/tokenize/protocol.py; SGLang, entrypoints/openai/protocol.py, `TokenizeRequest`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from openline.config import ServerKind
from openline.engines.profiles import KINDS
from openline.engines.upstream import Upstream
from openline.engines.upstream_errors import NoEndpointError
from openline.protocol.errors import ProtocolError

# What such an endpoint reads; OpenAI refuses other fields.
_RESPONSES_FIELDS: Final = (
    *("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls"),
    *("text", "reasoning", "truncation", "personality"),
)
_SGLANG_FIELDS: Final = ("model", "messages", "tools", "tool_choice", "reasoning_effort")
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder: Final = msgspec.json.Encoder()


async def count_response(upstream: Upstream, body: bytes) -> int:
    """The tokens of a create, by a Responses upstream.

    Args:
        body: as it would be sent, with the whole context in `input`.

    Raises:
        ProtocolError: the upstream does not count, refused or failed.
    """
    try:
        return await upstream.count("/responses/input_tokens", _only(body, _RESPONSES_FIELDS))
    except NoEndpointError:
        raise _cannot(upstream, "it has no /responses/input_tokens") from None


async def count_chat(upstream: Upstream, kind: ServerKind, body: bytes) -> int:
    """The tokens of a Chat Completions request, by a server of this kind.

    Args:
        body: as it would be sent.

    Raises:
        ProtocolError: the upstream does not count, refused or failed.
    """
    title = KINDS[kind].title
    try:
        match kind:
            case "llama.cpp":
                return await upstream.count("/chat/completions/input_tokens", body)
            case "vllm":
                return await upstream.count("/tokenize", _for_vllm(body), at_root=True)
            case "sglang":
                return await upstream.count("/tokenize", _only(body, _SGLANG_FIELDS), at_root=True)
            case _:
                raise _cannot(upstream, f"it is {title}, which has no endpoint for it")
    except NoEndpointError:
        raise _cannot(upstream, f"this version of {title} has no endpoint for it") from None


def _for_vllm(body: bytes) -> bytes:
    """What its `/tokenize` reads; what a turn has in a field of its own is given to the template here."""
    fields = _fields.decode(body)
    read: dict[str, Any] = {name: fields[name] for name in ("model", "messages", "tools") if name in fields}
    read["add_generation_prompt"] = True
    if "reasoning_effort" in fields:
        read["chat_template_kwargs"] = {"reasoning_effort": fields["reasoning_effort"]}
    return _encoder.encode(read)


def _only(body: bytes, names: Iterable[str]) -> bytes:
    fields = _fields.decode(body)
    return _encoder.encode({name: fields[name] for name in names if name in fields})


def _cannot(upstream: Upstream, reason: str) -> ProtocolError:
    message = (
        f"Upstream '{upstream.label}' cannot count tokens: {reason}. Current versions of llama.cpp, vLLM and SGLang can, and"
        " OpenAI as `responses:URL`; if it is one of them, set the upstream's `profile`. `usage` of a response tells its count."
    )
    return ProtocolError("unsupported_parameter", message, param="model")
