"""A turn as a server that speaks Responses streams it, with whatever the builder itself never makes."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]

_RESPONSE = {"id": "resp_theirs", "object": "response", "model": "their-model", "status": "in_progress", "output": []}


def _part(index_key: str, part_type: str, text: str, index: int, item: str, **more: Any) -> list[Event]:
    """A part with its text in two pieces; what `more` names goes between them."""
    kind = "content_part" if index_key == "content_index" else "reasoning_summary_part"
    word = {"summary_text": "reasoning_summary_text"}.get(part_type, part_type)
    where = {"output_index": index, index_key: 0, "item_id": item}
    logprobs = {"logprobs": []} if part_type == "output_text" else {}
    annotations: Event = {"annotations": []} if part_type == "output_text" else {}
    between = [{**event, **where} for event in more.get("between", [])]
    full = {**annotations, "annotations": [event["annotation"] for event in between]} if between else annotations
    return [
        {"type": f"response.{kind}.added", **where, "part": {"type": part_type, "text": "", **annotations}},
        {"type": f"response.{word}.delta", **where, "delta": text[:3], **logprobs},
        *between,
        {"type": f"response.{word}.delta", **where, "delta": text[3:], **logprobs, "obfuscation": "xyz"},
        {"type": f"response.{word}.done", **where, "text": text, **logprobs},
        {"type": f"response.{kind}.done", **where, "part": {"type": part_type, "text": text, **full}},
    ]


def reasoning(index: int) -> list[Event]:
    item = {"type": "reasoning", "id": "rs_theirs", "summary": []}
    done = {
        **item,
        "summary": [{"type": "summary_text", "text": "Thinking."}],
        "content": [{"type": "reasoning_text", "text": "Hm, well."}],
        "encrypted_content": "opaque",
    }
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        *_part("summary_index", "summary_text", "Thinking.", index, "rs_theirs"),
        *_part("content_index", "reasoning_text", "Hm, well.", index, "rs_theirs"),
        {"type": "response.output_item.done", "output_index": index, "item": done},
    ]


def web_search(index: int) -> list[Event]:
    item = {
        "type": "web_search_call",
        "id": "ws_theirs",
        "status": "in_progress",
        "action": {"type": "search", "query": "x", "queries": ["x"]},
    }
    where = {"output_index": index, "item_id": "ws_theirs"}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        {"type": "response.web_search_call.in_progress", **where},
        {"type": "response.web_search_call.searching", **where},
        {"type": "response.web_search_call.completed", **where},
        {"type": "response.output_item.done", "output_index": index, "item": {**item, "status": "completed"}},
    ]


def message(index: int) -> list[Event]:
    cited = {"type": "url_citation", "url": "https://example.com", "title": "t", "start_index": 0, "end_index": 3}
    citation = {"type": "response.output_text.annotation.added", "annotation_index": 0, "annotation": cited}
    item = {
        "type": "message",
        "id": "msg_theirs",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
        "phase": "final_answer",
    }
    content = [{"type": "output_text", "text": "See here.", "annotations": [cited]}]
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        *_part("content_index", "output_text", "See here.", index, "msg_theirs", between=[citation]),
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", "content": content},
        },
    ]


def call(index: int, item_type: str = "function_call") -> list[Event]:
    key = "input" if item_type == "custom_tool_call" else "arguments"
    item_id = f"{item_type}_theirs"
    item = {"type": item_type, "id": item_id, "status": "in_progress", "name": "f", key: ""}
    item |= {"server_label": "s"} if item_type == "mcp_call" else {"call_id": f"call_{index}"}
    kind = f"response.{item_type}_{key}"
    where = {"output_index": index, "item_id": item_id}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": item},
        {"type": f"{kind}.delta", **where, "delta": '{"a"'},
        {"type": f"{kind}.delta", **where, "delta": ":1}"},
        {"type": f"{kind}.done", **where, key: '{"a":1}'},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", key: '{"a":1}'},
        },
    ]


def turn() -> list[Event]:
    """All of them one after another, as OpenAI sends them, ended well."""
    items = [
        *reasoning(0),
        *web_search(1),
        *message(2),
        *call(3),
        *call(4, "custom_tool_call"),
        *call(5, "mcp_call"),
    ]
    output = [event["item"] for event in items if event["type"] == "response.output_item.done"]
    ended = {**_RESPONSE, "status": "completed", "output": output, "service_tier": "flex", "vendor": {"x": 1}}
    ended["usage"] = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13, "vendor_tokens": 2}
    return [
        {"type": "response.created", "response": _RESPONSE},
        {"type": "response.queued", "response": _RESPONSE},
        {"type": "response.in_progress", "response": _RESPONSE},
        *items,
        {"type": "slug:vendor_event", "x": [1]},
        {"type": "response.completed", "response": ended},
    ]
