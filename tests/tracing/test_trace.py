"""When two models may share a trace."""

import torch

from clafusion.tracing.trace import architecture


class _Plain(torch.nn.Module):
    def __init__(self, slope=1.0, mask=1.0, tied=False, function=torch.relu):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.slope, self.function = slope, function
        self.register_buffer("mask", torch.full((6,), mask))
        if tied:
            self.two.weight = self.one.weight


def test_an_architecture_is_all_that_an_export_can_depend_on():
    plain = architecture(_Plain())
    assert plain is not None
    other = _Plain()
    with torch.no_grad():
        other.one.weight.add_(1.0)
        other.norm.running_mean.add_(1.0)
    assert architecture(other) == plain
    for change in (
        {"slope": 2.0},
        {"slope": 1},
        {"mask": 0.0},
        {"tied": True},
        {"function": torch.tanh},
    ):
        assert architecture(_Plain(**change)) not in (plain, None)
    assert architecture(_Plain().train(False)) != plain
    assert architecture(_Plain().double()) != plain
    hooked = _Plain()
    hooked.one.register_forward_pre_hook(lambda *_: None)
    for opaque in (hooked, _Plain(slope=object()), _Plain(slope=torch.ones(1))):
        assert architecture(opaque) is None
