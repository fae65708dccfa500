"""The entry point: commands gathered, errors turned into one line and an exit status."""

import sys
import warnings
from collections.abc import Callable

import typer

from kompakt.cli.analyze import analyze
from kompakt.cli.bench import bench
from kompakt.cli.compress import compress_command
from kompakt.cli.demo import demo
from kompakt.cli.distill import distill
from kompakt.cli.export import check, export
from kompakt.cli.flatten import flatten
from kompakt.cli.inspect import inspect
from kompakt.cli.pack import pack, unpack
from kompakt.cli.pick import pick_command
from kompakt.cli.prune import finetune, prune
from kompakt.cli.quantize import quantize
from kompakt.cli.report import report
from kompakt.errors import KompaktError

# Typer brings its own copy of click and does not export the root of its usage errors.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="kompakt",
    help="Make trained neural networks small and fast, measured on the artifact that ships.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "inspect": inspect,
    "analyze": analyze,
    "compress": compress_command,
    "pick": pick_command,
    "quantize": quantize,
    "prune": prune,
    "distill": distill,
    "finetune": finetune,
    "pack": pack,
    "unpack": unpack,
    "export": export,
    "check": check,
    "bench": bench,
    "report": report,
}
for name, command in COMMANDS.items():
    app.command(name)(flatten(command))


def main() -> None:
    """Run the command line: 0 done, 2 bad input, 3 budget not met."""
    warnings.simplefilter("ignore")  # libraries' warnings are for developers; the tests run with them as errors
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KompaktError as error:
        sys.exit(_say(str(error), BAD_INPUT))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("interrupted", INTERRUPTED))
    except _UsageError as error:
        sys.exit(_say(error.format_message(), BAD_INPUT))  # type: ignore[attr-defined]


def _say(text: str, status: int) -> int:
    print(f"kompakt: {text}", file=sys.stderr)
    return status
