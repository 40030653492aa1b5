"""Profiling: one streamed pass, fixed memory, the same rows for every model."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from clafusion import FusionConfig, InputError, Profiling, correspond, profile, trace
from clafusion.execution.walk import Walk
from clafusion.matching.activation_costs import activation_costs
from clafusion.profiling.profile import profile_models
from tests.support import networks
from tests.support.data import PROFILED

IMAGES = torch.randn(90, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def captured(model, module, inputs):
    seen = {}
    hook = module.register_forward_hook(lambda *call: seen.update(out=call[2]))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return seen["out"]


def test_a_gram_matrix_is_of_the_layers_true_output_over_the_first_samples():
    model = networks.resnet(1, 1)
    profiled = profile(model, IMAGES, profiling=Profiling(alignment_samples=40), assessment="none")
    block = captured(model, model.blocks[1], IMAGES[:40]).flatten(1).double()
    torch.testing.assert_close(profiled.grams[2], block @ block.T, rtol=1e-5, atol=1e-3)
    assert [tuple(one.shape) for one in profiled.grams] == [(40, 40)] * 4
    assert profiled.features[2] == block.size(1)
    assert (profiled.num_samples, profiled.num_inputs) == (40, 90)


def test_rows_are_values_of_the_activation_and_agree_however_the_data_is_batched():
    model = networks.vgg(1, 1, norm=False)
    whole = profile(model, IMAGES, profiling=Profiling(matching_rows=500))
    options = Profiling(matching_rows=500, alignment_samples=20)
    parts = profile(model, list(IMAGES.split(7)), profiling=options)
    assert whole.data_key == parts.data_key
    for place, rows in whole.rows.items():
        torch.testing.assert_close(rows, parts.rows[place], rtol=1e-4, atol=1e-5)
    # Layer 0 shows its pre-activations, at 500 of 90 * 16 * 16 places.
    values = captured(model, model[0], IMAGES).movedim(1, -1).reshape(-1, 8)
    rows = whole.rows[0, 0]
    assert rows.shape == (500, 8)
    found = torch.cdist(rows, values, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert found.values.max() < 1e-5
    assert found.indices.diff().min() > 0  # in order, none twice
    assert found.indices.max() > 60 * 256  # spread over all inputs


def test_rows_of_two_models_belong_to_the_same_inputs_and_positions():
    model = networks.vgg(1, 1)
    sizes = {**PROFILED, "matching_rows": 300}
    one, other = profile_models([trace(model, IMAGES)] * 2, IMAGES, **sizes)
    for place in one.rows:
        assert torch.equal(one.rows[place], other.rows[place])


def test_memory_does_not_grow_with_the_data():
    model = networks.vgg(1, 1)
    sizes = []
    for repeats in (6, 12):
        options = Profiling(alignment_samples=50, matching_rows=400)
        profiled = profile(model, [IMAGES] * repeats, profiling=options)
        kept = [*profiled.grams, *profiled.rows.values()]
        sizes.append(sum(one.untyped_storage().nbytes() for one in kept))
    assert sizes[0] == sizes[1]


def test_labels_are_ignored_and_progress_is_told():
    model = networks.vgg(1, 1)
    told = []
    profiled = profile(
        model,
        [(IMAGES[:50], torch.zeros(50)), (IMAGES[50:], torch.zeros(40))],
        profiling=Profiling(alignment_samples=30),
        assessment="none",
        progress=lambda stage, done: told.append((stage, done)),
    )
    assert profiled.num_inputs == 90
    assert told == [("profile", 50), ("profile", 90)]


def test_profiles_of_different_inputs_are_not_compared():
    from clafusion.alignment.dynamic_program import align_layers

    model = networks.vgg(1, 1)
    graph = trace(model, IMAGES)
    one, other = profile(graph, IMAGES), profile(graph, IMAGES.flip(0))
    found = correspond(graph, graph, align_layers(1 - np.eye(3)).deep_to_shallow)
    with pytest.raises(InputError, match="different inputs"):
        activation_costs(found, one, other)


@pytest.mark.parametrize("name", ["alignment_samples", "matching_rows"])
def test_sizes_must_be_positive(name):
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 2; got 0"):
        Profiling(**{name: 0})
    message = rf"profiling\.{name} must be a whole number of at least 2; got 0"
    with pytest.raises(InputError, match=message):
        FusionConfig(profiling={name: 0})
    with pytest.raises(InputError, match=message):
        profile(networks.vgg(1, 1), IMAGES, profiling={name: 0})
    with pytest.raises(InputError, match=f"{name} must be at least 2; got 0"):
        profile_models([trace(networks.vgg(1, 1), IMAGES)], IMAGES, **{**PROFILED, name: 0})


def test_a_model_that_fixes_its_batch_is_refused_for_other_batches():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.two(self.one(x).relu().reshape(3, 6))

    with pytest.raises(InputError, match="admits only batches of 3"):
        profile(Fixed(), torch.randn(10, 4))


def test_the_gram_matrix_of_wide_outputs_is_made_in_parts(monkeypatch):
    from clafusion.profiling import gram

    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(30, 3 * 4096 + 100, generator=generator)
    expected = gram.gram_matrix(flat)
    monkeypatch.setattr(gram, "_WIDE", 30 * 4096)
    monkeypatch.setattr(gram, "gram_matrix", None)
    assert torch.equal(gram.gram_of_parts(flat.split(7)), expected)


def test_nothing_of_a_node_is_held_when_the_next_one_is_computed(monkeypatch):
    layers = [one for _ in range(3) for one in (nn.Linear(8, 8), nn.ReLU())]
    model = trace(nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(4, 8))
    last = {}  # of each walk the value that it returned
    reach = Walk.reach

    def watched(self, name):
        value = reach(self, name)
        before = last.get(self)
        if name.startswith("relu") and before is not None:  # no other node reads what it reads
            assert before() is None, name
        last[self] = weakref.ref(value)
        return value

    monkeypatch.setattr(Walk, "reach", watched)
    inputs = torch.randn(30, 8)
    profile_models([model], inputs, alignment_samples=20, matching_rows=50, moments=True)
    assert last
