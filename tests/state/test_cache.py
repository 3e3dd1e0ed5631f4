"""What one connection remembers, and when it forgets."""

from __future__ import annotations

from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY


def anchor(response_id):
    return Anchor(response_id, EMPTY, "m", stored=False)


def held(cache, *ids, owner="ada"):
    """Which of these ids the cache holds."""
    return [response_id for response_id in ids if cache.get(owner, response_id) is not None]


def test_a_lane_remembers_its_latest_response_only():
    """What was the lane's latest before is let go; other lanes keep theirs.

    Source: WebSocket mode guide, "Connection-local cache".
    """
    cache = ConnectionCache()
    cache.keep("ada", None, anchor("resp_1"))
    cache.keep("ada", "side", anchor("resp_2"))
    cache.keep("ada", None, anchor("resp_3"))
    assert held(cache, "resp_1", "resp_2", "resp_3") == ["resp_2", "resp_3"]
    assert repr(cache) == "<ConnectionCache responses=2>"


def test_a_response_is_found_from_every_lane():
    """Another lane's latest response can be forked; finding it moves nothing.

    Source: WebSocket mode guide, "Fork".
    """
    cache = ConnectionCache()
    kept = anchor("resp_1")
    cache.keep("ada", "side", kept)
    assert cache.get("ada", "resp_1") is kept
    assert cache.get("ada", "resp_1") is kept


def test_another_owner_finds_nothing():
    """The owner is part of every look-up.

    Source: guarantees, "Owners".
    """
    cache = ConnectionCache()
    cache.keep("ada", None, anchor("resp_1"))
    cache.evict_failed("bob", None, "resp_1")
    assert held(cache, "resp_1", owner="bob") == []
    assert held(cache, "resp_1") == ["resp_1"]


def test_a_failed_continuation_evicts_its_own_lanes_parent():
    """The parent goes if it was this lane's latest.

    Source: WebSocket mode guide, "Continuing", eviction on failure.
    """
    cache = ConnectionCache()
    cache.keep("ada", "side", anchor("resp_1"))
    cache.evict_failed("ada", "side", "resp_1")
    assert held(cache, "resp_1") == []


def test_a_failed_fork_leaves_the_shared_parent():
    """A failure on one lane touches no other lane's response.

    Source: WebSocket mode guide, "Fork".
    """
    cache = ConnectionCache()
    cache.keep("ada", None, anchor("resp_1"))
    cache.evict_failed("ada", "fork", "resp_1")
    assert held(cache, "resp_1") == ["resp_1"]


def test_a_failure_that_continued_nothing_evicts_nothing():
    """A failed fresh turn, or one that named another id, leaves the lane's latest as it is."""
    cache = ConnectionCache()
    cache.keep("ada", None, anchor("resp_1"))
    cache.evict_failed("ada", None, None)
    cache.evict_failed("ada", None, "resp_0")
    cache.evict_failed("ada", "empty", "resp_1")
    assert held(cache, "resp_1") == ["resp_1"]
