"""The commands warn about pixels in another range than the model's, and `elbo calibrate` refuses them."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.commands import in_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("trained", "sent"),
    [((0, 1), (0, 255)), ((0, 255), (0, 1)), ((-1, 1), (0, 1)), ((-1, 1), (0, 255)), ((-2, 3), (0, 1))],
)
def test_commands_warn_about_another_pixel_range_and_calibrate_refuses_it(
    trained: tuple[int, int], sent: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_digits().images / 16
    np.save(tmp_path / "train.npy", np.interp(images[:400], (0, 1), trained))
    np.save(tmp_path / "right.npy", np.interp(images[400:600], (0, 1), trained))
    np.save(tmp_path / "wrong.npy", np.interp(images[400:600], (0, 1), sent))
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    data = str(tmp_path / "train.npy")
    code, _, err = in_process(
        capsys, "train", data, "--model", "pca", "--name", "m", "--latents", "4", "--layout", "nhwc", *folders
    )
    assert code == 0, err
    warning = (
        f"the pixels lie between {sent[0]} and {sent[1]}, but the model was trained on pixels from {trained[0]} "
        f"(black) to {trained[1]}"
    )
    for command in ("evaluate", "score"):
        _, _, err = in_process(capsys, command, "m", str(tmp_path / "wrong.npy"), "--artifacts", str(tmp_path))
        assert warning in err
        code, _, err = in_process(capsys, command, "m", str(tmp_path / "right.npy"), "--artifacts", str(tmp_path))
        assert code == 0
        assert "pixels" not in err
    code, _, err = in_process(capsys, "calibrate", "m", str(tmp_path / "wrong.npy"), *folders)
    assert code == 2
    assert warning in err
    assert not (tmp_path / "m" / "2").exists()
    code, _, err = in_process(capsys, "calibrate", "m", str(tmp_path / "right.npy"), *folders)
    assert code == 0, err
