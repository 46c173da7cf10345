"""Fixtures: a server for the code blocks of the pages, and the data files that the how-to guides assume."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import succeed, write
from tests.docs.snippets import Servers, serving

HEADER = "cpu [%],latency [ms],errors,memory [GB]"


def metrics(rows: int, seed: int) -> np.ndarray:
    """Return random rows of four metrics, [rows, 4]. The first two metrics depend on a shared load."""
    random = np.random.RandomState(seed)
    load, noise = random.standard_normal(rows), random.standard_normal((4, rows))
    columns = [50 + 5 * load + noise[0], 200 + 20 * load + 5 * noise[1], 3 + 0.5 * noise[2], 20 + noise[3]]
    return np.column_stack(columns)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data files that the how-to guides name, such as metrics.csv and hosts.csv."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "metrics.csv", metrics(800, 0), HEADER)
    write(folder / "lastweek.csv", metrics(400, 1), HEADER)
    rows = metrics(400, 2)
    write(folder / "rows.csv", rows[:20], "cpu,latency,errors,memory")
    np.save(folder / "rows.npy", rows)
    (folder / "rows.ndjson").write_text("".join(f"{row.tolist()}\n" for row in rows[:5]))
    lines = [
        f"web-{index % 3},2026-01-01T00:00:00Z,{index},{','.join(map(str, row))}" for index, row in enumerate(rows)
    ]
    (folder / "hosts.csv").write_text("\n".join([f"host,time,rack,{HEADER}", *lines]) + "\n")
    times = [f"2026-01-{1 + index // 3 // 24:02}T{index // 3 % 24:02}:00:00Z" for index in range(len(rows))]
    lines = [f"{time},web-{index % 3},{','.join(map(str, rows[index]))}" for index, time in enumerate(times)]
    (folder / "fleet.csv").write_text("\n".join([f"ts,host,{HEADER}", *lines]) + "\n")
    gaps = [",".join("" if column == 1 else f"{value:.4f}" for column, value in enumerate(row)) for row in rows[:40]]
    whole = [",".join(f"{value:.4f}" for value in row) for row in rows[40:]]
    (folder / "gaps.csv").write_text("\n".join([HEADER, *gaps, *whole]) + "\n")
    images = np.random.RandomState(3).randint(0, 256, (2, 30, 16, 16), dtype=np.uint8)
    for label, images_of_label in zip(("cat", "dog"), images, strict=True):
        (folder / "pictures" / label).mkdir(parents=True)
        for index, image in enumerate(images_of_label):
            Image.fromarray(image).save(folder / "pictures" / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def servers(demonstration: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Yield a server with the demonstration models and with `web`, the model of the how-to guides."""
    artifacts = tmp_path_factory.mktemp("served") / "artifacts"
    shutil.copytree(demonstration, artifacts)
    folders = "--artifacts", str(artifacts), "--runs", str(artifacts.parent / "runs")
    succeed("train", str(files / "metrics.csv"), "--model", "pca", "--name", "web", *folders)
    with serving(artifacts) as servers:
        yield servers
