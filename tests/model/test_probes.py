"""The probes: which keys count, that chance is chance, and what is made of the figures."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.checkpoint import Checkpoint, load_checkpoint
from model.checkpoint_files import bundled_checkpoint
from model.explain.heads import HeadReport, PictureError, draw_heads, heads_table
from model.explain.probes import (
    FIRST,
    INDUCTION,
    PREVIOUS,
    RIGHT,
    SAME,
    WRONG,
    HeadScores,
    Probe,
    Tally,
    induction_probe,
    pronoun_probes,
    text_probe,
)
from model.tokenizer import Tokenizer
from tests.engine.engines import TINY, random_model
from tests.model.explaining import recorded


def edges(probe: Probe, score: str) -> set[tuple[int, int]]:
    return {(int(query), int(key)) for query, key in probe.targets[score].nonzero()}


def test_keys_that_count_in_a_text() -> None:
    probe = text_probe([9, 5, 7, 5, 5])
    assert edges(probe, PREVIOUS) == {(1, 0), (2, 1), (3, 2), (4, 3)}
    assert edges(probe, FIRST) == {(1, 0), (2, 0), (3, 0), (4, 0)}
    assert edges(probe, SAME) == {(3, 1), (4, 1), (4, 3)}


def test_keys_that_count_in_a_repetition() -> None:
    probe = induction_probe([0], range(10, 90), 3, seed=4)
    a, b, c = probe.ids[1:4]
    assert probe.ids == [0, a, b, c, a, b, c]
    assert len({a, b, c}) == 3
    assert {a, b, c} <= set(range(10, 90))
    # the second a looks at what followed the first a, and so on
    assert edges(probe, INDUCTION) == {(4, 2), (5, 3), (6, 4)}
    assert induction_probe([0], range(10, 90), 3, seed=5).ids != probe.ids


def words(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token a word, its space included; all pronouns are one token."""
    ids, offsets, start = [0], [(0, 0)], 0
    for word in text.split(" "):
        end = start + len(word)
        ids.append(1 if word in ("he", "she", "it") else 2 + sum(word.encode()) % 200)
        offsets.append((max(start - 1, 0), end))
        start = end + 1
    return ids, offsets


def test_keys_that_count_in_sentences() -> None:
    fours = list(pronoun_probes(words))
    assert len(fours) == 5 * 3 * 9
    boy_girl = fours[0]  # One day, the boy saw the girl because he
    assert [edges(probe, RIGHT) for probe in boy_girl] == [{(9, 4)}, {(9, 7)}, {(9, 7)}, {(9, 4)}]
    assert [edges(probe, WRONG) for probe in boy_girl] == [{(9, 7)}, {(9, 4)}, {(9, 4)}, {(9, 7)}]
    for four in fours:
        for probe in four:
            assert len(edges(probe, RIGHT)) == len(edges(probe, WRONG)) == 1
            assert edges(probe, RIGHT) != edges(probe, WRONG)


def test_a_noun_of_several_tokens_counts_whole() -> None:
    def letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [2] * len(text), [(i, i + 1) for i in range(len(text))]

    probe = next(pronoun_probes(letters))[0]
    text = "One day, the boy saw the girl because he"
    begin = text.index("boy")
    assert edges(probe, RIGHT) == {(len(text) - 1, begin + i) for i in range(3)}
    assert {key for _, key in edges(probe, WRONG)} == {text.index("girl") + i for i in range(4)}


def test_a_model_that_cannot_see_the_pronoun_is_at_chance_in_every_four() -> None:
    """Whatever its heads do: here `he`, `she` and `it` are the same token."""
    tally = Tally(random_model(TINY))
    for four in list(pronoun_probes(words))[::20]:
        found = [tally.add(probe) for probe in four]
        lead = torch.stack([scores[RIGHT] - scores[WRONG] for scores in found]).sum(dim=0)
        assert lead.abs().max() <= 1e-5
        assert max(float((s[RIGHT] - s[WRONG]).abs().max()) for s in found) > 1e-2


def test_scores_are_means_over_queries_and_chance_is_looking_at_all_alike() -> None:
    """Layer 1 has a window of 40: its queries see fewer keys."""
    model, tally = random_model(TINY), Tally(random_model(TINY))
    texts = [[3, 4, 3, 5, *range(10, 60), 4], [8, 8, 1]]
    for ids in texts:
        tally.add(text_probe(ids))
    sums, alike, queries = torch.zeros(TINY.num_layers, TINY.num_heads), 0.0, 0
    for ids in texts:
        attention = recorded(model, ids).attention
        for query in range(len(ids)):
            keys = [key for key in range(query) if ids[key] == ids[query]]
            queries += bool(keys)
            for layer in range(TINY.num_layers):
                sums[layer] += attention[layer, :, query, keys].sum(dim=-1)
                seen = range(max(0, query - 39) if layer == 1 else 0, query + 1)
                alike += len(set(keys) & set(seen)) / len(seen) / TINY.num_layers
    score = tally.scores()[SAME]
    assert score.num_queries == queries == 3
    assert (score.heads - sums / queries).abs().max() <= 1e-5
    assert score.chance == pytest.approx(alike / queries)
    assert INDUCTION not in tally.scores()


def report() -> HeadReport:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: HeadScores(torch.rand(2, 3, generator=generator), 0.125, 10)
        for name in (PREVIOUS, FIRST, SAME, INDUCTION, RIGHT, WRONG)
    }
    scores[RIGHT].heads[1, 2] = 0.93
    scores[WRONG].heads[1, 2] = 0.01
    return HeadReport(1, 30, scores, torch.full((2, 3), 0.75), 4)


def test_the_table_names_the_leaders_and_the_json_has_everyone() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(heads_table(report(), "title"))
    text = console.export_text()
    assert "1.2 +0.92 (75%)" in text
    assert "0.125" in text
    found = json.loads(json.dumps(report().as_json()))
    assert found["pronoun"]["heads"][1][2] == pytest.approx(0.92)
    assert found["scores"][PREVIOUS]["heads"] == report().scores[PREVIOUS].heads.tolist()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_one_and_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    pictures = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for picture in pictures:
        draw_heads(report(), picture, "title")
    start = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert pictures[0].read_bytes().startswith(start)
    if suffix == "png":
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_without_matplotlib_the_picture_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PictureError, match=r"vitrine\[train\]"):
        draw_heads(report(), tmp_path / "a.png", "title")


@pytest.fixture(scope="module")
def bundled() -> Checkpoint:
    return load_checkpoint(bundled_checkpoint())


def test_nouns_and_pronouns_are_where_the_bundled_tokenizer_puts_them(bundled: Checkpoint) -> None:
    tokenizer = Tokenizer.from_directory(bundled.directory)
    for four in pronoun_probes(tokenizer.encode_with_offsets):
        for probe in four:
            assert tokenizer.token_text(probe.ids[-1]) in (" he", " she", " it")
            nouns = set()
            for score in (RIGHT, WRONG):
                keys = sorted(key for _, key in edges(probe, score))
                nouns.add(tokenizer.decode([probe.ids[key] for key in keys]).strip())
            assert nouns <= {"boy", "man", "king", "girl", "woman", "queen", "ball", "cake", "box"}
            assert len(nouns) == 2
