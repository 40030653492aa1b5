"""Results of many pairs that no fusion made: numbers drawn at random, for pages and tables."""

import itertools
from pathlib import Path

import numpy as np

from clafusion import ModelFile
from clafusion.alignment.dynamic_program import align_layers
from clafusion.assessment.nearness import FusionAssessment
from clafusion.batch.named_tasks import NamedResult
from clafusion.batch.results import result_of
from clafusion.config import FusionConfig, MergeConfig, ReassemblyConfig
from clafusion.reports.page.measures import Accuracies

STAGES = ("prepare", "align", "match", "merge", "calibrate", "assess")
FAILED = {
    "corrupt": "InputError: models['{0}']: checkpoint '/zoo/{0}.safetensors' is corrupt",
    "unlike": "StructureError: models['{0}'] and models['{1}'] have outputs of 10 and 5 channels",
}


def pair_results(names, *, failed=None, kind="classes", folder="fused", pairs=None, depth=6):
    """Return the results of pairs of models with these names; ``failed`` maps pairs to errors."""
    random = np.random.default_rng(0)
    layers = {name: [f"stage{i}.conv{i}" for i in range(depth + j % 3)]
              for j, name in enumerate(names)}  # fmt: skip
    models = {name: ModelFile("nets.py:make()", f"/zoo/{name}.safetensors") for name in names}
    found = []
    for pair in pairs or itertools.combinations(names, 2):
        facts = {
            "first": pair[0],
            "second": pair[1],
            "error": (failed or {}).get(pair),
            "warnings": [],
            "settings": FusionConfig(calibration="repair").to_dict(),
            "models": {name: {"source": f"nets.py:make(), /zoo/{name}.safetensors",
                              "sha256": f"{i:02d}" * 32, "parameters": 188_340 + 7 * i,
                              "operations": 42_000_000 + i} for i, name in enumerate(pair)},
        }  # fmt: skip
        if facts["error"] is None:
            facts |= _fused(pair, layers, kind, random)
        found.append(result_of(facts, models=models, folder=folder and Path(folder)))
    return found


def _fused(pair, layers, kind, random):
    deep, shallow = sorted(pair, key=lambda name: -len(layers[name]))
    cost = random.uniform(0.1, 1, (len(layers[deep]), len(layers[shallow])))
    cost[0, 1:] = np.inf
    alignment = align_layers(cost)
    near = [_near(kind, *random.uniform(0.7, 1, 2)) for _ in range(4)]
    return {
        "deep": deep,
        "structure": deep,
        "deep_layers": layers[deep],
        "shallow_layers": layers[shallow],
        "alignment": {
            "deep_to_shallow": list(alignment.deep_to_shallow),
            "total_cost": alignment.total_cost,
            "cost": [[one if np.isfinite(one) else None for one in row] for row in cost.tolist()],
            "skip": alignment.skip.tolist(),
            "skip_shallow": None,
            "mode": alignment.mode,
            "pin_first": alignment.pin_first,
            "pin_last": alignment.pin_last,
        },
        "layer_weights": [[0.5, 0.5 if k >= 0 else None] for k in alignment.deep_to_shallow],
        "assessment": {
            "kind": kind,
            "result": near[0],
            "parents": dict(zip(pair, near[1:], strict=False)),
            "between_parents": near[3],
            "num_inputs": 500,
            "held_out": True,
            "nearer": [],
        },
        "seconds": dict(zip(STAGES, random.uniform(0.1, 2, len(STAGES)).tolist(), strict=True)),
        "peak_memory": dict.fromkeys(STAGES, 4 * 10**8),
        "parameters": 188_341,
        "operations": 42_123_456,
        "file": f"{pair[0]}+{pair[1]}.safetensors",
    }


def _near(kind, agreement, distance):
    return {"distance": distance, "agreement": agreement if kind == "classes" else None}


def accuracies_of(results):
    """Return accuracies for all of them."""
    random = np.random.default_rng(1)
    fused = [(one.first, one.second) for one in results if one.error is None]
    names = {name for pair in fused for name in pair}
    return Accuracies(
        {pair: random.uniform(0.8, 0.95) for pair in fused},
        {name: random.uniform(0.8, 0.95) for name in sorted(names)},
        {pair: random.uniform(0.9, 0.97) for pair in fused},
    )


def task_results(kind="classes"):
    """Return what became of three merges, one of which failed, and of a reassembly."""
    random = np.random.default_rng(1)
    near = [_near(kind, *random.uniform(0.7, 1, 2)) for _ in range(4)]
    found = FusionAssessment.from_dict(
        {
            "kind": kind,
            "result": near[0],
            "parents": {"maths & more": near[1], "code": near[2]},
            "between_parents": near[3],
            "nearer": [],
            "num_inputs": 60,
            "held_out": True,
        }
    )
    merges = ("base", "maths & more", "code")
    of_ties = MergeConfig(method={"name": "ties", "density": 0.5}).to_dict()
    options = ReassemblyConfig(blocks=2).to_dict()
    return [
        NamedResult("both <b>", "merge", merges, None, of_ties, "maths & more 0.75, code 0.25",
                    found, 1.5, ("Look & see.",), Path("fused/both.safetensors"), False),
        NamedResult("no data", "merge", merges, None, MergeConfig().to_dict(), "code 1", None,
                    0.25, (), Path("fused/no.safetensors"), True),
        NamedResult("lost", "merge", merges, "InputError: <no> file", MergeConfig().to_dict(), "",
                    None, 0.0, (), None, False),
        NamedResult("stitched", "reassembly", merges[1:], None, options, "code 0 | maths & more 1",
                    found, 3.25, (), Path("fused/stitched.pt2"), False),
    ]  # fmt: skip
