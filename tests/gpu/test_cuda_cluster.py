"""The cluster projection: values, independence of order and of company, the layers it takes, its memory traffic, and
that the interpreter notices when one of its synchronisations is gone."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.truth import Layer, random_layer

from .emulated import CUDA, INCLUDES, ORDERS, Device, emulator, need, ptx_sources, ptxsim, run
from .emulated import run_all as run_in_all_orders
from .test_cuda_project import Pair, arguments, judge, pair

HOPPER = Device(arch=90, sm_count=1, l2_bytes=50 << 20, shared_bytes=227 << 10)
DRIVERS = ("ptx", "simt")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def padded(tensor: Tensor, multiple: int = 16) -> Tensor:
    """The same values, rows a multiple of so many elements apart: 16 keeps every row on 32 bytes."""
    rows, columns = tensor.shape
    storage = tensor.new_full((rows, -(-columns // multiple) * multiple), torch.nan)
    return storage[:, :columns].copy_(tensor)


def weights(layer: Layer) -> Pair:
    return pair(layer._replace(aligned=padded(layer.aligned), base=padded(layer.base)))


def launched() -> list[str]:
    """Kernels of the PTX driver's last call."""
    return emulator("ptx").launches


def check(pairs: list[Pair], kernels: set[str], driver: str = "ptx", device: Device = HOPPER) -> Any:
    """Right, and the same in every order, through these kernels alone."""
    result = run_in_all_orders("project_layers", *arguments(pairs), drivers=(driver,), device=device)[driver]
    judge(pairs, result)
    if driver == "ptx":
        names = {n for n in launched() if re.fullmatch(r"project_(cluster|bf16|f16|f32|mixed|exact)\w*_\w+", n)}
        assert names == {f"project_cluster_{kernel}" for kernel in kernels}
    return result


def same(a: Any, b: Any) -> bool:
    flat = [t for result in (a, b) for part in result for t in ([part] if isinstance(part, Tensor) else part)]
    half = len(flat) // 2
    return all(torch.equal(x, y) for x, y in zip(flat[:half], flat[half:], strict=True))


# ---- values


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("aligned", "base", "name"),
    [(BF16, BF16, "bf16"), (F16, F16, "f16"), (F32, F32, "f32"), (BF16, F32, "mixed"), (F16, BF16, "mixed")],
    ids=str,
)
def test_dtypes(aligned: torch.dtype, base: torch.dtype, name: str, driver: str) -> None:
    check([weights(random_layer(140, 203, 5, aligned, base_weight=base))], {f"{name}_16"}, driver)
    check([weights(random_layer(129, 133, 40, aligned, base_weight=base))], {f"{name}_32"}, driver)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 32, 33, 64, 80])
def test_ranks(rank: int) -> None:
    expected = {"bf16_16"} if rank <= 16 else {"bf16_32"}
    check([weights(random_layer(200, 150, rank, BF16))], expected | ({"bf16_16"} if rank == 80 else set()))


# Two, four and eight blocks; one to four boxes; rows that end inside of a box, and blocks without any.
@pytest.mark.parametrize(("rows", "dtype"), [(256, BF16), (897, BF16), (1030, F16), (1500, F32), (4096, BF16)], ids=str)
def test_rows(rows: int, dtype: torch.dtype) -> None:
    name = {BF16: "bf16", F16: "f16", F32: "f32"}[dtype]
    check([weights(random_layer(rows, 136, 9, dtype))], {f"{name}_16"})


# Fewer strips than buffers, a ring that goes round, several segments and units, an end inside of a strip.
@pytest.mark.parametrize(("columns", "rank"), [(128, 3), (513, 3), (1700, 3), (1100, 20)], ids=str)
def test_columns(columns: int, rank: int) -> None:
    check([weights(random_layer(130, columns, rank, BF16))], {"bf16_16" if rank <= 16 else "bf16_32"})


@pytest.mark.parametrize("driver", DRIVERS)
def test_several_layers_and_adapters(driver: str) -> None:
    shapes = [(130, 300), (600, 130), (256, 128)]
    pairs = [weights(random_layer(*shape, 6, BF16)) for shape in shapes]
    pairs += [weights(random_layer(190, 140, 4, F32)), weights(random_layer(150, 150, 4, F16, base_weight=F32))]
    first = pairs[0]
    several = first._replace(
        lora_B=[first.lora_B[0], torch.randn(130, 21), torch.randn(130, 3).bfloat16()],
        lora_A=[first.lora_A[0], torch.randn(21, 300), torch.empty(0, 300)],
    )
    check([several, *pairs], {"bf16_16", "bf16_32", "f32_16", "mixed_16"}, driver)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_under_sanitizers(sanitizer: str) -> None:
    check(
        [weights(random_layer(260, 133, 5, BF16)), weights(random_layer(130, 133, 5, BF16, base_weight=F32))],
        set(),
        sanitizer,
    )


def test_the_bits_of_a_layer_depend_neither_on_its_company_nor_on_the_size_of_the_device() -> None:
    pairs = [weights(random_layer(*shape, BF16)) for shape in [(140, 1700, 5), (300, 400, 5), (130, 300, 40)]]
    together = run("project_layers", *arguments(pairs), driver="ptx", device=HOPPER)
    assert "project_cluster_fold" not in launched()
    large = Device(arch=90, sm_count=132, l2_bytes=50 << 20, shared_bytes=227 << 10)
    for order in ORDERS["ptx"][1:3]:
        assert same(together, run("project_layers", *arguments(pairs), driver="ptx", device=large, order=order))
    assert launched().count("project_cluster_fold") == 2
    for i, one in enumerate(pairs):
        projected, v_norm, cosine = run("project_layers", *arguments([one]), driver="ptx", device=HOPPER)
        assert same(
            ([projected[0]], v_norm, cosine), ([together[0][i]], together[1][i : i + 1], together[2][i : i + 1])
        )


def test_more_layers_than_one_table_holds() -> None:
    layer = weights(random_layer(128, 128, 2, BF16))
    result = run("project_layers", *arguments([layer] * 103), driver="ptx", device=HOPPER)
    assert launched().count("project_cluster_bf16_16") == 2
    assert all(
        same(([result[0][0]], result[1][:1]), ([b], n)) for b, n in zip(result[0], result[1][:, None], strict=True)
    )


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    good = random_layer(140, 160, 4, dtype)
    bad = [good.aligned.clone() for _ in range(3)]
    for weight, value in zip(bad, (torch.nan, torch.inf, -torch.inf), strict=True):
        weight[137, 150] = value
    layers = [good, *(good._replace(aligned=weight) for weight in bad), good._replace(aligned=good.base.clone()), good]
    projected, v_norm, cosine = run("project_layers", *arguments(list(map(pair, layers))), driver="ptx", device=HOPPER)
    for i in (1, 2, 3):
        assert bool(projected[i].isnan().all())
        assert bool(v_norm[i].isnan())
    assert float(v_norm[4]) == 0
    assert not projected[4].any()
    assert bool(cosine[4].isnan())
    assert same(([projected[0]], v_norm[:1], cosine[:1]), ([projected[5]], v_norm[5:], cosine[5:]))
    judge([pair(good)], (projected[:1], v_norm[:1], cosine[:1]))


# ---- what it takes, and the bytes it moves: asked of the host code

PROBE = """
#include <iostream>
#include "project_cluster.cuh"
namespace safelora::cuda {
void launch(const char*, const Shape&, const void*, std::size_t, const Stream&) {}
TensorMap tensor_map(const ConstMatrix&, unsigned, unsigned, int, const Stream&) { return {}; }
}
int main() {
  using namespace safelora;
  std::int64_t aligned, base, rows, cols, row_stride, col_stride, at, panel, arch, shared;
  while (std::cin >> aligned >> base >> rows >> cols >> row_stride >> col_stride >> at >> panel >> arch >> shared) {
    const auto matrix = [&](std::int64_t dtype, std::int64_t address) {
      void* const data = reinterpret_cast<void*>(address);
      return ConstMatrix{data, static_cast<DType>(dtype), rows, cols, row_stride, col_stride};
    };
    const ProjectLayer layer = {matrix(aligned, 4096), matrix(base, at), {}, nullptr};
    cuda::Device device;
    device.arch = static_cast<int>(arch);
    device.shared_bytes = shared;
    const auto n = static_cast<int>(panel);
    const cuda::ClusterPlan plan = cuda::cluster_plan(layer, n);
    std::cout << "{\\"slots\\": " << cuda::cluster_fits(layer, n, device).slots
              << ", \\"traffic\\": " << cuda::cluster_traffic(layer, n) << ", \\"blocks\\": " << plan.blocks
              << ", \\"boxes\\": " << plan.boxes << ", \\"ring\\": " << plan.slots << "}\\n";
  }
}
"""


class Question(NamedTuple):
    """A layer and a device, as the probe reads them."""

    aligned: int = 1  # DType: f32, bf16, f16, f64
    base: int = 1
    rows: int = 4096
    cols: int = 4096
    row_stride: int = 4096
    col_stride: int = 1
    address: int = 4096
    panel: int = 16
    arch: int = 90
    shared: int = 227 << 10


Ask = Callable[..., dict[str, int]]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Answers the probe's questions."""
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text(PROBE)
    includes = [f"-I{path}" for path in INCLUDES]
    command = ["g++", "-std=c++17", *includes, str(source), str(CUDA / "project_cluster.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)

    def answer(**values: int) -> dict[str, int]:
        question = " ".join(map(str, Question(**values)))
        done = subprocess.run([str(program)], input=question, capture_output=True, text=True, check=True)
        found: dict[str, int] = json.loads(done.stdout)
        return found

    return answer


def test_takes_what_fits(ask: Ask) -> None:
    for dtype in (0, 1, 2):
        for panel in (16, 32, 64):
            assert ask(aligned=dtype, panel=panel)["slots"] > 0
            assert ask(base=dtype, panel=panel, arch=100)["slots"] > 0
    assert ask(rows=128, cols=128, row_stride=128)["slots"] > 0
    assert ask(cols=4090)["slots"] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 4097},
        {"rows": 127},
        {"cols": 127},
        {"address": 4104},
        {"row_stride": 4100},
        {"row_stride": 0},
        {"row_stride": 1, "col_stride": 4096},
        {"col_stride": 2, "row_stride": 8192},
        {"aligned": 3},
        {"base": 3},
        {"arch": 80},
        {"arch": 120, "shared": 99 << 10},
        {"shared": 163 << 10},
    ],
    ids=str,
)
def test_leaves_the_rest(ask: Ask, change: dict[str, int]) -> None:
    assert ask(**change)["slots"] == 0


def test_memory_is_read_once(ask: Ask) -> None:
    weights_bytes = 2 * 2 * 4096 * 4096
    assert ask()["traffic"] <= 1.05 * weights_bytes
    assert ask()["traffic"] >= weights_bytes
    for rows, cols in ((4096, 4096), (1024, 4096), (4096, 14336), (2048, 8192)):
        for panel in (16, 32):
            for dtype, size in ((0, 4), (1, 2)):
                answer = ask(aligned=dtype, base=dtype, rows=rows, cols=cols, row_stride=cols, panel=panel)
                assert answer["traffic"] <= 1.05 * 2 * size * rows * cols


def test_the_ring_holds_more_than_two_strips(ask: Ask) -> None:
    """One strip is multiplied for the second time, one for the first, and the next are on their way."""
    for rows in (128, 500, 700, 1024, 3000, 4096):
        for dtypes in ((0, 0), (1, 1), (0, 1), (1, 2)):
            for panel in (16, 32, 64):
                answer = ask(rows=rows, aligned=dtypes[0], base=dtypes[1], panel=panel)
                assert answer["ring"] > 2 * answer["boxes"]
                assert answer["blocks"] * answer["boxes"] * 128 >= rows


# ---- planted bugs: one synchronisation at a time is deleted from the compiled kernel

WAIT = re.compile(r"mbarrier\.try_wait\.parity\.acquire\.\w+\.shared::cta\.b64 p, \[[^]]+\], [^;]+;")
BARRIER = re.compile(r"barrier\.cluster\.(arrive\.release|wait\.acquire)\.aligned;")
KINDS = {"wait": (WAIT, "setp.eq.u32 p, 0, 0;"), "cluster barrier": (BARRIER, "")}
KERNEL = "project_cluster_bf16_16"


def cluster_ptx() -> str:
    """The module without its other kernels."""
    head, *entries = re.split(
        r"^(?=\.visible \.entry )", ptx_sources(90, [CUDA / "project_cluster.cu"])[0].read_text(), flags=re.MULTILINE
    )
    files = entries[-1][entries[-1].index("\t.file") :]
    return head + next(entry for entry in entries if entry.startswith(f".visible .entry safelora_{KERNEL}(")) + files


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts other PTX in the place of the kernel until the test ends."""
    need("ptx")
    machine, tool = emulator("ptx"), ptxsim()
    assert tool
    find = machine._module

    def replace(text: str) -> None:
        module = tool.Module(text)
        monkeypatch.setattr(machine, "_module", lambda kernel: module if kernel == KERNEL else find(kernel))

    return replace


def caught(pairs: list[Pair], expected: Any) -> bool:
    for order in ORDERS["ptx"]:
        try:
            if not same(run("project_layers", *arguments(pairs), driver="ptx", device=HOPPER, order=order), expected):
                return True
        except RuntimeError:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_synchronisation_is_noticed(plant: Callable[[str], None], kind: str) -> None:
    pattern, substitute = KINDS[kind]
    text = cluster_ptx()
    pairs = [weights(random_layer(1000, 264, 5, BF16))]
    expected = run("project_layers", *arguments(pairs), driver="ptx", device=HOPPER)
    plant(text)
    assert not caught(pairs, expected)
    sites = [match.span() for match in pattern.finditer(text)]
    assert len(sites) == {"wait": 10, "cluster barrier": 4}[kind]
    missed = []
    for number, (first, last) in enumerate(sites):
        plant(text[:first] + substitute + text[last:])
        if not caught(pairs, expected):
            missed.append(number)
    # The last wait keeps a block's memory until its copies have left; the interpreter never takes it away.
    assert missed == {"wait": [], "cluster barrier": [3]}[kind]


def test_copies_between_blocks_follow_a_proxy_fence() -> None:
    """The interpreter does not look at what such copies read, so here is the order of the code."""
    need("ptx")
    steps = re.findall(
        r"st\.shared|fence\.proxy\.async\.shared::cta|mbarrier\.arrive\.shared|bulk\.shared::cluster\.shared::cta",
        cluster_ptx(),
    )
    fences = [i for i, step in enumerate(steps) if step.startswith("fence")]
    assert len(fences) == steps.count("bulk.shared::cluster.shared::cta") == 2
    assert all(steps[i - 1] == "st.shared" for i in fences)
    assert {steps[i + 1] for i in fences} == {"mbarrier.arrive.shared", "bulk.shared::cluster.shared::cta"}
