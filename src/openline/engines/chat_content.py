"""Content of messages and of tool outputs, as Chat Completions takes it.

The server fetches nothing: what a client points at by URL is passed on, or refused where
Chat Completions has no field for it.

Source: Responses API reference, "Input items", content parts.
"""

from __future__ import annotations

from typing import Any

import msgspec

from openline.protocol.errors import ProtocolError


class Part(msgspec.Struct):
    """A content part of any type."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None
    file_id: str | None = None
    file_url: str | None = None
    file_data: str | None = None
    filename: str | None = None
    input_audio: dict[str, Any] | None = None


def text_of(content: str | list[Part], path: str, joiner: str) -> str:
    """Content where only text can stand.

    Args:
        content: as the item has it.
        path: where it stands, for the error.
        joiner: what goes between its parts.

    Raises:
        ProtocolError: a part is no text.
    """
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        if not _is_text(part):
            raise _unsupported(f"{path}[{index}].type", f"'{part.type[:64]}' cannot stand here, only text can")
        texts.append(_text_of(part, f"{path}[{index}]"))
    return joiner.join(texts)


def content_of(content: str | list[Part], path: str, *, joiner: str) -> str | list[dict[str, Any]]:
    """Content of a user message or a tool message: a plain string where all is text, which every server takes.

    Raises:
        ProtocolError: a part has no form in Chat Completions.
    """
    if isinstance(content, str) or all(map(_is_text, content)):
        return text_of(content, path, joiner)
    return [_content_part(part, f"{path}[{index}]") for index, part in enumerate(content)]


def _is_text(part: Part) -> bool:
    return part.type in {"input_text", "output_text", "text", "refusal"}


def _text_of(part: Part, path: str) -> str:
    field = "refusal" if part.type == "refusal" else "text"
    text: str | None = getattr(part, field)
    return text if text is not None else _missing(path, field)


def _content_part(part: Part, path: str) -> dict[str, Any]:
    match part.type:
        case "input_image":
            return image_part(part, path)
        case "input_file":
            return _file_part(part, path)
        case "input_audio":
            return {"type": "input_audio", "input_audio": part.input_audio or _missing(path, "input_audio")}
        case _ if _is_text(part):
            return {"type": "text", "text": _text_of(part, path)}
        case other:
            raise _unsupported(f"{path}.type", f"this upstream takes no content of type '{other[:64]}'")


def image_part(part: Part, path: str) -> dict[str, Any]:
    """An image by its URL, which may be a `data:` one.

    Raises:
        ProtocolError: it has no URL; this server keeps no files that an id could name.
    """
    if part.file_id is not None:
        raise _unsupported(f"{path}.file_id", "this server keeps no files; send the image as a data URL in 'image_url'")
    image: dict[str, Any] = {"url": part.image_url or _missing(path, "image_url")}
    if part.detail is not None:
        image["detail"] = part.detail
    return {"type": "image_url", "image_url": image}


def _file_part(part: Part, path: str) -> dict[str, Any]:
    if part.file_url is not None:
        raise _unsupported(f"{path}.file_url", "this server fetches no URLs; send the file in 'file_data'")
    given = {"file_data": part.file_data, "filename": part.filename, "file_id": part.file_id}
    file = {key: value for key, value in given.items() if value is not None}
    return {"type": "file", "file": file or _missing(path, "file_data")}


def _missing(path: str, field: str) -> Any:
    raise ProtocolError("missing_required_parameter", f"'{path}.{field}' is missing.", param=f"{path}.{field}")


def _unsupported(param: str, reason: str) -> ProtocolError:
    return ProtocolError("unsupported_parameter", f"'{param}' cannot be used: {reason}.", param=param)
