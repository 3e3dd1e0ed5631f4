"""What every test shares."""

import os

from hypothesis import settings

# A failure always prints the blob that repeats it. CI tries the same examples on every run, so that a
# red run is about the change; at home each run tries new ones. No deadline: two busy cores decide it, not we.
settings.register_profile("home", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")
