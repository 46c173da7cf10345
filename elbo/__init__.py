"""Train, adopt, load and use models: autoencoders, variational autoencoders and PCA.

    import elbo

    model = elbo.fit(rows, kind="vae", name="web")
    model.p_value(rows)
    model.save("artifacts")

`import elbo` loads no other package. Each name is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elbo import client, pyod, sklearn
    from elbo.adopting import adopt
    from elbo.fitting import fit
    from elbo.model import Model, load
    from models.errors import ElboError

    __version__: str

__all__ = ["ElboError", "Model", "__version__", "adopt", "client", "fit", "load", "pyod", "sklearn"]

_MODULES = {
    "ElboError": "models.errors",
    "Model": "elbo.model",
    "adopt": "elbo.adopting",
    "fit": "elbo.fitting",
    "load": "elbo.model",
}
_SUBMODULES = ("client", "pyod", "sklearn")


if not TYPE_CHECKING:  # otherwise, type checkers would accept every name

    def __getattr__(name: str) -> Any:
        """Import the public name `name` when it is first used (PEP 562)."""
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("elbo")
        elif name in _MODULES or name in _SUBMODULES:
            from importlib import import_module

            try:
                module = import_module(_MODULES.get(name, f"elbo.{name}"))
                value = module if name in _SUBMODULES else getattr(module, name)
            except ModuleNotFoundError as error:
                raise _missing_package(name, error) from error
        else:
            raise AttributeError(f"module 'elbo' has no attribute {name!r}")
        globals()[name] = value
        return value


def _missing_package(name: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return an error that says which extra of Elbo has the package that `elbo.<name>` needs."""
    package = (error.name or "").partition(".")[0]
    distribution = {"client": "elbo", "Model": "'elbo[serve]'", "load": "'elbo[serve]'"}.get(name, "'elbo[train]'")
    return ModuleNotFoundError(f"elbo.{name} needs the package {package}: pip install {distribution}", name=error.name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
