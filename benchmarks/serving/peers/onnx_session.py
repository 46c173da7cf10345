"""Run the ONNX twin of the model in ONNX Runtime, on one thread. The small servers share this code.

`benchmarks.serving.workload` writes the graph and its weights beside the artifact folder, because reading them from an
artifact needs torch, which these servers do not import.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import orjson

NPY = b"application/x-npy"
JSON = b"application/json"
WARM_UP_ROWS = (1, 32, 256)
FEATURES = 784

Handler = Callable[[bytes, bytes], tuple[bytes, bytes]]


def load(artifact: str) -> Handler:
    """Return a function that computes the response to a request: (Content-Type, body) to (Content-Type, body).

    Args:
        artifact: path of the artifact, `<folder>/artifacts/<name>/<version>/model.pt`.
    """
    folder = Path(artifact).parents[3]
    weights = dict(np.load(folder / "reconstruct.npz"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # as in Elbo
    options.enable_mem_pattern = False
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(
        (folder / "reconstruct.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def answer(content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        if content_type == NPY:
            outputs, _ = session.run(None, {"rows": np.load(io.BytesIO(body))})
            buffer = io.BytesIO()
            np.save(buffer, outputs)
            return NPY, buffer.getvalue()
        rows = np.array(orjson.loads(body)["inputs"], np.float32)
        outputs, errors = session.run(None, {"rows": rows})
        document = {"outputs": outputs, "errors": errors}
        return JSON, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)

    for count in WARM_UP_ROWS:
        session.run(None, {"rows": np.zeros((count, FEATURES), np.float32)})
    answer.weights = weights  # type: ignore[attr-defined] # the session uses their memory, but does not keep them alive
    return answer
