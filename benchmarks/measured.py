"""Runs a command and notes its wall seconds and the peak of its resident memory, all its processes' largest.

    python benchmarks/measured.py NOTE.json COMMAND…

Imports nothing large: what a parent holds when it starts a child counts as the child's peak.
"""

import json
import resource
import subprocess
import sys
import time

start = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
with open(sys.argv[1], "w") as file:
    json.dump({"wall_s": seconds, "peak_rss_bytes": peak, "returncode": code}, file)
