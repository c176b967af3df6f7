"""Faults on purpose, against a real server: `python -m loadtests.faults NAME --help`.

Each script keeps a server under load, breaks something, and says whether the server kept its
promises. They talk to a URL, and to process ids of the server that they started.
"""
