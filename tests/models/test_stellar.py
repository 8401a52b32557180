"""StellarModel: views, flags, randomness, the teacher, reconstruction, and errors."""

import warnings

import pytest
import torch

from stellar_fast import DecoderConfig, EncoderConfig, StellarEncoder, StellarModel, VQGANConfig
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS, mismatches
from tests.roundings import assert_alike


def build(**changes) -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(SMALL_ENCODER, SMALL_DECODER, **{"color_augmentation": False, **SMALL_KWARGS, **changes})


def losses(model, batch, **kwargs):
    total, parts = model.loss(model(batch, **kwargs)["predictions"])
    return total, parts


def test_total_is_the_weighted_sum_of_its_parts(small_model, small_batch):
    total, parts = losses(small_model, small_batch)
    assert set(parts) == {"MSE", "clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss", "koleo_loss"}
    expected = 10 * parts["MSE"] + sum(value for name, value in parts.items() if name != "MSE")
    assert_alike(total, expected)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"do_recon": False}, {"clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss", "koleo_loss"}),
        ({"do_koleo": False}, {"MSE", "clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss"}),
        ({"do_cls": False}, {"MSE", "clustering_loss", "mask_loss", "koleo_loss"}),
        ({"do_masking": False}, {"MSE", "clustering_loss", "cls_clustering_loss", "cls_loss", "koleo_loss"}),
        (
            {"do_masking": False, "do_cropping": False},
            {"MSE", "clustering_loss", "cls_clustering_loss", "koleo_loss"},
        ),
        ({"do_masking": False, "do_cls": False, "do_clustering": False}, {"MSE", "koleo_loss"}),
    ],
)
def test_flags_choose_the_losses(small_batch, flags, names):
    total, parts = losses(build(**flags), small_batch)
    assert set(parts) == names
    assert total.isfinite()
    total.backward()


def test_generator_makes_the_step_reproducible(small_batch):
    model = build(color_augmentation=True)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        predictions = model(small_batch, generator=generator)["predictions"]
        return predictions["keep_indices"], model.loss(predictions).total

    (masks, total), (same_masks, same_total), (_, other_total) = run(1), run(1), run(2)
    assert torch.equal(masks, same_masks)
    assert torch.equal(total, same_total)
    assert not torch.equal(total, other_total)


def test_colour_never_touches_the_clean_image_or_the_target(small_batch):
    model = build(color_augmentation=True)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.extend(view.images for view in inputs[0]))
    predictions = model(small_batch, generator=torch.Generator().manual_seed(0))["predictions"]
    clean = small_batch["global_views"][:, 0]
    assert_alike(predictions["x_original"], clean)
    assert torch.equal(seen[0], clean)
    masked = seen[1].unflatten(0, (2, 2))
    assert (masked[:, 0] - clean).abs().max() > 0.01, "masked view 0 is jittered like the others"


def test_uint8_views_are_the_same_images(small_model, small_batch):
    pixels = {name: (views * 255).round().to(torch.uint8) for name, views in small_batch.items()}
    floats = {name: views.float() / 255 for name, views in pixels.items()}
    keep = torch.arange(8).expand(4, -1)
    assert_alike(losses(small_model, pixels, keep_indices=keep), losses(small_model, floats, keep_indices=keep))


def test_views_beyond_those_asked_for_are_ignored(small_model, small_batch):
    keep = torch.arange(8).expand(4, -1)
    more = {name: torch.cat((views, views.flip(1)), dim=1) for name, views in small_batch.items()}
    assert_alike(losses(small_model, more, keep_indices=keep), losses(small_model, small_batch, keep_indices=keep))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_views": torch.rand(2, 1, 3, 32, 32)}, "global_views has 1 views but the model needs 2"),
        ({"local_views": torch.rand(2, 1, 3, 16, 16)}, "local_views has 1 views but num_local_crops is 2"),
        ({"local_views": torch.rand(1, 2, 3, 16, 16)}, r"local_views must be \(2, L, 3, h, w\)"),
        ({"global_views": torch.rand(0, 2, 3, 32, 32), "local_views": torch.rand(0, 2, 3, 16, 16)}, "has 0 images"),
        ({"global_views": torch.rand(2, 3, 32, 32)}, r"global_views must be \(B, V, 3, H, W\)"),
        ({"global_views": 2 + torch.rand(2, 2, 3, 32, 32)}, r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_views_are_named(small_model, small_batch, change, message):
    with pytest.raises(ValueError, match=message):
        small_model({**small_batch, **change})


def test_missing_views_and_modes_are_named(small_model, small_batch):
    with pytest.raises(ValueError, match="the batch has no 'local_views', only 'global_views'"):
        small_model({"global_views": small_batch["global_views"]})
    with pytest.raises(ValueError, match="mode must be 'train' or 'eval' but is 'test'"):
        small_model(small_batch, mode="test")


@pytest.mark.parametrize("shape", [(3, 8), (4, 17)])
def test_keep_indices_must_fit(small_model, small_batch, shape):
    with pytest.raises(ValueError, match=rf"keep_indices .* \({shape[0]}, {shape[1]}\)"):
        small_model(small_batch, keep_indices=torch.zeros(shape, dtype=torch.int64))


def test_keep_indices_outside_the_image_are_named(small_model, small_batch):
    with pytest.raises(ValueError, match=r"keep_indices span \[16, 16\] but the image has 16 patches"):
        small_model(small_batch, keep_indices=torch.full((4, 8), 16))
    with pytest.raises(ValueError, match=r"keep_indices must be torch.int64 but is torch.int32"):
        small_model(small_batch, keep_indices=torch.zeros(4, 8, dtype=torch.int32))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_global_align": True},
        {"teacher_momentum_final": 1.0},
        {"teacher_momentum_schedule_steps": 100},
        {"do_clustering": False},
    ],
)
def test_undefined_combinations_are_refused_by_name(arguments):
    with pytest.raises(NotImplementedError, match=next(iter(arguments))):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focal_mode": "ring"}, "focal_mode must be one of .* but is 'ring'"),
        ({"masking_ratio": 1.0}, r"masking_ratio must be in \[0, 1\) but is 1.0"),
        ({"sk_temp": 0.0}, "sk_temp must be positive but is 0.0"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum must be in \[0, 1\] but is 1.5"),
        ({"num_clusters": 0}, "num_clusters must be at least 1 but is 0"),
        ({"focal_probability": 7.0}, r"focal_probability must be in \[0, 1\] but is 7.0"),
        ({"koleo_min_distance": -1.0}, "koleo_min_distance must be at least 0 but is -1.0"),
        ({"num_sparse_tokens": 1}, "do_koleo spreads tokens apart and needs 2 of them"),
        ({"do_recon": False, "vq_model": "somewhere"}, "vq_model 'somewhere' has no use with do_recon=False"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_a_given_encoder_rules():
    encoder = StellarEncoder(SMALL_ENCODER, num_sparse_tokens=6, spatial_temp=None)
    model = StellarModel(encoder, SMALL_DECODER)
    assert model.encoder is encoder
    assert model.config["num_sparse_tokens"] == 6
    assert model.config["spatial_temp"] is None
    with pytest.raises(ValueError, match="the encoder has 6 sparse tokens but num_sparse_tokens is 4"):
        StellarModel(encoder, num_sparse_tokens=4)
    with pytest.raises(ValueError, match=r"the encoder has spatial_temp None but 0\.1 is asked for"):
        StellarModel(encoder, spatial_temp=0.1)


def test_defaults_are_upstreams():
    with torch.device("meta"):
        model = StellarModel("b16")
    sizes = (
        "num_sparse_tokens",
        "num_clusters",
        "prototype_dim",
        "predictor_hidden_dim",
        "num_masks",
        "num_local_crops",
    )
    assert [model.config[name] for name in sizes] == [16, 16384, 256, 2048, 8, 8]
    assert model.config["decoder"]["num_hidden_layers"] == 6
    assert (model.masking_ratio, model.config["logits_temp"], model.teacher_momentum) == (0.75, 0.12, 0.996)
    assert model.encoder.spatial_temp == 0.06
    assert model.local_size == 96


def test_teacher_follows_only_when_told(small_batch):
    model = build(momentum_teacher=True, teacher_momentum=0.9)
    with torch.no_grad():
        model.encoder.sparse_tokens.add_(1)
    before = model.teacher.encoder.sparse_tokens.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(model, small_batch)
        assert torch.equal(model.teacher.encoder.sparse_tokens, before)
        model.update_teacher()
        losses(model, small_batch)
    assert_alike(model.teacher.encoder.sparse_tokens, before + 0.1)
    with pytest.warns(UserWarning, match="the teacher was not updated since the last step"):
        losses(model, small_batch)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_token_k_learns_from_token_k_without_matching(small_batch):
    model = build(hungarian_match=False)
    index = model(small_batch)["predictions"]["match_index_masked"]
    assert torch.equal(index, torch.arange(4).expand(4, -1))


def test_reconstruct_takes_features_or_tokens(small_model):
    features = small_model.encode(torch.rand(2, 3, 40, 24))
    image = small_model.reconstruct(features)["reconstruction"]
    assert image.shape == (2, 3, 40, 24)
    assert 0 <= image.min() <= image.max() <= 1
    again = small_model.reconstruct(features["sparse"], features["spatial"], grid=(5, 3))
    assert_alike(again["reconstruction"], image)
    plain = {name: features[name] for name in ("sparse", "spatial")}
    with pytest.raises(ValueError, match=r"15 patches but the grid is 3x3: pass grid="):
        small_model.reconstruct(plain)
    with pytest.raises(ValueError, match=r"needs the features of encode, or sparse and spatial"):
        small_model.reconstruct(features["sparse"])


def test_reconstruct_of_codes_is_at_the_vqgans_resolution():
    vqgan = VQGANConfig((1, 1, 1, 1, 1), 5, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)
    model = StellarModel(
        EncoderConfig(48, 1, 3, 96, image_size=28, patch_size=14), SMALL_DECODER, vq_model=vqgan, **SMALL_KWARGS
    )
    assert model.reconstruct(model.encode(torch.rand(1, 3, 28, 42)))["reconstruction"].shape == (1, 3, 32, 48)
    assert not any(p.requires_grad for p in model.tokenizer.parameters())


def test_config_rebuilds_the_model(small_batch):
    model = build(sk_scale=0.7, focal_mode="block", num_decoder_layers=2)
    again = StellarModel.from_config(model.config)
    assert again.config == model.config
    assert len(again.decoder.transformer.blocks) == 2
    again.load_state_dict(model.state_dict())
    keep = torch.arange(8).expand(4, -1)
    predictions = [m(small_batch, keep_indices=keep)["predictions"] for m in (model, again)]
    names = ("mask_loss", "clustering_loss", "MSE")
    assert mismatches({n: predictions[0][n] for n in names}, {n: predictions[1][n] for n in names}) == []
    with pytest.raises(ValueError, match="the model config does not fit: unknown num_cluster; it has encoder, decoder"):
        StellarModel.from_config({**model.config, "num_cluster": 3})


def test_edited_tokens_take_the_place_of_the_features(small_model):
    features = small_model.encode(torch.rand(1, 3, 32, 32))
    edited = features["sparse"].flip(1)
    image = small_model.reconstruct(features, sparse=edited)["reconstruction"]
    assert torch.equal(image, small_model.reconstruct(edited, features["spatial"])["reconstruction"])
    assert not torch.equal(image, small_model.reconstruct(features)["reconstruction"])
    with pytest.raises(ValueError, match="sparse has width 47 but the model has 48"):
        small_model.reconstruct(features["sparse"][..., 1:], features["spatial"])


@pytest.mark.parametrize("views", ["global_views", "local_views"])
def test_jitter_does_not_hide_views_out_of_range(small_batch, views):
    wrong = small_batch[views].clone()
    wrong[:, 1] *= 255
    with pytest.raises(ValueError, match=rf"{views} must lie in \[0, 1\] but span"):
        build(color_augmentation=True)({**small_batch, views: wrong})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_works_throughout(small_model, small_batch, dtype):
    keep = torch.arange(8).expand(4, -1)
    _, exact = losses(small_model, small_batch, keep_indices=keep)
    total, parts = losses(small_model.to(dtype), small_batch, keep_indices=keep)
    total.backward()
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    for name, value in parts.items():
        torch.testing.assert_close(value.float(), exact[name], rtol=tolerance, atol=tolerance)
    features = small_model.encode(torch.rand(1, 3, 40, 24))
    assert small_model.reconstruct(features)["reconstruction"].isfinite().all()


def test_compiled_with_a_generator(small_batch):
    torch._dynamo.reset()
    model = build(color_augmentation=True)
    step = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        totals = [
            model.loss(f(small_batch, generator=torch.Generator().manual_seed(0))["predictions"]).total
            for f in (model, step)
        ]
    assert_alike(*totals)


def test_no_part_of_a_model_without_reconstruction_is_left_without_gradient(small_batch):
    model = build(do_recon=False)
    losses(model, small_batch)[0].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_bf16_autocast_step_is_close_and_losses_stay_fp32(small_model, small_batch):
    keep = torch.arange(8).expand(4, -1)
    _, exact = losses(small_model, small_batch, keep_indices=keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = losses(small_model, small_batch, keep_indices=keep)
    total.backward()
    assert all(value.dtype == torch.float32 for value in parts.values())
    for name, value in parts.items():
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small_model.parameters())


def test_a_remainder_of_pixels_is_left_out_of_the_target():
    model = StellarModel(SMALL_ENCODER, DecoderConfig(32, 1, 2, 64), **SMALL_KWARGS)
    views = torch.rand(1, 2, 3, 35, 33)
    predictions = model({"global_views": views, "local_views": torch.rand(1, 2, 3, 19, 17)})["predictions"]
    assert_alike(predictions["x_original"], views[:, 0, :, :32, :32])
    assert predictions["x_hat"].shape == (1, 3, 32, 32)
