"""Licences of what serving needs, the audit of the lock files, the bills of materials, the digests of base images."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest

from tests.data import ROOT

REQUIREMENTS = ROOT / "requirements"
PERMITTED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC",
    "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
CLASSIFIERS = {  # of packages that do not declare an SPDX expression
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
READ_BY_HAND = {  # packages whose metadata name no licence, and a line of the licence file that they contain
    "protobuf": ("BSD-3-Clause", "Redistribution and use in source and binary forms"),
    "pysimdjson": ("MIT", "Permission is hereby granted, free of charge"),
}
LOCKED = re.findall(r"^([\w.-]+)==", (REQUIREMENTS / "serve.lock").read_text(), re.MULTILINE)


def licences(name: str) -> set[str]:
    """Return the SPDX identifiers of the licences of an installed package; an empty set if they are unknown."""
    metadata = distribution(name).metadata
    if "License-Expression" in metadata:
        expression = metadata["License-Expression"]
        return {part.strip("() ") for part in re.split(r" AND | OR ", expression)}
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    if not classifiers and "License" in metadata and metadata["License"] in PERMITTED:
        return {metadata["License"]}
    return {CLASSIFIERS.get(text, text) for text in classifiers}


@pytest.mark.parametrize("name", [*LOCKED, "torch"])
def test_licence_of_every_package_that_serving_needs_is_permitted(name: str) -> None:
    found = licences(name)
    if name in READ_BY_HAND and not found:
        licence, line = READ_BY_HAND[name]
        files = [path for path in distribution(name).files or () if "LICENSE" in path.name.upper()]
        assert any(line in path.read_text() for path in files), f"the licence file of {name} has changed: read it"
        found = {licence}
    assert found, f"{name} declares no licence: read its licence file, and add it to READ_BY_HAND"
    assert found <= PERMITTED


def write_program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def audit(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run requirements/audit.py with `program`, a Python program, in the place of pip-audit."""
    path = write_program(folder, "pip-audit", f"#!{sys.executable}\n{program}")
    command = [sys.executable, str(REQUIREMENTS / "audit.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


ANSWER = """
import json, sys
lines = open(sys.argv[sys.argv.index("-r") + 1]).read().split()
packages = [dict(zip(("name", "version"), line.split("=="), strict=True), vulns=[]) for line in lines]
"""
FLAW = """
for package in packages:
    if package["name"] == "pillow":
        package["vulns"] = [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["99.1"], "description": ""}]
"""
PRINT = 'print(json.dumps({"dependencies": packages}))'


def test_audit_looks_up_every_locked_package_and_torch(tmp_path: Path) -> None:
    result = audit(tmp_path, ANSWER + "print(*lines, file=open(sys.argv[0] + '.asked', 'w'))\n" + PRINT)
    asked = (tmp_path / "pip-audit.asked").read_text().split()
    assert (result.returncode, result.stdout) == (0, f"audited {len(asked)} packages: none is vulnerable\n")
    assert "torch==2.13.0" in asked
    for lock in REQUIREMENTS.glob("*.lock"):
        pins = re.findall(r"^([\w.-]+==[^\s+]+)", lock.read_text(), re.MULTILINE)
        assert set(pins) <= set(asked), lock


def test_audit_fails_and_names_the_package_if_one_is_vulnerable(tmp_path: Path) -> None:
    result = audit(tmp_path, ANSWER + FLAW + PRINT + "\nsys.exit(1)")
    assert result.returncode == 1
    assert re.search(r"^pillow \S+: PYSEC-1, fixed in 99\.1$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ConnectionError('no route to the index')", "ConnectionError: no route to the index"),
        (ANSWER + "for each in packages: each['skip_reason'] = 'not found'\n" + PRINT, "not found"),
        ("", "pip-audit printed nothing"),
    ],
)
def test_audit_is_skipped_with_the_reason_if_the_index_cannot_be_reached(
    tmp_path: Path, program: str, reason: str
) -> None:
    result = audit(tmp_path, program)
    assert result.returncode == 0
    assert result.stdout == f"audit skipped: the index of advisories cannot be reached: {reason}\n"


def test_audit_reports_a_vulnerable_package_even_if_others_are_unknown(tmp_path: Path) -> None:
    unknown = "packages[0]['skip_reason'] = 'not found'\n"
    result = audit(tmp_path, ANSWER + FLAW + unknown + PRINT)
    assert result.returncode == 1
    assert result.stdout.startswith("not in the index of advisories: ")


def bill(folder: Path, left_out: str = "") -> subprocess.CompletedProcess[str]:
    """Run requirements/sbom.py with a program that lists every installed package, except `left_out`."""
    components = [
        {"bom-ref": name, "name": name, "version": each.version}
        for each in distributions()
        if (name := each.metadata["Name"]) != left_out
    ]
    refs = [each["bom-ref"] for each in components]
    document = {
        "bomFormat": "CycloneDX",
        "metadata": {"component": {"bom-ref": "root", "name": "elbo"}},
        "components": components,
        "dependencies": [{"ref": "root", "dependsOn": refs}, *({"ref": ref} for ref in refs)],
    }
    (folder / "document.json").write_text(json.dumps(document))
    program = write_program(folder, "cyclonedx-py", f"#!/bin/sh\ncat {folder}/document.json\n")
    command = [sys.executable, str(REQUIREMENTS / "sbom.py"), str(program), sys.executable, str(folder / "sbom")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_bill_of_materials_lists_what_serving_needs_and_nothing_else(tmp_path: Path) -> None:
    assert bill(tmp_path).returncode == 0
    for lock, extra in (("serve", set()), ("train", {"polars", "scikit-learn"})):
        document = json.loads((tmp_path / "sbom" / f"{lock}.cdx.json").read_text())
        listed = {re.sub(r"[-_.]+", "-", each["name"]).lower() for each in document["components"]}
        assert {re.sub(r"[-_.]+", "-", name).lower() for name in LOCKED} | {"torch"} | extra <= listed
        assert "pytest" not in listed
        refs = {each["bom-ref"] for each in document["components"]}
        assert set(document["dependencies"][0]["dependsOn"]) == refs


def test_bill_of_materials_is_refused_if_a_package_is_not_installed(tmp_path: Path) -> None:
    result = bill(tmp_path, left_out="orjson")
    assert result.returncode == 1
    assert "not installed, so not in the bill of materials: orjson" in result.stderr


def pin_images(folder: Path, digest: str) -> subprocess.CompletedProcess[str]:
    """Run requirements/pin-images in a copy of the project. `digest` is what docker answers for every image."""
    docker = f'#!/bin/sh\necho "$4" >> {folder}/asked\necho {digest}\n'
    write_program(folder / "bin", "docker", docker)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [str(folder / "project" / "requirements" / "pin-images")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_pin_images_adds_the_digest_of_every_base_image_and_replaces_it_when_it_runs_again(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "requirements").mkdir(parents=True)
    for name in ("Dockerfile", "docker-compose.yml", "requirements/pin-images"):
        shutil.copy(ROOT / name, project / name)
    pulled = r"python|prom/prometheus|prom/alertmanager|grafana/grafana|prom/node-exporter"
    for digit in "ab":
        digest = f"sha256:{digit * 64}"
        result = pin_images(tmp_path, digest)
        assert result.returncode == 0, result.stderr
        text = (project / "Dockerfile").read_text() + (project / "docker-compose.yml").read_text()
        found = re.findall(rf"(?:FROM|image:) ((?:{pulled}):\S+)", text)
        assert len(found) == 5
        assert all(image.endswith(f"@{digest}") and image.count("@") == 1 for image in found)
    asked = (tmp_path / "asked").read_text().split()
    assert len(asked) == 10
    assert not any("@" in image or image.startswith("elbo") for image in asked)
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*schema, str(project / "docker-compose.yml")], capture_output=True).returncode == 0
    for name in ("Dockerfile", "docker-compose.yml"):  # nothing else has changed
        unpinned = re.sub(r"@sha256:[0-9a-f]{64}", "", (project / name).read_text())
        assert unpinned == re.sub(r"@sha256:[0-9a-f]{64}", "", (ROOT / name).read_text())


def test_pin_images_changes_nothing_if_the_registry_gives_no_digest(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "requirements").mkdir(parents=True)
    for name in ("Dockerfile", "docker-compose.yml", "requirements/pin-images"):
        shutil.copy(ROOT / name, project / name)
    result = pin_images(tmp_path, "unauthorized")
    assert result.returncode == 1
    assert "expected a digest, got 'unauthorized'" in result.stderr
    assert (project / "Dockerfile").read_text() == (ROOT / "Dockerfile").read_text()
