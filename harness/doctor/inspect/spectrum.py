"""Singular values of B @ A for many pairs of halves, from Gram matrices on all cores; the product is never formed.

With A A^T = L L^T those of B A are the roots of the eigenvalues of L^T (B^T B) L, and ||BA||_F^2 their sum of squares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # a: [r, in, ...], b: [out, r, ...]
Pairs = Callable[[], Sequence[Pair]]  # reads the pairs of one module

LEADING = 8
_CHUNK = 4096  # columns per float32 product; longer sums are done in float64
_CHUNK_ELEMENTS = 1 << 18  # of one chunk: it stays in the cache between conversion and product
_BATCH_ELEMENTS = 1 << 16  # of Gram matrices of one rank per call of LAPACK: they stay in the cache too
_RUN = 32  # modules that a thread takes at a time, at most
_RUNS = 4  # that each gets at least, so that all end together
_TRUST_GRAM = 1e-3  # a Gram matrix squares the condition number: smaller ratios of singular values need QR


class Spectrum(NamedTuple):
    """Of one product B @ A: its Frobenius norm, NaN where a half is not finite; leading singular values, the largest
    first; exp of the entropy of all of them, 0 for a zero matrix (Roy and Vetterli, 2007).
    """

    norm: float
    leading: tuple[float, ...]
    effective_rank: float


def spectra(modules: Sequence[Pairs]) -> list[list[Spectrum]]:
    """Return the spectrum of every pair of every module, a thread per core that torch may use.

    Each thread has one module in memory at a time, which is read again where Gram matrices do not tell small values.
    """
    with _one_thread_a_product() as is_limited:
        threads = torch.get_num_threads() if is_limited else 1
        step = max(1, min(_RUN, len(modules) // (_RUNS * threads))) if threads > 1 else _RUN
        runs = [modules[start : start + step] for start in range(0, len(modules), step)]
        if threads < 2:
            return [found for run in runs for found in _of_run(run)]
        with _threads(threads) as pool:
            return [found for some in pool.map(_of_run, runs) for found in some]


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads in each of which torch works alone; threads that start later find what was set before."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@contextmanager
def _one_thread_a_product() -> Iterator[bool]:
    """Keep numpy's BLAS to the thread that calls it, where that can be done; yield whether it was.

    On a busy machine its own threads wait for each other: 6 s instead of 0.3 s were measured.
    """
    with _limits() or nullcontext() as limits:
        yield limits is not None


def _limits() -> AbstractContextManager[object] | None:
    controller = _controller()
    return None if controller is None else controller.limit(limits=1, user_api="blas")


@cache
def _controller() -> Any:
    """Return what looks after the threads of BLAS libraries; looking for them takes a millisecond."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # an environment from before it was asked for
        return None
    return ThreadpoolController()


def _of_run(modules: Sequence[Pairs]) -> list[list[Spectrum]]:
    """Return the spectra of some modules, those of equal rank decomposed together."""
    found: dict[tuple[int, int], Spectrum] = {}
    waiting: dict[int, list[_Grams]] = defaultdict(list)
    buffer = torch.empty(_CHUNK_ELEMENTS)
    sizes = []
    for module, read in enumerate(modules):
        pairs = read()
        sizes.append(len(pairs))
        for number, (a, b) in enumerate(pairs):
            rank = a.shape[0]
            grams = gram(a.flatten(1).t(), buffer), gram(b.flatten(1), buffer)
            waiting[rank].append(_Grams((module, number), *grams))
            if len(waiting[rank]) * rank * rank >= _BATCH_ELEMENTS:
                found |= _solved(waiting.pop(rank), modules)
    for batch in waiting.values():
        found |= _solved(batch, modules)
    return [[found[module, number] for number in range(size)] for module, size in enumerate(sizes)]


class _Grams(NamedTuple):
    """A A^T and B^T B of one pair: [r, r] each in float64; the place is that of its module and of it in the module."""

    place: tuple[int, int]
    a: NDArray[np.float64]
    b: NDArray[np.float64]


def _solved(batch: Sequence[_Grams], modules: Sequence[Pairs]) -> dict[tuple[int, int], Spectrum]:
    values = _from_grams(*(torch.from_numpy(np.stack(halves)) for halves in zip(*(g[1:] for g in batch), strict=True)))
    for row in (~_trusted(values)).nonzero().flatten().tolist():
        module, number = batch[row].place
        values[row] = _carefully(*modules[module]()[number])
    return dict(zip((grams.place for grams in batch), _summed_up(values), strict=True))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the r singular values of b @ a in float64, largest first, for a: [r, in] and b: [out, r].

    All of them are NaN when a or b has an element that is not finite.
    """
    buffer = torch.empty(_CHUNK_ELEMENTS)
    grams = (torch.from_numpy(gram(half, buffer))[None] for half in (a.t(), b))
    values = _from_grams(*grams)
    return values[0] if _trusted(values)[0] else _carefully(a, b)


def spectrum(a: Tensor, b: Tensor) -> Spectrum:
    """Return the spectrum of b @ a for a: [r, in, ...] and b: [out, r, ...]."""
    return _summed_up(singular_values(a.flatten(1), b.flatten(1))[None])[0]


def gram(columns: Tensor, buffer: Tensor) -> NDArray[np.float64]:
    """Return columns.T @ columns: [r, r]; float32 products over a few thousand rows keep 7 digits.

    bfloat16 has no better way on a processor: torch's products of it come out rounded to bfloat16, whatever they are
    summed in, and a Gram matrix with 3 digits is of no use. numpy asks BLAS for the symmetric product, half the work.
    """
    count, rank = columns.shape
    step = min(_CHUNK, max(1, buffer.numel() // max(1, rank)))
    total = np.zeros((rank, rank))
    with np.errstate(all="ignore"):  # what overflows is done carefully
        for start in range(0, count, step):
            wide = _widened(columns[start : start + step], buffer)
            total += wide.T @ wide
    return total


def _widened(chunk: Tensor, buffer: Tensor) -> NDArray[Any]:
    """Return a chunk in float32 or float64, in `buffer` where it has to be converted, laid out as it is stored."""
    if chunk.dtype in (torch.float32, torch.float64):
        return chunk.numpy()
    rows, columns = chunk.shape
    size = chunk.numel()
    room = buffer if size <= buffer.numel() else torch.empty(size)
    flat = room[:size]
    wide = flat.view(rows, columns) if chunk.stride(1) == 1 else flat.view(columns, rows).t()
    return wide.copy_(chunk).numpy()


def _from_grams(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """Return the singular values [n, r] of n pairs by their Gram matrices [n, r, r], NaN where they do not tell any."""
    root, failed = torch.linalg.cholesky_ex(gram_a)
    small = root.mT @ gram_b @ root
    known = (failed == 0) & small.sum((1, 2)).isfinite()
    values = torch.full(small.shape[:2], math.nan, dtype=torch.float64)
    values[known] = torch.linalg.eigvalsh(small if known.all() else small[known]).clamp_min(0).sqrt().flip(-1)
    return values


def _trusted(values: Tensor) -> Tensor:
    """Tell of which rows even the smallest value is large enough to be known."""
    return values[:, -1] > _TRUST_GRAM * values[:, 0]


def _carefully(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values by QR of the halves in float64: small ones keep their digits."""
    a, b = a.flatten(1), b.flatten(1)
    full = torch.zeros(a.shape[0], dtype=torch.float64)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return full.fill_(math.nan)
    r_a = torch.linalg.qr(a.double().t(), mode="r").R
    r_b = torch.linalg.qr(b.double(), mode="r").R
    values = torch.linalg.svdvals(r_b @ r_a.t())
    full[: len(values)] = values
    return full


def _summed_up(values: Tensor) -> list[Spectrum]:
    """Return the spectrum of each row of singular values [n, r]."""
    shares = values / values.sum(1, keepdim=True)
    norms = values.square().sum(1).sqrt().tolist()
    ranks = torch.special.xlogy(shares, shares).sum(1).neg().exp().tolist()
    leading = values[:, :LEADING].tolist()
    return [
        Spectrum(norm, tuple(first), used if norm else 0.0)
        for norm, first, used in zip(norms, leading, ranks, strict=True)
    ]
