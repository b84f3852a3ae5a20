"""For tests on a real cluster."""

import os

os.environ.update({"RAY_worker_niceness": "0"})  # else its workers wait for all other tests
