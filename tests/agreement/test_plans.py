"""Does every launch pass what its kernel's source asks for, within memory that was taken for it? No GPU is needed.

RawKernel checks neither the number nor the types of arguments. A plan is the call itself without a device: what it
notes down is what a GPU would get.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from distrattn_np.reference import hyperplanes

from distrattn_np import backends, checks, workspace_size
from distrattn_np.arrays import REGION, array_at
from distrattn_np.backends import cupy_backend
from distrattn_np.backends.cupy_kept_keys import PlacedKeys
from distrattn_np.backends.cupy_paged_keys import PlacedPagedKeys
from distrattn_np.backends.device_work import (
    ARGUMENTS,
    WORKSPACE,
    BuiltOnce,
    Bump,
    Placed,
    Plan,
    PlannedArray,
    PlannedTensorMap,
    doing,
)
from distrattn_np.export import ARCHITECTURES
from distrattn_np.kernel_sources import Parameter, parameters
from distrattn_np.tiles import ELEMENTS, pad

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
TABLES = {
    "mask": SimpleNamespace(shape=(1,), dtype=np.dtype(bool)),
    "bias": SimpleNamespace(shape=(4, 1, 1), dtype=np.dtype(np.float32)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"group_size": 1},
    "lsh": {"method": "lsh"},
    "lsh-lstsq-keys": {"method": "lsh", "fusion": "lstsq", "group_by": "keys"},
    "lsh-lstsq": {"method": "lsh", "fusion": "lstsq", "block_size": 100},
    "subspace": {},
    "subspace-queries": {"group_by": "queries"},
    "subspace-odd-rank": {"rank": 24},
    "subspace-tolerance": {"score_tol": 0.3, "refine": 2},
    "few-queries": {"group_size": 1, "N": 4, "M": 2000},
    "exact-window": {"group_size": 1, "window": (100, 3)},
    "few-queries-mask": {"group_size": 1, "N": 4, "M": 2000, "mask": TABLES["mask"]},
    "lsh-options": {"method": "lsh", "softcap": 2.0, "mask": TABLES["mask"]},
    "subspace-options": {"window": (100, None), "softcap": 2.0, "bias": TABLES["bias"]},
    "subspace-queries-options": {"group_by": "queries", **TABLES},
}
GROUPED_KEYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "grouped-few-queries": (100, 24, {"N": 4, "M": 2050}),
    "grouped-rebuilt": (100, 24, {}),
    "grouped-options": (512, 64, {"N": 4, "softcap": 2.0, "mask": TABLES["mask"]}),
}
"""Block size, rank and options of calls to grouped keys, whose last block is never whole."""
PAGED: dict[str, tuple[int, dict[str, Any]]] = {
    "pages": (16, {"group_size": 1}),
    "large-pages": (256, {"group_size": 1}),
    "grouped-pages": (64, {"group_size": 1}),
    "grouped-pages-many-queries": (64, {"group_size": 1, "N": 50}),
    "pages-many-queries": (32, {"group_size": 1, "N": 50}),
    "pages-window": (128, {"group_size": 1, "window": (100, 3)}),
    "pages-lsh": (64, {"method": "lsh", "fusion": "lstsq"}),
    "pages-subspace": (16, {}),
}
"""Page sizes and options of calls to pages."""
RAGGED_OPTIONS = [name for name, options in OPTIONS.items() if not {"mask", "bias", "N"} & options.keys()]
WITHOUT_ROWS = ("cut_sequences", "group_channels", "narrow_maps")
"""What knows no rows of sequences, or makes the pieces."""
SCORE_OPTIONS = ("window", "softcap", "mask", "bias")
ARCHS = ["sm_75", "sm_80", "sm_90", "sm_90a", "sm_120"]
TABLE_REGIONS = (ARGUMENTS + 5, ARGUMENTS + 6)
"""Behind q, k, v, out and lse."""
SIZES = {"B": 2, "H": 4, "H_kv": 2, "N": 700, "M": 900, "D": 64, "E": 32}


def sizes_of(options: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes that `OPTIONS` has of a call, and the keywords."""
    return {x: options[x] for x in options if x in SIZES}, {x: options[x] for x in options if x not in SIZES}


def make_problem(dtype: str, causal: bool, layout: str = "bhnd", D: int = 64, **changed: Any) -> Any:
    sizes, options = sizes_of(changed)
    B, H, H_kv, N, M, _, E = (SIZES | sizes).values()
    score_options = {name: options.pop(name) for name in SCORE_OPTIONS if name in options}
    tables = [score_options.get(name) for name in TABLES]
    shapes = [(B, H, N, D), (B, H_kv, M, D), (B, H_kv, M, E)]
    if layout == "bnhd":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    q, k, v = (array_at(place * REGION, shape, DTYPES[dtype]) for place, shape in enumerate(shapes, start=1))
    grouping = checks.check_grouping(q, **({"method": "subspace"} | options))
    score_options |= {
        name: array_at(place * REGION, table.shape, table.dtype)
        for place, (name, table) in enumerate(zip(TABLES, tables, strict=True), start=4)
        if table is not None
    }
    problem = checks.check_attention(
        q, k, v, causal=causal, scale=None, layout=layout, out=None, grouping=grouping, **score_options
    )
    O = Placed.contiguous((B, H, N, E), problem.dtype, problem.layout)
    placed_tables = (None if x is None else Placed.contiguous(x.shape, x.dtype) for x in tables)
    return problem, [*(Placed.of(x, problem.layout) for x in (q, k, v)), O, None, *placed_tables]


def make_grouped(name: str, dtype: str, causal: bool, layout: str = "bhnd", D: int = 64) -> tuple[Any, list[Any]]:
    """Return what `make_problem` does of a call to grouped keys."""
    L, rank, options = GROUPED_KEYS[name]
    problem, placed = make_problem(dtype, causal, layout, D, group_size=1, **options)
    heads, blocks, rank = problem.batch * problem.kv_heads, (problem.keys - 1) // L, min(rank, D // 2)
    tail, sampled, maps = (
        Placed.contiguous(shape, problem.dtype)
        for shape in (
            (problem.batch, problem.kv_heads, problem.keys - blocks * L, D),
            (heads, (blocks + 1) * L, pad(rank)),
            (heads, blocks + 1, pad(rank) + 1, pad(D)),
        )
    )
    placed[1] = PlacedKeys(tail, sampled, maps, (blocks * L, L, rank))
    return problem, placed


def make_paged(name: str, dtype: str, causal: bool, layout: str = "bhnd", D: int = 64) -> tuple[Any, list[Any]]:
    """Return what `make_problem` does of a call to pages."""
    S, options = PAGED[name]
    problem, placed = make_problem(dtype, causal, layout, D, **{"N": 4, "M": 2048} | options)
    shapes = ((20, problem.kv_heads, S, width) for width in (D, problem.value_width))
    K, placed[2] = (Placed.contiguous(shape, problem.dtype, problem.layout) for shape in shapes)
    table, lengths = (
        Placed.contiguous(shape, np.dtype(np.int32)) for shape in ((problem.batch, 2048 // S), (problem.batch,))
    )
    placed[1] = PlacedPagedKeys(K, (table, lengths), S, None, is_top_left=False)
    if name.startswith("grouped-pages"):
        rank = D // 2
        tails, sampled, maps = (
            Placed.contiguous(shape, problem.dtype)
            for shape in (
                (5, problem.kv_heads, S, D),
                (20 * problem.kv_heads, S, pad(rank)),
                (20 * problem.kv_heads, pad(rank) + 1, pad(D)),
            )
        )
        tail_of = Placed.contiguous((20,), np.dtype(np.int32))
        placed[1] = PlacedPagedKeys(tails, (table, lengths, sampled, maps, tail_of), S, rank, is_top_left=False)
    return problem, placed


def made(name: str, dtype: str, causal: bool, layout: str = "bhnd", D: int = 64) -> tuple[Any, list[Any]]:
    """Return the problem and the arrays of a call by its name."""
    if name in GROUPED_KEYS:
        return make_grouped(name, dtype, causal, layout, D)
    if name in PAGED:
        return make_paged(name, dtype, causal, layout, D)
    return make_problem(dtype, causal, layout, D, **OPTIONS[name])


def make_ragged_problem(dtype: str, causal: bool, D: int = 64, **options: Any) -> Any:
    """Return the problem of three packed sequences and its arrays; ``options`` as in `OPTIONS`, without tables."""
    _, H, H_kv, N, M, _, E = SIZES.values()
    shapes = [(N, H, D), (M, H_kv, D), (M, H_kv, E)]
    q, k, v = (array_at(place * REGION, shape, DTYPES[dtype]) for place, shape in enumerate(shapes, start=1))
    score_options = {name: options.pop(name) for name in SCORE_OPTIONS if name in options}
    problem = checks.check_ragged(
        q,
        k,
        v,
        cu_seqlens_q=np.array([0, 1, 1, N], np.int32),
        cu_seqlens_k=np.array([0, 0, 9, M], np.int32),
        causal=causal,
        layout="bhnd",
        scale=None,
        out=None,
        mask=None,
        bias=None,
        grouping=checks.check_grouping(q, axes=3, **({"method": "subspace"} | options)),
        **score_options,
    )
    O = Placed.contiguous((1, H, N, E), problem.packed.dtype, problem.packed.layout)
    return problem, [*(Placed.of(x, problem.packed.layout) for x in (q, k, v)), O, None]


def make_plan(problem: Any, placed: list[Placed | None], arch: str) -> Plan:
    planned = (None if x is None else x.planned(place) for place, x in enumerate(placed))
    return cupy_backend.BACKEND.plan(problem, ARCHITECTURES[arch], *planned)


def fits(parameter: Parameter, argument: Any, element: np.dtype) -> bool:
    """Whether an argument has the type that the source gives it; ``element`` is what -DELEMENT says."""
    wide = np.dtype(np.float64 if element == np.float64 else np.float32)
    types = {
        "float": np.dtype(np.float32),
        "int": np.dtype(np.int32),
        "long long": np.dtype(np.int64),
        "unsigned short": np.dtype(np.uint16),
        "element_t": element,
        "accumulate_t": wide,
        "real_t": wide,
        "Piece": np.dtype(np.int32),
        "edge_t": np.dtype(np.int32),
    }
    name = parameter.type.removeprefix("const ").removesuffix("*")
    if parameter.is_pointer:
        if isinstance(argument, np.uint64):
            return argument == 0
        if not isinstance(argument, PlannedArray):
            return False
        return argument.dtype in (element, np.int32) if name == "map_t" else argument.dtype == types[name]
    if name == "TensorMap":
        return isinstance(argument, PlannedTensorMap)
    if name.startswith("Table<"):  # an address and four strides, all zero where there is none
        start, *strides = argument.view(np.int64).tolist()
        return argument.nbytes == 40 and start // REGION in (0, *TABLE_REGIONS) and (start > 0 or not any(strides))
    return isinstance(argument, np.generic) and argument.dtype == types[name]


def last_byte(array: np.ndarray) -> int:
    """Return the offset behind the last element, from the start of the array's region."""
    if array.size == 0:
        return array.data.ptr % REGION
    steps = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return array.data.ptr % REGION + steps + array.itemsize


def assert_launches_fit(plan: Plan, dtype: str, arch: str) -> None:
    names = {number: DTYPES[dtype] for dtype, number in ELEMENTS.items()}
    assert plan.launches
    for launch in plan.launches:
        element = np.dtype(names[launch.defines.get("ELEMENT", ELEMENTS[dtype])])
        expected = parameters(launch.stem, launch.defines)
        assert len(expected) == len(launch.arguments), launch.stem
        for parameter, argument in zip(expected, launch.arguments, strict=True):
            assert fits(parameter, argument, element), (launch.stem, parameter, argument)
            arrays = [argument.array] if isinstance(argument, PlannedTensorMap) else [argument]
            for array in arrays:
                if isinstance(array, PlannedArray) and array.data.ptr // REGION == WORKSPACE:
                    assert last_byte(array) <= plan.memory.bytes, (launch.stem, parameter)
        assert 0 < launch.blocks < 2**31
        assert 0 < launch.threads <= 1024
        assert launch.shared <= ARCHITECTURES[arch].shared_limit


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*OPTIONS, *GROUPED_KEYS, *PAGED])
def test_launches_pass_what_the_sources_ask_for(name: str, dtype: str, arch: str) -> None:
    for causal, layout, D in itertools.product((False, True), ("bhnd", "bnhd"), (64, 30)):
        assert_launches_fit(make_plan(*made(name, dtype, causal, layout, D), arch), dtype, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RAGGED_OPTIONS)
def test_launches_for_packed_sequences_do_too(name: str, dtype: str, arch: str) -> None:
    for causal, D in itertools.product((False, True), (64, 30)):
        plan = make_plan(*make_ragged_problem(dtype, causal, D, **OPTIONS[name]), arch)
        assert_launches_fit(plan, dtype, arch)
        assert all(x.defines.get("RAGGED", x.stem in WITHOUT_ROWS) for x in plan.launches)


def test_plans_reach_every_kernel() -> None:
    """Else the test above would say nothing of some."""
    launched = {
        launch.stem
        for options, dtype, arch in itertools.product(OPTIONS.values(), DTYPES, ARCHS)
        for launch in make_plan(*make_problem(dtype, True, **options), arch).launches
    }
    launched |= {
        launch.stem
        for name, dtype in itertools.product(GROUPED_KEYS, DTYPES)
        for launch in make_plan(*make_grouped(name, dtype, True), "sm_80").launches
    }
    launched |= {launch.stem for launch in make_plan(*make_ragged_problem("float16", True), "sm_80").launches}
    launched |= {
        launch.stem for name in PAGED for launch in make_plan(*make_paged(name, "float16", True), "sm_80").launches
    }
    sources = {path.stem for path in (Path(__file__).parents[2] / "raw_kernels").glob("*.cu")}
    assert launched == sources - {"expected_gram"}  # for keys that are appended, which no plan is made of


@pytest.mark.parametrize("name", [*OPTIONS, *PAGED])
def test_what_is_written_in_a_workspace_does_not_overlap(name: str) -> None:
    """Arrays that start at different places are apart; each starts at a multiple of 256 bytes."""
    plan = make_plan(*made(name, "float16", True), "sm_80")
    arguments = [x for launch in plan.launches for x in launch.arguments if isinstance(x, PlannedArray)]
    ends: dict[int, int] = {}
    for array in arguments:
        if array.data.ptr // REGION == WORKSPACE:
            start = array.data.ptr % REGION
            assert start % 256 == 0
            ends[start] = max(ends.get(start, 0), last_byte(array))
    assert ends
    starts = sorted(ends)
    assert all(ends[start] <= following for start, following in itertools.pairwise(starts))


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `workspace_size` find the CuPy backend, and an H100, on any machine."""
    loaded = backends.load_by_name
    monkeypatch.setattr(backends, "load_by_name", lambda name: cupy_backend.BACKEND if name == "cupy" else loaded(name))
    with doing(Plan(ARCHITECTURES["sm_90a"])):
        yield


def described(dtype: str = "float16", **changed: int) -> list[Any]:
    B, H, H_kv, N, M, D, E = (SIZES | changed).values()
    shapes = [(B, H, N, D), (B, H_kv, M, D), (B, H_kv, M, E)]
    return [SimpleNamespace(shape=shape, dtype=DTYPES[dtype]) for shape in shapes]


def packed_bytes(rows: int, heads: int, width: int) -> int:
    """Return what packed rows of 16 bits take of a workspace."""
    return -(-2 * rows * heads * width // 256) * 256


@pytest.mark.usefixtures("on_h100")
class TestWorkspaceSize:
    def test_exact_attention_needs_room_for_its_lse_alone(self) -> None:
        lse_bytes = math.ceil(2 * 4 * 700 * 4 / 256) * 256
        assert workspace_size(*described(), group_size=1) == lse_bytes
        assert workspace_size(*described(), group_size=1, return_lse=True) == 0
        given = SimpleNamespace(shape=(2, 4, 700), dtype=np.float32)
        assert workspace_size(*described(), group_size=1, lse=given) == 0

    @pytest.mark.parametrize("name", OPTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_what_the_plan_takes(self, name: str, dtype: str) -> None:
        plan = make_plan(*make_problem(dtype, True, **OPTIONS[name]), "sm_90a")
        sizes, options = sizes_of(OPTIONS[name])
        assert workspace_size(*described(dtype, **sizes), causal=True, **options) == plan.memory.bytes > 0

    @pytest.mark.parametrize("name", OPTIONS)
    def test_layouts_take_the_same(self, name: str) -> None:
        sizes, options = sizes_of(OPTIONS[name])
        straight = described(**sizes)
        swapped = [SimpleNamespace(shape=(b, n, h, d), dtype=x.dtype) for x in straight for b, h, n, d in [x.shape]]
        assert workspace_size(*swapped, layout="bnhd", **options) == workspace_size(*straight, **options)

    def test_arrays_of_a_host_stand_for_copies(self) -> None:
        arrays = [np.zeros(x.shape, x.dtype) for x in described()]
        assert workspace_size(*arrays) == 0
        assert workspace_size(*arrays, backend="cupy") == workspace_size(*described())

    def test_stream_and_workspace_make_no_difference(self) -> None:
        size = workspace_size(*described())
        assert workspace_size(*described(), stream=7, workspace=np.empty(3, np.uint8)) == size

    def test_fused_keys_are_bounded(self) -> None:
        """Longer calls go through them in several launches."""
        size = workspace_size(*described(N=65536, M=65536, D=128), method="lsh", group_by="queries")
        assert 128 << 20 < size < 400 << 20

    @pytest.mark.parametrize("name", RAGGED_OPTIONS)
    def test_packed_sequences_take_what_their_plan_takes(self, name: str) -> None:
        problem, placed = make_ragged_problem("float16", True, **OPTIONS[name])
        packed = [np.ones(x.swapped("bnhd").shape[1:], np.float16) for x in placed[:3]]
        sides = (("q", problem.packed.queries), ("k", problem.packed.keys))
        lengths = {f"cu_seqlens_{side}": np.array([0, 1, 1, rows]) for side, rows in sides}
        size = workspace_size(*packed, **lengths, causal=True, backend="cupy", **OPTIONS[name])
        assert size == make_plan(problem, placed, "sm_90a").memory.bytes > 0

    def test_pages_are_described_too(self) -> None:
        q, k, v = described(N=4, M=256)
        k.shape, v.shape = (50, *k.shape[1:]), (50, *v.shape[1:])
        tables = {
            "page_table": SimpleNamespace(shape=(2, 8), dtype=np.int32),
            "seqlens_k": SimpleNamespace(shape=(2,), dtype=np.int32),
        }
        plain = described(N=4, M=2048)
        size = workspace_size(q, k, v, **tables, group_size=1)
        assert size == workspace_size(*plain, group_size=1) > 0
        assert workspace_size(q, k, v, **tables) > packed_bytes(2 * 2048, 2, 64 + 32)

    def test_only_what_does_not_lie_packed_is_copied(self) -> None:
        """Keys and values always; queries and results of many sequences where these do not follow one another."""
        sizes = {}
        for layout, B, N in itertools.product(("bhnd", "bnhd"), (1, 2), (1, 50)):
            q, k, v = described(B=B, N=N, M=256)
            k.shape, v.shape = (50, *k.shape[1:]), (50, *v.shape[1:])
            if layout == "bnhd":
                for x in (q, k, v):
                    x.shape = tuple(x.shape[axis] for axis in (0, 2, 1, 3))
            tables = {
                "page_table": SimpleNamespace(shape=(B, 8), dtype=np.int32),
                "seqlens_k": SimpleNamespace(shape=(B,), dtype=np.int32),
            }
            # with a window, which decode.cu does not know
            sizes[layout, B, N] = workspace_size(q, k, v, **tables, group_size=1, window=(9, 9), layout=layout)
        for B, N in ((1, 1), (1, 50), (2, 1)):
            assert sizes["bhnd", B, N] == sizes["bnhd", B, N]
        assert sizes["bhnd", 2, 50] == sizes["bnhd", 2, 50] + packed_bytes(2 * 50, 4, 64) + packed_bytes(2 * 50, 4, 32)

    def test_nothing_to_compute(self) -> None:
        assert workspace_size(*described(B=0)) == 0

    def test_calls_of_one_shape_are_planned_once(self) -> None:
        before = cupy_backend._planned_bytes.cache_info()
        for _ in range(3):
            workspace_size(*described(N=701))
        after = cupy_backend._planned_bytes.cache_info()
        assert after.misses == before.misses + 1
        assert after.hits == before.hits + 2


def test_bump_counts_in_steps_of_its_alignment() -> None:
    memory = Bump()
    assert [memory.take((count,), np.float32) for count in (3, 0, 65)] == [0, 256, 256]
    assert memory.bytes == 256 + 512


def test_memory_is_taken_in_one_place() -> None:
    """What allocates past `_empty` would allocate in a captured graph, and be missing in a workspace."""
    for module in ("cupy_backend.py", "cupy_decode.py", "cupy_paged_keys.py"):
        text = Path(cupy_backend.__file__).with_name(module).read_text(encoding="utf-8")
        assert not re.findall(r"\bcupy\.(?:empty|zeros|ones|full|array|arange|copy)\w*\(", text)


def test_threads_build_a_kernel_once() -> None:
    built: list[str] = []
    kernels, ready = BuiltOnce(), threading.Barrier(32)

    def build(key: str) -> object:
        time.sleep(0.02)  # as long as others need to ask for it too
        built.append(key)
        return object()

    def ask(number: int) -> tuple[str, object]:
        ready.wait()
        key = f"kernel{number % 2}"
        return key, kernels.get(key, lambda: build(key))

    with ThreadPoolExecutor(32) as pool:
        found = set(pool.map(ask, range(32)))
    assert sorted(built) == ["kernel0", "kernel1"]
    assert len(found) == 2


def test_a_build_that_fails_is_tried_again() -> None:
    kernels = BuiltOnce()

    def fail() -> object:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        kernels.get("kernel", fail)
    assert kernels.get("kernel", lambda: "built") == "built"


def test_plans_of_other_threads_are_their_own() -> None:
    """A thread that computes while another plans must not plan too."""
    with doing(Plan(ARCHITECTURES["sm_80"])) as _, ThreadPoolExecutor(1) as pool:
        here = cupy_backend.work()
        assert isinstance(here, Plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distrattn_np.backends.device_work._on_cupy", lambda: "CuPy")
            assert pool.submit(cupy_backend.work).result() == "CuPy"


def test_a_longer_draw_of_hyperplanes_begins_with_a_shorter_one() -> None:
    """Blocks of many sizes share one array on the device."""
    np.testing.assert_array_equal(hyperplanes(3, 2048)[:77], hyperplanes(3, 77))


@pytest.mark.parametrize("conditions", ["A == 1", "defined(A)", "A > B"])
def test_conditions_that_a_signature_may_not_have(conditions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'extern "C" __global__ void stem(\n#if {conditions}\n int x\n#endif\n) {{'
    monkeypatch.setattr("distrattn_np.kernel_sources._read", lambda _: text)
    with pytest.raises(ValueError, match="is not read here"):
        parameters("stem", {"A": 1})


def test_conditions_of_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        'extern "C" __global__ __launch_bounds__(9) void stem(const float* __restrict__ x,  // with, a comment\n'
        "#if A && !B\n  int first,\n#else\n  long long second,\n#endif\n#if B || C\n  float third,\n#endif\n"
        "  const __grid_constant__ TensorMap map) {"
    )
    monkeypatch.setattr("distrattn_np.kernel_sources._read", lambda _: text)
    names = [[p.name for p in parameters("stem", defines)] for defines in ({"A": 1}, {"A": 1, "B": 1}, {})]
    assert names == [["x", "first", "map"], ["x", "second", "third", "map"], ["x", "second", "map"]]
    assert [p.type for p in parameters("stem", {"C": 1})] == ["const float*", "long long", "float", "const TensorMap"]


def test_conditions_on_what_the_source_defines_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "#ifndef A\n#define A 1  // the default\n#endif\n#define BOTH (A && B)\n"
        'extern "C" __global__ void stem(int x\n#if BOTH\n, int y\n#endif\n) {'
    )
    monkeypatch.setattr("distrattn_np.kernel_sources._read", lambda _: text)
    assert [len(parameters("stem", defines)) for defines in ({"B": 1}, {}, {"A": 0, "B": 1})] == [2, 1, 1]


def test_arrays_that_must_not_be_read_can_be_shown() -> None:
    """A debugger shows them, and so does a traceback with its variables."""
    array = array_at(REGION, (2, 3), np.float32)
    assert f"{array} {array!r} {array[1:]!s}".count("numpy array of shape") == 3
    assert [array.T.strides, array.dtype.name, array.ctypes.data] == [(4, 12), "float32", REGION]
