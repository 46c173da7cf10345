"""The commands warn about pixels in another range than the model's, and `elbo calibrate` refuses them."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.commands import in_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("trained", "sent"), [(1.0, 255.0), (255.0, 1.0)])
def test_commands_warn_about_another_pixel_range_and_calibrate_refuses_it(
    trained: float, sent: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_digits().images / 16
    np.save(tmp_path / "train.npy", trained * images[:400])
    np.save(tmp_path / "right.npy", trained * images[400:600])
    np.save(tmp_path / "wrong.npy", sent * images[400:600])
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    data = str(tmp_path / "train.npy")
    code, _, err = in_process(capsys, "train", data, "--model", "pca", "--name", "m", "--latents", "4", *folders)
    assert code == 0, err
    warning = (
        f"the pixels lie between 0 and {sent:g}, but the model was trained on pixels from 0 (black) to {trained:g}"
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
