"""Find the functions of the user's module: those that encode, decode and reconstruct rows."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.adoption.arguments import by_interface, setting
from training.adoption.draws import without_noise
from training.adoption.user_code import line_of_error
from training.errors import AdoptionError

Spread = Literal["log_variance", "std"]
Function = Callable[[nn.Module, Tensor], Any]  # of the module and its inputs
Named = str | nn.Module | Callable[..., Any] | None

PAIRS = (("encode", "decode"), ("encoder", "decoder"))
RECONSTRUCTION_KEYS = (
    "reconstruction", "reconstructions", "recon", "recon_x", "x_recon", "x_hat", "xhat", "x_rec", "rec", "output",
    "outputs", "decoded", "pred", "prediction", "y", "mu_x", "logits",
)  # fmt: skip
MEAN_KEYS = ("mean", "mu", "z_mean", "z_mu", "mu_z", "embedding", "latent", "latents", "code", "z")
SPREAD_KEYS = {
    "log_variance": "log_variance", "logvar": "log_variance", "log_var": "log_variance", "log_covariance":
    "log_variance", "z_logvar": "log_variance", "z_log_var": "log_variance", "std": "std", "sigma": "std",
}  # fmt: skip
PROBE_ROWS = 5  # a layer could take a batch of 1 or 3 rows for the channels of one image
TOLERANCE = 1e-5  # relative; decode(encode(x)) is the same as forward(x) up to this


@dataclass(frozen=True, kw_only=True)
class Functions:
    """The functions of a module, for inputs [B, D]. They are reshaped to the shape that the module takes.

    Args:
        module: the copy of the user's module.
        source: the name of the class of the user's module.
        inner: the shape in which the module takes one row.
        encode: the module's own function, of rows in the shape `inner`; None if the module only reconstructs.
        decode: the module's own function, of latents in the shape `code`; None if the module only reconstructs.
        forward: the module's own function, of rows in the shape `inner`; None if there are `encode` and `decode`.
        code: the shape of the latents of one row; None without latents.
        spread: what `encode` returns besides the mean.
        splits: whether `encode` returns the mean and the spread as one tensor.
        notes: what the user should know.
    """

    module: nn.Module
    source: str
    inner: tuple[int, ...]
    encode: Function | None
    decode: Function | None
    forward: Function | None
    code: tuple[int, ...] | None = None
    spread: Spread | None = None
    splits: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def latents(self) -> int:
        """K: the number of latents; 0 if the module does not give them."""
        return 0 if self.code is None else int(torch.Size(self.code).numel())

    def encode_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean [B, K] of the latents of x [B, D], and their spread [B, K] if the module gives one."""
        assert self.encode is not None
        mean, spread = read_code(self.encode(self.module, self.given(x)))
        if self.splits:
            mean, spread = mean.chunk(2, dim=1)
        mean = mean.reshape(-1, self.latents)
        return mean, None if spread is None else spread.reshape(-1, self.latents)

    def decode_rows(self, z: Tensor) -> Tensor:
        """Return the reconstruction [B, D] for latents z [B, K]."""
        assert self.decode is not None
        assert self.code is not None
        found = self.decode(self.module, z.reshape(-1, *self.code))
        return read_reconstruction(found, None, self.width)[0].reshape(-1, self.width)

    def reconstruct_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the reconstruction [B, D] of x [B, D], and the latents [B, K] if `forward` returns them."""
        assert self.forward is not None
        given = self.given(x)
        x_hat, code = read_reconstruction(self.forward(self.module, given), given, self.width)
        code = None if code is None or self.code is None else code.reshape(-1, self.latents)
        return x_hat.reshape(-1, self.width), code

    @property
    def width(self) -> int:
        """D: the number of features."""
        return int(torch.Size(self.inner).numel())

    def given(self, x: Tensor) -> Tensor:
        """Return x [B, D] in the shape that the module takes."""
        return x if self.inner == (self.width,) else x.reshape(-1, *self.inner)


def inspect_module(
    module: nn.Module,
    original: nn.Module,
    shape: tuple[int, ...],
    rows: Tensor,
    *,
    encode: Named = None,
    decode: Named = None,
    spread: Spread | None = None,
) -> Functions:
    """Return the functions of `module`, the copy of `original`.

    Args:
        shape: the shape of one row.
        rows: a few rows in model units, [B, D].
        encode: the function of the encoder: a name, a part of the module, or a function of the module and its inputs.
            By default, the methods encode and decode are used, or else the parts encoder and decoder.
        decode: the function of the decoder.
        spread: what `encode` returns besides the mean; by default, it is the logarithm of the variance if a value is
            negative, else the standard deviation.

    Raises:
        AdoptionError: the module has no function that reconstructs rows, or returns something that is not understood.
    """
    if (encode is None) != (decode is None):
        given, missing = ("encode", "decode") if decode is None else ("decode", "encode")
        raise AdoptionError(f"{setting(given)} is given without {setting(missing)}: name both functions, or neither")
    source = type(original).__name__
    if encode is not None:
        pair = _function(encode, module, original, "encode"), _function(decode, module, original, "decode")
        return _with_codes(module, source, shape, rows, *pair, spread)
    failures = []
    for names in PAIRS:
        if all(callable(getattr(module, name, None)) for name in names):
            try:
                found = _with_codes(module, source, shape, rows, _call(names[0]), _call(names[1]), spread)
            except AdoptionError as error:
                failures.append(f"{names[0]} and {names[1]}: {error}")
                continue
            if (difference := _differs_from_forward(found, shape, rows)) is None:
                return found
            failures.append(f"{names[0]} and {names[1]} {difference}")
    return _without_codes(module, source, shape, rows, failures)


def _call(name: str) -> Function:
    return lambda module, given: getattr(module, name)(given)


def _function(named: Named, module: nn.Module, original: nn.Module, argument: str) -> Function:
    """Return the function that the user has named."""
    if isinstance(named, str):
        owner: Any = module
        for name in named.split("."):
            owner = getattr(owner, name, None)
        if not callable(owner):
            raise AdoptionError(
                f"{setting(argument, named)}: {type(original).__name__} has no such method or part; it has the parts "
                f"{', '.join(name for name, _ in module.named_children()) or 'none'}"
            )
        return lambda module, given: _at(module, named)(given)
    paths = {id(part): path for path, part in original.named_modules()}
    owner = getattr(named, "__self__", named)
    if id(owner) in paths:
        path, method = paths[id(owner)], None if owner is named else getattr(named, "__name__", "")
        full = ".".join(part for part in (path, method) if part)
        return lambda module, given: (_at(module, full) if full else module)(given)
    if isinstance(named, nn.Module) or not callable(named):
        raise AdoptionError(f"{setting(argument)} is no part of the module: expected a name, a part, or a function")
    try:
        count = len(inspect.signature(named).parameters)
    except (TypeError, ValueError):
        count = 2
    if count != 2:
        raise AdoptionError(
            f"{setting(argument)} is a function of {count} arguments: expected a function of the module and its "
            "inputs, such as lambda module, x: module.embed(x)[0]"
        )
    return named


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def inner_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes in which a module may take a row of `shape`, the likeliest first."""
    width = int(torch.Size(shape).numel())
    found = [shape]
    if len(shape) == 2:
        found.append((1, *shape))
    found.append((width,))
    if len(shape) == 1:
        found.append((1, width))
    return list(dict.fromkeys(found))


def _with_codes(
    module: nn.Module,
    source: str,
    shape: tuple[int, ...],
    rows: Tensor,
    encode: Function,
    decode: Function,
    spread: Spread | None,
) -> Functions:
    """Return the functions of a module that encodes and decodes. Raises AdoptionError."""
    failure: Exception | None = None
    for inner in inner_shapes(shape):
        found = Functions(module=module, source=source, inner=inner, encode=encode, decode=decode, forward=None)
        try:
            return _read_pair(found, rows, spread)
        except AdoptionError:
            raise
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            failure = failure or error
    assert failure is not None
    raise AdoptionError(f"cannot run it on rows of the shape {list(shape)}: {_reason(failure)}") from failure


def _read_pair(found: Functions, rows: Tensor, spread: Spread | None) -> Functions:
    assert found.encode is not None
    assert found.decode is not None
    rows = rows[:PROBE_ROWS]
    with without_noise():
        mean, scale = read_code(found.encode(found.module, found.given(rows)))
        if len(mean) != len(rows):
            raise ValueError(f"{len(rows)} rows have a code of the shape {list(mean.shape)}")
        for splits in (False, True):
            if splits and (scale is not None or mean.dim() != 2 or mean.shape[1] % 2):
                break
            code = mean.chunk(2, dim=1)[0] if splits else mean
            try:
                read_reconstruction(found.decode(found.module, code), None, found.width)
            except (RuntimeError, AdoptionError):
                if splits:
                    break
                continue
            spread_values = mean.chunk(2, dim=1)[1] if splits else scale
            return replace(
                found,
                code=tuple(code.shape[1:]),
                splits=splits,
                spread=None if spread_values is None else _spread_of(spread_values, spread),
            )
        read_reconstruction(found.decode(found.module, mean), None, found.width)  # raises the first reason again
    raise AdoptionError(
        "the decoder does not take what the encoder gives: name the functions with "
        f"{setting('encode')} and {setting('decode')}"
    )


def _spread_of(values: Tensor, given: Spread | None) -> Spread:
    if given is None:
        return "log_variance" if bool((values < 0).any()) else "std"
    if given == "std" and bool((values < 0).any()):
        raise AdoptionError(
            f"{setting('spread', 'std')}, but encode returns negative values, which no standard deviation is: leave "
            f"{setting('spread')} out"
        )
    return given


def read_code(found: Any) -> tuple[Tensor, Tensor | None]:
    """Return the mean, and the spread or None, of what `encode` returned: a tensor, a tuple, or a dict.

    Raises:
        AdoptionError: it is something else.
    """
    if isinstance(found, Tensor):
        return found, None
    if isinstance(found, Mapping):
        mean = next((found[key] for key in MEAN_KEYS if isinstance(found.get(key), Tensor)), None)
        if mean is not None:
            return mean, next((found[key] for key in SPREAD_KEYS if isinstance(found.get(key), Tensor)), None)
    if isinstance(found, torch.distributions.Distribution):
        return found.mean, found.stddev
    if isinstance(found, Sequence) and not isinstance(found, str):
        tensors = [each for each in found if isinstance(each, Tensor)]
        if len(tensors) == len(found) and len({_shape(each) for each in tensors}) == 1:
            if len(tensors) == 2:
                return tensors[0], tensors[1]
            if len(tensors) == 3:  # the draw, which is the mean here, the mean, and the spread
                return tensors[1], tensors[2]
    raise AdoptionError(
        f"encode returns {_describe(found)}: expected a code, (mean, log_variance) or (mean, std); "
        + by_interface(
            "name a function that returns one of these, such as encode=lambda module, x: module.encode(x)[0]",
            "name a method that returns one of these with --encode",
        )
    )


def read_reconstruction(found: Any, given: Tensor | None, width: int) -> tuple[Tensor, Tensor | None]:
    """Return the reconstruction and the latents, or None, from what `forward` or `decode` returned.

    Args:
        found: a tensor, a tuple, or a dict.
        given: the inputs of the function, which the result may contain too; None if they are no rows.
        width: D, the number of values of a row.

    Raises:
        AdoptionError: there is no tensor with D values per row.
    """
    if isinstance(found, torch.distributions.Distribution):
        found = found.mean
    named = _named(found)
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    fits = {
        key: value
        for key, value in tensors.items()
        if value.is_floating_point() and _is_reconstruction(value, width, given) and not _is_copy(value, given)
    }  # fmt: skip
    if not fits:
        if tensors and all(value.dim() == 0 for value in tensors.values()):
            raise AdoptionError(
                f"it returns {_describe(found)}, which is the loss: expected the reconstruction of each row; return it "
                f"too, or name the functions with {setting('encode')} and {setting('decode')}"
            )
        if any(_is_copy(value, given) for value in tensors.values()):
            raise AdoptionError("it returns its input: expected a reconstruction, which it computes from the input")
        raise AdoptionError(f"it returns {_describe(found)}: expected a reconstruction with {width} values per row")
    key = next((key for key in RECONSTRUCTION_KEYS if key in fits), next(iter(fits)))
    others = {
        name: value
        for name, value in tensors.items()
        if name != key and value.dim() == 2 and _shape(value)[0] == _shape(fits[key])[0] and name not in SPREAD_KEYS
        and not _is_copy(value, given)
    }  # fmt: skip
    code = next((others[name] for name in MEAN_KEYS if name in others), next(iter(others.values()), None))
    return fits[key], code


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as numbers: while torch traces, `tensor.shape` has tensors."""
    return tuple(int(size) for size in tensor.shape)


def _is_reconstruction(value: Tensor, width: int, given: Tensor | None) -> bool:
    """Return whether `value` has D = `width` values for each row."""
    shape = _shape(value)
    if not shape or math.prod(shape[1:]) != width:
        return False
    return given is None or shape[0] == _shape(given)[0]


def _named(found: Any) -> dict[Any, Any]:
    """Return the parts of a result by name, or by place."""
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, Sequence) and not isinstance(found, str):
        return dict(enumerate(found))
    if hasattr(found, "__dict__") and not isinstance(found, Tensor):
        return dict(vars(found))
    return {0: found}


def _is_copy(value: Tensor, given: Tensor | None) -> bool:
    """Return whether a part of the result is the input itself, which some modules return for the loss."""
    if given is None or _shape(value) != _shape(given):
        return False
    return value is given or value.data_ptr() == given.data_ptr()


def _differs_from_forward(found: Functions, shape: tuple[int, ...], rows: Tensor) -> str | None:
    """Return how decode(encode(x)) differs from forward(x); None if it does not differ, or if forward cannot run."""
    try:
        whole = _without_codes(found.module, found.source, shape, rows, [])
    except AdoptionError:
        return None
    with without_noise():
        by_pair = found.decode_rows(found.encode_rows(rows)[0])
        by_forward = whole.reconstruct_rows(rows)[0]
    scale = float(by_forward.abs().max())
    difference = float((by_pair - by_forward).abs().max())
    if difference <= TOLERANCE * max(scale, 1e-6):
        return None
    return f"give other reconstructions than forward (by {difference:.3g}, scale {scale:.3g})"


def _without_codes(
    module: nn.Module, source: str, shape: tuple[int, ...], rows: Tensor, failures: Sequence[str]
) -> Functions:
    """Return the functions of a module that only reconstructs. Raises AdoptionError."""
    more = f"; tried too: {'; '.join(failures)}" if failures else ""
    failure: Exception | None = None
    rows = rows[:PROBE_ROWS]
    for inner in inner_shapes(shape):
        found = Functions(
            module=module,
            source=source,
            inner=inner,
            encode=None,
            decode=None,
            forward=lambda module, given: module(given),
        )
        try:
            with without_noise():
                given = found.given(rows)
                x_hat, code = read_reconstruction(module(given), given, found.width)
        except AdoptionError as error:
            if failure is None or not isinstance(failure, AdoptionError):
                failure = error
            continue
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            failure = failure or error
            continue
        if len(x_hat) == len(rows):
            notes = [f"only forward is adopted, without latents: {failure}" for failure in failures]
            return replace(found, code=None if code is None else tuple(code.shape[1:]), notes=notes)
    if isinstance(failure, AdoptionError):
        raise AdoptionError(f"forward of {source} cannot be adopted: {failure}{more}")
    reason = "it does not return a row for each row" if failure is None else _reason(failure)
    raise AdoptionError(
        f"forward of {source} cannot run on rows of the shape {list(shape)}: {reason}; give {setting('shape')} the "
        f"shape of one row, or name the functions with {setting('encode')} and {setting('decode')}{more}"
    ) from failure


def _reason(error: Exception) -> str:
    """Return one line that says why the user's code failed, and where."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    line = line_of_error(error.__traceback__)
    return f"{text} at {line}" if line else text


def _describe(found: Any) -> str:
    """Return the type and the shapes of a result in a few words."""
    if isinstance(found, Tensor):
        return f"a tensor of the shape {list(_shape(found))}"
    if isinstance(found, Mapping):
        return "a dict of " + ", ".join(f"{key} ({_describe(value)})" for key, value in list(found.items())[:4])
    if isinstance(found, list | tuple):
        return f"a {type(found).__name__} of " + ", ".join(_describe(value) for value in found[:4])
    return f"an object of the type {type(found).__name__}"
