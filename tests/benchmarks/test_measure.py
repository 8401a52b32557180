"""The maths of measuring, with a clock of our own, and one small run from end to end."""

import csv
import functools
import itertools
import math

import pytest
import torch

from benchmarks import measure, operators, results, run, shapes, timing
from benchmarks.model import data, memory, objective, pair, scaling, step
from benchmarks.ops import koleo, sinkhorn
from stellar_fast import backend
from stellar_fast.kernels.sinkhorn.spec import POTENTIALS
from stellar_fast.registry import load


def test_summary_is_median_and_percentiles() -> None:
    assert measure.summarise([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == measure.Summary(3.5, 2.0, 5.0)
    with pytest.raises(ValueError, match="0 samples"):
        measure.summarise([])


def test_ratio_is_of_medians_and_its_spread_of_rounds() -> None:
    # the third round was slow for both sides: the ratio of rounds is not moved by it
    speed = measure.ratio([10.0, 12.0, 40.0], [5.0, 4.0, 20.0])
    assert speed.median == pytest.approx(12 / 5)
    assert (speed.p20, speed.p80) == pytest.approx((2.0, 2.6))
    with pytest.raises(ValueError, match=r"2 .* 1 "):
        measure.ratio([1.0, 2.0], [1.0])


class FakeClock:
    """A timer that remembers whom it timed and answers with set times."""

    def __init__(self, times_ms: dict[str, float]) -> None:
        self.times_ms, self.order = times_ms, []

    def __call__(self, call) -> float:
        self.order.append(call())
        return self.times_ms[self.order[-1]] + len(self.order)


def test_rounds_alternate_the_order() -> None:
    clock = FakeClock({"a": 10.0, "b": 20.0})
    samples = measure.interleave({"a": lambda: "a", "b": lambda: "b"}, clock, rounds=3, budget_s=0)
    assert clock.order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [11.0, 14.0, 15.0], "b": [22.0, 23.0, 26.0]}


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 3), (20.0, 6), (1e9, 200)])
def test_budget_sets_the_rounds(budget_s: float, rounds: int) -> None:
    seen = []
    clock = FakeClock({"a": 3000.0})
    measure.interleave({"a": lambda: "a"}, clock, None, budget_s, lambda done, total: seen.append((done, total)))
    assert len(clock.order) == rounds
    assert seen[-1] == (rounds, rounds)


def test_wall_clock_and_peak_memory_of_a_known_call() -> None:
    def call() -> None:
        torch.ones(16 * 2**20)

    assert measure.wall_ms(call) > 0
    peak = measure.peak_extra_mib(call, torch.device("cpu"))
    assert math.isnan(peak) or 60 < peak < 128


def test_gemms_count_their_flops() -> None:
    calls, flops = measure.gemms(torch.float32, torch.device("cpu"))
    assert flops == 2 * 2048**3
    assert next(iter(calls)) == "torch"
    products = [call() for call in calls.values()]
    assert all(torch.allclose(product, products[0], atol=1e-2) for product in products)


def test_the_floor_is_the_larger_of_products_and_bytes() -> None:
    ceilings = measure.Ceilings(40.0, {"fp32": {"torch": 200.0, "onednn": 400.0}})
    assert ceilings.floor_ms(4e9, 40e6, "fp32") == pytest.approx(10.0)
    assert ceilings.floor_ms(4e8, 80e6, "fp32") == pytest.approx(2.0)
    assert ceilings.floor_ms(0.0, 80e6, "uint8") == pytest.approx(2.0)


def test_machine_facts_fill_their_columns(monkeypatch) -> None:
    monkeypatch.setenv("STELLAR_FAST_BACKEND", "reference")
    facts = measure.machine_facts(torch.device("cpu"), "default")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert "cores)" in facts["device_name"]
    assert facts["date"].endswith("Z")
    assert "STELLAR_FAST_BACKEND=reference" in facts["config"].split()
    assert set(facts) <= set(results.COLUMNS)


def test_allocator_setting_is_checked() -> None:
    measure.set_allocator("default")
    with pytest.raises(ValueError, match="'huge'"):
        measure.set_allocator("huge")


def test_flops_of_b16_by_part() -> None:
    parts = shapes.forward_flops(shapes.model_shape("stellar-b16"))
    gflop = {name: round(value / 1e9, 1) for name, value in parts.items()}
    assert gflop == {"clean": 37.9, "masked": 77.0, "local": 72.9, "decoder": 7.9, "heads": 2.0}
    shape = shapes.model_shape("b16")
    assert shapes.step_flops(shape, 2) == 6 * sum(parts.values())
    assert shapes.encode_flops(shape, 8) == 8 * parts["clean"]
    assert (shape.num_kept, shape.local_size, shape.num_patches) == (39, 96, 196)


def errors_of(ours: dict, plain: dict, exact: dict, dtype: torch.dtype) -> dict[str, float]:
    checks = pair.compare({"plain": lambda: plain, "ours": lambda: ours}, lambda: exact, dtype)["ours"]
    return {check.name: check.error for check in checks}


def test_fp32_sides_must_agree_tightly() -> None:
    exact = {"x": torch.tensor([3.0, 4.0]), "gradient.a": torch.tensor([3.0, 4.0])}
    near = {name: value + torch.tensor([2.5e-4, 0.0]) for name, value in exact.items()}
    errors = errors_of(near, exact, exact, torch.float32)
    assert errors == pytest.approx({"x": 5.0, "gradient.a": 0.5}, rel=1e-2)


def test_what_is_missing_misshapen_or_not_finite_is_wrong() -> None:
    exact = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    ours = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(3), "extra": torch.ones(1)}
    assert set(errors_of(ours, exact, exact, torch.float32).values()) == {float("inf")}


def test_reduced_precision_is_held_against_plains_own_error() -> None:
    exact, plain = {"x": torch.ones(4)}, {"x": torch.full((4,), 1.05)}
    allowed = 2 * 0.05 + torch.finfo(torch.bfloat16).eps
    near = errors_of({"x": torch.full((4,), 1.08)}, plain, exact, torch.bfloat16)
    assert near["x"] == pytest.approx(0.08 / allowed, rel=1e-4)
    assert errors_of({"x": torch.full((4,), 1.2)}, plain, exact, torch.bfloat16)["x"] > 1


def test_a_gradient_that_is_zero_but_for_rounding_passes() -> None:
    exact = {"gradient.weight": torch.ones(100), "gradient.key_bias": torch.full((4,), 1e-9)}
    ours = {"gradient.weight": torch.ones(100), "gradient.key_bias": torch.full((4,), -1e-8)}
    assert max(errors_of(ours, exact, exact, torch.float32).values()) < 1


def test_run_verifies_times_and_writes(tmp_path, capsys) -> None:
    assert run.main(["--suite", "encode,step", "--preset", "tiny", "--rounds", "2", "--out", str(tmp_path)]) == 0
    lines = read_one(tmp_path)
    cases = [(line["suite"], line["dtype"], line["provider"]) for line in lines]
    expected = [(s, d, p) for s in ("encode", "step") for d in ("fp32", "bf16") for p in ("plain", "stellar_fast")]
    assert cases == expected
    for line in lines:
        assert line["rounds"] == "2"
        assert float(line["worst_check"]) < 1
        assert float(line["flops"]) > 1e9
        assert float(line["mfu"]) == pytest.approx(
            float(line["gflop_per_s"]) / float(line["best_gemm_gflop_per_s"]), rel=1e-3
        )
        assert float(line["images_per_s"]) > 0
        assert float(line["gflop_per_s"]) == pytest.approx(
            float(line["flops"]) / float(line["median_ms"]) / 1e6, rel=1e-3
        )
    shown = capsys.readouterr().out
    assert "stellar_fast" in shown
    assert ".csv" in shown and ".json" in shown and "speedups.png" in shown


def read_one(folder) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_operators_are_verified_timed_and_written(tmp_path, capsys) -> None:
    arguments = ["--suite", "ops", "--op", "crop_resize,koleo,linear", "--shapes", "small", "--rounds", "2"]
    assert run.main([*arguments, "--dtype", "fp32", "--out", str(tmp_path)]) == 0
    lines = read_one(tmp_path)
    cases = {(line["op"], line["dtype"], line["direction"]) for line in lines}
    assert cases == {
        ("crop_resize", "uint8", "forward"),
        *((op, "fp32", direction) for op in ("koleo", "linear") for direction in ("forward", "forward+backward")),
    }
    providers = {line["op"]: set() for line in lines}
    for line in lines:
        providers[line["op"]].add(line["provider"])
        assert line["suite"] == "ops" and line["preset"] == "small"
        assert float(line["worst_check"]) < 1 and float(line["median_ms"]) > 0
    assert providers == {
        "crop_resize": {"plain", "torch.interpolate", "stellar_fast.cpu"},
        "koleo": {"plain", "stellar_fast.cpu"},
        "linear": {"plain", "stellar_fast.onednn", "stellar_fast.torch"},
    }
    shown = capsys.readouterr().out
    assert "fwd + bwd" in shown and "stellar_fast.onednn" in shown


@pytest.mark.parametrize("op", backend.OPS)
def test_every_provider_of_an_operator_agrees_with_fp64(op: str) -> None:
    spec = load(op)
    dtypes = [d for d in spec.dtypes if d != torch.float16]
    for function, dtype in itertools.product(operators.functions(op), dtypes):
        said = []
        cases = operators.build_cases(op, "small", dtype, torch.device("cpu"), said.append, function)
        assert [case.direction for case in cases] == ["forward", "forward+backward"][: 1 + bool(spec.gradients)]
        for case in cases:
            assert "plain" in case.calls and len(case.calls) > 1, said
            for provider, call in case.calls.items():
                assert case.worst(provider).error < 1, f"{provider} {dtype} {case.worst(provider)}"
                call()


def test_a_wrong_operator_gets_no_time(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(koleo.PROVIDERS, "wrong", lambda x: 1.001 * koleo.plain(x))
    arguments = ["--suite", "ops", "--op", "koleo", "--shapes", "small", "--dtype", "fp32", "--rounds", "1"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    assert {line["provider"] for line in read_one(tmp_path)} == {"plain", "stellar_fast.cpu"}
    assert "koleo small fp32: wrong is WRONG and gets no time, worst output 0" in capsys.readouterr().err


def test_what_fails_or_is_interrupted_costs_no_other_rows(tmp_path, monkeypatch, capsys) -> None:
    real = operators.build_cases

    def build(op: str, *arguments: object) -> list[pair.Case]:
        if op == "koleo":
            raise RuntimeError("no kernel image")
        if op == "linear":
            raise KeyboardInterrupt
        return real(op, *arguments)

    monkeypatch.setattr(operators, "build_cases", build)
    arguments = ["--suite", "ops", "--op", "koleo,token_match,linear", "--shapes", "small", "--dtype", "fp32"]
    assert run.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 1
    assert {row.op for row in results.read_rows(tmp_path.glob("*.csv"))} == {"token_match"}
    said = capsys.readouterr().err
    assert "FAILED: RuntimeError: no kernel image" in said and "interrupted: what was measured is kept" in said


def test_potentials_have_rows_of_their_own_beside_the_formula(tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--suite", "ops", "--op", "sinkhorn", "--shapes", "small", "--dtype", "fp32", "--rounds", "1"]
    assert run.main([*arguments, "--out", str(tmp_path / "right")]) == 0
    lines = read_one(tmp_path / "right")
    assert [(line["op"], line["provider"]) for line in lines] == [
        (op, provider) for op in ("sinkhorn", "sinkhorn_potentials") for provider in ("plain", "stellar_fast.cpu")
    ]
    R, C = 12, 20
    assert [int(line["bytes"]) for line in lines[1:3]] == [20 * R * C, 16 * R * C + 4 * (R + C)]

    def shifted(potentials, **inputs):
        row, column = potentials
        return sinkhorn.assignments((row + 1e-3, column), **inputs)

    monkeypatch.setitem(sinkhorn.FUNCTIONS, "sinkhorn_potentials", (POTENTIALS, shifted))
    assert run.main([*arguments, "--out", str(tmp_path / "wrong")]) == 1
    assert [line["provider"] for line in read_one(tmp_path / "wrong")] == ["plain", "stellar_fast.cpu", "plain"]
    assert "sinkhorn_potentials small fp32: stellar_fast.cpu is WRONG and gets no time" in capsys.readouterr().err


def test_what_a_backend_does_not_take_is_left_out_with_its_reason(monkeypatch) -> None:
    monkeypatch.setitem(backend.OPS, "koleo", ("torch", "reference"))
    monkeypatch.setattr(backend, "pick", refuse)
    said = []
    cases = operators.build_cases("koleo", "small", torch.float32, torch.device("cpu"), said.append)
    assert [set(case.calls) for case in cases] == [{"plain"}, {"plain"}]
    assert said == ["left out: stellar_fast.torch (too small)"]


def refuse(*_: str) -> str:
    raise ValueError("too small")


def test_a_wrong_provider_gets_no_time(tmp_path, monkeypatch, capsys) -> None:
    def build_wrong(shape, plain):
        model = pair.build_stellar_fast(shape, plain)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        return model

    monkeypatch.setattr(step, "build_stellar_fast", build_wrong)
    arguments = ["--preset", "tiny", "--suite", "step", "--dtype", "fp32", "--rounds", "1", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    assert [line["provider"] for line in read_one(tmp_path)] == ["plain"]
    assert "stellar_fast is WRONG" in capsys.readouterr().err


def test_every_provider_of_the_objective_agrees(monkeypatch) -> None:
    quickly = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quickly)
    shape, device = shapes.model_shape("tiny"), torch.device("cpu")
    case = objective.build_case(shape, 2, torch.float32, device, ["plain_compiled", "stellar_fast"])
    assert list(case.calls) == ["plain", "plain_compiled", "stellar_fast"]
    for provider, checks in case.checks.items():
        assert len(checks) == 9 and case.worst(provider).error < 1, f"{provider} {case.worst(provider)}"


def test_memory_gives_a_peak_and_the_loss_of_each_provider(tmp_path) -> None:
    arguments = ["--suite", "memory", "--preset", "tiny", "--batch", "2", "--dtype", "bf16", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    lines = read_one(tmp_path)
    assert [(line["dtype"], line["provider"]) for line in lines] == [("bf16", p) for p in memory.PROVIDERS]
    assert all(float(line["worst_check"]) < 1 for line in lines)


@pytest.mark.parametrize("loss", [5.02, float("nan")])
def test_a_provider_with_another_loss_has_no_peak(tmp_path, monkeypatch, capsys, loss: float) -> None:
    measured = {"plain": (100.0, 5.0), "stellar_fast": (10.0, loss)}
    monkeypatch.setattr(memory, "extra_mib", lambda provider, *_: measured[provider])
    arguments = ["--suite", "memory", "--preset", "tiny", "--dtype", "fp32", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    assert [line["provider"] for line in read_one(tmp_path)] == ["plain"]
    said = f"memory fp32: stellar_fast is WRONG and is not reported, loss {loss:.6g} beside plain's 5"
    assert said in capsys.readouterr().err
    assert memory.disagreement(5.02, 5.0, "bf16") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "b17"], "b17"),
        (["--suite", "encode,fly"], "'fly'"),
        (["--dtype", "int3"], "'int3'"),
        (["--batch", "0"], "at least 1 but is 0"),
        (["--provider", "plain,apex"], "unknown provider 'apex'"),
        (["--device", "tpu"], "'tpu'"),
        (["--op", "koleo,crop"], "unknown operator 'crop'"),
        (["--op", "koleo", "--shapes", "tiny"], "koleo has no shape 'tiny'; named: small, b16, b16_masked, h16"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_suite_has_a_plan(suite: str) -> None:
    plans = run.plan(run.parse(["--suite", suite, "--preset", "tiny", "--dtype", "fp32"]))
    assert bool(plans) == (suite != "memory")  # which measures in processes of its own
    assert all(planned.weight > 0 for planned in plans)
    if suite == "ops":
        assert {planned.label.split()[0] for planned in plans} >= {"koleo", "sinkhorn", "sinkhorn_potentials"}
    elif suite in run.MODEL_SUITES and suite not in ("codes", "decode"):
        (case,) = plans[0].build()
        assert {"plain", "stellar_fast"} <= set(case.calls)
        assert timing.verify(case, lambda *_: None) == (set(case.calls), 0)


def test_views_of_another_seed_are_wrong() -> None:
    case = data.build_case(shapes.model_shape("tiny"), 2, torch.float32, torch.device("cpu"), ["stellar_fast"])
    assert list(case.calls) == ["plain", "stellar_fast"] and case.threads == 1
    right, other = case.calls["plain"](), case.calls["stellar_fast"]()
    assert max(check.error for views, want in zip(other, right, strict=True) for check in data._checks(views, want)) < 1
    assert min(check.error for check in data._checks(right[0], right[1])) > 1


def test_scaling_grows_one_size_a_series() -> None:
    found = list(scaling.points(shapes.model_shape("tiny"), torch.float32, torch.device("cpu")))
    series = {name: [point.x for point in found if point.series == name] for name in {p.series for p in found}}
    assert {name.split(", ")[1] for name in series} == {"batch", "sparse tokens", "image side", "prototypes", "threads"}
    assert all(xs == sorted(set(xs)) for xs in series.values())
    (case,) = next(point for point in found if point.series == "encode, threads").build()
    assert case.threads == 1 and not case.checks and list(case.calls) == ["stellar_fast"]


def test_threads_of_a_case_hold_for_it_alone() -> None:
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        case = pair.Case("data", "", 1, 0.0, 8, {"ours": lambda: seen.append(torch.get_num_threads())}, {}, threads=1)
        facts = measure.machine_facts(torch.device("cpu"), "default")
        (row,), wrong = timing.time_cases([case], "uint8", facts, measure.Ceilings(40.0), 2, 0.0, lambda *_, **__: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1} and row.threads == 1 and wrong == 0
    assert math.isnan(row.ratio) and math.isnan(row.mfu)


def test_plain_compiles_where_it_is_asked_for() -> None:
    arguments = "small", torch.float32, torch.device("cpu"), print
    (case, _) = operators.build_cases("koleo", *arguments, groups=["plain_compiled"])
    assert list(case.calls) == ["plain", "plain_compiled"] and case.worst("plain_compiled").error < 1
    said = []
    operators.build_cases("crop_resize", "small", torch.uint8, torch.device("cpu"), said.append, "", ["plain_compiled"])
    assert "plain_compiled" in said[0]
