"""How the bundled checkpoint was made: `python -m model.training --help`."""
