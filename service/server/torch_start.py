"""Make the import of torch faster, in a process that only runs TorchScript modules.

Half of the start of a server was this import. Two measures save 0.9 s of the 2.0 s of processor time that it takes
(torch 2.13, one core of an AMD EPYC):

- `loading_libraries` loads torch's libraries in a thread, while this process imports other modules.
- `defer_modules` postpones two modules until something uses them: 0.7 s and 20 MB.

Both do nothing if torch has been imported before or has another layout, so the import then works as usual.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from threading import Lock, Thread, get_ident
from types import ModuleType
from typing import Any

# torch._meta_registrations tells torch.compile and torch.export the shapes of the results of every operator. A server
# calls neither.
DEFERRED = ("torch._meta_registrations", "torch.export")
# These modules import each other in circles, and expect that torch._meta_registrations has been executed before.
DEPENDENT = frozenset(
    {"torch._decomp", "torch._dynamo", "torch._inductor", "torch._prims", "torch._refs", "torch.utils._content_store"}
)
RTLD_NOW, RTLD_GLOBAL = 0x2, 0x100  # the values of these constants in the dlfcn.h of glibc
LIBRARIES = (("libtorch_global_deps.so", RTLD_NOW | RTLD_GLOBAL), ("libtorch_cpu.so", RTLD_NOW))  # in torch's order


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Load torch's libraries in a thread while the block runs, and wait for the thread at its end.

    The thread must not outlive the block: a process with several threads should not fork, and a process that exits
    while it loads these libraries can crash. Do nothing if torch is imported already, or if its libraries are not where
    they are expected.
    """
    folder = _library_folder()
    if folder is None:
        yield
        return
    thread = Thread(target=_open_libraries, args=(folder,), name="torch libraries", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _library_folder() -> Path | None:
    if sys.platform != "linux" or "torch" in sys.modules:
        return None
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    return folder if all((folder / name).is_file() for name, _ in LIBRARIES) else None


def _open_libraries(folder: Path) -> None:
    """Open LIBRARIES. ctypes releases the interpreter lock during a call of `dlopen`, but not in `ctypes.CDLL`."""
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for name, mode in LIBRARIES:
        dlopen(str(folder / name).encode(), mode)  # if this fails, the import of torch reports the reason


def defer_modules() -> None:
    """Let `import torch` postpone the modules in DEFERRED until an attribute of theirs is used."""
    if "torch" not in sys.modules and not any(isinstance(finder, _DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeferringFinder())


class _DeferringFinder:
    """Finds the modules in DEFERRED, and gives them a loader that waits."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a deferred module, or None for every other module.

        Before a module in DEPENDENT is imported, execute torch._meta_registrations.
        """
        if name in DEPENDENT and isinstance(module := sys.modules.get(DEFERRED[0]), _DeferredModule):
            module.__dict__["_deferred"].execute(module)
        if name not in DEFERRED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec


class _DeferringLoader(Loader):
    """Makes a module that is executed when an attribute is used that it does not have yet.

    `importlib.util.LazyLoader` would execute the module when any attribute is used, even `__file__`. The import of
    torch looks at the files of all modules.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See Loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Make `module` a deferred module."""
        module.__dict__["_deferred"] = _Deferred(self._loader)
        module.__class__ = _DeferredModule


class _Deferred:
    """How to execute a deferred module, once.

    Args:
        loader: executes the module.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._lock = Lock()
        self._thread: int | None = None  # the thread that executes the module

    def execute(self, module: ModuleType) -> None:
        """Execute `module`, or wait until another thread has done so."""
        if self._thread == get_ident():
            return  # the module uses its own attributes while it is executed
        with self._lock:
            if isinstance(module, _DeferredModule):
                self._thread = get_ident()
                try:
                    self._loader.exec_module(module)
                finally:
                    self._thread = None
                module.__class__ = ModuleType  # type: ignore[assignment] # mypy has narrowed the class


class _DeferredModule(ModuleType):
    """A module whose attributes are absent until one of them is used."""

    def __getattr__(self, name: str) -> Any:
        """Execute the module if `name` is an attribute that it will have."""
        if not (name.startswith("__") and name.endswith("__")):
            self.__dict__["_deferred"].execute(self)
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
