"""The command `elbo`: arguments in, the packages' work done, results on standard output, errors in one line.

Every import of the packages stands inside the command that needs it, so that `elbo --help` answers at once.
"""

import csv
import importlib
import inspect as signatures
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from models.errors import ElboError, first_fault

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from models.artifact import Artifact
    from training.config import TrainConfig
    from training.data.table import Table

ASKED_WRONGLY = {"option_error", "data_error", "artifact_missing"}  # codes that exit with 2, as usage errors do

app = typer.Typer(
    help="Train PCA, autoencoders and variational autoencoders, and serve each as one file over HTTP.",
    epilog="Start here: elbo demo, then elbo serve. Every command explains itself: elbo train --help",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


class OptionError(ElboError):
    """An option or an ELBO_ environment variable has a value that it cannot have."""

    code = "option_error"


class Format(StrEnum):
    """How `elbo score` writes a row."""

    ndjson = "ndjson"
    csv = "csv"


def described_by(module: str, name: str, all_options: bool = False) -> type[TyperCommand]:
    """A command that shows the descriptions and defaults of a pydantic model's fields when it is asked for help.

    A field without an option is listed as the environment variable that sets it.

    Args:
        all_options: every field is an option; the command finds what was given, as text, in the context's `obj`.
    """

    def fields_of() -> dict[str, "FieldInfo"]:
        return dict(getattr(importlib.import_module(module), name).model_fields)

    class Described(TyperCommand):
        def get_params(self, ctx: Any) -> list[Any]:
            declared = super().get_params(ctx)
            if not all_options:
                return declared
            data, *others = declared
            return [data, *_options(fields_of()), *others]

        def invoke(self, ctx: Any) -> Any:
            if all_options:
                ctx.obj = {key: ctx.params.pop(key) for key in fields_of()}
            return super().invoke(ctx)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            fields = {} if all_options else fields_of()
            for option in self.params:
                if isinstance(option, TyperOption) and (field := fields.pop(option.name, None)):
                    option.help, option.default = field.description, _default(field)
            super().format_help(ctx, formatter)
            if fields:
                with formatter.section("Environment variables"):
                    formatter.write_dl([(f"ELBO_{key.upper()}", _described(field)) for key, field in fields.items()])

    return Described


def _options(fields: "dict[str, FieldInfo]") -> list[Any]:
    """An option for each field; its value stays text, or True, for pydantic to judge."""

    def command() -> None:
        """Stand for a command whose options typer makes."""

    parameters = []
    for name, field in fields.items():
        flag = field.annotation is bool
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=field.description if _default(field) is None else _described(field),
            metavar=None if flag else _metavar(field),
        )
        kind: Any = (
            Annotated[bool if flag else str, option]
            if field.is_required()
            else Annotated[bool | None if flag else str | None, option]
        )
        default = signatures.Parameter.empty if field.is_required() else None
        parameters.append(
            signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        )
    command.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks at first
    maker = typer.Typer(add_completion=False)
    maker.command()(command)
    return [option for option in typer.main.get_command(maker).params if option.name in fields]


def _metavar(field: "FieldInfo") -> str:
    """What may stand behind the option: `<int>`, `<mlp|conv>`, `<str,str,...>`."""
    words: list[str] = []
    union = get_origin(field.annotation) in (Union, UnionType)
    kinds: tuple[Any, ...] = get_args(field.annotation) if union else (field.annotation,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is tuple:
            first, *others = get_args(kind)
            words.append(f"{first.__name__},..." if Ellipsis in others else f"{first.__name__}>x<{first.__name__}")
        elif kind is not NoneType:
            words.append(kind.__name__)
    return f"<{'|'.join(words)}>"


def _default(field: "FieldInfo") -> Any:
    if field.is_required() or field.default is False or field.default == ():
        return None
    return ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default


def _described(field: "FieldInfo") -> str:
    return f"{field.description}  [default: {_default(field)}]"


Root = Annotated[
    Path, typer.Option("--artifacts", envvar="ELBO_ARTIFACTS", help="folder of artifacts: <name>/<version>/model.pt")
]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help='"digits", a file (.npy, .npz, .csv, .parquet) or a folder of pictures')
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a name, a name@version, or the path of a model.pt")]
Json = Annotated[bool, typer.Option("--json", help="for a machine")]
Runs = Annotated[Path, typer.Option("--runs", envvar="ELBO_RUNS", help="folder where runs keep their state: <name>/")]
DEFAULT_ROOT = Path("artifacts")


@app.command(
    cls=described_by("training.config", "TrainConfig", all_options=True),
    epilog="Examples: elbo train digits --model vae --name vae | "
    "elbo train metrics.csv --model pca --name hosts --latents 8",
)
def train(
    context: typer.Context,
    data: Data,
    artifacts: Root = DEFAULT_ROOT,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="continue the run of this name that was cut off")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="between two savings of the run's state")] = 30.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard's files too")] = False,
) -> None:
    """Train a model on DATA and publish it.

    The artifact becomes the next version of the model called --name. A run that was killed continues with --resume and
    the same options.
    """
    config = _config(context.obj)
    from training.data.table import read_table

    table = read_table(data, config.drop, config.keep, config.size)
    if _train(config, table, artifacts, runs, resume, checkpoint_seconds, tensorboard):
        where = "" if artifacts == DEFAULT_ROOT else f" --artifacts {artifacts}"
        typer.echo(f"next: elbo inspect {config.name}{where}, or elbo serve{where}")


def _config(arguments: dict[str, Any]) -> "TrainConfig":
    from training.config import TrainConfig

    options = {key: value for key, value in arguments.items() if value is not None}
    for key in {"hidden", "dense", "drop", "keep"} & options.keys():
        listed = options[key]
        options[key] = [] if listed == "none" else next(csv.reader([listed], skipinitialspace=True), [])
    if "size" in options:
        height, _, width = options["size"].partition("x")
        options["size"] = [height, width or height]
    with _option_errors(options):
        return TrainConfig.model_validate(options)


def _train(
    config: "TrainConfig",
    table: "Table",
    root: Path,
    runs: Path,
    resume: bool = False,
    seconds: float = 30.0,
    tensorboard: bool = False,
) -> bool:
    """Whether this is the process that speaks of the run."""
    from training.fitting.distributed import join_process_group
    from training.progress import reporter
    from training.train import train

    report = reporter()
    try:
        with join_process_group() as processes:
            path = train(config, table, root, report, runs, resume, seconds, tensorboard, processes)
    finally:
        report.close()
    if processes.is_first:
        typer.echo(f"published {config.name}@{path.parent.name}: {path}")
    return processes.is_first


@app.command(epilog="Example: elbo demo && elbo serve")
def demo(artifacts: Root = DEFAULT_ROOT, runs: Runs = Path("runs")) -> None:
    """Train the demonstration models that are missing.

    They are pca, ae and vae, trained on the bundled digits with the defaults, and linear, an autoencoder without hidden
    layers.
    """
    from models.manifest import versions
    from training.config import DEMONSTRATION

    missing = [config for config in DEMONSTRATION if not versions(artifacts, config.name)]
    if not missing:
        typer.echo(f"nothing to do: {artifacts} has {', '.join(config.name for config in DEMONSTRATION)}")
        return
    from training.data.table import read_table

    table = read_table("digits")
    for config in missing:
        _train(config, table, artifacts, runs)


@app.command(epilog="Examples: elbo inspect vae | elbo inspect vae@2 --json | elbo inspect artifacts/vae/2/model.pt")
def inspect(name: Name, json: Json = False, artifacts: Root = DEFAULT_ROOT) -> None:
    """Check an artifact's seal and say what it is."""
    from models.manifest import read_manifest
    from training.reports.describe import describe

    path = _path(name, artifacts)
    manifest = read_manifest(path)
    typer.echo(manifest.model_dump_json(indent=2) if json else describe(manifest, path))


@app.command(
    cls=described_by("service.settings", "Settings"),
    epilog="Example: elbo serve --port 9000",
)
def serve(
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    artifacts: Annotated[Path | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Serve the artifacts over HTTP.

    An option wins over the environment variable ELBO_ and its name, such as ELBO_PORT.
    """
    options = {key: value for key, value in locals().items() if value is not None}
    from service.settings import Settings

    with _option_errors(options):
        settings = Settings(**options)
    from service.server.run import serve

    serve(settings)


@app.command(epilog="Example: elbo evaluate vae digits")
def evaluate(
    name: Name,
    data: Data,
    draws: Annotated[int, typer.Option(min=1, help="of the importance-weighted log-likelihood, a row")] = 100,
    json: Json = False,
    artifacts: Root = DEFAULT_ROOT,
) -> None:
    """Judge a model on the rows of DATA.

    Errors of reconstruction, log-likelihood and rates of alarm; where labels (y or label) say 0 for normal and 1 for
    anomalous, also how well the score ranks.
    """
    from training.evaluation import evaluate

    artifact, table = _load(name, data, artifacts)
    evaluation = evaluate.evaluate(artifact, table, draws)
    typer.echo(evaluate.evaluation_json(evaluation) if json else evaluate.evaluation_text(evaluation))


@app.command(epilog="Examples: elbo score hosts today.csv --alpha 0.01 | elbo score hosts today.csv --format csv")
def score(
    name: Name,
    data: Data,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="false alarm rate that is accepted")] = 0.05,
    explain: Annotated[int, typer.Option(min=0, help="features to name a row, those that contribute most")] = 3,
    format_: Annotated[Format, typer.Option("--format", help="one JSON object a line, or CSV")] = Format.ndjson,
    artifacts: Root = DEFAULT_ROOT,
) -> None:
    """Say of every row of DATA how strange it is.

    Also whether it is an anomaly at alpha, and which features make it so. Rows count from 0.
    """
    from training.evaluation.score import csv_lines, ndjson_lines

    artifact, table = _load(name, data, artifacts)
    lines = csv_lines if format_ is Format.csv else ndjson_lines
    for text in lines(artifact, table, alpha, explain):
        sys.stdout.write(text)
        sys.stdout.flush()  # here, and not at exit: a reader that has gone ends the command quietly


@app.command(epilog="Examples: elbo calibrate hosts lastweek.csv | elbo calibrate hosts@3 lastweek.csv --alpha 0.01")
def calibrate(
    name: Name,
    data: Data,
    alpha: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="the smallest that alarms are asked at: takes 1/alpha - 1 rows")
    ] = 0.05,
    artifacts: Root = DEFAULT_ROOT,
    runs: Runs = Path("runs"),
) -> None:
    """Calibrate a model anew on recent normal rows, without training.

    The next version has the same networks, and the p-values of DATA. Where labels (y or label) are 0 and 1, the rows
    labelled 1 are left out. A server that runs takes it up by itself.
    """
    from training.publishing.recalibrate import recalibrate

    artifact, table = _load(name, data, artifacts)
    done = recalibrate(artifact, table, artifacts, alpha, runs)
    for note in done.notes:
        typer.echo(note, err=True)
    typer.echo(f"published {done.manifest.name}@{done.path.parent.name}: {done.path}")
    size = done.manifest.calibration
    typer.echo(f"calibrated on {size.rows:,} rows: p-values from {size.floor:.3g} on")


def _load(reference: str, data: str, root: Path) -> "tuple[Artifact, Table]":
    from models.artifact import load
    from training.data.table import read_for_model

    artifact = load(_path(reference, root))
    return artifact, read_for_model(data, artifact.manifest)


def _path(reference: str, root: Path) -> Path:
    from models.manifest import FILE_NAME, resolve

    path = Path(reference)
    is_path = path.is_file() or len(path.parts) > 1 or path.name == FILE_NAME
    return path if is_path else resolve(root, reference)


@contextmanager
def _option_errors(options: Collection[str]) -> Iterator[None]:
    """Raise OptionError in place of pydantic's ValidationError, naming the option or environment variable at fault.

    Args:
        options: the fields that were given as options; the other fields come from environment variables.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        fault = first_fault(error)
        field = fault.path[0] if fault.path else "settings"
        title = f"--{field.replace('_', '-')}" if field in options else f"ELBO_{field.upper()}"
        message = f"{title}: {fault.message}, got {fault.value!r}; elbo COMMAND --help lists the valid values"
        raise OptionError(message) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's."""
    try:
        app(args=arguments, prog_name="elbo")
    except ElboError as error:
        message = " ".join(str(error).split())
        print(f"elbo: error: {message}", file=sys.stderr)
        sys.exit(2 if error.code in ASKED_WRONGLY else 1)
    except SystemExit as end:
        if end.code == 130:  # typer's answer to SIGINT
            print("elbo: interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
