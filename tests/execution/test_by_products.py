"""Inner values beside a model's answer, as the states of an encoder, do not bind channels."""

import pytest
import torch
from torch import nn

from clafusion import fuse, trace
from clafusion.execution.call import without_by_products
from tests.support.networks import orders_of, permuted

INPUTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """An encoder and what reads it, which put out what ``names`` say."""

    def __init__(self, *names):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 10), nn.Linear(10, 4)
        self.names = names

    def forward(self, x):
        states = self.encoder(x).relu()
        values = {"logits": self.head(states), "encoder_last_hidden_state": states}
        return {name: values[name] for name in self.names}


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_channels_that_an_encoder_shows_besides_are_free(calibration):
    model = Reader("logits", "encoder_last_hidden_state").eval()
    graph = trace(model, INPUTS)
    assert [shape for shape, _ in graph.outputs] == [(4,)]
    assert [one.size for one in graph.groups] == [10]
    copied = permuted(model, graph, orders_of(graph))
    assert not torch.equal(copied.encoder.weight, model.encoder.weight)
    fused = fuse([model, copied], INPUTS, calibration=calibration).model
    found, wanted = fused(INPUTS), model(INPUTS)
    assert list(found) == list(wanted)  # the network puts out what its class does
    assert torch.allclose(found["logits"], wanted["logits"], atol=1e-5)


def test_what_is_put_out_alone_is_the_answer():
    graph = trace(Reader("encoder_last_hidden_state").eval(), INPUTS)
    assert [shape for shape, _ in graph.outputs] == [(10,)]
    assert all(one.size != 10 for one in graph.groups)
    hidden = {"hidden_states": (torch.ones(2), torch.ones(2))}
    assert without_by_products(hidden) is hidden
    assert without_by_products({**hidden, "logits": INPUTS}) == {"logits": INPUTS}
    assert without_by_products(INPUTS) is INPUTS
