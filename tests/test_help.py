"""The help texts of the commands: they are fast and complete, and contain examples."""

import resource
import subprocess
import sys

import pytest

from service.settings import Settings
from tests.commands import command, in_process
from tests.data import ROOT
from training.config import TrainConfig

COMMANDS = (
    "train",
    "adopt",
    "demo",
    "inspect",
    "list",
    "rollback",
    "serve",
    "evaluate",
    "score",
    "backtest",
    "calibrate",
)


def test_help_takes_less_than_300_ms_of_cpu_time() -> None:
    def cpu_seconds() -> float:  # unlike elapsed time, CPU time hardly depends on other processes
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Not `command`, which forks a process that has imported torch.
        subprocess.run([sys.executable, "-m", "elbo", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.3


def test_help_lists_every_command_and_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom elbo import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print({'torch', 'numpy', 'pydantic', 'polars', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("set()\n")
    for name in COMMANDS:
        assert f"\n  {name} " in run.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, name, "--help")
    assert code == 0
    assert f"elbo {name} " in out.partition("Example")[2]


def test_help_of_train_lists_every_field_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = in_process(capsys, "train", "--help")
    words = " ".join(out.split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in words
        assert " ".join(str(field.description).split()) in words
        if name == "calibration":
            assert f"{field.description} [default: auto]" in words
        elif not field.is_required() and field.default is not None and field.default not in (False, ()):
            value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            assert f"{field.description} [default: {value}]" in words


def test_help_of_serve_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = in_process(capsys, "serve", "--help")
    words = " ".join(out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name} " in words or f"ELBO_{name.upper()} " in words
        default = "" if field.default is False else f" [default: {field.default}]"
        assert f"{' '.join(str(field.description).split())}{default}" in words


def test_help_of_python_m_training_equals_the_help_of_elbo_train() -> None:
    run = subprocess.run([sys.executable, "-m", "training", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == command("train", "--help").stdout
