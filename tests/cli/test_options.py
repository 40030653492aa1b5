"""Every option of the configuration on the command line: its flag, its value, its refusals."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

import clafusion
from clafusion import (
    AssessmentWarning,
    ConvergenceWarning,
    FusionConfig,
    FusionWarning,
    InputError,
    MergeConfig,
)
from clafusion.cli.align import STAGES
from clafusion.cli.app import main, make_app
from clafusion.cli.options import (
    changed,
    configured,
    messages_by_flags,
    setting_at,
    warnings_by_entries,
)
from clafusion.config import Calibration, LeastSquares, Settings, count, number, options_of
from clafusion.errors import warn

OPTIONS = {one.path: one for one in options_of(FusionConfig)}
FUSE = ["fuse", "a.pt", "b.pt", "--arch=m:n", "--data=data.npy", "--out=out.pt"]


def parameters(command):
    """Return the flags of a command's parameters, in order."""
    found = typer.main.get_command(make_app()).commands[command].params
    return [flag for one in found for flag in (*one.opts, *one.secondary_opts)]


@pytest.fixture
def typed(monkeypatch):
    """Return a function that types options after ``clafusion fuse`` and returns the settings."""

    def config(*options):
        found = []

        def stop(*given):
            found.append(configured(*given))
            raise InputError("stop here")

        monkeypatch.setattr("clafusion.cli.fuse.configured", stop)
        assert main([*FUSE, *options]) == 2
        return found[0] if found else None

    return config


def needed(option):
    """Return the options without which this one does not count."""
    found = []
    while option.needs:
        found.append(f"{OPTIONS[option.needs].flag}={option.of[0]}")
        option = OPTIONS[option.needs]
    return found[::-1]


def value_at(config, path):
    """Return an option's value; of a variant its name."""
    found = setting_at(config, path)
    return found.name if isinstance(found, Settings) else found


def other_values(option):
    if option.choices:
        return [one for one in option.choices if one != option.default]
    if option.field == "shared":
        return [0.25, "layer2"]
    number = 1.75 if option.field == "factor" else 0.25
    return {"number": [number], "count": [7], "flag": [not option.default], "text": ["narrow"]}[
        option.kind
    ]


CASES = [
    (path, value)
    for path, one in OPTIONS.items()
    for value in (["torch.nn:Identity"] if path == "target.template" else other_values(one))
]


GIVEN_ALONG = (
    ("matching.outputs", "profiling.layer_values"),
    ("target.own_places", "target.template"),
    ("shared", "outputs"),
)


@pytest.mark.parametrize(("path", "value"), CASES)
def test_every_option_reaches_the_settings(typed, path, value):
    option = OPTIONS[path]
    more = [f"{option.flag}={value}"]
    if option.kind == "flag":
        more = [option.flag if value else f"--no-{option.flag[2:]}"]
    if path == "matching.outputs":
        more.append("--profiling-layer-values=preactivation")
    if path == "shared":
        more.append("--outputs=both")
    if path == "target.own_places" or (path == "target" and value == "like"):
        more.append("--target-template=torch.nn:Identity")
    config = typed(*needed(option), *more)
    if path == "target.template":
        assert isinstance(config.target.template, torch.nn.Identity)
    else:
        assert (value_at(config, path), type(value_at(config, path))) == (value, type(value))
    base = FusionConfig(target="like") if option.of == ("like",) else typed(*needed(option))
    for other in OPTIONS:
        touched = f"{other}.".startswith(f"{path}.")
        if not touched and (path, other) not in GIVEN_ALONG:
            assert value_at(config, other) == value_at(base, other)


def test_nothing_typed_gives_the_defaults(typed):
    assert typed() == FusionConfig()


def test_each_command_has_its_options_once():
    for command in ("fuse", "align", "inspect", "demo"):
        flags = parameters(command)
        assert len(flags) == len(set(flags))
        stages = {"fuse": [path.partition(".")[0] for path in OPTIONS], "demo": ["seed"]}
        stages["align"] = STAGES
        stages["inspect"] = ["verify", "seed"]
        for path, option in OPTIONS.items():
            assert (option.flag in flags) == (path.partition(".")[0] in stages[command])


def test_the_help_has_every_choice_default_and_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["fuse", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS.values():
        line = option.help[0].upper() + option.help[1:]
        assert line in shown
        if option.choices:
            assert f"{option.flag} [{'|'.join(option.choices)}]" in shown
            assert f"[default: {option.default}]" in shown
    assert "For --matching-solver sinkhorn or unbalanced. [default: 0.05]" in shown
    assert "Calibration: how what is lost is restored:" in shown


def test_a_variant_from_elsewhere_has_its_options(typed, capsys, monkeypatch):
    monkeypatch.setattr(Calibration, "_variants", dict(Calibration._variants))

    @dataclass(frozen=True)
    class Doubled(Calibration, name="doubled"):
        """Double everything."""

        factor: float = number(2.0, "how much more")
        samples: int = count(10, "how many inputs are doubled")

    config = typed("--calibration=doubled", "--calibration-factor=3", "--calibration-samples=4")
    assert config.calibration == Doubled(3.0, 4)
    assert typed("--calibration-factor=3").calibration == Doubled(3.0)
    assert typed("--calibration-samples=4") is None
    told = "--calibration-samples is for --calibration least_squares or doubled; this is auto: add"
    assert told in capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "200")
    main(["fuse", "--help"])
    shown = capsys.readouterr().out
    assert "[auto|none|batchnorm|repair|least_squares|doubled]" in shown
    assert "How much more. For --calibration doubled. [default: 2.0]" in shown


def test_options_come_before_the_file(typed, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("calibration: {name: least_squares, anchor: 5e-1, ridge: 1e-2}\nseed: 3\n")
    config = typed(f"--config={path}", "--calibration-anchor=auto", "--matching-solver=exact")
    assert config.calibration == LeastSquares(anchor="auto", ridge=0.01)
    assert (config.seed, config.matching.solver.name) == (3, "exact")
    assert typed(f"--config={path}", "--calibration=least_squares") == typed(f"--config={path}")
    config = typed(f"--config={path}", "--calibration=repair", "--seed=0")
    assert config == FusionConfig(
        calibration="repair"
    )  # of another variant, what the first one has is not kept
    path.write_text("calibration: {name: least_squares, anchor: 2}\n")
    capsys.readouterr()
    assert typed(f"--config={path}") is None
    told = capsys.readouterr().err
    assert told == (
        f"clafusion: --config '{path}': calibration.anchor must be 'auto' or in [0, 1]; got 2\n"
    )


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("calibration.anchor must be 'auto'", "--calibration-anchor must be 'auto'"),
        ("matching.cost must be one of", "--matching-cost must be one of"),
        ("seed must be a whole number", "--seed must be a whole number"),
        ("only in alignment.mode='layer'", "only in --alignment-mode layer"),
        (
            "matching.solver 'zip' needs cost='both'",
            "--matching-solver zip needs --matching-cost both",
        ),
        ("use solver='auto'", "use --matching-solver auto"),
        ("alignment needs cost='cka'", "alignment needs --alignment-cost cka"),
        ("give cost='cka'", "give cost='cka'"),
        ("models['a'] has no layer", "model 'a' has no layer"),
        ("give target=Like(module), a", "give --target like --target-template MODULE:FACTORY, a"),
        ("use merging='many_to_one'", "use --merging-strategy many_to_one"),
        ('take calibration="repair"', "take --calibration repair"),
        ("a wider target (width='wide')", "a wider target (--target-width wide)"),
        ("raise merging.strategy.max_rounds,", "raise --merging-strategy-max-rounds,"),
        ("or training (clafusion.distill)", "or training (in Python: clafusion.distill)"),
        ("Give example_inputs as long as", "Give --data with inputs as long as"),
        ("a key (key=..., --checkpoint-key) chooses", "a key (--checkpoint-key) chooses"),
        (
            "1.0e-06; raise epsilon, tolerance or max_iterations",
            "1.0e-06; raise --matching-solver-epsilon",
        ),
        ("the seed of 'repair' is the target", "the seed of 'repair' is the target"),
        ("inputs must be a tensor", "inputs must be a tensor"),
    ],
)
def test_messages_call_options_as_they_are_typed(message, shown):
    with pytest.raises(InputError) as caught, messages_by_flags():
        raise InputError(message)
    assert str(caught.value) == shown
    with pytest.warns(ConvergenceWarning) as given, messages_by_flags():
        warn(message, ConvergenceWarning)
    assert [str(one.message) for one in given] == [shown]
    with pytest.warns(FutureWarning) as given, messages_by_flags():
        warn(message, FutureWarning)  # another library's
    assert [str(one.message) for one in given] == [message]


def test_warnings_of_many_pairs_call_options_as_a_manifest_does():
    with pytest.warns(AssessmentWarning) as given, warnings_by_entries():
        warn("Try calibration='least_squares' or width='wide'", AssessmentWarning)
    told = "Try settings.calibration: least_squares or settings.target.width: wide"
    assert [str(one.message) for one in given] == [told]


def texts_of_warnings():
    """Yield every text in a function that gives a warning, with where it stands."""
    for path in sorted(Path(clafusion.__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name == "warn":
                continue
            calls = [one.func for one in ast.walk(function) if isinstance(one, ast.Call)]
            if not any(isinstance(one, ast.Name) and one.id == "warn" for one in calls):
                continue
            for one in function.body[ast.get_docstring(function) is not None :]:
                for part in ast.walk(one):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.name}: {function.name}", part.value


ONLY_PYTHON = re.compile(
    r"(?<!in Python: )\bclafusion\.\w+|example_inputs|\w=['\"\w.(\[]|\w\((?!s\))\w*\)"
    rf"|\b({'|'.join({one.field for one in options_of(FusionConfig) if '_' in one.field})})\b"
)


@pytest.mark.parametrize("messages", [messages_by_flags, warnings_by_entries])
def test_no_warning_names_on_the_command_line_what_only_python_has(messages):
    found = {(where, text) for where, text in texts_of_warnings() if " " in text}
    assert len(found) > 15
    left = []
    for where, text in sorted(found):
        with pytest.warns(FusionWarning) as given, messages():
            warn(text, FusionWarning)
        (told,) = (str(one.message) for one in given)
        told = re.sub(r"settings\.[\w.]+", "", told)  # an entry of a manifest
        left += [(where, told)] if ONLY_PYTHON.search(told) else []
    assert left == []


@pytest.mark.filterwarnings("default::clafusion.errors.FusionWarning")
@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_warnings_of_every_command_do(command, capsys, monkeypatch):
    def stopped(*_, **__):
        warn("Try calibration='least_squares'", AssessmentWarning)
        raise InputError("stop here")

    monkeypatch.setattr("clafusion.cli.models.data_of", lambda *_: torch.zeros(3, 2))
    for name in ("weights.factories.build_model", "cli.models.load_models"):
        monkeypatch.setattr(f"clafusion.{name}", stopped)
    given = FUSE[1:-1] if command == "explain" else ["--arch", "a.py:b", "--input-shape", "3"]
    assert main([command, *given]) == 2
    assert "clafusion: warning: Try --calibration least_squares\n" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::clafusion.errors.FusionWarning")
def test_warnings_on_the_command_line_call_options_as_they_are_typed(capsys, monkeypatch):
    def fused(*_):
        warn("Try calibration='least_squares' or width='wide'", AssessmentWarning)
        raise InputError("stop here")

    monkeypatch.setattr("clafusion.cli.models.load_models", lambda *_: {})
    monkeypatch.setattr("clafusion.cli.models.data_of", lambda *_: torch.zeros(3, 2))
    monkeypatch.setattr("clafusion.fusion.align", lambda *_, **__: fused())
    assert main(["align", *FUSE[1:-1]]) == 2
    told = "Try --calibration least_squares or --target-width wide"
    assert f"clafusion: warning: {told}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "given", "chosen"),
    [
        (FusionConfig, {"calibration.toward": "any"}, {"calibration": "least_squares"}),
        (FusionConfig, {"target.factor": "1.5"}, {"target": "wider"}),
        (FusionConfig, {"target.merge": "sum", "target.width": "own"}, {"target": "shallower"}),
        (FusionConfig, {"target.width": "wide"}, {"target": "deeper"}),
        (FusionConfig, {"matching.solver.budget": "0.2"}, {"matching.solver": "zip"}),
        (
            FusionConfig,
            {"matching.solver.epsilon": "1", "matching.solver.marginal_relaxation": "2"},
            {"matching.solver": "unbalanced"},
        ),
        (FusionConfig, {"merging.strategy.max_rounds": "3"}, {"merging.strategy": "barycentre"}),
        (MergeConfig, {"method.elect": True}, {"method": "dare"}),
        (MergeConfig, {"method.density": "0.5"}, {"method": "ties"}),
        (MergeConfig, {"calibration.ridge": "0.1"}, {"calibration": "least_squares"}),
    ],
)
def test_an_option_of_one_variant_chooses_it_where_none_is_named(kind, given, chosen):
    found = changed(kind(), given)
    assert {path: setting_at(found, path).name for path in chosen} == chosen
    assert changed(kind(), {**given, **chosen}) == found


def test_what_was_chosen_stays_and_the_option_is_refused():
    repair = FusionConfig(calibration="repair")
    for base, given in (
        (repair, {"calibration.toward": "any"}),  # as by --config or --preset
        (FusionConfig(), {"calibration": "auto", "calibration.toward": "any"}),
    ):
        with pytest.raises(
            InputError, match=r"is for --calibration least_squares; this is (re|au)"
        ):
            changed(base, given)
    with pytest.raises(InputError, match="sinkhorn or unbalanced; this is auto: add "):
        changed(FusionConfig(), {"matching.solver.epsilon": "1"})
    with pytest.raises(InputError, match="--matching-solver-budget is for --matching-solver zip"):
        changed(FusionConfig(), {"matching.solver.budget": "1", "matching.solver.epsilon": "1"})
