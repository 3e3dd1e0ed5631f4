"""What every test shares."""

import os

import pytest
from hypothesis import settings

# A failure always prints the blob that repeats it. CI tries the same examples on every run, so that a
# red run is about the change; at home each run tries new ones. No deadline: two busy cores decide it, not we.
settings.register_profile("home", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what is marked `long` too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: `make test-long` runs it"))
