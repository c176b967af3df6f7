"""One module per contender, each run as its own process: `work` in, measurements out."""
