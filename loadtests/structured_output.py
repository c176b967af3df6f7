"""What a grammar costs a decode step: the same batch with and without, interleaved.

    python -m loadtests.structured_output --batch 1,32

Every sequence writes an array of objects that does not end; the numbers are medians over the
steps in which all of them decode. `build` holds the masks, `sample` puts them on the logits,
`book` takes the drawn tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from model.threads import set_wait_policy

set_wait_policy(os.environ)  # before torch is imported

from model.checkpoint_files import bundled_checkpoint
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from service.engine.core import EngineCore
from service.engine.messages import EngineConfig, Submit
from service.engine.start import start_engine

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "likes": {"type": "array", "items": {"enum": ["cake", "rain"]}, "maxItems": 3},
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}
PARTS = ("step", "schedule", "build", "forward", "sample", "book")


def run(
    core: EngineCore, prompt: list[int], batch: int, num_tokens: int, grammar: GrammarSpec | None
) -> list[list[float]]:
    """Milliseconds of each part, for each step in which all sequences decode."""
    for i in range(batch):
        params = SamplingParams(
            max_tokens=num_tokens, seed=i, grammar=grammar, ignore_eos=grammar is None
        )
        core.add(Submit(i, prompt, params))
    rows = []
    while core.has_work:
        outputs = core.step()
        profile = core.last_step
        if len(outputs) == batch == profile.num_tokens:
            rows.append([1e3 * float(getattr(profile, f"{part}_s")) for part in PARTS])
        if any(output.error for output in outputs):
            raise RuntimeError(str([output.error for output in outputs]))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=bundled_checkpoint())
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    core, info = start_engine(EngineConfig(str(arguments.model), threads=arguments.threads))
    prompt = Tokenizer.from_directory(arguments.model).encode("Once upon a time")
    spec = GrammarSpec("json_schema", json.dumps(SCHEMA))
    print(f"{info.vocab_size} tokens, {info.dtype}, {info.threads} threads; medians in ms")
    print(f"{'batch':>5} {'grammar':>8} " + " ".join(f"{part:>9}" for part in PARTS))
    for batch in map(int, arguments.batch.split(",")):
        rows: dict[str, list[list[float]]] = {"none": [], "schema": []}
        for _ in range(arguments.rounds):
            rows["none"] += run(core, prompt, batch, arguments.tokens, None)
            rows["schema"] += run(core, prompt, batch, arguments.tokens, spec)
        for name, some in rows.items():
            medians = [statistics.median(column) for column in zip(*some, strict=True)]
            print(f"{batch:5} {name:>8} " + " ".join(f"{median:9.3f}" for median in medians))


if __name__ == "__main__":
    main()
