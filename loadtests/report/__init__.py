"""Why does inference need expensive GPUs? Measured here, computed beside it, and drawn.

`vitrine report` and `make report` run `python -m loadtests.report`.
"""
