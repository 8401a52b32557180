import pytest
import torch

from stellar_fast.nn.prototype_head import PrototypeHead
from stellar_fast.ops import sinkhorn_knopp
from tests.conftest import mismatches
from tests.roundings import assert_alike


def test_golden_with_features_so_small_that_the_epsilon_shows(golden_ops):
    head = PrototypeHead(8, prototype_dim=8, num_clusters=12, num_layers=1)
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.eye(8))
        head.layers[0].bias.zero_()
        head.prototypes.weight.copy_(golden_ops["head_eps.prototypes"])
    assert mismatches({"logits": head(golden_ops["head_eps.x"])}, {"logits": golden_ops["head_eps.logits"]}) == []


def test_logits_are_fp32_and_the_product_runs_in_the_autocast_dtype():
    head = PrototypeHead(8, 16, 4, 32)
    seen = []
    head.prototypes.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(2, 3, 8))
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 3, 32)


def test_depth():
    assert len(PrototypeHead(8, num_layers=3, num_clusters=4).layers) == 3
    with pytest.raises(ValueError, match="predictor_layers must be at least 1 but is 0"):
        PrototypeHead(8, num_layers=0)


def test_targets_and_loss_are_those_of_whole_logits():
    torch.manual_seed(0)
    head = PrototypeHead(8, 16, 4, 32, temperature=0.2, sinkhorn={"temperature": 0.1, "iterations": 2, "scale": 0.5})
    tokens, index = torch.randn(2, 3, 8), torch.tensor([5, 0, 0, 2])
    predicted = torch.randn(1, 4, 8)
    with torch.no_grad():
        expected = sinkhorn_knopp(head(tokens).flatten(0, 1), temperature=0.1, iterations=2, scale=0.5)
    assigned = head.assign(head.features(tokens))
    assert_alike(assigned.targets.assignments(), expected)
    loss = head.cross_entropy(head.features(predicted), assigned.targets, index)
    log_probability = torch.log_softmax(head(predicted).flatten(0, 1) / 0.2, dim=1)
    assert_alike(loss, -(expected[index] * log_probability).sum(1).mean())
    assert not any(t.requires_grad for t in (assigned.targets.row, assigned.targets.column, assigned.entropy))
    entropy, used = assigned.metrics()
    assert_alike(entropy, torch.special.entr(expected).sum(1).mean())
    assert used == expected.argmax(1).unique().numel()


def test_both_losses_reach_every_weight():
    head = PrototypeHead(8, 16, 4, 32)
    features = head.features(torch.randn(2, 3, 8))
    head.cross_entropy(features, head.assign(features).targets).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_large_prototypes_have_exact_targets_and_finite_gradients(factor: float) -> None:
    torch.manual_seed(0)
    head = PrototypeHead(32, 64, 16, 128)
    head.prototypes.weight.data.mul_(factor)
    x = torch.randn(40, 32)
    features = head.features(x)
    exact = sinkhorn_knopp(features.detach().double() @ head.prototypes.weight.detach().double().T)
    targets = head.assign(features.detach()).targets
    # the product's own roundings, of 16 terms, are u sqrt(16) of a score, which is up to 5 factor / 0.06
    torch.testing.assert_close(
        targets.assignments().double(), exact, rtol=0, atol=4 * 2**-24 * 5 * factor / 0.06 + 1e-5
    )
    with torch.autocast("cpu", torch.float16):
        features = head.features(x)
        head.cross_entropy(features, head.assign(features.detach()).targets).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
