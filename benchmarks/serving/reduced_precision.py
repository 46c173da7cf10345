"""Measure what int8 networks and shorter numbers in JSON would save, and what they would cost.

    python benchmarks/serving/reduced_precision.py
    python benchmarks/serving/reduced_precision.py --smoke    # one epoch, few repetitions

The model is a VAE of images with the layer widths 784-400-400-20-400-400-784 (64 instead of 784 without MNIST).

The first table compares the ONNX twin in float32 with its int8 copy, which ONNX Runtime quantises dynamically: the
weights of each output have one scale, and each batch of activations has one. The error is the largest difference
between the two reconstructions of a row, in standard deviations of the training pixels. It is measured for batches of
test images alone, and for the same images in a batch with one row whose values are 1,000 times as large, which another
client may have sent.

The second table is about the JSON of 32 rows of 784 normal random numbers: the time to round all numbers to so many
significant digits, the time that orjson takes to write them, and their bytes.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import orjson
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.data import describe_machine, load_images
from models.artifact import load
from models.manifest import resolve
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.progress import SilentReporter
from training.train import train

Array = npt.NDArray[Any]
BATCHES = (1, 32, 256)
DIGITS = (3, 4, 5)
LARGE_FACTOR = 1000.0


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one epoch, few repetitions")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the quantiser recommends a preparation that changes nothing here
    print(describe_machine("onnxruntime", "orjson"))
    with tempfile.TemporaryDirectory() as folder:
        compare_networks(Path(folder), epochs=1 if smoke else 10, repetitions=2 if smoke else 200)
    compare_digits(repetitions=2 if smoke else 500)


def compare_networks(folder: Path, epochs: int, repetitions: int) -> None:
    """Train a VAE, and compare its twin in float32 with its twin in int8."""
    source, images = load_images("train")
    x = images[:5000].reshape(len(images[:5000]), -1).astype(np.float32) / np.float32(255.0)
    single, quantised = create_sessions(x, folder, epochs)
    spread = float(x.std())
    x = load_images("test")[1][: max(BATCHES)].reshape(-1, x.shape[1]).astype(np.float32) / np.float32(255.0)
    print(f"\n{source}; {len(x)} test images\n")
    print("| rows | float32, ms | int8, ms | speedup | largest error | beside a large row |\n|---|---|---|---|---|---|")
    for rows in BATCHES:
        batch = np.resize(x, (rows, x.shape[1]))
        beside = np.concatenate([batch, LARGE_FACTOR * batch[:1]])
        seconds = [best_seconds(lambda: run(session, batch), repetitions) for session in (single, quantised)]  # noqa: B023 (called before the next iteration)
        error, error_beside = [
            float(np.abs(run(quantised, given)[:rows] - run(single, given)[:rows]).max()) / spread
            for given in (batch, beside)
        ]
        print(
            f"| {rows} | {1e3 * seconds[0]:.3f} | {1e3 * seconds[1]:.3f} | {seconds[0] / seconds[1]:.2f} "
            f"| {error:.3f} | {error_beside:.3f} |"
        )


def create_sessions(
    x: Array, folder: Path, epochs: int
) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """Train a VAE on x [N, D], and return its reconstruction in float32 and in int8."""
    names = [f"x{index}" for index in range(x.shape[1])]
    missing = np.zeros(x.shape[1], np.int64)
    table = Table(RowStore(x), (x.shape[1],), names, [None] * len(names), None, None, "images", missing=missing)
    config = TrainConfig(model="vae", name="images", hidden=(400, 400), latents=20, epochs=epochs)
    train(config, table, folder, SilentReporter())
    artifact = load(resolve(folder, "images"))
    assert artifact.twin is not None
    graph = onnx.load_from_string(artifact.twin.graphs["reconstruct"].onnx)
    for tensor in graph.graph.initializer:  # the twin has no weights of its own
        tensor.CopyFrom(onnx.numpy_helper.from_array(artifact.twin.weights[tensor.name].numpy(), tensor.name))
    path, int8_path = folder / "float32.onnx", folder / "int8.onnx"
    onnx.save(graph, path)
    quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    first, second = (onnxruntime.InferenceSession(one, options) for one in (path, int8_path))
    return first, second


def run(session: onnxruntime.InferenceSession, x: Array) -> Array:
    """Return the reconstruction [B, D] of x [B, D]."""
    return np.asarray(session.run(None, {"rows": x})[0])


def compare_digits(repetitions: int) -> None:
    """Compare the JSON of all digits with that of fewer digits."""
    x = np.random.RandomState(0).normal(size=(32, 784)).astype(np.float32)
    print("\n| significant digits | rounding, ms | writing, ms | bytes |\n|---|---|---|---|")
    print(f"| all | 0 | {1e3 * best_seconds(lambda: dumps(x), repetitions):.3f} | {len(dumps(x)):,} |")
    for digits in DIGITS:
        rounded = round_to(x, digits)
        rounding = best_seconds(lambda: round_to(x, digits), repetitions)  # noqa: B023 (called before the next iteration)
        writing = best_seconds(lambda: dumps(rounded), repetitions)  # noqa: B023 (called before the next iteration)
        print(f"| {digits} | {1e3 * rounding:.3f} | {1e3 * writing:.3f} | {len(dumps(rounded)):,} |")


def round_to(x: Array, digits: int) -> Array:
    """Return x with so many significant digits, as float32."""
    exponent = np.floor(np.log10(np.maximum(np.abs(x), np.finfo(np.float32).tiny))).astype(np.float64)
    scale = 10.0 ** (digits - 1 - exponent)
    return (np.round(x * scale) / scale).astype(np.float32)


def dumps(x: Array) -> bytes:
    """Return x as JSON."""
    return orjson.dumps(x, option=orjson.OPT_SERIALIZE_NUMPY)


def best_seconds(call: Callable[[], object], repetitions: int) -> float:
    """Return the shortest duration of `call`."""
    best = float("inf")
    for _ in range(repetitions):
        started = perf_counter()
        call()
        best = min(best, perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
