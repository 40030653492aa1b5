"""Many pairs: every model made ready once, results written one by one, work shipped by executors.

Nothing here schedules, ships or retries across processes: that is the executor's. What a worker
gets and gives back is bytes, so that any executor can carry it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    wait,
)
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_program import AlignmentMode, LayerAlignment
from clafusion.alignment.layer_costs import LayerCost
from clafusion.batch.prepared import Known, PreparedModel, prepare
from clafusion.batch.processes import deaf, stoppable, worker_processes
from clafusion.calibration.least_squares import Lean
from clafusion.correspondence.correspondence import fill
from clafusion.errors import ClafusionError, FusionWarning, InputError, StructureError
from clafusion.fusion import (
    Calibration,
    ChannelCost,
    FusionConfig,
    align_profiles,
    fuse_aligned,
)
from clafusion.merging.blending import Normalisation
from clafusion.merging.layer_weights import LayerWeights
from clafusion.profiling.batches import Data, first_batch
from clafusion.profiling.importance import Importance
from clafusion.profiling.profile import LayerValues
from clafusion.targets.balance import Balance, Merge, Width
from clafusion.tracing.trace import copied
from clafusion.transport.solve import Solver
from clafusion.weights.atomic import replacing
from clafusion.weights.digests import (
    data_digest,
    digest_of,
    structure_digest,
    tensors_digest,
    versions,
)
from clafusion.weights.files import ModelFile, file_digest, load_state, save_state, tensors_of

__all__ = ["PairResult", "fuse_many"]

Model = nn.Module | ModelFile
Pair = tuple[str, str]

RESULTS = "results.jsonl"
CACHE = "profiles"

_PAIRS_A_TASK = 4
_LAST_PAIRS = 8  # which are tasks of their own, so that all workers end at about the same time
_MODELS_AT_HAND = 8  # for which the tasks are put in order
_LONGEST = 255 - len(".") - len(".12345678.tmp")  # a file's name, while it is being written
_NAME = re.compile(r"[\w.,=@-]+")  # what is safe in a file's name


@dataclass(frozen=True)
class PairResult:
    """The outcome of one pair.

    It holds what can be sent between processes and kept for hundreds of pairs: neither the
    parents nor their profiles, as :group:`clafusion.FusionResult` does.

    Attributes
    ----------
    first, second
        The models' names.
    error
        Why the pair could not be fused; None where it was. The attributes below are None or
        empty then.
    deep
        Name of the model with more layers.
    structure
        Name of the model whose architecture the fused one has; its widths may be others.
    deep_layers, shallow_layers
        Names of the layers of both models.
    alignment
        Of the layers, as in ``FusionResult.alignment``.
    shares
        For each of ``alignment.pairs`` the share of the model with more layers; see
        ``FusionResult.shares``.
    seconds
        What each stage took. The stages that models share are counted in the pair for which they
        were done.
    warnings
        What the solvers had to say.
    path
        Where the fused weights lie; None without ``out_dir``.
    resumed
        Whether an earlier run did the pair.
    """

    first: str
    second: str
    error: str | None
    deep: str | None
    structure: str | None
    deep_layers: tuple[str, ...]
    shallow_layers: tuple[str, ...]
    alignment: LayerAlignment | None
    shares: tuple[float, ...]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    path: Path | None
    resumed: bool
    _state: Mapping[str, Tensor] | None = field(repr=False)
    _architecture: Model | None = field(repr=False)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The fused weights, read from ``path`` where there is one.

        Raises
        ------
        InputError
            The pair failed, or the file is gone.
        """
        if self._state is not None:
            return self._state
        if self.path is None:
            raise InputError(f"{self.first!r} and {self.second!r} were not fused: {self.error}")
        return load_state(self.path)

    @property
    def model(self) -> nn.Module:
        """The fused model, built anew from ``structure``'s architecture and the fused weights.

        Raises
        ------
        InputError
            The pair failed, or the file is gone.
        """
        state = self.state
        kind = self._architecture
        assert kind is not None, "a fused pair has an architecture"
        built = kind.build() if isinstance(kind, ModelFile) else copy.deepcopy(kind)
        fill(built, state)
        return built


def fuse_many(
    models: Mapping[str, Model],
    data: Data,
    pairs: Iterable[Pair] | str = "all",
    *,
    executor: Executor | int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None = None,
    weight: float = 0.5,
    layer_cost: LayerCost = "cka",
    alignment: AlignmentMode = "layer",
    channel_cost: ChannelCost = "correlation",
    solver: Solver = "auto",
    epsilon: float = 0.05,
    calibration: Calibration = "repair",
    lean: Lean = "auto",
    balance: Balance = "add",
    merge: Merge = "least_squares",
    width: Width = "own",
    alignment_samples: int = 400,
    matching_rows: int = 8192,
    verify: bool = True,
    seed: int = 0,
    layer_values: LayerValues = "output",
    profile_inputs: int | None = None,
    pin_ends: bool = False,
    normalisation: Normalisation = "two",
    match_classifier: bool = False,
    importance: Importance = "uniform",
    zip_budget: float = 0.1,
    layer_weights: LayerWeights = "uniform",
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PairResult]:
    """Fuse many pairs of models; each gives the bytes that :func:`clafusion.fuse` gives for it.

    Every model is proved and profiled once, and loaded once in each process, not once a pair;
    models of one architecture share a trace. A pair that fails is reported as such, and the others
    go on.

    Parameters
    ----------
    models
        Name -> module, or :group:`clafusion.ModelFile` for one that is loaded when it is needed.
        Names become file names: letters, digits and ``_.,=@-``.
    data
        Unlabelled inputs, the same for all models. An iterable must give the same batches each
        time.
    pairs
        Names of the first and second model of each pair, or ``"all"``: every two models, in the
        order of ``models``.
    executor
        None or 1: here, one after another. A number: so many processes of this machine, the cores
        shared among them. Any :group:`concurrent.futures.Executor`: that one, for example
        ``Client(...).get_executor()`` of Dask. The models' groups must be importable there; a
        :group:`clafusion.ModelFile`'s file must be readable there.
    out_dir
        Where results go, one by one: the fused weights of a pair as ``FIRST+SECOND.safetensors``
        and one line for it in ``results.jsonl``. Default: results are kept in memory alone.
    resume
        Keep pairs in ``out_dir`` that were made from the same models, data and settings and are
        whole. Failed, stale and corrupt ones are done again. False: do all pairs again. Of a
        model's code only its modules' own ``forward``, or the file of a ``ModelFile``'s factory,
        is compared: after a change in what that calls or imports, give False.
    cache_dir
        Where models' profiles are kept between runs, and shared by the processes of one; default
        ``out_dir/profiles``. Without one, each worker of an ``executor`` of yours profiles the
        models that it needs.
    memory_limit
        Bytes that models made ready may take in one process: weights, profiles and moments. The
        two of one pair must fit. With ``out_dir``, pairs are then done in an order that loads
        few models again; results come in the order of ``pairs`` all the same.
    progress
        Called with the numbers of pairs that are done and that there are.
    example_inputs, weight, layer_cost, alignment, channel_cost, solver, epsilon, calibration, \
lean, balance, merge, width, alignment_samples, matching_rows, verify, seed, layer_values, \
profile_inputs, pin_ends, normalisation, match_classifier, importance, zip_budget, layer_weights, \
device
        As for :func:`clafusion.fuse`.

    Returns
    -------
    iterator of PairResult
        In the order of ``pairs``. Work goes on as results are taken.

    Raises
    ------
    InputError
        An argument is not as said above. This is raised at once, before any result is taken.
    ClafusionError
        A worker process died, or the executor failed otherwise; what is done is kept in
        ``out_dir``.

    Examples
    --------
    >>> models = {f.stem: ModelFile("nets.py:make", f) for f in paths}  # doctest: +SKIP
    >>> for result in fuse_many(models, images, out_dir="fused", executor=4):  # doctest: +SKIP
    ...     print(result.first, result.second, result.error or result.alignment.total_cost)
    """
    config = FusionConfig(
        weight=weight,
        layer_cost=layer_cost,
        alignment=alignment,
        channel_cost=channel_cost,
        solver=solver,
        epsilon=epsilon,
        calibration=calibration,
        lean=lean,
        balance=balance,
        merge=merge,
        width=width,
        alignment_samples=alignment_samples,
        matching_rows=matching_rows,
        verify=verify,
        seed=seed,
        layer_values=layer_values,
        profile_inputs=profile_inputs,
        pin_ends=pin_ends,
        normalisation=normalisation,
        match_classifier=match_classifier,
        importance=importance,
        zip_budget=zip_budget,
        layer_weights=layer_weights,
    )
    models = _checked_models(models)
    wanted = _checked_pairs(pairs, models)
    if isinstance(executor, bool) or not isinstance(executor, (int, Executor, type(None))):
        raise InputError(
            "executor must be None, a number of processes or a concurrent.futures.Executor; got "
            f"{type(executor).__name__}"
        )
    if isinstance(executor, int) and executor < 1:
        raise InputError(f"executor must be at least 1 process; got {executor}")
    if memory_limit is not None and (
        isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 1
    ):
        raise InputError(f"memory_limit must be a positive number of bytes; got {memory_limit!r}")
    if example_inputs is None:
        example_inputs = first_batch(data)
    folder = None
    if out_dir is not None:
        folder = _made(out_dir, "out_dir")
        for pair in wanted:
            if len(_file_name(pair).encode()) > _LONGEST:
                raise InputError(
                    f"pairs: the names {pair[0]!r} and {pair[1]!r} are too long for a file's name "
                    f"together: {_LONGEST} bytes with the ending are possible"
                )
        results = {folder.resolve() / _file_name(pair) for pair in wanted}
        for name, model in models.items():
            if isinstance(model, ModelFile) and Path(model.path).resolve() in results:
                raise InputError(
                    f"models[{name!r}]: {str(model.path)!r} would be written over by a pair's "
                    "result: choose another out_dir"
                )
        cache_dir = folder / CACHE if cache_dir is None else cache_dir
    job = _Job(
        data,
        example_inputs,
        config,
        None if device is None else str(device),
        None if cache_dir is None else str(_made(cache_dir, "cache_dir").resolve()),
        memory_limit,
        data_digest(data),
    )
    return _Run(models, wanted, job, folder, resume, executor, progress).results()


def _made(path: str | os.PathLike[str], argument: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{argument} {str(path)!r} cannot be made a directory: {error.strerror or error}"
        ) from error
    return Path(path)


def _checked_models(models: Mapping[str, Model]) -> dict[str, Model]:
    if not isinstance(models, Mapping):
        raise InputError(
            f"models must be a mapping of names to models; got {type(models).__name__}"
        )
    for name, model in models.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise InputError(
                f"models: the name {name!r} is not possible, as it becomes a file's name; use "
                "letters, digits and _.,=@-"
            )
        if not isinstance(model, (nn.Module, ModelFile)):
            raise InputError(
                f"models[{name!r}] must be a torch.nn.Module or a clafusion.ModelFile; got "
                f"{type(model).__name__}"
            )
    return dict(models)


def _checked_pairs(pairs: Iterable[Pair] | str, models: Mapping[str, Model]) -> list[Pair]:
    if isinstance(pairs, str):
        if pairs != "all":
            raise InputError(f"pairs must be 'all' or a list of pairs of names; got {pairs!r}")
        names = list(models)
        return [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    wanted: list[Pair] = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(f"pairs[{i}] must be two names; got {pair!r}")
        unknown = [name for name in pair if name not in models]
        if unknown:
            raise InputError(f"pairs[{i}] names {unknown[0]!r}, which models does not have")
        wanted.append((pair[0], pair[1]))
    if len(set(wanted)) != len(wanted):
        twice = next(pair for pair in wanted if wanted.count(pair) > 1)
        raise InputError(f"pairs must be different ones; {twice} is there twice")
    return wanted


# --- one process --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What all pairs share; picklable if the data is."""

    data: Data
    example_inputs: Any
    config: FusionConfig
    device: str | None
    cache_dir: str | None
    memory_limit: int | None
    data_hash: str


@dataclass(frozen=True)
class _Outcome:
    """What a worker gives back for a pair: facts for JSON, and weights."""

    facts: dict[str, Any]
    state: dict[str, Tensor] | None
    categories: tuple[type[Warning], ...] = ()  # of the facts' warnings


class _ModelError(Exception):
    """A model that no pair can use; the message tells why."""


class _Workshop:
    """Makes models ready when a pair needs them, and frees them within the memory limit."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.ready: OrderedDict[str, PreparedModel] = OrderedDict()  # the oldest first
        self.known: Known = {}
        self.failed: dict[str, str] = {}
        self.largest = 0

    def fuse(self, pair: Pair, source: Callable[[str], Model]) -> _Outcome:
        """Fuse a pair; what goes wrong is an outcome, too."""
        facts: dict[str, Any] = {"first": pair[0], "second": pair[1], "error": None}
        model = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusionWarning)
            try:
                model = self._fuse(pair, source, facts)
            except _ModelError as error:
                facts["error"] = str(error)
            except Exception as error:  # the other pairs go on
                facts["error"] = _described(error)
        facts["warnings"] = []
        categories = []
        for one in caught:
            if issubclass(one.category, FusionWarning):
                facts["warnings"].append(" ".join(str(one.message).split()))
                categories.append(one.category)
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        state = None
        if model is not None:
            state = tensors_of(model)
        return _Outcome(facts, state, tuple(categories))

    def prepare(self, name: str, source: Callable[[str], Model]) -> None:
        """Make a model ready; what goes wrong is told when a pair needs it."""
        with suppress(_ModelError, InputError):
            self._prepared(name, (name, name), source)

    def _fuse(self, pair: Pair, source: Callable[[str], Model], facts: dict[str, Any]) -> nn.Module:
        started = time.perf_counter()
        first, second = (self._prepared(name, pair, source) for name in pair)
        before = {"prepare": time.perf_counter() - started}
        config = self.job.config
        aligned = align_profiles(first.profile, second.profile, config=config, timings=before)
        if aligned.alignment.unmatched_shallow:
            raise StructureError(
                "each of the two is the deeper one somewhere, and their union would be a network "
                "that neither's factory builds; fuse them alone, by clafusion.fuse or with --into"
            )
        result = fuse_aligned(aligned, self.job.data, config=config)
        facts["deep"] = pair[0] if aligned.deep_is_first else pair[1]
        names = pair if aligned.deep_is_first else pair[::-1]
        made = result.model.state_dict().keys()
        facts["structure"] = next(
            name
            for name, one in zip(names, (aligned.deep, aligned.shallow), strict=True)
            if one.traced.model.state_dict().keys() == made
        )
        facts["deep_layers"] = [layer.name for layer in aligned.deep.traced.layers]
        facts["shallow_layers"] = [layer.name for layer in aligned.shallow.traced.layers]
        facts["alignment"] = _alignment_facts(aligned.alignment)
        facts["shares"] = list(result.shares.values())
        facts["seconds"] = dict(result.timings)
        return result.model

    def _prepared(self, name: str, pair: Pair, source: Callable[[str], Model]) -> PreparedModel:
        if name in self.failed:
            raise _ModelError(self.failed[name])
        if name not in self.ready:
            self._make_room(pair, self.largest)
            job = self.job
            try:
                kind = source(name)
                model = kind.load() if isinstance(kind, ModelFile) else kind
                example = job.example_inputs
                if job.device is not None:
                    model = copied(model).to(job.device)
                    example = torch.utils._pytree.tree_map(lambda x: x.to(job.device), example)
                made = prepare(
                    repr(name),
                    model,
                    job.data,
                    example,
                    job.config,
                    data_hash=job.data_hash,
                    cache_dir=None if job.cache_dir is None else Path(job.cache_dir),
                    known=self.known,
                )
            except Exception as error:
                self.failed[name] = f"model {name!r}: {_described(error)}"
                raise _ModelError(self.failed[name]) from error
            self.ready[name] = made
            self.largest = max(self.largest, made.num_bytes)
            self._make_room(pair, 0)
            self._check_limit(pair)
        return self.ready[name]

    def _make_room(self, pair: Pair, coming: int) -> None:
        """Free the newest models first: the oldest are the core that meets all others."""
        limit = self.job.memory_limit
        if limit is None:
            return
        for name in reversed(list(self.ready)):
            if self._taken() + coming <= limit:
                return
            if name not in pair:
                del self.ready[name]

    def _check_limit(self, pair: Pair) -> None:
        limit = self.job.memory_limit
        if limit is not None and self._taken() > limit:
            taken = self._taken()
            for name in pair:
                self.ready.pop(name, None)
            raise InputError(
                f"memory_limit is {limit:,} bytes, but the models of this pair take {taken:,}; "
                "raise it, or lower alignment_samples or matching_rows"
            )

    def _taken(self) -> int:
        return sum(one.num_bytes for one in self.ready.values())


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _alignment_facts(alignment: LayerAlignment) -> dict[str, Any]:
    def finite(values: list[Any]) -> list[Any]:
        return [
            finite(one) if isinstance(one, list) else one if math.isfinite(one) else None
            for one in values
        ]

    return {
        "deep_to_shallow": list(alignment.deep_to_shallow),
        "total_cost": alignment.total_cost,
        "cost": finite(alignment.cost.tolist()),
        "skip": finite(alignment.skip.tolist()),
        "mode": alignment.mode,
        "pin_first": alignment.pin_first,
        "pin_last": alignment.pin_last,
    }


def _alignment_of(facts: Mapping[str, Any]) -> LayerAlignment:
    def array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = np.array(values, dtype=np.float64)  # None becomes NaN
        return np.where(np.isnan(found), np.inf, found)

    return LayerAlignment(
        tuple(facts["deep_to_shallow"]),
        facts["total_cost"],
        array(facts["cost"]),
        array(facts["skip"]),
        facts["mode"],
        facts["pin_first"],
        facts["pin_last"],
    )


# --- the order of the pairs ---------------------------------------------------------------------


class _Agenda:
    """Chooses the next pair, so that few models need to be made ready again."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.left = dict.fromkeys(pairs)
        self.of: dict[str, dict[Pair, None]] = {}
        for pair in self.left:
            for name in pair:
                self.of.setdefault(name, {})[pair] = None

    def next(self, ready: Iterable[str]) -> Pair:
        """Return a pair of models at hand, else one that brings in the most useful model."""
        at_hand = dict.fromkeys(ready)
        for name in at_hand:
            for pair in self.of.get(name, ()):
                if pair[0] in at_hand and pair[1] in at_hand:
                    return pair
        for name in at_hand:  # the oldest has met the most others
            others = {pair[0] if pair[1] == name else pair[1]: pair for pair in self.of[name]}
            if others:
                best = max(others, key=lambda other: self._meets(other, at_hand))
                return others[best]
        return next(iter(self.left))

    def _meets(self, name: str, at_hand: Mapping[str, None]) -> int:
        return sum(one[0] in at_hand or one[1] in at_hand for one in self.of[name])

    def done(self, pair: Pair) -> list[str]:
        """Strike a pair; return the models that no pair needs any more."""
        del self.left[pair]
        for name in pair:
            self.of[name].pop(pair, None)
        return [name for name in pair if not self.of[name]]


def _tasks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Split pairs into tasks, those of one task and of neighbours with few models between them."""
    agenda = _Agenda(pairs)
    ready: OrderedDict[str, None] = OrderedDict()
    order: list[Pair] = []
    while agenda.left:
        pair = agenda.next(ready)
        for name in pair:
            if name not in ready and len(ready) >= _MODELS_AT_HAND:
                del ready[next(one for one in reversed(ready) if one not in pair)]
            ready[name] = None
        order.append(pair)
        for name in agenda.done(pair):
            ready.pop(name, None)
    early = order[:-_LAST_PAIRS]
    return [
        *(early[i : i + _PAIRS_A_TASK] for i in range(0, len(early), _PAIRS_A_TASK)),
        *([pair] for pair in order[-_LAST_PAIRS:]),
    ]


# --- other processes ----------------------------------------------------------------------------

_of_thread = threading.local()  # an executor of threads has one workshop in each

_Sent = bytes | str  # what is pickled, or the file that holds it


def _unpacked(sent: _Sent) -> Any:
    return pickle.loads(sent if isinstance(sent, bytes) else Path(sent).read_bytes())


def _workshop(job: _Sent, key: str) -> _Workshop:
    """Return this worker's workshop, which keeps what it has made ready for the next task."""
    if getattr(_of_thread, "key", None) != key:
        _of_thread.key, _of_thread.workshop = key, _Workshop(_unpacked(job))
    found: _Workshop = _of_thread.workshop
    return found


def _get_ready(job: _Sent, key: str, name: str, model: _Sent) -> None:
    """Make a model ready in a worker, for the cache that all workers share."""
    with stoppable():
        _workshop(job, key).prepare(name, lambda _: _unpacked(model))


def _work(job: _Sent, key: str, models: Mapping[str, _Sent], pairs: Sequence[Pair]) -> bytes:
    """Fuse some pairs in a worker."""
    workshop = _workshop(job, key)
    outcomes = []
    for pair in pairs:
        with stoppable():
            outcome = workshop.fuse(pair, lambda name: _unpacked(models[name]))
        state = outcome.state
        if state is not None:
            state = {name: one.cpu() for name, one in state.items()}
        outcomes.append(replace(outcome, state=state))
    return pickle.dumps(outcomes)


# --- the run ------------------------------------------------------------------------------------


class _Run:
    """One call of :func:`fuse_many`."""

    def __init__(
        self,
        models: dict[str, Model],
        pairs: list[Pair],
        job: _Job,
        folder: Path | None,
        resume: bool,
        executor: Executor | int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.models = models
        self.pairs = pairs
        self.job = job
        self.folder = folder
        self.executor = executor
        self.progress = progress
        self.digests: dict[str, str] = {}
        self.finished: dict[Pair, PairResult] = {}
        if folder is not None:
            self._take_up(folder, resume)
        self.count = len(self.finished)

    def results(self) -> Iterator[PairResult]:
        left = [pair for pair in self.pairs if pair not in self.finished]
        self._tell()
        several = self.executor is not None and self.executor != 1
        with closing(self._elsewhere(left) if several else self._here(left)) as work:
            for pair in self.pairs:
                while pair not in self.finished:
                    next(work)
                yield self.finished.pop(pair)

    def _here(self, left: list[Pair]) -> Generator[None, None, None]:
        workshop = _Workshop(self.job)
        agenda = _Agenda(left)
        reorder = self.job.memory_limit is not None and self.folder is not None
        while agenda.left:
            pair = agenda.next(workshop.ready) if reorder else next(iter(agenda.left))
            outcome = workshop.fuse(pair, self.models.__getitem__)
            for name in agenda.done(pair):
                workshop.ready.pop(name, None)
            self._finish(pair, outcome)
            yield

    def _elsewhere(self, left: list[Pair]) -> Generator[None, None, None]:
        packed: dict[str, _Sent] = {
            name: _packed(name, self.models[name])
            for name in dict.fromkeys(chain.from_iterable(left))
        }
        with ExitStack() as stack:
            job, executor = _portable(self.job), self.executor
            futures: dict[Future[Any], list[Pair]] = {}
            scratch = None
            if isinstance(executor, int):
                scratch = stack.enter_context(
                    TemporaryDirectory(prefix="clafusion-", ignore_cleanup_errors=True)
                )
                if job.cache_dir is None:
                    job = replace(job, cache_dir=scratch)
                executor = stack.enter_context(worker_processes(executor, scratch))
            else:
                stack.callback(lambda: [future.cancel() for future in futures])
            assert executor is not None, "without one the pairs are fused here"
            pickled = pickle.dumps(job)
            key = hashlib.sha256(pickled).hexdigest()
            given: _Sent = pickled
            if scratch is not None:
                # What a task carries goes through a pipe, and a write of more than a pipe holds
                # would wait for ever for a worker that has died.
                given = _laid_down(pickled, scratch, "job")
                packed = {
                    name: _laid_down(model, scratch, f"model-{i}")
                    for i, (name, model) in enumerate(packed.items())
                }
            if job.cache_dir is not None:  # no worker need profile what another one has
                for name, model in packed.items():
                    futures[self._submitted(executor, _get_ready, given, key, name, model)] = []
                for _ in self._ended(futures):
                    pass
            for task in _tasks(left):
                models = {name: packed[name] for name in chain.from_iterable(task)}
                futures[self._submitted(executor, _work, given, key, models, task)] = task
            for task, found in self._ended(futures):
                for pair, outcome in zip(task, pickle.loads(found), strict=True):
                    self._finish(pair, outcome)
                    yield

    def _submitted(self, executor: Executor, work: Callable[..., Any], *given: Any) -> Future[Any]:
        try:
            with deaf() if isinstance(self.executor, int) else nullcontext():
                return executor.submit(work, *given)
        except Exception as error:
            raise self._failed(error) from error

    def _ended(self, futures: dict[Future[Any], list[Pair]]) -> Iterator[tuple[list[Pair], Any]]:
        """Yield what ends, as it ends."""
        while futures:
            ended, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in ended:
                task = futures.pop(future)
                try:
                    found = future.result()
                except Exception as error:  # what goes wrong with a pair is in its outcome
                    raise self._failed(error) from error
                yield task, found

    def _failed(self, error: Exception) -> ClafusionError:
        """Return the error of an executor that failed."""
        return ClafusionError(
            (
                "a worker process died, perhaps for lack of memory; "
                if isinstance(error, BrokenExecutor)
                else f"the executor failed ({_described(error)}); "
            )
            + f"{self.count} of {len(self.pairs)} pairs are done. Call again to go on"
            + ("" if self.folder else " (with out_dir, what is done is kept)")
        )

    def _finish(self, pair: Pair, outcome: _Outcome) -> None:
        """Write a pair's result down, and keep it until its turn comes."""
        facts, state = dict(outcome.facts), outcome.state
        if self.folder is not None:
            facts["key"] = self._key(pair)
            if state is not None:
                path = self.folder / _file_name(pair)
                save_state(state, path)
                facts["file"], facts["sha256"] = path.name, file_digest(path)
            line = json.dumps(facts, allow_nan=False) + "\n"
            try:
                with (self.folder / RESULTS).open("a", encoding="utf-8") as lines:
                    lines.write(line)
                    lines.flush()
                    os.fsync(lines.fileno())
            except OSError as error:
                raise InputError(
                    f"cannot write to out_dir {str(self.folder)!r}: {error.strerror or error}; "
                    "what is done is kept. Call again to go on"
                ) from error
        self.finished[pair] = self._result(facts, state if self.folder is None else None, False)
        for text, category in zip(facts["warnings"], outcome.categories, strict=True):
            warnings.warn(f"{pair[0]!r} and {pair[1]!r}: {text}", category, stacklevel=4)
        self.count += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.count, len(self.pairs))

    def _result(
        self, facts: Mapping[str, Any], state: Mapping[str, Tensor] | None, resumed: bool
    ) -> PairResult:
        fused = facts["error"] is None
        return PairResult(
            first=facts["first"],
            second=facts["second"],
            error=facts["error"],
            deep=facts.get("deep"),
            structure=facts.get("structure"),
            deep_layers=tuple(facts.get("deep_layers", ())),
            shallow_layers=tuple(facts.get("shallow_layers", ())),
            alignment=_alignment_of(facts["alignment"]) if fused else None,
            shares=tuple(facts.get("shares", ())),
            seconds={stage: float(one) for stage, one in facts.get("seconds", {}).items()},
            warnings=tuple(facts["warnings"]),
            path=self.folder / facts["file"] if fused and self.folder is not None else None,
            resumed=resumed,
            _state=state,
            _architecture=self.models[facts["structure"]] if fused else None,
        )

    # --- what an earlier run has left ---

    def _take_up(self, folder: Path, resume: bool) -> None:
        """Take over the pairs that are whole, and leave only their lines in the file.

        Lines of pairs that are not asked for stay as they are.
        """
        path = folder / RESULTS
        if not path.exists():
            return
        wanted = set(self.pairs)
        kept: dict[Pair, str] = {}
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(
                f"out_dir: {str(path)!r} cannot be read: {error.strerror or error}; choose another "
                "out_dir"
            ) from error
        for line in lines:
            try:
                facts = json.loads(line)
                pair = facts["first"], facts["second"]
                if pair in wanted:
                    kept.pop(pair, None)
                    self.finished.pop(pair, None)
                    if not (resume and self._is_whole(folder, pair, facts)):
                        continue
                    self.finished[pair] = _checked(self._result(facts, None, True))
                kept[pair] = line
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that was cut short, or is none of ours
        with replacing(path, "out_dir") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")

    def _is_whole(self, folder: Path, pair: Pair, facts: Mapping[str, Any]) -> bool:
        if facts["error"] is not None or facts["key"] != self._key(pair):
            return False
        path = folder / _file_name(pair)
        if not path.is_file():
            return False
        try:
            return bool(file_digest(path) == facts["sha256"])
        except OSError:  # it may not be read, but perhaps replaced
            return False

    def _key(self, pair: Pair) -> str:
        """Return the hash of all that a pair's result depends on."""
        example = self.job.example_inputs
        leaves = torch.utils._pytree.tree_leaves(example)
        return digest_of(
            {
                **versions(),
                "models": [self._digest(name) for name in pair],
                "data": self.job.data_hash,
                "example": tensors_digest({str(i): one for i, one in enumerate(leaves)}),
                "settings": asdict(self.job.config),
                "device": None if self.job.device is None else torch.device(self.job.device).type,
            }
        )

    def _digest(self, name: str) -> str:
        if name not in self.digests:
            model = self.models[name]
            try:
                self.digests[name] = (
                    model.digest()
                    if isinstance(model, ModelFile)
                    else digest_of([structure_digest(model), tensors_digest(tensors_of(model))])
                )
            except (InputError, OSError) as error:  # the pair itself will say so
                self.digests[name] = _described(error)
        return self.digests[name]


def _checked(result: PairResult) -> PairResult:
    """Return what was read from a line if it is of one piece.

    Raises
    ------
    ValueError
        It is not.
    """
    sizes = len(result.deep_layers), len(result.shallow_layers)
    alignment = result.alignment
    if alignment is None or not (
        alignment.cost.shape == sizes
        and len(alignment.deep_to_shallow) == sizes[0]
        and isinstance(alignment.total_cost, float)
        and result.deep in (result.first, result.second)
        and all(isinstance(one, str) for one in (*result.deep_layers, *result.shallow_layers))
        and all(isinstance(one, str) for one in result.warnings)
    ):
        raise ValueError("not a line of this version")
    return result


def _file_name(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}.safetensors"


def _portable(job: _Job) -> _Job:
    """Return a job whose data can be sent: the batches of a DataLoader instead of itself."""
    if isinstance(job.data, Tensor):
        return job
    return replace(job, data=list(job.data))


def _packed(name: str, model: Model) -> bytes:
    try:
        return pickle.dumps(model)
    except Exception as error:
        raise InputError(
            f"models[{name!r}] cannot be sent to other processes ({_described(error)}): give a "
            "clafusion.ModelFile, which is loaded there"
        ) from error


def _laid_down(packed: _Sent, folder: str, name: str) -> str:
    """Write what is pickled into a file for the workers; return its path."""
    assert isinstance(packed, bytes), "it is pickled"
    path = Path(folder, f"{name}.pickle")
    try:
        path.write_bytes(packed)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r} for the workers: {error.strerror or error}; free space, "
            "or set TMPDIR"
        ) from error
    return str(path)
