"""csrc/simd.h's operations at every width: by intrinsics where the processor has them, and lane by lane."""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from guarded import guarded

from noetherperf.engines.backends import backends

ROOT = Path(__file__).parents[1]
NATIVE_FLAGS = {
    4: ["-mavx2", "-mfma", "-mf16c"],
    8: ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ISAS = {4: "avx2", 8: "avx512"}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(backends()["cpu"] != "available", reason="the compiled engine is not here"),
]


def builds() -> list[tuple[int, bool]]:
    """(width, native) of all builds that run here."""
    if backends()["cpu"] != "available":
        return []
    from noetherperf import _cpu

    return [(2, True), (4, False), (8, False), *((w, True) for w, isa in ISAS.items() if isa in _cpu.isas())]


@cache
def library(width: int, native: bool) -> ctypes.CDLL:
    target = ROOT / "build" / "simd" / f"{width}{'' if native else '-lanes'}.{os.getpid()}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [*(NATIVE_FLAGS.get(width, []) if native else ["-Wno-psabi"]), "-Wno-uninitialized"]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-DNPERF_WIDTH={width}", *flags]
    source = ROOT / "tests" / "simd_operations.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    made = ctypes.CDLL(str(target))
    target.unlink()
    made.native.restype = ctypes.c_bool
    assert made.width() == width
    assert made.native() == native
    return made


def call(function: object, *arguments: np.ndarray | int) -> None:
    assert callable(function)
    function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments))


@pytest.fixture(params=builds(), ids=lambda build: f"{build[0]}-{'native' if build[1] else 'lanes'}")
def made(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library(*request.param)


def test_the_first_elements_alone_are_read_and_written(made: ctypes.CDLL) -> None:
    """Nothing behind them is: they lie at the end of a page behind which there is none."""
    w = made.width()
    kinds = {"float64": (w, torch.float64), "float32": (2 * w, torch.float32), "uint16": (2 * w, torch.int16)}
    if w == 4:
        kinds["uint16_full"] = (4 * w, torch.int16)
    for name, (lanes, dtype) in kinds.items():
        for n in range(lanes):
            values = (torch.arange(n) + 1).to(dtype)
            source = guarded(values, at_end=True).numpy()
            loaded = np.full(lanes, -1, source.dtype)
            call(getattr(made, f"load_first_{name}"), source, n, loaded)
            assert loaded.tolist() == [*values.tolist(), *[0] * (lanes - n)], (name, n)
            target = guarded(torch.zeros(n, dtype=dtype), at_end=True).numpy()
            whole = (torch.arange(lanes) + 7).to(dtype).numpy()
            call(getattr(made, f"store_first_{name}"), target, n, whole)
            assert target.tolist() == whole[:n].tolist(), (name, n)


def test_halves_of_32_bits(made: ctypes.CDLL) -> None:
    w = made.width()
    every = np.arange(2**16, dtype=np.uint16)
    for at in range(0, 2**16, 2 * w):
        halves = every[at : at + 2 * w].copy()
        wide, back = np.empty(2 * w, np.uint32), np.empty(2 * w, np.uint16)
        call(made.upper, halves, wide)
        assert (wide == halves.astype(np.uint32) << 16).all()
        call(made.take_upper, wide + 0x1234, back)
        assert (back == halves).all()
    if w == 4:
        order = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
        for at in range(0, 2**16, 4 * w):
            halves = every[at : at + 4 * w].copy()
            wide, back = np.empty(4 * w, np.uint32), np.empty(4 * w, np.uint16)
            call(made.unpack_upper, halves, wide[: 2 * w], wide[2 * w :])
            assert (wide == halves[order].astype(np.uint32) << 16).all()
            call(made.pack_lower, wide[: 2 * w] >> 16, wide[2 * w :] >> 16, back)
            assert (back == halves).all()


def test_an_element_above_a_limit_is_seen(made: ctypes.CDLL) -> None:
    made.above.restype = ctypes.c_bool
    for limit in (0, 7, 2**31 - 1, 2**31, 2**32 - 2):
        for at in range(2 * made.width()):
            x = np.full(2 * made.width(), limit, np.uint32)
            assert not made.above(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(limit))
            x[at] += 1
            assert made.above(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(limit))


def test_float16_widens_and_narrows_as_numpy_says(made: ctypes.CDLL) -> None:
    w = made.width()
    every = np.arange(2**16, dtype=np.uint16)
    true = every.view(np.float16).astype(np.float32)
    generator = np.random.default_rng(0)
    with np.errstate(invalid="ignore", over="ignore"):
        between = np.concatenate([true, np.nextafter(true, np.inf), np.nextafter(true, -np.inf)])
        ties = (true[:-1] + true[1:]) / 2
        numbers = np.concatenate([between, ties, generator.standard_normal(2**14).astype(np.float32)])
        numbers = np.resize(numbers, -(-len(numbers) // (2 * w)) * 2 * w)
        rounded = numbers.astype(np.float16)
    widened, narrowed = np.empty(2**16, np.float32), np.empty(len(numbers), np.uint16)
    for at in range(0, 2**16, 2 * w):
        call(made.widen, every[at:], widened[at:])
    for at in range(0, len(numbers), 2 * w):
        call(made.narrow, numbers[at:], narrowed[at:])
    assert ((widened.view(np.uint32) == true.view(np.uint32)) | np.isnan(true)).all()
    assert (np.isnan(widened) == np.isnan(true)).all()
    assert ((narrowed == rounded.view(np.uint16)) | np.isnan(numbers)).all()
    assert np.isnan(narrowed.view(np.float16)[np.isnan(numbers)]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roots_quotients_and_maxima_are_numpys(made: ctypes.CDLL, dtype: type[np.floating]) -> None:
    name, n = np.dtype(dtype).name, made.width() * 8 // np.dtype(dtype).itemsize
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, np.finfo(dtype).tiny / 4, np.finfo(dtype).max]
    generator = np.random.default_rng(0)
    numbers = np.concatenate([odd, generator.standard_normal(503) * 10.0 ** generator.integers(-30, 30, 503)])
    xs, ys = (generator.permutation(numbers).astype(dtype) for _ in range(2))
    with np.errstate(all="ignore"):
        pairs = {"square_root": np.sqrt(xs), "divide": xs / ys, "maximum": np.maximum(xs, ys)}
    for operation, expected in pairs.items():
        for at in range(0, len(xs) - n + 1, n):
            to, given = np.empty(n, dtype), [xs[at : at + n].copy(), ys[at : at + n].copy()]
            call(getattr(made, f"{operation}_{name}"), *given[: 1 if operation == "square_root" else 2], to)
            np.testing.assert_array_equal(to, expected[at : at + n], operation)


def test_float64_of_float32_in_memory_and_the_sums_of_vectors(made: ctypes.CDLL) -> None:
    w = made.width()
    numbers = torch.randn(w)
    wide, sums = np.empty(w), np.empty(w)
    call(made.to_float64, guarded(numbers, at_end=True).numpy(), wide)
    assert wide.tolist() == numbers.double().tolist()
    vectors = np.random.default_rng(0).integers(-1000, 1000, (w, w)).astype(float)
    call(made.sums, vectors, sums)
    assert sums.tolist() == vectors.sum(1).tolist()
