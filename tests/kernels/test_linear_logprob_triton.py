"""`linear_logprob` in Triton: what is particular to its tiles. tests/kernels/test_linear_logprob.py has the contract.

Shape letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract.cases import make_case
from contract.compare import check_head, logp_tolerance
from contract.truth import head_truth
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from metis_kernels import VocabShard, linear_logprob
from metis_kernels.inspect.sanitizer import sanitize
from metis_kernels.inspect.tally import tally
from metis_kernels.linear_logprob import triton as op
from metis_kernels.linear_logprob.triton import COMBINE_TOKENS, choose_tile

# whole and ragged steps along H, for tiles of both kinds of dtype
SIZES = {"whole": 64, "ragged": 40}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Memory that a kernel reads, or returns, without having written it shows as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Around the tiles of 64, 128 and 256 columns and their halves; 1000 leaves a tail that fills a half and part of another.
# Every dtype meets each, and both sizes; so does every number of columns.
VOCABS = (1, 63, 129, 257, 1000)
TAILS = [(v, tuple(SIZES.values())[(i + j) % 2], d) for i, v in enumerate(VOCABS) for j, d in enumerate(DTYPES)]


@pytest.mark.parametrize(("vocab", "size", "dtype"), TAILS)
@pytest.mark.usefixtures("empty_is_nan")
def test_tails_are_exact_in_bounds_and_written_once(vocab: int, size: int, dtype: torch.dtype):
    tokens = choose_tile(dtype, size).tokens + 1
    case = make_case(tokens, size, vocab, dtype, masked=0.0)
    with sanitize():
        got = linear_logprob(case.hidden_TH, case.head_VH, case.targets_T, impl="triton")
    check_head(got.logp_T, got.entropy_T, got.lse_T, head_truth(case.hidden_TH, case.head_VH, case.targets_T), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_column_of_a_tile_can_hold_the_target(dtype: torch.dtype):
    vocab = 2 * choose_tile(dtype, 32).vocab + 3
    case = make_case(vocab, 32, vocab, dtype)
    targets = torch.arange(vocab)
    got = linear_logprob(case.hidden_TH, case.head_VH, targets, impl="triton")
    want = head_truth(case.hidden_TH, case.head_VH, targets)
    torch.testing.assert_close(got.logp_T.double(), want.logp_T, rtol=0, atol=logp_tolerance(want.peak, dtype))


def exact_logits(num_tokens: int, vocab: int, offset: float) -> tuple[Tensor, Tensor]:
    """Inputs whose logits are near `offset` and exact in float32: multiples of 1/64, the spacing of float32 up to 2^17."""
    random = torch.Generator().manual_seed(0)
    head = torch.randint(-256, 256, (vocab, 32), generator=random) / 64
    hidden = torch.zeros(num_tokens, 32)
    hidden[torch.arange(num_tokens), torch.arange(num_tokens) % 31] = 1.0
    hidden[:, 31] = 1.0
    head[:, 31] = offset
    return hidden, head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_an_offset_of_all_logits_costs_no_precision(offset: float, temperature: float):
    hidden, head = exact_logits(5, 600, offset)
    targets = torch.tensor([0, 127, 128, 512, 599])
    got = linear_logprob(hidden, head, targets, temperature=temperature, impl="triton")
    want = head_truth(hidden, head, targets, temperature)
    torch.testing.assert_close(got.logp_T.double(), want.logp_T, rtol=0, atol=3e-6)
    torch.testing.assert_close(got.entropy_T.double(), want.entropy_T, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.lse_T.double(), want.lse_T, rtol=2e-7, atol=1e-6)


def test_one_tile_may_outweigh_all_others():
    # the statistics of the other tiles are scaled by exp(-2e4) = 0, whichever side of the vocabulary the large one is on
    for large in (0, 999):
        head = torch.full((1000, 32), -1e4 / 32)
        head[large] = 1e4 / 32
        got = linear_logprob(torch.ones(2, 32), head, torch.tensor([large, 500]), impl="triton")
        assert got.logp_T.tolist() == [0.0, -2e4]
        assert got.entropy_T.tolist() == [0.0, 0.0]
        assert got.lse_T.tolist() == [1e4, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("num_tokens", "vocab", "chunk"),
    [
        (1, 1, None),
        (130, 600, None),  # tails along both
        (130, 512, 70),  # two launches, no tail along V
        (2, 1100, None),  # more tiles than the second kernel takes at once
    ],
)
def test_bytes_flops_and_exponentials_equal_the_closed_form(
    num_tokens: int, vocab: int, chunk: int | None, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(op, "COMBINE_TILES", 4)  # 32 of them would be slow in the interpreter
    case = make_case(num_tokens, size, vocab, dtype, masked=0.0)
    with tally() as counted:
        linear_logprob(case.hidden_TH, case.head_VH, case.targets_T, chunk=chunk, impl="triton")

    tile = choose_tile(dtype, size)
    chunks = [min(chunk or num_tokens, num_tokens - first) for first in range(0, num_tokens, chunk or num_tokens)]
    num_tiles = math.ceil(vocab / tile.vocab)
    programs = num_tiles * sum(math.ceil(rows / tile.tokens) for rows in chunks)
    statistics = counted.kernels["_tile_statistics"]
    assert statistics.launches == len(chunks)
    assert statistics.load_bytes == programs * ((tile.tokens + tile.vocab) * size * dtype.itemsize + 8 * tile.tokens)
    assert statistics.store_bytes == 12 * num_tokens * num_tiles + 4 * num_tokens
    assert statistics.dot_flops == 2 * programs * tile.tokens * tile.vocab * tile.hidden * math.ceil(size / tile.hidden)
    assert statistics.exps == programs * tile.tokens * (tile.vocab + 2)

    rows = COMBINE_TOKENS * sum(math.ceil(rows / COMBINE_TOKENS) for rows in chunks)
    padded_tiles = 4 * math.ceil(num_tiles / 4)
    combine = counted.kernels["_combine_tiles"]
    assert combine.launches == len(chunks)
    assert combine.load_bytes == rows * (8 * num_tiles + 8 * padded_tiles + 4)
    assert combine.store_bytes == 12 * num_tokens
    assert combine.exps == rows * padded_tiles
    assert counted.total.launches == 2 * len(chunks)


def test_rows_beyond_2_to_the_31_elements_are_found():
    # 4 GiB of which only the pages of three rows are ever touched
    stride = 2**30
    head = torch.empty(2 * stride + 32, dtype=torch.float16).as_strided((3, 32), (stride, 1))
    case = make_case(3, 32, 3, torch.float16)
    head.copy_(case.head_VH)
    targets = torch.tensor([0, 1, 2])
    got = linear_logprob(case.hidden_TH, head, targets, impl="triton")
    want = head_truth(case.hidden_TH, case.head_VH, targets)
    check_head(got.logp_T, got.entropy_T, got.lse_T, want, torch.float16)


# columns 0..299 and 300..599: neither a multiple of a tile
SHARDS = (slice(0, 300), slice(300, 600))
SHARD_TARGETS = torch.tensor([0, 299, 300, 599, 127])


def _rank(rank: int, folder: Path) -> None:
    """One of two processes: its shard's half of `exact_logits` at both offsets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    for offset in (0.0, 1e4):
        hidden, head = exact_logits(5, 600, offset)
        shard = VocabShard(SHARDS[rank].start, group)
        got = linear_logprob(hidden, head[SHARDS[rank]], SHARD_TARGETS, temperature=0.7, shard=shard, impl="triton")
        torch.save((got.logp_T, got.entropy_T, got.lse_T), folder / f"{rank}_{offset}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_even_with_huge_logits(tmp_path: Path):
    start_processes(_rank, (tmp_path,), nprocs=2, start_method="forkserver")
    for offset in (0.0, 1e4):
        hidden, head = exact_logits(5, 600, offset)
        want = head_truth(hidden, head, SHARD_TARGETS, 0.7)
        limit = 3e-6 + 2e-7 * want.peak  # log-sum-exps are exchanged, as float32
        ranks = [torch.load(tmp_path / f"{rank}_{offset}.pt") for rank in range(2)]
        for logp, entropy, lse in ranks:
            torch.testing.assert_close(logp.double(), want.logp_T, rtol=0, atol=limit)
            torch.testing.assert_close(lse.double(), want.lse_T, rtol=0, atol=limit)
            torch.testing.assert_close(entropy.double(), want.entropy_T, rtol=0, atol=limit)
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


STATIC_FIGURES = """
import json, sys, torch
from metis_kernels.inspect.offline import compile_launches
from metis_kernels.inspect.static import static_figures
from metis_kernels.linear_logprob.triton import linear_logprob

def run(dtype):
    hidden, head = (torch.empty(rows, 1001, dtype=dtype, device="meta") for rows in (300, 1000))
    linear_logprob(hidden, head, torch.empty(300, dtype=torch.int64, device="meta"), 0.7, 0, "", 0)

rows = []
for arch in map(int, sys.argv[1:]):
    for dtype in (torch.bfloat16, torch.float32):
        for launch in compile_launches(lambda: run(dtype), arch):
            figures = static_figures(launch)
            spills = figures.spill_store_bytes + figures.spill_load_bytes
            rows.append((arch, str(dtype), launch.kernel, spills, figures.blocks, figures.tensor_core))
print(json.dumps(rows))
"""


@pytest.mark.parametrize("archs", [(90,), pytest.param((80, 100), marks=pytest.mark.slow)], ids=str)
def test_ragged_tiles_do_not_spill_and_fit_and_use_tensor_cores(archs: tuple[int, ...], compiling_environment: dict[str, str]):
    # whole tiles are in the shipped configurations, which have their own test
    command = [sys.executable, "-c", STATIC_FIGURES, *map(str, archs)]
    done = subprocess.run(command, env=compiling_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(archs) * 2 * 2
    for arch, dtype, kernel, spills, blocks, tensor_core in rows:
        assert spills == 0, (arch, dtype, kernel)
        assert blocks >= 1, (arch, dtype, kernel)
        assert (tensor_core > 0) == (kernel == "_tile_statistics" and dtype == "torch.bfloat16"), (arch, dtype, kernel)
