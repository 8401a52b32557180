"""Modules that somebody wrapped, replaced, pruned or hooked: they act as if their change were in the weights."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stellar_fast import StellarEncoder, StellarModel, VQGANConfig
from stellar_fast.nn.linear import Linear
from stellar_fast.nn.patch_unembed import PatchUnembed
from stellar_fast.nn.plain import is_plain, is_watched
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS

VQGAN = VQGANConfig((1, 1, 1, 2), 4, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)
# every module with a weight that an image passes through, but for norms
PATHS = [
    "encoder.patch_embed",
    *(
        f"encoder.transformer.blocks.{i}.{part}"
        for i in (0, 1)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ),
    "encoder.dense_proj",
    "encoder.sparse_proj",
    "decoder.proj",
    *(f"decoder.transformer.blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "decoder.head",
    *(
        f"{head}.{part}"
        for head in ("clustering_head", "cls_cluster_head")
        for part in ("layers.0", "layers.1", "prototypes")
    ),
]


def change_of(x: Tensor, delta: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """What a change of the weight adds to the output."""
    if delta.dim() == 2:
        return F.linear(x, delta)
    if grid is None:
        return F.conv2d(x, delta, stride=delta.shape[-2:])
    return F.conv_transpose2d(x.mT.unflatten(2, grid), delta, stride=delta.shape[-2:])


class Adapter(nn.Module):
    """As those of LoRA: the layer inside, and what is learned beside it."""

    def __init__(self, base_layer: nn.Module, delta: nn.Parameter) -> None:
        super().__init__()
        self.base_layer, self.delta = base_layer, delta

    def forward(self, x: Tensor, *grid) -> Tensor:
        return self.base_layer(x, *grid) + change_of(x, self.delta, *grid)


def wrapped(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    return Adapter(layer, delta)


def hooked(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    layer.register_forward_hook(lambda _, inputs, out: out + change_of(inputs[0], delta, *inputs[1:]))
    return layer


def with_forward_of_its_own(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    own = layer.forward
    layer.forward = lambda x, *grid: own(x, *grid) + change_of(x, delta, *grid)
    return layer


def subclassed(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    kind = type(layer)

    class Changed(kind):
        def forward(self, x: Tensor, *grid) -> Tensor:
            return kind.forward(self, x, *grid) + change_of(x, delta, *grid)

    layer.__class__ = Changed
    return layer


class Sum(nn.Module):
    def __init__(self, delta: nn.Parameter) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def parametrized(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Sum(delta))
    return layer


def replaced(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    """By torch's own layer, with the change in its weight."""
    (o, i), bias = layer.weight.shape[:2], layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        other: nn.Module = nn.Conv2d(i, o, layer.kernel_size, layer.stride, bias=bias)
    elif isinstance(layer, PatchUnembed):
        other = nn.ConvTranspose2d(o, i, layer.kernel_size, layer.stride, bias=bias)
    else:
        other = nn.Linear(i, o, bias=bias)
    other.to(delta.dtype).load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.weight += delta
    return other


def pruned(layer: nn.Module, delta: nn.Parameter) -> nn.Module:
    """Without a third of its weights."""
    weight = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", 0.34)
    with torch.no_grad():
        delta.copy_(layer.weight - weight)
    return layer


KINDS = [wrapped, hooked, with_forward_of_its_own, subclassed, parametrized, replaced, pruned]
Change = Callable[[nn.Module, nn.Parameter], nn.Module]


def build(dtype: torch.dtype = torch.float64, **changes) -> StellarModel:
    """In fp64, where another order of sums shows nowhere."""
    torch.manual_seed(0)
    return StellarModel(SMALL_ENCODER, SMALL_DECODER, color_augmentation=False, **{**SMALL_KWARGS, **changes}).to(dtype)


def change(model: StellarModel, paths: list[str], kind: Change) -> dict[str, nn.Parameter]:
    """Change layers of a model; what is added to their weights."""
    deltas = {}
    for path in paths:
        layer = model.get_submodule(path)
        delta = 0.1 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(len(path)))
        delta = nn.Parameter(delta.to(layer.weight.dtype))
        model.set_submodule(path, kind(layer, delta))
        deltas[path] = delta
    return deltas


def merged(deltas: dict[str, nn.Parameter], **changes) -> StellarModel:
    """A plain model with the change in its weights."""
    model = build(**changes)
    with torch.no_grad():
        for path, delta in deltas.items():
            model.get_submodule(path).weight += delta
    return model


def step(model: StellarModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    predictions = model(batch, keep_indices=torch.arange(8).expand(4, -1) * 2)["predictions"]
    total, parts = model.loss(predictions)
    total.backward()
    return parts | {name: predictions[name].detach() for name in ("x_hat", "match_index_masked")}


def assert_acts_as_merged(
    model: StellarModel, deltas: dict[str, nn.Parameter], kind: Change, batch: dict[str, Tensor], **changes
) -> None:
    """Losses, gradients of what is learned, features and images are those of merged weights."""
    expected = merged(deltas, **changes)
    torch.testing.assert_close(step(model, batch), step(expected, batch))
    for path, delta in deltas.items():
        layer, want = model.get_submodule(path), expected.get_submodule(path).weight.grad
        found = layer.weight.grad if kind is replaced else layer.weight_orig.grad if kind is pruned else delta.grad
        want = want * layer.weight_mask if kind is pruned else want
        assert want.abs().max() > 0
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8 * want.abs().max().item(), msg=path)
    images = torch.rand(2, 3, 40, 24)
    ours, theirs = model.encode(images), expected.encode(images)
    for name in ("cls", "sparse", "dense", "lowrank"):
        torch.testing.assert_close(ours[name], theirs[name])
    torch.testing.assert_close(model.reconstruct(ours), expected.reconstruct(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers(small_batch, kind):
    model = build()
    assert_acts_as_merged(model, change(model, PATHS, kind), kind, small_batch)


@pytest.mark.parametrize(
    "path",
    [
        "encoder.patch_embed",
        "encoder.transformer.blocks.1.attn.qkv",
        "encoder.transformer.blocks.1.mlp.fc2",
        "decoder.proj",
        "clustering_head.prototypes",
    ],
)
def test_one_layer(small_batch, path):
    model = build()
    assert_acts_as_merged(model, change(model, [path], wrapped), wrapped, small_batch)


def test_a_head_over_codes(small_batch):
    model = build(vq_model=VQGAN)
    deltas = change(model, ["decoder.head", "decoder.proj"], wrapped)
    assert_acts_as_merged(model, deltas, wrapped, small_batch, vq_model=VQGAN)


def test_prototypes_with_a_bias(small_batch):
    """torch's layer in their place: what it has more is learned as well."""
    model = build()
    layer = nn.Linear(16, 64, dtype=torch.float64)
    model.clustering_head.prototypes = layer
    step(model, small_batch)
    assert layer.bias.grad.abs().max() > 0


def test_inputs_that_a_hook_changes(small_batch):
    model, expected = build(), build()
    paths = [path for path in PATHS if path != "encoder.patch_embed"]
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: (2 * inputs[0], *inputs[1:]))
        expected.get_submodule(path).weight.data *= 2
    torch.testing.assert_close(step(model, small_batch), step(expected, small_batch))


def test_hooks_see_every_call(small_batch):
    model, seen = build(), {"before": set(), "after": set(), "backward": set(), "all": set()}
    paths = {module: name for name, module in model.named_modules()}

    def note(kind: str, module: nn.Module) -> None:
        seen[kind].add(paths.get(module))

    for path in PATHS:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, _: note("before", m))
        module.register_forward_hook(lambda m, *_: note("after", m))
        if path != "encoder.patch_embed":  # images have no gradient
            module.register_full_backward_hook(lambda m, *_: note("backward", m))
    step(model, small_batch)
    assert seen["before"] == seen["after"] == set(PATHS) == seen["backward"] | {"encoder.patch_embed"}
    plain = build()
    paths = {module: name for name, module in plain.named_modules()}
    hook = register_module_forward_hook(lambda m, *_: note("all", m))
    try:
        found = step(plain, small_batch)
    finally:
        hook.remove()
    assert seen["all"] >= set(PATHS)
    torch.testing.assert_close(found, step(build(), small_batch))


def test_counting_flops_counts_what_runs():
    layer = Linear(4, 4)
    with FlopCounterMode(display=False):
        assert is_plain(layer, Linear)
    hook = register_module_forward_hook(lambda *_: None)
    assert not is_plain(layer, Linear)
    hook.remove()
    assert is_plain(layer, Linear)


def test_compiled_whole(small_batch):
    torch._dynamo.reset()
    model = build()
    deltas = change(model, ["encoder.patch_embed", "encoder.transformer.blocks.1.mlp.fc2"], wrapped)
    deltas |= change(model, ["encoder.transformer.blocks.1.attn.qkv", "decoder.proj"], hooked)
    deltas |= change(model, ["clustering_head.prototypes"], parametrized)
    keep = torch.arange(8).expand(4, -1) * 2

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return model.loss(model(batch, keep_indices=keep)["predictions"]).total

    total = torch.compile(loss, fullgraph=True, backend="eager")(small_batch)
    torch.testing.assert_close(total, loss(small_batch))
    total.backward()
    assert all(delta.grad.abs().max() > 0 for delta in deltas.values())


def test_a_hook_that_comes_after_compiling_is_seen_where_torch_guards_hooks():
    torch._dynamo.reset()
    mlp = build().encoder.transformer.blocks[0].mlp
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(mlp, fullgraph=True, backend="eager")
        x = torch.randn(3, 48, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), mlp(x))
        mlp.fc2.register_forward_hook(lambda _, inputs, out: out + inputs[0].sum(1, keepdim=True))
        torch.testing.assert_close(compiled(x), mlp(x))


class OnlyTensors(nn.Module):
    """Around a norm that takes a branch and returns a pair: one tensor in, whatever comes out."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.norm(x)


def plain_norm(norm: nn.LayerNorm) -> nn.Module:
    other = nn.LayerNorm(norm.normalized_shape, norm.eps, dtype=norm.weight.dtype)
    other.load_state_dict(norm.state_dict())
    return other


@pytest.mark.parametrize("other", [plain_norm, OnlyTensors])
def test_norms_may_be_others(small_batch, other):
    model = build()
    for path in (
        "encoder.transformer.norm",
        "encoder.transformer.blocks.1.norm1",
        "decoder.transformer.blocks.0.norm2",
    ):
        model.set_submodule(path, other(model.get_submodule(path)))
    torch.testing.assert_close(step(model, small_batch), step(build(), small_batch))


class Int8(nn.Module):
    """A quantised layer: no parameters, and a `weight` that is no tensor."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("codes", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def weight(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def test_quantised_layers(small_batch):
    model, expected = build(), build()
    for path in PATHS:
        if isinstance(layer := model.get_submodule(path), Linear):
            model.set_submodule(path, Int8(layer))
            with torch.no_grad():
                expected.get_submodule(path).weight.copy_(model.get_submodule(path).weight())
    torch.testing.assert_close(step(model, small_batch), step(expected, small_batch))
    images = torch.rand(1, 3, 32, 32)
    ours, theirs = model.encode(images), expected.encode(images)
    torch.testing.assert_close(ours.sparse, theirs.sparse)
    torch.testing.assert_close(model.reconstruct(ours), expected.reconstruct(theirs))


def test_under_autocast(small_batch):
    model = build(torch.float32)
    deltas = change(model, PATHS, wrapped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = step(model, small_batch), step(merged(deltas, dtype=torch.float32), small_batch)
    for name in ("MSE", "clustering_loss", "mask_loss", "cls_loss"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], want[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", [wrapped, hooked])
def test_of_other_dtypes(small_batch, dtype, tolerance, kind):
    model = build(dtype)
    deltas = change(model, PATHS, kind)
    found, want = step(model, small_batch), step(merged(deltas, dtype=dtype), small_batch)
    for name in ("MSE", "clustering_loss", "mask_loss", "cls_loss"):
        torch.testing.assert_close(found[name], want[name], rtol=tolerance, atol=tolerance)


def test_spectral_norm_takes_one_step_a_forward():
    """A parametrization with a state of its own is evaluated as often as if its layer were called."""
    model = build()
    torch.nn.utils.parametrizations.spectral_norm(model.decoder.proj)
    calls = []
    model.decoder.proj.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    model.decoder(torch.randn(1, 4, 48).double(), torch.rand(1, 16, 4).double(), (4, 4))
    assert len(calls) == 1


def test_checkpointed_blocks_and_compiled_parts_keep_their_names(small_batch):
    torch._dynamo.reset()
    model, expected = build(momentum_teacher=True), build(momentum_teacher=True)
    blocks = model.encoder.transformer.blocks
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    model.decoder = torch.compile(model.decoder, backend="eager")
    model.clustering_head.prototypes = torch.compile(model.clustering_head.prototypes, backend="eager")
    model.update_teacher()
    torch.testing.assert_close(step(model, small_batch), step(expected, small_batch))
    assert model.upstream_state_dict().keys() == expected.upstream_state_dict().keys()
    torch.testing.assert_close(model.upstream_gradients(), expected.upstream_gradients())
    with torch.no_grad():
        expected.encoder.sparse_tokens += 1
    model.load_upstream_state_dict(expected.upstream_state_dict())
    torch.testing.assert_close(model.upstream_state_dict(), expected.upstream_state_dict())


def test_a_teacher_of_wrapped_parts(small_batch):
    encoder = build().encoder
    deltas = [
        nn.Parameter(0.1 * torch.randn(layer.weight.shape)) for layer in (encoder.patch_embed, encoder.dense_proj)
    ]
    encoder.patch_embed = Adapter(encoder.patch_embed, deltas[0])
    torch.manual_seed(0)
    kwargs = {name: value for name, value in SMALL_KWARGS.items() if name != "num_sparse_tokens"}
    model = StellarModel(encoder, SMALL_DECODER, momentum_teacher=True, teacher_momentum=0.5, **kwargs).double()
    theirs = model.teacher.encoder.patch_embed.delta
    assert torch.equal(theirs, deltas[0]) and theirs is not deltas[0] and not theirs.requires_grad
    with torch.no_grad():
        deltas[0] += 1
    model.update_teacher()
    torch.testing.assert_close(theirs, deltas[0] - 0.5)
    step(model, small_batch)
    change(model, ["clustering_head.prototypes"], wrapped)
    with pytest.raises(ValueError, match=r"the student has no clustering_head\.prototypes\.weight, which the teacher"):
        model.update_teacher()


def test_copies_of_wrapped_models(small_batch):
    model = build()
    change(model, PATHS, wrapped)
    torch.testing.assert_close(step(copy.deepcopy(model), small_batch), step(model, small_batch))


def test_adapters_are_refused_by_name_where_upstream_has_none_for_them():
    model = build()
    change(model, ["encoder.dense_proj"], wrapped)
    with pytest.raises(KeyError, match=r"encoder\.dense_proj\.base_layer\.weight.*merge or remove adapters"):
        model.upstream_state_dict()


def test_patches_of_another_grid_are_refused():
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    encoder.patch_embed = nn.Conv2d(3, 48, 8, stride=4)
    message = r"patch_embed returned \(1, 48, 7, 7\) but the encoder needs \(1, 48, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        encoder(torch.rand(1, 3, 32, 32))
    encoder.patch_embed = nn.Conv2d(3, 48, 16, stride=8, padding=4)  # overlaps, on the same grid
    pixels = torch.rand(1, 3, 32, 32)
    patches = encoder.patch_embed((pixels - encoder.mean) / encoder.std).flatten(2).mT + encoder.pos_embed[:, 1:]
    seen = []
    encoder.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(pixels)
    torch.testing.assert_close(seen[0][1:17], patches[0])


def test_images_are_checked_by_a_hooked_patch_embed():
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    encoder.patch_embed.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] but span \[255, 255\]"):
        encoder(torch.full((1, 3, 32, 32), 255.0))
    with pytest.raises(ValueError, match=r"keep_indices span \[0, 16\] but the image has 16 patches"):
        encoder(torch.rand(1, 3, 32, 32), torch.tensor([[0, 16]]))


def test_layers_of_the_vqgan():
    model = build(torch.float32, vq_model=VQGAN)
    convs = [name for name, m in model.tokenizer.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) > 10
    images, codes = torch.rand(1, 3, 16, 16), torch.arange(4).view(1, 2, 2)
    expected, seen = (model.tokenizer.encode(images), model.tokenizer.decode(codes)), []
    for name in convs:
        model.tokenizer.get_submodule(name).register_forward_hook(lambda m, *_: seen.append(m))
    torch.testing.assert_close((model.tokenizer.encode(images), model.tokenizer.decode(codes)), expected)
    assert {id(m) for m in seen} == {id(model.tokenizer.get_submodule(name)) for name in convs}


def test_what_hooks_of_the_vqgan_keep_stays():
    """Memory that is used again is not given to who may look at it later."""
    vqgan = build(torch.float32, vq_model=VQGAN).tokenizer
    kept, copies = [], []

    def keep(_: nn.Module, inputs: tuple, out: Tensor | tuple) -> None:
        tensors = [t for t in tree_leaves((inputs, out)) if isinstance(t, Tensor)]
        kept.extend(tensors)
        copies.extend(t.clone() for t in tensors)

    for module in vqgan.modules():
        module.register_forward_hook(keep)
    vqgan.decode(torch.arange(8).view(2, 2, 2))
    assert len(kept) > 20
    for now, then in zip(kept, copies, strict=True):
        assert torch.equal(now, then)


def test_a_hook_on_a_whole_network_of_the_vqgan_is_no_hook_on_its_parts():
    """It sees what goes in and comes out, both of which stay, so that memory is used again as without it."""
    vqgan = build(torch.float32, vq_model=VQGAN).tokenizer
    kept = []
    vqgan.encoder.register_forward_hook(lambda module, inputs, out: kept.extend((*inputs, out)))
    assert not is_watched(vqgan.encoder)
    images = torch.rand(1, 3, 32, 32)
    vqgan.encode(images)
    copies = [t.clone() for t in kept]
    vqgan.encode(images.flip(-1))
    assert all(map(torch.equal, kept, copies))
    vqgan.encoder.down[0].register_forward_hook(lambda *_: None)
    assert is_watched(vqgan.encoder)
