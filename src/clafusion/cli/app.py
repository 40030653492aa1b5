"""The command line: all commands, signals and exit codes.

Everything that can be checked is checked before the first long step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

import clafusion
from clafusion.cli.align import STAGES as OF_ALIGN
from clafusion.cli.align import align_command
from clafusion.cli.check import check_command
from clafusion.cli.demo import STAGES as OF_DEMO
from clafusion.cli.demo import demo_command
from clafusion.cli.doctor import doctor_command
from clafusion.cli.evaluate import evaluate_command
from clafusion.cli.explain import STAGES as OF_EXPLAIN
from clafusion.cli.explain import explain_command
from clafusion.cli.fuse import fuse_command
from clafusion.cli.inspect import STAGES as OF_INSPECT
from clafusion.cli.inspect import inspect_command
from clafusion.cli.merge import merge_command
from clafusion.cli.options import CommandWithSections, advice, with_options
from clafusion.cli.pairs import pairs_command
from clafusion.cli.reassemble import reassemble_command
from clafusion.cli.show import QUIET, TYPED
from clafusion.cli.sweep import sweep_command
from clafusion.config import MergeConfig, ReassemblyConfig
from clafusion.errors import ClafusionError, FusionWarning

__all__ = ["main", "make_app"]

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")}
_QUIET = ("--quiet", "-q")
# The base of typer's usage errors, whichever release of click it builds on.
_UsageError: Any = typer.BadParameter.__mro__[2]


def make_app() -> typer.Typer:
    """Return the command line, with the options that :class:`clafusion.FusionConfig` has now."""
    app = typer.Typer(
        help="Fuse trained PyTorch networks of different depth and width into one, without "
        "training.",
        epilog="With any command: --quiet (-q) prints errors, warnings and --json only; --debug "
        "shows where an error arose.",
        rich_markup_mode=None,
        context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    )
    app.callback()(_general)
    sections = CommandWithSections
    app.command("fuse", cls=sections)(with_options(fuse_command))
    app.command("merge", cls=sections)(with_options(merge_command, kind=MergeConfig))
    app.command("reassemble", cls=sections)(with_options(reassemble_command, kind=ReassemblyConfig))
    app.command("fuse-pairs", cls=sections)(pairs_command)
    app.command("check", cls=sections)(check_command)
    app.command("sweep", cls=sections)(with_options(sweep_command))
    app.command("align", cls=sections)(with_options(align_command, *OF_ALIGN))
    app.command("inspect", cls=sections)(with_options(inspect_command, *OF_INSPECT))
    app.command("explain", cls=sections)(with_options(explain_command, *OF_EXPLAIN))
    app.command("evaluate", cls=sections)(evaluate_command)
    app.command("demo", cls=sections)(with_options(demo_command, *OF_DEMO))
    app.command("doctor")(doctor_command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"clafusion {clafusion.__version__}")
        raise typer.Exit


def _general(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if some of many pairs failed, 2 after bad input.

    After a fault of clafusion itself it is 3.

    After an interruption it is 130, after SIGTERM 143 and after SIGHUP 129.

    Every refusal is one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    arguments = [one for one in given if one not in ("--debug", *_QUIET)] or ["--help"]
    kept = "finished pairs are kept" if "fuse-pairs" in given else "no output was written"
    signals: list[int] = []
    TYPED.set(tuple(arguments))
    QUIET.set(any(one in _QUIET for one in given))
    try:
        with warnings.catch_warnings(), _signals_interrupt(signals):
            warnings.showwarning = _show_warning
            code = make_app()(arguments, prog_name="clafusion", standalone_mode=False)
            sys.stdout.flush()
        if code == 130:  # typer turns an interruption into this exit code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _refuse(f"interrupted; {kept}", 128 + (signals or [signal.SIGINT])[0], debug)
    except SystemExit as error:  # so click ends where the reader has gone
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return 0
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ClafusionError as error:
        return _refuse(str(error), 2, debug)
    except OSError as error:
        if not _is_of_stdout(error):
            return _refuse_fault(error, debug)
        writes = any(one.partition("=")[0] == "--out" for one in given)
        what = "the written file is whole" if writes else kept
        return _refuse(f"cannot print: {error.strerror or error}; {what}", 2, debug)
    except _UsageError as error:
        hint = advice(getattr(error, "option_name", None) or "")
        said = error.format_message()
        said += "" if said.endswith((".", "?")) else "."
        known = getattr(getattr(error, "ctx", None), "command_path", None) or "clafusion"
        return _refuse(f"{said}{hint} Try '{known} --help'.", 2, debug)
    except MemoryError as error:
        return _refuse(f"not enough memory: {error}; use fewer samples (--limit)", 2, debug)
    except Exception as error:
        if signals:  # a library made an error of its own of the interruption
            return _refuse(f"interrupted; {kept}", 128 + signals[0], debug)
        return _refuse_fault(error, debug)


def _refuse_fault(error: Exception, debug: bool) -> int:
    """Tell of a fault of ours."""
    what = " ".join(str(error).split())[:200]
    return _refuse(
        f"internal error: {type(error).__name__}: {what}. Please report it, with what the same "
        "command prints with --debug",
        3,
        debug,
    )


def _is_of_stdout(error: OSError) -> bool:
    """Say whether stdout takes nothing more, as a file on a full disk; drop what it still holds.

    What is written to a file of ours says so by an error of its own.
    """
    if error.filename is not None or error.errno not in _FULL:
        return False
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextlib.contextmanager
def _signals_interrupt(seen: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does; append what came to ``seen``."""

    def interrupt(number: int, _: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            one = getattr(signal, name, None)
            usual = (signal.SIG_DFL, signal.default_int_handler)  # not with nohup
            if one is not None and signal.getsignal(one) in usual:
                before[one] = signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _refuse(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"clafusion: {' '.join(message.split())}", file=sys.stderr)
    return code


_show_any_warning = warnings.showwarning


def _show_warning(
    message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    if issubclass(category, FusionWarning):
        print(f"clafusion: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _show_any_warning(message, category, *where, **more)


if __name__ == "__main__":
    sys.exit(main())
