"""All of torch's ways to build, copy, cast and fill a model give the same model: nothing is lost that no file holds."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stellar_fast import StellarEncoder, StellarModel, VQGANConfig, blend_tokens, drop_tokens
from stellar_fast.models.encoder import IMAGE_MEAN, IMAGE_STD, ViewBatch, _kept_constant
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS

VQGAN = VQGANConfig((1, 1, 1, 2), 4, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)


def build() -> StellarModel:
    torch.manual_seed(0)
    kwargs = {**SMALL_KWARGS, "vq_model": VQGAN, "momentum_teacher": True, "color_augmentation": False}
    return StellarModel(SMALL_ENCODER, SMALL_DECODER, **kwargs)


def on_meta() -> StellarModel:
    with torch.device("meta"):
        return build()


def emptied(model: nn.Module) -> nn.Module:
    """As `to_empty` leaves it at its worst."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    return model


def filled(source: StellarModel) -> StellarModel:
    model = emptied(on_meta())
    model.load_state_dict(source.state_dict())
    return model


def filled_by_upstreams_names(source: StellarModel) -> StellarModel:
    model = emptied(on_meta())
    vqgan = {f"tokenizer.{name}": t for name, t in source.tokenizer.state_dict().items()}
    model.load_upstream_state_dict(source.upstream_state_dict() | vqgan)
    return model


def assigned(source: StellarModel) -> StellarModel:
    model = on_meta()
    model.load_state_dict(source.state_dict(), assign=True)
    return model


def emptied_and_filled(source: StellarModel) -> StellarModel:
    state = {name: t.clone() for name, t in source.state_dict().items()}
    model = emptied(copy.deepcopy(source))
    model.load_state_dict(state)
    return model


def saved_whole(source: StellarModel) -> StellarModel:
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def default_device(source: StellarModel) -> StellarModel:
    torch.set_default_device("meta")
    try:
        model = build()
    finally:
        torch.set_default_device(None)
    emptied(model).load_state_dict(source.state_dict())
    return model


def default_dtype(source: StellarModel) -> StellarModel:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.encoder.mean.dtype == torch.float32  # what is subtracted is not rounded to 16 bits
    model.float().load_state_dict(source.state_dict())
    return model


def cast(dtype: torch.dtype) -> Callable[[StellarModel], StellarModel]:
    def there_and_back(source: StellarModel) -> StellarModel:
        model = copy.deepcopy(source).to(dtype).float()
        model.load_state_dict(source.state_dict())
        return model

    return there_and_back


WAYS: dict[str, Callable[[StellarModel], StellarModel]] = {
    "to_empty": filled,
    "to_empty, upstream's names": filled_by_upstreams_names,
    "to_empty of one that was used": emptied_and_filled,
    "assign": assigned,
    "deepcopy": copy.deepcopy,
    "pickle": lambda source: pickle.loads(pickle.dumps(source)),
    "torch.save": saved_whole,
    "set_default_device": default_device,
    "set_default_dtype": default_dtype,
    "bfloat16": cast(torch.bfloat16),
    "half": cast(torch.float16),
    "double": cast(torch.float64),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_model(way: str, small_batch: dict[str, Tensor]) -> None:
    source = build()
    images = torch.rand(1, 3, 32, 32)
    features = source.encode(images)
    model = WAYS[way](source)
    assert torch.equal(model.encoder.mean, torch.tensor(IMAGE_MEAN).view(3, 1, 1))
    assert torch.equal(model.encoder.std, torch.tensor(IMAGE_STD).view(3, 1, 1))
    found = model.encode(images)
    assert all(torch.equal(found[name], features[name]) for name in features)
    assert torch.equal(model.reconstruct(found)["reconstruction"], source.reconstruct(features)["reconstruction"])
    keep = torch.arange(8).expand(4, -1)
    with torch.no_grad():
        losses = [m.loss(m(small_batch, keep_indices=keep)["predictions"]).total for m in (model, source)]
    assert torch.equal(*losses)


def test_no_buffer_that_no_file_holds() -> None:
    model = build()
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()
    assert not any(name.endswith((".mean", ".std")) for name in model.state_dict())


def test_colours_are_read_only() -> None:
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    encoder.mean.zero_()
    assert torch.equal(encoder.mean, torch.tensor(IMAGE_MEAN).view(3, 1, 1)), "what is given out is a copy"
    with pytest.raises(AttributeError, match="mean"):
        encoder.mean = torch.zeros(3, 1, 1)
    assert encoder.double().std.dtype == torch.float64


def test_training_after_inference_mode() -> None:
    """Constants that inference mode made could not be used in a backward: they are not made by it."""
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    images = torch.rand(1, 3, 32, 32)
    _kept_constant.cache_clear()
    with torch.inference_mode():
        features = encoder(images)
    output = encoder(images)
    output.sparse.sum().backward()
    torch.testing.assert_close(output.sparse.detach(), features.sparse)


def test_every_tensor_is_where_the_model_is(small_batch: dict[str, Tensor]) -> None:
    """And not on the default device of whoever calls, here one that holds nothing."""
    model, images = build(), torch.rand(2, 3, 32, 32)
    torch.set_default_device("meta")
    try:
        loss = model.loss(model(small_batch)["predictions"]).total
        loss.backward()
        features = blend_tokens(drop_tokens(model.encode(images), 1), model.encode(images), 0.5, [0])
        image = model.reconstruct(features)["reconstruction"]
    finally:
        torch.set_default_device(None)
    assert loss.isfinite() and image.isfinite().all()


def own_bytes(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_features_own_what_they_show(batch: int, frozen: bool) -> None:
    model, images = build(), torch.rand(batch, 3, 40, 24)
    model.encoder.requires_grad_(not frozen)
    features = model.encoder(images) if frozen else model.encode(images)
    assert [name for name in features if not own_bytes(features[name])] == []
    assert all(tensor.is_contiguous() for tensor in features.values())
    views = [ViewBatch(images), ViewBatch(images, rows="cls+sparse")]
    with torch.no_grad():
        for output in model.encoder(views):
            assert all(own_bytes(tensor) for tensor in output if tensor is not None)
    for edited in (drop_tokens(features, [0]), blend_tokens(features, features, 0.5)):
        assert [name for name in edited if not own_bytes(edited[name])] == []
        assert own_bytes(model.reconstruct(edited)["reconstruction"])
    codes = model.tokenizer.encode(images)
    assert own_bytes(codes) and own_bytes(model.tokenizer.decode(codes))


def test_in_training_nothing_is_copied() -> None:
    output = build().encoder(torch.rand(2, 3, 32, 32))
    assert output.sparse.untyped_storage().data_ptr() == output.dense.untyped_storage().data_ptr()
