import pytest
import torch

from stellar_fast.ops import prototype_cross_entropy
from tests.conftest import mismatches


def test_golden_head(golden_ops):
    loss = prototype_cross_entropy(
        golden_ops["head_eps.logits"].flatten(0, 1), golden_ops["head_eps.assignments"].flatten(0, 1)
    )
    assert mismatches({"loss": loss}, {"loss": golden_ops["head_eps.loss"]}) == []


def test_index_gathers_targets_and_row_sums_are_kept():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    targets = 2 * torch.rand(4, 9, generator=generator, dtype=torch.float64)
    index = torch.tensor([3, 0, 0, 2, 1, 3])
    loss = prototype_cross_entropy(logits.float(), targets.float(), index=index)
    log_p = (logits / 0.12) - torch.logsumexp(logits / 0.12, dim=1, keepdim=True)
    assert mismatches({"loss": loss}, {"loss": -(targets[index] * log_p).sum(1).mean()}) == []


def test_gradient_reaches_the_logits_alone():
    logits = torch.randn(3, 5, requires_grad=True)
    targets = torch.rand(3, 5, requires_grad=True)
    prototype_cross_entropy(logits, targets).backward()
    assert targets.grad is None
    softmax = (logits.detach() / 0.12).softmax(1)
    expected = (softmax * targets.detach().sum(1, keepdim=True) - targets.detach()) / 0.12 / 3
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 5), torch.zeros(4, 5)), "targets has R=4 but logits has R=3"),
        ((torch.zeros(3, 5), torch.zeros(3, 6)), "targets has C=6 but logits has C=5"),
        ((torch.zeros(3, 5).long(), torch.zeros(3, 5)), "logits must be floating point but is torch.int64"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(*arguments)
