"""Where watched queries looked: compiled code, its PyTorch twin and whole recordings agree."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import ForwardBatch, Watch, single_sequence
from model.compiled import CompiledForward
from model.config import ModelConfig
from model.explain.attended import find, mean_weights, watch
from model.explain.recording import ExplainError
from model.forward import Forward
from model.kv_cache import KVCache
from tests.engine.engines import TINY_COMPILED, TINY_GPT2, eager_forward, random_model
from tests.model.explaining import Glance, glances, recorded

SHAPES = [
    dataclasses.replace(TINY_COMPILED, sliding_windows=(None, 40, None)),
    dataclasses.replace(TINY_COMPILED, num_heads=6, num_kv_heads=2, qk_norm=False, head_dim=32),
    TINY_GPT2,
]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Company:
    """Sequences of a step: `texts`, of which the last `new[i]` tokens are computed in it."""

    texts: list[list[int]]
    new: list[int]
    tables: list[list[int]]
    block_size: int

    def watch(self, config: ModelConfig, heads: dict[int, list[tuple[int, int]]]) -> Watch:
        longest = max(len(self.texts[seq]) for seq in heads)
        return watch(config, heads, longest, self.block_size)

    def run(
        self, forward: Forward, watching: Watch | None, draws: list[int] | None = None
    ) -> Tensor:
        """What is before, sequence by sequence, and then the step, in which all sequences draw
        a token, or `draws`."""
        for text, new, table in zip(self.texts, self.new, self.tables, strict=True):
            if len(text) > new:
                before = text[: len(text) - new]
                forward(single_sequence(before, block_table=table, block_size=self.block_size))
        parts = [
            single_sequence(
                text[len(text) - new :],
                start=len(text) - new,
                block_table=table,
                block_size=self.block_size,
            )
            for text, new, table in zip(self.texts, self.new, self.tables, strict=True)
        ]
        starts = [0]
        for new in self.new:
            starts.append(starts[-1] + new)
        everyone = range(len(self.texts))
        widest = max(len(table) for table in self.tables)
        contexts = [len(text) for text in self.texts]
        batch = ForwardBatch(
            input_ids=torch.cat([part.input_ids for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            query_start=torch.tensor(starts),
            context_lens=torch.tensor(contexts),
            block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in self.tables]),
            slot_mapping=torch.cat([part.slot_mapping for part in parts]),
            logits_rows=torch.tensor([starts[seq + 1] - 1 for seq in draws or everyone]),
            query_start_host=tuple(starts),
            context_lens_host=tuple(contexts),
            watch=watching,
        )
        return forward(batch).clone()


@st.composite
def companies(draw: st.DrawFn) -> Company:
    block_size = draw(st.sampled_from([16, 32, 64]))
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    new = [draw(st.sampled_from([1, 1, length, (length + 1) // 2])) for length in lengths]
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(211, (length,), generator=generator).tolist() for length in lengths]
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks), generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in blocks]
    return Company(texts, new, tables, block_size)


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    company=companies(),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
@torch.inference_mode()
def test_compiled_code_its_twin_and_recordings_agree(
    shape: ModelConfig, dtype: torch.dtype, company: Company, data: st.DataObject
) -> None:
    model = random_model(shape)
    for parameter in model.parameters():
        parameter.mul_(0.5 if parameter.dim() == 2 else 1.0)
    model = model.to(dtype)
    everyone = list(range(len(company.texts)))
    head = st.tuples(st.integers(0, shape.num_layers - 1), st.integers(0, shape.num_heads - 1))
    heads = {
        seq: data.draw(st.lists(head, max_size=3))
        for seq in data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
    }
    seen: list[Watch] = []
    for compiled in (False, True):
        num_blocks = sum(len(table) for table in company.tables)
        cache = KVCache.allocate(
            shape, num_blocks=num_blocks, block_size=company.block_size, dtype=dtype
        )
        forward: Forward = eager_forward(model, cache)
        if compiled:
            forward = CompiledForward(copy.deepcopy(model), cache)
        seen.append(company.watch(shape, heads))
        company.run(forward, seen[-1])
        assert (mean_weights(shape, seen[-1]).sum(dim=1) - 1).abs().max() <= 1e-4
    for row, seq in enumerate(heads):
        attention = recorded(model, company.texts[seq]).attention[:, :, -1]
        context = len(company.texts[seq])
        for watching in seen:
            mean = mean_weights(shape, watching)[row]
            assert (mean[context:] == 0).all()
            assert (mean[:context] - attention.mean(dim=(0, 1))).abs().max() <= BOUND[dtype]
            for i, (of_row, layer, of_head) in enumerate(watching.heads):
                if of_row == row:
                    difference = watching.chosen[i, :context] - attention[layer, of_head]
                    assert difference.abs().max() <= BOUND[dtype]
                    assert (watching.chosen[i, context:] == 0).all()


@torch.inference_mode()
def test_bits_do_not_depend_on_who_else_is_watched_nor_on_threads() -> None:
    model = random_model(TINY_GPT2)
    texts = [list(range(3, 80)), list(range(100, 140)), [5] * 33]
    company = Company(texts, [1, 1, 33], [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10]], 16)
    cache = KVCache.allocate(TINY_GPT2, num_blocks=11, block_size=16, dtype=torch.float32)
    forward = CompiledForward(model, cache)
    threads = torch.get_num_threads()
    rows = []
    try:
        for number, watched in ((1, (0,)), (2, (2, 0, 1)), (2, (0,))):
            torch.set_num_threads(number)
            watching = company.watch(TINY_GPT2, {seq: [(1, 2)] for seq in watched})
            company.run(forward, watching)
            row = watched.index(0)
            rows.append(
                torch.cat((watching.sums[row, :, :77], watching.chosen[row : row + 1, :77]))
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@torch.inference_mode()
def test_watching_changes_no_bit_of_the_step() -> None:
    company = Company([list(range(50)), [7, 8]], [1, 2], [[0, 1, 2, 3], [4]], 16)
    for make in (CompiledForward, eager_forward):
        logits = []
        for watching in (None, company.watch(TINY_COMPILED, {0: [(0, 0)], 1: []})):
            cache = KVCache.allocate(
                TINY_COMPILED, num_blocks=5, block_size=16, dtype=torch.float32
            )
            logits.append(company.run(make(random_model(TINY_COMPILED), cache), watching))
        assert torch.equal(*logits)


@pytest.mark.parametrize("vocab_size", [211, 16, 3])
@torch.inference_mode()
def test_compiled_code_and_its_twin_find_the_same(vocab_size: int) -> None:
    """Positions and tokens, fewer than asked for where there are no more."""
    shape = dataclasses.replace(TINY_COMPILED, vocab_size=vocab_size)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (70, 2, 33)]
    company = Company(texts, [1, 2, 20], [[0, 1, 2, 3, 4], [5], [6, 7, 8]], 16)
    found = []
    for make in (CompiledForward, eager_forward):
        cache = KVCache.allocate(shape, num_blocks=9, block_size=16, dtype=torch.float32)
        watching = company.watch(shape, {2: [(0, 1)], 0: [(2, 2), (0, 0)], 1: []})
        logits = company.run(make(random_model(shape), cache), watching)
        found.append(glances(watching))
        best = torch.log_softmax(logits, dim=-1).topk(min(5, vocab_size))
        for seq, one in zip((2, 0, 1), found[-1], strict=True):
            assert [token for token, _ in one.next] == best.indices[seq].tolist()
            told = [logprob for _, logprob in one.next]
            assert told == pytest.approx(best.values[seq].tolist(), abs=1e-5)
    for ours, theirs in zip(*found, strict=True):
        assert len(ours.heads) == len(theirs.heads)
        glances_of = zip([ours.mean, *ours.heads], [theirs.mean, *theirs.heads], strict=True)
        for one, other in glances_of:
            assert one.positions == other.positions
            assert one.weights == pytest.approx(other.weights, abs=2e-5)
    assert len(found[0][0].mean.positions) == 8
    assert len(found[0][2].mean.positions) == 2


@torch.inference_mode()
def test_a_query_after_which_nothing_is_drawn_has_no_next_token() -> None:
    company = Company([list(range(20)), [7, 8]], [20, 2], [[0, 1], [2]], 16)
    sums = []
    for make in (CompiledForward, eager_forward):
        cache = KVCache.allocate(TINY_COMPILED, num_blocks=3, block_size=16, dtype=torch.float32)
        watching = company.watch(TINY_COMPILED, {0: [], 1: []})
        company.run(make(random_model(TINY_COMPILED), cache), watching, draws=[1])
        first, second = glances(watching)
        assert first.next == []
        assert len(first.mean.positions) == 8
        assert len(second.next) == 5
        sums.append(watching.sums)
    assert (sums[0] - sums[1]).abs().max() <= 2e-5, "of every layer, the last one too"


def test_the_strongest_positions_first_and_none_that_got_nothing() -> None:
    two_layers_of_three = 2 * 3
    watching = watch(TINY_GPT2, {4: [], 2: [(0, 0)]}, 4, 4, num_places=2, num_tokens=3)
    watching.sums[:, 0] = torch.tensor([[0.125, 0.5, 0.375, 0.0], [1.0, 0.0, 0.0, 0.0]])
    watching.sums.mul_(two_layers_of_three)
    watching.chosen[0] = torch.tensor([0.0, 0.0, 0.25, 0.75])
    batch = single_sequence([1], block_table=[0], block_size=4)
    batch = dataclasses.replace(batch, query_start_host=(0, 0, 0, 1, 0, 0))
    find(TINY_GPT2, batch, watching, torch.tensor([[0.0, math.log(3)]]))
    first, second = glances(watching)
    assert first.mean == Glance([1, 2], [0.5, 0.375])
    assert (first.heads, first.next) == ([], [])
    assert second.mean == Glance([0], [1.0])
    assert second.heads == [Glance([3, 2], [0.75, 0.25])]
    expected = [(1, pytest.approx(math.log(0.75))), (0, pytest.approx(math.log(0.25)))]
    assert second.next == expected


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(ExplainError, match="no head 3 in layer 0: the model has 2 layers of 3"):
        watch(TINY_GPT2, {0: [(0, 2)], 5: [(0, 3)]}, 10, 16)


@pytest.mark.parametrize(("longest", "block_size"), [(32, 16), (50, 10)])
def test_a_watch_that_is_too_short_is_refused(longest: int, block_size: int) -> None:
    """Compiled code would write beyond its end."""
    cache = KVCache.allocate(TINY_GPT2, num_blocks=4, block_size=16, dtype=torch.float32)
    forward = CompiledForward(random_model(TINY_GPT2), cache)
    company = Company([[1] * 33], [1], [[0, 1, 2, 3]], 16)
    with pytest.raises(ValueError, match="over a sequence of 33"):
        company.run(forward, watch(TINY_GPT2, {0: []}, longest, block_size))
