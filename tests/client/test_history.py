"""What a conversation has been: to go on with by its id, and to send again in full."""

from __future__ import annotations

import msgspec
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage

from openline import ClientSettings, History, OpenlineError
from openline.client.create import Create, checked, encode
from openline.client.history import encode_items
from openline.protocol.items import read_item

USER = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
SYSTEM = {"type": "message", "role": "system", "content": "Be brief."}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "1"}
BARE = {"type": "reasoning", "id": "rs_1", "summary": []}
SEALED = {**BARE, "encrypted_content": "sealed"}


def response(*output, **more):
    return {"id": "resp_1", "status": "completed", "store": False, "output": list(output), **more}


def sent_again(history):
    return msgspec.json.decode(b"[%b]" % history.everything().items)


def test_inputs_and_outputs_stand_in_the_order_they_were_said():
    """Guide "Conversation state": the parent's input, its output, then the input."""
    history = History()
    assert history.is_empty
    history.add("Hello.", response(CALL))
    history.add([OUTPUT], response(SAID, id="resp_2"))
    assert history.items() == sent_again(history) == [USER, CALL, OUTPUT, SAID]
    assert (history.response_id, history.is_stored, len(history)) == ("resp_2", False, 4)


def test_every_item_of_it_is_one_that_servers_read():
    """What goes back is what `protocol.items` takes."""
    history = History()
    history.add("Hello.", response(SEALED, CALL, SAID))
    for index, item in enumerate(history.items()):
        read_item(msgspec.json.encode(item), f"input[{index}]")


@pytest.mark.parametrize(("store", "expected"), [(True, True), (None, True), (False, False)])
def test_whether_it_was_stored_is_the_responses_own_word(store, expected):
    """`store` defaults to true, and a server may say that it did not."""
    history = History()
    history.add("Hello.", response(SAID, store=store))
    assert history.is_stored is expected
    history.add("Hello.", response(SAID, store=True), is_stored=False)
    assert history.is_stored is False


def test_reasoning_that_is_only_an_id_does_not_go_out_again():
    """Behind it a server that stores nothing finds nothing; and the call's id would point to it in vain."""
    history = History()
    history.add("Hello.", response(BARE, CALL))
    assert history.items() == [USER, {name: value for name, value in CALL.items() if name != "id"}]
    history.add([OUTPUT], response(SEALED, {**CALL, "call_id": "call_2"}))
    assert history.items()[-2:] == [SEALED, {**CALL, "call_id": "call_2"}]


def test_a_call_that_was_cut_leaves_the_conversation():
    """Nobody can answer half a call, and while it stands unanswered nothing else can be said: everything goes out again without it."""
    history = History()
    cut = {**CALL, "arguments": '{"a', "status": "incomplete"}
    history.add("Hello.", response(SAID, cut, status="incomplete"))
    assert history.items() == [USER, SAID]
    assert history.response_id is None
    assert not history.is_empty


def test_a_summary_stands_for_what_was_before_it():
    """A client may drop what stands before the latest compaction item; what the system said is no part of that.

    Source: WebSocket mode guide, "Compaction".
    """
    history = History()
    history.add([SYSTEM, USER], response(SAID))
    summary = {"type": "compaction", "id": "cmp_1", "encrypted_content": "sealed"}
    history.add("More.", response({**SAID, "id": "msg_2"}, summary, {**SAID, "id": "msg_3"}))
    assert history.items() == [SYSTEM, summary, {**SAID, "id": "msg_3"}]


def test_the_size_of_what_is_kept_is_bounded_and_the_ids_go_on():
    """At `bytes_max` everything is kept; a byte more, and the items are given up, which is told only when they are needed."""
    whole = History()
    whole.add("Hello.", response(SAID))
    size = len(whole.everything().items) - 1  # without the comma
    exact, short = History(bytes_max=size), History(bytes_max=size - 1)
    for history in (exact, short):
        history.add("Hello.", response(SAID))
        assert history.response_id == "resp_1"
    assert exact.items() == whole.items()
    assert short.items() == []
    assert not short.is_empty
    with pytest.raises(OpenlineError, match=f"history_bytes_max = {size - 1}"):
        short.everything()
    summary = {"type": "compaction", "id": "cmp_1", "encrypted_content": "sealed"}
    short.add("More.", response(summary))
    assert short.items() == [summary], "a summary makes it whole again"


def test_a_conversation_can_begin_behind_a_response_that_only_the_server_knows():
    """Then a full resend names that one, and brings what was said since."""
    history = History()
    history.add("Hello.", response(SAID))
    history.restart("resp_far")
    assert (history.response_id, history.is_stored, history.items()) == ("resp_far", True, [])
    history.add("More.", response(SAID, id="resp_2"))
    everything = history.everything()
    assert everything.root == "resp_far"
    assert len(sent_again(history)) == 2
    history.restart()
    assert history.is_empty


def test_objects_of_the_sdk_are_taken_as_items():
    """An app that holds the OpenAI SDK's objects passes them as they are; fields that were never set stay away."""
    message = ResponseOutputMessage.model_validate(SAID)
    call = ResponseFunctionToolCall(arguments="{}", call_id="call_1", name="f", type="function_call")
    encoded = [msgspec.json.decode(item) for item in encode_items([message, call, msgspec.Raw(b'{"role": "user"}')])]
    assert encoded[0] == SAID
    assert encoded[1] == {"arguments": "{}", "call_id": "call_1", "name": "f", "type": "function_call"}
    assert encoded[2] == {"role": "user"}


@pytest.mark.parametrize("item", [7, "text", None, ["nested"]])
def test_what_is_no_item_is_refused(item):
    """The message names the place and what came."""
    with pytest.raises(OpenlineError, match=r"input\[1\] is a "):
        encode_items([USER, item])


# The two forms of a create.


def create(history, **fields):
    return Create(fields, encode_items([OUTPUT]), history, "key_1", may_be_known=False, on_lost="raise", loops=False)


def body_of(built):
    return msgspec.json.decode(built.post())


def test_only_what_is_new_goes_to_a_server_that_holds_the_rest():
    """A stored parent is known on every connection, another one only on the connection that made it."""
    stored, unstored = History(), History()
    stored.add("Hello.", response(CALL, store=True))
    unstored.add("Hello.", response(CALL))
    for built in (create(stored).body(None), create(unstored).body("resp_1")):
        assert body_of(built) == {"input": [OUTPUT], "previous_response_id": "resp_1", "stream": True}
        assert not built.is_whole
    for built in (create(unstored).body(None), create(unstored).body("resp_0"), create(stored).body(None, whole=True)):
        assert body_of(built) == {"input": [USER, CALL, OUTPUT], "stream": True}
        assert built.is_whole


def test_a_frame_says_how_it_travels_beside_the_same_body():
    """Key and `starting_after` stand in the frame; the body is the one that goes out over HTTP, for it is hashed.

    Source: docs/adr/0013.
    """
    built = create(History(), model="m").body(None)
    frame = msgspec.json.decode(built.frame("key_1", 4))
    assert frame["type"] == "response.create"
    assert (frame["idempotency_key"], frame["starting_after"]) == ("key_1", 4)
    rest = {name: value for name, value in frame.items() if name not in {"type", "idempotency_key", "starting_after"}}
    assert rest == {name: value for name, value in body_of(built).items() if name != "stream"}
    assert "idempotency_key" not in msgspec.json.decode(built.frame(None))


def test_fields_are_passed_on_but_for_those_that_are_none():
    """None leaves a field out; `stream` is the transport's; a lane or a place in a stream is the session's business."""
    assert checked({"model": None, "store": False, "stream": False}) == {"store": False}
    for name in ("stream_id", "starting_after"):
        with pytest.raises(OpenlineError, match=name):
            checked({name: 1})


def test_objects_of_the_sdk_are_taken_anywhere_in_a_create():
    """Tools, for instance; what is not JSON and no such object is refused by its type."""
    call = ResponseFunctionToolCall(arguments="{}", call_id="call_1", name="f", type="function_call")
    assert msgspec.json.decode(encode({"tools": [call]}))["tools"][0]["name"] == "f"
    with pytest.raises(OpenlineError, match="object"):
        encode({"tools": [object()]})


@pytest.mark.parametrize("field", ["tries_max", "idle_seconds_max", "history_bytes_max"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_bound_is_more_than_nothing(field, value):
    """The message names the field, what came and what was expected."""
    with pytest.raises(ValueError, match=f"{field} is {value}: expected more than 0"):
        ClientSettings(**{field: value})


def test_what_happens_to_a_lost_turn_is_one_of_two_things():
    """`on_lost` is `raise` or `restart`."""
    with pytest.raises(ValueError, match="on_lost is 'retry'"):
        ClientSettings(on_lost="retry")
