"""What a verb prints and where, and how errors become exit codes."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial, wraps
from typing import Any

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
AS_JSON = "--json"


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
        self._data: dict[str, Any] = {}

    def result(self, data: dict[str, Any], shown: object) -> None:
        """Print a result as text at once; as JSON in the one object that `close` prints.

        Args:
            data: JSON data.
            shown: What `str` makes text of, as it goes to files and pipes; what has `__rich__` fits a terminal.
        """
        self._data |= data
        if self.as_json or self.quiet:
            return
        if sys.stdout.isatty() and hasattr(shown, "__rich__"):
            from rich.console import Console

            _written(partial(Console(highlight=False).print, shown))
        else:
            _print(plain_lines(str(shown)))

    def close(self, **more: Any) -> None:
        """Print the JSON object."""
        data, self._data = {**self._data, **more}, {}
        if self.as_json and data:
            _print(json.dumps({"schema": 1, **data}))

    def note(self, text: str) -> None:
        """Say what is going on to a person who waits."""
        if sys.stderr.isatty() and not self.quiet and not self.as_json:
            click.echo(plain(text), err=True)

    def fail(self, error: errors.NormswapError) -> int:
        """Print an error, after what was found before it; return its exit code."""
        code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
        if self.as_json:
            self.close(error=described(error, str(error), code))
        else:
            click.echo(f"normswap: {error}", err=True)
        return code


class Verbs(click.Group):
    """The command line, which says in one way or as one object what went wrong, wherever that was."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words before they are taken apart."""
        ctx.meta[TYPED] = tuple(args)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs with all of their summaries, which click cuts off."""
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=999)) for name, verb in verbs if verb])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a verb and end the process with its exit code; as JSON where that is asked for, usage errors too."""
        run: Callable[[], Any] = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        as_json = AS_JSON in (sys.argv[1:] if args is None else args)
        try:
            code = run()
        except click.exceptions.Abort:
            click.echo("normswap: interrupted; nothing was written half", err=True)
            code = INTERRUPTED
        except click.ClickException as error:
            code = error.exit_code
            if as_json:
                _print(json.dumps({"schema": 1, "error": described(error, error.format_message(), code)}))
            else:
                error.show()
        except BrokenPipeError:
            code = FAILED
        except UnwrittenResult as error:
            click.echo(f"normswap: the result cannot be printed ({error}); print it elsewhere", err=True)
            sys.stdout = None  # what is left in its buffer has no place to go
            code = FAILED
        sys.exit(code if isinstance(code, int) else 0)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Add --json and -q to a verb, and turn errors into one line and an exit code."""

    @click.option(AS_JSON, "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @wraps(function)
    def wrapped(as_json: bool, quiet: bool, **arguments: Any) -> None:
        out = Output(as_json, quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("always", errors.CheckpointAdapted)
            warnings.simplefilter("error", errors.AlreadyConverted)
            warnings.showwarning = partial(_warn, warnings.showwarning)
            try:
                with redirect_stdout(sys.stderr) if as_json else nullcontext():  # networks print, too
                    function(out, **arguments)
            except errors.AlreadyConverted as warning:
                sys.exit(out.fail(errors.NothingToConvert(str(warning))))
            except errors.NormswapError as error:
                sys.exit(out.fail(error))
            finally:  # what was found before anything else fails is said
                out.close()

    return wrapped


def described(error: Exception, message: str, code: int) -> dict[str, Any]:
    """Return an error as JSON data."""
    return {"type": type(error).__name__, "message": message, "exit_code": code}


def given(names: Sequence[str]) -> list[str]:
    """Return those of a verb's options, by parameter name, that were typed, spelled as they are typed."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    typed = {name for name in names if context.get_parameter_source(name) not in (None, default)}
    spelled = {p.name: max(p.opts, key=len) for p in context.command.params}
    return [spelled[name] for name in names if name in typed]


def _print(text: str) -> None:
    _written(partial(click.echo, text))


def _written(write: Callable[[], None]) -> None:
    """Write to standard output.

    Raises:
        UnwrittenResult: It takes no more.
    """
    try:
        write()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnwrittenResult(error.strerror) from error


def _warn(usual: Callable[..., None], message: Warning, category: type[Warning], *where: Any, **rest: Any) -> None:
    """Print our own warnings in a line, without the place in the code."""
    if issubclass(category, errors.CheckpointAdapted):
        click.echo(f"normswap: {message}", err=True)
    else:
        usual(message, category, *where, **rest)
