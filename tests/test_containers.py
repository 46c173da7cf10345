"""Properties of the Dockerfile and docker-compose.yml that can be checked without a container engine."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
PULLED = {name: service for name, service in SERVICES.items() if "build" not in service}
APIS = sorted(name for name in SERVICES if name.startswith("api"))
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
DIGEST = r"(@sha256:[0-9a-f]{64})?"  # make pin-images adds it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(stage: str) -> list[tuple[str, str]]:
    """Return the instructions of the stages on which `stage` is based, followed by the instructions of `stage`."""
    origin, body = re.findall(rf"^FROM (\S+) AS {stage}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)[0]
    inherited = [] if ":" in origin else instructions(origin)
    return inherited + re.findall(r"^([A-Z]+) (.*)$", body, re.MULTILINE)


def last_argument(stage: str, keyword: str) -> str:
    return [argument for word, argument in instructions(stage) if word == keyword][-1]


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_compose_file_obeys_the_compose_specification() -> None:
    result = check_compose(ROOT / "docker-compose.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_check_refuses_a_misspelt_key(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("read_only:", "readonly:"))
    result = check_compose(wrong)
    assert result.returncode == 1
    assert "readonly" in result.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_container_has_a_read_only_root_and_no_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["init"] is True
    assert 0 < service["pids_limit"] <= 512
    assert re.fullmatch(r"[1-8]g", service["mem_limit"])
    assert "privileged" not in service


def test_cpu_wheel_of_torch_is_installed_by_its_hash() -> None:
    install = next(argument for word, argument in instructions("packages") if "whl/${TORCH}" in argument)
    assert '--require-hashes -r "/torch-${TORCH}.lock"' in install
    lock = (ROOT / "requirements" / "torch-cpu.lock").read_text()
    assert re.fullmatch(r"torch==[\d.]+\+cpu \\\n    --hash=sha256:[0-9a-f]{64} --hash=sha256:[0-9a-f]{64}\n", lock)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_the_loopback_address_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        inside = "8000" if name in BUILT else r"\d+"
        assert re.fullmatch(rf"127\.0\.0\.1:\d+:{inside}", port)


def test_no_two_services_publish_the_same_port() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert sorted(port.split(":")[1] for port in ports) == ["3000", "8000", "8001", "9090", "9093"]


@pytest.mark.parametrize("name", APIS)
def test_service_may_be_insecure_only_because_its_ports_are_published_on_the_loopback_address(name: str) -> None:
    assert SERVICES[name]["environment"]["ELBO_INSECURE"] == "1"
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])
    # Whoever runs the image without compose must choose: it listens on every interface.
    assert "ELBO_HOST=0.0.0.0" in last_argument("serve", "ENV")
    assert "ELBO_INSECURE" not in last_argument("serve", "ENV")


@pytest.mark.parametrize("name", APIS)
def test_service_starts_after_the_demonstration_training_and_cannot_write_artifacts(name: str) -> None:
    assert SERVICES[name]["depends_on"] == {"train": {"condition": "service_completed_successfully"}}
    assert SERVICES[name]["volumes"][0] == "artifacts:/artifacts:ro"
    assert SERVICES["train"]["volumes"] == ["artifacts:/artifacts"]
    assert SERVICES["train"]["command"] == ["demo"]
    assert SERVICES["train"]["restart"] == "no"


def test_gpu_service_is_opt_in_and_installs_cuda_wheels() -> None:
    gpu = SERVICES["api-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert re.fullmatch(r"cu\d+", gpu["build"]["args"]["TORCH"])
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", PULLED)
def test_pulled_service_is_opt_in_and_pinned_and_mounts_only_folders_that_exist(name: str) -> None:
    service = PULLED[name]
    assert service["profiles"] == ["monitoring"]
    assert re.fullmatch(rf"[\w./-]+:v?\d+\.\d+\.\d+{DIGEST}", service["image"])
    for volume in service["volumes"]:
        source, mode = volume.partition(":")[0], volume.rpartition(":")[2]
        if source.startswith("./"):
            assert (ROOT / source).is_dir()
            assert mode == "ro"
        elif source != "/":
            assert source in COMPOSE["volumes"]


def test_monitoring_configuration_uses_the_service_names_of_the_compose_file() -> None:
    text = "".join(path.read_text() for path in (ROOT / "deploy").rglob("*.yml"))
    named = set(re.findall(r"\b(api|prometheus|alertmanager|node-exporter):(\d+)", text))
    assert named == {("api", "8000"), ("prometheus", "9090"), ("alertmanager", "9093"), ("node-exporter", "9100")}
    mounted = SERVICES["api"]["environment"]["ELBO_REMOTE_WRITE"]
    assert (ROOT / mounted.replace("/etc/elbo", "deploy/elbo")).is_file()


@pytest.mark.parametrize("name", BUILT)
def test_build_target_of_a_service_is_a_stage_of_the_dockerfile(name: str) -> None:
    target = SERVICES[name]["build"]["target"]
    assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE, re.MULTILINE)


def test_default_stage_of_the_dockerfile_is_train() -> None:
    assert re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "train"


@pytest.mark.parametrize("stage", ["serve", "train"])
def test_image_runs_as_a_numeric_user_that_is_not_root(stage: str) -> None:
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", last_argument(stage, "USER"))
    assert instructions(stage)[-1][0] == "USER"


@pytest.mark.parametrize("stage", ["serve", "train"])
def test_image_starts_without_a_shell_so_that_signals_reach_python(stage: str) -> None:
    assert [*json.loads(last_argument(stage, "ENTRYPOINT")), *json.loads(last_argument(stage, "CMD"))] == [
        "elbo",
        "serve",
    ]


@pytest.mark.parametrize("stage", ["serve", "train"])
def test_health_check_of_an_image_requests_readyz(stage: str) -> None:
    command = json.loads(last_argument(stage, "HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python", "-m"]
    assert '"/readyz"' in (ROOT / command[2].replace(".", "/")).with_suffix(".py").read_text()
    show = f"import sys, {command[2]}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {name for name in run.stdout.split() if re.match(r"(elbo|service|models|training)\b", name)}
    assert ours == {"service", "service.platforms", command[2]}
    assert not {"torch", "numpy", "pydantic"} & set(run.stdout.split())  # with torch, a check would take seconds


def test_serving_image_installs_only_the_serving_lock_file() -> None:
    locks = [lock for _, argument in instructions("packages") for lock in re.findall(r"(\w+(?:-\*)?\.lock) ", argument)]
    assert set(locks) == {"serve.lock", "torch-*.lock"}
    assert "lock" not in "".join(argument for _, argument in instructions("serve"))


def test_torch_is_pinned_to_one_version_everywhere() -> None:
    pins = {
        name: set(re.findall(r"\btorch==([\d.]+\d)", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "Makefile", "Dockerfile", "requirements/torch-cpu.lock")
    }
    assert set(map(frozenset, pins.values())) == {frozenset({"2.13.0"})}, pins


def test_dockerignore_allows_exactly_the_files_of_the_wheel() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    needed = {*PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"], "pyproject.toml", "requirements"}
    needed |= {*PROJECT["project"]["license-files"], PROJECT["project"].get("readme", "README.md")}
    assert needed == allowed


@pytest.mark.parametrize("target", ["serve", "train"])
def test_artifacts_and_runs_are_written_to_the_volume(target: str) -> None:
    """The root file system is read-only: training that writes outside the volume would fail after the last epoch."""
    variables = dict(
        pair.split("=", 1) for keyword, line in instructions(target) if keyword == "ENV" for pair in line.split()
    )
    volume = last_argument(target, "VOLUME")
    assert {variables["ELBO_ARTIFACTS"], variables["ELBO_RUNS"].rpartition("/")[0]} == {volume}
