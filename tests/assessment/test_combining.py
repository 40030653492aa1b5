"""What the parents put out together, and how it is chosen."""

import pytest
import torch
from torch import nn

import clafusion
from clafusion import Assessment, Combination, FusionConfig, InputError, fuse
from clafusion.assessment.combining import MOST_CLASSES, by_divergence, chosen_combination
from tests.support import networks

X = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
PAIR = [networks.mlp(6, 20, 18, 5, seed=1), networks.mlp(6, 24, 5, seed=2)]


def chosen(models, weights=(0.5, 0.5), data=X, **options):
    traced = [clafusion.trace(one, data[:8]) for one in models]
    return chosen_combination(traced, weights, data, FusionConfig(**options))


def test_the_divergence_between_the_means_decides():
    first, second = (torch.tensor([[9.0, 8, 0]]), torch.tensor([[0.0, 8, 9]]))
    found = by_divergence([[first, second]], [0.5, 0.5])
    mixture = (first.softmax(-1) + second.softmax(-1)).double() / 2
    product = ((first + second) / 2).double().softmax(-1)
    apart = float((mixture * (mixture / product).log()).sum())
    assert apart > 0.1
    assert found.means == "probabilities"
    assert f"{apart:.2g} nats apart, more than 0.1" in found.reason
    alike = by_divergence([[first, first + 0.1], [second, second]], [0.5, 0.5])
    assert alike.means == "logits"
    assert "at most 0.1" in alike.reason


def test_networks_that_agree_combine_logits_and_sure_ones_that_do_not_probabilities():
    assert chosen(PAIR).means == "logits"
    scaled = [networks.confident(one, X) for one in PAIR]
    assert chosen(scaled).means == "probabilities"
    assert chosen(scaled, (1.0, 0.0)) == Combination(
        "logits", "one parent has all the weight", 0, -1
    )
    assert chosen(scaled, combine="logits") == Combination(
        "logits", "asked for", 0, -1, is_asked_for=True
    )
    soft = [nn.Sequential(*one, nn.Softmax(-1)) for one in scaled]
    assert chosen(soft).reason == chosen(scaled).reason
    result = fuse(scaled, X)
    assert result.combination == result.problem.combination
    assert result.to_dict()["combination"]["means"] == "probabilities"
    assert f"together     the parents put out {result.combination}" in clafusion.summary(result)


def test_networks_of_one_batch_size_see_whole_batches():
    """90 batches of 3, of which the 256th input is the first of one."""
    fixed = [nn.Sequential(*one, InThrees()) for one in PAIR]
    traced = [clafusion.trace(one, X[:3]) for one in fixed]
    assert traced[0].static_batch == 3
    found = chosen_combination(traced, (0.5, 0.5), [*X[:270].split(3)], FusionConfig())
    assert found.means == "logits"
    assert "on 258 rows" in found.reason


class InThrees(nn.Module):
    def forward(self, x):
        return x.reshape(3, -1)


def test_many_classes_are_not_refitted():
    wide = [networks.mlp(6, 4, MOST_CLASSES + 1, seed=i) for i in range(2)]
    found = chosen(wide)
    assert found.means == "logits"
    assert found.reason == f"of {MOST_CLASSES + 1} classes the last layer is not refitted"


@pytest.mark.parametrize("outputs", ["values", "auto"])
def test_outputs_that_are_no_classes_are_refused(outputs):
    models = PAIR if outputs == "values" else [networks.mlp(6, 9, 1, seed=i) for i in range(2)]
    given = {"assessment": Assessment(outputs)}
    message = r"combine='probabilities' needs outputs that are classes.*\(batch, [15]\)"
    with pytest.raises(InputError, match=message):
        fuse(models, X, combine="probabilities", **given)
    found = fuse(models, X, **given)
    assert found.combination == Combination(reason="the outputs are no classes")
    assert "the parents put out" not in clafusion.summary(found)


def test_an_unknown_word_is_refused():
    with pytest.raises(InputError, match="combine must be one of"):
        fuse(PAIR, X, combine="votes")


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_the_assessment_compares_with_that_mean(combine):
    result = fuse(PAIR, X, [0.3, 0.7], combine=combine, calibration="none")
    held = X[9::10]
    with torch.no_grad():
        first, second, fused = (one(held).double() for one in (*PAIR, result.model))
    if combine == "logits":
        mean = (0.3 * first + 0.7 * second).softmax(-1)
    else:
        mean = 0.3 * first.softmax(-1) + 0.7 * second.softmax(-1)
    wanted = (mean * (mean.log() - fused.log_softmax(-1))).sum(-1).mean()
    assert result.assessment.result.distance == pytest.approx(float(wanted), rel=1e-6)
