"""A database of each kind, empty, and gone after the test."""

import pytest

from state.stores import place as made_place


@pytest.fixture
async def place(request, tmp_path):
    """Where a database of this kind is."""
    async with made_place(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def store(place):
    """A store there."""
    return place.make()
