"""The command `elbo`: arguments in, the packages' work done, results on standard output, errors in one line.

Every import of the packages stands inside the command that needs it, so that `elbo --help` answers at once.
"""

import importlib
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from models.errors import ElboError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from models.artifact import Artifact
    from training.config import TrainConfig
    from training.data import Table

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


def described_by(module: str, name: str) -> type[TyperCommand]:
    """A command that shows the descriptions and defaults of a pydantic model's fields when it is asked for help.

    A field without an option is listed as the environment variable that sets it.
    """

    class Described(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            fields = dict(getattr(importlib.import_module(module), name).model_fields)
            for option in self.params:
                if isinstance(option, TyperOption) and (field := fields.pop(option.name, None)):
                    option.help, option.default = field.description, _default(field)
            super().format_help(ctx, formatter)
            if fields:
                with formatter.section("Environment variables"):
                    formatter.write_dl([(f"ELBO_{key.upper()}", _described(field)) for key, field in fields.items()])

    return Described


def _default(field: "FieldInfo") -> Any:
    if field.is_required():
        return None
    return ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default


def _described(field: "FieldInfo") -> str:
    return f"{field.description}  [default: {_default(field)}]"


Root = Annotated[
    Path, typer.Option("--artifacts", envvar="ELBO_ARTIFACTS", help="folder of artifacts: <name>/<version>/model.pt")
]
Data = Annotated[str, typer.Argument(metavar="DATA", help='"digits", or a file: .npy, .npz, .csv or .parquet')]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a name, a name@version, or the path of a model.pt")]
Json = Annotated[bool, typer.Option("--json", help="for a machine")]
Runs = Annotated[Path, typer.Option("--runs", envvar="ELBO_RUNS", help="folder where runs keep their state: <name>/")]
DEFAULT_ROOT = Path("artifacts")


@app.command(
    cls=described_by("training.config", "TrainConfig"),
    epilog="Examples: elbo train digits --model vae --name vae | "
    "elbo train metrics.csv --model pca --name hosts --latents 8",
)
def train(
    data: Data,
    model: Annotated[str, typer.Option()],
    name: Annotated[str, typer.Option()],
    seed: Annotated[int | None, typer.Option()] = None,
    latents: Annotated[int | None, typer.Option()] = None,
    hidden: Annotated[str | None, typer.Option(metavar="<int,int,...|none>")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    beta: Annotated[float | None, typer.Option()] = None,
    likelihood: Annotated[str | None, typer.Option()] = None,
    scale: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
    variance: Annotated[str | None, typer.Option()] = None,
    l2: Annotated[float | None, typer.Option()] = None,
    patience: Annotated[int | None, typer.Option()] = None,
    noise: Annotated[float | None, typer.Option()] = None,
    masking: Annotated[float | None, typer.Option()] = None,
    warm_up: Annotated[int | None, typer.Option()] = None,
    free_bits: Annotated[float | None, typer.Option()] = None,
    samples: Annotated[int | None, typer.Option()] = None,
    artifacts: Root = DEFAULT_ROOT,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="continue the run of this name that was cut off")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="between two savings of the run's state")] = 30.0,
) -> None:
    """Train a model on DATA and publish it.

    The artifact becomes the next version of the model called --name. A run that was killed continues with --resume and
    the same options.
    """
    config = _config(locals())
    from training.data import read

    _train(config, read(data), artifacts, runs, resume, checkpoint_seconds)
    where = "" if artifacts == DEFAULT_ROOT else f" --artifacts {artifacts}"
    typer.echo(f"next: elbo inspect {name}{where}, or elbo serve{where}")


def _config(arguments: dict[str, Any]) -> "TrainConfig":
    from training.config import TrainConfig

    options = {key: value for key, value in arguments.items() if key in TrainConfig.model_fields and value is not None}
    if "hidden" in options:
        widths = options["hidden"]
        options["hidden"] = [] if widths == "none" else [width.strip() for width in widths.split(",")]
    with _one_line(options):
        return TrainConfig.model_validate(options)


def _train(
    config: "TrainConfig", table: "Table", root: Path, runs: Path, resume: bool = False, seconds: float = 30.0
) -> None:
    from training.progress import reporter
    from training.train import train

    report = reporter()
    try:
        path = train(config, table, root, report, runs, resume, seconds)
    finally:
        report.close()
    typer.echo(f"published {config.name}@{path.parent.name}: {path}")


@app.command(epilog="Example: elbo demo && elbo serve")
def demo(artifacts: Root = DEFAULT_ROOT, runs: Runs = Path("runs")) -> None:
    """Train the demonstration models that are missing.

    They are pca, ae and vae, trained on the bundled digits with the defaults.
    """
    from models.manifest import versions
    from training.config import KINDS, TrainConfig

    missing = [kind for kind in KINDS if not versions(artifacts, kind)]
    if not missing:
        typer.echo(f"nothing to do: {artifacts} has {', '.join(KINDS)}")
        return
    from training.data import read

    table = read("digits")
    for kind in missing:
        _train(TrainConfig(model=kind, name=kind), table, artifacts, runs)


@app.command(epilog="Examples: elbo inspect vae | elbo inspect vae@2 --json | elbo inspect artifacts/vae/2/model.pt")
def inspect(name: Name, json: Json = False, artifacts: Root = DEFAULT_ROOT) -> None:
    """Check an artifact's seal and say what it is."""
    from models.manifest import read_manifest
    from training.describe import describe

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

    with _one_line(options):
        settings = Settings(**options)
    from service.server import serve

    serve(settings)


@app.command(epilog="Example: elbo evaluate vae digits")
def evaluate(name: Name, data: Data, json: Json = False, artifacts: Root = DEFAULT_ROOT) -> None:
    """Judge a model on the rows of DATA.

    Errors of reconstruction and rates of alarm; where labels (y or label) say 0 for normal and 1 for anomalous, also
    how well the score ranks.
    """
    from training import apply

    artifact, table = _load(name, data, artifacts)
    evaluation = apply.evaluate(artifact, table)
    typer.echo(apply.evaluation_json(evaluation) if json else apply.evaluation_text(evaluation))


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
    from training import apply

    artifact, table = _load(name, data, artifacts)
    lines = apply.csv_lines if format_ is Format.csv else apply.ndjson
    for text in lines(artifact, table, alpha, explain):
        sys.stdout.write(text)
        sys.stdout.flush()  # here, and not at exit: a reader that has gone ends the command quietly


def _load(reference: str, data: str, root: Path) -> "tuple[Artifact, Table]":
    from models.artifact import load
    from training.data import read_like

    artifact = load(_path(reference, root))
    return artifact, read_like(data, artifact.manifest)


def _path(reference: str, root: Path) -> Path:
    from models.manifest import FILE_NAME, resolve

    path = Path(reference)
    is_path = path.is_file() or len(path.parts) > 1 or path.name == FILE_NAME
    return path if is_path else resolve(root, reference)


@contextmanager
def _one_line(options: Collection[str]) -> Iterator[None]:
    """The first of pydantic's complaints, about one of `options` or an environment variable, as an OptionError."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        title = f"--{field.replace('_', '-')}" if field in options else f"ELBO_{field.upper()}"
        complaint = first["msg"][0].lower() + first["msg"][1:]
        raise OptionError(f"{title}: {complaint}, got {first['input']!r}; elbo COMMAND --help explains it") from error


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
