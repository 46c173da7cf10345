"""The Helm chart: rendered with the values that people change, and checked against the schemas of Kubernetes."""

import json
import re
import subprocess
from base64 import b64decode
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped] # its types are a package of their own
import pytest
import yaml
from referencing import Registry, Resource

from service.access.scopes import ROUTES
from service.settings import Settings
from tests.conftest import require
from tests.data import ROOT

CHART = ROOT / "deploy" / "helm" / "elbo"
TOOLS = ROOT / ".venv-kubernetes"
CLAIM = ("artifacts.claim=models", "insecure=true")
OPERATED = ("ServiceMonitor",)  # kinds of the Prometheus Operator
VALUES: dict[str, tuple[str, ...]] = {
    "claim": CLAIM,
    "claim with a folder in it": (*CLAIM, "artifacts.subPath=elbo/artifacts"),
    "image with models": ("artifacts.image.repository=models", "artifacts.image.tag=v3", "insecure=true"),
    "remote repository": ("artifacts.url=s3://bucket/models", "insecure=true", "tracing.endpoint=http://otel:4318"),
    "keys in a secret": ("artifacts.claim=models", "apiKeys.existingSecret=keys"),
    "keys in the values": ("artifacts.claim=models", "apiKeys.file=[key.shop]"),
    "https": (*CLAIM, "tls.existingSecret=certificate", "serviceMonitor.enabled=true", "service.type=LoadBalancer"),
    "autoscaling by the queue": (*CLAIM, "autoscaling.enabled=true"),
    "autoscaling by the processor": (*CLAIM, "autoscaling.enabled=true", "autoscaling.metric=cpu"),
    "monitoring with a key": (
        *CLAIM, "serviceMonitor.enabled=true", "serviceMonitor.labels.release=prometheus",
        "serviceMonitor.keySecret.name=metrics", "serviceMonitor.keySecret.key=key",
    ),
    "settings": (*CLAIM, "settings.workers=2", "settings.log_level=warning", "settings.observe=false"),
    "placement": (
        *CLAIM, "nodeSelector.disk=ssd", "tolerations[0].key=gpu", "tolerations[0].operator=Exists",
        "priorityClassName=high", "podLabels.team=ml", "podAnnotations.note=x", "imagePullSecrets[0].name=registry",
        "topologySpreadConstraints[0].maxSkew=1", "topologySpreadConstraints[0].topologyKey=zone",
        "topologySpreadConstraints[0].whenUnsatisfiable=ScheduleAnyway",
    ),
    "network": (
        *CLAIM, "networkPolicy.from[0].podSelector.matchLabels.app=web", "networkPolicy.egress[0].ports[0].port=9093",
    ),
    "nothing optional": (
        *CLAIM, "networkPolicy.enabled=false", "podDisruptionBudget.enabled=false", "serviceAccount.create=false",
    ),
    "credentials": (
        "artifacts.url=s3://bucket/models", "insecure=true", "extraEnvFrom[0].secretRef.name=bucket",
        "extraEnv[0].name=AWS_REGION", "extraEnv[0].value=eu-west-1",
        "serviceAccount.annotations.eks\\.amazonaws\\.com/role-arn=arn",
    ),
}  # fmt: skip


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = TOOLS / "bin" / "helm"
    require(program.exists(), "no .venv-kubernetes: make test installs it")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60)


@cache
def _rendered(values: tuple[str, ...]) -> str:
    settings = [argument for value in values for argument in ("--set", value)]
    result = helm("template", "release", str(CHART), "--namespace", "ml", *settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def render(*values: str) -> dict[str, dict[str, Any]]:
    """Return the objects of the chart by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(_rendered(values)) if each}


def container(*values: str) -> dict[str, Any]:
    found: dict[str, Any] = render(*values)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


def environment(*values: str) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(*values)["env"]}


@cache
def definitions(version: Path) -> Registry[Any]:
    found: Registry[Any] = Resource.from_contents(json.loads((version / "_definitions.json").read_text())) @ Registry()
    return found


def faults(version: Path, document: dict[str, Any]) -> list[str]:
    """Return what is wrong with an object in a version of Kubernetes, whose strict schemas allow no unknown field."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", document["apiVersion"])
    schema = json.loads((version / f"{document['kind'].lower()}-{group}.json").read_text())
    registry = Resource.from_contents(schema) @ definitions(version)
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [error.message for error in validator.iter_errors(document)]


def versions() -> list[Path]:
    require((TOOLS / "schemas").exists(), "no .venv-kubernetes: make test installs it")
    return sorted((TOOLS / "schemas").iterdir())


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_chart_gives_objects_that_every_version_of_kubernetes_accepts(values: tuple[str, ...]) -> None:
    assert len(versions()) == 2
    for version in versions():
        for kind, document in render(*values).items():
            if kind not in OPERATED:
                assert faults(version, document) == [], (version.name, kind)


def test_schemas_of_kubernetes_refuse_a_misspelt_field() -> None:
    document = render(*CLAIM)["Deployment"]
    document["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    assert all("readinessprobe" in "".join(faults(version, document)) for version in versions())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["https", "monitoring with a key"])
def test_prometheus_operator_knows_every_field_of_the_service_monitor(name: str) -> None:
    document = render(*VALUES[name])["ServiceMonitor"]
    command = [str(TOOLS / "bin" / "python"), str(ROOT / "tests" / "deploy" / "operator_objects.py")]
    result = subprocess.run(command, input=json.dumps(document), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == document


def test_lint_of_helm_finds_no_fault() -> None:
    result = helm("lint", "--strict", str(CHART), "--set", ",".join(CLAIM))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("insecure=true",), "set exactly one of artifacts.claim, artifacts.image.repository and artifacts.url"),
        ((*CLAIM, "artifacts.url=s3://b"), "got claim and url"),
        (("artifacts.claim=models",), "the server has no API keys"),
        ((*CLAIM, "apiKeys.file=a", "apiKeys.existingSecret=b"), "set one of apiKeys.existingSecret"),
        (("artifacts.claim=models", "apiKeys.file=a", "serviceMonitor.enabled=true"), "needs serviceMonitor.keySecret"),
        ((*CLAIM, "replica=3"), "replica"),
        ((*CLAIM, "settings.port=9000"), "port"),
        ((*CLAIM, "autoscaling.metric=latency"), "metric"),
        (("artifacts.url=bucket", "insecure=true"), "url"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_reason(values: tuple[str, ...], words: str) -> None:
    result = helm("template", "release", str(CHART), *(each for value in values for each in ("--set", value)))
    assert result.returncode == 1
    assert words in result.stderr


def test_pod_has_no_rights_no_service_links_and_a_read_only_file_system() -> None:
    pod = render(*VALUES["image with models"])["Deployment"]["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in (*pod["containers"], *pod["initContainers"]):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_folders_that_the_server_writes_are_volumes_and_the_models_are_not_writable() -> None:
    mounts = {each["mountPath"]: each for each in container(*CLAIM)["volumeMounts"]}
    assert {"/tmp", "/state", "/artifacts"} == set(mounts)
    assert [path for path, mount in mounts.items() if not mount.get("readOnly")] == ["/tmp", "/state"]
    settings = environment(*CLAIM)
    assert (settings["ELBO_STATE"], settings["ELBO_ARTIFACTS"]) == ("/state", "/artifacts")
    assert "/artifacts" not in {each["mountPath"] for each in container(*VALUES["remote repository"])["volumeMounts"]}
    remote = environment(*VALUES["remote repository"])
    assert (remote["ELBO_ARTIFACTS"], remote["ELBO_CACHE"]) == ("s3://bucket/models", "/cache")


def test_models_of_an_image_are_copied_into_the_volume_that_the_server_reads() -> None:
    pod = render(*VALUES["image with models"])["Deployment"]["spec"]["template"]["spec"]
    (copying,) = pod["initContainers"]
    assert (copying["image"], copying["command"]) == ("models:v3", ["cp", "-R", "/artifacts/.", "/copied/"])
    (copied,) = copying["volumeMounts"]
    read = next(each for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == "/artifacts")
    assert copied["name"] == read["name"]


@pytest.mark.parametrize("name", VALUES)
def test_variables_of_the_container_are_settings_of_the_server(name: str) -> None:
    found = environment(*VALUES[name])
    names = {each.removeprefix("ELBO_").lower() for each in found if each.startswith("ELBO_")}
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("name", ["claim", "https"])
def test_probes_ask_paths_that_need_no_key_in_the_scheme_of_the_server(name: str) -> None:
    found = container(*VALUES[name])
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        asked = found[probe]["httpGet"]
        assert (asked["path"], asked["scheme"]) == (path, "HTTPS" if name == "https" else "HTTP")
        assert ROUTES[path] is None
        port = next(each["containerPort"] for each in found["ports"] if each["name"] == asked["port"])
        assert str(port) == environment(*VALUES[name])["ELBO_PORT"]


def test_pod_has_time_to_drain_and_to_finish_a_request_before_it_is_killed() -> None:
    times = ("shutdown.preStopSeconds=20", "shutdown.drainSeconds=40", "requestTimeout=100")
    pod = render(*CLAIM, *times)["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 20 + 40 + 100
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    found = environment(*CLAIM, *times)
    assert (found["ELBO_DRAIN_SECONDS"], found["ELBO_REQUEST_TIMEOUT"]) == ("40", "100")


def test_autoscaler_follows_the_wait_in_the_queue_or_the_processor() -> None:
    queue = render(*VALUES["autoscaling by the queue"])
    (metric,) = queue["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "elbo_queue_wait_seconds"
    assert metric["pods"]["target"]["averageValue"] == "0.05"
    assert "replicas" not in queue["Deployment"]["spec"]
    (metric,) = render(*VALUES["autoscaling by the processor"])["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["resource"]["name"] == "cpu"


@pytest.mark.parametrize("name", ["keys in a secret", "keys in the values"])
def test_keys_are_mounted_as_the_file_of_the_setting(name: str) -> None:
    found = environment(*VALUES[name])
    mount = next(each for each in container(*VALUES[name])["volumeMounts"] if each["name"] == "keys")
    assert found["ELBO_API_KEYS_FILE"] == f"{mount['mountPath']}/api-keys.toml"
    assert "ELBO_INSECURE" not in found
    if name == "keys in the values":
        assert b64decode(render(*VALUES[name])["Secret"]["data"]["api-keys.toml"]) == b"[key.shop]"


def test_labels_of_service_budget_and_policy_select_the_pods_of_the_deployment() -> None:
    found = render(*VALUES["monitoring with a key"])
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        found["Deployment"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitored = found["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= found["Service"]["metadata"]["labels"].items()


def test_network_policy_lets_out_only_what_the_values_need() -> None:
    def ports(name: str) -> list[int]:
        egress = render(*VALUES[name])["NetworkPolicy"]["spec"]["egress"]
        return [port["port"] for rule in egress for port in rule["ports"]]

    assert ports("claim") == [53, 53]
    assert ports("remote repository") == [53, 53, 443, 4318]
    assert ports("network") == [53, 53, 9093]


def test_metric_of_the_autoscaler_is_made_from_a_metric_of_the_server() -> None:
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    rule = yaml.safe_load(re.findall(r"```yaml\n(rules:.*?)```", page, re.DOTALL)[0])["rules"]["custom"][0]
    assert rule["name"]["as"] == "elbo_queue_wait_seconds"
    assert rule["metricsQuery"].count("elbo_queue_seconds_sum") == 1
    assert rule["metricsQuery"].count("elbo_queue_seconds_count") == 1
