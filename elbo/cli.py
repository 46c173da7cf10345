"""The command line `elbo`. Results go to standard output; an error is one line on standard error.

Each command imports the packages that it needs when it runs, so that `elbo --help` starts fast.
"""

import csv
import importlib
import inspect as introspection
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from elbo.errors import OptionError
from models.errors import ElboError, first_fault, printable, printable_lines

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from models.artifact import Artifact
    from models.keys import PrivateKey
    from models.policy_rules import Policy
    from models.signatures import TrustedKeys
    from training.config import TrainConfig
    from training.data.table import Table

USAGE_ERRORS = {
    "option_error",
    "data_error",
    "artifact_missing",
    "artifact_name_invalid",
    "artifact_unreadable",
    "key_file_error",
    "key_invalid",
    "incidents_invalid",
    "repository_invalid",
    "copy_conflict",
}  # errors with these codes exit with status 2

OWN_PACKAGES = {"models", "training", "service", "elbo"}
TRAINING_PACKAGES = {"matplotlib", "onnx", "polars", "scipy", "sklearn", "threadpoolctl"}  # of the extra `train` only

app = typer.Typer(
    epilog="Start here: elbo demo, then elbo serve. Every command has its own help: elbo train --help",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"elbo {version('elbo')}")
        raise typer.Exit


@app.callback()
def _options_without_command(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train PCA, autoencoders and variational autoencoders, and serve them over HTTP."""


class Escape(StrEnum):
    """How a CSV file writes a quotation mark inside a quoted cell: twice, or after a backslash."""

    double = "double"
    backslash = "backslash"


class ExportFormat(StrEnum):
    """FORMATS of `training.exporting.export`, which this module does not import."""

    ONNX = "onnx"
    ONNX_PIPELINE = "onnx-pipeline"
    PT2 = "pt2"


class KeyScope(StrEnum):
    """The scopes of an API key, as in `service/access/scopes.py`."""

    infer = "infer"
    write = "write"
    metrics = "metrics"
    admin = "admin"


class Format(StrEnum):
    """Output formats of `elbo score`."""

    ndjson = "ndjson"
    csv = "csv"
    parquet = "parquet"


class Engine(StrEnum):
    """Where parallel work runs."""

    local = "local"
    ray = "ray"


class Spread(StrEnum):
    """What an adopted encoder returns besides the mean."""

    log_variance = "log_variance"
    std = "std"


class PriorKind(StrEnum):
    """The prior of an adopted model."""

    fitted = "fitted"
    standard = "standard"


def described_by(module: str, name: str, all_options: bool = False) -> type[TyperCommand]:
    """Return a command class whose --help shows the descriptions and defaults of a pydantic model's fields.

    Fields that are not options of the command are listed as environment variables.

    Args:
        module: the module that defines the pydantic model; imported only for --help, or if `all_options` is true.
        name: name of the pydantic model.
        all_options: whether every field is an option of the command. The command then reads the values of these
            options, as text, from `context.obj`.
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
    """Return one option per field. Values stay text (or True, for a flag); pydantic validates them later."""

    def command() -> None:
        """Carry the signature from which typer creates the options."""

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
        default = introspection.Parameter.empty if field.is_required() else None
        parameters.append(
            introspection.Parameter(name, introspection.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        )
    command.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]  # inspect.signature reads this
    factory = typer.Typer(add_completion=False)
    factory.command()(command)
    return [option for option in typer.main.get_command(factory).params if option.name in fields]


def _metavar(field: "FieldInfo") -> str:
    """Return the placeholder for the option's value: `<int>`, `<mlp|conv>`, `<str,...>`."""
    words: list[str] = []
    union = get_origin(field.annotation) in (Union, UnionType)
    kinds: tuple[Any, ...] = get_args(field.annotation) if union else (field.annotation,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is tuple:
            first, *others = get_args(kind)
            if get_origin(first) is Literal:
                words.append(f"{'|'.join(get_args(first))},...")
                continue
            words.append(f"{first.__name__},..." if Ellipsis in others else f"{first.__name__}>x<{first.__name__}")
        elif kind is not NoneType:
            words.append(kind.__name__)
    return f"<{'|'.join(words)}>"


def _default(field: "FieldInfo") -> Any:
    if isinstance(field.json_schema_extra, dict) and "command_default" in field.json_schema_extra:
        return field.json_schema_extra["command_default"]
    if field.is_required() or field.default is False or field.default == ():
        return None
    return ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default


def _described(field: "FieldInfo") -> str:
    return f"{field.description}  [default: {_default(field)}]"


def _require_folder(path: Path) -> Path:
    """Return `path`. Raise OptionError if it is the URL of a remote repository, of which a Path has dropped a slash."""
    from service.repository.location import is_url

    if is_url(str(path)):
        url = str(path).replace(":/", "://", 1)
        raise OptionError(
            f"--artifacts: expected a folder, got {url}: this command works with a local artifact folder. Copy models "
            f"from there with elbo pull {url} --artifacts artifacts, and to there with elbo push {url} --artifacts "
            "artifacts"
        )
    return path


ArtifactFolder = Annotated[
    Path,
    typer.Option(
        "--artifacts",
        envvar="ELBO_ARTIFACTS",
        callback=_require_folder,
        help="artifact folder: <name>/<version>/model.pt",
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help='a file (.npy, .npz, .csv, .parquet), a folder of images, or bundled data: "digits", "simulated-hosts" '
        '(five normal weeks of ten hosts) or "simulated-hosts-later" (the next week, with labelled incidents)',
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a model (name or name@version), or the path of a model.pt")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Runs = Annotated[
    Path,
    typer.Option("--runs", envvar="ELBO_RUNS", help="folder for checkpoints and reports of training runs: <name>/"),
]
PlotsOption = Annotated[
    bool,
    typer.Option(
        "--plots/--no-plots",
        envvar="ELBO_PLOTS",
        help="draw the plots of the run, which takes longer than training a small model",
    ),
]
ScoredTimeOption = Annotated[
    str | None,
    typer.Option(metavar="<column>", help="column with the time of the row; default: as trained, or timestamp"),
]
ScoredGroupOption = Annotated[
    str | None,
    typer.Option(metavar="<column>", help="column with the group of the row; default: as trained, or host"),
]
EscapeOption = Annotated[
    Escape | None,
    typer.Option(
        "--escape", help='quotation marks in quoted CSV cells: double ("") or backslash (\\"); default: as trained'
    ),
]
NormalOption = Annotated[
    str | None,
    typer.Option(
        "--normal",
        metavar="LABEL,...",
        help="labels that mean normal; default: recognised, such as good, ok, normal, 0, false",
    ),
]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="sign the new version with the private key in this file (elbo keygen)"),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="TOML file with the policy of the model: which deviations matter, valid ranges, silences, and how many "
        "alarms there may be",
    ),
]
IncidentRowsOption = Annotated[
    int | None,
    typer.Option(
        min=30,
        max=1000,
        help="after this many consecutive rows of a group, an incident counts as a change: from then on, such rows are "
        "judged as usual; default: as the model says (elbo train --incident-rows)",
    ),
]
TrustedKeysOption = Annotated[
    str | None,
    typer.Option(
        "--trusted-keys",
        envvar="ELBO_TRUSTED_KEYS",
        metavar="KEYS",
        help="file of public keys, or the keys themselves; accept only artifacts that one of these keys has signed",
    ),
]
DEFAULT_ARTIFACTS = Path("artifacts")
DEFAULT_EXPORTS = Path("exports")


@app.command(
    cls=described_by("training.config", "TrainConfig", all_options=True),
    epilog="Examples: elbo train digits --model vae --name vae | "
    "elbo train metrics.csv --model pca --name hosts --latents 8",
)
def train(
    context: typer.Context,
    data: Data,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run of this name")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="seconds between checkpoints")] = 30.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="also write TensorBoard event files")] = False,
    plots: PlotsOption = True,
    replace_features: Annotated[
        bool,
        typer.Option("--replace-features", help="publish even if the newest version of this name has other features"),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="publish even if the model is worse than predicting the mean or, with --sweep and --per-group, no "
            "better than the served version; with --per-group, train unchanged groups too",
        ),
    ] = False,
    sign: SignOption = None,
    policy: PolicyOption = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="OPTION=VALUE,...",
            help="train a model for each value, and for each combination if repeated; publish the best if it is better "
            "than the served version",
        ),
    ] = None,
    per_group: Annotated[
        bool,
        typer.Option(
            "--per-group",
            help="train a model NAME-GROUP for each value of the column --group; publish each if it is better than its "
            "served version",
        ),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(help="where the models of --sweep or --per-group are trained: local (one after another) or ray"),
    ] = Engine.local,
) -> None:
    """Train a model on DATA and publish it.

    The artifact becomes the next version of the model --name. To continue an interrupted run, repeat the command with
    --resume and the same options.
    """
    config = _train_config(context.obj)
    key = _private_key(sign)
    if sweep or per_group:
        kind = "--sweep" if sweep else "--per-group"
        given = {"--resume": resume, "--tensorboard": tensorboard, "--policy": policy is not None}
        given["--per-group"] = bool(sweep) and per_group
        if unusable := [option for option, value in given.items() if value]:
            raise OptionError(f"{unusable[0]} is not for {kind}: leave one of them out")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise OptionError(f"{kind} trains many models, and torchrun trains one: add --engine ray, without torchrun")
    if per_group:
        _train_groups(config, data, artifacts, runs, engine, force=force, replace_features=replace_features, key=key)
        return
    if sweep:
        _sweep(
            context.obj, sweep, data, artifacts, runs, engine, force=force, replace_features=replace_features, key=key
        )
        return
    if engine is not Engine.local:
        raise OptionError("--engine is for --sweep and --per-group: a single model is trained on this machine")
    from training.train import read

    table = read(data, config)
    rules = _policy(policy, table.names, table.units)
    try:
        is_first_process = _train(
            config,
            table,
            artifacts,
            runs,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            plots=plots,
            force=force,
            replace_features=replace_features,
            key=key,
            policy=rules,
        )
    except KeyboardInterrupt:
        from training.train import can_resume

        if can_resume(config, table, runs):
            typer.echo("the run is saved: to continue it, repeat the command with --resume", err=True)
        raise
    if is_first_process:
        where = "" if artifacts == DEFAULT_ARTIFACTS else f" --artifacts {artifacts}"
        typer.echo(f"next: elbo inspect {config.name}{where}, or elbo serve{where}")


def _sweep(
    arguments: dict[str, Any],
    texts: Sequence[str],
    data: str,
    artifacts: Path,
    runs: Path,
    engine: Engine,
    *,
    force: bool,
    replace_features: bool,
    key: "PrivateKey | None",
) -> None:
    """Train the models of a sweep, print and write the table of results, and publish the best. See `run_sweep`."""
    from models.staging import staging_folder
    from training import sweep

    trials = [
        sweep.Trial(index, options, _train_config(arguments | options))
        for index, options in enumerate(sweep.parse_sweep(texts))
    ]
    base = _train_config(arguments)
    train_all: sweep.Engine = sweep.train_locally
    if engine is Engine.ray:
        from training.ray_tasks import train_on_ray

        train_all = train_on_ray

        data = str(Path(data).absolute()) if Path(data).exists() else data
    folder = runs / base.name
    folder.mkdir(parents=True, exist_ok=True)
    done = 0

    def show(result: sweep.TrialResult) -> None:
        nonlocal done
        done += 1
        typer.echo(f"{done}/{len(trials)} {result.trial.label}: {result.error or f'{result.seconds:.1f} s'}", err=True)

    with staging_folder(folder.absolute()) as staging:
        found = sweep.run_sweep(
            trials,
            data,
            artifacts,
            staging,
            train_all,
            split_seed=base.seed,
            force=force,
            replace_features=replace_features,
            key=key,
            show=show,
        )
    page = folder / "sweep.html"
    _write(page, sweep.sweep_page(found, base.name))
    typer.echo(printable_lines(sweep.format_table(found)))
    typer.echo(f"{sweep.describe(found, base.name)}; page: {page}")
    if found.path is not None:
        _note_missing_signature(found.path)


def _train_groups(
    config: "TrainConfig",
    data: str,
    artifacts: Path,
    runs: Path,
    engine: Engine,
    *,
    force: bool,
    replace_features: bool,
    key: "PrivateKey | None",
) -> None:
    """Train a model for each group, publish each, and print and write the table of results. See `run_groups`."""
    from training import groups
    from training.train import read

    if config.group is None:
        raise OptionError("--per-group trains a model for each value of the column --group: add --group and --time")
    train_all: groups.Engine = groups.train_here
    if engine is Engine.ray:
        from training.ray_tasks import train_groups_on_ray

        train_all = train_groups_on_ray
    table = read(data, config)
    for note in [*table.notes, *table.warnings]:
        typer.echo(note, err=True)
    total = 1 if table.timeline is None else len(table.timeline.groups)
    done = 0

    def show(result: groups.GroupResult) -> None:
        nonlocal done
        done += 1
        typer.echo(f"{done}/{total} {result.trained.name}: {result.describe()}", err=True)

    found = groups.run_groups(
        config, table, artifacts, train_all, force=force, replace_features=replace_features, key=key, show=show
    )
    folder = runs / config.name
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "groups.html"
    _write(page, groups.groups_page(found, config.name))
    typer.echo(printable_lines(groups.format_groups(found)))
    typer.echo(f"{groups.count_states(found)}; page: {page}")
    first = next((result for result in found if result.state == groups.PUBLISHED), None)
    if first is not None:  # one note is enough: all are signed, or none
        _note_missing_signature(artifacts / first.trained.name / str(first.version) / "model.pt")


def _train_config(arguments: dict[str, Any]) -> "TrainConfig":
    """Return the configuration for `arguments`, the values of the options as text. None: the option was not given."""
    from training.config import COLUMN_OPTIONS, TrainConfig

    options = {key: value for key, value in arguments.items() if value is not None}
    if options.get("calibration") is None:
        options["calibration"] = _default(TrainConfig.model_fields["calibration"])
    for key in {"hidden", "dense", *COLUMN_OPTIONS} & options.keys():
        text = options[key]
        options[key] = [] if text == "none" else next(csv.reader([text], skipinitialspace=True), [])
    if "size" in options:
        height, _, width = options["size"].partition("x")
        options["size"] = [height, width or height]
    with _option_errors(options):
        return TrainConfig.model_validate(options)


def _train(
    config: "TrainConfig",
    table: "Table",
    artifacts: Path,
    runs: Path,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    tensorboard: bool = False,
    plots: bool = True,
    force: bool = False,
    replace_features: bool = False,
    key: "PrivateKey | None" = None,
    policy: "Policy | None" = None,
) -> bool:
    """Train and publish a model. Return whether this process is the first of those that train together."""
    from training.fitting.distributed import join_process_group
    from training.progress import reporter
    from training.train import train

    report = reporter()
    try:
        with join_process_group() as processes:
            path = train(
                config,
                table,
                artifacts,
                report,
                runs=runs,
                resume=resume,
                checkpoint_seconds=checkpoint_seconds,
                tensorboard=tensorboard,
                plots=plots,
                force=force,
                replace_features=replace_features,
                processes=processes,
                key=key,
                policy=policy,
            )
    finally:
        report.close()
    if processes.is_first:
        typer.echo(f"published {config.name}@{path.parent.name}: {path}")
        _note_missing_signature(path)
    return processes.is_first


@app.command(
    epilog="Examples: elbo adopt model.py:build --weights w.pt --scaler scaler.joblib --calibrate normal.csv "
    "--name web | elbo adopt model.onnx --calibrate normal.csv --name web"
)
def adopt(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="the trained network: FILE.py:FUNCTION (a function without arguments that returns a torch.nn.Module), "
            "an ONNX file (.onnx), a program of torch.export (.pt2) or a TorchScript file; with --allow-pickle also a "
            "network that torch.save has pickled, or an estimator of scikit-learn (.joblib, .pkl). All of them except "
            "ONNX files are programs: give only files that you trust",
        ),
    ],
    calibrate: Annotated[
        str,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            help="normal rows that did not train the network: a file (.npy, .npz, .csv, .parquet), a folder of images, "
            "or bundled data",
        ),
    ],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="name of the model")],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="weights of the network that FILE.py:FUNCTION builds: .safetensors, or what torch.save has written "
            "from its state_dict",
        ),
    ] = None,
    scaler: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="scaler of scikit-learn that the network was trained with (.joblib, .pkl), or mean and scale (.json, "
            ".npz). A .joblib or .pkl file is a pickle, which can run any code when it is read: give only a file that "
            "you trust",
        ),
    ] = None,
    fit_rows: Annotated[
        str | None,
        typer.Option(
            "--fit-rows",
            metavar="DATA",
            help="rows that trained the network, for the prior and the explanation; default: a part of --calibrate",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="<int>x...",
            help="shape of one row as the network takes it, such as 1x28x28 or 30x8 (30 steps of 8 features); default: "
            "that of the file",
        ),
    ] = None,
    encode: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="method or part of the network that encodes, if it is not called encode or encoder; for an ONNX file, "
            "the value that is the code",
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="method or part that decodes, if it is not called decode or decoder"),
    ] = None,
    spread: Annotated[
        Spread | None,
        typer.Option(
            help="what the encoder returns besides the mean; default: log_variance if a value is negative, else std"
        ),
    ] = None,
    prior: Annotated[
        PriorKind, typer.Option(help="distribution of the latents of samples: fitted to the rows, or standard normal")
    ] = PriorKind.fitted,
    drop: Annotated[
        str | None, typer.Option(metavar="<str,...>", help="columns to leave out, such as identifiers")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="<str,...>", help="columns that are measurements although they look like identifiers"),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="<str,...>", help="columns of labels, which are no features; default: recognised"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="<int>x<int>", help="resize the images of a folder to height x width")
    ] = None,
    escape: EscapeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the split of the rows and of the prior")] = 0,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="read MODEL and --weights even if they are pickles of Python objects. A pickle can run any code when "
            "it is read, with all your rights: give only files that you trust",
        ),
    ] = False,
    replace_features: Annotated[
        bool,
        typer.Option("--replace-features", help="publish even if the newest version of this name has other features"),
    ] = False,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    sign: SignOption = None,
) -> None:
    """Publish a network that was trained elsewhere, with its scaler, as the next version of the model --name.

    The artifact has all that a trained model has: calibration, explanation, prior, card. Neither the code of the
    network nor the library that trained it is needed to serve the artifact.
    """
    key = _private_key(sign)
    options: dict[str, Any] = {"shape": _sizes("--shape", shape), "size": _sizes("--size", size, 2)}
    options |= {key: _words(text) for key, text in (("drop", drop), ("keep", keep), ("label", label))}
    from training.adoption.from_files import adopt_files
    from training.progress import reporter

    report = reporter()
    try:
        path = adopt_files(
            model,
            calibrate,
            name=name,
            artifacts=artifacts,
            report=report,
            weights=weights,
            scaler=scaler,
            fit_rows=fit_rows,
            encode=encode,
            decode=decode,
            spread=None if spread is None else spread.value,
            prior=prior.value,
            escape=None if escape is None else escape.value,
            seed=seed,
            allow_pickle=allow_pickle,
            replace_features=replace_features,
            key=key,
            **options,
        )
    finally:
        report.close()
    typer.echo(f"published {name}@{path.parent.name}: {path}")
    _note_missing_signature(path)
    where = "" if artifacts == DEFAULT_ARTIFACTS else f" --artifacts {artifacts}"
    typer.echo(f"next: elbo inspect {name}{where}, or elbo serve{where}")


def _words(text: str | None) -> list[str]:
    """Return the comma-separated words of an option; a word in quotation marks may contain commas."""
    return [] if text is None else next(csv.reader([text], skipinitialspace=True), [])


def _sizes(option: str, text: str | None, count: int | None = None) -> tuple[int, ...] | None:
    """Return the sizes in a text such as 1x28x28. Raise OptionError if there are not `count` whole numbers above 0."""
    if text is None:
        return None
    parts = text.replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or len(parts) != (count or len(parts)):
        raise OptionError(f"{option}: expected whole numbers above 0 with x between them, such as 28x28, got {text!r}")
    return tuple(map(int, parts))


@app.command(epilog="Example: elbo demo && elbo serve")
def demo(
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    runs: Runs = Path("runs"),
    plots: PlotsOption = True,
    sign: SignOption = None,
) -> None:
    """Train the demonstration models that are not in the artifact folder yet.

    These models are trained on scikit-learn's digits: pca, ae, vae, linear (an autoencoder without hidden layers), map
    (a VAE with two latents, whose whole latent space is a map) and conditional (a VAE that draws the digit that is
    asked for). The model hosts is trained on simulated metrics of ten hosts (simulated-hosts).
    """
    from models.manifest import versions
    from training.config import DEMONSTRATIONS

    missing = [(source, config) for source, config in DEMONSTRATIONS if not versions(artifacts, config.name)]
    if not missing:
        typer.echo(f"nothing to do: {artifacts} has {', '.join(config.name for _, config in DEMONSTRATIONS)}")
        return
    key = _private_key(sign)
    from training.data.table import read_table

    for source, config in missing:
        table = read_table(source, time=config.time, group=config.group, condition=config.condition)
        _train(config, table, artifacts, runs, plots=plots, key=key)


@app.command(epilog="Examples: elbo inspect vae | elbo inspect vae@2 --json | elbo inspect artifacts/vae/2/model.pt")
def inspect(name: Name, json: Json = False, artifacts: ArtifactFolder = DEFAULT_ARTIFACTS) -> None:
    """Verify the checksum of an artifact and describe its model."""
    from models.manifest import read_manifest
    from training.reports.describe import describe

    path = _artifact_path(name, artifacts)
    manifest = read_manifest(path)
    typer.echo(manifest.model_dump_json(indent=2) if json else printable_lines(describe(manifest, path)))


@app.command("list", epilog="Examples: elbo list | elbo list --json")
def list_(
    json: Json = False, artifacts: ArtifactFolder = DEFAULT_ARTIFACTS, trusted_keys: TrustedKeysOption = None
) -> None:
    """List the versions of all models, newest first.

    The status of a version is newest (requests for the name get this version), older, withdrawn (by elbo rollback),
    damaged, or untrusted (none of the trusted keys has signed it).
    """
    from training.reports.listing import list_versions, listing_json, listing_text

    found = list_versions(artifacts, _trusted_keys(trusted_keys))
    if json:
        typer.echo(listing_json(found))
    elif found:
        typer.echo(printable_lines(listing_text(found)))
    else:
        typer.echo(f"no models in {artifacts}: train one with elbo demo or elbo train", err=True)


@app.command(epilog="Examples: elbo rollback hosts | elbo rollback hosts 3")
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the model")],
    version: Annotated[
        int | None,
        typer.Argument(metavar="VERSION", min=1, help="version to roll back to; default: the one before the newest"),
    ] = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
) -> None:
    """Make an earlier version of a model the newest one by withdrawing the later versions.

    A running server follows by itself. Nothing is deleted: to restore a withdrawn version, roll back to its number. The
    number of a withdrawn version is never used again.
    """
    from models.versions import roll_back

    done = roll_back(artifacts, name, version)
    if done.withdrawn:
        typer.echo(f"withdrawn: {', '.join(f'{name}@{number}' for number in done.withdrawn)}")
    typer.echo(f"the newest version is {name}@{done.version}")


@app.command(epilog="Example: elbo keygen release.key, then elbo sign hosts --key release.key")
def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="new file for the private key")],
    comment: Annotated[
        str | None, typer.Option("--comment", help="what people call the key; default: the name of FILE")
    ] = None,
) -> None:
    """Create a key for signing artifacts.

    Writes the private key to FILE, which only you can read, and the public key to FILE.pub. Nothing is overwritten.
    Give the public key to the servers in ELBO_TRUSTED_KEYS, and keep the private key away from them.
    """
    from models.keys import create_key

    public = create_key(file, " ".join((comment or file.stem).split()))
    typer.echo(f"private key: {file}")
    typer.echo(f"public key: {file}.pub, fingerprint {public.fingerprint}")
    typer.echo(public.line)


@app.command(epilog="Examples: elbo sign hosts --key release.key | elbo sign hosts@3 vae@1 --key release.key")
def sign(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="models: name (the newest version), name@version, or a path")
    ],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="private key, as elbo keygen writes it")],
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
) -> None:
    """Sign versions of models, so that servers with ELBO_TRUSTED_KEYS load them.

    A signature is for one content, one name and one version: a renamed model must be signed again. Signatures by other
    keys are kept. An artifact is a program: sign only versions that you have made, or whose SHA-256 you have compared.
    """
    from models.signatures import identify
    from models.signatures import sign as sign_artifact

    private = _private_key(key)
    assert private is not None
    for path in [_artifact_path(each, artifacts) for each in names]:
        digest = sign_artifact(path, private)
        name, version = identify(path)
        typer.echo(f"signed {name}@{version} with {private.public}, SHA-256 {digest}")


@app.command(
    epilog="Examples: elbo verify --trusted-keys release.key.pub | elbo verify hosts@3 --trusted-keys keys.txt"
)
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="models; default: all versions of all models")
    ] = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Verify that trusted keys have signed artifacts, and that the artifacts are intact.

    The exit code is 1 if an artifact is not signed by a trusted key, or is damaged. No model is run.
    """
    from models.errors import ArtifactError
    from models.manifest import FILE_NAME, parse, read_sealed, version_folder, versions
    from models.manifest import names as models_in
    from models.signatures import identify

    keys = _trusted_keys(trusted_keys)
    if keys is None:
        raise OptionError("--trusted-keys: expected a file of public keys, or set ELBO_TRUSTED_KEYS")
    paths = [_artifact_path(each, artifacts) for each in names or ()]
    if not names:
        found = ((name, version) for name in models_in(artifacts) for version in versions(artifacts, name))
        paths = [version_folder(artifacts, name, version) / FILE_NAME for name, version in found]
    failed = 0
    for path in paths:
        try:
            content = read_sealed(path)
            name, version = identify(path)
            key = keys.verify(content, path, name, version)
            parse(content, path)
            typer.echo(f"{name}@{version}: signed by {key}")
        except ArtifactError as error:
            failed += 1
            typer.echo(f"{error.code}: {printable(str(error))}")
    if failed or not paths:
        typer.echo(
            f"{failed} of {len(paths)} artifacts are not trusted" if paths else f"no models in {artifacts}", err=True
        )
        raise typer.Exit(1)


@app.command(
    cls=described_by("service.settings", "Settings"),
    epilog="Example: elbo serve --port 9000",
)
def serve(
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    artifacts: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure")] = None,
) -> None:
    """Serve the models in the artifact folder over HTTP.

    An option overrides its environment variable: --port overrides ELBO_PORT.
    """
    options = {key: value for key, value in locals().items() if value is not None}
    from service.settings import Settings

    with _option_errors(options):
        settings = Settings(**options)
    from service.server.run import serve

    serve(settings)


keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(
    keys,
    name="key",
    help="Add, list and remove the API keys of the server.",
    epilog="Example: elbo key add shop --scope infer && ELBO_API_KEYS_FILE=api-keys.toml elbo serve",
)
KeyFile = Annotated[
    Path,
    typer.Option("--file", metavar="FILE", envvar="ELBO_API_KEYS_FILE", help="file of API keys"),
]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="name of the key, which logs and metrics show")]
DEFAULT_KEY_FILE = Path("api-keys.toml")


@keys.command("add", epilog="Example: elbo key add prometheus --scope metrics --scope write")
def add_key(
    name: KeyName,
    scope: Annotated[
        list[KeyScope],
        typer.Option(
            "--scope",
            help="what the key may do, once per scope. infer: run models; write: send rows that raise alerts; metrics: "
            "read /metrics; admin: everything",
        ),
    ],
    requests_per_second: Annotated[
        float | None, typer.Option(metavar="<float>", help="limit on requests per second; default: none")
    ] = None,
    burst: Annotated[
        int | None,
        typer.Option(metavar="<int>", help="requests that may come at once; default: the requests of one second"),
    ] = None,
    rows_per_second: Annotated[
        float | None, typer.Option(metavar="<float>", help="limit on rows per second; default: none")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(metavar="<int>", help="limit on requests at the same time; default: none")
    ] = None,
    file: KeyFile = DEFAULT_KEY_FILE,
) -> None:
    """Make a random API key, print it once, and add its SHA-256 hash to the file.

    The file does not contain the key: keep what is printed. A running server accepts the key within ELBO_POLL_SECONDS.
    """
    from pydantic import ValidationError

    from service.access import key_file

    value = key_file.new_value()
    limits = {
        "requests_per_second": requests_per_second,
        "burst": burst,
        "rows_per_second": rows_per_second,
        "concurrent_requests": concurrent_requests,
    }
    try:
        key = key_file.ApiKey(sha256=key_file.hash_of(value), scopes=scope, **limits)
    except ValidationError as error:
        fault = first_fault(error)
        raise OptionError(f"--{fault.path[0].replace('_', '-')}: {fault.message}, got {fault.value!r}") from None
    key_file.add(file, name, key)
    typer.echo(value)
    typer.echo(f"added {name} to {file}; the key is shown only now", err=True)


@keys.command("list", epilog="Examples: elbo key list | elbo key list --json")
def list_keys(json: Json = False, file: KeyFile = DEFAULT_KEY_FILE) -> None:
    """List the names, scopes and limits of the API keys."""
    from service.access import key_file

    found = key_file.read(file)
    if json:
        from json import dumps

        typer.echo(dumps({name: {"scopes": sorted(key.scopes), **key.limits} for name, key in found.items()}, indent=2))
        return
    for name, key in found.items():
        limits = "".join(f"  {limit} {value:g}" for limit, value in key.limits.items())
        typer.echo(f"{name}  {','.join(sorted(key.scopes))}{limits}")
    if not found:
        typer.echo(f"no keys in {file}: add one with elbo key add", err=True)


@keys.command("remove", epilog="Example: elbo key remove shop")
def remove_key(name: KeyName, file: KeyFile = DEFAULT_KEY_FILE) -> None:
    """Remove an API key. A running server refuses it within ELBO_POLL_SECONDS."""
    from service.access import key_file

    key_file.remove(file, name)
    typer.echo(f"removed {name} from {file}")


@app.command(epilog="Example: elbo evaluate vae digits")
def evaluate(
    name: Name,
    data: Data,
    draws: Annotated[int, typer.Option(min=1, help="importance samples per row for the log-likelihood")] = 100,
    samples: Annotated[
        bool, typer.Option("--samples", help="measure samples of the model too: do they resemble rows, or copy them?")
    ] = False,
    json: Json = False,
    normal: NormalOption = None,
    escape: EscapeOption = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Evaluate a model on the rows of DATA.

    Prints the reconstruction error, the log-likelihood and the false-alarm rates. If DATA has labels (a column such as
    label, y, class or anomaly, or the folders of images), also prints the detection rates, the AUROC and the average
    precision. With --samples, also compares samples of the model with the rows.
    """
    from training.evaluation import evaluate

    artifact, table = _load(name, data, artifacts, trusted_keys, escape, normal)
    for note in table.notes:
        typer.echo(note, err=True)
    evaluation = evaluate.evaluate(artifact, table, draws, samples=samples)
    typer.echo(evaluate.evaluation_json(evaluation) if json else printable_lines(evaluate.evaluation_text(evaluation)))


@app.command(
    epilog="Examples: elbo score hosts today.csv --alpha 0.01 | elbo score hosts year.parquet scores/ --id request | "
    "elbo score hosts year/ scores/ --engine ray"
)
def score(
    name: Name,
    data: Data,
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="[OUTPUT]",
            help="file to write (.parquet, .csv, .ndjson), or a folder of such files; default: standard output",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="false-alarm rate: accepted share of normal rows that are flagged; default: 0.05, or the alpha that "
            "keeps the budget of the model's policy",
        ),
    ] = None,
    explain: Annotated[
        int, typer.Option(min=0, help="number of features to report per row: those that contribute most")
    ] = 3,
    extrapolated: Annotated[
        bool,
        typer.Option(
            "--extrapolated",
            help="allow anomalies at an alpha below the smallest possible p-value, by a fitted tail and without a "
            "guarantee; without this option, no row is anomalous at such an alpha",
        ),
    ] = False,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="default: by the suffix of OUTPUT; parquet for a folder, ndjson (one JSON object per line) for "
            "standard output",
        ),
    ] = None,
    time: ScoredTimeOption = None,
    group: ScoredGroupOption = None,
    id_: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="COLUMN", help="column to copy into OUTPUT; repeat it for several columns"),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="where OUTPUT is computed: local, or ray (the cluster of RAY_ADDRESS or of this machine, or else a "
            "cluster that is started here)"
        ),
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="parts of DATA scored at once; default: cores + 1, with Ray 2 per core"),
    ] = None,
    part_rows: Annotated[
        int | None,
        typer.Option(min=1, help="rows per part of DATA, and per file of a folder; default: about 8 MB of numbers"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT if it exists")] = False,
    escape: EscapeOption = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Score every row of DATA for anomalies.

    For each row, prints the score, whether the row is anomalous at alpha, the features that contribute most, and the
    time and the group if DATA has these columns. Rows are numbered from 0. A faulty row costs only its own score: its
    line has the fault (detail) instead, and the exit code is 2.

    With OUTPUT, DATA may be larger than memory, and may be a folder of .parquet, .csv or .npy files. OUTPUT appears as
    a whole at the end. OUTPUT.faults.ndjson lists the faulty rows with their faults. If the command is interrupted,
    repeat it to continue.
    """
    from models.artifact import load_after_trial
    from training.reports.describe import DEFAULT_ALPHA, few_calibration_rows

    artifact = load_after_trial(_artifact_path(name, artifacts), keys=_trusted_keys(trusted_keys))
    if alpha is None:
        alpha = (artifact.manifest.policy and artifact.manifest.policy.alpha) or DEFAULT_ALPHA
    if not extrapolated and not artifact.manifest.calibration.reaches(alpha):
        typer.echo(few_calibration_rows(artifact.manifest.calibration, alpha), err=True)
    options: dict[str, Any] = {"time": time, "group": group, "escape": None if escape is None else escape.value}
    wanted = _WantedScores(artifact, data, alpha, explain, extrapolated, format_, options)
    if output is None:
        given = {"--id": id_, "--workers": workers, "--part-rows": part_rows, "--overwrite": overwrite}
        given["--engine"] = engine is not Engine.local
        if unusable := [option for option, value in given.items() if value]:
            raise OptionError(f"{unusable[0]} needs OUTPUT, the file or folder to write")
        _print_scores(wanted)
        return
    options |= {"ids": tuple(id_ or ()), "part_rows": part_rows or 0}
    _write_scores(wanted, output=output, engine=engine, workers=workers, overwrite=overwrite)


class _WantedScores(NamedTuple):
    """Which scores a command computes, and how it shows them."""

    artifact: "Artifact"
    data: str
    alpha: float
    explain: int
    extrapolated: bool
    format: Format | None
    options: dict[str, Any]


def _print_scores(wanted: _WantedScores) -> None:
    """Print the scores to standard output. For the options, see `stream_for_model`."""
    from training.data.row_stream import stream_for_model
    from training.evaluation.score import Tally, csv_lines, ndjson_lines
    from training.progress import progress

    artifact, data = wanted.artifact, wanted.data
    if wanted.format is Format.parquet:
        raise OptionError("--format parquet needs OUTPUT, the file or folder to write")
    keeps_gaps = hasattr(artifact.module, "score_gaps")
    stream = stream_for_model(data, artifact.manifest, keeps_gaps=keeps_gaps, **wanted.options)
    for note in stream.notes:
        typer.echo(note, err=True)
    lines, tally = csv_lines if wanted.format is Format.csv else ndjson_lines, Tally()
    with progress(f"scoring {Path(data).name}", stream.total) as bar:
        for text in lines(artifact, stream, wanted.alpha, wanted.explain, tally, wanted.extrapolated):
            sys.stdout.write(text)
            sys.stdout.flush()  # a closed pipe ends the command here; else, Python would print an error at exit
            bar.show(tally.rows)
    if tally.pixel_warning:
        typer.echo(f"WARNING: {data}: {tally.pixel_warning}", err=True)
    tally.refuse_faulty(data)


def _write_scores(wanted: _WantedScores, *, output: str, engine: Engine, workers: int | None, overwrite: bool) -> None:
    """Write the scores to `output`. For the options, see `training.scoring.job.Job`."""
    from functools import partial
    from time import perf_counter

    from training.progress import progress
    from training.scoring.run import choose_format, describe_data, make_job, run_job, score_locally

    artifact, data, alpha = wanted.artifact, wanted.data, wanted.alpha
    chosen, single = choose_format(output, None if wanted.format is None else wanted.format.value)
    job = make_job(artifact, chosen, alpha, wanted.explain, extrapolated=wanted.extrapolated, **wanted.options)
    score_parts: Any = partial(score_locally, artifact)
    if engine is Engine.ray:
        from training.ray_tasks import score_on_ray

        score_parts = score_on_ray
        data = str(Path(data).absolute()) if Path(data).exists() else data
    began = perf_counter()
    total, notes = describe_data(job, artifact, data, Path(output))
    for note in notes:
        typer.echo(note, err=True)
    try:
        with progress(f"scoring {Path(data).name}", total, prints_results=False) as bar:
            done = run_job(
                job,
                artifact,
                data,
                Path(output),
                single=single,
                engine=score_parts,
                workers=workers,
                overwrite=overwrite,
                show=bar.show,
            )
    except KeyboardInterrupt:
        typer.echo("the finished parts are kept: to continue, repeat the command", err=True)
        raise
    seconds, report = perf_counter() - began, done.report
    if done.resumed:
        typer.echo(f"continued: {done.resumed} of {done.parts} parts were finished before")
    typer.echo(
        f"scored {report.rows:,} rows in {seconds:.1f} s, {report.anomalies:,} of them anomalous at alpha {alpha:g}: "
        f"{output}"
    )
    if report.pixel_warning:
        typer.echo(f"WARNING: {data}: {report.pixel_warning}", err=True)
    report.refuse_faulty(data, done.faults)


@app.command(
    epilog="Examples: elbo backtest hosts lastmonth.csv | elbo backtest hosts lastmonth.csv --labels incidents.csv "
    "--alpha 0.01 --alpha 0.001 --html report.html"
)
def backtest(
    name: Name,
    data: Annotated[str, typer.Argument(metavar="HISTORY", help="a file of rows with times (.csv, .parquet)")],
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="false-alarm rate; repeat it to compare several, the details are for the first; default: the alpha "
            "that keeps the budget of the model's policy, if it has one, 0.05, 0.01 and 0.001",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="INCIDENTS", help="CSV file of known incidents: start,end or start,end,group; times as in HISTORY"
        ),
    ] = None,
    time: ScoredTimeOption = None,
    group: ScoredGroupOption = None,
    half_life_rows: Annotated[
        float,
        typer.Option(
            min=0, help="half-life, in rows, of the smoothed severity by which rows are anomalous; 0: no smoothing"
        ),
    ] = 0.0,
    alert_half_life: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="ELBO_ALERT_HALF_LIFE",
            help="half-life, in rows, of the mean severity that raises an alert; 0 uses each row's own severity",
        ),
    ] = 3.0,
    calm_seconds: Annotated[
        float,
        typer.Option(
            min=0, envvar="ELBO_ALERT_CALM_SECONDS", help="seconds that a group must be normal before its alert ends"
        ),
    ] = 120.0,
    extrapolated: Annotated[
        bool,
        typer.Option(
            "--extrapolated",
            help="allow anomalies at an alpha below the smallest possible p-value, without a guarantee",
        ),
    ] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="judge by the fixed calibration, as with ELBO_ONLINE_CALIBRATION=false")
    ] = False,
    incident_rows: IncidentRowsOption = None,
    json: Json = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write a page with the severities and the alerts drawn")
    ] = None,
    escape: EscapeOption = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Rehearse alerts: judge HISTORY as the server would have judged it, row by row in order of time.

    Prints the alerts per day and group at each alpha, the worst alerts with the features that caused them, and, with
    --labels, which incidents were found and after how long. The windows, the online calibration and the policy are
    those of POST /anomaly on a server that starts with the first row, and the alerts are those that its only worker
    would send to Alertmanager if each row arrived at its time.
    """
    from models.artifact import load_after_trial, read_trained_rows
    from service.backtest.history import sort_history
    from service.backtest.incidents import read_incidents
    from service.backtest.page import make_page
    from service.backtest.replay import DEFAULT_ALPHAS, Options, replay
    from service.backtest.report import make_report
    from service.backtest.text import format_report
    from service.inference.model_loader import ModelLoader
    from training.data.history import describe_trained_rows, read_history
    from training.data.row_stream import stream_for_model
    from training.progress import progress

    if not all(0 < rate < 1 for rate in alpha or ()):
        raise OptionError(f"--alpha: expected numbers above 0 and below 1, got {', '.join(map(str, alpha or ()))}")
    if html is not None and not html.parent.is_dir():
        raise OptionError(f"--html: there is no folder {html.parent}")
    path = _artifact_path(name, artifacts)
    artifact = load_after_trial(path, keys=_trusted_keys(trusted_keys))
    if artifact.manifest.conditions is not None:
        raise OptionError(f"{name} was trained with --condition, and a backtest does not know the condition of a row")
    keeps_gaps = hasattr(artifact.module, "score_gaps")
    stream = stream_for_model(data, artifact.manifest, time=time, group=group, escape=escape, keeps_gaps=keeps_gaps)
    incidents = None if labels is None else read_incidents(labels, stream.group)
    with progress(f"reading {Path(data).name}", stream.total) as bar:
        rows = read_history(stream, bar.show)
    if rows.first_fault:
        typer.echo(f"WARNING: {data}: {rows.faulty:,} rows cannot be judged; {rows.first_fault}", err=True)
    if trained := describe_trained_rows(rows, artifact.manifest, read_trained_rows(artifact)):
        typer.echo(f"WARNING: {data}: {trained}", err=True)
    history = sort_history(rows.x, rows.time, rows.group, rows.source_rows)
    version = path.parent.name
    served = ModelLoader().load(path, artifact.manifest.name, int(version) if version.isdecimal() else 1)
    alphas = alpha or [rate for rate in (served.default_alpha, *DEFAULT_ALPHAS) if rate is not None]
    options = Options(
        tuple(alphas),
        extrapolated,
        half_life_rows,
        online=not fixed,
        incident_rows=incident_rows,
        alert_half_life=alert_half_life,
        calm_seconds=calm_seconds,
    )
    with progress(f"replaying {Path(data).name}", len(history)) as bar:
        judged = replay(served, history, options, bar.show)
    report = make_report(judged, incidents, f"{served.name}@{served.version}", data, rows.faulty)
    if html is not None:
        _write(html, make_page(report, judged, incidents or []))
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        typer.echo(printable_lines(format_report(report)))


@app.command(epilog="Examples: elbo calibrate hosts lastweek.csv | elbo calibrate hosts@3 lastweek.csv --alpha 0.01")
def calibrate(
    name: Name,
    data: Data,
    alpha: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="smallest alpha that you will use; needs at least 1/alpha - 1 rows")
    ] = 0.05,
    force: Annotated[
        bool, typer.Option("--force", help="calibrate even if the previous version flags all rows of DATA")
    ] = False,
    normal: NormalOption = None,
    escape: EscapeOption = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    runs: Runs = Path("runs"),
    sign: SignOption = None,
    policy: PolicyOption = None,
    incident_rows: IncidentRowsOption = None,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Recalibrate a model on recent normal rows, without training.

    Publishes a new version of the model, with the same networks and with p-values that are computed from DATA. If DATA
    has labels, only rows with a label that means normal are used. A running server loads the new version by itself.
    The signature of the old version is not valid for the new one: use --sign, or sign it later with elbo sign. The
    policy of the model stays, unless --policy names another; an empty file removes it.
    """
    key = _private_key(sign)
    from training.publishing.recalibrate import recalibrate

    artifact, table = _load(name, data, artifacts, trusted_keys, escape, normal)
    for note in table.notes:
        typer.echo(note, err=True)
    features = artifact.manifest.features
    rules = _policy(policy, [feature.name for feature in features], [feature.unit for feature in features])
    published = recalibrate(
        artifact, table, artifacts, alpha, runs, force=force, key=key, policy=rules, incident_rows=incident_rows
    )
    for note in published.notes:
        if note not in table.notes:  # those are shown already
            typer.echo(note, err=True)
    typer.echo(f"published {published.manifest.name}@{published.path.parent.name}: {published.path}")
    _note_missing_signature(published.path)
    calibration = published.manifest.calibration
    typer.echo(f"calibrated on {calibration.rows:,} rows: the smallest p-value is {calibration.floor:.3g}")


@app.command(epilog="Examples: elbo directions vae digits | elbo directions faces attributes.csv --label smiling")
def directions(
    name: Name,
    data: Data,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="column of labels; default: as in training, or found by its name"),
    ] = None,
    escape: EscapeOption = None,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    sign: SignOption = None,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Find the directions in the latent space along which POST /edit moves rows towards a label.

    The direction of a label leads from the mean latents of the rows with other labels to the mean latents of the rows
    with this label. A model that was trained on labelled rows knows the directions of these labels already: use this
    command for other labels, or to average over more rows. It publishes a new version, with the same networks and the
    same scores. The signature of the old version is not valid for the new one: use --sign, or sign it later with elbo
    sign.
    """
    key = _private_key(sign)
    from training.publishing.directions import publish_directions

    artifact, table = _load(name, data, artifacts, trusted_keys, escape, label=label)
    published = publish_directions(artifact, table, artifacts, key)
    for note in published.notes:
        typer.echo(note, err=True)
    width = max(len(direction.label) for direction in published.directions)
    typer.echo(f"{'label':{width}}  {'rows':>9}  separation (AUROC on these rows; 0.5: the direction says nothing)")
    for direction in published.directions:
        typer.echo(f"{direction.label:{width}}  {direction.rows:>9,}  {direction.separation:.3f}")
    typer.echo(f"published {published.path.parents[1].name}@{published.path.parent.name}: {published.path}")
    _note_missing_signature(published.path)


@app.command(epilog="Examples: elbo export hosts --format onnx-pipeline | elbo export hosts@3 --format pt2")
def export(
    name: Name,
    format_: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="onnx-pipeline: one ONNX file from rows to scores and p-values. onnx: one ONNX file each for encode, "
            "decode and score. pt2: what onnx-pipeline has, for torch.export.load",
        ),
    ] = ExportFormat.ONNX_PIPELINE,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="folder of the exported models")
    ] = DEFAULT_EXPORTS,
    artifacts: ArtifactFolder = DEFAULT_ARTIFACTS,
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Export a model for ONNX Runtime, torch.export or Triton.

    Writes FOLDER/NAME/VERSION/model.onnx (or model.pt2), and FOLDER/NAME/config.pbtxt for Triton, which loads FOLDER as
    its model repository. Preprocessing is part of the exported model: it takes rows in raw units. The export fails if
    an output differs from that of the artifact by more than 1e-5 (ONNX) or 1e-6 (pt2) of its size.
    """
    path = _artifact_path(name, artifacts)
    from models.artifact import load_after_trial
    from training.exporting.export import export

    artifact = load_after_trial(path, keys=_trusted_keys(trusted_keys))
    version = int(path.parent.name) if path.parent.name.isdigit() else 1
    model = path.parents[1].name if path.parent.name.isdigit() else artifact.manifest.name
    for file in export(artifact, model, version, format_, out):
        typer.echo(f"exported {model}@{version}: {file}")


ReferencesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME...]", help="models: name (the newest version) or name@version; default: all models"),
]
CopiedArtifacts = Annotated[
    str, typer.Option("--artifacts", envvar="ELBO_ARTIFACTS", help="artifact folder, or URL of a remote repository")
]


@app.command(epilog="Examples: elbo push s3://models/elbo | elbo push s3://models/elbo hosts@3 vae")
def push(
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="URL of a remote repository, mlflow:, or a folder")
    ],
    names: ReferencesArgument = None,
    artifacts: CopiedArtifacts = "artifacts",
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Copy versions of models from the artifact folder to another repository, with their signatures.

    DESTINATION is s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH, mlflow: (the model registry at MLFLOW_TRACKING_URI)
    or a folder. Only what is missing is copied, and a version is never replaced by another content. The index of the
    repository is written last, so servers see a version when it is complete.
    """
    _copy_versions(artifacts, destination, names, trusted_keys)


@app.command(epilog="Examples: elbo pull s3://models/elbo | elbo pull https://models.example.com/elbo hosts@3")
def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="URL of a remote repository, mlflow:, or a folder")],
    names: ReferencesArgument = None,
    artifacts: CopiedArtifacts = "artifacts",
    trusted_keys: TrustedKeysOption = None,
) -> None:
    """Copy versions of models from another repository to the artifact folder, with their signatures.

    SOURCE is s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH, file:///PATH, mlflow: or a folder. The hashes of
    the files are compared with the index of the repository. Only what is missing is copied.
    """
    _copy_versions(source, artifacts, names, trusted_keys)


@app.command("index", epilog="Examples: elbo index artifacts | elbo index s3://models/elbo")
def index_(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="URL of a remote repository, or an artifact folder")
    ],
) -> None:
    """Write the index of a repository: elbo-index.json, with the size and the SHA-256 of each file.

    elbo push writes the index by itself. Write it with this command if other programs have copied or removed versions,
    or before an HTTP server publishes an artifact folder. Every file is read once.
    """
    from service.repository.copying import write_index_of

    count = write_index_of(repository)
    typer.echo(f"the index lists {count} version{'' if count == 1 else 's'}")


def _copy_versions(source: str, destination: str, names: list[str] | None, trusted_keys: str | None) -> None:
    from service.repository.copying import Copied, copy_versions, open_repository
    from service.repository.location import is_url
    from service.repository.mlflow_registry import PLACE

    for name in names or ():
        if is_url(name) or name == PLACE:
            raise OptionError(f"{name} is no name of a model: give the repository first, then the names of models")
    actions = {"copied": "copied", "signature": "copied the signature of", "present": "already there:"}

    def report(copied: Copied) -> None:
        typer.echo(f"{actions[copied.action]} {copied.name}, {copied.bytes:,} bytes")

    read, written = open_repository(source), open_repository(destination)
    if not copy_versions(read, written, names or (), _trusted_keys(trusted_keys), report):
        typer.echo("the source has no models", err=True)


def _write(path: Path, text: str) -> None:
    """Write a file for the user."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from error


def _load(
    reference: str,
    data: str,
    artifacts: Path,
    trusted_keys: str | None,
    escape: Escape | None,
    normal: str | None = None,
    label: str | None = None,
) -> "tuple[Artifact, Table]":
    from models.artifact import load_after_trial
    from training.data.table import read_for_model

    artifact = load_after_trial(_artifact_path(reference, artifacts), keys=_trusted_keys(trusted_keys))
    labels = [] if normal is None else next(csv.reader([normal], skipinitialspace=True), [])
    return artifact, read_for_model(data, artifact.manifest, escape=escape, normal=labels, label=label)


def _trusted_keys(setting: str | None) -> "TrustedKeys | None":
    """Return the keys in `setting`, a path or the keys themselves; None if it is not given."""
    from models.signatures import trusted_keys

    return trusted_keys(setting)


def _policy(path: Path | None, names: Sequence[str], units: Sequence[str | None]) -> "Policy | None":
    """Return the policy in the file at `path`, for features with these names and units; None if no path is given."""
    from training.data.policy_file import read_policy

    return None if path is None else read_policy(path, names, units)


def _private_key(path: Path | None) -> "PrivateKey | None":
    """Return the private key in the file at `path`; None if no path is given. Warn if other users can read the file."""
    from models.keys import read_private_key

    if path is None:
        return None
    key = read_private_key(path)
    if path.stat().st_mode & 0o077:
        typer.echo(f"WARNING: other users can read or change {path}: protect it with chmod 600 {path}", err=True)
    return key


def _note_missing_signature(path: Path) -> None:
    """Tell how to sign the new version at `path` if it has no signature, but an older version of the model has one."""
    from models.manifest import FILE_NAME, versions
    from models.signatures import is_signed

    folder, version = path.parents[1], path.parent.name
    others = versions(folder.parent, folder.name)
    if not is_signed(path) and any(is_signed(folder / str(other) / FILE_NAME) for other in others):
        typer.echo(
            f"{folder.name}@{version} is not signed, but an older version is: a server with ELBO_TRUSTED_KEYS does not "
            f"load it before elbo sign {folder.name}@{version} --key FILE",
            err=True,
        )


def _artifact_path(reference: str, artifacts: Path) -> Path:
    """Return the path of an artifact: `reference` if it is a path, otherwise the path of the model that it names."""
    from models.manifest import FILE_NAME, resolve

    path = Path(reference)
    is_path = path.is_file() or len(path.parts) > 1 or path.name == FILE_NAME
    return path if is_path else resolve(artifacts, reference)


@contextmanager
def _option_errors(options: Collection[str]) -> Iterator[None]:
    """Turn pydantic's ValidationError into an OptionError that names the option or environment variable at fault.

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


def _exit_with_error(message: str, status: int) -> NoReturn:
    print(f"elbo: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


def _installation(package: str) -> str:
    """Return how to install Elbo with `package`, which is missing: with the extra `serve` or `train`."""
    if package in TRAINING_PACKAGES:
        return "install Elbo with pip install 'elbo[train]', or use the container image that trains"
    return "install Elbo with pip install 'elbo[serve]', or with 'elbo[train]' to train models as well"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, by default the arguments of the process."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed the descriptor (>&-)
            # closefd=False: the descriptor stays open when the server replaces the stream. If it were closed, a socket
            # could get its number, and would receive what the process prints.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False))
    try:
        app(args=arguments, prog_name="elbo")
    except ElboError as error:
        _exit_with_error(str(error), 2 if error.code in USAGE_ERRORS else 1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN_PACKAGES:
            raise
        _exit_with_error(f"this command needs the package {package}: {_installation(package)}", 1)
    except OSError as error:
        place = f" {error.filename}" if error.filename else " the output"
        _exit_with_error(f"cannot read or write{place} ({error.strerror}): check the disk and the permissions", 1)
    except SystemExit as end:
        if end.code == 130:  # typer exits with 130 on SIGINT
            print("elbo: interrupted", file=sys.stderr)
        raise
