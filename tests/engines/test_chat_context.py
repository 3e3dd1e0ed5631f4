"""A conversation as Chat Completions messages."""

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.chat_context import ChatProjection, short_id
from openline.engines.profiles import FAMILIES, GENERIC, KINDS, Profile
from openline.protocol.errors import ProtocolError
from openline.protocol.items import Item, read_item

PROJECTION = ChatProjection(GENERIC)


def items(*values):
    return [read_item(msgspec.json.encode(value), "input[0]") for value in values]


def messages(*values, instructions=None, projection=PROJECTION):
    state = projection.extend(projection.start(), items(*values))
    return json.loads(b"[%b]" % state.encoded(instructions))


def refused(*values):
    with pytest.raises(ProtocolError) as caught:
        messages(*values)
    return caught.value


def user(content):
    return {"type": "message", "role": "user", "content": content}


def assistant(*texts):
    parts = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": parts}


def call(call_id, name="look", arguments="{}", **fields):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **fields}


def output(call_id, value="done"):
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def shown(call_id, url):
    return [
        {"type": "text", "text": f"Output of tool call {call_id}:"},
        {"type": "image_url", "image_url": {"url": url}},
    ]


def chat_call(call_id, name="look", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class TestSystem:
    def test_instructions_and_leading_system_items_are_one_message(self):
        """Instructions come first, then system and developer items, an empty line between them."""
        got = messages(
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            user("Hi"),
            instructions="You help.",
        )
        assert got[0] == {"role": "system", "content": "You help.\n\nBe kind.\n\nBe brief."}
        assert [message["role"] for message in got] == ["system", "user"]

    def test_instructions_belong_to_one_turn(self):
        """The same context serves turns with other instructions, or none."""
        state = PROJECTION.extend(PROJECTION.start(), items(user("Hi")))
        assert state.encoded("A.") == b'{"role":"system","content":"A."},' + state.encoded(None)

    @pytest.mark.parametrize("role", ["system", "developer", "user"])
    def test_late_system_item_stays_in_place_in_the_role_that_is_set(self, role):
        """So that what stands before it does not change."""
        got = messages(
            user("Hi"),
            {"role": "developer", "content": "Now shout."},
            projection=ChatProjection(Profile(late_system_role=role)),
        )
        assert got == [{"role": "user", "content": "Hi"}, {"role": role, "content": "Now shout."}]

    def test_system_item_with_an_image_is_refused_by_its_path(self):
        """A system message is text."""
        error = refused({"role": "system", "content": [{"type": "input_image", "image_url": "data:x"}]})
        assert (error.code, error.param) == ("unsupported_parameter", "input[*].content[0].type")


class TestUser:
    @pytest.mark.parametrize("content", ["Hi", [{"type": "input_text", "text": "Hi"}]])
    def test_text_is_a_plain_string(self, content):
        """Templates of many local models take nothing else."""
        assert messages(user(content)) == [{"role": "user", "content": "Hi"}]

    def test_parts_keep_their_order_and_fields(self):
        """Text, image, file and audio each have their form in Chat Completions."""
        audio = {"data": "AAAA", "format": "wav"}
        got = messages(
            user(
                [
                    {"type": "input_text", "text": "See"},
                    {"type": "input_image", "image_url": "https://x.test/a.png", "detail": "low"},
                    {"type": "input_image", "image_url": "data:image/png;base64,AA"},
                    {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"},
                    {"type": "input_file", "file_id": "file_1"},
                    {"type": "input_audio", "input_audio": audio},
                ]
            )
        )
        assert got[0]["content"] == [
            {"type": "text", "text": "See"},
            {"type": "image_url", "image_url": {"url": "https://x.test/a.png", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA", "filename": "a.pdf"}},
            {"type": "file", "file": {"file_id": "file_1"}},
            {"type": "input_audio", "input_audio": audio},
        ]

    @pytest.mark.parametrize(
        ("part", "param"),
        [
            ({"type": "input_file", "file_url": "http://169.254.169.254/"}, "input[*].content[1].file_url"),
            ({"type": "input_image", "file_id": "file_1"}, "input[*].content[1].file_id"),
            ({"type": "input_video", "url": "x"}, "input[*].content[1].type"),
        ],
    )
    def test_what_cannot_be_passed_on_is_refused_by_its_path(self, part, param):
        """The server fetches nothing and keeps no files."""
        error = refused(user([{"type": "input_text", "text": "See"}, part]))
        assert (error.code, error.param, error.status) == ("unsupported_parameter", param, 400)

    @pytest.mark.parametrize("part", [{"type": "input_image"}, {"type": "input_text"}, {"type": "input_file"}])
    def test_part_without_its_content_is_refused(self, part):
        """An empty part would be guessed at by the model."""
        assert refused(user([part, {"type": "input_image", "image_url": "x"}])).code == "missing_required_parameter"

    @pytest.mark.parametrize("value", [user(3), user([{"type": "input_image", "image_url": {"url": "x"}}])])
    def test_wrong_types_are_refused(self, value):
        """The message says what came and what was expected."""
        assert refused(value).code == "invalid_type"

    def test_unknown_role_is_refused(self):
        """With the roles that there are."""
        assert refused({"role": "tool", "content": "x"}).param == "input[*].role"


class TestAssistant:
    def test_items_in_a_row_are_one_message(self):
        """Reasoning, text and parallel calls of one turn, as Chat Completions has them."""
        got = messages(
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            assistant("Let me ", "look."),
            call("call_1", arguments='{"a":1}'),
            call("call_2"),
            output("call_1"),
            output("call_2"),
        )
        assert got == [
            {
                "role": "assistant",
                "content": "Let me look.",
                "reasoning_content": "Hm.",
                "tool_calls": [chat_call("call_1", arguments='{"a":1}'), chat_call("call_2")],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
            {"role": "tool", "tool_call_id": "call_2", "content": "done"},
        ]

    def test_messages_in_a_row_are_joined_by_a_line_break(self):
        """Two assistant messages never follow each other."""
        assert messages(assistant("a"), assistant("b")) == [{"role": "assistant", "content": "a\nb"}]

    def test_content_is_null_only_beside_calls(self):
        """A message has content or calls."""
        assert messages(call("call_1"))[0]["content"] is None

    def test_trailing_reasoning_is_a_message_without_text(self):
        """A turn that was cut inside its reasoning can be continued."""
        reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
        assert messages(reasoning) == [{"role": "assistant", "content": "", "reasoning_content": "Hm."}]

    def test_sealed_reasoning_leaves_no_trace(self):
        """Nobody but its maker can read it."""
        assert messages({"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}, user("Hi")) == [
            {"role": "user", "content": "Hi"}
        ]

    def test_refusal_becomes_text(self):
        """Chat Completions takes no refusals back."""
        content = [{"type": "refusal", "refusal": "I will not."}]
        assert messages({"role": "assistant", "content": content})[0]["content"] == "I will not."

    def test_custom_call_has_its_text_as_one_argument(self):
        """As its tool was announced."""
        custom = {"type": "custom_tool_call", "call_id": "call_1", "name": "patch", "input": 'a "b"\n'}
        assert messages(custom)[0]["tool_calls"] == [chat_call("call_1", "patch", '{"input":"a \\"b\\"\\n"}')]

    def test_call_in_a_namespace_has_the_name_that_its_tool_has(self):
        """Also in a turn that does not bring the tool."""
        assert messages(call("c", "find", namespace="docs"))[0]["tool_calls"] == [chat_call("c", "docs__find")]

    def test_empty_arguments_become_an_empty_object(self):
        """Servers parse the arguments of the history."""
        assert messages(call("c", arguments=""))[0]["tool_calls"][0]["function"]["arguments"] == "{}"


class TestOutputs:
    def test_list_of_texts_is_one_text(self):
        """Nothing is put between them."""
        texts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
        assert messages(call("c"), output("c", texts))[1]["content"] == "ab"

    def test_images_follow_in_a_user_message(self):
        """A tool may show something, but Chat Completions takes images from users only.

        Source: Chat Completions reference, "Tool message"; vllm-project/vllm#43203.
        """
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:x"}]
        got = messages(call("c"), output("c", parts))
        assert got[1:] == [
            {"role": "tool", "tool_call_id": "c", "content": "a"},
            {"role": "user", "content": shown("c", "data:x")},
        ]

    def test_images_follow_behind_all_outputs_of_the_turn(self):
        """Nothing may stand between the outputs of parallel calls; a message of the user comes into the same one."""
        image = [{"type": "input_image", "image_url": "data:x"}]
        got = messages(call("c1"), call("c2"), output("c1", image), output("c2"), user("Well?"))
        assert [message["role"] for message in got] == ["assistant", "tool", "tool", "user"]
        assert got[1]["content"] == "The output is in the next user message."
        assert got[3]["content"] == [*shown("c1", "data:x"), {"type": "text", "text": "Well?"}]

    @pytest.mark.parametrize(
        "given",
        [
            [call("c1"), call("c2"), user("Wait."), user("Stop."), output("c1"), output("c2")],
            [call("c1"), call("c2"), user("Wait."), output("c1"), user("Stop."), output("c2")],
            [call("c1"), call("c2"), output("c2"), user("Wait."), user("Stop."), output("c1")],
        ],
    )
    def test_what_a_user_says_before_the_outputs_follows_behind_them(self, given):
        """Steering puts it there, and real servers take nothing between a call and its output.

        Source: Mid-turn steering guide, "Outcomes"; Chat Completions reference, "messages".
        """
        got = messages(user("Hi"), *given, assistant("Well."))
        assert [message["role"] for message in got] == ["user", "assistant", "tool", "tool", "user", "assistant"]
        assert got[4]["content"] == "Wait.\n\nStop."

    def test_a_user_message_behind_outputs_stays_its_own(self):
        """Nothing waits there any more; what had waited comes into it."""
        assert [m["role"] for m in messages(call("c"), output("c"), user("a"), user("b"))][2:] == ["user", "user"]
        assert messages(call("c"), user("a"), output("c"), user("b"), user("c"))[2:] == [
            {"role": "user", "content": "a\n\nb"},
            {"role": "user", "content": "c"},
        ]

    def test_a_call_that_is_answered_later_holds_no_user_message_up_for_ever(self):
        """Once the assistant has gone on, what the user says stands where it was said.

        Source: Responses API reference, "Function calling", `async`.
        """
        got = messages(call("c", **{"async": True}), user("And?"), assistant("Later."), user("So?"), user("Now?"))
        assert [message["role"] for message in got] == ["assistant", "user", "assistant", "user", "user"]

    @pytest.mark.parametrize(
        ("made", "answer", "name", "arguments", "content"),
        [
            (
                {
                    "type": "local_shell_call",
                    "id": "ls_1",
                    "call_id": "c",
                    "status": "completed",
                    "action": {"b": 1, "a": 2},
                },
                {"type": "local_shell_call_output", "id": "c", "output": "ok"},
                "local_shell",
                '{"action":{"a":2,"b":1}}',
                "ok",
            ),
            (
                {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
                {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x"}]},
                "shell",
                '{"action":{"commands":["ls"]}}',
                '{"output":[{"stdout":"x"}]}',
            ),
            (
                {
                    "type": "apply_patch_call",
                    "call_id": "c",
                    "status": "completed",
                    "operation": {"type": "delete_file"},
                },
                {"type": "apply_patch_call_output", "call_id": "c", "status": "failed", "output": "no"},
                "apply_patch",
                '{"operation":{"type":"delete_file"}}',
                '{"output":"no","status":"failed"}',
            ),
            (
                {"type": "computer_call", "call_id": "c", "id": "cu_1", "action": {"type": "screenshot"}},
                {
                    "type": "computer_call_output",
                    "call_id": "c",
                    "output": {"type": "computer_screenshot", "image_url": "data:x"},
                },
                "computer",
                '{"action":{"type":"screenshot"}}',
                [{"type": "image_url", "image_url": {"url": "data:x"}}],
            ),
        ],
    )
    def test_built_in_calls_that_the_client_runs_have_a_form_too(self, made, answer, name, arguments, content):
        """The type is the function, its fields are the arguments."""
        got = messages(made, answer)
        assert got[0]["tool_calls"] == [chat_call("c", name, arguments)]
        if isinstance(content, list):
            assert got.pop() == {"role": "user", "content": shown("c", content[0]["image_url"]["url"])}
            content = "The output is in the next user message."
        assert got[1:] == [{"role": "tool", "tool_call_id": "c", "content": content}]

    def test_built_in_call_without_an_id_is_refused(self):
        """Nothing could answer it."""
        assert refused({"type": "shell_call", "action": {}}).param == "input[*].call_id"

    def test_screenshot_of_a_wrong_type_is_refused(self):
        """As every other field."""
        shot = {"type": "computer_screenshot", "image_url": 3}
        assert refused({"type": "computer_call_output", "call_id": "c", "output": shot}).code == "invalid_type"


class TestOthers:
    @pytest.mark.parametrize("item_type", ["web_search_call", "mcp_call", "mcp_list_tools", "image_generation_call"])
    def test_traces_of_hosted_tools_are_left_out(self, item_type):
        """They happened elsewhere, and nobody answers them."""
        assert messages(user("Hi"), {"type": item_type, "id": "x"}) == [{"role": "user", "content": "Hi"}]

    @pytest.mark.parametrize("item_type", ["item_reference", "compaction", "compaction_trigger", "new"])
    def test_items_without_a_form_are_refused_by_their_type(self, item_type):
        """Nothing of a conversation is lost silently."""
        error = refused({"type": item_type, "id": "x"})
        assert (error.code, error.param, error.status) == ("unsupported_parameter", "input", 400)
        assert item_type in error.message

    def test_broken_escape_is_the_clients_error(self):
        """An item is read twice, its head first; what is wrong behind it is found here."""
        with pytest.raises(ProtocolError) as caught:
            PROJECTION.extend(PROJECTION.start(), [Item(rb'{"role":"user","content":"\ud800"}', "message")])
        assert caught.value.status == 400

    def test_item_ids_do_not_change_the_bytes(self):
        """A resend by a client that dropped them equals what we kept."""
        kept = PROJECTION.extend(PROJECTION.start(), items(assistant("a"), call("c", id="fc_1", status="completed")))
        resent = PROJECTION.extend(PROJECTION.start(), items({"role": "assistant", "content": "a"}, call("c")))
        assert kept.encoded(None) == resent.encoded(None)


texts = st.text(st.characters(codec="utf-8"), max_size=8)
ids = st.sampled_from(["c1", "c2", "c3"])
image = st.just({"type": "input_image", "image_url": "data:image/png;base64,AA"})
input_text = st.builds(lambda text: {"type": "input_text", "text": text}, texts)
contents = texts | st.lists(input_text | image, max_size=3)
conversation_items = st.one_of(
    st.builds(user, contents),
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["system", "developer"]), texts),
    st.builds(assistant, texts, texts),
    st.builds(
        lambda text: {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}, texts
    ),
    st.builds(lambda call_id, space: call(call_id, namespace=space), ids, st.none() | st.just("docs")),
    st.builds(
        lambda call_id, text: {"type": "custom_tool_call", "call_id": call_id, "name": "p", "input": text}, ids, texts
    ),
    st.builds(output, ids, contents),
    st.just({"type": "web_search_call", "id": "ws_1"}),
)
said = st.lists(st.builds(user, contents) | st.builds(assistant, texts), max_size=2)


@st.composite
def steered(draw):
    """Parallel calls, and their outputs in any order, with what the user says before, between and behind them."""
    called = draw(st.lists(ids, min_size=1, unique=True))
    answers = [output(call_id, draw(contents)) for call_id in called]
    spoken = [user(draw(contents)) for _ in range(draw(st.integers(0, 3)))]
    return [*map(call, called), *draw(st.permutations([*answers, *spoken]))]


steered = steered()
conversations = st.lists(conversation_items, max_size=12) | st.lists(
    said | steered | conversation_items.map(lambda item: [item]), max_size=4
).map(lambda blocks: [item for block in blocks for item in block])
forms = [*KINDS.values(), *(msgspec.structs.replace(GENERIC, **fields) for fields in FAMILIES.values())]
projections = st.sampled_from([ChatProjection(profile) for profile in forms])


@given(
    projection=projections,
    conversation=conversations,
    cuts=st.lists(st.integers(0, 12), max_size=4),
    instructions=st.none() | texts,
)
def test_increments_give_the_bytes_of_a_full_resend(projection, conversation, cuts, instructions):
    """However a conversation is cut into turns, the upstream sees the same, whichever it is."""
    state, start = projection.start(), 0
    for cut in [*sorted(cuts), len(conversation)]:
        state = projection.extend(state, items(*conversation[start:cut]))
        start = max(start, cut)
    full = projection.extend(projection.start(), items(*conversation))
    assert state.encoded(instructions) == full.encoded(instructions)
    json.loads(b"[%b]" % full.encoded(instructions))


@given(projection=projections, blocks=st.lists(said | steered, max_size=4), cut=st.integers(0, 30))
def test_nothing_stands_between_calls_and_their_outputs(projection, blocks, cut):
    """Wherever the user speaks, and however it is cut into turns, the outputs follow the calls, all of them.

    Source: Chat Completions reference, "messages".
    """
    given = [item for block in blocks for item in block]
    state = projection.extend(projection.extend(projection.start(), items(*given[:cut])), items(*given[cut:]))
    full = projection.extend(projection.start(), items(*given)).encoded(None)
    assert state.encoded(None) == full
    unanswered: set[str] = set()
    for message in json.loads(b"[%b]" % full):
        if message["role"] == "tool":
            unanswered.remove(message["tool_call_id"])
        else:
            assert not unanswered
            unanswered = {each["id"] for each in message.get("tool_calls", ())}
    assert not unanswered


@given(projection=projections, trunk=conversations, left=conversations, right=conversations)
def test_forks_do_not_change_each_other(projection, trunk, left, right):
    """Two continuations of one context, and the context itself, keep their bytes."""
    parent = projection.extend(projection.start(), items(*trunk))
    before = parent.encoded(None)
    one = projection.extend(parent, items(*left))
    first = one.encoded(None)
    other = projection.extend(parent, items(*right))
    assert (parent.encoded(None), one.encoded(None)) == (before, first)
    assert other.encoded(None) == projection.extend(projection.start(), items(*trunk, *right)).encoded(None)


@given(call_id=st.text(st.characters(codec="utf-8")), other=st.text(st.characters(codec="utf-8")))
def test_short_ids_are_nine_letters_and_digits_and_stay_so(call_id, other):
    """Mistral's own ids pass unchanged; any other has one that is its alone.

    Source: mistral-common, `_validate_tool_call`; vllm-project/vllm#9019.
    """
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", short_id(call_id))
    assert short_id(short_id(call_id)) == short_id(call_id)
    assert (short_id(call_id) == short_id(other)) == (call_id == other or short_id(call_id) == other)


class TestProfiles:
    def test_roles_alternate_where_a_template_wants_it(self):
        """User messages in a row become one, a late system message among them."""
        late = {"role": "developer", "content": "Now shout."}
        got = messages(user("Hi"), late, user("Well?"), projection=ChatProjection(GEMMA))
        assert got == [{"role": "user", "content": "Hi\n\nNow shout.\n\nWell?"}]

    def test_a_user_message_behind_tool_outputs_follows_an_assistant(self):
        """Mistral takes no user message directly behind a tool's."""
        got = messages(call("c"), output("c"), user("Stop."), projection=ChatProjection(MISTRAL))
        assert [message["role"] for message in got] == ["assistant", "tool", "assistant", "user"]
        assert got[2]["content"] == "Done."

    def test_reasoning_is_left_out_where_no_name_is_known(self):
        """It leaves no empty message behind."""
        reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
        assert messages(reasoning, user("Hi"), projection=ChatProjection(KINDS["openai"])) == [
            {"role": "user", "content": "Hi"}
        ]


GEMMA = msgspec.structs.replace(GENERIC, **FAMILIES["gemma"])
MISTRAL = msgspec.structs.replace(GENERIC, **FAMILIES["mistral"])
