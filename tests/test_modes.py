"""The operators, and the models made of them, where tensors have no memory, are mapped, differentiated or traced."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from stellar_fast import DecoderConfig, EncoderConfig, StellarEncoder, StellarModel, VQGANConfig
from stellar_fast.backend import OPS, use_backend
from stellar_fast.models.vqgan import VQGAN
from stellar_fast.ops import conv3x3, group_norm_silu
from stellar_fast.registry import OpSpec, load
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS

OPERATORS = [op for op in OPS if op != "crop_resize"]  # which takes pixels of files
DIFFERENTIABLE = [op for op in OPERATORS if load(op).gradients]
VQ = VQGANConfig(hidden_channels=32, num_res_blocks=1)


def make_inputs(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    spec = load(op)
    return spec.make_inputs(spec.shapes["small"], dtype, torch.device("cpu"), torch.Generator().manual_seed(0))


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


# ---- meta and fake tensors


def described(spec: OpSpec, inputs: Mapping[str, Any]) -> list[tuple]:
    """Shapes, dtypes and strides of outputs and gradients, and that none is on another device than the inputs."""
    leaves = {
        name: x.requires_grad_(name in spec.gradients and x.is_floating_point()) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    outputs = tensors(spec.function(**leaves))
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    learned = [x for x in outputs if x.requires_grad]
    found = list(outputs)
    if learned:
        found += torch.autograd.grad(learned, wanted, [torch.ones_like(x) for x in learned])
    assert {x.device for x in found} == {tensors(inputs)[0].device}
    return [(x.shape, x.dtype, x.stride()) for x in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_what_has_no_memory_has_the_shapes_of_what_has(op, dtype):
    spec = load(op)
    want = described(spec, make_inputs(op, dtype))
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, make_inputs(op, dtype))
    assert [x[:2] for x in described(spec, on_meta)] == [x[:2] for x in want]
    with FakeTensorMode() as mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, make_inputs(op, dtype))
        assert described(spec, fake) == want


def test_an_out_without_memory():
    x, weight = torch.empty(2, 32, 16, 16), torch.empty(32, 32, 3, 3)
    scale = torch.empty(32)
    for kind in ("meta", "fake"):
        with torch.device("meta") if kind == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
            like = torch.empty_like if kind == "fake" else (lambda t: torch.empty_like(t, device="meta"))
            image, taps, factors = (like(t).contiguous() for t in (x, weight, scale))
            out = torch.empty_like(image, memory_format=torch.channels_last)
            assert conv3x3(image, taps, out=out) is out
            assert group_norm_silu(image, 4, factors, factors, out=out) is out


def step(model: StellarModel, device: str, dtype: torch.dtype, **arguments: Any) -> dict[str, tuple]:
    def views(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    batch = {"global_views": views(2, 2, 3, 32, 32), "local_views": views(2, 2, 3, 16, 16)}
    predictions = model(batch, **arguments)["predictions"]
    model.loss(predictions).total.backward()
    found = {name: x for name, x in predictions.items() if isinstance(x, Tensor)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (x.shape, x.dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8"])
def test_a_training_step_without_memory(dtype):
    """Of a model that was built on the meta device, and of one built as usual, among fake tensors."""
    options = {"momentum_teacher": True, "vq_model": VQ, **SMALL_KWARGS}

    def build() -> StellarModel:
        model = StellarModel(SMALL_ENCODER, SMALL_DECODER, **options)
        model.update_teacher()
        return model

    want = step(build(), "cpu", dtype)
    with torch.device("meta"):
        model = build()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert step(model, "meta", dtype) == want
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step(model, "cpu", dtype) == want


def test_features_and_codes_without_memory():
    images = torch.rand(2, 3, 32, 48)
    encoder, tokenizer = StellarEncoder(SMALL_ENCODER, 4), VQGAN(VQ)

    def run(images: Tensor) -> list[tuple]:
        codes = tokenizer.encode(images)
        return [(x.shape, x.dtype) for x in (*encoder(images).values(), codes, tokenizer.decode(codes))]

    want = run(images)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert run(torch.empty_like(images)) == want
    encoder, tokenizer = encoder.to("meta"), tokenizer.to("meta")
    assert run(images.to("meta")) == want


# ---- torch.func


def functions(op: str) -> tuple[Tensor, Callable[[Callable[..., Any]], Callable[[Tensor], Any]]]:
    """The first argument with a gradient, and what makes a function of it alone."""
    inputs = make_inputs(op)
    name = next(iter(load(op).gradients or [n for n, x in inputs.items() if isinstance(x, Tensor)]))

    def of_first(function: Callable[..., Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: tuple(tensors(function(**inputs | {name: x})))

    return inputs[name], of_first


def scalar(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([y.sin().sum() for y in f(x) if y.is_floating_point()]).sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, v: grad(scalar(f))(x),
    "vjp": lambda f, x, v: vjp(scalar(f), x)[1](torch.ones(())),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "jacrev": lambda f, x, v: jacrev(lambda t: scalar(f)(x + t * v))(torch.zeros(())),
    "jacfwd": lambda f, x, v: jacfwd(lambda t: scalar(f)(x + t * v))(torch.zeros(())),
    "vmap": lambda f, x, v: vmap(f)(torch.stack((x, x + 0.1 * v, x))),
    "vmap of grad": lambda f, x, v: vmap(grad(scalar(f)))(torch.stack((x, x + 0.1 * v))),
    "jvp of grad": lambda f, x, v: jvp(grad(scalar(f)), (x,), (v,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_transforms_of_an_operator(op, transform):
    x, of_first = functions(op)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = TRANSFORMS[transform](of_first(load(op).function), x, v)
    want = TRANSFORMS[transform](of_first(load(op).reference), x, v)
    for have, expected in zip(tree_leaves(found), tree_leaves(want), strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("op", sorted({*OPERATORS} - {*DIFFERENTIABLE}))
def test_operators_without_a_gradient_are_mapped(op):
    x, of_first = functions(op)
    many = torch.stack((x, x.flip(0)))
    for have, *each in zip(
        vmap(of_first(load(op).function))(many), *map(of_first(load(op).function), many), strict=True
    ):
        torch.testing.assert_close(have, torch.stack(each))
    outputs, tangents = jvp(of_first(load(op).function), (x,), (torch.ones_like(x),))
    assert not any(tangent.any() for tangent in tangents)
    for have, expected in zip(outputs, of_first(load(op).function)(x), strict=True):
        torch.testing.assert_close(have, expected)


@pytest.fixture
def encoder() -> StellarEncoder:
    torch.manual_seed(0)
    return StellarEncoder(SMALL_ENCODER, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8"])
def test_images_are_mapped(encoder, dtype):
    images = torch.rand(3, 3, 32, 24)
    images = (255 * images).to(dtype) if dtype == torch.uint8 else images
    keep = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    found = vmap(lambda image: encoder(image[None]).lowrank[0])(images)
    torch.testing.assert_close(found, encoder(images).lowrank, rtol=1e-4, atol=1e-5)
    found = vmap(lambda image, kept: encoder(image[None], kept[None]).lowrank[0])(images, keep)
    torch.testing.assert_close(found, encoder(images, keep).lowrank, rtol=1e-4, atol=1e-5)


def test_codes_are_mapped():
    torch.manual_seed(0)
    tokenizer, images = VQGAN(VQ), torch.rand(2, 3, 32, 32)
    codes = vmap(lambda image: tokenizer.encode(image[None])[0])(images)
    assert torch.equal(codes, tokenizer.encode(images))
    found = vmap(lambda code: tokenizer.decode(code[None])[0])(codes)
    torch.testing.assert_close(found, tokenizer.decode(codes), rtol=1e-4, atol=1e-4)


def test_derivatives_of_an_encoder(encoder):
    """By its parameters, of each image apart; by the images, forwards and backwards and twice."""
    images, along = 0.2 + 0.6 * torch.rand(2, 3, 32, 32), 0.1 * torch.randn(2, 3, 32, 32)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}

    def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(encoder, parameters, (images,)).lowrank.sin().sum()

    apart = vmap(grad(lambda p, image: loss(p, image[None])), in_dims=(None, 0))(parameters, images)
    leaf = images.clone().requires_grad_()
    loss(dict(encoder.named_parameters()), leaf).backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(apart[name].sum(0), p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())
    assert leaf.grad is not None
    want = (leaf.grad * along).sum()
    torch.testing.assert_close(jvp(lambda x: loss(parameters, x), (images,), (along,))[1], want, rtol=1e-3, atol=1e-4)
    value, forward = linearize(lambda x: loss(parameters, x), images)
    torch.testing.assert_close(value, loss(parameters, images))
    torch.testing.assert_close(forward(along), want, rtol=1e-3, atol=1e-4)
    curved = jvp(grad(lambda x: loss(parameters, x)), (images,), (along,))[1]
    with use_backend("reference"):
        gradients = torch.autograd.grad(loss(parameters, leaf), leaf, create_graph=True)[0]
        (expected,) = torch.autograd.grad((gradients * along).sum(), leaf)
    torch.testing.assert_close(curved, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# ---- traces


def test_traces_of_an_encoder(encoder):
    """With sizes as they are, by make_fx and jit; for any number of images, by torch.export."""
    images, more = torch.rand(2, 3, 32, 24), torch.rand(5, 3, 32, 24)
    want = encoder(images).lowrank
    assert torch.equal(make_fx(lambda x: encoder(x).lowrank)(images)(images), want)
    exported = torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    torch.testing.assert_close(exported.module()(images).lowrank, want)
    torch.testing.assert_close(exported.module()(more).lowrank, encoder(more).lowrank, rtol=1e-4, atol=1e-5)


ENCODER = EncoderConfig(48, 1, 3, 96, image_size=32, patch_size=8)
DECODER = DecoderConfig(32, 1, 2, 64, image_size=32, patch_size=8)


def compiled(function: Callable[..., Any], dynamic: bool | None) -> tuple[Callable[..., Any], list[int]]:
    """Whole graphs, and how often one was made."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph, inputs):
        graphs.append(len(inputs))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=count), graphs


def assert_same_gradients(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            scale = q.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_compiled_training_step_takes_every_batch_size():
    """The second one makes a graph for all that come after it."""
    torch.manual_seed(0)
    model = StellarModel(ENCODER, DECODER, **SMALL_KWARGS)
    eager = copy.deepcopy(model)

    def loss(model: StellarModel, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(model(batch)["predictions"]).total

    fast, graphs = compiled(lambda batch: loss(model, batch), None)
    for size in (3, 4, 6, 9):
        generator = torch.Generator().manual_seed(size)
        batch = {
            name: torch.rand(size, 2, 3, side, side, generator=generator)
            for name, side in (("global_views", 32), ("local_views", 16))
        }
        results = []
        for call, own in ((fast, model), (lambda batch: loss(eager, batch), eager)):
            own.zero_grad()
            torch.manual_seed(size)
            results.append(call(batch))
            results[-1].backward()
        torch.testing.assert_close(*results)
        assert_same_gradients(model, eager)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_a_compiled_encoder_takes_every_batch_and_image_size():
    torch.manual_seed(0)
    encoder = StellarEncoder(ENCODER, 4)
    eager = copy.deepcopy(encoder)
    fast, graphs = compiled(encoder, True)
    made = 0  # for the first: torch may start again
    # sizes that are equal at first would be held to it, and a side of the encoder's own grid takes another branch
    for B, H, W in ((4, 40, 48), (5, 40, 48), (5, 56, 24)):
        images = torch.rand(B, 3, H, W)
        for model, call in ((encoder, fast), (eager, eager)):
            model.zero_grad()
            call(images).lowrank.square().sum().backward()
        assert_same_gradients(encoder, eager)
        made = made or len(graphs)
    assert len(graphs) == made
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "op", ["add_layer_norm", "linear", "lowrank_product", "patch_unembed", "prototype_cross_entropy"]
)
def test_a_compiled_operator_takes_every_size(op, dynamic):
    """The largest of them with a graph that was made for small ones."""
    spec = load(op)
    fast, graphs = compiled(spec.function, dynamic)
    letter = {"lowrank_product": "B", "patch_unembed": "B"}.get(op, "R")
    for size in (13, 17, 19, 3000):
        shape = {**spec.shapes["small"], letter: size}
        inputs = spec.make_inputs(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
        for have, want in zip(tensors(fast(**inputs)), tensors(spec.function(**inputs)), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
    torch._dynamo.reset()
