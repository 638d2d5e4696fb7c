"""Property tests draw the same examples at every run, so that a failure is a change's and not the day's.

New examples: `HYPOTHESIS_PROFILE=random pytest ...`. No deadlines: machines are shared, and timings decide no test.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
