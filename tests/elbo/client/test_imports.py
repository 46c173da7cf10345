"""`elbo.client` works where only the base dependencies of Elbo are installed, without torch and the service."""

import subprocess
import sys
import tomllib

from packaging.requirements import Requirement

from tests.data import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import elbo
import elbo.client
client = elbo.client.Client("http://127.0.0.1:9", key="x")
try:
    client.encode([[1.0]], timeout=0.2)
except elbo.client.ConnectionFailed:
    print("no torch needed")
print(sorted({{"models", "training", "service"}} & sys.modules.keys()))
"""
MODULES = {"scikit-learn": "sklearn", "pysimdjson": "simdjson", "protobuf": "google", "pillow": "PIL"}


def test_client_imports_neither_the_packages_of_the_extras_nor_elbos_other_packages() -> None:
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    extras = {
        Requirement(text).name
        for name in ("serve", "train")
        for text in PROJECT["optional-dependencies"][name]
        if not text.startswith("elbo[")
    }
    absent = {MODULES.get(name, name.replace("-", "_")) for name in extras - base} | {"models", "training", "service"}
    assert {"torch", "fastapi", "pydantic", "polars"} <= absent
    command = [sys.executable, "-c", PROGRAM.format(absent=absent)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "no torch needed\n[]\n"), run.stderr
