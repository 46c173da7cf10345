"""The list of allowed names fits exactly what training writes: every kind of model loads, and no name is unused."""

import ast
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import allowed_code, onnx_check
from models.artifact import load
from models.policy_rules import FeatureRule, Policy
from tests.data import values
from tests.models.builders import CORES
from tests.models.publishing import GAPS, publish_twin, publish_windowed
from tests.models.windows import CORES as WINDOWED
from tests.preloaded import run_preloaded
from tests.service.hosts import host_table
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

pytestmark = pytest.mark.slow

DIGITS: list[dict[str, Any]] = [
    {"model": "pca", "scale": "none"},
    {"model": "ae", "hidden": ()},
    {"model": "ensemble", "hidden": (8,)},
    *(
        {"model": "ae", "network": "conv", "hidden": (2, 3), "dense": (5,), "activation": activation, "output": output}
        for activation, output in (("silu", "linear"), ("relu", "sigmoid"), ("tanh", "auto"))
    ),
    {"model": "vae", "network": "conv", "hidden": (2,), "likelihood": "bernoulli"},
    *(
        {"model": "vae", "hidden": (8,), "variance": variance, "activation": activation}
        for variance, activation in (("learned", "relu"), ("feature", "tanh"), ("optimal", "silu"), (0.5, "silu"))
    ),
]
HOSTS: list[dict[str, Any]] = [
    {"model": "pca", "robust": True},
    {"model": "ensemble", "masking": 0.1},
    {"model": "vae", "likelihood": "bernoulli"},
]
POLICY = Policy(
    features={
        "cpu": FeatureRule(direction="high", least=0.1),
        "load": FeatureRule(minimum=-1e6),
        "disk~io": FeatureRule(alone=False),
    }
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the artifacts of every kind of model that training makes."""
    root, found = tmp_path_factory.mktemp("artifacts"), []
    images = (255 * values(read_table("digits"))[:400]).round().astype(np.uint8).reshape(-1, 8, 8)
    np.save(root / "digits.npy", images)
    digits = read_table(str(root / "digits.npy"))
    for table, all_options in ((digits, DIGITS), (host_table(), HOSTS)):
        for options in all_options:
            config = TrainConfig(name="m", epochs=1, **options)
            found.append(train(config, table, root, RecordingReporter(), force=True, replace_features=True))
    config, hosts = TrainConfig(name="policy", model="pca"), host_table()
    found.append(train(config, hosts, root, RecordingReporter(), policy=POLICY))
    found += [publish_windowed(root / f"{kind}-window", kind) for kind in WINDOWED]
    for kind in CORES:
        found.append(publish_twin(root / kind, kind))
        found.append(publish_twin(root / f"{kind}-imputing", f"{kind}-imputing", gaps=GAPS))
    return found


def test_every_kind_of_model_loads_and_no_allowed_name_is_unused(paths: list[Path]) -> None:
    used = set()
    for path in paths:
        load(path)
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    calls = [node for node in ast.walk(ast.parse(archive.read(name))) if isinstance(node, ast.Call)]
                    used |= {ast.unparse(call.func) for call in calls}
    used = {name for name in used if name.startswith(("torch.", "ops."))}
    assert used - {*allowed_code.TRAINED, *allowed_code.NEVER_REACHED} == set()
    assert {*allowed_code.TRAINED, *allowed_code.NEVER_REACHED} - used == set()


def test_convolutional_models_load_after_a_trial_in_a_new_process(paths: list[Path]) -> None:
    convolutional = [path for path, options in zip(paths, DIGITS, strict=False) if options.get("network") == "conv"]
    assert len(convolutional) == 4
    code = "import sys; from pathlib import Path; from models.artifact import load_after_trial\n"
    code += "for path in sys.argv[1:]: load_after_trial(Path(path))"
    done = run_preloaded([sys.executable, "-c", code, *map(str, convolutional)], text=True)
    assert done.stderr == ""


def test_operators_that_onnx_twins_may_have_include_no_control_flow_and_no_random_numbers() -> None:
    refused = {"If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomUniform", "Bernoulli", "Multinomial"}
    assert onnx_check.OPERATORS.keys().isdisjoint(refused)
