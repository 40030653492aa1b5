"""Options: how they are given, checked, named in errors, listed and added."""

from dataclasses import FrozenInstanceError, dataclass, fields, replace

import pytest
from torch import nn

from clafusion import (
    Alignment,
    Assignment,
    Auto,
    AutoCalibration,
    Barycentre,
    BatchNorm,
    Calibration,
    Deeper,
    Exact,
    FusionConfig,
    InputError,
    Iterative,
    LeastSquares,
    Like,
    ManyToOne,
    Matching,
    MergeMethod,
    Merging,
    NoCalibration,
    Orthogonal,
    Profiling,
    Repair,
    Shallower,
    Sinkhorn,
    Solver,
    Target,
    Unbalanced,
    Wider,
    Zip,
)
from clafusion.cli.options import configured
from clafusion.cli.settings import config_of
from clafusion.config import (
    ALIGNMENT_MODES,
    CHANNEL_COSTS,
    LAYER_COSTS,
    MERGES,
    Choices,
    MergeConfig,
    ReassemblyConfig,
    Settings,
    Strategy,
    choice,
    count,
    flag,
    nested,
    number,
    options_of,
    text,
)
from clafusion.one_origin.merge import merge
from clafusion.presets import PRESETS, preset_of
from clafusion.reassembly.reassemble import reassemble
from clafusion.stages import config_from

SOLVERS = (Auto, Assignment, Exact, Sinkhorn, Unbalanced, Zip, Orthogonal)
FAMILIES = {
    Solver: SOLVERS,
    Strategy: (ManyToOne, Iterative, Barycentre),
    Calibration: (AutoCalibration, NoCalibration, BatchNorm, Repair, LeastSquares),
    Target: (Deeper, Shallower, Wider, Like),
}


# --- giving ---------------------------------------------------------------------------------------


def test_a_string_or_the_value_inside_stands_for_a_value_with_its_defaults():
    for given, wanted in [
        ({"merging": Barycentre(max_rounds=2)}, {"merging": {"strategy": Barycentre(2)}}),
        ({"matching": Zip()}, {"matching": Matching(solver=Zip())}),
        ({"calibration": "least_squares"}, {"calibration": LeastSquares()}),
        ({"calibration": "none"}, {"calibration": NoCalibration()}),
        ({"target": "shallower"}, {"target": Shallower()}),
        ({"matching": "euclidean"}, {"matching": Matching(cost="euclidean")}),
        ({"alignment": "index"}, {"alignment": Alignment(cost="index")}),
        ({"merging": "barycentre"}, {"merging": Merging(strategy=Barycentre())}),
        ({"matching": {"solver": "zip"}}, {"matching": Matching(solver=Zip())}),
        ({"matching": Matching(solver="sinkhorn")}, {"matching": Matching(solver=Sinkhorn())}),
    ]:
        assert FusionConfig(**given) == FusionConfig(**wanted) != FusionConfig()
        assert config_from(None, given) == FusionConfig(**wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_is_known_by_its_name(family):
    assert list(family.variants().values()) == list(FAMILIES[family])
    for name, variant in family.variants().items():
        assert variant.name == name
        assert family.parse(name, "here") == variant()
        assert family.parse({"name": name}, "here") == variant()
        assert family.parse(variant(), "here") == variant()
        assert (variant.__doc__ or "").strip()


def test_a_mapping_gives_fields_and_the_variants_name():
    given = {
        "profiling": {"inputs": 50, "layer_values": "preactivation"},
        "alignment": {"mode": "chain"},
        "matching": {"solver": {"name": "sinkhorn", "epsilon": 0.2}, "importance": "norm"},
        "merging": {"strategy": {"name": "barycentre", "max_rounds": 4}},
        "calibration": {"name": "least_squares", "anchor": 0.5},
        "target": {"name": "shallower", "width": "wide", "merge": "sum"},
        "verify": False,
        "seed": 7,
    }
    assert FusionConfig.parse(given, "config") == FusionConfig(
        profiling=Profiling(inputs=50, layer_values="preactivation"),
        alignment=Alignment(mode="chain"),
        matching=Matching(solver=Sinkhorn(epsilon=0.2), importance="norm"),
        merging=Merging(strategy=Barycentre(max_rounds=4)),
        calibration=LeastSquares(anchor=0.5),
        target=Shallower(width="wide", merge="sum"),
        verify=False,
        seed=7,
    )
    assert FusionConfig.parse({}, "config") == FusionConfig()


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(),
        FusionConfig.paper(),
        FusionConfig.paper(match_outputs=False),
        *(FusionConfig(matching=Matching(solver=one())) for one in SOLVERS),
        *(FusionConfig(calibration=one()) for one in FAMILIES[Calibration]),
        *(FusionConfig(merging=Merging(strategy=one())) for one in FAMILIES[Strategy]),
        FusionConfig(calibration=LeastSquares(anchor=0.25, ridge=0.1, samples=30)),
        FusionConfig(matching=Matching(solver=Unbalanced(0.1, 0.5), cost="both")),
        FusionConfig(target=Shallower(width=1, merge="majority"), verify=False, seed=3),
        FusionConfig(target=Deeper(width="r32"), merging="iterative"),
    ],
    ids=lambda one: f"{one.matching.solver.name}-{one.calibration.name}-{one.target.name}",
)
def test_plain_data_is_read_again(config):
    plain = config.to_dict()
    assert FusionConfig.parse(plain, "config") == config
    assert FusionConfig(**plain) == config
    assert list(plain) == [one.name for one in fields(FusionConfig)]

    def check(value):
        assert type(value) in (dict, str, int, float, bool, type(None)), value
        if isinstance(value, dict):
            for one in value.values():
                check(one)

    check(plain)


def test_a_template_is_told_by_its_class():
    module = nn.Linear(2, 2)
    config = FusionConfig(target=Like(module))
    assert config.target.template is module
    assert config.to_dict()["target"] == {
        "name": "like",
        "template": "Linear",
        "own_places": False,
    }


def test_a_configuration_is_a_value():
    config = FusionConfig(calibration="none", seed=3)
    assert config == FusionConfig(seed=3, calibration=NoCalibration())
    assert hash(config) == hash(FusionConfig(seed=3, calibration=NoCalibration()))
    with pytest.raises(FrozenInstanceError):
        config.seed = 4
    assert replace(config, seed=4).calibration == NoCalibration()
    assert config_from(config, {"seed": 4}) == replace(config, seed=4)
    assert config_from(config, {}) == config


# --- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verify": 1}, "verify must be True or False; got 1"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807; got -1"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"calibration": "magic"}, "calibration must be one of 'auto', 'none', 'batchnorm', "),
        ({"calibration": 3}, "calibration must be one of .*, or settings of that kind; got 3"),
        ({"calibration": Exact()}, "calibration must be one of .* of that kind; got Exact"),
        (
            {"calibration": {"anchor": 1}},
            "calibration must say which by its name: 'least_squares'$",
        ),
        ({"calibration": {"name": 3}}, "calibration must be one of .*; got 3"),
        (
            {"calibration": {"name": "repair", "anchor": 1}},
            r"calibration has no option 'anchor' \(",
        ),
        (
            {"calibration": {"name": "least_squares", "ancor": 1}},
            "calibration has no option 'ancor'; did you mean 'anchor'",
        ),
        (
            {"calibration": {"name": "least_squares", "anchor": 1.5}},
            r"calibration\.anchor must be 'auto' or in \[0, 1\]; got 1.5",
        ),
        (
            {"calibration": {"name": "least_squares", "anchor": "much"}},
            r"calibration\.anchor must be 'auto' or in \[0, 1\]; got 'much'",
        ),
        (
            {"calibration": {"name": "least_squares", "samples": 0}},
            r"calibration\.samples must be a whole number of at least 1; got 0",
        ),
        (
            {"calibration": {"name": "least_squares", "ridge": 0.0}},
            r"calibration\.ridge must be a positive number; got 0.0",
        ),
        (
            {"matching": "zip"},
            r"matching\.cost .* got 'zip', which is a matching\.solver: write match",
        ),
        (
            {"merging": "sensitivity"},
            r"merging.* is a merging\.layer_weights: write merg",
        ),
        (
            {"target": nn.ReLU()},
            r"target must not be a module; got ReLU: write target=Like",
        ),
        (
            {"matching": 3},
            r"matching must be Matching\(\.\.\.\), a mapping .* or a string; got 3",
        ),
        ({"matching": {"cots": "both"}}, "matching has no option 'cots'; did you mean 'cost'"),
        ({"matching": {"cost": 1}}, r"matching\.cost must be one of 'correlation', .*; got 1"),
        ({"matching": "dual"}, r"matching\.cost must be one of 'correlation', .*; got 'dual'"),
        ({"matching": {"solver": {}}}, r"matching\.solver must say which by its name: 'auto', "),
        (
            {"matching": {"solver": {"name": "sinkhorn", "eps": 1}}},
            r"matching\.solver has no option 'eps'",
        ),
        (
            {"matching": {"solver": {"name": "sinkhorn", "epsilon": float("nan")}}},
            r"matching\.solver\.epsilon must be a positive number; got nan",
        ),
        (
            {"matching": {"solver": {"name": "unbalanced", "marginal_relaxation": -1}}},
            r"matching\.solver\.marginal_relaxation must be a positive number; got -1",
        ),
        (
            {"matching": {"solver": {"name": "zip", "budget": 1.1}}},
            r"matching\.solver\.budget must be in \[0, 1\]; got 1.1",
        ),
        ({"merging": {"strategy": 1}}, r"merging\.strategy must be one of 'many_to_one', 'iter"),
        (
            {"target": {"name": "deeper", "width": 1.5}},
            r"target\.width must be text or a .*; got 1.5",
        ),
        (
            {"target": {"name": "deeper", "width": True}},
            r"target\.width must be text or a .*; got True",
        ),
        ({"target": {"name": "shallower", "merge": "max"}}, r"target\.merge must be one of"),
        (
            {"target": {"name": "like", "template": 3}},
            r"target\.template must be text or a torch\.nn\.Module; got 3",
        ),
        ({"profiling": {"inputs": 1}}, r"profiling\.inputs must be a whole number of at least 2"),
        ({"alignment": {"mode": "free"}}, r"alignment\.mode must be one of 'layer', 'chain', 'ra"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(given, message):
    for make in (
        lambda: FusionConfig(**given),
        lambda: FusionConfig.parse(given, ""),
        lambda: config_from(None, given),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            make()
    with pytest.raises(InputError, match=rf"^config\.{message}"):
        FusionConfig.parse(given, "config")


def test_an_unknown_option_is_answered_by_the_nearest():
    for name, message in [
        ("calibratoin", "'calibratoin' is no option; did you mean 'calibration'?"),
        (
            "epsilon",
            "'epsilon' is no option of its own; it is matching.solver.epsilon. The",
        ),
        ("cost", "'cost' is no option of its own; it is alignment.cost."),
        ("zzz", "'zzz' is no option. The options are profiling, alignment, target, matching, "),
    ]:
        with pytest.raises(InputError) as caught:
            config_from(None, {name: 1})
        assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match=r"^config must be a FusionConfig; got dict"):
        config_from({"seed": 1}, {})
    with pytest.raises(InputError, match=r"^config has no option 'sed'; did you mean 'seed'\?"):
        FusionConfig.parse({"sed": 1}, "config")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: merge(None, [None], preset="fast"),
            "'preset' is no option. The options are method",
        ),
        (
            lambda: merge(None, [None], wieghts=[1]),
            "'wieghts' is no option; did you mean 'weights'?",
        ),
        (
            lambda: merge(None, [None], density=0.1),
            "'density' is no option of its own; it is method.",
        ),
        (lambda: merge(None, [None], config={}), "config must be a MergeConfig; got dict"),
        (lambda: reassemble([], None, blokcs=3), "'blokcs' is no option; did you mean 'blocks'?"),
        (
            lambda: reassemble([], None, progres=print),
            "'progres' is no option; did you mean 'progress",
        ),
        (
            lambda: MergeConfig.parse({"sede": 1}, ""),
            "'sede' is no option; did you mean 'seed'? (it ",
        ),
    ],
)
def test_merges_and_reassemblies_answer_unknown_options_as_fusions_do(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"matching": {"solver": "assignment", "importance": "norm"}},
            "matching.importance must be 'uniform' with solver 'assignment'",
        ),
        (
            {"matching": {"solver": "zip", "cost": "weights"}},
            "matching.solver 'zip' needs cost='correlation', for groups are made by correlation",
        ),
        (
            {"matching": {"solver": "zip", "importance": "norm"}},
            "matching.solver 'zip' needs importance='uniform', for it moves no masses",
        ),
        (
            {"matching": {"solver": "zip", "outputs": True}},
            "matching.solver 'zip' needs outputs=False, for outputs are not merged",
        ),
        (
            {"matching": {"solver": "zip"}, "merging": {"layer_weights": "sensitivity"}},
            "matching.solver='zip' needs merging.layer_weights='uniform', for each channel",
        ),
        (
            {"matching": {"solver": "zip"}, "merging": {"normalisation": "single"}},
            "matching.solver='zip' needs merging.normalisation='two'",
        ),
        (
            {"matching": {"solver": "zip"}, "calibration": "least_squares"},
            "matching.solver='zip' does not go with calibration='least_squares'",
        ),
        (
            {"matching": {"outputs": True}},
            "matching.outputs needs profiling.layer_values='preactivation'; got 'output'",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(InputError) as caught:
        FusionConfig(**given)
    assert str(caught.value).startswith(message)


# --- listing --------------------------------------------------------------------------------------


def test_all_options_are_listed_once_with_a_line_of_help():
    options = {one.path: one for one in options_of(FusionConfig)}
    assert len(options) == len(options_of(FusionConfig))
    assert list(options) == [
        "profiling.alignment_samples",
        "profiling.matching_rows",
        "profiling.layer_values",
        "profiling.inputs",
        "alignment.cost",
        "alignment.mode",
        "alignment.pin_ends",
        "target",
        "target.width",
        "target.merge",
        "target.factor",
        "target.template",
        "target.own_places",
        "matching.cost",
        "matching.solver",
        "matching.solver.epsilon",
        "matching.solver.marginal_relaxation",
        "matching.solver.budget",
        "matching.importance",
        "matching.outputs",
        "merging.strategy",
        "merging.strategy.max_rounds",
        "merging.layer_weights",
        "merging.normalisation",
        "calibration",
        "calibration.anchor",
        "calibration.toward",
        "calibration.ridge",
        "calibration.samples",
        "assessment.outputs",
        "assessment.axis",
        "assessment.held_out",
        "combine",
        "outputs",
        "shared",
        "verify",
        "seed",
    ]
    for one in options.values():
        assert one.help
        assert "\n" not in one.help
        assert one.flag == "--" + one.path.replace(".", "-").replace("_", "-")
        assert one.field == one.path.split(".")[-1]
        if one.kind == "choice":
            assert one.default in one.choices
            assert all(line and "\n" not in line for line in one.choices.values())


def test_an_option_of_some_variants_says_of_which():
    options = {one.path: one for one in options_of(FusionConfig)}
    for path, needs, of in [
        ("matching.solver.epsilon", "matching.solver", ("sinkhorn", "unbalanced")),
        ("matching.solver.budget", "matching.solver", ("zip",)),
        ("target.width", "target", ("deeper", "shallower")),
        ("target.merge", "target", ("shallower",)),
        ("calibration.anchor", "calibration", ("least_squares",)),
        ("merging.strategy.max_rounds", "merging.strategy", ("barycentre",)),
        ("matching.cost", "", ()),
        ("seed", "", ()),
    ]:
        assert (options[path].needs, options[path].of) == (needs, of)
    for path, default, kind, choices in [
        ("calibration", "auto", "choice", list(Calibration.variants())),
        ("matching.solver", "auto", "choice", list(Solver.variants())),
        ("alignment.cost", "cka", "choice", list(LAYER_COSTS)),
        ("alignment.mode", "layer", "choice", list(ALIGNMENT_MODES)),
        ("matching.cost", "correlation", "choice", list(CHANNEL_COSTS)),
        ("target.merge", "least_squares", "choice", list(MERGES)),
        ("calibration.anchor", "auto", "number", []),
        ("profiling.inputs", None, "count", []),
        ("verify", True, "flag", []),
        ("target.template", "", "text", []),
    ]:
        one = options[path]
        assert (one.default, one.kind, list(one.choices)) == (default, kind, choices)


def test_every_option_that_is_listed_can_be_set_by_its_path():
    """What the command line and manifests do: a value by its path, with the variant it is of."""
    others = {"flag": lambda one: not one.default, "count": lambda _: 17, "number": lambda _: 0.75}
    for option in options_of(FusionConfig):
        if option.path == "target.template":
            continue
        if option.kind == "choice":
            value = next(one for one in option.choices if one != option.default)
            value = "preactivation" if option.path == "profiling.layer_values" else value
        else:
            value = others.get(option.kind, lambda _: "r20")(option)
            value = 1.75 if option.path == "target.factor" else value
        given = {}
        inner = given
        *path, last = option.path.split(".")
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
        if option.needs:
            *above, family = option.needs.split(".")
            holder = given
            for name in above:
                holder = holder[name]
            holder[family] = {"name": option.of[-1], last: value}
        if option.path == "matching.outputs":
            given["profiling"] = {"layer_values": "preactivation"}
        if option.path == "shared":
            given["outputs"] = "both"
        made = FusionConfig(**given).to_dict()
        for name in path:
            made = made[name]
        found = made[last]["name"] if isinstance(made[last], dict) else made[last]
        assert found == value, option.path


# --- adding ---------------------------------------------------------------------------------------


COLOURS = Choices(red="like a rose", blue="like the sky")


@dataclass(frozen=True)
class Paint(Settings, family=True):
    """Which paint."""


@dataclass(frozen=True)
class Oil(Paint, name="oil"):
    """Paint that dries slowly."""

    hours: int = count(24, "how long it dries", most=100)


@dataclass(frozen=True)
class Water(Paint, name="water"):
    """Paint that dries fast."""

    share: float = number(0.5, "how much of it is water", high=1.0)


@dataclass(frozen=True)
class Wall(Settings):
    """A wall: each option is one field."""

    colour: str = choice("red", COLOURS, "what colour it gets")
    paint: Paint = nested(Paint, Oil(), "what paint it gets")  # noqa: RUF009
    dry: bool = flag(True, "whether it is dry")
    owner: str = text("nobody", "whose it is")


def test_an_option_is_one_field_and_a_variant_one_class():
    assert [(one.path, one.of) for one in options_of(Wall)] == [
        ("colour", ()),
        ("paint", ()),
        ("paint.hours", ("oil",)),
        ("paint.share", ("water",)),
        ("dry", ()),
        ("owner", ()),
    ]
    wall = Wall.parse({"colour": "blue", "paint": {"name": "water", "share": 0.25}}, "wall")
    assert wall == Wall("blue", Water(0.25))
    assert Wall.parse(wall.to_dict(), "wall") == wall
    for given, message in [
        ({"colour": "green"}, "wall.colour must be one of 'red', 'blue'; got 'green'"),
        (
            {"paint": {"name": "oil", "hours": 101}},
            "wall.paint.hours must be a whole number from 1",
        ),
        ({"paint": {"name": "oil", "share": 1}}, "wall.paint has no option 'share' (it has hours)"),
        ({"paint": "lime"}, "wall.paint must be one of 'oil', 'water'; got 'lime'"),
        ({"colr": "red"}, "wall has no option 'colr'; did you mean 'colour'?"),
    ]:
        with pytest.raises(InputError) as caught:
            Wall.parse(given, "wall")
        assert str(caught.value).startswith(message)
    before = dict(COLOURS)
    try:
        COLOURS.add("green", "like grass")
        assert Wall(colour="green").colour == "green"
        assert list(options_of(Wall)[0].choices) == ["red", "blue", "green"]
    finally:
        COLOURS._values = before


def test_a_variant_of_a_variant_is_of_the_same_family():
    @dataclass(frozen=True)
    class Acrylic(Water, name="acrylic"):
        """Water paint that holds."""

        gloss: float = number(0.1, "how much it shines")

    try:
        assert list(Paint.variants()) == ["oil", "water", "acrylic"]
        assert Wall(paint={"name": "acrylic", "gloss": 2.0}).paint == Acrylic(0.5, 2.0)
        of = {one.path: one.of for one in options_of(Wall)}
        assert of["paint.share"] == ("water", "acrylic")
        assert of["paint.gloss"] == ("acrylic",)
    finally:
        Paint._variants.pop("acrylic")
    assert list(Paint.variants()) == ["oil", "water"]


def test_a_preset_is_a_whole_configuration_that_other_fields_change():
    paper = config_from(None, {"preset": "paper", "seed": 3})
    assert paper == replace(FusionConfig.paper(), seed=3)
    fast = config_from(None, {"preset": "fast", "calibration": "none"})
    assert fast.calibration == NoCalibration()
    assert fast.profiling == preset_of("fast").profiling != FusionConfig().profiling
    assert [preset_of(name) != FusionConfig() for name in PRESETS] == [True] * 3
    with pytest.raises(InputError, match="preset must be one of 'fast', 'accurate', 'paper'"):
        config_from(None, {"preset": "best"})
    with pytest.raises(InputError, match="give one of them"):
        config_from(FusionConfig(), {"preset": "fast"})


def test_a_preset_on_the_command_line_and_in_a_file(tmp_path):
    typed = configured({"preset": "fast", "calibration": "none"})
    assert typed == config_from(None, {"preset": "fast", "calibration": "none"})
    assert config_of({"preset": "fast", "calibration": "none"}, "", tmp_path) == typed
    with pytest.raises(InputError, match="--preset must be one of fast, accurate, paper; got best"):
        configured({"preset": "best"})
    with pytest.raises(InputError, match=r"settings.preset must be one of"):
        config_of({"preset": "best"}, "settings", tmp_path)


def test_an_option_of_several_variants_has_the_default_of_each():
    options = {one.path: one for one in options_of(MergeConfig)}
    for path in ("method.scaling", "method.density", "method.elect"):
        one = options[path]
        own = {name: getattr(MergeMethod.variants()[name](), one.field) for name in one.of}
        if len(set(own.values())) > 1:
            assert one.defaults == own
        else:
            assert not one.defaults
            assert set(own.values()) == {one.default}
    assert options["method.scaling"].defaults["ties"] == 1.0
    assert not any(one.defaults for one in options_of(FusionConfig) if not one.of)


def test_a_nested_default_is_the_one_that_is_listed():
    of_reassembly = {one.path: one.default for one in options_of(ReassemblyConfig)}
    of_fusion = {one.path: one.default for one in options_of(FusionConfig)}
    assert of_reassembly["assessment.held_out"] == ReassemblyConfig().assessment.held_out == 0.3
    assert of_fusion["assessment.held_out"] == FusionConfig().assessment.held_out == 0.1
