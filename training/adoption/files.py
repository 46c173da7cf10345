"""Read networks, weights, scalers and estimators from files.

Which files can run code: a Python file, a TorchScript file and a .pt2 file are programs. A pickle can run any code when
it is read. ONNX files, safetensors files, JSON files and `state_dict` files have only numbers.
"""

import importlib.util
import inspect
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import printable
from training.adoption.arguments import argument, by_interface
from training.adoption.estimators import is_estimator
from training.adoption.onnx_network import DRAWS, OnnxNetwork, read_network
from training.errors import AdoptionError, DataError

NESTED = ("state_dict", "model_state_dict", "model", "weights")  # where training loops put the weights in a checkpoint
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # wrappers of networks put them before the names of weights
PICKLES = (".joblib", ".pkl", ".pickle")
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip  # the types of safetensors files
ONNX_TOLERANCE = 1e-5  # largest error of a converted network, relative to the largest output of ONNX Runtime
CHECKED_ROWS = 3  # random rows on which a converted network is compared, unless the file fixes another number


def read_module(
    source: str, weights: Path | None = None, code: str | None = None, allow_pickle: bool = False
) -> nn.Module | Any:
    """Return the network in a file, or the estimator of scikit-learn.

    Args:
        source: an ONNX file (.onnx), a program of torch.export (.pt2), a TorchScript file, or FILE.py:NAME, where NAME
            is a function without arguments that returns the network, a class, or a network. With `allow_pickle`, also
            a file that torch.save wrote from a whole network, or joblib from an estimator.
        weights: a file with the weights (`state_dict`) of the network that FILE.py:NAME builds.
        code: for an ONNX file, the name of the value that is the code of a row.
        allow_pickle: whether to read pickles, which can run any code.

    Raises:
        DataError: a file is missing or cannot be read, or the function is missing or fails.
        AdoptionError: the weights do not fit the network, or an ONNX graph cannot be converted.
    """
    file, colon, name = source.rpartition(":")
    if colon and file.endswith(".py"):
        module = _build(Path(file), name)
        return module if weights is None else load_weights(module, read_weights(weights, allow_pickle), weights)
    path = _existing(Path(source))
    if path.suffix == ".py":
        raise DataError(f"{path} is a Python file: name the function that builds the network, as in {path}:build")
    if weights is not None:
        raise DataError(f"{path} has its own weights: leave {argument('weights')} out, or give FILE.py:FUNCTION")
    if path.suffix == ".onnx":
        return read_onnx(path, code)
    if path.suffix == ".pt2":
        return _read_program(path)
    if path.suffix in PICKLES:
        return _unpickled(path, allow_pickle, "an estimator or a network")
    return _read_torch(path, allow_pickle)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: expected a file")
    return path


def _build(path: Path, name: str) -> nn.Module:
    """Return the network that the function, the class or the variable `name` of the Python file `path` gives."""
    _existing(path)
    found: Any = _import(path)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise DataError(f"{path} has no function {name!r}: it has {', '.join(names) or 'no functions'}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise DataError(
            f"{path}:{name} is a {type(found).__name__}: expected a torch.nn.Module, or a function that returns one"
        )
    required = _required_arguments(found)
    if required:
        raise DataError(
            f"{path}:{name} needs the arguments {', '.join(required)}: name a function without arguments, such as "
            f"def build(): return {name}(…)"
        )
    try:
        module = found()
    except Exception as error:
        raise DataError(f"{path}:{name} raises {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise DataError(f"{path}:{name} returns a {type(module).__name__}: expected a torch.nn.Module")
    return module


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in optional]


def _import(path: Path) -> Any:
    """Run a Python file as a module. Files beside it can be imported, as when Python runs it."""
    name = f"elbo_adopted_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up here
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{path} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


# Weights


def read_weights(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Return the weights by name from a safetensors file, or from a file that torch.save wrote.

    Raises:
        DataError: the file is missing, damaged, or has other objects than tensors.
    """
    _existing(path)
    found: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _torch_load(path, allow_pickle)
    if isinstance(found, nn.Module):
        return dict(found.state_dict())
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} has no weights by name: expected what torch.save(module.state_dict(), …) writes")
    return dict(found)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Put `weights` into `module` and return it. A prefix that all names have, such as "module.", is removed.

    Raises:
        AdoptionError: names or shapes differ; the message lists them.
    """
    own = module.state_dict()
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights) and not set(weights) & set(own):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # no use in evaluation mode
    faults = [f"{word} {_listed(names)}" for word, names in (("lacks", missing), ("also has", unexpected)) if names]
    if faults:
        raise AdoptionError(
            f"{path} does not fit the network: it {' and '.join(faults)}; build the network that was trained"
        )
    misshapen = [name for name in sorted(weights.keys() & own.keys()) if weights[name].shape != own[name].shape]
    if misshapen:
        name = misshapen[0]
        raise AdoptionError(
            f"{path} does not fit the network: {name} has the shape {list(weights[name].shape)}, but the network has "
            f"{list(own[name].shape)}; build the network that was trained"
        )
    module.load_state_dict(dict(weights), strict=False)
    return module


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: the length of a JSON header, the header, and the bytes."""
    content = path.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        start = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            data = torch.frombuffer(bytearray(content[start + begin : start + end]), dtype=TYPES[entry["dtype"]])
            tensors[name] = data.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is no valid safetensors file: {_one_line(error)}") from error
    return tensors


def _torch_load(path: Path, allow_pickle: bool) -> Any:
    """Return the object that torch.save wrote. Only with `allow_pickle`, it may have other objects than tensors."""
    try:
        with _quiet():
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise DataError(f"{path} cannot be read: {_one_line(error)}") from error
        raise DataError(
            f"{path} is a pickle of Python objects, which can run any code when it is read: "
            + by_interface(
                "build the network and load the weights that torch.save(module.state_dict(), …) writes; or, if you "
                "trust the file, load it with torch.load(…, weights_only=False), and give elbo.adopt the network",
                "give FILE.py:FUNCTION and the weights that torch.save(module.state_dict(), …) writes; or, if you "
                "trust the file, --allow-pickle",
            )
        ) from error
    except Exception as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {_one_line(error)}") from error


# Networks


def _read_torch(path: Path, allow_pickle: bool) -> nn.Module:
    """Return the network in a TorchScript file, or in a pickle of a whole network."""
    if _is_torchscript(path):
        try:
            with _quiet():
                script: nn.Module = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            raise DataError(f"{path} cannot be loaded as TorchScript: {_one_line(error)}") from error
        return script
    found = _torch_load(path, allow_pickle)
    if not isinstance(found, nn.Module):
        raise DataError(
            f"{path} has weights, but no network: "
            + by_interface(
                "build the network, load the weights into it with load_state_dict, and give elbo.adopt the network",
                f"give FILE.py:FUNCTION that builds the network, and --weights {path}",
            )
        )
    return found


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_program(path: Path) -> nn.Module:
    """Return the network of a program that torch.export saved."""
    try:
        with _quiet():
            program = torch.export.load(path)
            module: Any = program.module()
    except Exception as error:
        raise DataError(f"{path} cannot be loaded as a program of torch.export: {_one_line(error)}") from error
    sizes = _program_input(program)
    if sizes and isinstance(sizes[0], int):
        raise AdoptionError(
            f"{path} takes exactly {sizes[0]} rows: export it for any number of rows, with "
            'torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("B")},))'
        )
    for node in list(module.graph.nodes):
        if node.name == "_guards_fn":  # it only checks the shapes, in Python that cannot be compiled
            module.graph.erase_node(node)
    module.recompile()
    for method in ("train", "eval"):  # they only raise errors; the program has no other mode
        vars(module).pop(method, None)
    network: nn.Module = module
    return network


def _program_input(program: Any) -> list[Any]:
    names = program.graph_signature.user_inputs
    if len(names) != 1:
        raise AdoptionError(f"the program has {len(names)} inputs: expected one, the rows")
    for node in program.graph.nodes:
        if node.name == names[0]:
            return list(node.meta["val"].shape)
    return []


def read_onnx(path: Path, code: str | None = None) -> OnnxNetwork:
    """Return the network of an ONNX file. Its outputs are compared with those of ONNX Runtime, unless it draws noise.

    Raises:
        DataError: the file cannot be read.
        AdoptionError: an operator cannot be converted, or the outputs differ.
    """
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise DataError(f"{path} cannot be read as ONNX: {_one_line(error)}") from error
    network = read_network(model, code).eval().requires_grad_(False)
    if not any(node.op_type in DRAWS for node in model.graph.node):
        _compare_with_onnx_runtime(network, path)
    return network


def _compare_with_onnx_runtime(network: OnnxNetwork, path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"{path} cannot be run by ONNX Runtime: {_one_line(error)}") from error
    given = session.get_inputs()[0]
    sizes = [size if isinstance(size, int) else 8 for size in given.shape[1:]]
    batch = given.shape[0] if isinstance(given.shape[0], int) else CHECKED_ROWS
    kind = np.float64 if given.type == "tensor(double)" else np.float32
    rows = np.random.RandomState(0).standard_normal((batch, *sizes)).astype(kind)
    try:
        expected = session.run(None, {given.name: rows})
    except Exception as error:
        raise DataError(f"{path} fails in ONNX Runtime: {_one_line(error)}") from error
    with torch.no_grad():
        found = network(torch.from_numpy(rows))
    for output, wanted in zip([found] if isinstance(found, Tensor) else found, expected, strict=True):
        scale = max(float(np.abs(wanted).max()), 1e-6)
        is_alike = output.shape == wanted.shape
        difference = float(np.abs(output.numpy() - wanted).max()) / scale if is_alike else np.inf
        if not difference <= ONNX_TOLERANCE:
            raise AdoptionError(
                f"{path}: the converted network differs from ONNX Runtime by {difference:.2g} of the largest output: "
                "give the network as a torch module, a TorchScript file or a .pt2 file"
            )


# Scalers and estimators


def read_scaler(path: Path) -> Any:
    """Return the scaler in a file: a pickle that joblib or pickle wrote, or {"mean": …, "scale": …} as .json or .npz.

    A pickle can run any code when it is read.

    Raises:
        DataError: the file is missing, or has no scaler.
    """
    _existing(path)
    if path.suffix in (".json", ".npz"):
        return _read_mean_and_scale(path)
    found = _unpickled(path, allow_pickle=True, expected="a scaler")
    if not is_estimator(found):
        raise DataError(f"{path} has a {type(found).__name__}: expected a scaler of scikit-learn")
    return found


def _read_mean_and_scale(path: Path) -> tuple[Any, Any]:
    try:
        if path.suffix == ".json":
            content: Any = json.loads(path.read_text())
        else:
            with np.load(path) as arrays:
                content = dict(arrays)
        return content["mean"], content["scale"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f'{path} has no mean and scale ({_one_line(error)}): expected "mean" and "scale"') from error


def _unpickled(path: Path, allow_pickle: bool, expected: str) -> Any:
    if not allow_pickle:
        raise DataError(
            f"{path} is a pickle, which can run any code when it is read: if you trust the file, "
            + by_interface("load it, and give elbo.adopt the object", "repeat the command with --allow-pickle")
        )
    import joblib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns if another version of it wrote the file
            return joblib.load(path)
    except Exception as error:
        raise DataError(f"{path} cannot be read as {expected}: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated, and of pickles
        yield
