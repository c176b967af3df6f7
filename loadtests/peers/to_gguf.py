"""`python -m loadtests.peers.to_gguf SOURCES CHECKPOINT TYPE FILE`: llama.cpp's own converter,
run by the peers' interpreter.

It knows pre-tokenizers by the hash of what they do to a test text and refuses others. Ours
split like GPT-2's or do not matter (the work is given as token ids): that one question is
answered for it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    sources, checkpoint, kind, file = sys.argv[1:]
    sys.path[:0] = [sources, str(Path(sources) / "gguf-py")]
    import conversion.base
    import convert_hf_to_gguf

    conversion.base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", kind, "--outfile", file]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
