import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast import backend
from stellar_fast.backend import use_backend
from stellar_fast.kernels.group_norm_silu.spec import SPEC, statistics
from stellar_fast.ops import group_norm_silu
from tests.harness import check_op, check_registered, each_backend, each_shape
from tests.roundings import assert_alike

FP32, BF16 = torch.float32, torch.bfloat16
DTYPE = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
SMALL = SPEC.shapes["small"]
# three chunks of pixels of which the last is short, channels that no vector divides
CHUNKS = {"B": 2, "C": 36, "H": 33, "W": 41, "G": 6}


def inputs(shape=SMALL, dtype: torch.dtype = FP32, **options: int) -> dict:
    return SPEC.make_inputs({**shape, **options}, dtype, torch.device("cpu"), torch.Generator().manual_seed(1))


@DTYPE
@each_backend("group_norm_silu")
@each_shape("group_norm_silu", CHUNKS)
def test_no_worse_than_eager(backend, device, shape, dtype):
    check_op("group_norm_silu", backend, shape, dtype, device)


@each_backend("group_norm_silu", "cuda")
@each_shape("group_norm_silu", CHUNKS)
def test_no_worse_than_eager_in_fp16(backend, device, shape):
    check_op("group_norm_silu", backend, shape, torch.float16, device)


@pytest.mark.parametrize("options", [{}, {"stats": 1}, {"residual": 1}], ids=["bare", "stats", "residual"])
@each_backend("group_norm_silu")
def test_registration(backend, device, options):
    check_registered("group_norm_silu", backend, {**SMALL, **options}, device=device)


@pytest.mark.parametrize("options", [{}, {"residual": 1}], ids=["bare", "residual"])
@each_backend("group_norm_silu", "cpu", "cuda", "torch")
def test_parameters_stay_wide_under_autocast(backend, device, options):
    shape = {**SMALL, **options, "autocast": 1}
    check_op("group_norm_silu", backend, shape, BF16, device)
    leaves = {n: v.to(device).requires_grad_() if isinstance(v, Tensor) else v for n, v in inputs(shape, BF16).items()}
    with use_backend(group_norm_silu=backend), torch.autocast(device, BF16):
        result = group_norm_silu(**leaves)
    result = result[0] if options else result
    assert result.dtype == BF16
    result.sum().backward()
    assert leaves["x"].grad.dtype == BF16 and leaves["weight"].grad.dtype == leaves["bias"].grad.dtype == FP32


@each_backend("group_norm_silu", "cpu", "cuda")
@pytest.mark.parametrize("options", [{}, {"stats": 1}, {"residual": 1}], ids=["bare", "stats", "residual"])
def test_a_mean_of_a_thousand_deviations(backend, device, options):
    """A variance from sums of squares in fp32 would have lost every digit."""
    tensors = inputs({"B": 2, "C": 12, "H": 40, "W": 30, "G": 3}, **options)
    tensors["x"] = tensors["x"] + 1000
    if "stats" in tensors:
        tensors["stats"] = statistics(tensors["x"], 3)
    y = (tensors["x"] + tensors.get("residual", 0)).double()
    exact = F.silu(F.group_norm(y, 3, tensors["weight"].double(), tensors["bias"].double(), 1e-6))
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in tensors.items()}
    with use_backend(group_norm_silu=backend):
        result = group_norm_silu(**given)
    out = (result[0] if "residual" in tensors else result).cpu()
    assert (out - exact).abs().max() < 3e-4  # the mean itself has 6e-5 between its neighbours in fp32
    check_op("group_norm_silu", backend, "small", FP32, device, x=inputs()["x"].to(device) + 1000)


@each_backend("group_norm_silu", "cpu", "cuda")
def test_an_outlier_where_a_chunk_begins(backend, device):
    """The deviations are taken from a value near the mean, which is not that one."""
    x = inputs(CHUNKS)["x"].clone()
    x[:, :, 0, 0] = 100
    check_op("group_norm_silu", backend, CHUNKS, FP32, device, x=x.to(device))


@each_backend("group_norm_silu", "cpu", "cuda")
def test_statistics_that_came_along_are_believed(backend, device):
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs(stats=1).items()}
    given["stats"] = given["stats"].clone()
    given["stats"][..., 0] += 0.5
    given["stats"][..., 1] *= 4
    mean, variance = given["stats"][..., None, None, None].unbind(2)
    unit = ((given["x"].unflatten(1, (4, 6)) - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    expected = F.silu(unit * given["weight"][:, None, None] + given["bias"][:, None, None])
    with use_backend(group_norm_silu=backend):
        assert_alike(group_norm_silu(**given), expected)


@pytest.mark.parametrize("options", [{}, {"residual": 1}], ids=["bare", "residual"])
@each_backend("group_norm_silu")
def test_results_are_channels_last(backend, device, options):
    given = {n: v.to(device).contiguous() if isinstance(v, Tensor) else v for n, v in inputs(**options).items()}
    with use_backend(group_norm_silu=backend):
        result = group_norm_silu(**given)
    for image in result if options else (result,):
        assert image.is_contiguous(memory_format=torch.channels_last)


@use_backend(group_norm_silu="cpu")
def test_threads_do_not_change_a_bit():
    tensors = inputs(CHUNKS, residual=1)
    leaves = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in tensors.items()}

    def run() -> list[Tensor]:
        out, y = group_norm_silu(**leaves)
        return [out, y, *torch.autograd.grad((out**2).sum() + y.sum(), [leaves[n] for n in SPEC.gradients])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run()
        torch.set_num_threads(3)  # more than there may be cores
        other = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@use_backend(group_norm_silu="cpu")
def test_a_sum_is_normalised_as_it_is_kept():
    tensors = inputs(dtype=BF16, residual=1)
    out, y = group_norm_silu(**tensors)
    assert torch.equal(y, tensors["x"] + tensors["residual"])
    alone = {n: v for n, v in tensors.items() if n != "residual"}
    assert torch.equal(out, group_norm_silu(**alone | {"x": y}))


@use_backend(group_norm_silu="cpu")
def test_a_residual_of_another_dtype_widens_the_sum():
    tensors = inputs(residual=1)
    tensors["x"] = tensors["x"].bfloat16().requires_grad_()
    out, y = group_norm_silu(**tensors)
    assert out.dtype == y.dtype == FP32
    (out.sum() + y.sum()).backward()
    assert tensors["x"].grad.dtype == BF16


@use_backend(group_norm_silu="cpu")
def test_extreme_values():
    """SiLU far out is 0 or its argument, and a NaN stays in its group."""
    tensors = inputs() | {"bias": torch.zeros(24), "weight": torch.full((24,), 1e4)}
    out = group_norm_silu(**tensors)
    z = F.group_norm(tensors["x"], 4, tensors["weight"], tensors["bias"], 1e-6)
    torch.testing.assert_close(out, F.silu(z), rtol=1e-4, atol=2e-3)
    assert out.isfinite().all()
    tensors["x"] = tensors["x"].clone()
    tensors["x"][0, 7, 2, 3] = torch.nan
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 6:12] = True
    assert torch.equal(group_norm_silu(**tensors).isnan(), hit)


def test_images_of_any_size_are_ours_where_nothing_was_asked_for():
    with backend.observe() as seen:
        group_norm_silu(**inputs())
    assert seen == {("group_norm_silu", "cpu")}


@use_backend(group_norm_silu="torch")
def test_torch_does_not_crash_where_only_parameters_learn():
    """Its own backward does, on a channels-last tensor that needs no gradient."""
    tensors = inputs()
    tensors["weight"].requires_grad_()
    group_norm_silu(**tensors).sum().backward()
    assert tensors["weight"].grad.isfinite().all()


def test_forward_mode_is_not_silently_zero():
    tensors = inputs()
    direction = torch.ones_like(tensors["x"])
    direction[:, :3] = -1
    step = 1e-3
    _, tangent = torch.func.jvp(lambda x: group_norm_silu(**tensors | {"x": x}), (tensors["x"],), (direction,))
    doubles = {n: v.double() if isinstance(v, Tensor) else v for n, v in tensors.items()}
    ahead = group_norm_silu(**doubles | {"x": doubles["x"] + step * direction})
    behind = group_norm_silu(**doubles | {"x": doubles["x"] - step * direction})
    torch.testing.assert_close(tangent.double(), (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": 5}, "groups must divide the channels, but 5 does not divide 24"),
        ({"groups": 0}, "groups must be positive but is 0"),
        ({"eps": 0.0}, "eps must be positive but is 0.0"),
        ({"x": torch.zeros(24, 5, 7)}, r"x must have 4 dimensions \(BCHW\) but its shape is \(24, 5, 7\)"),
        ({"x": torch.zeros(1, 24, 2, 2, dtype=torch.int64)}, "x must be floating point but is torch.int64"),
        ({"weight": torch.zeros(23)}, r"weight and bias must have shape \(24,\) but have \(23,\) and \(24,\)"),
        ({"residual": torch.zeros(2, 24, 5, 6)}, r"x has shape \(2, 24, 5, 7\) but residual has \(2, 24, 5, 6\)"),
        ({"stats": torch.zeros(2, 4)}, r"stats must be torch.float32 of shape \(2, 4, 2\) but are .* \(2, 4\)"),
        ({"stats": torch.zeros(2, 4, 2, dtype=BF16)}, r"stats must be torch.float32 .* are torch.bfloat16"),
        ({"stats": torch.zeros(2, 4, 2), "residual": torch.zeros(2, 24, 5, 7)}, "stats are those of x, but with a res"),
    ],
)
def test_wrong_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**inputs() | changed)


def test_large_results_are_those_of_small_ones():
    one = inputs({"B": 1, "C": 64, "H": 260, "W": 256, "G": 8})  # 16 MiB
    two = one | {"x": torch.cat([one["x"], one["x"].flip(2)]).contiguous(memory_format=torch.channels_last)}
    with torch.no_grad():
        large = group_norm_silu(**two)  # from 32 MiB on written past the caches
        small = [group_norm_silu(**one | {"x": x[None]}) for x in two["x"]]
    assert torch.equal(large, torch.cat(small))


def test_fp64_is_refused_by_name():
    tensors = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs().items()}
    assert group_norm_silu(**tensors).dtype == torch.float64
    with use_backend(group_norm_silu="cpu"), pytest.raises(ValueError, match=r"it does not compute in torch\.float64"):
        group_norm_silu(**tensors)


@each_backend("group_norm_silu")
@pytest.mark.parametrize("with_residual", [False, True])
def test_out_holds_the_result(backend, device, with_residual):
    x, residual = (torch.randn(2, 6, 5, 4, device=device) for _ in range(2))
    weight, bias = torch.randn(6, device=device), torch.randn(6, device=device)
    options = {"residual": residual} if with_residual else {}
    out = torch.full_like(x, float("nan"), memory_format=torch.channels_last)
    with use_backend(group_norm_silu=backend):
        want = group_norm_silu(x, 3, weight, bias, **options)
        found = group_norm_silu(x, 3, weight, bias, **options, out=out)
    if with_residual:
        (found, y), (want, want_y) = found, want
        assert_alike(y, want_y)
    assert found is out
    assert_alike(found, want)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 6, 5, 3), r"out must be torch.float32 of shape \(2, 6, 5, 4\) .* of shape \(2, 6, 5, 3\)"),
        (torch.empty(2, 6, 5, 4), "channels-last memory but is .* strides"),
        (
            torch.empty(2, 5, 4, 6, dtype=torch.bfloat16).permute(0, 3, 1, 2),
            "out must be torch.float32 .* torch.bfloat16",
        ),
    ],
)
def test_an_out_that_does_not_fit_is_named(out, message):
    x = torch.randn(2, 6, 5, 4)
    with pytest.raises(ValueError, match=message):
        group_norm_silu(x, 3, torch.ones(6), torch.zeros(6), out=out)
    fitting = torch.empty(2, 5, 4, 6).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out is given but weight needs a gradient"):
        group_norm_silu(x, 3, torch.ones(6, requires_grad=True), torch.zeros(6), out=fitting)


def test_an_out_over_an_input_is_named():
    x = torch.randn(2, 5, 4, 6).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        group_norm_silu(x, 3, torch.ones(6), torch.zeros(6), out=x)
