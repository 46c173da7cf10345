"""The faster import of torch. Each program runs in a new process, because a process imports torch only once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.server import torch_start
from tests.data import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import threading
from service.server import torch_start

with torch_start.loading_libraries():
    assert threading.active_count() == 2
assert threading.active_count() == 1
assert "libtorch_cpu.so" in open("/proc/self/maps").read()
torch_start.defer_modules()
torch_start.defer_modules()
import torch

deferred = [name for name in torch_start.DEFERRED if "_deferred" in vars(sys.modules[name])]
assert sum(isinstance(finder, torch_start._DeferringFinder) for finder in sys.meta_path) == 1
assert "torch._decomp" not in sys.modules  # torch._meta_registrations imports it

class Doubler(torch.nn.Module):
    def forward(self, x):
        return 2 * x

import warnings
warnings.simplefilter("ignore", DeprecationWarning)
assert torch.jit.freeze(torch.jit.script(Doubler().eval()))(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
assert not hasattr(torch._meta_registrations, "__no_such_name__")
assert "torch._decomp" not in sys.modules
exported = torch.export.export(Doubler(), (torch.ones(3),))  # executes both modules
assert exported.module()(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
assert callable(torch._meta_registrations.register_meta)
assert type(torch.export) is type(sys)
try:
    torch.export.no_such_name
except AttributeError:
    pass
else:
    raise AssertionError("torch.export has a name that it does not have")
with torch_start.loading_libraries():
    assert not [thread for thread in threading.enumerate() if thread.name == "torch libraries"]
print(*deferred)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are loaded early on Linux only")
def test_torch_with_deferred_modules_freezes_and_exports_a_module_and_loads_each_module_at_its_first_use(
    tmp_path: Path,
) -> None:
    program = tmp_path / "program.py"  # TorchScript reads the source of a module from its file
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(torch_start.DEFERRED)
