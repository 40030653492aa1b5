"""What must hold of networks that nobody wrote.

Each number stands for one network and one law that is tried on it. ``CLAFUSION_GENERATED=17``
makes the normal run try number 17 alone, or several: ``17,18``.
"""

import collections
import io
import os
import pprint
import random
import warnings

import pytest
import torch

from clafusion import ClafusionError, FusionConfig, FusionWarning, WidthWarning, trace
from clafusion.alignment.models import check_models
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.stages import profile_traced
from tests.support import generated, networks
from tests.support.attention import shuffled

COUNT, NIGHTLY_COUNT, CHUNK = 200, 2000, 10
CALIBRATIONS = ["none", "repair", "least_squares"]
EXAMPLES = {"vectors": 90, "images": 20, "tokens": 40, "words": 60}
TOLERANCE = {"none": 1e-4, "repair": 1e-4, "least_squares": 1e-3}  # of the largest output


class RefusedError(Exception):
    """A refusal that is permitted; the message is its reason."""


class Family:
    """The networks of one description, and of that without the blocks that may be dropped.

    Exporting a network takes longer than all the rest. Each structure is exported once, for traces
    are kept.
    """

    def __init__(self, description):
        self.description = description
        self.data = self.examples(EXAMPLES[description["inputs"]])
        self.structures = set()

    def examples(self, count, seed=0, longer=False):
        return generated.examples(self.description, count, seed, longer)

    def traced(self, seed=0, shallow=False):
        """Return the traced network whose weights have this number."""
        description = generated.shallower(self.description) if shallow else self.description
        self.structures.add(str(description))
        return trace(generated.build(description, seed), self.data)

    def align(self, graphs, calibration):
        config = FusionConfig(calibration=calibration)
        names = [f"models[{i}]" for i in range(len(graphs))]
        check_models(names, graphs, config)
        return align_profiles(names, profile_traced(graphs, self.data, config), config)

    def fuse(self, aligned, calibration, weights=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusionWarning)
            if len(self.structures) > 1:  # of two depths, of which one may lack some widths
                warnings.simplefilter("error", WidthWarning)
            config = FusionConfig(calibration=calibration)
            result = fuse_aligned(aligned, self.data, weights, config)
        sizes = [plan.shape for one in result.parents for plan in one.plans if plan is not None]
        if any(max(one) % min(one) for one in sizes):
            raise RefusedError("a width is no multiple of the other's: channels are divided")
        return result.model

    def fused(self, graphs, calibration, weights=None):
        return self.fuse(self.align(graphs, calibration), calibration, weights)


def same(found, expected, inputs, calibration, what):
    found, want = (networks.output(one, inputs) for one in (found, expected))
    bound = TOLERANCE[calibration] * float(want.abs().max())
    torch.testing.assert_close(
        found, want, rtol=0, atol=bound, msg=lambda text: f"{what} ({calibration}): {text}"
    )


# --- the laws -----------------------------------------------------------------------------------


def the_ends_of_the_weight_are_the_parents(family, calibration, flip, longer=False):
    graphs = [family.traced(1), family.traced(2, shallow=True)]
    if flip:
        graphs.reverse()
    inputs = family.examples(10, 1, longer) if longer else family.data
    for weights, parent in (([1.0, 0.0], graphs[0]), ([0.0, 1.0], graphs[1])):
        try:
            if parent is graphs[0]:
                aligned = family.align(graphs, calibration)
            model = family.fuse(aligned, calibration, weights)
        except (ClafusionError, WidthWarning) as error:
            if len(family.structures) == 1:
                raise
            raise RefusedError(f"{type(error).__name__}: {error}") from error
        same(model, parent.model, inputs, calibration, f"weights {weights}")


def longer_inputs_keep_the_parents(family, calibration, flip):
    the_ends_of_the_weight_are_the_parents(family, calibration, flip, longer=True)


def a_permuted_copy_comes_back(family, calibration, flip):
    graph = family.traced()
    model = graph.model
    if flip and graph.heads:
        copied = shuffled(model, graph)
    else:
        copied = networks.permuted(model, graph, networks.orders_of(graph))
    same(copied, model, family.data, "none", "the copy itself")
    graphs = [graph, trace(copied, family.data)]
    if flip:
        graphs.reverse()
    same(family.fused(graphs, calibration), model, family.data, calibration, "fused")


def a_model_with_itself_is_itself(family, calibration, flip):
    graph = family.traced()
    other = family.traced() if flip else graph
    found = family.fused([graph, other], calibration)
    same(found, graph.model, family.data, calibration, "fused")
    same(found, graph.model, family.examples(20, 7), calibration, "on other inputs")


def two_copies_have_the_weight_of_both(family, calibration, flip):
    one, other, again = (family.traced(seed) for seed in (1, 2, 2))
    three, shares = [one, other, again], [0.6, 0.3, 0.1]
    if flip:
        three, shares = [other, again, one], [0.3, 0.1, 0.6]
    pair = family.fused([one, other], calibration, [0.6, 0.4])
    found = family.fused(three, calibration, shares)
    same(found, pair, family.data, calibration, "three")


def a_file_has_all_of_it(family, calibration, flip):
    graphs = [family.traced(seed) for seed in (1, 2)]
    model = family.fused(graphs, calibration, [0.3, 0.7] if flip else None)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = family.traced(3).model
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    data = family.data
    assert torch.equal(networks.output(fresh, data), networks.output(model, data))


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
        chosen(Family(given), calibration, flip)

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
