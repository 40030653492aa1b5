"""What must hold of networks that nobody wrote.

Each number stands for one network and one law that is tried on it. ``CLAFUSION_GENERATED=17``
makes the normal run try number 17 alone, or several: ``17,18``.
"""

import collections
import copy
import io
import os
import pprint
import random
import warnings

import pytest
import torch

from clafusion import ClafusionError, FusionWarning, fuse, trace
from tests.support import generated, networks
from tests.support.attention import shuffled

COUNT, NIGHTLY_COUNT, CHUNK = 200, 2000, 10
CALIBRATIONS = ["none", "repair", "least_squares"]
EXAMPLES = {"vectors": 90, "images": 20, "tokens": 40, "words": 60}
TOLERANCE = {"none": 1e-4, "repair": 1e-4, "least_squares": 1e-3}  # of the largest output


class RefusedError(Exception):
    """A refusal that is permitted; the message is its reason."""


def fused(models, data, weights=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusionWarning)
        return fuse(models, data, weights, **settings)


def same(found, expected, inputs, calibration, what):
    found, want = (networks.output(one, inputs) for one in (found, expected))
    bound = TOLERANCE[calibration] * float(want.abs().max())
    torch.testing.assert_close(
        found, want, rtol=0, atol=bound, msg=lambda text: f"{what} ({calibration}): {text}"
    )


def data_of(description):
    return generated.examples(description, EXAMPLES[description["inputs"]])


# --- the laws -----------------------------------------------------------------------------------


def the_ends_of_the_weight_are_the_parents(description, calibration, flip, longer=False):
    small = generated.shallower(description)
    data = data_of(description)
    other = generated.examples(description, 10, 1, longer) if longer else data
    models = [generated.build(description, 1), generated.build(small, 2)]
    if flip:
        models.reverse()
    for weights, parent in zip(([1.0, 0.0], [0.0, 1.0]), models, strict=True):
        try:
            model = fused(models, data, weights, calibration=calibration).model
        except ClafusionError as error:
            if small == description:
                raise
            raise RefusedError(f"{type(error).__name__}: {error}") from error
        same(model, parent, other, calibration, f"weights {weights}")


def a_permuted_copy_comes_back(description, calibration, flip):
    model, data = generated.build(description), data_of(description)
    graph = trace(model, data)
    if flip and graph.heads:
        copied = shuffled(model, graph)
    else:
        copied = networks.permuted(model, graph, networks.orders_of(graph))
    same(copied, model, data, "none", "the copy itself")
    models = [copied, model] if flip else [model, copied]
    same(fused(models, data, calibration=calibration).model, model, data, calibration, "fused")


def a_model_with_itself_is_itself(description, calibration, flip):
    model, data = generated.build(description), data_of(description)
    other = copy.deepcopy(model) if flip else model
    found = fused([model, other], data, calibration=calibration).model
    same(found, model, data, calibration, "fused")
    same(found, model, generated.examples(description, 20, 7), calibration, "on other inputs")


def two_copies_have_the_weight_of_both(description, calibration, flip):
    data = data_of(description)
    one, other = (generated.build(description, seed) for seed in (1, 2))
    three, shares = [one, other, copy.deepcopy(other)], [0.6, 0.3, 0.1]
    if flip:
        three, shares = three[1:] + three[:1], shares[1:] + shares[:1]
    pair = fused([one, other], data, [0.6, 0.4], calibration=calibration).model
    found = fused(three, data, shares, calibration=calibration).model
    same(found, pair, data, calibration, "three")


def a_file_has_all_of_it(description, calibration, flip):
    data = data_of(description)
    models = [generated.build(description, seed) for seed in (1, 2)]
    model = fused(models, data, [0.3, 0.7] if flip else None, calibration=calibration).model
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = generated.build(description, 3)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(networks.output(fresh, data), networks.output(model, data))


def longer_inputs_keep_the_parents(description, calibration, flip):
    the_ends_of_the_weight_are_the_parents(description, calibration, flip, longer=True)


LAWS = [
    the_ends_of_the_weight_are_the_parents,
    the_ends_of_the_weight_are_the_parents,
    a_permuted_copy_comes_back,
    a_permuted_copy_comes_back,
    a_model_with_itself_is_itself,
    two_copies_have_the_weight_of_both,
    a_file_has_all_of_it,
]


def trial(seed):
    """Return the description of a network, and the law that is tried on it."""
    description = generated.describe(seed)
    draw = random.Random(-seed - 1)
    laws = LAWS
    if generated.takes_longer(description):
        laws = [*LAWS, longer_inputs_keep_the_parents, longer_inputs_keep_the_parents]
    chosen, calibration, flip = draw.choice(laws), draw.choice(CALIBRATIONS), draw.random() < 0.5

    def law(given):
        chosen(given, calibration, flip)

    return description, law, f"{chosen.__name__}, {calibration}, flip={flip}"


def smallest(description, law, error):
    """Return the smallest description of which the law fails in the same way."""

    def fails(one):
        try:
            law(one)
        except RefusedError:
            return False
        except Exception as found:
            return type(found) is type(error)
        return False

    return generated.shrunk(description, fails)


def attempt(seed):
    """Try one number: return why the law could not be tried, or None."""
    description, law, name = trial(seed)
    try:
        law(description)
    except RefusedError as refusal:
        return str(refusal)
    except Exception as error:
        small = smallest(description, law, error)
        raise AssertionError(
            f"number {seed} ({name}): {type(error).__name__}: {error}\n"
            f"try it again by CLAFUSION_GENERATED={seed}\n"
            f"{pprint.pformat(description, sort_dicts=False)}\n"
            f"the smallest that fails alike:\n{pprint.pformat(small, sort_dicts=False)}"
        ) from error
    return None


def try_all(seeds):
    reasons = collections.Counter(attempt(one) for one in seeds)
    tried = reasons.pop(None, 0)
    print(f"numbers {seeds[0]} to {seeds[-1]}: {tried} hold, {reasons.total()} refused")
    for reason, count in reasons.most_common():
        print(f"  {count} refused: {reason}")


def chunks(start, end):
    return [
        pytest.param(list(range(i, i + CHUNK)), id=f"{i}-{i + CHUNK - 1}")
        for i in range(start, end, CHUNK)
    ]


def of_this_run():
    named = os.environ.get("CLAFUSION_GENERATED")
    return [[int(one) for one in named.split(",")]] if named else chunks(0, COUNT)


@pytest.mark.parametrize("seeds", of_this_run())
def test_generated_networks_keep_the_laws(seeds):
    try_all(seeds)


@pytest.mark.nightly
@pytest.mark.parametrize("seeds", chunks(COUNT, COUNT + NIGHTLY_COUNT))
def test_more_generated_networks_keep_the_laws(seeds):
    try_all(seeds)
