"""The models that a run prepared."""

from clafusion.batch import worker as worker_module
from clafusion.batch.prepared import prepare


def count_preparations(monkeypatch):
    made = []

    def counted(name, *arguments, **keywords):
        found = prepare(name, *arguments, **keywords)
        made.append((name, found.from_cache))
        return found

    monkeypatch.setattr(worker_module, "prepare", counted)
    return made
