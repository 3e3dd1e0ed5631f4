"""Which conversation gets which slot: pure, with the time as a number."""

import itertools

import pytest

from local_engine import request_of
from openline.engines.slots import QUIET_SECONDS, OpeningProjection, Slots, Wanted, wanted
from openline.protocol.items import item_of
from openline.state.context import EMPTY

LONG = "Be good. " * 200
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "something"}


def message(text, role="user"):
    return item_of({"type": "message", "role": role, "content": text})


def turn(conversation, family=b"f", *, shared=1000, own=100):
    return Wanted(conversation, family, shared, own)


def once(slots, wanted_turn, now=0.0, *, called=True):
    """A turn from its beginning to its end."""
    slot = slots.take(wanted_turn, now)
    slots.release(slot, wanted_turn, now, called=called)
    return slot


class TestIdentity:
    def test_every_turn_of_a_conversation_is_told_as_the_same(self):
        """Instructions, tools and what stands before the model's first word decide; what follows does not."""
        first = EMPTY.extend([message("Look.")])
        later = first.extend([item_of(CALL), item_of(OUTPUT)])
        whole = EMPTY.extend([message("Look."), item_of(CALL), item_of(OUTPUT)])
        turns = [wanted(request_of([], "m", context, instructions=LONG)) for context in (first, later, whole)]
        assert len({each.conversation for each in turns}) == 1
        assert turns[1].own_bytes == turns[2].own_bytes > turns[0].own_bytes

    @pytest.mark.parametrize(
        "other",
        [
            {"said": "Look!"},
            {"instructions": "Be bad."},
            {"tools": [{"type": "function", "name": "f"}]},
            {"prompt_cache_key": "k"},
        ],
    )
    def test_another_beginning_is_another_conversation(self, other):
        """Two conversations whose prompts differ from the start must not share a slot."""
        one = wanted(request_of("Look.", "m", instructions=LONG))
        another = wanted(request_of(**{"said": "Look.", "model": "m", "instructions": LONG, **other}))
        assert one.conversation != another.conversation
        assert (one.family == another.family) == (other.keys() <= {"said", "prompt_cache_key"})

    def test_a_warm_up_has_no_conversation_yet(self):
        """What the user will say is still to come; a warm-up in the middle of a conversation belongs to it."""
        assert wanted(request_of([], "m", instructions=LONG, generate=False)).conversation is None
        spoken = EMPTY.extend([message("Look."), message("Yes.", "assistant")])
        in_the_middle = wanted(request_of([], "m", spoken, instructions=LONG, generate=False))
        assert in_the_middle.conversation == wanted(request_of([], "m", spoken, instructions=LONG)).conversation

    def test_the_opening_folds_locally(self):
        """In whatever pieces a context is folded, the opening is the same."""
        items = [message("a"), message("b"), item_of(CALL), item_of(OUTPUT), message("c")]
        fold = OpeningProjection()
        whole = fold.extend(fold.start(), items)
        for cut in range(len(items) + 1):
            assert fold.extend(fold.extend(fold.start(), items[:cut]), items[cut:]) == whole


class TestChoice:
    def test_conversations_in_turn_keep_their_slots(self):
        """Each finds its own again, although all begin alike."""
        slots = Slots(3)
        conversations = [bytes([number]) for number in range(3)]
        rounds = [[once(slots, turn(each)) for each in conversations] for _ in range(3)]
        assert rounds == [[0, 1, 2]] * 3

    def test_a_new_conversation_takes_the_slot_used_longest_ago(self):
        """Where there are more conversations than slots."""
        slots = Slots(2)
        once(slots, turn(b"a"), 1.0)
        once(slots, turn(b"b"), 2.0)
        once(slots, turn(b"a"), 3.0)
        assert once(slots, turn(b"c"), 4.0) == 1

    def test_a_new_conversation_takes_over_one_at_rest_that_begins_alike(self):
        """An agent that has answered is done: the next one finds instructions and tools in its slot."""
        slots = Slots(4)
        assert once(slots, turn(b"a"), called=False) == 0
        assert once(slots, turn(b"b"), called=False) == 0

    def test_one_that_waits_for_a_tool_is_left_alone(self):
        """Its next turn comes as soon as the tool has run; only after a long silence it has probably been stopped."""
        slots = Slots(4)
        once(slots, turn(b"a"), 0.0, called=True)
        assert once(slots, turn(b"b"), 1.0) == 1
        assert once(slots, turn(b"c"), QUIET_SECONDS) == 0

    def test_no_more_is_lost_than_found(self):
        """A long conversation behind a short common beginning keeps its slot while there is an empty one."""
        slots = Slots(2)
        once(slots, turn(b"a", shared=100, own=5000), called=False)
        assert once(slots, turn(b"b", shared=100, own=10)) == 1

    def test_a_turn_finds_its_warm_up_even_while_that_runs(self):
        """The warm-up is cancelled when the turn starts; the slot then belongs to the turn."""
        slots = Slots(4)
        warm_up, first = turn(None), turn(b"a")
        assert slots.take(warm_up, 0.0) == 0
        assert slots.take(first, 0.1) == 0
        slots.release(0, warm_up, 0.2, called=False)
        assert slots.take(turn(b"b"), 0.3) == 1, "the first turn still has its slot"
        slots.release(0, first, 0.4, called=True)
        assert once(slots, turn(b"a"), 0.5) == 0

    def test_warm_ups_of_one_beginning_share_a_slot(self):
        """A client that warms up twice does not take two."""
        slots = Slots(4)
        assert [once(slots, turn(None)), once(slots, turn(None))] == [0, 0]

    def test_two_turns_of_one_conversation_at_once_get_two(self):
        """A fork does not wait for the other one's end."""
        slots = Slots(4)
        assert [slots.take(turn(b"a"), 0.0), slots.take(turn(b"a"), 0.0)] == [0, 1]

    def test_llama_chooses_when_all_are_busy(self):
        """It queues the turn, and the next slot that is free takes it."""
        slots = Slots(2)
        for number in range(2):
            slots.take(turn(bytes([number])), 0.0)
        assert slots.take(turn(b"c"), 0.0) is None
        assert "busy=2" in repr(slots)

    def test_nothing_is_given_twice(self):
        """Whatever comes in whatever order, a busy slot goes to nobody else."""
        for order in itertools.permutations([b"a", b"b", b"c", b"a"]):
            slots = Slots(3)
            taken = [slot for slot in (slots.take(turn(each), 0.0) for each in order) if slot is not None]
            assert len(set(taken)) == len(taken) == 3
