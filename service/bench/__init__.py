"""The offline engine benchmark behind `vitrine bench`: the engine alone, without HTTP,
processes or text."""
