"""The workaround for torchvision's import: it works, and it is still needed."""

import subprocess
import sys

import pytest

pytest.importorskip("torchvision", reason="torchvision comes with vLLM (make setup)")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_torchvision_is_importable_with_it_and_not_without() -> None:
    done = _python("import metis_fast, torchvision; print(torchvision.__version__)")
    assert done.returncode == 0, done.stderr
    if "+cu" not in done.stdout or _python("import torch; print(torch.version.cuda)").stdout.strip() != "None":
        pytest.skip("this torchvision was built for this torch")
    without = _python("import torchvision")
    assert "torchvision::nms does not exist" in without.stderr, "metis_fast/compat.py is no longer needed"


def test_nothing_is_imported_before_its_time() -> None:
    done = _python("import sys, metis_fast; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
