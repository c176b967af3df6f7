"""Load for a running server, with Locust's web UI, headless, or by many workers.

    locust -f loadtests/locustfile.py GenerateUser --host http://127.0.0.1:8000
    locust -f loadtests/locustfile.py GenerateUser --host URL --headless -u 16 -t 30s
    locust -f loadtests/locustfile.py GenerateUser --host URL --headless -t 60s \
           --pattern poisson --rate 8 --stop-timeout 30
    locust -f loadtests/locustfile.py ChatUser --host URL --headless -u 8 -t 30s --workload chat
    locust -f loadtests/locustfile.py GenerateUser --host URL --headless -u 256 -t 60s --processes 4

Users and what they report: loadtests/load/users.py. Patterns of load: patterns.py. Workloads:
workloads.py. `locust -f loadtests/locustfile.py --help` lists the options.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Locust loads this file by its path, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.load import options  # its listener adds the options
from loadtests.load.shapes import Pattern
from loadtests.load.users import ChatUser, GenerateUser

__all__ = ["ChatUser", "GenerateUser", "Pattern", "options"]
