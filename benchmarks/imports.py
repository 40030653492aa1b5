"""What the first touch of clafusion costs, in seconds of the processor, in fresh processes.

Python keeps compiled modules in files, and pip makes these at the installation. Where it must not
(``PYTHONDONTWRITEBYTECODE``), it compiles all modules that no file is kept of at each start. Both
ways are measured: there torch has its files, and clafusion, run from its source, has none.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile

from benchmarks.results import write_results

STARTS = {
    "import torch": "import torch",
    "import clafusion": "import clafusion",
    "clafusion.fuse": "import torch, clafusion; clafusion.fuse",
    "clafusion --help": "from clafusion.cli import main; main(['--help'])",
}


def main() -> None:
    """Measure all starts in turn, several times; print and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "kept": {"PYTHONPYCACHEPREFIX": folder},
            "compiled anew": {"PYTHONDONTWRITEBYTECODE": "1"},
        }
        for way, settings in ways.items():
            for code in STARTS.values():
                _seconds(code, settings)  # the first one writes the files
            every = [
                {name: _seconds(code, settings) for name, code in STARTS.items()}
                for _ in range(given.repeats)
            ]
            found[way] = {name: statistics.median(one[name] for one in every) for name in STARTS}
            above = found[way]["clafusion.fuse"] - found[way]["import torch"]
            found[way]["clafusion.fuse above torch"] = above
            print(way, {name: round(one, 3) for name, one in found[way].items()})
    write_results("imports", {"repeats": given.repeats, "processor_seconds": found})


def _seconds(code: str, settings: dict[str, str]) -> float:
    env = {**os.environ, **settings}
    if "PYTHONDONTWRITEBYTECODE" not in settings:
        env.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
