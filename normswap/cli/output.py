"""What a verb prints and where, and how errors become exit codes."""

import json
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NoReturn

import click

from normswap import errors
from normswap.texts import plain, plain_lines

FAILED, USAGE, NOTHING, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES: tuple[tuple[type[errors.NormswapError], int], ...] = (
    (errors.NothingToConvert, NOTHING),
    (errors.InvalidOption, USAGE),
    (errors.UnknownModel, USAGE),
    (errors.NormswapError, FAILED),
)


TYPED = "normswap.typed"
"""Where the words that were typed are kept, in a context of click's."""


def command_line() -> str:
    """Return the command that runs, as a shell reads it."""
    return shlex.join(["normswap", *click.get_current_context().meta[TYPED]])


class UnwrittenResult(Exception):
    """Standard output takes no more: its disk is full."""


class Output:
    """Where a verb's result goes: one JSON object or text on stdout; notes on stderr, for a terminal only."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def result(self, data: dict[str, Any], text: str) -> None:
        """Print the result."""
        try:
            if self.as_json:
                click.echo(json.dumps({"schema": 1, **data}))
            elif not self.quiet:
                self.text(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnwrittenResult(error.strerror) from error

    def text(self, text: str) -> None:
        """Print text that may quote names from networks and files."""
        click.echo(plain_lines(text))

    def note(self, text: str) -> None:
        """Say what is going on to a person who waits."""
        if sys.stderr.isatty() and not self.quiet and not self.as_json:
            click.echo(plain(text), err=True)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json and -q to a verb, and turn errors into one line and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @wraps(function)
    def wrapped(as_json: bool, quiet: bool, **arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always", errors.CheckpointAdapted)
            warnings.simplefilter("error", errors.AlreadyConverted)
            warnings.showwarning = partial(_warn, warnings.showwarning)
            try:
                function(Output(as_json, quiet), **arguments)
            except errors.AlreadyConverted as warning:
                fail(errors.NothingToConvert(str(warning)), as_json)
            except errors.NormswapError as error:
                fail(error, as_json)

    return wrapped


def fail(error: errors.NormswapError, as_json: bool) -> NoReturn:
    """Print an error and exit with its code."""
    data = {"schema": 1, "error": {"type": type(error).__name__, "message": str(error)}}
    if as_json:
        click.echo(json.dumps({**getattr(error, "partial", {}), **data}))
    else:
        click.echo(f"normswap: {error}", err=True)
    sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))


def _warn(usual: Callable[..., None], message: Warning, category: type[Warning], *where: Any, **rest: Any) -> None:
    """Print our own warnings in a line, without the place in the code."""
    if issubclass(category, errors.CheckpointAdapted):
        click.echo(f"normswap: {message}", err=True)
    else:
        usual(message, category, *where, **rest)
