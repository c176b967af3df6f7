"""The GPU path, tested and measured by one command: `python -m loadtests.gpu`."""
