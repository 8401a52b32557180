"""Static figures of kernels: of small ones whose answer is known, and of every shipped default."""

import json
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from typer.testing import CliRunner

from stellar_fast import aot, backend
from stellar_fast.cli import app, main
from stellar_fast.kernels.common.launch import launch, record
from stellar_fast.kernels.common.tl_dot import dot


@triton.jit
def product_kernel(a, b, bias, out, rows, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + row[:, None] * K + inner[None, :], mask=row[:, None] < rows, other=0.0)
    y = tl.load(b + inner[:, None] * N + column[None, :])
    acc = dot(x, y)
    if bias is not None:
        acc += tl.load(bias + column)[None, :]
    tl.store(out + row[:, None] * N + column[None, :], acc, mask=row[:, None] < rows)


def figures(arch: str, dtype: torch.dtype, M: int, num_warps: int, rows: int = 256, bias: bool = False) -> aot.Figures:
    tensors = [torch.empty(*size, dtype=dtype, device="meta") for size in ((rows, 64), (64, 64))]
    tensors += [torch.empty(64, device="meta") if bias else None, torch.empty(rows, 64, device="meta")]
    with record() as launches:
        launch(product_kernel, (1,), *tensors, rows, M=M, N=64, K=64, num_warps=num_warps, num_stages=2)
    (only,) = launches
    return aot.Job.of("toy", "b16", "any", arch, only).run()


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_a_16_bit_product_on_every_generation(arch: str, instruction: str) -> None:
    found = figures(arch, torch.bfloat16, M=64, num_warps=4)
    assert set(found.tensor_core) == {instruction}
    assert found.problems == () and found.spills == 0
    assert 16 < found.registers < 128
    assert found.loads_128 == found.loads > 0
    assert found.config == "M=64 N=64 K=64 num_warps=4 num_stages=2"
    assert 0 < found.occupancy <= 1


def test_registers_that_do_not_fit_are_a_problem() -> None:
    found = figures("sm_90", torch.float32, M=128, num_warps=1)
    assert found.spills > 100
    assert found.problems == (f"{found.spills} instructions spill registers",)


def test_arguments_are_specialised_as_in_a_launch() -> None:
    def job(rows: int, bias: bool) -> aot.Job:
        tensors = [torch.empty(64, 64, device="meta")] * 2
        with record() as launches:
            launch(product_kernel, (1,), *tensors, tensors[0] if bias else None, tensors[0], rows, M=16, N=64, K=64)
        return aot.Job.of("toy", "b16", "fp32", "sm_90", launches[0])

    divisible, odd, one = job(196 * 4, True), job(197, True), job(1, False)
    assert divisible.source.signature["rows"] == odd.source.signature["rows"] == "i32"
    assert divisible.source.attrs[(4,)] == [["tt.divisibility", 16]]
    assert not odd.source.attrs[(4,)]
    assert one.source.signature["rows"] == one.source.signature["bias"] == "constexpr"
    assert divisible.options["enable_fp_fusion"] is True
    assert len({divisible.key, odd.key, one.key, job(1024, True).key}) == 3


def test_limits() -> None:
    assert aot.problems("sm_80", 0, 170_000, 0, 0) == ("170000 bytes of shared memory, a block can have 166912",)
    assert aot.problems("sm_90", 0, 170_000, 1, 0) == ("16-bit products without a tensor-core instruction",)
    assert aot.problems("sm_90", 0, 232_448, 1, 1) == ()
    # by warps, by registers (128 a thread: 16 warps), by shared memory (two blocks), by blocks (32 of one warp)
    assert aot.occupancy("sm_90", 32, 0, 4) == 1
    assert aot.occupancy("sm_90", 128, 0, 4) == 0.25
    assert aot.occupancy("sm_90", 32, 100_000, 4) == 0.125
    assert aot.occupancy("sm_90", 16, 0, 1) == 0.5


@pytest.mark.parametrize(
    ("ops", "archs"),
    [((), ["sm_90"]), (("token_match", "add_layer_norm"), ["sm_80", "sm_100"])],
    ids=["sm_90", "two operators, other GPUs"],
)
def test_default_configs_ship_without_a_problem(ops, archs) -> None:
    """Of all GPUs `make inspect` compiles all of them, in five minutes."""
    command = [sys.executable, "-m", "stellar_fast.cli", "inspect", *ops, "--arch", ",".join(archs), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(run.stdout) if run.stdout else []
    wrong = [f"{r['kernel']} {r['shape']} {r['dtype']} {r['arch']} {r['config']}: {r['problems']}" for r in rows]
    wrong = [text for text, row in zip(wrong, rows, strict=True) if row["problems"]]
    assert run.returncode == 0 and not wrong, "\n".join([*wrong, run.stderr])
    with_kernels = {op for op, written in backend.OPS.items() if "triton" in written}
    assert with_kernels
    assert {(r["op"], r["arch"]) for r in rows} == {(op, arch) for op in ops or with_kernels for arch in archs}


def test_the_table_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    good = aot.Figures("toy", "toy_fwd", "b16", "bf16", "sm_90", "M=64", 60, 49152, 0, {"HGMMA": 4}, 24, 24, 0.25, ())
    bad = aot.Figures("toy", "toy_bwd", "b16", "bf16", "sm_90", "M=64", 255, 0, 9, {}, 8, 0, 0.1, ("it spills",))
    for figures, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(aot, "inspect", lambda *_, figures=figures: figures)
        result = CliRunner().invoke(app, ["inspect"], env={"COLUMNS": "160"})
        assert result.exit_code == code
        assert "HGMMA 4" in result.output and "24 of 24" in result.output and "48.0" in result.output
        assert ("toy_bwd b16 bf16 sm_90 (M=64): it spills" in result.output) == (code == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nearest_code"], "nearest_code has no Triton kernels; its backends: cuda, cpu, reference"),
        (["nothing"], "unknown operator 'nothing'"),
        (["--arch", "sm_70"], "unknown architecture 'sm_70'; known: sm_80, sm_90, sm_100"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["stellar-fast", "inspect", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_no_compiler(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 keeps triton from compiling"):
        aot.inspect()
